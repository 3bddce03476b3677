//! The verdict: a pure function from what was seen to findings, the root cause first. It reads nothing and touches
//! nothing, so that a recorded case replays.

use podcheckpoint_crds::{Outcome, Reason};
use serde::Serialize;

use crate::facts::CAP_SYS_PTRACE;
use crate::observation::{
    Criu, End, Observations, Process, Record, Stall, Step, Subject, Thread, UserNamespace,
};
use crate::rungs::LISTENER;

/// What follows from the observations.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// The worst of the findings.
    pub outcome: Outcome,
    /// The root cause first, then what is independent of it, then consequences, then what passed.
    pub findings: Vec<Finding>,
}

impl Verdict {
    /// The root cause, or the pass.
    pub fn root(&self) -> Option<&Finding> {
        self.findings.first()
    }

    /// A checkpoint would hang with the pod frozen: nothing may override this.
    pub fn hangs(&self) -> bool {
        self.findings
            .iter()
            .any(|finding| finding.outcome == Outcome::Fail && hangs(finding.reason))
    }
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// What came of it.
    pub outcome: Outcome,
    /// Why.
    #[serde(serialize_with = "as_word")]
    pub reason: Reason,
    /// The process, where it is one of several.
    pub pid: Option<i32>,
    /// What was seen.
    pub evidence: String,
    /// The reason of which this one is a consequence.
    #[serde(serialize_with = "as_word_if_any")]
    pub follows_from: Option<Reason>,
}

fn as_word<S: serde::Serializer>(reason: &Reason, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(reason.as_str())
}

fn as_word_if_any<S: serde::Serializer>(reason: &Option<Reason>, serializer: S) -> Result<S::Ok, S::Error> {
    reason.map(Reason::as_str).serialize(serializer)
}

/// Causes before their consequences: what stands earlier explains what stands later.
const ORDER: &[Reason] = &[
    Reason::GuestUnhealthy,
    Reason::SeccompNotifyUnanswered,
    Reason::SeccompKillsTracer,
    Reason::SeccompListenerGone,
    Reason::SeccompBlocksTracer,
    Reason::TargetPidNotVisible,
    Reason::TargetKernelThread,
    Reason::TargetFrozenStopped,
    Reason::TargetFrozen,
    Reason::AlreadyTraced,
    Reason::TargetExiting,
    Reason::TargetExecInProgress,
    Reason::TargetUninterruptible,
    Reason::YamaNoAttach,
    Reason::AppArmorDenied,
    Reason::SELinuxDenied,
    Reason::MissingPtraceCapability,
    Reason::YamaScopeRestricted,
    Reason::TargetNotDumpable,
    Reason::BpfLsmDenied,
    Reason::LandlockDenied,
    Reason::KernelLacksCheckpointRestore,
    Reason::TracerSeccompFiltered,
    Reason::CriuMissing,
    Reason::CriuKernelMismatch,
    Reason::CriuProbeStalled,
    Reason::KernelFeatureMissing,
    Reason::SessionLeaderOutsidePidns,
    Reason::PendingSigtrap,
    Reason::TargetStopped,
    Reason::HardwareBreakpointsBroken,
    Reason::PtraceStalled,
    Reason::PtraceDeniedUnexplained,
    Reason::PtraceOperationFailed,
    Reason::SeccompListenerNotRestorable,
    Reason::ProbeIncomplete,
    Reason::PtraceWorks,
];

fn hangs(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::GuestUnhealthy
            | Reason::SeccompNotifyUnanswered
            | Reason::TargetFrozenStopped
            | Reason::TargetFrozen
            | Reason::TargetExecInProgress
            | Reason::TargetUninterruptible
            | Reason::CriuProbeStalled
            | Reason::HardwareBreakpointsBroken
            | Reason::PtraceStalled
    )
}

/// What one reason explains of another's appearance.
fn explains(cause: Reason, effect: Reason) -> bool {
    match effect {
        Reason::CriuProbeStalled | Reason::KernelFeatureMissing => {
            matches!(
                cause,
                Reason::CriuKernelMismatch | Reason::KernelLacksCheckpointRestore
            )
        }
        Reason::YamaScopeRestricted | Reason::TargetNotDumpable => cause == Reason::MissingPtraceCapability,
        Reason::TargetStopped | Reason::TargetUninterruptible => {
            matches!(
                cause,
                Reason::TargetFrozen | Reason::TargetFrozenStopped | Reason::AlreadyTraced
            )
        }
        Reason::PtraceDeniedUnexplained | Reason::PtraceStalled | Reason::PtraceOperationFailed => {
            rank(cause) < rank(Reason::PtraceStalled)
        }
        Reason::ProbeIncomplete => cause != Reason::PtraceWorks,
        _ => false,
    }
}

fn rank(reason: Reason) -> usize {
    ORDER.iter().position(|r| *r == reason).unwrap_or(ORDER.len())
}

/// Judges.
pub fn verdict(seen: &Observations) -> Verdict {
    let mut findings = Vec::new();
    findings.extend(machine(seen));
    findings.extend(own_child(seen));
    findings.extend(missing_targets(seen));
    for process in &seen.processes {
        findings.extend(facts_of(process));
        findings.extend(steps_of(seen, process));
    }
    findings.extend(kernel(seen));
    findings.extend(seen.criu.as_ref().and_then(|criu| criu_of(seen, criu)));
    findings.extend(incomplete(seen, &findings));
    findings.extend(passed(seen, &findings));
    findings.extend(irrelevant(seen));
    arrange(findings)
}

/// Each thing once, causes first, consequences marked.
fn arrange(mut findings: Vec<Finding>) -> Verdict {
    findings.sort_by(|a, b| key(a).cmp(&key(b)));
    findings.dedup_by(|a, b| a.reason == b.reason && a.pid == b.pid && a.outcome != Outcome::Pass);
    let bad: Vec<Reason> = findings
        .iter()
        .filter(|f| f.outcome == Outcome::Fail)
        .map(|f| f.reason)
        .collect();
    for finding in &mut findings {
        finding.follows_from = bad
            .iter()
            .copied()
            .find(|cause| *cause != finding.reason && explains(*cause, finding.reason));
    }
    findings.sort_by_key(|finding| {
        (
            weight(finding.outcome),
            finding.follows_from.is_some(),
            rank(finding.reason),
            finding.pid,
        )
    });
    let outcome = findings
        .first()
        .map_or(Outcome::Unknown, |finding| finding.outcome);
    Verdict { outcome, findings }
}

fn key(finding: &Finding) -> (usize, Option<i32>, u8, &str) {
    (
        rank(finding.reason),
        finding.pid,
        weight(finding.outcome),
        &finding.evidence,
    )
}

fn weight(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Fail => 0,
        Outcome::Degraded => 1,
        Outcome::Unknown => 2,
        Outcome::Pass => 3,
    }
}

fn found(
    check: &'static str,
    outcome: Outcome,
    reason: Reason,
    pid: Option<i32>,
    evidence: impl Into<String>,
) -> Finding {
    Finding {
        check,
        outcome,
        reason,
        pid,
        evidence: evidence.into(),
        follows_from: None,
    }
}

fn fail(check: &'static str, reason: Reason, pid: Option<i32>, evidence: impl Into<String>) -> Finding {
    found(check, Outcome::Fail, reason, pid, evidence)
}

// --- the machine ---------------------------------------------------------------------------------------------------

fn machine(seen: &Observations) -> Vec<Finding> {
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

fn own_child(seen: &Observations) -> Vec<Finding> {
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

fn kernel(seen: &Observations) -> Vec<Finding> {
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
    let sockets: Vec<&str> = ["UNIX_DIAG", "INET_DIAG", "INET_UDP_DIAG"]
        .into_iter()
        .filter(|name| missing(name))
        .collect();
    // CRIU's own word counts for more: it may do without.
    let content = seen.criu.as_ref().is_some_and(|criu| criu.good);
    if !sockets.is_empty() && !content {
        let evidence = format!(
            "the kernel lists no sockets by {}: processes with such sockets cannot be saved",
            sockets.join(", ")
        );
        findings.push(found(
            CHECK,
            Outcome::Degraded,
            Reason::KernelFeatureMissing,
            None,
            evidence,
        ));
    }
    findings
}

fn criu_of(seen: &Observations, criu: &Criu) -> Option<Finding> {
    const CHECK: &str = "criu check";
    if criu.path.is_none() {
        return Some(fail(
            CHECK,
            Reason::CriuMissing,
            None,
            "no criu in the usual folders",
        ));
    }
    let name = format!("CRIU {}", criu.version.as_deref().unwrap_or("of unknown version"));
    let lines = criu.lines.join(" | ");
    let too_old = criu.lines.iter().any(|line| line.contains("rt vDSO area bounds"));
    if criu.good {
        return None;
    }
    if too_old {
        return Some(fail(
            CHECK,
            Reason::CriuKernelMismatch,
            None,
            format!("{name} on kernel {}: {lines}", seen.kernel.release),
        ));
    }
    if criu.status.is_none() {
        let waiting = criu.waiting.join(", ");
        let evidence = format!(
            "{name} did not end within {} ms; waiting: {waiting}; it wrote: {}",
            criu.micros / 1000,
            or_nothing(&lines)
        );
        return Some(fail(CHECK, Reason::CriuProbeStalled, None, evidence));
    }
    // From kernel 6.13 on CRIU needs the vDSO code of version 4.1.
    let mismatch = criu
        .version
        .as_deref()
        .and_then(version)
        .zip(version(&seen.kernel.release));
    let reason = match mismatch {
        Some((criu, kernel)) if criu < (4, 1) && kernel >= (6, 13) => Reason::CriuKernelMismatch,
        _ => Reason::KernelFeatureMissing,
    };
    Some(fail(
        CHECK,
        reason,
        None,
        format!("{name} on kernel {}: {}", seen.kernel.release, or_nothing(&lines)),
    ))
}

fn or_nothing(text: &str) -> &str {
    if text.is_empty() { "nothing" } else { text }
}

/// Major and minor of a version: `4.1.1`, `6.18.44-x`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

// --- the target ----------------------------------------------------------------------------------------------------

fn missing_targets(seen: &Observations) -> Vec<Finding> {
    let missing = seen
        .targets
        .iter()
        .filter(|pid| !seen.processes.iter().any(|process| process.pid == **pid));
    missing
        .map(|pid| {
            fail(
                "target",
                Reason::TargetPidNotVisible,
                Some(*pid),
                format!("/proc has no process {pid}"),
            )
        })
        .collect()
}

/// What follows from the facts alone.
fn facts_of(process: &Process) -> Vec<Finding> {
    let pid = Some(process.pid);
    let mut findings = Vec::new();
    if process.kernel_thread {
        findings.push(fail(
            "target",
            Reason::TargetKernelThread,
            pid,
            format!("{} is a thread of the kernel", process.comm),
        ));
    }
    findings.extend(frozen(process));
    let frozen = !findings.is_empty();
    findings.extend(
        process
            .notable
            .iter()
            .filter_map(|thread| thread_of(process, thread, frozen)),
    );
    if process.session_outside {
        let evidence = format!(
            "process {} is in a session that was begun outside its process namespace",
            process.pid
        );
        findings.push(fail("sessions", Reason::SessionLeaderOutsidePidns, pid, evidence));
    }
    findings
}

fn frozen(process: &Process) -> Option<Finding> {
    let freezer = process.freezers.iter().find(|freezer| freezer.frozen)?;
    let by = freezer
        .by
        .as_ref()
        .filter(|by| **by != freezer.path)
        .map_or_else(String::new, |by| format!(", by {by}"));
    let evidence = format!("cgroup v{} {} is frozen{by}", freezer.version, freezer.path);
    let stopped = |thread: &&Thread| thread.state == 'T' || thread.wchan.as_deref() == Some("do_signal_stop");
    Some(match process.notable.iter().find(stopped) {
        Some(thread) => fail(
            "freezer",
            Reason::TargetFrozenStopped,
            Some(process.pid),
            format!("{evidence}; thread {} was stopped by a signal before", thread.tid),
        ),
        None => fail("freezer", Reason::TargetFrozen, Some(process.pid), evidence),
    })
}

fn thread_of(process: &Process, thread: &Thread, frozen: bool) -> Option<Finding> {
    const CHECK: &str = "threads";
    let (pid, tid) = (Some(process.pid), thread.tid);
    if thread.tracer != 0 {
        let command = thread.tracer_comm.as_deref().unwrap_or("?");
        let evidence = format!("thread {tid} is traced by process {} ({command})", thread.tracer);
        return Some(fail("tracer", Reason::AlreadyTraced, pid, evidence));
    }
    let wchan = thread.wchan.as_deref().unwrap_or_default();
    match thread.state {
        // Any thread but the first may end at any time, and a child that has ended is saved as such.
        'Z' | 'X' if tid != process.pid => None,
        'Z' | 'X' if process.threads > 1 => Some(fail(
            CHECK,
            Reason::TargetExiting,
            pid,
            format!(
                "the first thread {tid} has ended while {} others are there",
                process.threads - 1
            ),
        )),
        'Z' | 'X' if process.root => Some(fail(
            CHECK,
            Reason::TargetExiting,
            pid,
            format!("process {tid} has ended"),
        )),
        'D' if frozen => None,
        'D' if is_exec(wchan) => Some(fail(
            CHECK,
            Reason::TargetExecInProgress,
            pid,
            format!("thread {tid} waits in {wchan}"),
        )),
        'D' => Some(fail(
            CHECK,
            Reason::TargetUninterruptible,
            pid,
            format!("thread {tid} is in state D in {}", uninterruptible(wchan)),
        )),
        'T' if !frozen => Some(stopped(process, tid)),
        _ if thread.trap_pending => Some(fail(
            "signals",
            Reason::PendingSigtrap,
            pid,
            format!("SIGTRAP is pending for thread {tid}"),
        )),
        _ => None,
    }
}

/// containerd and CRI-O freeze the cgroup first, and in cgroup v1 a process that is stopped and then frozen cannot be
/// seized.
fn stopped(process: &Process, tid: i32) -> Finding {
    let v1 = process.freezers.iter().any(|freezer| freezer.version == 1);
    let outcome = if v1 { Outcome::Fail } else { Outcome::Degraded };
    found(
        "threads",
        outcome,
        Reason::TargetStopped,
        Some(process.pid),
        format!("thread {tid} is stopped by a signal"),
    )
}

fn is_exec(wchan: &str) -> bool {
    ["begin_new_exec", "de_thread", "bprm_execve", "exec_mmap"]
        .iter()
        .any(|name| wchan.contains(name))
}

fn uninterruptible(wchan: &str) -> String {
    match wchan {
        "" => "a place that cannot be read".into(),
        "kernel_clone" | "wait_for_vfork_done" => {
            format!("{wchan}: it waits for a child made by vfork to call exec or to end")
        }
        "seccomp_do_user_notification" => {
            format!("{wchan}: it waits for a seccomp listener that does not answer")
        }
        _ => wchan.to_owned(),
    }
}

/// What follows from what was tried.
fn steps_of(seen: &Observations, process: &Process) -> Vec<Finding> {
    let own: Vec<&Record> = seen
        .steps
        .iter()
        .filter(|r| r.subject == Subject::Target && r.pid == process.pid)
        .collect();
    if was_gone(seen, process) {
        // Children come and go; only what was asked for has to stay.
        let evidence = format!("process {} ended while it was looked at", process.pid);
        let finding = || fail("target", Reason::TargetExiting, Some(process.pid), evidence);
        return process.root.then(finding).into_iter().collect();
    }
    let mut findings = Vec::new();
    let denied = own
        .iter()
        .find(|record| is_access(record.step) && matches!(record.end, End::Errno(errno) if denies(errno)));
    // What already is known to be in the way explains the refusal.
    let known = facts_of(process)
        .iter()
        .any(|finding| finding.outcome == Outcome::Fail);
    if let Some(record) = denied.filter(|record| !known || record.step != Step::Seize) {
        findings.push(denial(seen, process, &own, record));
    }
    findings.extend(own.iter().filter_map(|record| step_of(seen, process, record)));
    findings
}

fn is_access(step: Step) -> bool {
    matches!(
        step,
        Step::Maps | Step::Kcmp | Step::ReadMemory | Step::GetFd | Step::Seize
    )
}

fn denies(errno: i32) -> bool {
    matches!(errno, libc::EPERM | libc::EACCES)
}

fn step_of(seen: &Observations, process: &Process, record: &Record) -> Option<Finding> {
    const CHECK: &str = "ptrace of the target";
    let pid = Some(process.pid);
    match (&record.end, record.step) {
        (End::Stalled(stall), _) => Some(stalled(CHECK, record, stall, Some(process))),
        (End::Killed(signal), step) => Some(fail(
            CHECK,
            Reason::PtraceDeniedUnexplained,
            pid,
            format!("the tracer was killed by signal {signal} in {step:?}"),
        )),
        (End::Errno(libc::ENOSYS), Step::Kcmp) => Some(fail(
            CHECK,
            Reason::KernelLacksCheckpointRestore,
            pid,
            "kcmp gave ENOSYS",
        )),
        (End::Errno(libc::EINVAL), Step::SuspendSeccomp) => Some(fail(
            CHECK,
            Reason::KernelLacksCheckpointRestore,
            pid,
            "PTRACE_O_SUSPEND_SECCOMP gave EINVAL",
        )),
        (End::Errno(errno), Step::SuspendSeccomp | Step::SeccompFilter) => {
            Some(suspend_denied(seen, process, record.step, *errno))
        }
        (End::Done(value), Step::SeccompFilter) if *value >= LISTENER => Some(found(
            "seccomp filters",
            Outcome::Degraded,
            Reason::SeccompListenerNotRestorable,
            pid,
            format!("a filter of thread {} returns SECCOMP_RET_USER_NOTIF", record.tid),
        )),
        (End::Errno(libc::EBUSY), Step::RunsAgain) => Some(fail(
            "tracer",
            Reason::AlreadyTraced,
            pid,
            format!("thread {} is traced after it was let go", record.tid),
        )),
        // Missing on old kernels only; found with the probe's own child.
        (End::Errno(_), Step::Rseq) => None,
        (End::Errno(errno), step) if !(is_access(step) && denies(*errno)) => Some(fail(
            CHECK,
            Reason::PtraceOperationFailed,
            pid,
            format!("{step:?} of thread {}: {}", record.tid, error(*errno)),
        )),
        _ => None,
    }
}

fn suspend_denied(seen: &Observations, process: &Process, step: Step, errno: i32) -> Finding {
    let evidence = format!("{step:?} of process {} gave {}", process.pid, error(errno));
    let pid = Some(process.pid);
    if seen.tracer.seccomp != 0 {
        return fail(
            "seccomp filters",
            Reason::TracerSeccompFiltered,
            pid,
            format!("{evidence}; the tracer has Seccomp: {}", seen.tracer.seccomp),
        );
    }
    let check = "seccomp filters";
    // CAP_SYS_ADMIN, capabilities(7).
    if seen.tracer.capabilities & (1 << 21) == 0 || !seen.tracer.initial_user_namespace {
        return fail(
            check,
            Reason::MissingPtraceCapability,
            pid,
            format!("{evidence}; the tracer has no CAP_SYS_ADMIN in the initial user namespace"),
        );
    }
    fail(check, Reason::PtraceOperationFailed, pid, evidence)
}

/// A tracer that did not come back.
fn stalled(check: &'static str, record: &Record, stall: &Stall, process: Option<&Process>) -> Finding {
    let pid = process.map(|process| process.pid);
    let tracer = stall
        .tracer
        .wchan
        .as_deref()
        .or(stall.tracer.stack.first().map(String::as_str))
        .unwrap_or_default();
    let target = stall.target.wchan.as_deref().unwrap_or_default();
    let waits = |name: &str| tracer.contains(name) || stall.tracer.stack.iter().any(|f| f.contains(name));
    let describe = |extra: &str| {
        format!(
            "{:?} did not return: tracer in state {} in {}, target in state {} in {}{extra}; {}",
            record.step,
            stall.tracer.state,
            place(tracer),
            stall.target.state,
            place(target),
            if stall.tracer_killed && stall.target_untraced {
                "the tracer was ended and the target is untraced"
            } else {
                "the tracer could not be ended"
            },
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

/// Why the kernel denies, by elimination in the kernel's own order (ptrace(2), __ptrace_may_access).
fn denial(seen: &Observations, process: &Process, own: &[&Record], record: &Record) -> Finding {
    const CHECK: &str = "right to trace";
    let pid = Some(process.pid);
    let End::Errno(errno) = record.end else {
        return fail(CHECK, Reason::PtraceDeniedUnexplained, pid, "denied");
    };
    let ends: Vec<String> = own
        .iter()
        .filter(|r| is_access(r.step))
        .map(|r| format!("{:?} {}", r.step, outcome_word(&r.end)))
        .collect();
    let evidence = format!(
        "{} of process {} gave {} ({})",
        step_word(record.step),
        process.pid,
        error(errno),
        ends.join(", ")
    );
    let reading_denied = own
        .iter()
        .any(|r| r.step == Step::Kcmp && matches!(r.end, End::Errno(e) if denies(e)));
    let (reason, why) = cause_of_denial(seen, process, reading_denied);
    fail(CHECK, reason, pid, format!("{evidence}; {why}"))
}

fn cause_of_denial(seen: &Observations, process: &Process, reading_denied: bool) -> (Reason, String) {
    if let Some(found) = logged(seen) {
        return found;
    }
    let yama = seen.kernel.yama;
    if yama == Some(3) && !reading_denied {
        return (Reason::YamaNoAttach, "kernel.yama.ptrace_scope is 3".into());
    }
    let capable = has(seen.tracer.capabilities)
        && matches!(process.user_namespace, UserNamespace::Same | UserNamespace::Below);
    if !capable && let Some(found) = incapable(seen, process, reading_denied) {
        return found;
    }
    if yama == Some(3) {
        return (Reason::YamaNoAttach, "kernel.yama.ptrace_scope is 3; reading is denied too, which Yama does not do: there is a second cause".into());
    }
    security_module(seen, Some(process)).unwrap_or_else(|| {
        let label = seen.tracer.label.as_deref().unwrap_or("none");
        let why = format!(
            "ruled out: seccomp, another tracer, Yama ({yama:?}), capabilities, security labels ({label}), BPF programs, Landlock"
        );
        (Reason::PtraceDeniedUnexplained, why)
    })
}

/// The kernel's own word for it.
fn logged(seen: &Observations) -> Option<(Reason, String)> {
    seen.denials.iter().find_map(|line| {
        let reason = if line.contains("apparmor=\"DENIED\"") {
            Reason::AppArmorDenied
        } else if line.contains("avc:") {
            Reason::SELinuxDenied
        } else {
            return None;
        };
        Some((reason, format!("the kernel's log: {line}")))
    })
}

/// Without CAP_SYS_PTRACE over the target.
fn incapable(seen: &Observations, process: &Process, reading_denied: bool) -> Option<(Reason, String)> {
    let lacks = format!("the tracer's CapEff is {:016x}", seen.tracer.capabilities);
    if process.user_namespace == UserNamespace::Outside {
        return Some((
            Reason::MissingPtraceCapability,
            "the target's user namespace is not the tracer's nor below it".into(),
        ));
    }
    if let Some(scope @ 1..) = seen.kernel.yama
        && !reading_denied
    {
        let reason = if scope == 3 {
            Reason::YamaNoAttach
        } else {
            Reason::YamaScopeRestricted
        };
        return Some((
            reason,
            format!("kernel.yama.ptrace_scope is {scope}, and {lacks}"),
        ));
    }
    if process.not_dumpable && process.uid == seen.tracer.uid {
        return Some((
            Reason::TargetNotDumpable,
            format!(
                "/proc/{} belongs to root although user {} runs it, and {lacks}",
                process.pid, process.uid
            ),
        ));
    }
    let equal = process.uid == seen.tracer.uid && process.capabilities & !seen.tracer.capabilities == 0;
    (!equal).then(|| {
        let why = format!(
            "{lacks}, without CAP_SYS_PTRACE; the target's user is {} and its CapEff {:016x}",
            process.uid, process.capabilities
        );
        (Reason::MissingPtraceCapability, why)
    })
}

/// A security module that may deny although nothing was logged, the most telling first.
fn security_module(seen: &Observations, process: Option<&Process>) -> Option<(Reason, String)> {
    if let Some(found) = logged(seen) {
        return Some(found);
    }
    let kernel = &seen.kernel;
    let active = |name: &str| {
        kernel
            .lsm
            .as_ref()
            .is_some_and(|all| all.iter().any(|module| module == name))
    };
    let label = seen.tracer.label.as_deref().unwrap_or("unconfined");
    let theirs = process
        .and_then(|process| process.label.as_deref())
        .unwrap_or("unknown");
    if kernel.selinux_enforcing == Some(true) {
        let boolean = if kernel.selinux_deny_ptrace == Some(true) {
            "deny_ptrace is on"
        } else {
            "deny_ptrace is off"
        };
        return Some((
            Reason::SELinuxDenied,
            format!(
                "SELinux enforces, {boolean}; tracer {label}, target {theirs}; no denial was found in the kernel's log"
            ),
        ));
    }
    if active("apparmor") && !label.starts_with("unconfined") {
        return Some((
            Reason::AppArmorDenied,
            format!("tracer {label}, target {theirs}; no denial was found in the kernel's log"),
        ));
    }
    if kernel.bpf_lsm_programs.is_some_and(|count| count > 0) {
        return Some((
            Reason::BpfLsmDenied,
            format!(
                "{} BPF program(s) of the type LSM are loaded",
                kernel.bpf_lsm_programs.unwrap_or(0)
            ),
        ));
    }
    let own_works = seen
        .steps
        .iter()
        .any(|r| r.subject == Subject::Own && r.step == Step::Seize && matches!(r.end, End::Done(_)));
    (kernel.landlock_abi > 0 && own_works && process.is_some()).then(|| {
        let why = format!("the probe's own child can be traced, every other cause is ruled out, and Landlock (ABI {}) is active", kernel.landlock_abi);
        (Reason::LandlockDenied, why)
    })
}

fn has(capabilities: u64) -> bool {
    capabilities & CAP_SYS_PTRACE != 0
}

// --- completeness --------------------------------------------------------------------------------------------------

fn incomplete(seen: &Observations, findings: &[Finding]) -> Vec<Finding> {
    let mut unknown: Vec<Finding> = seen
        .gaps
        .iter()
        .map(|gap| {
            found(
                "completeness",
                Outcome::Unknown,
                Reason::ProbeIncomplete,
                None,
                gap.clone(),
            )
        })
        .collect();
    for process in seen.processes.iter().filter(|process| !proved(seen, process)) {
        let explained = findings
            .iter()
            .any(|f| f.outcome == Outcome::Fail && (f.pid.is_none() || f.pid == Some(process.pid)));
        // A child that has ended needs no proof.
        let ended = !process.root && (process.leader_ended() || was_gone(seen, process));
        if !explained && !ended {
            let evidence = format!("process {} was not proved", process.pid);
            unknown.push(found(
                "completeness",
                Outcome::Unknown,
                Reason::ProbeIncomplete,
                Some(process.pid),
                evidence,
            ));
        }
    }
    unknown
}

/// Its leader ended while it was looked at. ENOENT: /proc/PID is gone.
fn was_gone(seen: &Observations, process: &Process) -> bool {
    let gone = |end: &End| matches!(end, End::Errno(libc::ESRCH | libc::ENOENT));
    let leaders = |r: &&Record| r.subject == Subject::Target && r.tid == process.pid;
    seen.steps.iter().filter(leaders).any(|record| gone(&record.end))
}

/// A whole ladder on the leader, and no failure of any thread.
fn proved(seen: &Observations, process: &Process) -> bool {
    let own = || {
        seen.steps
            .iter()
            .filter(|r| r.subject == Subject::Target && r.pid == process.pid)
    };
    own().any(|r| r.step == Step::RunsAgain && r.tid == process.pid && matches!(r.end, End::Done(_)))
}

fn passed(seen: &Observations, findings: &[Finding]) -> Option<Finding> {
    let clean = findings.iter().all(|finding| finding.outcome == Outcome::Pass);
    if !clean {
        return None;
    }
    let pause = seen
        .steps
        .iter()
        .filter(|r| r.subject == Subject::Target && r.step == Step::Detach)
        .filter_map(|r| match r.end {
            End::Done(micros) => Some(micros),
            _ => None,
        });
    let evidence = if seen.targets.is_empty() {
        format!(
            "ptrace works on the probe's own child, on kernel {}",
            seen.kernel.release
        )
    } else {
        format!(
            "{} thread(s) of {} process(es) stopped and let go, each for at most {} us",
            seen.threads_proved,
            seen.processes.len(),
            pause.max().unwrap_or(0)
        )
    };
    Some(found(
        "ptrace",
        Outcome::Pass,
        Reason::PtraceWorks,
        None,
        evidence,
    ))
}

/// Suspected often and never the cause: said, so that nobody has to look.
fn irrelevant(seen: &Observations) -> Option<Finding> {
    let mode = seen.kernel.lockdown.as_deref().filter(|mode| *mode != "none")?;
    let evidence = format!("lockdown is {mode}; it never denies ptrace");
    Some(found(
        "lockdown",
        Outcome::Pass,
        Reason::PtraceWorks,
        None,
        evidence,
    ))
}

// --- words ---------------------------------------------------------------------------------------------------------

/// Name and meaning of an error number.
fn error(errno: i32) -> String {
    let errno = nix::errno::Errno::from_raw(errno);
    format!("{errno:?}")
}

fn outcome_word(end: &End) -> String {
    match end {
        End::Done(_) => "works".into(),
        End::Errno(errno) => error(*errno),
        End::Killed(signal) => format!("killed by signal {signal}"),
        End::Stalled(_) => "hangs".into(),
        End::Skipped(_) => "not tried".into(),
    }
}

fn step_word(step: Step) -> &'static str {
    match step {
        Step::Maps => "reading /proc/PID/maps",
        Step::Kcmp => "kcmp",
        Step::ReadMemory => "process_vm_readv",
        Step::GetFd => "pidfd_getfd",
        Step::Seize => "PTRACE_SEIZE",
        _ => "a step",
    }
}
