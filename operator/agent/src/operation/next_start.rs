//! What can be done about a filter that a running process cannot lose: a profile without it for the pod's next start.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use podcheckpoint_crds::conditions::Verdict;
use podcheckpoint_crds::{ConditionType, Patch, PodCheckpoint, Reason};

use super::{Context, Inspection};
use crate::journal::aside;
use crate::report::Report;
use crate::security::seccomp::{self, Profile};

/// Writes the profiles where that is asked for and allowed, and says in the report what was done or could be. The running
/// pod keeps its filter, so this checkpoint ends in any case.
pub(super) async fn prepare(
    context: &Context,
    object: &PodCheckpoint,
    found: &Inspection,
    report: &mut Report,
) {
    let (reason, message) = match plan(object, found) {
        None => {
            let message =
                "a process of the pod has set its filter itself, and no profile of the pod brings it";
            (Reason::NotFixable, message.to_owned())
        }
        Some(planned) => carry_out(context, object, planned, report).await,
    };
    report.set(ConditionType::SecurityPrepared, Verdict::False, reason, message);
}

/// Containers whose own profile asks a listener.
struct Planned {
    uid: String,
    profiles: Vec<(String, Profile)>,
}

impl Planned {
    fn patches(&self) -> impl Iterator<Item = Patch> {
        let describe = |(name, profile): &(String, Profile)| seccomp::describe(&self.uid, name, profile);
        self.profiles.iter().map(describe)
    }

    fn manifest(&self) -> String {
        let names = self.profiles.iter().map(|(name, _)| name.as_str());
        seccomp::manifest(&self.uid, names)
    }
}

fn plan(object: &PodCheckpoint, found: &Inspection) -> Option<Planned> {
    let containers = found.subjects().iter().map(|subject| &subject.container);
    let profile = |container: &crate::node::cri::Container| {
        let profile = seccomp::without_listener(container.spec.as_ref()?)?;
        Some((container.name.clone(), profile))
    };
    let profiles: Vec<_> = containers.filter_map(profile).collect();
    let uid = object.metadata.uid.clone()?;
    (!profiles.is_empty()).then_some(Planned { uid, profiles })
}

async fn carry_out(
    context: &Context,
    object: &PodCheckpoint,
    planned: Planned,
    report: &mut Report,
) -> (Reason, String) {
    let mut patches: Vec<Patch> = planned.patches().collect();
    let manifest = planned.manifest();
    let changes: Vec<_> = patches
        .iter()
        .map(|patch| (patch.kind, patch.setting.clone()))
        .collect();
    let outcome = match context.security.refusal(object, &changes) {
        Some((reason, message)) => {
            let then = format!("{message}; the pod's next start would use it with {manifest}");
            (reason, then)
        }
        None => {
            let (store, written) = (context.security.profiles().clone(), planned);
            let write = move || {
                let mut profiles = written.profiles.iter();
                profiles.try_for_each(|(name, profile)| store.write(&written.uid, name, profile))
            };
            match aside(write).await {
                Some(Ok(())) => {
                    for patch in &mut patches {
                        patch.applied_time = Some(Time(Timestamp::now()));
                    }
                    let message = format!(
                        "the running pod keeps its filter. For its next start on this node, until this PodCheckpoint is deleted: {manifest}"
                    );
                    (Reason::ProfileForNextStart, message)
                }
                Some(Err(error)) => (
                    Reason::PatchFailed,
                    format!("the profile cannot be written: {error}"),
                ),
                None => (Reason::PatchFailed, "the node's disk does not answer".into()),
            }
        }
    };
    report.status.patches.extend(patches);
    outcome
}
