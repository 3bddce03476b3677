//! What follows for one process of the target: from its facts, and from what was tried on it.

use podcheckpoint_crds::{Outcome, Reason};

use super::denial::{denial, denies, is_access};
use super::stall::{is_exec, stalled};
use super::words::error;
use super::{Finding, fail, found, was_gone};
use crate::observation::{End, Observations, Process, Record, Step, Subject, Thread};
use crate::rungs::LISTENER;

/// What was asked for and is not there.
pub(super) fn missing_targets(seen: &Observations) -> Vec<Finding> {
    let missing = seen
        .targets
        .iter()
        .filter(|pid| !seen.processes.iter().any(|process| process.pid == **pid));
    missing
        .map(|pid| {
            let (reason, why) = if seen.hidden.contains(pid) {
                hidden(seen, *pid)
            } else {
                (Reason::TargetPidNotVisible, not_visible(seen, *pid))
            };
            fail("target", reason, Some(*pid), why)
        })
        .collect()
}

/// It is there, and what the kernel shows about it may not be read.
fn hidden(seen: &Observations, pid: i32) -> (Reason, String) {
    let evidence = format!("/proc/{pid}/status cannot be read: EACCES");
    if seen.kernel.selinux_enforcing != Some(true) {
        return (Reason::TargetPidNotVisible, evidence);
    }
    let label = seen.tracer.label.as_deref().unwrap_or("unknown");
    let why = "its policy does not let the tracer look at the target, which no boolean deny_ptrace decides";
    (
        Reason::SELinuxDenied,
        format!("{evidence}; SELinux enforces, and {why}; tracer {label}"),
    )
}

/// Whether it is the probe that is in the wrong namespace, or the number that is of another one.
fn not_visible(seen: &Observations, pid: i32) -> String {
    let namesakes = seen.namesakes.iter().filter(|other| other.own == pid);
    let namesakes = namesakes.map(|other| {
        format!(
            "; process {} ({}) has this number in a namespace of its own",
            other.pid, other.comm
        )
    });
    let nested = match seen.tracer.initial_process_namespace {
        Some(false) => {
            "; the probe is not in the machine's first process namespace, and sees only what is in its own"
        }
        _ => "",
    };
    format!(
        "/proc has no process {pid}{nested}{}",
        namesakes.collect::<String>()
    )
}

/// What follows from the facts alone.
pub(super) fn facts_of(process: &Process) -> Vec<Finding> {
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
pub(super) fn steps_of(seen: &Observations, process: &Process) -> Vec<Finding> {
    let mut own: Vec<&Record> = seen
        .steps
        .iter()
        .filter(|r| r.subject == Subject::Target && r.pid == process.pid)
        .collect();
    own.sort_by_key(|record| (record.step, record.tid));
    if process.leader_ended() {
        // The facts say it already, and whatever was answered about it is a consequence.
        return Vec::new();
    }
    if was_gone(seen, process) {
        // Children come and go; only what was asked for has to stay.
        let evidence = format!("process {} ended while it was looked at", process.pid);
        let finding = || fail("target", Reason::TargetExiting, Some(process.pid), evidence);
        return process.root.then(finding).into_iter().collect();
    }
    let mut findings = Vec::new();
    // What already is known to be in the way explains why it cannot be attached to.
    let known = facts_of(process)
        .iter()
        .any(|finding| finding.outcome == Outcome::Fail);
    let refused = |r: &&&Record| is_access(r.step) && matches!(r.end, End::Errno(errno) if denies(errno));
    let telling = own
        .iter()
        .filter(refused)
        .filter(|r| !(known && r.step == Step::Seize));
    if let Some(record) = telling.min_by_key(|record| (record.step, record.tid)) {
        findings.push(denial(seen, process, &own, record));
    }
    findings.extend(own.iter().filter_map(|record| step_of(seen, process, record)));
    findings
}

/// What the target's AppArmor profile forbids CRIU's code in it, seen on a canary.
pub(super) fn profile_of(seen: &Observations, process: &Process) -> Option<Finding> {
    let refused: Vec<&Record> = seen
        .steps
        .iter()
        .filter(|r| r.subject == Subject::Canary && r.pid == process.pid && r.step != Step::Profile)
        .filter(|r| matches!(r.end, End::Errno(errno) if denies(errno)) || matches!(r.end, End::Killed(_)))
        .collect();
    let kills = refused.iter().any(|r| matches!(r.end, End::Killed(_)));
    if refused.is_empty() {
        return None;
    }
    let words = refused.iter().map(|record| match record.step {
        Step::UnixSocket => "a unix socket of the type seqpacket (rule: `network unix,`)",
        Step::ProcFolder => "reading /proc (rule: `@{PROC}/ r,`)",
        _ => "reading /proc/PID/cgroup (rule: `@{PROC}/@{pid}/cgroup r,`)",
    });
    let words = words.collect::<Vec<_>>().join(", ");
    let logged = seen
        .denials
        .iter()
        .find(|line| line.contains("apparmor=\"DENIED\""));
    let logged = logged.map_or_else(String::new, |line| format!("; the kernel's log: {line}"));
    let profile = process.profile().unwrap_or_default();
    let killed = if kills {
        ", and kills the process for it"
    } else {
        ""
    };
    let evidence = format!(
        "the AppArmor profile {profile} denies what CRIU does inside the process{killed}: {words}{logged}"
    );
    Some(fail(
        "AppArmor profile",
        Reason::LsmDenied,
        Some(process.pid),
        evidence,
    ))
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
        (End::Errno(errno), Step::Inject | Step::MemFile | Step::MapCode | Step::Connect) => {
            Some(rejected(process, record.step, *errno))
        }
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

/// What CRIU's code could not do in the target.
fn rejected(process: &Process, step: Step, errno: i32) -> Finding {
    let what = match step {
        Step::MemFile => "memfd_create",
        Step::MapCode => "mapping a file in memory as code",
        Step::Connect => "connecting to an abstract socket",
        _ => "a system call",
    };
    let label = process.label.as_deref().unwrap_or("none");
    let evidence = format!(
        "{what}, executed in process {}, gave {}; its security label is {label}",
        process.pid,
        error(errno)
    );
    fail(
        "code in the target",
        Reason::ParasiteRejected,
        Some(process.pid),
        evidence,
    )
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
