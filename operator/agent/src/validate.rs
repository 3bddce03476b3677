//! Proving that ptrace works on the target before it is touched: asks the probe, and says what its verdict means for
//! this checkpoint.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use podcheckpoint_crds::conditions::Verdict as Status;
use podcheckpoint_crds::{ConditionType, Finding, Outcome, Reason, Step};
use podcheckpoint_probe::observation::{Criu, Observations};
use podcheckpoint_probe::verdict::{self, Verdict};
use tokio::sync::Mutex;

use crate::node::probe::{self, ProbeError, Question};
use crate::operation::Stop;
use crate::report::Report;

/// How many findings a status carries.
const FINDINGS: usize = 24;

/// What the probe found out about the node itself; asked again when CRIU or its cache is another one, or something did not
/// work: that may be over by now.
#[derive(Debug, Default)]
pub struct NodeCheck(Mutex<Option<(Identity, Observations)>>);

/// CRIU and its cache, neither of which has been replaced.
type Identity = [Option<(u64, u64, SystemTime)>; 2];

impl NodeCheck {
    /// The node as the container runtime with this process sees it.
    ///
    /// # Errors
    /// When the probe does not answer.
    pub async fn look(&self, runtime: i32) -> Result<Observations, ProbeError> {
        let mut known = self.0.lock().await;
        if let Some((identity, seen)) = known.as_ref()
            && holds(seen)
            && *identity == identify(runtime, seen.criu.as_ref())
        {
            return Ok(seen.clone());
        }
        let question = Question::Node {
            runtime,
            search: search_path(runtime),
        };
        let seen = probe::ask(&question).await?;
        *known = Some((identify(runtime, seen.criu.as_ref()), seen.clone()));
        Ok(seen)
    }
}

/// Whether what was seen is still so for as long as CRIU is the same; pure.
fn holds(seen: &Observations) -> bool {
    let good = seen.criu.as_ref().is_some_and(|criu| criu.good);
    good && matches!(verdict::verdict(seen).outcome, Outcome::Pass | Outcome::Degraded)
}

fn identify(runtime: i32, criu: Option<&Criu>) -> Identity {
    let path = criu.and_then(|criu| criu.path.as_deref());
    [path, Some("/run/criu.kdat")].map(|path| {
        let metadata = fs::metadata(format!("/proc/{runtime}/root{}", path?)).ok()?;
        Some((metadata.dev(), metadata.ino(), metadata.modified().ok()?))
    })
}

/// Only PATH is taken from the runtime's environment.
fn search_path(runtime: i32) -> Option<String> {
    let environment = fs::read(format!("/proc/{runtime}/environ")).ok()?;
    let mut entries = environment.split(|byte| *byte == 0);
    let path = entries.find_map(|entry| entry.strip_prefix(b"PATH="))?;
    String::from_utf8(path.to_vec()).ok()
}

/// What the verdict means for this checkpoint.
#[derive(Debug)]
pub struct Judgement {
    /// Status of PtraceValidated.
    pub status: Status,
    /// Its reason.
    pub reason: Reason,
    /// Its message.
    pub message: String,
    /// The checkpoint must not be attempted.
    pub refused: bool,
}

/// Judges; pure. A degraded verdict can be accepted by the user, one that would fail or hang cannot.
pub fn judge(verdict: &Verdict, allow_degraded: bool) -> Judgement {
    let root = verdict.root();
    let reason = root.map_or(Reason::ProbeIncomplete, |finding| finding.reason);
    let evidence = root.map_or("nothing was found", |finding| finding.evidence.as_str());
    let remedy = reason.doc().remedy;
    let message = match verdict.outcome {
        Outcome::Pass => evidence.to_owned(),
        Outcome::Degraded if allow_degraded => format!("{evidence}. Accepted by spec.allowDegraded"),
        Outcome::Degraded => format!("{evidence}. To go on nevertheless, set allowDegraded. {remedy}"),
        Outcome::Fail | Outcome::Unknown => format!("{evidence}. {remedy}"),
    };
    let status = match verdict.outcome {
        Outcome::Pass => Status::True,
        Outcome::Fail | Outcome::Degraded => Status::False,
        Outcome::Unknown => Status::Unknown,
    };
    let refused = match verdict.outcome {
        Outcome::Fail => true,
        Outcome::Degraded => !allow_degraded || verdict.hangs(),
        Outcome::Pass | Outcome::Unknown => false,
    };
    Judgement {
        status,
        reason,
        message,
        refused,
    }
}

/// What is to be proved.
pub struct Target<'a> {
    /// Main processes, with the name of their container.
    pub containers: &'a [(i32, String)],
    /// Every process, with the name of its container.
    pub members: &'a HashMap<i32, String>,
    /// The container runtime's process, where it is known.
    pub runtime: Option<i32>,
    /// A degraded verdict is accepted.
    pub allow_degraded: bool,
}

/// The checkpoint must not be attempted as things stand.
#[derive(Debug)]
pub struct Refused {
    /// Why.
    pub stop: Stop,
    /// What the probe saw, unless it did not answer.
    pub seen: Option<Observations>,
}

/// Asks the probe and puts its findings into the report.
///
/// # Errors
/// When the checkpoint must not be attempted.
pub async fn validate(
    check: &NodeCheck,
    target: &Target<'_>,
    report: &mut Report,
) -> Result<(), Box<Refused>> {
    let pids: Vec<i32> = target.containers.iter().map(|(pid, _)| *pid).collect();
    let asked = observe(check, &pids, target.runtime).await;
    let seen = asked.map_err(|error| Box::new(silent(&error, report)))?;
    if let Some(runtime) = &mut report.status.runtime {
        runtime.criu_version = seen.criu.as_ref().and_then(|criu| criu.version.clone());
    }
    let verdict = verdict::verdict(&seen);
    let judgement = judge(&verdict, target.allow_degraded);
    report.status.findings.extend(findings(&verdict, target.members));
    report.set(
        ConditionType::PtraceValidated,
        judgement.status,
        judgement.reason,
        judgement.message,
    );
    if judgement.refused {
        let evidence = verdict
            .root()
            .map(|finding| finding.evidence.clone())
            .unwrap_or_default();
        let stop = Stop::new(Step::ValidatePtrace, judgement.reason, evidence);
        return Err(Box::new(Refused {
            stop,
            seen: Some(seen),
        }));
    }
    Ok(())
}

/// The target and, at the same time, the node.
async fn observe(check: &NodeCheck, pids: &[i32], runtime: Option<i32>) -> Result<Observations, ProbeError> {
    let question = Question::Targets(pids);
    let node = async {
        match runtime {
            Some(runtime) => check.look(runtime).await.map(|seen| seen.criu),
            None => Ok(None),
        }
    };
    let (seen, criu) = tokio::join!(probe::ask(&question), node);
    let mut seen = seen?;
    seen.criu = criu?;
    Ok(seen)
}

fn silent(error: &ProbeError, report: &mut Report) -> Refused {
    let message = match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    report.set(
        ConditionType::PtraceValidated,
        Status::Unknown,
        Reason::ProbeStalled,
        message.clone(),
    );
    let stop = Stop::new(Step::ValidatePtrace, Reason::ProbeStalled, message);
    Refused { stop, seen: None }
}

/// The findings as a status shows them, with the name of the container to which a process belongs.
pub fn findings(verdict: &Verdict, members: &HashMap<i32, String>) -> Vec<Finding> {
    let all = verdict.findings.iter().map(|finding| {
        let container = finding.pid.and_then(|pid| members.get(&pid));
        let passed = finding.outcome == Outcome::Pass;
        let follows = finding
            .follows_from
            .map_or_else(String::new, |cause| format!(" (a consequence of {cause})"));
        Finding {
            check: container.map_or_else(
                || finding.check.to_owned(),
                |name| format!("{} of {name}", finding.check),
            ),
            outcome: finding.outcome,
            reason: (!passed).then(|| finding.reason.as_str().to_owned()),
            evidence: format!("{}{follows}", finding.evidence),
            remedy: (!passed).then(|| finding.reason.doc().remedy.to_owned()),
        }
    });
    all.take(FINDINGS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use podcheckpoint_probe::verdict::Finding as Found;

    fn verdict(outcome: Outcome, reason: Reason) -> Verdict {
        let finding = Found {
            check: "x",
            outcome,
            reason,
            pid: Some(7),
            evidence: "seen".into(),
            follows_from: None,
        };
        Verdict {
            outcome,
            findings: vec![finding],
        }
    }

    #[test]
    fn only_a_pass_is_called_validated() {
        assert_eq!(
            judge(&verdict(Outcome::Pass, Reason::PtraceWorks), false).status,
            Status::True
        );
        assert_eq!(
            judge(&verdict(Outcome::Unknown, Reason::ProbeIncomplete), false).status,
            Status::Unknown
        );
        assert_eq!(
            judge(&verdict(Outcome::Fail, Reason::AlreadyTraced), true).status,
            Status::False
        );
    }

    #[test]
    fn what_did_not_work_on_the_node_is_looked_at_again() {
        let recorded = |name: &str| -> Observations {
            let path = format!(
                "{}/../probe/tests/recorded/{name}.json",
                env!("CARGO_MANIFEST_DIR")
            );
            let case: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
            serde_json::from_value(case["observations"].clone()).unwrap()
        };
        assert!(holds(&recorded("a_cache_that_is_true_is_not_called_stale")));
        let mut denied = recorded("a_cache_that_is_true_is_not_called_stale");
        let own = recorded("a_filter_that_refuses_ptrace_is_named").steps;
        denied.steps = own;
        assert!(!holds(&denied));
    }

    #[test]
    fn a_degraded_verdict_stops_unless_it_is_accepted() {
        let degraded = verdict(Outcome::Degraded, Reason::SeccompListenerNotRestorable);
        assert!(judge(&degraded, false).refused);
        assert!(!judge(&degraded, true).refused);
    }

    #[test]
    fn what_would_hang_cannot_be_overridden() {
        let hang = verdict(Outcome::Fail, Reason::TargetFrozen);
        assert!(judge(&hang, true).refused);
    }

    #[test]
    fn a_finding_names_the_container_and_the_remedy() {
        let members = HashMap::from([(7, "main".to_owned())]);
        let found = findings(&verdict(Outcome::Fail, Reason::AlreadyTraced), &members);
        assert_eq!(found[0].check, "x of main");
        assert_eq!(
            found[0].remedy.as_deref(),
            Some(Reason::AlreadyTraced.doc().remedy)
        );
    }
}
