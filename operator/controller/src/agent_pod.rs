//! The agent's pod. One for each node, under a name that follows from the node's, so that two controllers make the
//! same one.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    AppArmorProfile, Capabilities, Container, EnvVar, EnvVarSource, HostPathVolumeSource,
    LocalObjectReference, ObjectFieldSelector, Pod, PodSecurityContext, PodSpec, SeccompProfile,
    SecurityContext, Toleration, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use sha2::{Digest, Sha256};

use crate::config::AgentConfig;

/// Label by which agents are found, and its value.
pub const COMPONENT: (&str, &str) = ("app.kubernetes.io/component", "agent");

/// Name of the agent's pod on a node.
pub fn name(node: &str) -> String {
    let hash = Sha256::digest(node.as_bytes());
    let hex: String = hash.iter().take(5).map(|b| format!("{b:02x}")).collect();
    format!("podcheckpoint-agent-{hex}")
}

/// The agent's pod on a node.
pub fn build(config: &AgentConfig, namespace: &str, node: &str) -> Pod {
    let labels = BTreeMap::from(
        [
            ("app.kubernetes.io/name", "podcheckpoint"),
            COMPONENT,
            ("app.kubernetes.io/managed-by", "podcheckpoint-controller"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned())),
    );
    Pod {
        metadata: ObjectMeta {
            name: Some(name(node)),
            namespace: Some(namespace.to_owned()),
            labels: Some(labels),
            ..Default::default()
        },
        spec: Some(spec(config, node)),
        status: None,
    }
}

fn spec(config: &AgentConfig, node: &str) -> PodSpec {
    let everything = Toleration {
        operator: Some("Exists".into()),
        ..Default::default()
    };
    let secrets = config
        .image_pull_secrets
        .iter()
        .map(|name| LocalObjectReference { name: name.clone() });
    PodSpec {
        // Bound here and not by the scheduler: the pod must run where the target does, also on a cordoned node.
        node_name: Some(node.to_owned()),
        service_account_name: Some(config.service_account_name.clone()),
        host_pid: Some(true),
        restart_policy: Some("Always".into()),
        termination_grace_period_seconds: Some(30),
        priority_class_name: Some(config.priority_class_name.clone()).filter(|name| !name.is_empty()),
        tolerations: Some(
            std::iter::once(everything)
                .chain(config.extra_tolerations.clone())
                .collect(),
        ),
        image_pull_secrets: Some(secrets.collect()),
        security_context: Some(PodSecurityContext {
            // A tracer that is itself filtered may not suspend a filter (PTRACE_O_SUSPEND_SECCOMP).
            seccomp_profile: Some(SeccompProfile {
                type_: "Unconfined".into(),
                ..Default::default()
            }),
            app_armor_profile: Some(AppArmorProfile {
                type_: "Unconfined".into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        containers: vec![container(config)],
        volumes: Some(vec![
            host_path("run", "/run", "Directory"),
            host_path("cgroup", "/sys/fs/cgroup", "Directory"),
            host_path("archives", &config.archive_root, "DirectoryOrCreate"),
        ]),
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
            capabilities: Some(Capabilities {
                add: Some(vec!["ALL".into()]),
                drop: None,
            }),
            ..Default::default()
        }),
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
    if !config.runtime_socket.is_empty() {
        arguments.push(format!("--runtime-socket={}", config.runtime_socket));
    }
    if config.kubelet.enabled {
        arguments.push(format!("--kubelet-port={}", config.kubelet.port));
    }
    arguments
}

fn environment(config: &AgentConfig) -> Vec<EnvVar> {
    let field = |name: &str, path: &str| EnvVar {
        name: name.to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                field_path: path.to_owned(),
                api_version: None,
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let value = |name: &str, value: &str| EnvVar {
        name: name.to_owned(),
        value: Some(value.to_owned()),
        ..Default::default()
    };
    let mut environment = vec![
        field("NODE_NAME", "spec.nodeName"),
        field("HOST_IP", "status.hostIP"),
        value("RUST_LOG", &config.log_level),
    ];
    if !config.kubelet.ca_bundle.is_empty() {
        environment.push(value("KUBELET_CA_PEM", &config.kubelet.ca_bundle));
    }
    environment
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
pub(crate) mod tests {
    use super::*;
    use crate::config::KubeletConfig;

    pub(crate) fn config() -> AgentConfig {
        AgentConfig {
            image: "agent:1".into(),
            image_pull_policy: "IfNotPresent".into(),
            image_pull_secrets: vec![],
            service_account_name: "podcheckpoint-agent".into(),
            priority_class_name: String::new(),
            resources: ResourceRequirements::default(),
            archive_root: "/var/lib/podcheckpoint".into(),
            runtime_socket: String::new(),
            kubelet: KubeletConfig {
                enabled: true,
                port: 10250,
                ca_bundle: String::new(),
            },
            idle_timeout_seconds: 60,
            start_timeout_seconds: 60,
            log_level: "info".into(),
            log_format: "json".into(),
            extra_tolerations: vec![],
        }
    }
    use k8s_openapi::api::core::v1::ResourceRequirements;

    #[test]
    fn the_agent_is_unconfined_and_says_so() {
        let security = build(&config(), "ops", "node1")
            .spec
            .unwrap()
            .security_context
            .unwrap();
        assert_eq!(security.seccomp_profile.unwrap().type_, "Unconfined");
    }

    #[test]
    fn the_agent_listens_on_no_port_and_shares_no_network_with_the_node() {
        let spec = build(&config(), "ops", "node1").spec.unwrap();
        assert_eq!((spec.host_network, &spec.containers[0].ports), (None, &None));
    }

    #[test]
    fn the_name_follows_from_the_node_and_fits_into_a_label() {
        assert_eq!(name("node1"), name("node1"));
        assert_ne!(name("node1"), name("node2"));
        assert!(name(&"n".repeat(253)).len() <= 63);
    }
}
