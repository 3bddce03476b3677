//! The two control loops: one over PodCheckpoints, one over the agents' pods.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::runtime::controller::{Action as Requeue, Config as Concurrency, Controller};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use podcheckpoint_crds::PodCheckpoint;

use crate::act::{ActError, Writer};
use crate::agent_pod::COMPONENT;
use crate::metrics::Metrics;
use crate::observe::Reader;
use crate::plan::{Action, bound_node, plan};

/// How many objects are worked on at once.
const CONCURRENCY: u16 = 16;

/// Why a pass over an object failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something could not be read.
    #[error("the API server could not be read")]
    Observe(#[source] kube::Error),
    /// Something could not be written.
    #[error(transparent)]
    Act(#[from] ActError),
}

/// What both loops need.
pub struct Shared {
    /// Reads.
    pub reader: Reader,
    /// Writes.
    pub writer: Writer,
    /// Counts.
    pub metrics: Metrics,
}

/// One pass over an object.
async fn reconcile(object: Arc<PodCheckpoint>, shared: Arc<Shared>) -> Result<Requeue, Error> {
    let mut world = shared.reader.observe(&object).await.map_err(Error::Observe)?;
    let decided = plan(&world, Timestamp::now());
    shared.metrics.count(&object, &decided.actions);
    match shared.writer.act(&object, decided.actions).await {
        Err(ActError::AgentDenied(words)) => {
            // The binding may just have been written: look again at what is there now.
            let api: Api<PodCheckpoint> = Api::namespaced(
                shared.reader.client.clone(),
                &object.namespace().unwrap_or_default(),
            );
            let Some(current) = api.get_opt(&object.name_any()).await.map_err(Error::Observe)? else {
                return Ok(Requeue::await_change());
            };
            world.object = current.clone();
            world.agent_denied = Some(words);
            let decided = plan(&world, Timestamp::now());
            // Asking for the agent once more would only be refused once more.
            let actions: Vec<_> = decided
                .actions
                .into_iter()
                .filter(|a| !matches!(a, Action::EnsureAgent(_)))
                .collect();
            shared.metrics.count(&current, &actions);
            shared.writer.act(&current, actions).await?;
        }
        other => other?,
    }
    Ok(decided
        .requeue
        .map_or_else(Requeue::await_change, Requeue::requeue))
}

fn on_error(object: Arc<PodCheckpoint>, error: &Error, shared: Arc<Shared>) -> Requeue {
    let class = match error {
        Error::Act(ActError::Conflict) => "conflict",
        Error::Act(ActError::AgentDenied(_)) => "denied",
        Error::Observe(_) | Error::Act(ActError::Api(_)) => "api",
    };
    shared.metrics.error(class);
    if class == "conflict" {
        return Requeue::requeue(Duration::from_millis(200));
    }
    let source = std::error::Error::source(error).map(ToString::to_string);
    tracing::warn!(name = object.name_any(), namespace = object.namespace(), %error, source, "will try again");
    Requeue::requeue(Duration::from_secs(5))
}

/// One pass over an agent's pod: it goes when nothing has used it for the idle timeout.
async fn retire(pod: Arc<Pod>, context: Arc<(Arc<Shared>, Store<PodCheckpoint>)>) -> Result<Requeue, Error> {
    let (shared, objects) = &*context;
    let timeout = shared.reader.config.agent.idle_timeout_seconds;
    let node = pod
        .spec
        .as_ref()
        .and_then(|s| s.node_name.clone())
        .unwrap_or_default();
    if timeout < 0 || pod.metadata.deletion_timestamp.is_some() {
        return Ok(Requeue::await_change());
    }
    let Some(since) = idle_since(&pod, &node, &objects.state()) else {
        return Ok(Requeue::await_change());
    };
    let end = since + SignedDuration::from_secs(timeout);
    let now = Timestamp::now();
    if now >= end {
        shared.writer.delete_agent(&pod).await?;
        return Ok(Requeue::await_change());
    }
    Ok(Requeue::requeue(
        end.duration_since(now).unsigned_abs() + Duration::from_millis(200),
    ))
}

/// When the last operation of a node ended; `None` while one is at work or waits for the agent.
fn idle_since(pod: &Pod, node: &str, objects: &[Arc<PodCheckpoint>]) -> Option<Timestamp> {
    let mut since = pod.metadata.creation_timestamp.as_ref().map(|t| t.0)?;
    for object in objects.iter().filter(|o| bound_node(o) == Some(node)) {
        if object.metadata.deletion_timestamp.is_some() || !object.is_terminal() {
            return None;
        }
        let ended = object
            .status
            .as_ref()
            .and_then(|s| s.completion_time.as_ref())
            .map(|t| t.0);
        since = ended.map_or(since, |ended| since.max(ended));
    }
    Some(since)
}

/// Runs both loops until the process ends.
pub async fn run(
    client: Client,
    shared: Arc<Shared>,
    agents: impl futures::Stream<Item = Result<watcher::Event<Pod>, watcher::Error>> + Send + 'static,
) {
    let objects: Api<PodCheckpoint> = Api::all(client.clone());
    let config = watcher::Config::default().page_size(500);
    let controller =
        Controller::new(objects, config.clone()).with_config(Concurrency::default().concurrency(CONCURRENCY));
    let store = controller.store();
    let pods: Api<Pod> = Api::namespaced(client.clone(), &shared.reader.namespace);
    let mine = config.labels(&format!("{}={}", COMPONENT.0, COMPONENT.1));
    let by_node = store.clone();
    let controller = controller.watches(pods.clone(), mine.clone(), move |pod| {
        let node = pod.spec.and_then(|s| s.node_name).unwrap_or_default();
        let waiting = |o: &Arc<PodCheckpoint>| bound_node(o) == Some(node.as_str()) && !o.is_terminal();
        by_node
            .state()
            .iter()
            .filter(|o| waiting(o))
            .map(|o| ObjectRef::from_obj(o.as_ref()))
            .collect::<Vec<_>>()
    });
    let objects_loop = controller
        .run(reconcile, on_error, shared.clone())
        .for_each(|_| async {});

    let namespace = shared.reader.namespace.clone();
    let context = Arc::new((shared.clone(), store));
    let agents_loop = Controller::new(pods, mine)
        .watches(
            Api::<PodCheckpoint>::all(client),
            watcher::Config::default().page_size(500),
            move |object| {
                let node = bound_node(&object)?.to_owned();
                Some(ObjectRef::new(&crate::agent_pod::name(&node)).within(&namespace))
            },
        )
        .run(
            retire,
            |_, _, _| Requeue::requeue(Duration::from_secs(5)),
            context,
        )
        .for_each(|_| async {});
    let cache = agents.for_each(|_| async {});
    tokio::select! {
        () = objects_loop => {}
        () = agents_loop => {}
        () = cache => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use podcheckpoint_crds::conditions::{Verdict, condition};
    use podcheckpoint_crds::{ConditionType, PodCheckpointSpec, PodCheckpointStatus, Reason};

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn agent() -> Pod {
        let mut pod = Pod::default();
        pod.metadata.creation_timestamp = Some(Time(at(100)));
        pod
    }

    fn object(ended: Option<i64>) -> Arc<PodCheckpoint> {
        let mut object = PodCheckpoint::new("a", PodCheckpointSpec::default());
        let verdict = if ended.is_some() {
            Verdict::True
        } else {
            Verdict::False
        };
        let now = Time(at(0));
        object.status = Some(PodCheckpointStatus {
            node_name: Some("node1".into()),
            completion_time: ended.map(|s| Time(at(s))),
            conditions: vec![condition(
                ConditionType::Ready,
                verdict,
                Reason::CheckpointCompleted,
                "",
                None,
                &[],
                &now,
            )],
            ..Default::default()
        });
        Arc::new(object)
    }

    #[test]
    fn an_agent_at_work_is_not_idle() {
        assert_eq!(
            idle_since(&agent(), "node1", &[object(Some(200)), object(None)]),
            None
        );
    }

    #[test]
    fn an_agent_is_idle_since_the_last_end_on_its_node() {
        assert_eq!(
            idle_since(&agent(), "node1", &[object(Some(200)), object(Some(150))]),
            Some(at(200))
        );
        assert_eq!(idle_since(&agent(), "node2", &[object(None)]), Some(at(100)));
    }
}
