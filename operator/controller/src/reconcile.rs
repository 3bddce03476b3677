//! The loops that tie observe, plan and act to the watches: one over PodCheckpoints, one over the agents' pods.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, future};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::{Action as Requeue, Config as Concurrency, Controller};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use podcheckpoint_crds::PodCheckpoint;
use tokio::sync::Notify;

use crate::act::{ActError, Hand};
use crate::agent_pod::COMPONENT;
use crate::agents::{LastUse, node_of, retire};
use crate::metrics::Metrics;
use crate::observe::{ObserveError, Reader};
use crate::plan::{Plan, World, bound_node, plan, until};

/// How many objects are worked on at once.
const CONCURRENCY: u16 = 16;
/// Changes that come within this time are looked at together when agents are retired.
const GATHER: Duration = Duration::from_millis(200);

/// Why a pass over an object failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Something could not be read.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// Something could not be written.
    #[error(transparent)]
    Act(#[from] ActError),
}

/// What kind of error it is, which decides when to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// The object has changed meanwhile: look again at once.
    Conflict,
    /// The API server does not answer, or asks for patience: try again, ever more slowly.
    Transient,
    /// The API server refuses what we ask for: trying again will hardly help, but a missing right may be granted.
    Fatal,
}

impl Class {
    /// Its word in metrics and logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Conflict => "conflict",
            Self::Transient => "transient",
            Self::Fatal => "fatal",
        }
    }

    /// How long to wait after so many failures in a row.
    fn delay(self, attempt: u32) -> Duration {
        let (first, longest) = match self {
            Self::Conflict => (Duration::from_millis(50), Duration::from_secs(2)),
            Self::Transient => (Duration::from_millis(500), Duration::from_secs(60)),
            Self::Fatal => (Duration::from_secs(10), Duration::from_secs(300)),
        };
        first
            .saturating_mul(2_u32.saturating_pow(attempt.min(12)))
            .min(longest)
    }
}

impl Error {
    fn class(&self) -> Class {
        match self {
            Self::Act(ActError::Conflict) => Class::Conflict,
            Self::Act(ActError::AgentDenied(_)) => Class::Fatal,
            Self::Act(ActError::Api(error)) => class_of(error),
            Self::Observe(ObserveError::Api(error)) => class_of(error),
            Self::Observe(ObserveError::Cache(_)) => Class::Transient,
        }
    }
}

fn class_of(error: &kube::Error) -> Class {
    match error {
        kube::Error::Api(status) if status.code == 409 => Class::Conflict,
        kube::Error::Api(status) if status.code != 429 && (400..500).contains(&status.code) => Class::Fatal,
        _ => Class::Transient,
    }
}

/// What the loops need.
pub(crate) struct Shared {
    /// Reads.
    pub(crate) reader: Reader,
    /// Writes.
    pub(crate) hand: Hand,
    /// Counts.
    pub(crate) metrics: Metrics,
    /// Failures in a row of each object; empty when all is well.
    pub(crate) failures: Mutex<HashMap<ObjectRef<PodCheckpoint>, u32>>,
}

impl Shared {
    /// How many passes over the object have failed before this one.
    fn failed(&self, object: &PodCheckpoint) -> u32 {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(ObjectRef::from_obj(object)).or_default();
        let before = *count;
        *count = count.saturating_add(1);
        before
    }

    fn worked(&self, object: &PodCheckpoint) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if !failures.is_empty() {
            failures.remove(&ObjectRef::from_obj(object));
        }
    }

    async fn carry_out(&self, world: &World) -> Result<Plan, ActError> {
        let now = Timestamp::now();
        let decided = plan(world, now);
        self.hand.act(&world.object, &decided.actions).await?;
        self.metrics.count(&world.object, &decided.actions, now);
        Ok(decided)
    }
}

/// One pass over an object.
async fn reconcile(object: Arc<PodCheckpoint>, shared: Arc<Shared>) -> Result<Requeue, Error> {
    let world = shared.reader.observe((*object).clone()).await?;
    let decided = match shared.carry_out(&world).await {
        Err(ActError::AgentDenied(words)) => denied(&object, words, &shared).await?,
        other => other?,
    };
    shared.worked(&object);
    Ok(decided
        .requeue
        .map_or_else(Requeue::await_change, Requeue::requeue))
}

/// The agent's pod was refused, which is a fact about the object and not an error of ours. The binding may just have
/// been written, so the object is read again.
async fn denied(object: &PodCheckpoint, words: String, shared: &Shared) -> Result<Plan, Error> {
    let Some(current) = shared.reader.current(object).await? else {
        return Ok(Plan::default());
    };
    let mut world = shared.reader.observe(current).await?;
    world.agent_denied = Some(words);
    Ok(shared.carry_out(&world).await?)
}

fn on_error(object: Arc<PodCheckpoint>, error: &Error, shared: Arc<Shared>) -> Requeue {
    let class = error.class();
    shared.metrics.error(class);
    let delay = class.delay(shared.failed(&object));
    if class != Class::Conflict {
        let source = std::error::Error::source(error).map(ToString::to_string);
        let (name, namespace, class) = (object.name_any(), object.namespace(), class.as_str());
        tracing::warn!(name, namespace, class, %error, source, ?delay, "will try again");
    }
    Requeue::requeue(delay)
}

/// What a cache keeps of an object: of one that has ended, only what retention and deletion need, so that thousands of
/// them are cheap. Nothing is ever written from what is left out: a status that has ended is not written again.
fn slim(object: &mut PodCheckpoint) {
    object.metadata.managed_fields = None;
    object.metadata.annotations = None;
    if !object.is_terminal() {
        return;
    }
    let Some(status) = &mut object.status else { return };
    status.findings = Vec::new();
    // What was changed has to be put back, or deleted with the object.
    status.patches.retain(|patch| patch.applied_time.is_some());
    status.skipped_methods = Vec::new();
    status.checkpointed_containers = Vec::new();
    status.checkpoint_location = None;
    status.runtime = None;
    status.failure = None;
    status.conditions.retain(|c| c.status == "True");
    for condition in &mut status.conditions {
        condition.message = String::new();
    }
}

/// Runs both loops until the process ends.
///
/// `reader_agents` is the writing end of the cache that the reader looks into.
pub(crate) async fn run(client: Client, shared: Arc<Shared>, agents_writer: reflector::store::Writer<Pod>) {
    let changed = Arc::new(Notify::new());
    let (objects, objects_writer) = reflector::store();
    let object_changed = changed.clone();
    let object_stream = watcher(
        Api::<PodCheckpoint>::all(client.clone()),
        watcher::Config::default().page_size(500),
    )
    .default_backoff()
    .modify(slim)
    .reflect(objects_writer)
    .inspect_ok(move |_| object_changed.notify_one())
    .applied_objects();
    let agent_changed = changed.clone();
    let pods: Api<Pod> = Api::namespaced(client, &shared.reader.settings.namespace);
    let ours = watcher::Config::default().labels(&format!("{}={}", COMPONENT.0, COMPONENT.1));
    let agent_stream = watcher(pods, ours)
        .default_backoff()
        .modify(|pod| pod.metadata.managed_fields = None)
        .reflect(agents_writer)
        .inspect_ok(move |_| agent_changed.notify_one())
        .touched_objects();
    let bound = objects.clone();
    let objects_loop = Controller::for_stream(object_stream, objects.clone())
        .with_config(Concurrency::default().concurrency(CONCURRENCY))
        .watches_stream(agent_stream, move |pod| waiting_for(&pod, &bound))
        .run(reconcile, on_error, shared.clone())
        .for_each(|_| future::ready(()));
    tokio::select! {
        () = objects_loop => tracing::error!("the watches have ended"),
        () = agents_loop(&shared, &objects, &changed) => {}
    }
}

/// The objects that wait for something from an agent.
fn waiting_for(pod: &Pod, objects: &Store<PodCheckpoint>) -> Vec<ObjectRef<PodCheckpoint>> {
    let node = node_of(pod);
    let waits = |o: &PodCheckpoint| {
        let done = o.is_terminal() && o.metadata.deletion_timestamp.is_none() && !o.has_open_patches();
        bound_node(o) == Some(node) && !done
    };
    objects
        .state_filter(waits)
        .iter()
        .map(|o| ObjectRef::from_obj(o.as_ref()))
        .collect()
}

/// Deletes agents that nothing needs. It sleeps until something changes or an agent has been idle for long enough.
async fn agents_loop(shared: &Shared, objects: &Store<PodCheckpoint>, changed: &Notify) {
    let agents = &shared.reader.agents;
    let ready = future::try_join(objects.wait_until_ready(), agents.wait_until_ready());
    if ready.await.is_err() {
        return;
    }
    let mut last_use = LastUse::new();
    loop {
        let now = Timestamp::now();
        let decided = retire(
            &agents.state(),
            &objects.state(),
            &mut last_use,
            &shared.reader.settings,
            now,
        );
        shared.metrics.in_progress.set(decided.in_progress);
        let mut again = decided.next.map(|next| until(next, now));
        for agent in &decided.delete {
            if let Err(error) = shared.hand.delete_agent(agent).await {
                tracing::warn!(%error, agent = agent.name_any(), "idle agent not deleted");
                again = Some(Duration::from_secs(10));
            }
        }
        let timer = async {
            match again {
                Some(again) => tokio::time::sleep(again).await,
                None => future::pending().await,
            }
        };
        tokio::select! {
            () = changed.notified() => tokio::time::sleep(GATHER).await,
            () = timer => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_tried_again_ever_more_slowly_up_to_a_limit() {
        assert_eq!(Class::Transient.delay(0), Duration::from_millis(500));
        assert_eq!(Class::Transient.delay(1), Duration::from_secs(1));
        assert_eq!(Class::Transient.delay(1000), Duration::from_secs(60));
    }

    #[test]
    fn what_was_changed_for_an_object_that_has_ended_is_remembered() {
        let patch = |applied: Option<&str>| {
            serde_json::json!({
                "kind": "Freezer", "setting": "x", "scope": "x", "before": "x", "after": "x", "exposes": "x",
                "atMostSeconds": 1, "appliedTime": applied,
            })
        };
        let mut object: PodCheckpoint = serde_json::from_value(serde_json::json!({
            "apiVersion": "podcheckpoint.dev/v1alpha1", "kind": "PodCheckpoint", "metadata": {"name": "a"},
            "spec": {"sourcePodName": "a"},
            "status": {
                "conditions": [{"type": "Stalled", "status": "True", "reason": "AgentLost", "message": "x",
                                "lastTransitionTime": "2026-01-01T00:00:00Z"}],
                "patches": [patch(None), patch(Some("2026-01-01T00:00:00Z"))],
            },
        }))
        .unwrap();
        slim(&mut object);
        assert!(object.has_open_patches());
        assert_eq!(object.status.unwrap().patches.len(), 1);
    }

    #[test]
    fn a_refusal_is_not_taken_for_an_outage() {
        let api = |code| {
            let status = kube::core::Status::failure("no", "Forbidden").with_code(code);
            class_of(&kube::Error::Api(status.boxed()))
        };
        assert_eq!(
            [api(403), api(409), api(429), api(503)],
            [Class::Fatal, Class::Conflict, Class::Transient, Class::Transient]
        );
    }
}
