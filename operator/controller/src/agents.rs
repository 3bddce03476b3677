//! Which agents go. Pure: what the caches hold comes in, pods to delete and the next moment to look come out.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use podcheckpoint_crds::PodCheckpoint;

use crate::agent_pod::template_of;
use crate::plan::{Settings, agent_is_at_work, bound_node};

/// A new agent is never deleted sooner: the cache may not know yet what it was made for.
const YOUTH: SignedDuration = SignedDuration::from_secs(15);

/// When each node was last seen in use. It covers objects that have been deleted; the rest is derived from the caches,
/// so that losing it costs nothing but patience.
pub(crate) type LastUse = BTreeMap<String, Timestamp>;

/// What to do about agents.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Retirement {
    /// Agents to delete.
    pub(crate) delete: Vec<Arc<Pod>>,
    /// When to look again.
    pub(crate) next: Option<Timestamp>,
    /// How many operations are under way.
    pub(crate) in_progress: i64,
}

/// What is known of one node's objects.
#[derive(Default)]
struct Node {
    in_use: bool,
    at_work: bool,
    last_end: Option<Timestamp>,
}

/// Decides.
pub(crate) fn retire(
    agents: &[Arc<Pod>],
    objects: &[Arc<PodCheckpoint>],
    last_use: &mut LastUse,
    settings: &Settings,
    now: Timestamp,
) -> Retirement {
    let nodes = by_node(objects);
    last_use.extend(
        nodes
            .iter()
            .filter(|(_, n)| n.in_use)
            .map(|(name, _)| ((*name).to_owned(), now)),
    );
    let in_progress = objects.iter().filter(|o| is_in_progress(o)).count();
    let mut retirement = Retirement {
        in_progress: i64::try_from(in_progress).unwrap_or(i64::MAX),
        ..Default::default()
    };
    for agent in agents
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
    {
        let name = node_of(agent);
        match end_of(agent, nodes.get(name), last_use.get(name).copied(), settings) {
            Some(end) if now >= end => retirement.delete.push(agent.clone()),
            Some(end) => retirement.next = Some(retirement.next.map_or(end, |next| next.min(end))),
            None => {}
        }
    }
    retirement
}

/// The node of an agent's pod.
pub(crate) fn node_of(pod: &Pod) -> &str {
    pod.spec
        .as_ref()
        .and_then(|s| s.node_name.as_deref())
        .unwrap_or_default()
}

fn by_node(objects: &[Arc<PodCheckpoint>]) -> BTreeMap<&str, Node> {
    let mut nodes: BTreeMap<&str, Node> = BTreeMap::new();
    for object in objects {
        let Some(name) = bound_node(object) else { continue };
        let node = nodes.entry(name).or_default();
        node.in_use |= object.metadata.deletion_timestamp.is_some()
            || !object.is_terminal()
            || object.has_open_patches();
        // One that was given up holds nobody back.
        node.at_work |= agent_is_at_work(object) && !object.is_terminal();
        let ended = object
            .status
            .as_ref()
            .and_then(|s| s.completion_time.as_ref())
            .map(|t| t.0);
        node.last_end = node.last_end.max(ended);
    }
    nodes
}

fn is_in_progress(object: &PodCheckpoint) -> bool {
    bound_node(object).is_some() && !object.is_terminal()
}

/// When an agent is to go, if nothing happens until then.
fn end_of(
    agent: &Pod,
    node: Option<&Node>,
    last_use: Option<Timestamp>,
    settings: &Settings,
) -> Option<Timestamp> {
    let born = agent.metadata.creation_timestamp.as_ref().map(|t| t.0)?;
    let (in_use, at_work) = node.map_or((false, false), |n| (n.in_use, n.at_work));
    // An operation is not interrupted for a new configuration; everything else can wait for the new agent.
    if template_of(agent) != settings.template && !at_work {
        return Some(born);
    }
    if in_use || settings.idle_timeout < 0 {
        return None;
    }
    let since = born
        .max(node.and_then(|n| n.last_end).unwrap_or(born))
        .max(last_use.unwrap_or(born));
    Some((since + SignedDuration::from_secs(settings.idle_timeout)).max(born + YOUTH))
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use kube::ResourceExt;
    use podcheckpoint_crds::conditions::{Verdict, condition};
    use podcheckpoint_crds::{ArchiveState, ConditionType, PodCheckpointSpec, PodCheckpointStatus, Reason};

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + seconds).unwrap()
    }

    fn agent(template: &str) -> Arc<Pod> {
        let mut pod = Pod::default();
        pod.metadata.creation_timestamp = Some(Time(at(0)));
        pod.spec.get_or_insert_default().node_name = Some("node1".into());
        pod.annotations_mut()
            .insert("podcheckpoint.dev/template".into(), template.into());
        Arc::new(pod)
    }

    fn object(ended: Option<i64>) -> PodCheckpoint {
        let mut object = PodCheckpoint::new("a", PodCheckpointSpec::default());
        let verdict = if ended.is_some() {
            Verdict::True
        } else {
            Verdict::False
        };
        let ready = condition(
            ConditionType::Ready,
            verdict,
            Reason::CheckpointCompleted,
            "",
            None,
            &[],
            &Time(at(0)),
        );
        object.status = Some(PodCheckpointStatus {
            node_name: Some("node1".into()),
            completion_time: ended.map(|s| Time(at(s))),
            conditions: vec![ready],
            ..Default::default()
        });
        object
    }

    fn decide(
        agent: Arc<Pod>,
        objects: Vec<PodCheckpoint>,
        last: &mut LastUse,
        now: i64,
    ) -> (usize, Option<Timestamp>) {
        let settings = Settings {
            namespace: "ops".into(),
            start_timeout: 60,
            idle_timeout: 100,
            template: "new".into(),
        };
        let objects: Vec<_> = objects.into_iter().map(Arc::new).collect();
        let decided = retire(&[agent], &objects, last, &settings, at(now));
        (decided.delete.len(), decided.next)
    }

    #[test]
    fn an_agent_in_use_stays() {
        let objects = vec![object(Some(1)), object(None)];
        assert_eq!(
            decide(agent("new"), objects, &mut LastUse::new(), 9000),
            (0, None)
        );
    }

    #[test]
    fn an_agent_goes_when_it_has_been_idle_since_the_last_end() {
        let objects = || vec![object(Some(20)), object(Some(50))];
        let last = &mut LastUse::new();
        assert_eq!(decide(agent("new"), objects(), last, 149), (0, Some(at(150))));
        assert_eq!(decide(agent("new"), objects(), last, 150), (1, None));
    }

    #[test]
    fn the_use_by_an_object_that_was_deleted_is_remembered() {
        let last = &mut LastUse::new();
        decide(agent("new"), vec![object(None)], last, 300);
        assert_eq!(decide(agent("new"), vec![], last, 301), (0, Some(at(400))));
    }

    #[test]
    fn after_a_restart_an_unused_agent_goes_by_its_own_age() {
        assert_eq!(decide(agent("new"), vec![], &mut LastUse::new(), 101), (1, None));
    }

    #[test]
    fn an_object_that_is_being_deleted_keeps_the_agent() {
        let mut deleting = object(Some(1));
        deleting.metadata.deletion_timestamp = Some(Time(at(5)));
        assert_eq!(
            decide(agent("new"), vec![deleting], &mut LastUse::new(), 500),
            (0, None)
        );
    }

    #[test]
    fn an_agent_of_an_older_template_goes_unless_it_is_at_work() {
        assert_eq!(
            decide(agent("old"), vec![object(None)], &mut LastUse::new(), 1),
            (1, None)
        );
        let mut writing = object(None);
        writing.status.as_mut().unwrap().archive_state = Some(ArchiveState::Writing);
        assert_eq!(
            decide(agent("old"), vec![writing], &mut LastUse::new(), 1),
            (0, None)
        );
    }

    #[test]
    fn an_object_that_was_given_up_does_not_keep_an_agent_of_an_older_template() {
        let mut lost = object(Some(1));
        lost.status.as_mut().unwrap().archive_state = Some(ArchiveState::Writing);
        assert_eq!(
            decide(agent("old"), vec![lost], &mut LastUse::new(), 2),
            (1, None)
        );
    }
}
