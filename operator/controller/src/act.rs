//! The only writer: carries out what was planned. Every step may be repeated without harm.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::events::{Event as KubeEvent, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource, ResourceExt};
use podcheckpoint_crds::{
    CONTROLLER_MANAGER, CheckpointNode, CheckpointNodeSpec, FINALIZER, PatchOutcome, PodCheckpoint,
    PodCheckpointStatus,
};
use serde_json::json;

use crate::agent_pod;
use crate::config::Config;
use crate::plan::{Action, Event};
use crate::target::Target;

/// The longest note that the API server takes.
const LONGEST_NOTE: usize = 1000;

/// Why an action did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ActError {
    /// The object has changed since it was observed, or is gone.
    #[error("the object has changed meanwhile")]
    Conflict,
    /// The API server refuses the agent's pod.
    #[error("the agent's pod was refused: {0}")]
    AgentDenied(String),
    /// The API server could not be asked, or refused.
    #[error("the API server did not carry out an action")]
    Api(#[source] Box<kube::Error>),
}

impl From<kube::Error> for ActError {
    fn from(error: kube::Error) -> Self {
        match &error {
            kube::Error::Api(status) if status.code == 409 || status.code == 404 => Self::Conflict,
            _ => Self::Api(Box::new(error)),
        }
    }
}

/// Where things are written.
#[derive(Clone)]
pub(crate) struct Hand {
    /// API server.
    pub(crate) client: Client,
    /// In whose name events are written.
    pub(crate) reporter: Reporter,
    /// Namespace of the operator.
    pub(crate) namespace: String,
    /// Configuration.
    pub(crate) config: Arc<Config>,
    /// Changes of nodes that have been announced.
    pub(crate) announced: Arc<Mutex<HashSet<Announced>>>,
}

/// UID of an object, a setting, and whether it was its putting back.
pub(crate) type Announced = (String, String, bool);

impl Hand {
    /// Carries out actions in their order.
    ///
    /// # Errors
    /// At the first that fails; what was done stays done.
    pub(crate) async fn act(&self, object: &PodCheckpoint, actions: &[Action]) -> Result<(), ActError> {
        let api: Api<PodCheckpoint> =
            Api::namespaced(self.client.clone(), &object.namespace().unwrap_or_default());
        // Every write names the version that it is based on; a write of ours moves it on.
        let mut version = object.resource_version().unwrap_or_default();
        for action in actions {
            match action {
                Action::AddFinalizer => version = set_finalizer(&api, object, &version, true).await?,
                Action::RemoveFinalizer => version = set_finalizer(&api, object, &version, false).await?,
                Action::WriteStatus(status) => version = write_status(&api, object, &version, status).await?,
                Action::EnsureAgent { node, uid } => self.ensure_agent(node, uid.as_deref()).await?,
                Action::DeleteAgent(pod) => self.delete_agent(pod).await?,
                Action::DeleteObject => delete(&api, object).await?,
                Action::Announce(event) => self.announce(object, event),
            }
        }
        Ok(())
    }

    async fn ensure_agent(&self, node: &str, uid: Option<&str>) -> Result<(), ActError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let pod = agent_pod::build(&self.config.agent, &self.namespace, node);
        let parameters = PostParams {
            field_manager: Some(CONTROLLER_MANAGER.into()),
            ..Default::default()
        };
        match api.create(&parameters, &pod).await {
            Ok(_) => {
                tracing::info!(node, pod = pod.name_any(), "agent launched");
                self.ensure_report(node, uid).await
            }
            Err(kube::Error::Api(status)) if status.code == 409 && status.reason == "AlreadyExists" => Ok(()),
            Err(kube::Error::Api(status)) if matches!(status.code, 400 | 403 | 404 | 422) => {
                Err(ActError::AgentDenied(status.message.clone()))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The empty report on a node, which the agent fills. It goes with the node.
    async fn ensure_report(&self, node: &str, uid: Option<&str>) -> Result<(), ActError> {
        let mut report = CheckpointNode::new(node, CheckpointNodeSpec::default());
        report.metadata.owner_references = uid.map(|uid| {
            vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: node.into(),
                uid: uid.into(),
                ..Default::default()
            }]
        });
        let parameters = PostParams {
            field_manager: Some(CONTROLLER_MANAGER.into()),
            ..Default::default()
        };
        match Api::all(self.client.clone()).create(&parameters, &report).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Deletes an agent's pod that is the one that was observed.
    ///
    /// # Errors
    /// When the API server refuses.
    pub(crate) async fn delete_agent(&self, pod: &Pod) -> Result<(), ActError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        match delete(&api, pod).await {
            Ok(()) => tracing::info!(pod = pod.name_any(), "agent deleted"),
            // It is gone already, or another one has its name.
            Err(ActError::Conflict) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Events are written beside the work: one that cannot be written is logged and not tried again, since the status
    /// says the same.
    fn announce(&self, object: &PodCheckpoint, event: &Event) {
        if !self.is_news(object, event) {
            return;
        }
        for (event, about) in kube_events(object, event) {
            // A recorder remembers what it has said, to count repetitions. Nothing is said twice here, and thousands of
            // objects must not be remembered, so each event has a recorder of its own.
            let recorder = Recorder::new(self.client.clone(), self.reporter.clone());
            tokio::spawn(async move {
                if let Err(error) = recorder.publish(&event, &about).await {
                    tracing::warn!(%error, reason = event.reason, name = about.name, "event not written");
                }
            });
        }
        log(object, event);
    }
}

impl Hand {
    /// A change of a node is planned to be announced on every pass, and is news once. What an object has gone through that
    /// had ended before this controller began is none.
    fn is_news(&self, object: &PodCheckpoint, event: &Event) -> bool {
        let Event::Patched { patch, reverted, .. } = event else {
            return true;
        };
        let key = |reverted| (object.uid().unwrap_or_default(), patch.setting.clone(), reverted);
        let mut announced = self.announced.lock().unwrap_or_else(PoisonError::into_inner);
        let old = *reverted && object.is_terminal() && !announced.contains(&key(false));
        !old && announced.insert(key(*reverted))
    }
}

/// What became of a change, as an event.
fn ended(patch: &podcheckpoint_crds::Patch, whom: &str) -> (EventType, &'static str, String) {
    let (setting, before, after) = (&patch.setting, &patch.before, &patch.after);
    match patch.outcome {
        Some(PatchOutcome::Restored) => {
            let note = format!("{setting} is {before} again, after {whom}");
            (EventType::Normal, "NodeSecurityRestored", note)
        }
        None => {
            let note = format!(
                "{setting} is {before} again, unless somebody else has changed it since, after {whom}"
            );
            (EventType::Normal, "NodeSecurityRestored", note)
        }
        Some(PatchOutcome::Shared) => {
            let note = format!("{setting} is still {after} for other checkpoints, after {whom}");
            (EventType::Normal, "NodeSecurityShared", note)
        }
        Some(PatchOutcome::ChangedByOthers) => {
            let note = format!(
                "{setting} was changed from {before} to {after} for {whom}, and somebody else has changed it since or uses it: it was left"
            );
            (EventType::Warning, "NodeSecurityChangedByOthers", note)
        }
    }
}

fn log(object: &PodCheckpoint, event: &Event) {
    let (name, namespace) = (object.name_any(), object.namespace());
    match event {
        Event::Started(target) => {
            tracing::info!(name, namespace, node = target.node, pod_uid = target.uid, "bound")
        }
        Event::Patched {
            node,
            patch,
            reverted,
        } => {
            tracing::info!(
                name,
                namespace,
                node,
                setting = patch.setting,
                reverted,
                "node's security"
            )
        }
        Event::Succeeded { reason, .. } => tracing::info!(name, namespace, %reason, "succeeded"),
        Event::Failed { reason, message } => {
            tracing::info!(name, namespace, %reason, cause = message, "failed")
        }
    }
}

fn kube_events(object: &PodCheckpoint, event: &Event) -> Vec<(KubeEvent, ObjectReference)> {
    let this = object.object_ref(&());
    match event {
        Event::Started(target) => {
            let pod = pod_reference(object, target);
            let note = format!(
                "Checkpoint of pod {} on node {}",
                object.spec.source_pod_name, target.node
            );
            let about_pod = format!(
                "PodCheckpoint {} takes a checkpoint of this pod",
                object.name_any()
            );
            vec![
                (
                    kube_event(EventType::Normal, "CheckpointStarted", note, Some(pod.clone())),
                    this.clone(),
                ),
                (
                    kube_event(EventType::Normal, "CheckpointingPod", about_pod, Some(this)),
                    pod,
                ),
            ]
        }
        Event::Patched {
            node,
            patch,
            reverted,
        } => {
            let node = ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Node".into()),
                name: Some(node.clone()),
                // The kubelet's own events about a node carry its name as UID, and `kubectl describe node` looks for that.
                uid: Some(node.clone()),
                ..Default::default()
            };
            let whom = format!(
                "PodCheckpoint {}/{}",
                object.namespace().unwrap_or_default(),
                object.name_any()
            );
            let (type_, reason, note) = if *reverted {
                ended(patch, &whom)
            } else {
                let lasts = match patch.at_most_seconds {
                    0 => "until that is deleted".to_owned(),
                    seconds => format!("for at most {seconds} s"),
                };
                let note = format!(
                    "{} was changed from {} to {} for {whom}, {lasts}: {}",
                    patch.setting, patch.before, patch.after, patch.exposes
                );
                (EventType::Warning, "NodeSecurityPatched", note)
            };
            [(this.clone(), node.clone()), (node, this)]
                .map(|(about, other)| (kube_event(type_, reason, note.clone(), Some(other)), about))
                .into()
        }
        Event::Succeeded { message, .. } => {
            vec![(
                kube_event(EventType::Normal, "CheckpointSucceeded", message.clone(), None),
                this,
            )]
        }
        Event::Failed { reason, message } => {
            let note = format!("{reason}: {message}");
            vec![(
                kube_event(EventType::Warning, "CheckpointFailed", note, None),
                this,
            )]
        }
    }
}

fn kube_event(type_: EventType, reason: &str, note: String, secondary: Option<ObjectReference>) -> KubeEvent {
    KubeEvent {
        type_,
        reason: reason.into(),
        note: Some(note.chars().take(LONGEST_NOTE).collect()),
        action: "Checkpoint".into(),
        secondary,
    }
}

fn pod_reference(object: &PodCheckpoint, target: &Target) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        name: Some(object.spec.source_pod_name.clone()),
        namespace: object.namespace(),
        uid: Some(target.uid.clone()),
        ..Default::default()
    }
}

/// Deletes the very object that was observed, and none that has taken its name since.
async fn delete<K>(api: &Api<K>, object: &K) -> Result<(), ActError>
where
    K: Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let preconditions = Preconditions {
        uid: object.uid(),
        resource_version: None,
    };
    let parameters = DeleteParams {
        preconditions: Some(preconditions),
        ..Default::default()
    };
    api.delete(&object.name_any(), &parameters).await?;
    Ok(())
}

async fn set_finalizer(
    api: &Api<PodCheckpoint>,
    object: &PodCheckpoint,
    version: &str,
    present: bool,
) -> Result<String, ActError> {
    let mut finalizers = object.finalizers().to_vec();
    finalizers.retain(|f| f != FINALIZER);
    finalizers.extend(present.then(|| FINALIZER.to_owned()));
    let patch = json!({ "metadata": { "resourceVersion": version, "finalizers": finalizers } });
    let parameters = PatchParams {
        field_manager: Some(CONTROLLER_MANAGER.into()),
        ..Default::default()
    };
    let new = api
        .patch(&object.name_any(), &parameters, &Patch::Merge(&patch))
        .await?;
    Ok(new.resource_version().unwrap_or_default())
}

async fn write_status(
    api: &Api<PodCheckpoint>,
    object: &PodCheckpoint,
    version: &str,
    status: &PodCheckpointStatus,
) -> Result<String, ActError> {
    let patch = json!({
        "apiVersion": PodCheckpoint::api_version(&()),
        "kind": PodCheckpoint::kind(&()),
        "metadata": { "name": object.name_any(), "uid": object.uid(), "resourceVersion": version },
        "status": status,
    });
    let parameters = PatchParams::apply(CONTROLLER_MANAGER).force();
    let new = api
        .patch_status(&object.name_any(), &parameters, &Patch::Apply(&patch))
        .await?;
    Ok(new.resource_version().unwrap_or_default())
}
