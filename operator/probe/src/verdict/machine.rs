//! What follows for the machine, whatever the target: controls, the way to the kernel, its features, CRIU.

use podcheckpoint_crds::{Outcome, Reason};

use super::denial::{denies, has, security_module};
use super::stall::stalled;
use super::words::{error, or_nothing, version};
use super::{Finding, fail, found};
use crate::observation::{Criu, End, Observations, Record, Step, Subject};

/// The controls, and whether ptrace reaches the kernel.
pub(super) fn controls(seen: &Observations) -> Vec<Finding> {
    let records = seen
        .steps
        .iter()
        .filter(|record| record.subject == Subject::Control);
    records
        .filter_map(|record| match record.step {
            Step::Reach => reach(seen, record),
            _ => control(record),
        })
        .collect()
}

fn control(record: &Record) -> Option<Finding> {
    let what = match record.step {
        Step::Clock => "a sleep of 50 us",
        Step::ForkAndWait => "fork, exit and wait",
        _ => "stopping a child by a signal",
    };
    let evidence = match &record.end {
        End::Done(7) if record.step == Step::ForkAndWait => return None,
        End::Done(_) if record.step != Step::ForkAndWait => return None,
        End::Done(status) => format!("{what} gave exit status {status} instead of 7"),
        End::Stalled(_) => format!("{what} did not end"),
        End::Errno(errno) => format!("{what} failed: {}", error(*errno)),
        End::Killed(signal) => format!("{what} was ended by signal {signal}"),
        End::Skipped(_) => return None,
    };
    Some(fail("controls", Reason::GuestUnhealthy, None, evidence))
}

fn reach(seen: &Observations, record: &Record) -> Option<Finding> {
    const CHECK: &str = "ptrace reaches the kernel";
    let filtered = seen.tracer.seccomp != 0;
    let mode = seen.tracer.seccomp;
    let (reason, evidence) = match &record.end {
        End::Done(_) | End::Skipped(_) => return None,
        End::Stalled(stall) => return Some(stalled(CHECK, record, stall, None)),
        End::Killed(signal) if *signal == libc::SIGSYS => (
            Reason::SeccompKillsTracer,
            format!("the probe's child was killed by SIGSYS (Seccomp: {mode})"),
        ),
        End::Errno(libc::ENOSYS) if filtered => (
            Reason::SeccompListenerGone,
            format!("ptrace of a process that cannot exist gave ENOSYS instead of ESRCH (Seccomp: {mode})"),
        ),
        End::Errno(errno) if filtered => (
            Reason::SeccompBlocksTracer,
            format!(
                "ptrace of a process that cannot exist gave {} instead of ESRCH (Seccomp: {mode})",
                error(*errno)
            ),
        ),
        End::Killed(signal) => (
            Reason::PtraceDeniedUnexplained,
            format!("the probe's child was killed by signal {signal}, and it has no seccomp filter"),
        ),
        End::Errno(errno) => (
            Reason::PtraceDeniedUnexplained,
            format!(
                "ptrace of a process that cannot exist gave {} instead of ESRCH, and the probe has no seccomp filter: something answers in the kernel's place",
                error(*errno)
            ),
        ),
    };
    Some(fail(CHECK, reason, None, evidence))
}

/// The mechanism, on a child of the probe's own.
pub(super) fn own_child(seen: &Observations) -> Vec<Finding> {
    const CHECK: &str = "ptrace of the probe's own child";
    let records = seen.steps.iter().filter(|record| record.subject == Subject::Own);
    records.filter_map(|record| match (&record.end, record.step) {
        (End::Stalled(stall), _) => Some(stalled(CHECK, record, stall, None)),
        (End::Done(0), Step::Breakpoint) => Some(breakpoints(seen, "a hardware breakpoint in the probe's own child did not trap")),
        (End::Errno(errno), Step::Breakpoint) => Some(breakpoints(seen, &format!("the debug registers cannot be written: {}", error(*errno)))),
        (End::Errno(libc::EINVAL), Step::SuspendSeccomp) => Some(fail(
            CHECK,
            Reason::KernelLacksCheckpointRestore,
            None,
            "PTRACE_O_SUSPEND_SECCOMP gave EINVAL",
        )),
        // Refused to the tracer: it matters only for a target with a filter, where it is found again.
        (End::Errno(_), Step::SuspendSeccomp | Step::SeccompFilter) => None,
        (End::Errno(errno), Step::Rseq) => Some(found(
            CHECK,
            Outcome::Degraded,
            Reason::KernelFeatureMissing,
            None,
            format!("PTRACE_GET_RSEQ_CONFIGURATION gave {}: processes that use rseq cannot be saved before kernel 5.13", error(*errno)),
        )),
        (End::Errno(errno), step) if denies(*errno) => Some(denied_own(seen, step, *errno)),
        (End::Errno(errno), step) => Some(fail(CHECK, Reason::PtraceOperationFailed, None, format!("{step:?}: {}", error(*errno)))),
        (End::Killed(signal), step) => Some(fail(CHECK, Reason::PtraceDeniedUnexplained, None, format!("the tracer was killed by signal {signal} in {step:?}"))),
        (End::Done(_) | End::Skipped(_), _) => None,
    }).collect()
}

fn denied_own(seen: &Observations, step: Step, errno: i32) -> Finding {
    const CHECK: &str = "ptrace of the probe's own child";
    let evidence = format!("{step:?} of the probe's own child gave {}", error(errno));
    match seen.kernel.yama {
        Some(3) => fail(
            CHECK,
            Reason::YamaNoAttach,
            None,
            format!("{evidence}; kernel.yama.ptrace_scope is 3"),
        ),
        Some(2) if !has(seen.tracer.capabilities) => fail(
            CHECK,
            Reason::YamaScopeRestricted,
            None,
            format!("{evidence}; kernel.yama.ptrace_scope is 2 and the probe lacks CAP_SYS_PTRACE"),
        ),
        _ => security_module(seen, None).map_or_else(
            || {
                fail(
                    CHECK,
                    Reason::PtraceDeniedUnexplained,
                    None,
                    format!("{evidence}, although it may always trace its own child"),
                )
            },
            |(reason, why)| fail(CHECK, reason, None, format!("{evidence}; {why}")),
        ),
    }
}

fn breakpoints(seen: &Observations, evidence: &str) -> Finding {
    let old = seen
        .criu
        .as_ref()
        .and_then(|criu| criu.version.as_deref())
        .and_then(version)
        .is_some_and(|v| v < (4, 2));
    let outcome = if old { Outcome::Fail } else { Outcome::Degraded };
    found(
        "hardware breakpoints",
        outcome,
        Reason::HardwareBreakpointsBroken,
        None,
        evidence,
    )
}

/// Features without which CRIU saves no network namespace.
const SOCKET_LISTS: [&str; 4] = ["UNIX_DIAG", "INET_DIAG", "INET_UDP_DIAG", "PACKET_DIAG"];

/// What CRIU needs of the kernel.
pub(super) fn kernel(seen: &Observations) -> Vec<Finding> {
    const CHECK: &str = "kernel features";
    let missing = |name: &str| seen.kernel.features.get(name) == Some(&false);
    let mut findings = Vec::new();
    if missing("CHECKPOINT_RESTORE") || missing("KCMP") {
        let names: Vec<&str> = ["CHECKPOINT_RESTORE", "KCMP"]
            .into_iter()
            .filter(|name| missing(name))
            .collect();
        let evidence = format!("kernel {} has no {}", seen.kernel.release, names.join(", "));
        findings.push(fail(CHECK, Reason::KernelLacksCheckpointRestore, None, evidence));
    }
    // CRIU lists the sockets of every network namespace that it saves, whether a process has some or not, and fails
    // without a word about it; `criu check` calls the same kernel good. Without NETLINK_DIAG it does go on.
    let sockets: Vec<&str> = SOCKET_LISTS.into_iter().filter(|name| missing(name)).collect();
    if !sockets.is_empty() {
        let evidence = format!(
            "kernel {} lists no sockets by {}",
            seen.kernel.release,
            sockets.join(", ")
        );
        // It does not save the one that it is in itself, which is a hostNetwork pod's too.
        let own = !seen.processes.is_empty() && seen.processes.iter().all(|process| process.first_network);
        let outcome = if own { Outcome::Degraded } else { Outcome::Fail };
        findings.push(found(
            CHECK,
            outcome,
            Reason::KernelFeatureMissing,
            None,
            evidence,
        ));
    }
    findings
}

/// CRIU itself: none, one that is too old, one that hangs, one that misses something.
pub(super) fn criu(seen: &Observations) -> Vec<Finding> {
    let Some(criu) = &seen.criu else {
        return Vec::new();
    };
    let mut findings = if criu.good {
        Vec::new()
    } else {
        bad_criu(seen, criu)
    };
    findings.extend(stale_cache(criu));
    findings
}

fn bad_criu(seen: &Observations, criu: &Criu) -> Vec<Finding> {
    const CHECK: &str = "criu check";
    if criu.path.is_none() {
        return vec![fail(
            CHECK,
            Reason::CriuMissing,
            None,
            "no criu where the container runtime looks for it, nor in the usual folders",
        )];
    }
    let name = format!(
        "CRIU {} on kernel {}",
        criu.version.as_deref().unwrap_or("of unknown version"),
        seen.kernel.release
    );
    let lines = criu.lines.join(" | ");
    let mut findings = Vec::new();
    if is_too_old(seen, criu) {
        let evidence = format!(
            "{name}: kernels from 6.13 on need CRIU 4.1; it wrote: {}",
            or_nothing(&lines)
        );
        findings.push(fail(CHECK, Reason::CriuKernelMismatch, None, evidence));
    }
    if criu.status.is_none() {
        findings.push(unfinished(&name, criu, &lines));
    } else if findings.is_empty() {
        findings.push(fail(
            CHECK,
            Reason::KernelFeatureMissing,
            None,
            format!("{name}: {}", or_nothing(&lines)),
        ));
    }
    findings
}

/// CRIU believes its cache, and does not notice that it was written when the kernel denied it something. What was only
/// too slow to be compared says nothing about the target.
fn stale_cache(criu: &Criu) -> Option<Finding> {
    const CHECK: &str = "cache of CRIU";
    let cached = criu.with_cache.as_deref()?;
    if cached.status.is_none() && computes(cached) {
        return None;
    }
    if cached.status.is_none() {
        let evidence = "criu check with the cache /run/criu.kdat did not end in time";
        return Some(found(
            CHECK,
            Outcome::Unknown,
            Reason::ProbeIncomplete,
            None,
            evidence,
        ));
    }
    let (with, without) = (only_of(cached, criu), only_of(criu, cached));
    if with.is_empty() && without.is_empty() && cached.good == criu.good {
        return None;
    }
    let evidence = format!(
        "criu check says only with /run/criu.kdat: {}; only without it: {}",
        or_nothing(&with.join(" | ")),
        or_nothing(&without.join(" | "))
    );
    Some(found(
        CHECK,
        Outcome::Degraded,
        Reason::CriuCacheStale,
        None,
        evidence,
    ))
}

/// What one run finds missing and the other does not. Other parts of CRIU speak only while they look at the kernel, and
/// count where only one run fails; numbers may be those of a process.
fn only_of<'a>(one: &'a Criu, other: &Criu) -> Vec<&'a str> {
    let words = |line: &str| line.replace(|c: char| c.is_ascii_digit(), "");
    let fails = other.good && !one.good;
    let lines = one
        .lines
        .iter()
        .filter(|line| fails || line.contains("cr-check.c:"));
    let mut only: Vec<&str> = lines
        .filter(|line| !other.lines.iter().any(|theirs| words(theirs) == words(line)))
        .map(String::as_str)
        .collect();
    only.dedup();
    only
}

fn is_too_old(seen: &Observations, criu: &Criu) -> bool {
    let versions = criu
        .version
        .as_deref()
        .and_then(version)
        .zip(version(&seen.kernel.release));
    // CRIU 4.1 is the first that knows the vDSO of kernel 6.13.
    let by_version = versions.is_some_and(|(criu, kernel)| criu < (4, 1) && kernel >= (6, 13));
    by_version || criu.lines.iter().any(|line| line.contains("rt vDSO area bounds"))
}

/// At the deadline: a task that computes is slow, one that waits hangs.
fn computes(criu: &Criu) -> bool {
    criu.waiting.iter().any(|task| task.ends_with("state R"))
}

fn unfinished(name: &str, criu: &Criu, lines: &str) -> Finding {
    let evidence = format!(
        "{name} did not end within {} ms; {}; it wrote: {}",
        criu.micros / 1000,
        criu.waiting.join(", "),
        or_nothing(lines)
    );
    if computes(criu) {
        found(
            "criu check",
            Outcome::Unknown,
            Reason::ProbeIncomplete,
            None,
            evidence,
        )
    } else {
        fail("criu check", Reason::CriuProbeStalled, None, evidence)
    }
}
