//! `CheckpointNode`, version v1alpha1: what a node can checkpoint. The `///` texts on fields are what
//! `kubectl explain` shows.

#![allow(
    clippy::duplicated_attributes,
    reason = "printcolumn repeats priority and type_"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Finding, Method, Patch, SkippedMethod};

/// Nothing: the report is in the status.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[kube(
    group = "podcheckpoint.dev",
    version = "v1alpha1",
    kind = "CheckpointNode",
    plural = "checkpointnodes",
    doc = "CheckpointNode says what the node of its name can checkpoint. The agent on the node writes it whenever it starts and whenever something has changed; it goes with the node.",
    status = "CheckpointNodeStatus",
    derive = "PartialEq",
    derive = "Default",
    shortname = "ckn",
    category = "checkpointing",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        description = "True: ptrace and CRIU work on the node"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        description = "The root cause when it is not"
    ),
    printcolumn(
        name = "Runtime",
        type_ = "string",
        json_path = ".status.runtime",
        description = "Container runtime and its version"
    ),
    printcolumn(
        name = "CRIU",
        type_ = "string",
        json_path = ".status.criuVersion",
        description = "Version of CRIU"
    ),
    printcolumn(
        name = "Handlers",
        type_ = "string",
        json_path = ".status.summary",
        description = "Methods by runtime handler"
    ),
    printcolumn(
        name = "Patched",
        type_ = "string",
        json_path = ".status.patches[*].setting",
        description = "Security settings that are changed for a checkpoint right now"
    ),
    printcolumn(
        name = "Checked",
        type_ = "date",
        json_path = ".status.checkedTime",
        description = "When the node was looked at"
    ),
    printcolumn(
        name = "Kernel",
        type_ = "string",
        json_path = ".status.kernel",
        priority = "1",
        description = "Kernel release"
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = "1",
        description = "What was seen"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointNodeSpec {}

/// What the agent on the node found out.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointNodeStatus {
    /// When the node was looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checked_time: Option<Time>,
    /// Kernel release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Container runtime and its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<String>,
    /// Version of CRIU, as the container runtime finds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criu_version: Option<String>,
    /// Active security modules of the kernel.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Atomic)]
    pub security_modules: Vec<String>,
    /// kernel.yama.ptrace_scope, where Yama is active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub yama_ptrace_scope: Option<i32>,
    /// What CRIU needs of the kernel and does not find.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Atomic)]
    pub missing_features: Vec<String>,
    /// The runtime handlers, as a RuntimeClass names them. The one without a name is the default.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Atomic)]
    pub handlers: Vec<HandlerCapability>,
    /// The methods of every handler in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Security settings that are changed for a checkpoint right now, and will be put back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Atomic)]
    pub patches: Vec<Patch>,
    /// Files of the journal of changed settings that cannot be read; what they say cannot be put back by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Atomic)]
    pub unreadable_journal: Vec<String>,
    /// What was looked at, and what was found.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Atomic)]
    pub findings: Vec<Finding>,
    /// Ready: ptrace and CRIU work on the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// What can be done with the pods of one runtime handler.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HandlerCapability {
    /// The handler; empty is the default one.
    pub name: String,
    /// Its shim, for example io.containerd.runc.v2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_type: Option<String>,
    /// The methods that can be used, in the order in which Auto prefers them.
    pub methods: Vec<Method>,
    /// The others, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped_methods: Vec<SkippedMethod>,
}
