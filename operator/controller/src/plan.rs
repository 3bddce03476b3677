//! What to do about one PodCheckpoint. Pure: no client, no clock; what was observed comes in, actions go out.
//!
//! The stage is derived from facts on every pass. Conditions are output, with one exception: the agent's conditions
//! are how its facts reach us.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use podcheckpoint_crds::conditions::{Owner, Verdict, condition};
use podcheckpoint_crds::{
    ArchiveState, ConditionType, DeletionPolicy, FINALIZER, Failure, PodCheckpoint, PodCheckpointStatus,
    Reason, Step,
};

/// How long after its deadline an agent may be silent before it is given up.
const AGENT_GRACE: SignedDuration = SignedDuration::from_secs(30);
/// How long a deletion waits for an agent to delete the archive.
const DELETION_LIMIT: SignedDuration = SignedDuration::from_secs(120);

/// What was observed.
#[derive(Clone, Debug)]
pub struct World {
    /// The object.
    pub object: PodCheckpoint,
    /// Its pod; only looked up before the object is bound.
    pub pod: Option<Pod>,
    /// The node of the pod, or of the binding; only looked up when it matters.
    pub node: Option<Node>,
    /// The agent's pod on the node of the binding.
    pub agent: Option<Pod>,
    /// What the API server said when it refused the agent's pod.
    pub agent_denied: Option<String>,
    /// Namespace of the operator.
    pub operator_namespace: String,
    /// Seconds that an agent may take to start.
    pub start_timeout: i64,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Add our finalizer.
    AddFinalizer,
    /// Apply this as the controller's part of the status.
    WriteStatus(Box<PodCheckpointStatus>),
    /// Make sure that an agent runs on this node.
    EnsureAgent(String),
    /// Let the object go.
    RemoveFinalizer,
    /// Delete the object: its time to live is over.
    DeleteObject,
    /// Say what happened.
    Announce(Event),
}

/// What is said as an Event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The operation is bound to a node.
    Started(String),
    /// It has succeeded.
    Succeeded(String),
    /// It has failed for good.
    Failed {
        /// Root cause.
        reason: String,
        /// In a sentence.
        message: String,
    },
}

/// What to do now, and when to look again if nothing happens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// In this order.
    pub actions: Vec<Action>,
    /// When to look again.
    pub requeue: Option<Duration>,
}

impl Plan {
    fn just(actions: Vec<Action>) -> Self {
        Self {
            actions,
            requeue: None,
        }
    }

    fn wait_until(moment: Timestamp, now: Timestamp) -> Self {
        // A little later than the moment, so that it has passed when we look.
        let left = moment.duration_since(now).max(SignedDuration::ZERO) + SignedDuration::from_millis(100);
        Self {
            actions: Vec::new(),
            requeue: Some(left.unsigned_abs()),
        }
    }
}

/// Decides.
pub fn plan(world: &World, now: Timestamp) -> Plan {
    let object = &world.object;
    if object.metadata.deletion_timestamp.is_some() {
        return deletion(world, now);
    }
    if object.is_terminal() {
        return time_to_live(object, now);
    }
    if bound_node(object).is_none() {
        return first_sight(world, now);
    }
    if agent_has_ended(object) {
        return conclude(object, now);
    }
    supervise(world, now)
}

/// The node that an object is bound to.
pub fn bound_node(object: &PodCheckpoint) -> Option<&str> {
    object.status.as_ref()?.node_name.as_deref()
}

/// Whether the agent has begun with an object.
fn agent_has_begun(object: &PodCheckpoint) -> bool {
    object.status.as_ref().is_some_and(|s| s.archive_state.is_some())
}

/// The agent writes SourceRunning last, together with everything else.
fn agent_has_ended(object: &PodCheckpoint) -> bool {
    object
        .condition(ConditionType::SourceRunning)
        .is_some_and(|c| c.reason != Reason::Pending.as_str())
}

// --- the beginning -------------------------------------------------------------------------------------------------

fn first_sight(world: &World, now: Timestamp) -> Plan {
    let object = &world.object;
    match resolve(world) {
        Err((reason, message)) => Plan::just(failed_by_us(
            object,
            &PodCheckpointStatus::default(),
            Step::ResolveTarget,
            reason,
            message,
            now,
        )),
        Ok((node, uid)) => {
            let mut actions = Vec::new();
            if !object.finalizers().iter().any(|f| f == FINALIZER) {
                actions.push(Action::AddFinalizer);
            }
            actions.push(Action::WriteStatus(Box::new(bound(object, &node, &uid, now))));
            actions.push(Action::EnsureAgent(node.clone()));
            actions.push(Action::Announce(Event::Started(format!(
                "pod {} on node {node}",
                object.spec.source_pod_name
            ))));
            Plan::just(actions)
        }
    }
}

/// The node and UID of the target, or why it cannot be one.
fn resolve(world: &World) -> Result<(String, String), (Reason, String)> {
    let spec = &world.object.spec;
    let name = &spec.source_pod_name;
    let pod = world
        .pod
        .as_ref()
        .ok_or_else(|| (Reason::PodNotFound, format!("pod {name} does not exist")))?;
    let uid = pod.uid().unwrap_or_default();
    if let Some(wanted) = spec.source_pod_uid.as_ref().filter(|wanted| **wanted != uid) {
        return Err((
            Reason::SourcePodReplaced,
            format!("pod {name} has the UID {uid}, not {wanted}"),
        ));
    }
    check_pod(world, pod)?;
    check_containers(spec.containers.as_deref(), pod)?;
    let node = pod
        .spec
        .as_ref()
        .and_then(|s| s.node_name.clone())
        .unwrap_or_default();
    check_node(world.node.as_ref(), &node)?;
    Ok((node, uid))
}

fn check_pod(world: &World, pod: &Pod) -> Result<(), (Reason, String)> {
    let name = pod.name_any();
    let phase = pod
        .status
        .as_ref()
        .and_then(|s| s.phase.as_deref())
        .unwrap_or("Pending");
    let static_pod = pod.annotations().contains_key("kubernetes.io/config.mirror");
    let host_pid = pod.spec.as_ref().is_some_and(|s| s.host_pid == Some(true));
    if pod.metadata.deletion_timestamp.is_some() {
        Err((Reason::PodTerminating, format!("pod {name} is being deleted")))
    } else if pod.namespace().as_deref() == Some(&world.operator_namespace) {
        Err((
            Reason::PodProtected,
            format!("pod {name} is in the operator's namespace"),
        ))
    } else if matches!(phase, "Succeeded" | "Failed") {
        Err((
            Reason::PodCompleted,
            format!("pod {name} has ended: its phase is {phase}"),
        ))
    } else if phase != "Running" {
        Err((
            Reason::PodNotRunning,
            format!("pod {name} does not run yet: its phase is {phase}"),
        ))
    } else if static_pod {
        Err((Reason::PodStatic, format!("pod {name} is a static pod")))
    } else if host_pid {
        Err((Reason::PodHostPid, format!("pod {name} has hostPID: true")))
    } else {
        Ok(())
    }
}

fn check_containers(wanted: Option<&[String]>, pod: &Pod) -> Result<(), (Reason, String)> {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|s| s.container_statuses.as_deref())
        .unwrap_or_default();
    let runs = |name: &str| {
        statuses
            .iter()
            .any(|s| s.name == name && s.state.as_ref().is_some_and(|state| state.running.is_some()))
    };
    let Some(wanted) = wanted else {
        let any = statuses.iter().any(|s| runs(&s.name));
        return if any {
            Ok(())
        } else {
            Err((Reason::ContainerNotRunning, "no container of the pod runs".into()))
        };
    };
    let spec = pod.spec.clone().unwrap_or_default();
    for name in wanted {
        let special = spec.init_containers.iter().flatten().any(|c| &c.name == name)
            || spec
                .ephemeral_containers
                .iter()
                .flatten()
                .any(|c| &c.name == name);
        if special {
            return Err((
                Reason::ContainerNotRegular,
                format!("{name} is an init or ephemeral container"),
            ));
        }
        if !spec.containers.iter().any(|c| &c.name == name) {
            return Err((
                Reason::ContainerNotFound,
                format!("the pod has no container {name}"),
            ));
        }
        if !runs(name) {
            return Err((
                Reason::ContainerNotRunning,
                format!("container {name} does not run"),
            ));
        }
    }
    Ok(())
}

fn check_node(node: Option<&Node>, name: &str) -> Result<(), (Reason, String)> {
    let node = node.ok_or_else(|| (Reason::NodeGone, format!("node {name} does not exist")))?;
    let conditions = node
        .status
        .as_ref()
        .and_then(|s| s.conditions.as_deref())
        .unwrap_or_default();
    let ready = conditions
        .iter()
        .any(|c| c.type_ == "Ready" && c.status == "True");
    if ready {
        Ok(())
    } else {
        Err((Reason::NodeNotReady, format!("node {name} is not ready")))
    }
}

fn bound(object: &PodCheckpoint, node: &str, uid: &str, now: Timestamp) -> PodCheckpointStatus {
    let time = Time(now);
    let set = |t, v, r: Reason, m: &str| condition(t, v, r, m, object.metadata.generation, &[], &time);
    let mut conditions = vec![set(
        ConditionType::TargetResolved,
        Verdict::True,
        Reason::TargetFound,
        &format!("the pod runs on node {node}"),
    )];
    for r#type in agents_types() {
        conditions.push(set(
            r#type,
            Verdict::Unknown,
            Reason::Pending,
            "not looked at yet",
        ));
    }
    let message = format!("the agent on node {node} is at work");
    conditions.push(set(
        ConditionType::Ready,
        Verdict::False,
        Reason::CheckpointInProgress,
        &message,
    ));
    conditions.push(set(
        ConditionType::Stalled,
        Verdict::False,
        Reason::NotFailed,
        "nothing has failed for good",
    ));
    PodCheckpointStatus {
        observed_generation: object.metadata.generation,
        node_name: Some(node.to_owned()),
        source_pod_uid: Some(uid.to_owned()),
        start_time: Some(time),
        reason: Some(Reason::CheckpointInProgress.as_str().to_owned()),
        conditions,
        ..Default::default()
    }
}

fn agents_types() -> impl Iterator<Item = ConditionType> {
    ConditionType::ALL
        .into_iter()
        .filter(|t| t.owner() == Owner::Agent)
}

// --- the middle ----------------------------------------------------------------------------------------------------

/// While the agent has the object: it must start, and it must end.
fn supervise(world: &World, now: Timestamp) -> Plan {
    let object = &world.object;
    let status = object.status.clone().unwrap_or_default();
    let start = status.start_time.as_ref().map_or(now, |t| t.0);
    if !agent_has_begun(object)
        && let Some((reason, message)) = agent_failure(world, start, now)
    {
        return Plan::just(failed_by_us(
            object,
            &status,
            Step::StartAgent,
            reason,
            message,
            now,
        ));
    }
    let deadline = start + SignedDuration::from_secs(object.spec.timeout_seconds.into()) + AGENT_GRACE;
    if now >= deadline {
        let message = "the agent did not report an end within the deadline";
        return Plan::just(failed_by_us(
            object,
            &status,
            Step::Dump,
            Reason::AgentLost,
            message.into(),
            now,
        ));
    }
    let next = if agent_has_begun(object) {
        deadline
    } else {
        deadline.min(start_limit(world, start))
    };
    let mut plan = Plan::wait_until(next, now);
    if world.agent.is_none()
        && let Some(node) = status.node_name
    {
        plan.actions.push(Action::EnsureAgent(node));
    }
    plan
}

fn start_limit(world: &World, start: Timestamp) -> Timestamp {
    start + SignedDuration::from_secs(world.start_timeout)
}

/// Why the agent does not start, as soon as that is certain.
fn agent_failure(world: &World, start: Timestamp, now: Timestamp) -> Option<(Reason, String)> {
    if let Some(words) = &world.agent_denied {
        return Some((Reason::AgentDenied, words.clone()));
    }
    if let Some(failure) = world.agent.as_ref().and_then(pod_failure) {
        return Some(failure);
    }
    if now < start_limit(world, start) {
        return None;
    }
    let node = world
        .object
        .status
        .as_ref()
        .and_then(|s| s.node_name.clone())
        .unwrap_or_default();
    if let Err(failure) = check_node(world.node.as_ref(), &node) {
        return Some(failure);
    }
    let words = world
        .agent
        .as_ref()
        .map_or_else(|| "its pod does not exist".to_owned(), waiting_words);
    Some((
        Reason::AgentNotStarted,
        format!(
            "the agent did not start within {} s: {words}",
            world.start_timeout
        ),
    ))
}

fn pod_failure(pod: &Pod) -> Option<(Reason, String)> {
    let status = pod.status.as_ref()?;
    if status.phase.as_deref() == Some("Failed") {
        let words = [status.reason.as_deref(), status.message.as_deref()];
        let words: Vec<_> = words.into_iter().flatten().collect();
        return Some((
            Reason::AgentRejected,
            format!("the kubelet refused the agent: {}", words.join(": ")),
        ));
    }
    let waiting = status
        .container_statuses
        .as_ref()?
        .first()?
        .state
        .as_ref()?
        .waiting
        .as_ref()?;
    let reason = waiting.reason.as_deref()?;
    let words = format!("{reason}: {}", waiting.message.as_deref().unwrap_or("no message"));
    match reason {
        "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
            Some((Reason::AgentImageUnavailable, words))
        }
        "CrashLoopBackOff" | "CreateContainerConfigError" => Some((Reason::AgentNotStarted, words)),
        _ => None,
    }
}

fn waiting_words(pod: &Pod) -> String {
    let status = pod.status.clone().unwrap_or_default();
    let first = status.container_statuses.and_then(|list| list.into_iter().next());
    let waiting = first.and_then(|s| s.state).and_then(|s| s.waiting);
    let text = waiting.map(|w| {
        [w.reason, w.message]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(": ")
    });
    text.filter(|t| !t.is_empty())
        .unwrap_or_else(|| format!("its phase is {}", status.phase.unwrap_or_default()))
}

// --- the end -------------------------------------------------------------------------------------------------------

fn conclude(object: &PodCheckpoint, now: Timestamp) -> Plan {
    let status = object.status.clone().unwrap_or_default();
    let checkpointed = object
        .condition(ConditionType::Checkpointed)
        .is_some_and(|c| c.status == "True");
    match &status.failure {
        Some(failure) => {
            let reason = Reason::parse(&failure.reason).unwrap_or(Reason::DumpFailed);
            let message = format!("{}{}", source_warning(object), failure.message);
            Plan::just(failed(
                object,
                &status,
                reason,
                &message,
                &failure.remedy,
                None,
                now,
            ))
        }
        None if checkpointed => Plan::just(succeeded(object, &status, Reason::CheckpointCompleted, now)),
        None if object.spec.validate_only => {
            Plan::just(succeeded(object, &status, Reason::ValidationCompleted, now))
        }
        None => {
            let message = "the agent ended without a result".to_owned();
            Plan::just(failed_by_us(
                object,
                &status,
                Step::Dump,
                Reason::AgentLost,
                message,
                now,
            ))
        }
    }
}

/// A pod that does not run is worse news than any result.
fn source_warning(object: &PodCheckpoint) -> String {
    let bad = object
        .condition(ConditionType::SourceRunning)
        .filter(|c| c.status == "False");
    bad.map(|c| format!("WARNING, the pod does not run ({}): {}. ", c.reason, c.message))
        .unwrap_or_default()
}

fn succeeded(
    object: &PodCheckpoint,
    status: &PodCheckpointStatus,
    reason: Reason,
    now: Timestamp,
) -> Vec<Action> {
    let what = if reason == Reason::ValidationCompleted {
        "nothing stands in the way of a checkpoint".to_owned()
    } else {
        let folder = status
            .checkpoint_location
            .as_ref()
            .and_then(|l| l.node_local.as_ref());
        let folder = folder.map(|l| l.path.clone()).unwrap_or_default();
        let node = status.node_name.clone().unwrap_or_default();
        format!(
            "{} in {folder} below the archive root of node {node}",
            status.size.clone().unwrap_or_default()
        )
    };
    let message = format!("{}{what}", source_warning(object));
    let new = ended(
        object,
        status,
        (Verdict::True, reason, &message),
        (Verdict::False, Reason::NotFailed, "nothing has failed"),
        now,
    );
    vec![
        Action::WriteStatus(Box::new(new)),
        Action::Announce(Event::Succeeded(message)),
    ]
}

fn failed_by_us(
    object: &PodCheckpoint,
    status: &PodCheckpointStatus,
    step: Step,
    reason: Reason,
    message: String,
    now: Timestamp,
) -> Vec<Action> {
    let remedy = reason.doc().remedy.to_owned();
    let failure = Failure {
        step,
        reason: reason.as_str().to_owned(),
        message: message.clone(),
        remedy: remedy.clone(),
    };
    failed(object, status, reason, &message, &remedy, Some(failure), now)
}

fn failed(
    object: &PodCheckpoint,
    status: &PodCheckpointStatus,
    reason: Reason,
    message: &str,
    remedy: &str,
    ours: Option<Failure>,
    now: Timestamp,
) -> Vec<Action> {
    let ready = if reason == Reason::SourcePodReplaced {
        reason
    } else {
        Reason::CheckpointFailed
    };
    let full = format!("{}. {remedy}", message.trim_end_matches('.'));
    let mut new = ended(
        object,
        status,
        (Verdict::False, ready, &full),
        (Verdict::True, reason, &full),
        now,
    );
    new.failure = ours;
    let event = Event::Failed {
        reason: reason.as_str().to_owned(),
        message: full,
    };
    vec![Action::WriteStatus(Box::new(new)), Action::Announce(event)]
}

/// The controller's part of a terminal status.
fn ended(
    object: &PodCheckpoint,
    status: &PodCheckpointStatus,
    ready: (Verdict, Reason, &str),
    stalled: (Verdict, Reason, &str),
    now: Timestamp,
) -> PodCheckpointStatus {
    let time = Time(now);
    let old = &status.conditions;
    let generation = object.metadata.generation;
    let set = |t, (v, r, m): (Verdict, Reason, &str)| condition(t, v, r, m, generation, old, &time);
    let mut conditions = vec![resolution(object, status, stalled, &time)];
    conditions.extend(untouched(object, status, &time));
    conditions.push(set(ConditionType::Ready, ready));
    conditions.push(set(ConditionType::Stalled, stalled));
    let word = if stalled.0 == Verdict::True {
        stalled.1
    } else {
        ready.1
    };
    PodCheckpointStatus {
        observed_generation: generation,
        node_name: status.node_name.clone(),
        source_pod_uid: status.source_pod_uid.clone(),
        start_time: status.start_time.clone(),
        completion_time: Some(time),
        reason: Some(word.as_str().to_owned()),
        conditions,
        ..Default::default()
    }
}

fn resolution(
    object: &PodCheckpoint,
    status: &PodCheckpointStatus,
    end: (Verdict, Reason, &str),
    now: &Time,
) -> Condition {
    let known = status
        .conditions
        .iter()
        .find(|c| c.type_ == ConditionType::TargetResolved.as_str());
    known.cloned().unwrap_or_else(|| {
        let (_, reason, message) = end;
        condition(
            ConditionType::TargetResolved,
            Verdict::False,
            reason,
            message,
            object.metadata.generation,
            &[],
            now,
        )
    })
}

/// The agent's conditions that the agent never wrote: they stay ours, and say that it was not come to them.
fn untouched(object: &PodCheckpoint, status: &PodCheckpointStatus, now: &Time) -> Vec<Condition> {
    let not_written = |t: &ConditionType| {
        let current = status.conditions.iter().find(|c| c.type_ == t.as_str());
        current.is_none_or(|c| c.reason == Reason::Pending.as_str())
    };
    let text = "an earlier step failed";
    agents_types()
        .filter(not_written)
        .map(|t| {
            condition(
                t,
                Verdict::Unknown,
                Reason::NotReached,
                text,
                object.metadata.generation,
                &status.conditions,
                now,
            )
        })
        .collect()
}

fn time_to_live(object: &PodCheckpoint, now: Timestamp) -> Plan {
    let ended = object.status.as_ref().and_then(|s| s.completion_time.as_ref());
    let (Some(seconds), Some(ended)) = (object.spec.ttl_seconds_after_finished, ended) else {
        return Plan::default();
    };
    let end = ended.0 + SignedDuration::from_secs(seconds.into());
    if now >= end {
        Plan::just(vec![Action::DeleteObject])
    } else {
        Plan::wait_until(end, now)
    }
}

fn deletion(world: &World, now: Timestamp) -> Plan {
    let object = &world.object;
    if !object.finalizers().iter().any(|f| f == FINALIZER) {
        return Plan::default();
    }
    let state = object.status.as_ref().and_then(|s| s.archive_state);
    let nothing_left = matches!(state, None | Some(ArchiveState::Nothing | ArchiveState::Deleted));
    let kept = object.spec.deletion_policy == DeletionPolicy::Retain && state == Some(ArchiveState::Present);
    let asked = object.metadata.deletion_timestamp.as_ref().map_or(now, |t| t.0);
    let limit = asked + DELETION_LIMIT;
    // What an agent cannot delete now, the next one on the node deletes when it starts.
    if nothing_left || kept || now >= limit || world.node.is_none() {
        return Plan::just(vec![Action::RemoveFinalizer]);
    }
    let mut plan = Plan::wait_until(limit, now);
    if world.agent.is_none()
        && let Some(node) = bound_node(object)
    {
        plan.actions.push(Action::EnsureAgent(node.to_owned()));
    }
    plan
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
