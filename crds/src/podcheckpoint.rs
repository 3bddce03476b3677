//! `PodCheckpoint`, version v1alpha1. The `///` texts on fields are what `kubectl explain` shows.

#![allow(
    clippy::duplicated_attributes,
    reason = "printcolumn repeats priority and type_"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Seconds a checkpoint may take when the user does not say.
pub const DEFAULT_TIMEOUT_SECONDS: i32 = 300;

/// What to checkpoint and how. The specification cannot be changed after creation: a checkpoint is one act, so another
/// one is another object.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[kube(
    group = "podcheckpoint.dev",
    version = "v1alpha1",
    kind = "PodCheckpoint",
    plural = "podcheckpoints",
    namespaced,
    doc = "PodCheckpoint takes a checkpoint of the processes of one running pod, or says why that is not possible. The pod goes on running.",
    status = "PodCheckpointStatus",
    derive = "PartialEq",
    derive = "Default",
    shortname = "pckpt",
    category = "checkpointing",
    selectable = ".status.nodeName",
    selectable = ".spec.sourcePodName",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        description = "True: the checkpoint is complete and verified"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.reason",
        description = "Where it stands; the root cause when it failed"
    ),
    printcolumn(
        name = "Pod",
        type_ = "string",
        json_path = ".spec.sourcePodName",
        description = "The pod to checkpoint"
    ),
    printcolumn(
        name = "Node",
        type_ = "string",
        json_path = ".status.nodeName",
        description = "The node that holds the pod and the archive"
    ),
    printcolumn(
        name = "Size",
        type_ = "string",
        json_path = ".status.size",
        description = "Size of all archives"
    ),
    printcolumn(
        name = "Frozen",
        type_ = "string",
        json_path = ".status.frozen",
        description = "How long the pod stood still"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "UID",
        type_ = "string",
        json_path = ".status.sourcePodUID",
        priority = "1",
        description = "UID of the pod"
    ),
    printcolumn(
        name = "Path",
        type_ = "string",
        json_path = ".status.checkpointLocation.nodeLocal.path",
        priority = "1",
        description = "Folder of the archives, below the agent's archive root on the node"
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = "1",
        description = "What to do next"
    )
)]
#[x_kube(validation = kube::core::Rule::new("self == oldSelf").message("spec is immutable: create another PodCheckpoint instead"))]
#[serde(rename_all = "camelCase")]
pub struct PodCheckpointSpec {
    /// Name of the pod to checkpoint. It must run in the namespace of this object.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
    )]
    pub source_pod_name: String,

    /// UID that the pod must have. A pod of the same name with another UID is refused with SourcePodReplaced. When
    /// absent, the UID that the pod has when the object is first seen is pinned in status.sourcePodUID.
    #[serde(rename = "sourcePodUID", default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 64),
        regex(pattern = r"^[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?$")
    )]
    pub source_pod_uid: Option<String>,

    /// Names of the containers to checkpoint. When absent: all running regular containers. Init and ephemeral
    /// containers cannot be checkpointed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 64),
        inner(
            length(min = 1, max = 63),
            regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
        )
    )]
    #[x_kube(merge_strategy = kube::core::ListMerge::Set)]
    pub containers: Option<Vec<String>>,

    /// Seconds that the checkpoint may take, from the end of the proof that it can be taken to the verified archive. When
    /// they are over, the pod is made to run again and the checkpoint fails with DeadlineExceeded. The agent's start and
    /// the proof come before, and have limits of their own.
    #[serde(default = "default_timeout_seconds")]
    #[schemars(range(min = 1, max = 3600))]
    pub timeout_seconds: i32,

    /// How the checkpoint is taken. Auto chooses by what the node offers and records in status.skippedMethods why the
    /// others were not used. CRI, Kubelet and Direct let CRIU dump processes on the node's own kernel: through the
    /// container runtime, the kubelet, or the runtime's task service, which freezes all containers first. Guest lets the
    /// CRIU of a virtual machine dump the processes of a pod in it, VMSnapshot saves that machine as a whole. GVisor lets
    /// gVisor's kernel save itself with every container of the pod (runsc checkpoint); it is the only one for pods on that
    /// kernel.
    #[serde(default)]
    pub method: Method,

    /// Only find out whether this pod could be checkpointed, and if not, why. Nothing is frozen and no archive is written.
    #[serde(default)]
    pub validate_only: bool,

    /// Take the checkpoint although the probe found that it may fail or that the restored process may miss something;
    /// status.findings says what. What would fail or hang for certain is never attempted.
    #[serde(default)]
    pub allow_degraded: bool,

    /// Whether security settings of the node that stand in the way may be changed. Never: they are reported. Plan: the
    /// changes are listed in status.patches and not made. Temporary: they are made, used and reverted.
    #[serde(default)]
    pub security_patches: SecurityPatches,

    /// What happens to the archive on the node when this object is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,

    /// Delete this object so many seconds after it has finished; deletionPolicy says what happens to the archive.
    /// When absent it is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<i32>,
}

fn default_timeout_seconds() -> i32 {
    DEFAULT_TIMEOUT_SECONDS
}

/// A way to take the checkpoint.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize, JsonSchema,
)]
pub enum Method {
    /// Choose by what the node offers.
    #[default]
    Auto,
    /// CheckpointContainer of the container runtime (CRI), one container after the other.
    #[serde(rename = "CRI")]
    Cri,
    /// The checkpoint endpoint of the kubelet.
    Kubelet,
    /// The runtime's task service: all containers are frozen first, so that they are one consistent cut.
    Direct,
    /// CRIU inside the virtual machine of the pod, through the debug console, one container after the other. The guest's
    /// image must have it.
    Guest,
    /// A snapshot of the whole virtual machine of the sandbox.
    #[serde(rename = "VMSnapshot")]
    VmSnapshot,
    /// gVisor's own checkpoint (runsc checkpoint), of the whole sandbox with every container in it. Only for pods on
    /// gVisor's kernel, and their only one.
    #[serde(rename = "GVisor")]
    Gvisor,
}

impl Method {
    /// The name as it stands in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "Auto",
            Self::Cri => "CRI",
            Self::Kubelet => "Kubelet",
            Self::Direct => "Direct",
            Self::Guest => "Guest",
            Self::VmSnapshot => "VMSnapshot",
            Self::Gvisor => "GVisor",
        }
    }
}

/// Whether security settings of the node may be changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum SecurityPatches {
    /// Report what stands in the way, change nothing.
    #[default]
    Never,
    /// List the changes that would be made, change nothing.
    Plan,
    /// Change, checkpoint, revert.
    Temporary,
}

/// What happens to the archive when the object is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum DeletionPolicy {
    /// The archive is deleted with the object.
    #[default]
    Delete,
    /// The archive stays on the node.
    Retain,
}

/// What was found and done. The controller writes the binding, `reason` and the summary conditions; the agent on the
/// node writes everything else.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodCheckpointStatus {
    /// Generation of the specification that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Node on which the pod runs and on which the archive lies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// UID of the pod that is checkpointed; pinned at first sight.
    #[serde(rename = "sourcePodUID", default, skip_serializing_if = "Option::is_none")]
    pub source_pod_uid: Option<String>,
    /// Containers that are checkpointed: those of spec.containers, or every regular one that ran at first sight.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Atomic)]
    pub source_containers: Vec<String>,
    /// When the operation was bound to its node. The deadline counts from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it ended, well or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// One word for `kubectl get`: the reason of Ready, or the root cause when the checkpoint failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Size of all archives together, for people: "281.5 KiB".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// How long the pod stood still, for people: "41 ms".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<String>,
    /// Where the archives are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_location: Option<CheckpointLocation>,
    /// Whether there is something of this operation on the node's disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archive_state: Option<ArchiveState>,
    /// How the checkpoint was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,
    /// Whether all containers are one cut in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
    /// The archive of each container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Map(vec!["name".into()]))]
    pub checkpointed_containers: Vec<CheckpointedContainer>,
    /// What the node runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<RuntimeFacts>,
    /// What was looked at before the checkpoint, and what was found.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Atomic)]
    pub findings: Vec<Finding>,
    /// Security settings that were changed or would have to be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Atomic)]
    pub patches: Vec<Patch>,
    /// Methods that were not used, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Atomic)]
    pub skipped_methods: Vec<SkippedMethod>,
    /// Why it failed; absent unless it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// The conditions, one writer each. `kubectl wait --for=condition=Ready` returns when the archive is verified,
    /// `--for=condition=Stalled` when it has failed for good.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = kube::core::ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Where archives are.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointLocation {
    /// Kind of place.
    pub r#type: LocationType,
    /// Place on the node, when type is NodeLocal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_local: Option<NodeLocal>,
}

/// Whether there is something of an operation on the node's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ArchiveState {
    /// The agent has begun: the pod may be frozen, and there may be partial files.
    Writing,
    /// The archive is complete and verified.
    Present,
    /// Nothing was kept.
    #[serde(rename = "None")]
    Nothing,
    /// The archive has been deleted.
    Deleted,
}

/// Kind of place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum LocationType {
    /// On a disk of the node.
    #[default]
    NodeLocal,
}

/// A place on the node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeLocal {
    /// Folder relative to the agent's archive root (chart value agent.archiveRoot, /var/lib/podcheckpoint by default).
    pub path: String,
}

/// Whether containers that were checkpointed together are one cut in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Consistency {
    /// All containers stood still at one moment, or there is only one.
    Pod,
    /// One container after the other: what they said to each other in between may be missing or doubled.
    PerContainer,
}

/// The archive of one container.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointedContainer {
    /// Name of the container in the pod.
    pub name: String,
    /// The runtime's identifier of the container.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// File name below checkpointLocation.
    pub path: String,
    /// Size in bytes.
    pub size_bytes: i64,
    /// SHA-256 of the archive, in hexadecimal.
    pub sha256: String,
    /// How the archive is laid out.
    pub format: ArchiveFormat,
    /// Microseconds that the processes stood still, as CRIU measured it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_micros: Option<i64>,
    /// Microseconds until all processes stood still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freezing_micros: Option<i64>,
    /// Microseconds that reading the memory took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memdump_micros: Option<i64>,
    /// Microseconds that writing the memory took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memwrite_micros: Option<i64>,
    /// Memory pages written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages_written: Option<i64>,
}

/// How an archive is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ArchiveFormat {
    /// Tar with CRIU's images in checkpoint/, config.dump, spec.dump and the changed files of the root filesystem: the
    /// layout that checkpointctl, CRI-O and containerd know.
    #[default]
    ContainerCheckpoint,
    /// The same layout as a folder, written once, straight to its place. Its sha256 is that of its file SHA256SUMS,
    /// which lists every other file.
    Directory,
    /// A folder with the state of the whole virtual machine, with every container in it, and manifest.json, which says
    /// how it is restored. Its sha256 is that of its file SHA256SUMS.
    VirtualMachine,
    /// A folder with the state that gVisor's kernel wrote, with every container in it, the containers' specifications
    /// and manifest.json, which says how it is restored. Its sha256 is that of its file SHA256SUMS.
    #[serde(rename = "GVisor")]
    Gvisor,
}

/// What the node runs.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuntimeFacts {
    /// Container runtime, for example containerd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Runtime handler of the pod (its RuntimeClass's handler; empty is the default one).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handler: Option<String>,
    /// OCI runtime or shim below it, for example io.containerd.runc.v2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oci_runtime: Option<String>,
    /// Version of CRIU on the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criu_version: Option<String>,
    /// Kernel release of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// cgroup version by which the containers are frozen: 1 or 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup_version: Option<i32>,
    /// Kernel release inside the sandbox, when it is a virtual machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_kernel: Option<String>,
    /// What the pod's processes really run in, as it was recognised on the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<SandboxFacts>,
}

/// What the pod's processes run in.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SandboxFacts {
    /// Kind of sandbox.
    pub kind: SandboxKind,
    /// The runtime that made it, for example runc, crun, runsc or Kata.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<String>,
    /// Virtual machine monitor, when it is a virtual machine: QEMU, CloudHypervisor, Firecracker, Dragonball or
    /// StratoVirt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<String>,
    /// Process of the virtual machine monitor on the node. The pod's own processes are inside and have no number there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_pid: Option<i32>,
    /// How the guest's memory is kept from the node, for example tdx or sev-snp; no snapshot can be taken then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confidential: Option<String>,
    /// What was seen that says so.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evidence: Vec<String>,
}

/// Kind of sandbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum SandboxKind {
    /// Namespaces and cgroups on the node's kernel: the pod's processes are processes of the node.
    Container,
    /// A virtual machine that the runtime made for the pod.
    Kata,
    /// gVisor: a kernel in user space.
    #[serde(rename = "GVisor")]
    Gvisor,
    /// A virtual machine that runs as a process of an ordinary pod, where the chart's value agent.machinesInPods allows it.
    VirtualMachine,
    /// None of these.
    #[default]
    Unknown,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// What was looked at.
    pub check: String,
    /// What came of it.
    pub outcome: Outcome,
    /// Reason, unless it passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What was seen.
    pub evidence: String,
    /// What to do, unless it passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// What came of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Outcome {
    /// Good.
    Pass,
    /// A checkpoint cannot work.
    Fail,
    /// A checkpoint may work.
    Degraded,
    /// It could not be looked at.
    Unknown,
}

/// One security setting that was changed, or would have to be.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Patch {
    /// Kind of setting, as the administrator allows or forbids it.
    pub kind: PatchKind,
    /// The setting.
    pub setting: String,
    /// What the change affects besides the target: container, pod, profile or node.
    pub scope: String,
    /// Value before.
    pub before: String,
    /// Value for the time of the checkpoint.
    pub after: String,
    /// What the change exposes while it lasts.
    pub exposes: String,
    /// Seconds that it lasts at most: until the checkpoint's deadline. 0: for as long as the object exists.
    pub at_most_seconds: i32,
    /// When it was changed; absent for a plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied_time: Option<Time>,
    /// When this checkpoint was done with it; outcome says what became of it then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reverted_time: Option<Time>,
    /// What became of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<PatchOutcome>,
}

/// What became of a changed setting. Absent beside revertedTime: an agent put it back, unless somebody else had changed it
/// since, and ended before it could say which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum PatchOutcome {
    /// It is what it was before.
    Restored,
    /// Other checkpoints need it still, and the last of them puts it back.
    Shared,
    /// Somebody else has changed it meanwhile, or uses it: it was left.
    ChangedByOthers,
}

/// Kind of a security setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
pub enum PatchKind {
    /// The AppArmor profile of the pod is put into complain mode: what it denies is allowed and logged.
    AppArmor,
    /// A cgroup that somebody froze is thawed, and frozen again afterwards.
    Freezer,
    /// A module that the kernel lacks is loaded, and unloaded afterwards if nothing uses it.
    KernelModule,
    /// A seccomp profile without a listener is written for the pod's next start, and kept for as long as the object exists.
    Seccomp,
    /// SELinux' boolean deny_ptrace is turned off.
    #[serde(rename = "SELinux")]
    Selinux,
    /// kernel.yama.ptrace_scope is lowered to 0.
    Yama,
}

impl PatchKind {
    /// All kinds.
    pub const ALL: [Self; 6] = [
        Self::AppArmor,
        Self::Freezer,
        Self::KernelModule,
        Self::Seccomp,
        Self::Selinux,
        Self::Yama,
    ];

    /// The name as it stands in the API and in the chart's values.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AppArmor => "AppArmor",
            Self::Freezer => "Freezer",
            Self::KernelModule => "KernelModule",
            Self::Seccomp => "Seccomp",
            Self::Selinux => "SELinux",
            Self::Yama => "Yama",
        }
    }
}

impl std::str::FromStr for PatchKind {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let known = Self::ALL.map(Self::as_str).join(", ");
        let found = Self::ALL.into_iter().find(|kind| kind.as_str() == word);
        found.ok_or_else(|| format!("{word} is none of {known}"))
    }
}

impl Patch {
    /// It has been made and not been put back, and has to be.
    pub fn is_open(&self) -> bool {
        self.is_made() && self.kind != PatchKind::Seccomp
    }

    /// It is a profile for the pod's next start, which stays for as long as its object.
    pub fn is_kept(&self) -> bool {
        self.is_made() && self.kind == PatchKind::Seccomp
    }

    fn is_made(&self) -> bool {
        self.applied_time.is_some() && self.reverted_time.is_none()
    }
}

/// A method that was not used.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SkippedMethod {
    /// The method.
    pub method: Method,
    /// Why, in one word.
    pub reason: String,
    /// Why, in a sentence.
    pub message: String,
}

/// Why a checkpoint failed.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// Step at which it failed.
    pub step: Step,
    /// Root cause, in one word.
    pub reason: String,
    /// Root cause, in a sentence, with what was seen.
    pub message: String,
    /// What to do.
    pub remedy: String,
    /// CRIU's whole log, on the node. It is kept when the dump failed, until this object is deleted; the log of a dump
    /// that succeeded is in the archive, as dump.log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<String>,
}

/// A step of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Step {
    /// Finding the pod and its node.
    ResolveTarget,
    /// Starting the agent on the node.
    StartAgent,
    /// Finding the containers, the runtime and the methods on the node.
    Inspect,
    /// Proving that ptrace works.
    ValidatePtrace,
    /// Changing security settings.
    PrepareSecurity,
    /// Freezing the containers.
    Freeze,
    /// Writing the memory.
    Dump,
    /// Checking and storing the archive.
    Archive,
    /// Making the pod run again.
    Resume,
}

impl PodCheckpoint {
    /// The condition of one type, if it has been set.
    pub fn condition(&self, r#type: crate::ConditionType) -> Option<&Condition> {
        self.status
            .as_ref()?
            .conditions
            .iter()
            .find(|c| c.type_ == r#type.as_str())
    }

    /// Whether a setting of the node is still changed for this object, as far as its status says.
    pub fn has_open_patches(&self) -> bool {
        self.patches().iter().any(Patch::is_open)
    }

    /// Whether a profile for the pod's next start lies on the node for as long as this object exists.
    pub fn keeps_a_profile(&self) -> bool {
        self.patches().iter().any(Patch::is_kept)
    }

    fn patches(&self) -> &[Patch] {
        self.status.as_ref().map_or(&[][..], |status| &status.patches)
    }

    /// Whether the object has finished: Ready or Stalled is True. Nothing may change the outcome afterwards.
    pub fn is_terminal(&self) -> bool {
        let is_true = |t| self.condition(t).is_some_and(|c| c.status == "True");
        is_true(crate::ConditionType::Ready) || is_true(crate::ConditionType::Stalled)
    }
}
