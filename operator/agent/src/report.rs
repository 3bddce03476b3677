//! The agent's only writer: its part of a PodCheckpoint's status, by server-side apply under its own field manager.

use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use podcheckpoint_crds::conditions::{self, Verdict};
use podcheckpoint_crds::{
    AGENT_MANAGER, ArchiveState, ConditionType, Failure, PatchOutcome, PodCheckpoint, PodCheckpointStatus,
    Reason, Step,
};
use serde_json::json;

/// Why a status could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The object, or the one with this UID, does not exist any more.
    #[error("the PodCheckpoint is gone")]
    Gone,
    /// The API server refused, or could not be reached in all the time that was given.
    #[error("the status could not be written")]
    Api(#[source] Box<kube::Error>),
}

/// The agent's part of one object's status, as it will be applied next.
#[derive(Clone, Debug)]
pub struct Report {
    namespace: String,
    name: String,
    uid: String,
    generation: Option<i64>,
    /// What is applied; only the agent's fields and conditions are ever set here.
    pub status: PodCheckpointStatus,
}

impl Report {
    /// An empty report about an object. Conditions that the agent has written before are taken over, so that their
    /// times of transition stay.
    pub fn new(object: &PodCheckpoint) -> Self {
        let mut status = PodCheckpointStatus::default();
        if let Some(old) = &object.status {
            status.conditions.clone_from(&old.conditions);
            status
                .conditions
                .retain(|c| is_agents(&c.type_) && c.reason != Reason::Pending.as_str());
        }
        Self {
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
            generation: object.metadata.generation,
            status,
        }
    }

    /// Sets one of the agent's conditions.
    pub fn set(
        &mut self,
        r#type: ConditionType,
        verdict: Verdict,
        reason: Reason,
        message: impl Into<String>,
    ) {
        debug_assert_eq!(r#type.owner(), conditions::Owner::Agent);
        let now = Time(k8s_openapi::jiff::Timestamp::now());
        let new = conditions::condition(
            r#type,
            verdict,
            reason,
            message,
            self.generation,
            &self.status.conditions,
            &now,
        );
        self.status.conditions.retain(|c| c.type_ != new.type_);
        self.status.conditions.push(new);
    }

    /// Whether one of the agent's conditions has been set.
    pub fn has(&self, r#type: ConditionType) -> bool {
        self.status
            .conditions
            .iter()
            .any(|condition| condition.type_ == r#type.as_str())
    }

    /// Records the root cause, from the reason's own documentation.
    pub fn fail(&mut self, step: Step, reason: Reason, message: impl Into<String>) {
        let remedy = reason.doc().remedy.to_owned();
        self.status.failure = Some(Failure {
            step,
            reason: reason.as_str().to_owned(),
            message: message.into(),
            remedy,
            log_path: None,
        });
    }

    /// Whether there is something of this operation on disk.
    pub fn archive_state(&mut self, state: ArchiveState) {
        self.status.archive_state = Some(state);
    }

    /// The profiles for the pod's next start are gone with their object.
    pub fn profiles_removed(&mut self) {
        let now = Time(Timestamp::now());
        for patch in self.status.patches.iter_mut().filter(|patch| patch.is_kept()) {
            patch.reverted_time = Some(now.clone());
            patch.outcome = Some(PatchOutcome::Restored);
        }
    }

    /// Applies the report, trying again for as long as the API server cannot be reached; the object as it is then.
    ///
    /// # Errors
    /// [`ReportError::Gone`] when the object no longer exists; [`ReportError::Api`] when the API server refuses.
    pub async fn publish(&self, client: &Client) -> Result<PodCheckpoint, ReportError> {
        let api: Api<PodCheckpoint> = Api::namespaced(client.clone(), &self.namespace);
        let params = PatchParams::apply(AGENT_MANAGER).force();
        let body = self.body();
        // A checkpoint's result must not be lost to an API server that restarts: about ten minutes in all.
        let backoff = ExponentialBuilder::default()
            .with_max_delay(Duration::from_secs(10))
            .with_max_times(70)
            .with_jitter();
        (|| async { api.patch_status(&self.name, &params, &Patch::Apply(&body)).await })
            .retry(backoff)
            .when(is_transient)
            .notify(|error, after| tracing::warn!(%error, ?after, "status not written, trying again"))
            .await
            .map_err(ReportError::from)
    }

    fn body(&self) -> serde_json::Value {
        json!({
            "apiVersion": "podcheckpoint.dev/v1alpha1",
            "kind": "PodCheckpoint",
            // With the UID, a newer object of the same name is refused instead of being written to.
            "metadata": { "name": self.name, "namespace": self.namespace, "uid": self.uid },
            "status": self.status,
        })
    }
}

fn is_agents(r#type: &str) -> bool {
    ConditionType::ALL
        .iter()
        .any(|t| t.as_str() == r#type && t.owner() == conditions::Owner::Agent)
}

fn is_transient(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code == 429 || status.code >= 500,
        kube::Error::SerdeError(_) | kube::Error::BuildRequest(_) | kube::Error::InferConfig(_) => false,
        _ => true,
    }
}

impl From<kube::Error> for ReportError {
    fn from(error: kube::Error) -> Self {
        match &error {
            kube::Error::Api(status) if status.code == 404 || status.code == 409 => Self::Gone,
            _ => Self::Api(Box::new(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object() -> PodCheckpoint {
        let mut object = PodCheckpoint::new("cart", podcheckpoint_crds::PodCheckpointSpec::default());
        object.metadata.namespace = Some("shop".into());
        object.metadata.uid = Some("u-1".into());
        object
    }

    #[test]
    fn a_report_names_the_uid_so_that_a_newer_object_is_not_written_to() {
        let body = Report::new(&object()).body();
        assert_eq!(body["metadata"]["uid"], "u-1");
    }

    #[test]
    fn a_report_holds_nothing_that_the_controller_owns() {
        let mut object = object();
        let now = Time(k8s_openapi::jiff::Timestamp::now());
        let make = |t, r| conditions::condition(t, Verdict::Unknown, r, "", None, &[], &now);
        object.status = Some(PodCheckpointStatus {
            node_name: Some("node1".into()),
            source_pod_uid: Some("p-1".into()),
            conditions: vec![
                make(ConditionType::Ready, Reason::CheckpointInProgress),
                make(ConditionType::Checkpointed, Reason::CheckpointInProgress),
                make(ConditionType::SourceRunning, Reason::Pending),
            ],
            ..Default::default()
        });
        let status = Report::new(&object).status;
        assert_eq!((status.node_name, status.source_pod_uid), (None, None));
        let types: Vec<_> = status.conditions.iter().map(|c| c.type_.as_str()).collect();
        assert_eq!(types, ["Checkpointed"]);
    }

    #[test]
    fn a_failure_carries_the_remedy_of_its_reason() {
        let mut report = Report::new(&object());
        report.fail(Step::Dump, Reason::CriuMissing, "no criu");
        assert_eq!(
            report.status.failure.unwrap().remedy,
            Reason::CriuMissing.doc().remedy
        );
    }
}
