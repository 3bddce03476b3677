//! Words for what was seen.

use crate::observation::{End, Step};

/// Name and meaning of an error number.
pub(super) fn error(errno: i32) -> String {
    let errno = nix::errno::Errno::from_raw(errno);
    format!("{errno:?}")
}

pub(super) fn outcome_word(end: &End) -> String {
    match end {
        End::Done(_) => "works".into(),
        End::Errno(errno) => error(*errno),
        End::Killed(signal) => format!("killed by signal {signal}"),
        End::Stalled(_) => "hangs".into(),
        End::Skipped(_) => "not tried".into(),
    }
}

pub(super) fn step_word(step: Step) -> &'static str {
    match step {
        Step::Maps => "reading /proc/PID/maps",
        Step::Kcmp => "kcmp",
        Step::ReadMemory => "process_vm_readv",
        Step::GetFd => "pidfd_getfd",
        Step::Seize => "PTRACE_SEIZE",
        _ => "a step",
    }
}

/// Major and minor of a version: `4.1.1`, `6.18.44-x`.
pub(super) fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The text, or that there is none.
pub(super) fn or_nothing(text: &str) -> &str {
    if text.is_empty() { "nothing" } else { text }
}
