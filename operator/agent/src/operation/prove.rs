//! The proof that ptrace works, and what is changed until it does.

use podcheckpoint_crds::conditions::Verdict;
use podcheckpoint_crds::{ConditionType, PodCheckpoint, Reason, Step};

use kube::Client;

use super::containers::Subject;
use super::{Context, Inspection, PROGRESS, Stop, next_start};
use crate::report::Report;
use crate::security::setting::Setting;
use crate::security::{self, Refusal};
use crate::validate::{self, Refused};

/// How often a proof is repeated since settings were changed during it.
const PROOFS: usize = 20;

/// Proves that ptrace works and, where a setting is in the way that may be changed, changes it and proves it again. One
/// cause can hide another, so this goes on for as long as a further setting is found.
pub(super) async fn prepare(
    client: &Client,
    context: &Context,
    object: &PodCheckpoint,
    found: &Inspection,
    report: &mut Report,
) -> Result<(), Stop> {
    let mut changed: Vec<Setting> = Vec::new();
    let before = report.status.findings.len();
    let mut again = PROOFS;
    loop {
        let generation = context.security.generation();
        share(context, object, found, report, &mut changed).await?;
        report.status.findings.truncate(before);
        let proved = prove(context, object, found, report).await;
        // What another checkpoint has changed or put back meanwhile makes either answer worthless.
        let mut stale = || {
            let stale = again > 0 && context.security.generation() != generation;
            again -= usize::from(stale);
            stale
        };
        if stale() {
            continue;
        }
        let Err(refused) = proved else {
            if !changed.is_empty() {
                let names: Vec<String> = changed.iter().map(Setting::name).collect();
                let text = format!("for the time of the checkpoint: {}", names.join(", "));
                report.set(
                    ConditionType::SecurityPrepared,
                    Verdict::True,
                    Reason::Patched,
                    text,
                );
            }
            return Ok(());
        };
        if refused.stop.reason == Reason::SeccompListenerNotRestorable {
            next_start::prepare(context, object, found, report).await;
            return Err(refused.stop);
        }
        let planned = wanted(context, object, found, &refused, &changed);
        if planned.is_err() && stale() {
            continue;
        }
        let settings = planned.map_err(|refusal| unprepared(report, refusal, &refused.stop))?;
        for setting in settings {
            let entry = context
                .security
                .change(object, &setting, found.cri.socket())
                .await;
            let entry = entry.map_err(|error| {
                let message = error.to_string();
                report.set(
                    ConditionType::SecurityPrepared,
                    Verdict::False,
                    Reason::PatchFailed,
                    message,
                );
                refused.stop.clone()
            })?;
            report.status.patches.push(entry.describe());
            changed.push(setting);
        }
        // Whoever has to put it back if this agent does not return must know of it.
        let _ = tokio::time::timeout(PROGRESS, report.publish(client)).await;
    }
}

/// What other checkpoints have changed stays so until this one has ended.
async fn share(
    context: &Context,
    object: &PodCheckpoint,
    found: &Inspection,
    report: &mut Report,
    changed: &mut Vec<Setting>,
) -> Result<(), Stop> {
    let pids = found.subjects().iter().map(|subject| subject.target.pid);
    let profiles = pids.filter_map(security::profile_of).collect();
    let joined = context.security.join(object, profiles).await.map_err(|error| {
        report.set(
            ConditionType::SecurityPrepared,
            Verdict::False,
            Reason::PatchFailed,
            error.to_string(),
        );
        Stop::new(Step::ValidatePtrace, Reason::PatchFailed, error.to_string())
    })?;
    for entry in joined {
        report.status.patches.push(entry.describe());
        changed.push(entry.setting);
    }
    Ok(())
}

/// The settings that are to be changed next.
fn wanted(
    context: &Context,
    object: &PodCheckpoint,
    found: &Inspection,
    refused: &Refused,
    changed: &[Setting],
) -> Result<Vec<Setting>, Refusal> {
    let refusal = |reason, message: &str| Refusal {
        reason,
        message: message.to_owned(),
        patches: Vec::new(),
    };
    let cause = refused.stop.reason;
    let planned = match &refused.seen {
        Some(seen) => security::plan::plan(cause, seen, &found.pod_uid),
        None => Err("the probe did not answer, so the cause is not known"),
    };
    let planned = planned.and_then(|mut settings| {
        let missing = |setting: &Setting| !setting.read().is_ok_and(|value| setting.suffices(&value));
        settings.retain(|setting| !changed.contains(setting) && missing(setting));
        if settings.is_empty() {
            Err("nothing else that could be changed is the cause")
        } else {
            Ok(settings)
        }
    });
    if !changed.is_empty()
        && let Err(why) = planned
    {
        let text = format!("ptrace still does not work ({cause}), so what was changed is put back; {why}");
        return Err(refusal(Reason::PatchIneffective, &text));
    }
    let settings = planned.map_err(|why| refusal(Reason::NotFixable, why))?;
    context.security.consent(object, &settings)?;
    Ok(settings)
}

fn unprepared(report: &mut Report, refusal: Refusal, stop: &Stop) -> Stop {
    report.status.patches.extend(refusal.patches);
    report.set(
        ConditionType::SecurityPrepared,
        Verdict::False,
        refusal.reason,
        refusal.message,
    );
    stop.clone()
}

/// Proves that ptrace works on every process of the chosen containers.
async fn prove(
    context: &Context,
    object: &PodCheckpoint,
    found: &Inspection,
    report: &mut Report,
) -> Result<(), Box<Refused>> {
    let main = |s: &Subject| (s.target.pid, s.container.name.clone());
    let containers: Vec<_> = found.subjects().iter().map(main).collect();
    let members = |s: &Subject| {
        let name = s.container.name.clone();
        s.target
            .freezer
            .processes()
            .into_iter()
            .map(move |pid| (pid, name.clone()))
    };
    let target = validate::Target {
        containers: &containers,
        members: &found.subjects().iter().flat_map(members).collect(),
        runtime: found.cri.process().await,
        allow_degraded: object.spec.allow_degraded,
    };
    validate::validate(&context.node, &target, report).await
}
