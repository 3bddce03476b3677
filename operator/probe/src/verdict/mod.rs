//! The verdict: a pure function from what was seen to findings, the root cause first. It reads nothing and touches
//! nothing, so that a recorded case replays.

mod denial;
mod machine;
mod stall;
mod target;
mod words;

use podcheckpoint_crds::{Outcome, Reason};
use serde::Serialize;

use crate::observation::{End, Observations, Process, Record, Step, Subject};

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
    Reason::LsmDenied,
    Reason::KernelLacksCheckpointRestore,
    Reason::TracerSeccompFiltered,
    Reason::CriuMissing,
    Reason::CriuKernelMismatch,
    Reason::CriuProbeStalled,
    Reason::CriuCacheStale,
    Reason::KernelFeatureMissing,
    Reason::SessionLeaderOutsidePidns,
    Reason::PendingSigtrap,
    Reason::TargetStopped,
    Reason::HardwareBreakpointsBroken,
    Reason::PtraceStalled,
    Reason::PtraceDeniedUnexplained,
    Reason::PtraceOperationFailed,
    Reason::ParasiteRejected,
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
    findings.extend(machine::controls(seen));
    findings.extend(machine::own_child(seen));
    findings.extend(target::missing_targets(seen));
    for process in &seen.processes {
        findings.extend(target::facts_of(process));
        findings.extend(target::steps_of(seen, process));
        findings.extend(target::profile_of(seen, process));
    }
    findings.extend(machine::kernel(seen));
    findings.extend(machine::criu(seen));
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
    let own =
        |r: &Record| r.subject == Subject::Own && r.step == Step::Detach && matches!(r.end, End::Done(_));
    if !seen.steps.iter().any(own) && findings.iter().all(|finding| finding.outcome != Outcome::Fail) {
        let evidence = "ptrace of the probe's own child was not proved";
        unknown.push(found(
            "completeness",
            Outcome::Unknown,
            Reason::ProbeIncomplete,
            None,
            evidence,
        ));
    }
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
