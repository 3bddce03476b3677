//! Words of others, such as a tenant's program, a monitor or a tool of the node, for a status that a terminal shows.

/// How much of them is shown, in characters.
pub const LIMIT: usize = 500;

/// The beginning of foreign words, without control characters.
pub fn tame(words: &str) -> String {
    cut(words, LIMIT)
}

/// As [`tame`], with another limit.
pub fn cut(words: &str, limit: usize) -> String {
    words
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(limit)
        .collect::<String>()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_words_are_cut_and_cannot_steer_a_terminal() {
        assert_eq!(tame("a\u{1b}[2Jb\nc\n"), "a [2Jb c");
        assert_eq!(tame(&"ä".repeat(10_000)).chars().count(), LIMIT);
        assert_eq!(cut("abc", 2), "ab");
    }
}
