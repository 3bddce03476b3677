//! Whether a pod can be a target, from its API object and its node's alone. Pure.

use k8s_openapi::api::core::v1::{Node, Pod, PodSpec};
use kube::ResourceExt;
use podcheckpoint_crds::{PodCheckpointSpec, Reason};

/// Why not: in one word and in a sentence.
pub(crate) type Refusal = (Reason, String);

/// A target that can be bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Node on which it runs.
    pub(crate) node: String,
    /// UID of the pod.
    pub(crate) uid: String,
    /// Containers that are to be checkpointed.
    pub(crate) containers: Vec<String>,
}

/// The node and the UID of the target, or why it cannot be one.
pub(crate) fn resolve(
    spec: &PodCheckpointSpec,
    pod: Option<&Pod>,
    node: Option<&Node>,
    operator_namespace: &str,
) -> Result<Target, Refusal> {
    let name = &spec.source_pod_name;
    let pod = pod.ok_or_else(|| {
        (
            Reason::PodNotFound,
            format!("there is no pod {name} in this namespace"),
        )
    })?;
    let uid = pod.uid().unwrap_or_default();
    if let Some(wanted) = spec.source_pod_uid.as_ref().filter(|wanted| **wanted != uid) {
        let message = format!("pod {name} has the UID {uid}, not {wanted}");
        return Err((Reason::SourcePodReplaced, message));
    }
    check_pod(pod, operator_namespace)?;
    check_containers(spec.containers.as_deref(), pod)?;
    let on = pod
        .spec
        .as_ref()
        .and_then(|s| s.node_name.clone())
        .unwrap_or_default();
    check_node(node, &on)?;
    Ok(Target {
        node: on,
        uid,
        containers: chosen(spec.containers.as_deref(), pod),
    })
}

fn check_pod(pod: &Pod, operator_namespace: &str) -> Result<(), Refusal> {
    let name = pod.name_any();
    let phase = pod
        .status
        .as_ref()
        .and_then(|s| s.phase.as_deref())
        .unwrap_or("Pending");
    let spec = pod.spec.as_ref();
    let refuse = |reason, words: &str| Err((reason, format!("pod {name} {words}")));
    if pod.namespace().as_deref() == Some(operator_namespace) {
        return refuse(Reason::PodProtected, "is in the operator's namespace");
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return refuse(Reason::PodTerminating, "is being deleted");
    }
    match phase {
        "Running" => {}
        "Succeeded" | "Failed" => {
            return refuse(Reason::PodCompleted, &format!("has ended: its phase is {phase}"));
        }
        _ => {
            return refuse(
                Reason::PodNotRunning,
                &format!("does not run yet: its phase is {phase}"),
            );
        }
    }
    if pod.annotations().contains_key("kubernetes.io/config.mirror") {
        return refuse(Reason::PodStatic, "is a static pod");
    }
    if spec.is_some_and(|s| s.host_pid == Some(true)) {
        return refuse(Reason::PodHostPid, "has hostPID: true");
    }
    Ok(())
}

fn check_containers(wanted: Option<&[String]>, pod: &Pod) -> Result<(), Refusal> {
    let Some(wanted) = wanted else {
        let regular = pod.spec.iter().flat_map(|s| &s.containers);
        let running = regular.filter(|c| state_of(pod, &c.name).is_ok()).count();
        let none = || {
            (
                Reason::ContainerNotRunning,
                "no container of the pod runs".to_owned(),
            )
        };
        return if running > 0 { Ok(()) } else { Err(none()) };
    };
    let nothing = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&nothing);
    wanted
        .iter()
        .try_for_each(|name| check_container(name, spec, pod))
}

/// Only the API server knows which containers are regular: to the runtime, an ephemeral one is like any other.
fn chosen(wanted: Option<&[String]>, pod: &Pod) -> Vec<String> {
    let running = || {
        let regular = pod.spec.iter().flat_map(|s| &s.containers);
        let running = regular.filter(|c| state_of(pod, &c.name).is_ok());
        running.map(|c| c.name.clone()).collect()
    };
    wanted.map_or_else(running, <[String]>::to_vec)
}

fn check_container(name: &str, spec: &PodSpec, pod: &Pod) -> Result<(), Refusal> {
    if spec.init_containers.iter().flatten().any(|c| c.name == name) {
        return Err((
            Reason::ContainerNotRegular,
            format!("{name} is an init container"),
        ));
    }
    if spec.ephemeral_containers.iter().flatten().any(|c| c.name == name) {
        return Err((
            Reason::ContainerNotRegular,
            format!("{name} is an ephemeral container"),
        ));
    }
    if !spec.containers.iter().any(|c| c.name == name) {
        let all: Vec<_> = spec.containers.iter().map(|c| c.name.as_str()).collect();
        let message = format!("the pod has no container {name}; it has {}", all.join(", "));
        return Err((Reason::ContainerNotFound, message));
    }
    state_of(pod, name).map_err(|state| {
        let message = format!("container {name} does not run: {state}");
        (Reason::ContainerNotRunning, message)
    })
}

/// Ok when the container runs, otherwise what it does instead.
fn state_of(pod: &Pod, name: &str) -> Result<(), String> {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|s| s.container_statuses.as_deref())
        .unwrap_or_default();
    let state = statuses
        .iter()
        .find(|s| s.name == name)
        .and_then(|s| s.state.as_ref());
    let Some(state) = state else {
        return Err("it has no state yet".into());
    };
    if state.running.is_some() {
        return Ok(());
    }
    let waiting = state.waiting.as_ref().and_then(|w| w.reason.clone());
    let ended = state
        .terminated
        .as_ref()
        .map(|t| format!("it has ended with status {}", t.exit_code));
    Err(waiting.or(ended).unwrap_or_else(|| "it waits".into()))
}

/// A node on which an agent can be started. A cordoned one is: agents are not scheduled.
pub(crate) fn check_node(node: Option<&Node>, name: &str) -> Result<(), Refusal> {
    let node = node.ok_or_else(|| (Reason::NodeGone, format!("node {name} does not exist")))?;
    let conditions = node
        .status
        .as_ref()
        .and_then(|s| s.conditions.as_deref())
        .unwrap_or_default();
    let ready = conditions.iter().find(|c| c.type_ == "Ready");
    if ready.is_some_and(|c| c.status == "True") {
        return Ok(());
    }
    let words = ready
        .and_then(|c| c.message.as_deref())
        .unwrap_or("it has not reported");
    Err((Reason::NodeNotReady, format!("node {name} is not ready: {words}")))
}
