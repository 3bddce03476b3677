//! For tests: what the kernel or CRIU writes, with any part of it replaced by arbitrary bytes.

use proptest::prelude::*;

/// The whole of it, too, so that nothing but arbitrary bytes is left. What is no UTF-8 is replaced as when it is read.
pub fn damaged(real: &str) -> impl Strategy<Value = String> {
    let real = real.as_bytes().to_vec();
    let parts = (
        0..=real.len(),
        0..=real.len(),
        prop::collection::vec(any::<u8>(), 0..60),
    );
    parts.prop_map(move |(one, other, bytes)| {
        let mut text = real.clone();
        text.splice(one.min(other)..one.max(other), bytes);
        String::from_utf8_lossy(&text).into_owned()
    })
}
