//! The functions in the kernel's description of its own types (BTF): a BPF program says by their numbers where it sits.
//! Pure; the format is in the kernel's documentation, bpf/btf.rst.

/// Where the kernel has it.
pub const KERNEL: &str = "/sys/kernel/btf/vmlinux";
/// `BTF_KIND_FUNC`.
const FUNCTION: u32 = 12;

/// Name of the function with this number.
pub fn name(btf: &[u8], number: u32) -> Option<&str> {
    let (_, name) = functions(btf).find(|(of, _)| *of == number)?;
    text(sections(btf)?.1, name)
}

/// Number of the function with this name.
pub fn number(btf: &[u8], name: &str) -> Option<u32> {
    let (_, strings) = sections(btf)?;
    let of = |(number, at)| (text(strings, at) == Some(name)).then_some(number);
    functions(btf).find_map(of)
}

/// Every function: its number, and where its name is; as far as the format is understood.
fn functions(btf: &[u8]) -> impl Iterator<Item = (u32, u32)> {
    let (mut rest, _) = sections(btf).unwrap_or_default();
    // Number 0 is void, and not in the list.
    let types = (1..).map_while(move |number| {
        let (name, info) = (word(rest, 0)?, word(rest, 4)?);
        let kind = info >> 24 & 0x1f;
        rest = rest.get(length(kind, usize::try_from(info & 0xffff).ok()?)?..)?;
        Some((number, kind, name))
    });
    types.filter_map(|(number, kind, name)| (kind == FUNCTION).then_some((number, name)))
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

    /// An integer, a function whose name is not in the strings, and `ab`.
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
        let btf = small();
        assert_eq!((number(&btf, "ab"), name(&btf, 3)), (Some(3), Some("ab")));
        assert_eq!(
            (number(&btf, "b"), name(&btf, 1), name(&btf, 2)),
            (None, None, None)
        );
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(at in 0..64usize, bytes in proptest::collection::vec(0u8.., 0..80)) {
            let mut btf = small();
            btf.splice(at.min(btf.len()).., bytes.iter().copied());
            for btf in [btf, bytes] {
                let _ = (functions(&btf).count(), number(&btf, "ab"), name(&btf, 3));
            }
        }
    }
}
