//! What `kubectl describe` shows, compared with a file: `e2e/tests/golden/NAME.txt`. What is another one in every run is
//! masked first. With `UPDATE_SNAPSHOTS=1` the file is written instead of compared.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use regex::Regex;

use crate::scenario::KIND;
use crate::{eventually, kubectl};

/// How long the last of the events may take to appear.
const EVENTS: Duration = Duration::from_secs(15);

/// What differs from run to run, and what stands in its place. They are used in this order.
const MASKS: &[(&str, &str)] = &[
    // With underscores under systemd.
    (
        r"[0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}",
        "UID",
    ),
    // Also one that a limit has cut.
    (r"\b[0-9a-f]{20,64}\b", "HASH"),
    // The local cluster's own cgroup.
    (r"/podcheckpoint-[\w-]+/kubepods", "/kubepods"),
    (r"\bpolicy [0-9a-f]{16}\b", "policy HASH"),
    (r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "TIME"),
    // Columns of the events.
    (
        r"(?m)^(  (?:Normal|Warning) +\S+) +\S+(?: \(x\d+ over \S+\))? +(\S+) +(.*)$",
        "$1  AGE  $2  $3",
    ),
    (
        r"(?m)^(  (?:Type|----)) +(\S+) +(\S+) +(\S+) +(\S+)$",
        "$1  $2  $3  $4  $5",
    ),
    (
        r"(?m)^( *(?:Size Bytes|Resource Version|\w+ Micros|Pages Written):) +\d+$",
        "$1 NUMBER",
    ),
    (r"\b\d+(\.\d+)? (B|KiB|MiB|GiB)\b", "SIZE"),
    (r"\b\d{7,}\b", "NUMBER"),
    (r"\b\d+(\.\d+)? (us|ms|s)\b", "DURATION"),
    (r"\b(process|thread|pid:?|task|PID) \d+", "$1 NUMBER"),
    (r"/proc/\d+", "/proc/NUMBER"),
    (r"\b\d+ (process\(es\)|thread\(s\))", "NUMBER $1"),
    (r"\b\d+ \(([\w.-]+)\)", "NUMBER ($1)"),
    (r"\b\d+\.\d+\.\d+[\w.+-]*", "VERSION"),
];

/// Masks what differs from run to run.
///
/// # Errors
/// When a pattern is none.
pub fn mask(text: &str) -> Result<String> {
    let mut masked = text.to_owned();
    for (pattern, replacement) in MASKS {
        let pattern = Regex::new(pattern)?;
        masked = pattern.replace_all(&masked, *replacement).into_owned();
    }
    let mut lines: Vec<&str> = masked.lines().map(str::trim_end).collect();
    // Of two events in the same second either may stand first.
    if let Some(events) = lines.iter().position(|line| line.starts_with("  ----"))
        && let Some(events) = lines.get_mut(events + 1..)
    {
        events.sort_unstable();
    }
    Ok(lines.join("\n") + "\n")
}

/// Compares `kubectl describe` of a PodCheckpoint with `e2e/tests/golden/GOLDEN.txt`. The events may come later than the
/// status.
///
/// # Errors
/// When they differ, with both.
pub fn assert_described_as(namespace: &str, name: &str, golden: &str) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{golden}.txt"));
    // `NAME-NUMBER` is one of several attempts: which one does not matter.
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let stem = stem.strip_suffix('-').filter(|stem| !stem.is_empty());
    let describe = || {
        let text = kubectl(&["-n", namespace, "describe", KIND, name])?;
        mask(&stem.map_or(text.clone(), |stem| text.replace(name, stem)))
    };
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::thread::sleep(Duration::from_secs(3));
        return std::fs::write(&path, describe()?).context("writing a golden file");
    }
    let expected = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    eventually(EVENTS, || {
        let found = describe()?;
        let differs = expected.lines().zip(found.lines()).find(|(a, b)| a != b);
        let (wanted, is) = differs.unwrap_or(("(the length)", "(the length)"));
        ensure!(
            found == expected,
            "{golden}.txt differs, first in\n  expected: {wanted}\n  found:    {is}\nthe whole is\n{found}"
        );
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_from_run_to_run_is_masked() {
        let text = "UID:  557ee713-cd67-4343-80a3-1ebcafb6d7c2\n  Frozen:   58 ms  \n  Size Bytes:  281088\n\
                    \u{20}   Path: /sys/fs/cgroup/kubepods/pod557ee713_cd67_4343_80a3_1ebcafb6d7c2/x\n\
                    \u{20}   Time: 2026-11-24T21:50:49Z\n  Kernel:  6.12.57-cloud+deb13-amd64\n\
                    \u{20} Type     Reason             Age                From                     Message\n\
                    \u{20} ----     ------             ----               ----                     -------\n\
                    \u{20} Warning  CheckpointFailed   3s (x2 over 13s)   podcheckpoint-agent      process 812 is frozen\n";
        let masked = mask(text).unwrap();
        assert_eq!(
            masked,
            "UID:  UID\n  Frozen:   DURATION\n  Size Bytes: NUMBER\n\
             \u{20}   Path: /sys/fs/cgroup/kubepods/podUID/x\n    Time: TIME\n  Kernel:  VERSION\n\
             \u{20} Type  Reason  Age  From  Message\n  ----  ------  ----  ----  -------\n\
             \u{20} Warning  CheckpointFailed  AGE  podcheckpoint-agent  process NUMBER is frozen\n"
        );
    }
}
