//! What to do about one PodCheckpoint. Pure: no client, no clock; what was observed comes in, actions go out.
//!
//! The stage is derived from facts on every pass. Conditions are output, with one exception: the agent's conditions
//! are how its facts reach us.

use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerStatus, Node, Pod};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use podcheckpoint_crds::{
    ArchiveState, ConditionType, DeletionPolicy, FINALIZER, Patch, PodCheckpoint, PodCheckpointStatus,
    Reason, Step,
};

use crate::agent_pod::template_of;
use crate::summary::{End, Writer};
use crate::target::{Refusal, Target, check_node, resolve};

/// How long after its deadline an agent may be silent before it is given up.
const AGENT_GRACE: SignedDuration = SignedDuration::from_secs(30);
/// How often it is made sure that an agent is there to put a setting of its node back.
const OPEN_PATCHES: Duration = Duration::from_secs(60);
/// How long a deletion waits for an agent to delete the archive.
const DELETION_LIMIT: SignedDuration = SignedDuration::from_secs(120);

/// What was observed.
#[derive(Clone, Debug)]
pub(crate) struct World {
    /// The object.
    pub(crate) object: PodCheckpoint,
    /// Its pod; only looked up before the object is bound.
    pub(crate) pod: Option<Pod>,
    /// The node of the pod, or of the binding; not looked up when the object rests.
    pub(crate) node: Option<Node>,
    /// The agent's pod on the node of the binding, unless it is being deleted.
    pub(crate) agent: Option<Pod>,
    /// What the API server said when it refused the agent's pod.
    pub(crate) agent_denied: Option<String>,
    /// What does not change.
    pub(crate) settings: Settings,
}

/// What does not change while the controller runs.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Namespace of the operator.
    pub(crate) namespace: String,
    /// Seconds that an agent may take to start.
    pub(crate) start_timeout: i64,
    /// Seconds that an agent stays when it has nothing to do; negative: for ever.
    pub(crate) idle_timeout: i64,
    /// The template from which agents are made now.
    pub(crate) template: String,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    /// Add our finalizer.
    AddFinalizer,
    /// Apply this as the controller's part of the status.
    WriteStatus(Box<PodCheckpointStatus>),
    /// Make sure that an agent runs on this node.
    EnsureAgent {
        /// Its name.
        node: String,
        /// Its UID, which owns the report on it.
        uid: Option<String>,
    },
    /// Delete this pod of an agent.
    DeleteAgent(Box<Pod>),
    /// Let the object go.
    RemoveFinalizer,
    /// Delete the object: its time to live is over.
    DeleteObject,
    /// Say what happened.
    Announce(Event),
}

/// What is said as an Event.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    /// The operation is bound to a node.
    Started(Target),
    /// A security setting of the node was changed for it, or put back.
    Patched {
        /// The node.
        node: String,
        /// The change.
        patch: Patch,
        /// It was put back.
        reverted: bool,
    },
    /// It has succeeded.
    Succeeded {
        /// What was reached.
        reason: Reason,
        /// In a sentence.
        message: String,
    },
    /// It has failed for good.
    Failed {
        /// Root cause.
        reason: Reason,
        /// In a sentence.
        message: String,
    },
}

/// What to do now, and when to look again if nothing happens.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Plan {
    /// In this order.
    pub(crate) actions: Vec<Action>,
    /// When to look again.
    pub(crate) requeue: Option<Duration>,
}

impl Plan {
    fn just(actions: Vec<Action>) -> Self {
        Self {
            actions,
            requeue: None,
        }
    }

    fn wait_until(moment: Timestamp, now: Timestamp) -> Self {
        Self {
            actions: Vec::new(),
            requeue: Some(until(moment, now)),
        }
    }
}

/// The time left until a moment, and a little more, so that it has passed when we look again.
pub(crate) fn until(moment: Timestamp, now: Timestamp) -> Duration {
    let left = moment.duration_since(now).max(SignedDuration::ZERO);
    left.unsigned_abs() + Duration::from_millis(100)
}

/// Decides.
pub(crate) fn plan(world: &World, now: Timestamp) -> Plan {
    let mut plan = stage(world, now);
    plan.actions
        .extend(patch_events(&world.object).map(Action::Announce));
    plan
}

/// What has been changed on the node for this object, and what has been put back. Each is said once, whoever asks.
fn patch_events(object: &PodCheckpoint) -> impl Iterator<Item = Event> {
    let patches = object.status.as_ref().map_or(&[][..], |status| &status.patches);
    let node = bound_node(object).unwrap_or_default();
    let ended = object.is_terminal();
    patches
        .iter()
        .filter(|patch| patch.applied_time.is_some())
        .flat_map(move |patch| {
            let event = |reverted| Event::Patched {
                node: node.to_owned(),
                patch: patch.clone(),
                reverted,
            };
            let changed = (!ended).then(|| event(false));
            let back = patch.reverted_time.is_some().then(|| event(true));
            changed.into_iter().chain(back)
        })
}

fn stage(world: &World, now: Timestamp) -> Plan {
    let object = &world.object;
    if object.metadata.deletion_timestamp.is_some() {
        return deletion(world, now);
    }
    if object.is_terminal() && object.has_open_patches() {
        // The agent was lost before it could put everything back: any agent on the node does so when it starts.
        return Plan {
            actions: keep_agent(world).into_iter().collect(),
            requeue: Some(OPEN_PATCHES),
        };
    }
    if object.is_terminal() {
        return time_to_live(object, now);
    }
    if bound_node(object).is_none() {
        return first_sight(world, now);
    }
    if agent_has_ended(object) {
        return Plan::just(end(writer(world, now).concluded()));
    }
    supervise(world, now)
}

/// The node that an object is bound to.
pub(crate) fn bound_node(object: &PodCheckpoint) -> Option<&str> {
    object.status.as_ref()?.node_name.as_deref()
}

/// Whether the agent is in the middle of an operation.
pub(crate) fn agent_is_at_work(object: &PodCheckpoint) -> bool {
    object
        .status
        .as_ref()
        .is_some_and(|s| s.archive_state == Some(ArchiveState::Writing))
}

/// Whether the agent has begun with an object; from then on it alone knows what the pod went through.
fn agent_has_begun(object: &PodCheckpoint) -> bool {
    object.status.as_ref().is_some_and(|s| s.archive_state.is_some())
}

/// The agent writes SourceRunning last, together with everything else.
fn agent_has_ended(object: &PodCheckpoint) -> bool {
    let last = object.condition(ConditionType::SourceRunning);
    last.is_some_and(|c| c.reason != Reason::Pending.as_str())
}

fn writer(world: &World, now: Timestamp) -> Writer<'_> {
    let of_pod = world
        .pod
        .as_ref()
        .and_then(|p| p.spec.as_ref()?.node_name.as_deref());
    Writer {
        object: &world.object,
        node: bound_node(&world.object).or(of_pod).unwrap_or_default(),
        operator_namespace: &world.settings.namespace,
        now,
    }
}

/// Writes an end, and announces it.
fn end(
    End {
        status,
        reason,
        message,
    }: End,
) -> Vec<Action> {
    let event = if status
        .conditions
        .iter()
        .any(|c| c.type_ == ConditionType::Ready.as_str() && c.status == "True")
    {
        Event::Succeeded { reason, message }
    } else {
        Event::Failed { reason, message }
    };
    vec![Action::WriteStatus(Box::new(status)), Action::Announce(event)]
}

/// Binds the object to its node, or ends it because its target cannot be one.
fn first_sight(world: &World, now: Timestamp) -> Plan {
    let object = &world.object;
    let settings = &world.settings;
    let target = resolve(
        &object.spec,
        world.pod.as_ref(),
        world.node.as_ref(),
        &settings.namespace,
    );
    let target = match target {
        Ok(target) => target,
        Err((reason, message)) => {
            return Plan::just(end(writer(world, now).ended_by_us(
                Step::ResolveTarget,
                reason,
                &message,
            )));
        }
    };
    let mut actions = Vec::new();
    if !has_finalizer(object) {
        actions.push(Action::AddFinalizer);
    }
    actions.push(Action::WriteStatus(Box::new(writer(world, now).bound(&target))));
    actions.push(Action::Announce(Event::Started(target.clone())));
    actions.push(ensure_agent(world, &target.node));
    Plan::just(actions)
}

/// While the agent has the object: it must start, and it must end.
fn supervise(world: &World, now: Timestamp) -> Plan {
    let object = &world.object;
    let start_limit = started(object, now) + SignedDuration::from_secs(world.settings.start_timeout);
    if !agent_has_begun(object) {
        if let Some((reason, message)) = agent_failure(world, now) {
            let mut actions = end(writer(world, now).ended_by_us(Step::StartAgent, reason, &message));
            actions.extend(failed_agent(world).map(delete_agent));
            return Plan::just(actions);
        }
        let mut plan = Plan::wait_until(start_limit, now);
        plan.actions
            .extend(leftover(world).map(delete_agent).or_else(|| keep_agent(world)));
        return plan;
    }
    let begun = begun(object).unwrap_or(start_limit);
    // The node has a clock of its own.
    let begun = begun.clamp(started(object, now), start_limit.max(started(object, now)));
    let deadline = begun + SignedDuration::from_secs(object.spec.timeout_seconds.into()) + AGENT_GRACE;
    if now >= deadline {
        return Plan::just(end(writer(world, now).ended_by_us(
            Step::Dump,
            Reason::AgentLost,
            &silence(world),
        )));
    }
    let mut plan = Plan::wait_until(deadline, now);
    plan.actions.extend(keep_agent(world));
    plan
}

/// When the object was bound.
fn started(object: &PodCheckpoint, now: Timestamp) -> Timestamp {
    let status = object.status.as_ref();
    status.and_then(|s| s.start_time.as_ref()).map_or(now, |t| t.0)
}

/// When the agent said that it begins, by the clock of its node.
fn begun(object: &PodCheckpoint) -> Option<Timestamp> {
    let said = object.condition(ConditionType::Checkpointed)?;
    (said.reason == Reason::CheckpointInProgress.as_str()).then_some(said.last_transition_time.0)
}

fn silence(world: &World) -> String {
    let node = bound_node(&world.object).unwrap_or_default();
    let words = match (check_node(world.node.as_ref(), node), &world.agent) {
        (Err((_, words)), _) => words,
        (Ok(()), None) => "its pod does not exist".to_owned(),
        (Ok(()), Some(agent)) => waiting_words(agent),
    };
    let seconds = world.object.spec.timeout_seconds;
    format!("the agent has not reported an end within {seconds} s and {AGENT_GRACE:#} of grace: {words}")
}

/// What keeps an agent on the node of the binding: one that has failed makes room, one that is missing is made.
fn keep_agent(world: &World) -> Option<Action> {
    if let Some(failed) = failed_agent(world) {
        return Some(delete_agent(failed));
    }
    let node = bound_node(&world.object)?;
    let wanted = world.agent.is_none() && world.agent_denied.is_none() && world.node.is_some();
    wanted.then(|| ensure_agent(world, node))
}

fn ensure_agent(world: &World, node: &str) -> Action {
    Action::EnsureAgent {
        node: node.to_owned(),
        uid: world.node.as_ref().and_then(|node| node.metadata.uid.clone()),
    }
}

fn delete_agent(pod: &Pod) -> Action {
    Action::DeleteAgent(Box::new(pod.clone()))
}

/// The agent's pod, when it has ended for good: a pod of phase Failed never runs again.
fn failed_agent(world: &World) -> Option<&Pod> {
    let phase = |pod: &&Pod| {
        pod.status
            .as_ref()
            .and_then(|s| s.phase.clone())
            .unwrap_or_default()
    };
    world
        .agent
        .as_ref()
        .filter(|pod| matches!(phase(pod).as_str(), "Failed" | "Succeeded"))
}

/// An agent from before this object that will not start soon: what it says is of another time, and the next one may do
/// better.
fn leftover(world: &World) -> Option<&Pod> {
    world
        .agent
        .as_ref()
        .filter(|pod| is_older(pod, world) && pod_failure(pod).is_some())
}

/// Whether a pod of an agent was made before the object, both by the API server's clock.
fn is_older(pod: &Pod, world: &World) -> bool {
    let object = world.object.metadata.creation_timestamp.as_ref();
    let made = pod.metadata.creation_timestamp.as_ref();
    made.zip(object).is_some_and(|(made, object)| made.0 < object.0)
}

/// Why the agent does not start, as soon as that is certain.
fn agent_failure(world: &World, now: Timestamp) -> Option<Refusal> {
    let limit = SignedDuration::from_secs(world.settings.start_timeout);
    let late = now >= started(&world.object, now) + limit;
    if let Some(words) = &world.agent_denied {
        return Some((
            Reason::AgentDenied,
            format!("the agent's pod was refused: {words}"),
        ));
    }
    let node = bound_node(&world.object).unwrap_or_default();
    let node_state = check_node(world.node.as_ref(), node).err();
    if let Some((Reason::NodeGone, _)) = node_state {
        return node_state;
    }
    // One that was made from an older configuration is about to be replaced: what it says counts no longer.
    let current = world
        .agent
        .as_ref()
        .filter(|pod| template_of(pod) == world.settings.template && !is_older(pod, world));
    if let Some(failure) = current.and_then(pod_failure) {
        return Some(failure);
    }
    let words = || {
        world
            .agent
            .as_ref()
            .map_or_else(|| "its pod does not exist".to_owned(), waiting_words)
    };
    late.then(|| node_state.unwrap_or_else(|| (Reason::AgentNotStarted, not_started(world, &words()))))
}

fn not_started(world: &World, words: &str) -> String {
    format!(
        "the agent did not start within {} s: {words}",
        world.settings.start_timeout
    )
}

fn pod_failure(pod: &Pod) -> Option<Refusal> {
    let status = pod.status.as_ref()?;
    if status.phase.as_deref() == Some("Failed") {
        let words = [status.reason.as_deref(), status.message.as_deref()];
        let words: Vec<_> = words.into_iter().flatten().collect();
        return Some((
            Reason::AgentRejected,
            format!("the kubelet refused the agent: {}", words.join(": ")),
        ));
    }
    let container = container(pod)?;
    match container.state.as_ref()?.waiting.as_ref()?.reason.as_deref()? {
        "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
            let message = format!("image {}: {}", container.image, waiting_words(pod));
            Some((Reason::AgentImageUnavailable, message))
        }
        "CrashLoopBackOff" => Some((
            Reason::AgentNotStarted,
            format!("the agent ends at once: {}", waiting_words(pod)),
        )),
        _ => None,
    }
}

fn container(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.first()
}

/// What the kubelet says of an agent's pod, and what the agent said when it last died.
fn waiting_words(pod: &Pod) -> String {
    if pod
        .status
        .as_ref()
        .is_none_or(|s| s.start_time.is_none() && s.container_statuses.is_none())
    {
        return "the kubelet has not taken notice of its pod; it may be stopped".to_owned();
    }
    let phase = pod
        .status
        .as_ref()
        .and_then(|s| s.phase.as_deref())
        .unwrap_or("unknown");
    let state = container(pod).and_then(|c| c.state.as_ref());
    let waiting = state.and_then(|s| s.waiting.as_ref());
    let last = container(pod).and_then(|c| c.last_state.as_ref()?.terminated.as_ref());
    let mut words = match waiting {
        Some(w) => [w.reason.as_deref(), w.message.as_deref()]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(": "),
        None => format!("its phase is {phase}"),
    };
    if let Some(last) = last {
        let said = last.message.as_deref().unwrap_or("nothing").trim();
        words.push_str(&format!(
            "; it ended before with status {} and said: {said}",
            last.exit_code
        ));
    }
    words
}

fn time_to_live(object: &PodCheckpoint, now: Timestamp) -> Plan {
    let ended = object.status.as_ref().and_then(|s| s.completion_time.as_ref());
    let (Some(seconds), Some(ended)) = (object.spec.ttl_seconds_after_finished, ended) else {
        return Plan::default();
    };
    let end = ended.0 + SignedDuration::from_secs(seconds.into());
    if now >= end {
        return Plan::just(vec![Action::DeleteObject]);
    }
    Plan::wait_until(end, now)
}

fn has_finalizer(object: &PodCheckpoint) -> bool {
    object.finalizers().iter().any(|f| f == FINALIZER)
}

/// Waits for the agent to delete what is on the node, but never for ever.
fn deletion(world: &World, now: Timestamp) -> Plan {
    let object = &world.object;
    if !has_finalizer(object) {
        return Plan::default();
    }
    let asked = object.metadata.deletion_timestamp.as_ref().map_or(now, |t| t.0);
    let limit = asked + DELETION_LIMIT;
    // What an agent cannot delete now, the next one on the node deletes when it starts.
    let nothing_to_do = nothing_to_delete(object) && !object.has_open_patches() && !object.keeps_a_profile();
    if nothing_to_do || now >= limit || world.node.is_none() {
        return Plan::just(vec![Action::RemoveFinalizer]);
    }
    let mut plan = Plan::wait_until(limit, now);
    plan.actions.extend(keep_agent(world));
    plan
}

fn nothing_to_delete(object: &PodCheckpoint) -> bool {
    let retain = object.spec.deletion_policy == DeletionPolicy::Retain;
    match object.status.as_ref().and_then(|s| s.archive_state) {
        None | Some(ArchiveState::Nothing | ArchiveState::Deleted) => true,
        Some(ArchiveState::Present) => retain,
        Some(ArchiveState::Writing) => false,
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
