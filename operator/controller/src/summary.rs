//! What the controller writes into a status: the binding, and the summary of what the agent found. Pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use podcheckpoint_crds::conditions::{Owner, Verdict, condition};
use podcheckpoint_crds::{ConditionType, Failure, PodCheckpoint, PodCheckpointStatus, Reason, Step};

use crate::agent_pod;
use crate::target::Target;

type Words<'a> = (Verdict, Reason, &'a str);

/// The one who writes: what is known of the object and of the place where agents run.
pub(crate) struct Writer<'a> {
    /// The object as it stands.
    pub(crate) object: &'a PodCheckpoint,
    /// The node of the binding, or of the pod; empty when there is none.
    pub(crate) node: &'a str,
    /// Namespace of the operator.
    pub(crate) operator_namespace: &'a str,
    /// The moment of the decision.
    pub(crate) now: Timestamp,
}

/// A status that ends an operation, and what is to be announced of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct End {
    /// The controller's part of the status.
    pub(crate) status: PodCheckpointStatus,
    /// Ready's or Stalled's reason: the root cause when it failed.
    pub(crate) reason: Reason,
    /// In a sentence.
    pub(crate) message: String,
}

impl Writer<'_> {
    /// The binding: every condition is set, those of the agent as Unknown.
    pub(crate) fn bound(&self, target: &Target) -> PodCheckpointStatus {
        let found = format!(
            "the pod runs on node {} and has the UID {}",
            target.node, target.uid
        );
        let mut conditions = vec![self.set(
            ConditionType::TargetResolved,
            (Verdict::True, Reason::TargetFound, &found),
        )];
        let pending = (Verdict::Unknown, Reason::Pending, "not looked at yet");
        conditions.extend(agents_types().map(|t| self.set(t, pending)));
        let progress = format!(
            "the agent on node {} is at work; wait with `kubectl wait --for=condition=Ready \
             podcheckpoints.podcheckpoint.dev/{} -n {}`",
            target.node,
            self.object.name_any(),
            self.object.namespace().unwrap_or_default(),
        );
        let ready = (Verdict::False, Reason::CheckpointInProgress, progress.as_str());
        conditions.push(self.set(ConditionType::Ready, ready));
        conditions.push(self.set(ConditionType::Stalled, NOT_FAILED));
        PodCheckpointStatus {
            observed_generation: self.object.metadata.generation,
            node_name: Some(target.node.clone()),
            source_pod_uid: Some(target.uid.clone()),
            source_containers: target.containers.clone(),
            start_time: Some(Time(self.now)),
            reason: Some(Reason::CheckpointInProgress.as_str().to_owned()),
            conditions,
            ..Default::default()
        }
    }

    /// The end of an operation that the agent has ended: its conditions and its failure decide.
    pub(crate) fn concluded(&self) -> End {
        let status = self.status();
        let holds = |t| self.object.condition(t).is_some_and(|c| c.status == "True");
        if let Some(failure) = &status.failure {
            let reason = Reason::parse(&failure.reason).unwrap_or(Reason::DumpFailed);
            let message = format!("{}{}", self.source_warning(), failure.message);
            return self.failed(reason, &message, &failure.remedy, None);
        }
        if holds(ConditionType::Checkpointed) {
            return self.succeeded(Reason::CheckpointCompleted, &self.archive());
        }
        if self.object.spec.validate_only {
            let message = "nothing stands in the way; create a PodCheckpoint without validateOnly to take the checkpoint";
            return self.succeeded(Reason::ValidationCompleted, message);
        }
        let message = "the agent ended without a checkpoint and without saying why";
        self.ended_by_us(Step::Dump, Reason::AgentLost, message)
    }

    /// The end of an operation that the controller ends.
    pub(crate) fn ended_by_us(&self, step: Step, reason: Reason, message: &str) -> End {
        let remedy = self.remedy(reason);
        let failure = Failure {
            step,
            reason: reason.as_str().to_owned(),
            message: message.to_owned(),
            remedy: remedy.clone(),
            log_path: None,
        };
        self.failed(reason, message, &remedy, Some(failure))
    }

    fn failed(&self, reason: Reason, message: &str, remedy: &str, ours: Option<Failure>) -> End {
        // The one cause for which the upstream API has a word of its own.
        let ready = match reason {
            Reason::SourcePodReplaced => reason,
            _ => Reason::CheckpointFailed,
        };
        let message = format!("{}. {remedy}", message.trim_end_matches('.'))
            .trim_end()
            .to_owned();
        let stalled = (Verdict::True, reason, message.as_str());
        let mut status = self.ended((Verdict::False, ready, &message), stalled, reason);
        status.failure = ours;
        End {
            status,
            reason,
            message,
        }
    }

    fn succeeded(&self, reason: Reason, words: &str) -> End {
        let message = format!("{}{words}", self.source_warning());
        let status = self.ended((Verdict::True, reason, &message), NOT_FAILED, reason);
        End {
            status,
            reason,
            message,
        }
    }

    fn ended(&self, ready: Words<'_>, stalled: Words<'_>, reason: Reason) -> PodCheckpointStatus {
        let old = self.status();
        let mut conditions = vec![self.resolution(stalled)];
        conditions.extend(self.untouched());
        conditions.push(self.set(ConditionType::Ready, ready));
        conditions.push(self.set(ConditionType::Stalled, stalled));
        PodCheckpointStatus {
            observed_generation: self.object.metadata.generation,
            node_name: old.node_name,
            source_pod_uid: old.source_pod_uid,
            source_containers: old.source_containers,
            start_time: old.start_time,
            completion_time: Some(Time(self.now)),
            reason: Some(reason.as_str().to_owned()),
            conditions,
            ..Default::default()
        }
    }

    /// TargetResolved stays as it was written; when it never was, the end is that the target was not found.
    fn resolution(&self, (_, reason, message): Words<'_>) -> Condition {
        let known = self.object.condition(ConditionType::TargetResolved).cloned();
        known.unwrap_or_else(|| self.set(ConditionType::TargetResolved, (Verdict::False, reason, message)))
    }

    /// The agent's conditions that the agent never wrote: they stay ours, and say that it was not come to them. Of a pod
    /// that an agent has begun with, nobody else can say that nothing was done to it.
    fn untouched(&self) -> impl Iterator<Item = Condition> {
        let begun = self
            .object
            .status
            .as_ref()
            .is_some_and(|s| s.archive_state.is_some());
        let never_written = |t: &ConditionType| {
            let current = self.object.condition(*t);
            current.is_none_or(|c| c.reason == Reason::Pending.as_str())
        };
        let not_reached = (Verdict::Unknown, Reason::NotReached, "an earlier step failed");
        let not_told = (
            Verdict::Unknown,
            Reason::SourceUnknown,
            "the agent was lost before it could say what the pod does",
        );
        agents_types().filter(never_written).map(move |t| {
            let lost = begun && t == ConditionType::SourceRunning;
            self.set(t, if lost { not_told } else { not_reached })
        })
    }

    /// A pod that does not run is worse news than any result, so it is said first.
    fn source_warning(&self) -> String {
        let bad = self
            .object
            .condition(ConditionType::SourceRunning)
            .filter(|c| c.status == "False");
        bad.map(|c| {
            let remedy = Reason::parse(&c.reason).map_or("", |r| r.doc().remedy);
            format!(
                "WARNING, the pod does not run undisturbed ({}): {}. {remedy} ",
                c.reason, c.message
            )
        })
        .unwrap_or_default()
    }

    fn archive(&self) -> String {
        let status = self.status();
        let place = status.checkpoint_location.and_then(|l| l.node_local);
        format!(
            "{} in {} below the archive root of node {}; see `kubectl get podcheckpoints.podcheckpoint.dev {} -n {} \
             -o yaml` for each container's archive",
            status.size.unwrap_or_else(|| "archive".into()),
            place.map(|p| p.path).unwrap_or_default(),
            status.node_name.unwrap_or_default(),
            self.object.name_any(),
            self.object.namespace().unwrap_or_default(),
        )
    }

    /// The remedy of a reason, with its commands ready to be pasted.
    fn remedy(&self, reason: Reason) -> String {
        let namespace = match reason {
            Reason::AgentDenied => self.operator_namespace.to_owned(),
            _ => self.object.namespace().unwrap_or_default(),
        };
        let agent = format!("{} -n {}`", agent_pod::name(self.node), self.operator_namespace);
        let pod = format!("{} -n {namespace}", self.object.spec.source_pod_name);
        let text = reason.doc().remedy;
        text.replace(
            "`kubectl describe pod` of the agent",
            &format!("`kubectl describe pod {agent}"),
        )
        .replace("`kubectl logs` of the agent", &format!("`kubectl logs {agent}"))
        .replace("NAMESPACE", &namespace)
        .replace("NODE", self.node)
        .replace("NAME", &pod)
    }

    fn set(&self, r#type: ConditionType, (verdict, reason, message): Words<'_>) -> Condition {
        let old = self.object.status.as_ref().map_or(&[][..], |s| &s.conditions);
        let generation = self.object.metadata.generation;
        condition(r#type, verdict, reason, message, generation, old, &Time(self.now))
    }

    fn status(&self) -> PodCheckpointStatus {
        self.object.status.clone().unwrap_or_default()
    }
}

const NOT_FAILED: Words<'static> = (Verdict::False, Reason::NotFailed, "nothing has failed for good");

fn agents_types() -> impl Iterator<Item = ConditionType> {
    ConditionType::ALL
        .into_iter()
        .filter(|t| t.owner() == Owner::Agent)
}
