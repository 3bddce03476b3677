//! What the status says of a pod in a virtual machine by a look into its guest: the same findings as on a node, with
//! where they were seen.

use std::collections::HashMap;

use podcheckpoint_crds::conditions::Verdict as Status;
use podcheckpoint_crds::{ConditionType, Finding, Outcome, Reason, SandboxKind};
use podcheckpoint_probe::verdict::{Verdict, verdict};

use crate::guest::{self, Closed, Look, Seen, Way};
use crate::node::cri::{Container, Cri};
use crate::report::Report;
use crate::sandbox::Recognised;
use crate::validate;

/// Looks into the guest, when there is one.
pub(super) async fn look(
    cri: &Cri,
    recognised: &Recognised,
    containers: &[Container],
    allow_degraded: bool,
    report: &mut Report,
) -> Option<Look> {
    if !matches!(recognised.kind, SandboxKind::Kata | SandboxKind::VirtualMachine) {
        return None;
    }
    let ids: Vec<String> = containers.iter().map(|c| c.id.clone()).collect();
    let look = guest::look(cri, recognised.machine(), &ids).await;
    match &look {
        Look::Seen(seen) => tell(seen, containers, allow_degraded, report),
        Look::Closed(closed) => unreachable(closed, report),
    }
    Some(look)
}

fn tell(seen: &Seen, containers: &[Container], allow_degraded: bool, report: &mut Report) {
    if let Some(runtime) = &mut report.status.runtime {
        runtime.guest_kernel = Some(seen.observations.kernel.release.clone());
    }
    let verdict = verdict(&seen.observations);
    report.status.findings.push(way(seen));
    report
        .status
        .findings
        .extend(findings(seen, containers, &verdict));
    let judgement = validate::judge(&verdict, allow_degraded);
    report.set(
        ConditionType::PtraceValidated,
        judgement.status,
        judgement.reason,
        format!("in the guest, by {}: {}", words(seen.way), judgement.message),
    );
}

/// Which way was open, and why those before it were not.
fn way(seen: &Seen) -> Finding {
    let mut evidence = format!("looked into the guest by {}", words(seen.way));
    for closed in &seen.closed {
        evidence.push_str(&format!("; {closed}"));
    }
    Finding {
        check: "guest".into(),
        outcome: Outcome::Pass,
        reason: None,
        evidence,
        remedy: None,
    }
}

fn words(way: Way) -> String {
    match way {
        Way::Console => way.to_string(),
        Way::Exec => format!("{way}, with the container's own rights"),
    }
}

fn findings(seen: &Seen, containers: &[Container], verdict: &Verdict) -> Vec<Finding> {
    let names = containers.iter().map(|c| c.name.clone());
    let members: HashMap<i32, String> = seen.pids.iter().copied().zip(names).collect();
    let mut findings = validate::findings(verdict, &members);
    for finding in &mut findings {
        finding.check = format!("in the guest: {}", finding.check);
    }
    findings
}

fn unreachable(closed: &[Closed], report: &mut Report) {
    let reason = Reason::GuestUnreachable;
    let evidence = Look::Closed(closed.to_vec()).obstacles();
    report.set(
        ConditionType::PtraceValidated,
        Status::Unknown,
        reason,
        format!(
            "no way into the guest is open: {evidence}. {}",
            reason.doc().remedy
        ),
    );
    report.status.findings.push(Finding {
        check: "guest".into(),
        outcome: Outcome::Unknown,
        reason: Some(reason.as_str().to_owned()),
        evidence,
        remedy: Some(reason.doc().remedy.to_owned()),
    });
}
