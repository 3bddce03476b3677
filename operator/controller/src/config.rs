//! The controller's configuration file, as the chart writes it.

use k8s_openapi::api::core::v1::{ResourceRequirements, Toleration};
use podcheckpoint_crds::PatchKind;
use serde::Deserialize;

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Config {
    /// How agents are launched.
    pub(crate) agent: AgentConfig,
}

/// How agents are launched. Only the image has no default.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct AgentConfig {
    /// Image.
    pub(crate) image: String,
    /// Pull policy.
    #[serde(default = "default_pull_policy")]
    pub(crate) image_pull_policy: String,
    /// Names of pull secrets in the operator's namespace.
    #[serde(default)]
    pub(crate) image_pull_secrets: Vec<String>,
    /// ServiceAccount in the operator's namespace.
    #[serde(default = "default_service_account")]
    pub(crate) service_account_name: String,
    /// Priority class; empty is none.
    #[serde(default)]
    pub(crate) priority_class_name: String,
    /// Requests and limits.
    #[serde(default)]
    pub(crate) resources: ResourceRequirements,
    /// Folder of all archives on each node.
    #[serde(default = "default_archive_root")]
    pub(crate) archive_root: String,
    /// CRI socket on each node; empty lets the agent find it.
    #[serde(default)]
    pub(crate) runtime_socket: String,
    /// Whether and how the agent asks the kubelet.
    #[serde(default)]
    pub(crate) kubelet: KubeletConfig,
    /// Seconds that an agent stays after the last operation of its node; 0: none, negative: for ever.
    #[serde(default = "default_idle_timeout")]
    pub(crate) idle_timeout_seconds: i64,
    /// Seconds that an agent may take to start.
    #[serde(default = "default_start_timeout")]
    pub(crate) start_timeout_seconds: i64,
    /// Kinds of security settings that agents may change for the time of a checkpoint.
    #[serde(default)]
    pub(crate) allowed_patches: Vec<PatchKind>,
    /// Whether a virtual machine in an ordinary pod is taken for the pod.
    #[serde(default)]
    pub(crate) machines_in_pods: bool,
    /// Log filter.
    #[serde(default = "default_log_level")]
    pub(crate) log_level: String,
    /// json or text.
    #[serde(default = "default_log_format")]
    pub(crate) log_format: String,
    /// Further tolerations; agents tolerate everything already.
    #[serde(default)]
    pub(crate) extra_tolerations: Vec<Toleration>,
}

/// Whether and how the agent asks the kubelet.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct KubeletConfig {
    /// Whether the method Kubelet may be used.
    pub(crate) enabled: bool,
    /// Port of the kubelet.
    pub(crate) port: u16,
    /// Authority of its certificate, PEM; empty is the cluster's.
    pub(crate) ca_bundle: String,
}

impl Default for KubeletConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            port: 10250,
            ca_bundle: String::new(),
        }
    }
}

fn default_pull_policy() -> String {
    "IfNotPresent".into()
}

fn default_service_account() -> String {
    "podcheckpoint-agent".into()
}

fn default_archive_root() -> String {
    "/var/lib/podcheckpoint".into()
}

fn default_idle_timeout() -> i64 {
    300
}

fn default_start_timeout() -> i64 {
    60
}

fn default_log_level() -> String {
    "info".into()
}

fn default_log_format() -> String {
    "json".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_key_is_refused() {
        let error = serde_saphyr::from_str::<Config>("agent: {imag: x}").unwrap_err();
        assert!(error.to_string().contains("imag"), "{error}");
    }

    #[test]
    fn an_image_is_enough() {
        let config: Config = serde_saphyr::from_str("agent: {image: 'agent:1'}").unwrap();
        assert_eq!(config.agent.start_timeout_seconds, 60);
        assert!(config.agent.kubelet.enabled);
    }

    #[test]
    fn resources_and_tolerations_are_those_of_kubernetes() {
        let text = "
agent:
  image: agent:1
  resources: {requests: {cpu: 10m, memory: 16Mi}}
  extraTolerations: [{key: gpu, operator: Exists}]
";
        let config: Config = serde_saphyr::from_str(text).unwrap();
        assert_eq!(config.agent.resources.requests.unwrap()["cpu"].0, "10m");
    }
}
