//! What a tracer that did not come back hangs on.

use podcheckpoint_crds::{Outcome, Reason};

use super::{Finding, fail, found};
use crate::observation::{Process, Record, Stall, Step};

/// A tracer that did not come back.
pub(super) fn stalled(
    check: &'static str,
    record: &Record,
    stall: &Stall,
    process: Option<&Process>,
) -> Finding {
    let pid = process.map(|process| process.pid);
    let tracer = stall
        .tracer
        .wchan
        .as_deref()
        .or(stall.tracer.stack.first().map(String::as_str))
        .unwrap_or_default();
    let target = stall.target.wchan.as_deref().unwrap_or_default();
    let waits = |name: &str| tracer.contains(name) || stall.tracer.stack.iter().any(|f| f.contains(name));
    // A call that concerns no process has no target.
    let of_target = if record.tid > 0 {
        format!(", target in state {} in {}", stall.target.state, place(target))
    } else {
        String::new()
    };
    let after = match (stall.tracer_killed && stall.target_untraced, record.tid > 0) {
        (true, true) => "the tracer was ended and the target is untraced",
        (true, false) => "the tracer was ended",
        (false, _) => "the tracer could not be ended",
    };
    let describe = |extra: &str| {
        format!(
            "{:?} did not return: tracer in state {} in {}{of_target}{extra}; {after}",
            record.step,
            stall.tracer.state,
            place(tracer),
        )
    };
    if waits("seccomp_do_user_notification") {
        let holders = if stall.listeners.is_empty() {
            String::new()
        } else {
            format!("; listeners are held by {}", stall.listeners.join(", "))
        };
        return fail(check, Reason::SeccompNotifyUnanswered, pid, describe(&holders));
    }
    // One that computes, or is kept from the processor by its limits, stops when it next runs.
    if record.step == Step::Stop && process.is_some() && stall.target.state == 'R' {
        let words = describe("; it computes or gets no processor time");
        return found(check, Outcome::Unknown, Reason::ProbeIncomplete, pid, words);
    }
    let reason = match (stall.tracer.state, stall.target.state) {
        ('D', _) if waits("ptrace_attach") => Reason::TargetFrozenStopped,
        _ if waits("ptrace_attach") || is_exec(target) => Reason::TargetExecInProgress,
        (_, 'D') if record.step == Step::Stop => Reason::TargetUninterruptible,
        _ => Reason::PtraceStalled,
    };
    fail(check, reason, pid, describe(""))
}

fn place(wchan: &str) -> &str {
    if wchan.is_empty() {
        "an unknown place"
    } else {
        wchan
    }
}

pub(super) fn is_exec(wchan: &str) -> bool {
    ["begin_new_exec", "de_thread", "bprm_execve", "exec_mmap"]
        .iter()
        .any(|name| wchan.contains(name))
}
