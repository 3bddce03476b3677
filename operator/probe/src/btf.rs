//! The functions in the kernel's description of its own types (BTF): a BPF program says by their numbers where it sits.
//! Pure; the format is in the kernel's documentation, bpf/btf.rst.

/// Where the kernel has it.
pub const KERNEL: &str = "/sys/kernel/btf/vmlinux";
/// `BTF_KIND_FUNC`.
const FUNCTION: u32 = 12;

/// Every function with its number, as far as the format is understood.
pub fn functions(btf: &[u8]) -> impl Iterator<Item = (u32, &str)> {
    let (mut rest, strings) = sections(btf).unwrap_or_default();
    // Number 0 is void, and not in the list.
    let types = (1..).map_while(move |number| {
        let (name, info) = (word(rest, 0)?, word(rest, 4)?);
        let kind = info >> 24 & 0x1f;
        rest = rest.get(length(kind, usize::try_from(info & 0xffff).ok()?)?..)?;
        Some((number, kind, name))
    });
    types
        .filter(|(_, kind, _)| *kind == FUNCTION)
        .filter_map(move |(number, _, name)| Some((number, text(strings, name)?)))
}

/// Types and strings.
fn sections(btf: &[u8]) -> Option<(&[u8], &[u8])> {
    let number = |at| usize::try_from(word(btf, at)?).ok();
    let body = btf.get(number(4)?..)?;
    let section = |at| body.get(number(at)?..)?.get(..number(at + 4)?);
    Some((section(8)?, section(16)?))
}

/// Bytes of a type with all that belongs to it; `None` for a kind that is not known.
fn length(kind: u32, count: usize) -> Option<usize> {
    let more = match kind {
        2 | 7..=12 | 16 | 18 => 0,
        1 | 14 | 17 => 4,
        3 => 12,
        6 | 13 => 8 * count,
        4 | 5 | 15 | 19 => 12 * count,
        _ => return None,
    };
    Some(12 + more)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn text(strings: &[u8], at: u32) -> Option<&str> {
    let bytes = strings.get(usize::try_from(at).ok()?..)?;
    std::str::from_utf8(bytes.split(|byte| *byte == 0).next()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An integer, a function without a name in the strings, and `ab`.
    fn small() -> Vec<u8> {
        let header = [0x1_eb9f, 24, 0, 40, 40, 4];
        let types = [0, 1 << 24, 4, 32, 9, 12 << 24, 1, 1, 12 << 24, 1];
        let words = header
            .iter()
            .chain(&types)
            .flat_map(|word: &u32| word.to_ne_bytes());
        words.chain(*b"\0ab\0").collect()
    }

    #[test]
    fn functions_are_found_behind_other_types() {
        assert_eq!(functions(&small()).collect::<Vec<_>>(), [(3, "ab")]);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(at in 0..64usize, bytes in proptest::collection::vec(0u8.., 0..80)) {
            let mut btf = small();
            btf.splice(at.min(btf.len()).., bytes.iter().copied());
            let _ = (functions(&btf).count(), functions(&bytes).count());
        }
    }
}
