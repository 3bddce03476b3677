//! The controller's configuration file, as the chart writes it.

use k8s_openapi::api::core::v1::{ResourceRequirements, Toleration};
use serde::Deserialize;

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// How agents are launched.
    pub agent: AgentConfig,
}

/// How agents are launched.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AgentConfig {
    /// Image.
    pub image: String,
    /// Pull policy.
    pub image_pull_policy: String,
    /// Names of pull secrets in the operator's namespace.
    #[serde(default)]
    pub image_pull_secrets: Vec<String>,
    /// ServiceAccount in the operator's namespace.
    pub service_account_name: String,
    /// Priority class; empty is none.
    #[serde(default)]
    pub priority_class_name: String,
    /// Requests and limits.
    #[serde(default)]
    pub resources: ResourceRequirements,
    /// Folder of all archives on each node.
    pub archive_root: String,
    /// CRI socket on each node; empty lets the agent find it.
    #[serde(default)]
    pub runtime_socket: String,
    /// Whether and how the agent asks the kubelet.
    pub kubelet: KubeletConfig,
    /// Seconds that an agent stays after the last operation of its node; 0: none, negative: for ever.
    pub idle_timeout_seconds: i64,
    /// Seconds that an agent may take to start.
    pub start_timeout_seconds: i64,
    /// Log filter.
    pub log_level: String,
    /// json or text.
    pub log_format: String,
    /// Further tolerations; agents tolerate everything already.
    #[serde(default)]
    pub extra_tolerations: Vec<Toleration>,
}

/// Whether and how the agent asks the kubelet.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KubeletConfig {
    /// Whether the method Kubelet may be used.
    pub enabled: bool,
    /// Port of the kubelet.
    pub port: u16,
    /// Authority of its certificate, PEM; empty is the cluster's.
    #[serde(default)]
    pub ca_bundle: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_key_is_refused() {
        let error = serde_saphyr::from_str::<Config>("agent: {imag: x}").unwrap_err();
        assert!(error.to_string().contains("imag"), "{error}");
    }
}
