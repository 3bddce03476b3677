//! The only writer: carries out what was planned. Every step may be repeated without harm.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::events::{Event as KubeEvent, EventType, Recorder};
use kube::{Api, Client, Resource, ResourceExt};
use podcheckpoint_crds::{CONTROLLER_MANAGER, FINALIZER, PodCheckpoint, PodCheckpointStatus};
use serde_json::json;

use crate::agent_pod;
use crate::config::Config;
use crate::plan::{Action, Event};

/// Why an action did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ActError {
    /// The object has changed since it was observed.
    #[error("the object has changed meanwhile")]
    Conflict,
    /// The API server refuses the agent's pod.
    #[error("the agent's pod was refused: {0}")]
    AgentDenied(String),
    /// The API server could not be asked, or refused.
    #[error("the API server did not carry out an action")]
    Api(#[source] kube::Error),
}

impl From<kube::Error> for ActError {
    fn from(error: kube::Error) -> Self {
        match &error {
            kube::Error::Api(status) if status.code == 409 || status.code == 404 => Self::Conflict,
            _ => Self::Api(error),
        }
    }
}

/// Where things are written.
#[derive(Clone)]
pub struct Writer {
    /// API server.
    pub client: Client,
    /// Says what happens.
    pub recorder: Recorder,
    /// Namespace of the operator.
    pub namespace: String,
    /// Configuration.
    pub config: Arc<Config>,
}

impl Writer {
    /// Carries out actions in their order.
    ///
    /// # Errors
    /// At the first that fails; what was done stays done.
    pub async fn act(&self, object: &PodCheckpoint, actions: Vec<Action>) -> Result<(), ActError> {
        let api: Api<PodCheckpoint> =
            Api::namespaced(self.client.clone(), &object.namespace().unwrap_or_default());
        // Every write names the version that it is based on; a write of ours moves it on.
        let mut version = object.resource_version().unwrap_or_default();
        for action in actions {
            match action {
                Action::AddFinalizer => {
                    let finalizers = [object.finalizers(), &[FINALIZER.to_owned()]].concat();
                    version = set_finalizers(&api, object, &version, &finalizers).await?;
                }
                Action::RemoveFinalizer => {
                    let finalizers: Vec<_> = object
                        .finalizers()
                        .iter()
                        .filter(|f| *f != FINALIZER)
                        .cloned()
                        .collect();
                    version = set_finalizers(&api, object, &version, &finalizers).await?;
                }
                Action::WriteStatus(status) => {
                    version = write_status(&api, object, &version, &status).await?
                }
                Action::EnsureAgent(node) => self.ensure_agent(&node).await?,
                Action::DeleteObject => {
                    let preconditions = Preconditions {
                        uid: object.uid(),
                        resource_version: None,
                    };
                    let parameters = DeleteParams {
                        preconditions: Some(preconditions),
                        ..Default::default()
                    };
                    api.delete(&object.name_any(), &parameters).await?;
                }
                Action::Announce(event) => self.announce(object, &event).await,
            }
        }
        Ok(())
    }

    async fn ensure_agent(&self, node: &str) -> Result<(), ActError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let pod = agent_pod::build(&self.config.agent, &self.namespace, node);
        match api
            .create(
                &PostParams {
                    field_manager: Some(CONTROLLER_MANAGER.into()),
                    ..Default::default()
                },
                &pod,
            )
            .await
        {
            Ok(_) => {
                tracing::info!(node, pod = pod.name_any(), "agent launched");
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(kube::Error::Api(status)) if matches!(status.code, 400 | 403 | 422) => {
                Err(ActError::AgentDenied(status.message.clone()))
            }
            Err(error) => Err(ActError::Api(error)),
        }
    }

    /// Deletes an agent's pod that is the one that was observed.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn delete_agent(&self, pod: &Pod) -> Result<(), ActError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let preconditions = Preconditions {
            uid: pod.uid(),
            resource_version: None,
        };
        let parameters = DeleteParams {
            preconditions: Some(preconditions),
            ..Default::default()
        };
        api.delete(&pod.name_any(), &parameters).await?;
        tracing::info!(pod = pod.name_any(), "agent ended");
        Ok(())
    }

    /// An event that cannot be written is logged and not tried again: the status says the same.
    async fn announce(&self, object: &PodCheckpoint, event: &Event) {
        let (type_, reason, note) = match event {
            Event::Started(note) => (EventType::Normal, "CheckpointStarted", note.clone()),
            Event::Succeeded(note) => (EventType::Normal, "CheckpointSucceeded", note.clone()),
            Event::Failed { reason, message } => (
                EventType::Warning,
                "CheckpointFailed",
                format!("{reason}: {message}"),
            ),
        };
        // The API server refuses longer notes.
        let note: String = note.chars().take(1000).collect();
        let event = KubeEvent {
            type_,
            reason: reason.into(),
            note: Some(note),
            action: "Checkpoint".into(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &object.object_ref(&())).await {
            tracing::warn!(%error, reason, "event not written");
        }
    }
}

async fn set_finalizers(
    api: &Api<PodCheckpoint>,
    object: &PodCheckpoint,
    version: &str,
    finalizers: &[String],
) -> Result<String, ActError> {
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
        "metadata": { "name": object.name_any(), "resourceVersion": version },
        "status": status,
    });
    let parameters = PatchParams::apply(CONTROLLER_MANAGER).force();
    let new = api
        .patch_status(&object.name_any(), &parameters, &Patch::Apply(&patch))
        .await?;
    Ok(new.resource_version().unwrap_or_default())
}
