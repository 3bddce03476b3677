//! Words for a status that a terminal shows: those of others, such as a tenant's program, a monitor or a tool of the
//! node, and sizes and times.

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

/// A size for people, in binary units.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or_default();
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {name}")
    }
}

/// A time for people.
pub fn human_duration(duration: std::time::Duration) -> String {
    if duration.as_secs() == 0 {
        format!("{} ms", duration.as_millis())
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn foreign_words_are_cut_and_cannot_steer_a_terminal() {
        assert_eq!(tame("a\u{1b}[2Jb\nc\n"), "a [2Jb c");
        assert_eq!(tame(&"ä".repeat(10_000)).chars().count(), LIMIT);
        assert_eq!(cut("abc", 2), "ab");
    }

    #[test]
    fn sizes_and_times_are_for_people() {
        assert_eq!(
            (human_bytes(900), human_bytes(281_088)),
            ("900 B".into(), "274.5 KiB".into())
        );
        assert_eq!(
            (
                human_duration(Duration::from_millis(41)),
                human_duration(Duration::from_millis(2345))
            ),
            ("41 ms".into(), "2.3 s".into())
        );
    }
}
