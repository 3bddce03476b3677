//! The agent's pod. One for each node, under a name that follows from the node's, so that two controllers make the
//! same one.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, EnvVar, EnvVarSource, HostPathVolumeSource, LocalObjectReference,
    ObjectFieldSelector, Pod, PodSecurityContext, PodSpec, SeccompProfile, SecurityContext, Toleration,
    Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use sha2::{Digest, Sha256};

use crate::config::AgentConfig;

/// Label by which agents are found, and its value.
pub(crate) const COMPONENT: (&str, &str) = ("app.kubernetes.io/component", "agent");
/// Annotation with the hash of what the pod was made from.
const TEMPLATE: &str = "podcheckpoint.dev/template";

/// Name of the agent's pod on a node.
pub(crate) fn name(node: &str) -> String {
    format!("podcheckpoint-agent-{}", hex(node.as_bytes(), 5))
}

/// Hash of everything in an agent's pod that does not depend on its node. An agent with another one was made from an
/// older configuration.
pub(crate) fn template(config: &AgentConfig) -> String {
    // A PodSpec has no map with keys that are not strings, so it can always be written as JSON.
    let json = serde_json::to_vec(&spec(config, "")).unwrap_or_default();
    hex(&json, 8)
}

/// The template that a pod was made from.
pub(crate) fn template_of(pod: &Pod) -> &str {
    pod.annotations().get(TEMPLATE).map_or("", String::as_str)
}

/// The agent's pod on a node.
pub(crate) fn build(config: &AgentConfig, namespace: &str, node: &str) -> Pod {
    let labels = [
        ("app.kubernetes.io/name", "podcheckpoint"),
        COMPONENT,
        ("app.kubernetes.io/managed-by", "podcheckpoint-controller"),
    ];
    let template = template(config);
    let annotations = [
        (TEMPLATE, template.as_str()),
        // The pod has no owner, which would keep the cluster autoscaler from removing an otherwise empty node. An agent
        // that is made again picks up where it was.
        ("cluster-autoscaler.kubernetes.io/safe-to-evict", "true"),
    ];
    Pod {
        metadata: ObjectMeta {
            name: Some(name(node)),
            namespace: Some(namespace.to_owned()),
            labels: Some(owned(labels)),
            annotations: Some(owned(annotations)),
            ..Default::default()
        },
        spec: Some(spec(config, node)),
        status: None,
    }
}

fn owned<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).into()
}

fn hex(bytes: &[u8], length: usize) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().take(length).map(|b| format!("{b:02x}")).collect()
}

fn spec(config: &AgentConfig, node: &str) -> PodSpec {
    let secrets = config.image_pull_secrets.iter();
    let secrets: Vec<_> = secrets
        .map(|name| LocalObjectReference { name: name.clone() })
        .collect();
    PodSpec {
        // Bound here and not by the scheduler: the pod must run where the target does, also on a cordoned node.
        node_name: Some(node.to_owned()),
        service_account_name: Some(config.service_account_name.clone()),
        automount_service_account_token: Some(true),
        host_pid: Some(true),
        host_network: Some(false),
        enable_service_links: Some(false),
        restart_policy: Some("Always".into()),
        termination_grace_period_seconds: Some(30),
        priority_class_name: Some(config.priority_class_name.clone()).filter(|name| !name.is_empty()),
        tolerations: Some(tolerations(config)),
        image_pull_secrets: Some(secrets).filter(|list| !list.is_empty()),
        security_context: Some(unconfined()),
        containers: vec![container(config)],
        volumes: Some(vec![
            host_path("run", "/run", "Directory"),
            host_path("cgroup", "/sys/fs/cgroup", "Directory"),
            host_path("archives", &config.archive_root, "DirectoryOrCreate"),
        ]),
        ..Default::default()
    }
}

fn tolerations(config: &AgentConfig) -> Vec<Toleration> {
    let everything = Toleration {
        operator: Some("Exists".into()),
        ..Default::default()
    };
    std::iter::once(everything)
        .chain(config.extra_tolerations.clone())
        .collect()
}

/// A tracer that is itself filtered may not suspend a filter (PTRACE_O_SUSPEND_SECCOMP), and clusters may have other
/// defaults than Unconfined, so both are said.
fn unconfined() -> PodSecurityContext {
    PodSecurityContext {
        seccomp_profile: Some(SeccompProfile {
            type_: "Unconfined".into(),
            ..Default::default()
        }),
        app_armor_profile: Some(AppArmorProfile {
            type_: "Unconfined".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container(config: &AgentConfig) -> Container {
    Container {
        name: "agent".into(),
        image: Some(config.image.clone()),
        image_pull_policy: Some(config.image_pull_policy.clone()),
        args: Some(arguments(config)),
        env: Some(environment(config)),
        resources: Some(config.resources.clone()),
        security_context: Some(SecurityContext {
            privileged: Some(true),
            run_as_user: Some(0),
            read_only_root_filesystem: Some(true),
            ..Default::default()
        }),
        // What an agent said before it died becomes the message of AgentNotStarted.
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        volume_mounts: Some(vec![
            mount("run", "/run", Some("HostToContainer")),
            mount("cgroup", "/sys/fs/cgroup", None),
            // The runtime writes archives on the node, so the path must mean the same to both.
            mount("archives", &config.archive_root, None),
        ]),
        ..Default::default()
    }
}

fn arguments(config: &AgentConfig) -> Vec<String> {
    let mut arguments = vec![
        "run".to_owned(),
        format!("--archive-root={}", config.archive_root),
        format!("--log-format={}", config.log_format),
    ];
    for kind in &config.allowed_patches {
        arguments.push(format!("--allow-patch={}", kind.as_str()));
    }
    if config.machines_in_pods {
        arguments.push("--machines-in-pods".to_owned());
    }
    if !config.runtime_socket.is_empty() {
        arguments.push(format!("--runtime-socket={}", config.runtime_socket));
    }
    // Without a port the agent does not ask the kubelet.
    if config.kubelet.enabled {
        arguments.push(format!("--kubelet-port={}", config.kubelet.port));
    }
    arguments
}

fn environment(config: &AgentConfig) -> Vec<EnvVar> {
    let mut environment = vec![
        field("NODE_NAME", "spec.nodeName"),
        field("HOST_IP", "status.hostIP"),
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        value("RUST_LOG", &config.log_level),
    ];
    if !config.kubelet.ca_bundle.is_empty() {
        environment.push(value("KUBELET_CA_PEM", &config.kubelet.ca_bundle));
    }
    environment
}

fn field(name: &str, path: &str) -> EnvVar {
    let field = ObjectFieldSelector {
        field_path: path.to_owned(),
        api_version: None,
    };
    EnvVar {
        name: name.to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(field),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn value(name: &str, value: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value: Some(value.to_owned()),
        ..Default::default()
    }
}

fn host_path(name: &str, path: &str, kind: &str) -> Volume {
    Volume {
        name: name.to_owned(),
        host_path: Some(HostPathVolumeSource {
            path: path.to_owned(),
            type_: Some(kind.to_owned()),
        }),
        ..Default::default()
    }
}

fn mount(name: &str, path: &str, propagation: Option<&str>) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        mount_propagation: propagation.map(str::to_owned),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn config() -> AgentConfig {
        let text = "agent: {image: 'agent:1', priorityClassName: system-node-critical}";
        serde_saphyr::from_str::<Config>(text).unwrap().agent
    }

    /// With UPDATE_SNAPSHOTS=1 the file is written instead of compared.
    #[test]
    fn the_pod_is_the_one_that_was_reviewed() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/agent-pod.yaml");
        let mut pod = build(&config(), "ops", "node1");
        pod.annotations_mut().remove(TEMPLATE);
        let yaml = serde_saphyr::to_string(&pod).unwrap();
        if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(path, &yaml).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), yaml);
    }

    #[test]
    fn a_machine_in_an_ordinary_pod_is_taken_for_the_pod_only_where_that_is_set() {
        let flag = "--machines-in-pods".to_owned();
        assert!(!arguments(&config()).contains(&flag));
        let allowed = AgentConfig {
            machines_in_pods: true,
            ..config()
        };
        assert!(arguments(&allowed).contains(&flag));
    }

    #[test]
    fn the_agent_listens_on_no_port_and_shares_no_network_with_the_node() {
        let spec = build(&config(), "ops", "node1").spec.unwrap();
        assert_eq!(
            (spec.host_network, &spec.containers[0].ports),
            (Some(false), &None)
        );
    }

    #[test]
    fn the_name_follows_from_the_node_and_fits_into_a_label() {
        assert_eq!(name("node1"), name("node1"));
        assert_ne!(name("node1"), name("node2"));
        assert!(name(&"n".repeat(253)).len() <= 63);
    }

    #[test]
    fn the_template_changes_with_the_configuration_and_not_with_the_node() {
        let (old, mut config) = (config(), config());
        config.image = "agent:2".into();
        assert_ne!(template(&old), template(&config));
        let pods = ["a", "b"].map(|node| build(&old, "ops", node));
        assert_eq!(template_of(&pods[0]), template_of(&pods[1]));
    }
}
