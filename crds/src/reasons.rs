//! Every reason that a condition, a failure, a finding or a skipped method can carry, with its documentation.
//!
//! This is the one source: condition messages take the remedy from here, and `crds/reasons.md` is generated from here.

use std::fmt;

/// What a user needs to know about a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReasonDoc {
    /// What it means.
    pub meaning: &'static str,
    /// What the operator saw when it said so, and how to see it by hand.
    pub evidence: &'static str,
    /// What to do about it. Empty when nothing needs to be done.
    pub remedy: &'static str,
}

macro_rules! reasons {
    ($($section:literal { $($name:ident { $meaning:literal, $evidence:literal, $remedy:literal $(,)? })* })*) => {
        /// A reason in one CamelCase word, as conditions carry it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $($(#[doc = $meaning] $name,)*)*
        }

        impl Reason {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$($(Self::$name,)*)*];

            /// Every reason by section, in the order of the documentation.
            pub const SECTIONS: &'static [(&'static str, &'static [Self])] = &[$(($section, &[$(Self::$name,)*]),)*];

            /// The word as it stands in the API.
            pub fn as_str(self) -> &'static str {
                match self { $($(Self::$name => stringify!($name),)*)* }
            }

            /// Its documentation.
            pub fn doc(self) -> ReasonDoc {
                match self {
                    $($(Self::$name => ReasonDoc { meaning: $meaning, evidence: $evidence, remedy: $remedy },)*)*
                }
            }

            /// The reason that a word names.
            pub fn parse(word: &str) -> Option<Self> {
                match word { $($(stringify!($name) => Some(Self::$name),)*)* _ => None }
            }
        }
    };
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

reasons! {
    "Progress and success" {
        Pending {
            "Nothing has been done yet.",
            "The condition is Unknown: its owner has not come to it.",
            "",
        }
        CheckpointInProgress {
            "The operation is bound to a node and runs.",
            "status.nodeName and status.startTime are set.",
            "Wait: `kubectl wait --for=condition=Ready podcheckpoints.podcheckpoint.dev/NAME`.",
        }
        CheckpointCompleted {
            "The archive is complete, synced to disk and verified.",
            "status.checkpointedContainers has the path, size and SHA-256 of each archive.",
            "",
        }
        CheckpointFailed {
            "The checkpoint failed for good; status.failure has the root cause.",
            "Stalled is True and status.failure is set.",
            "Follow status.failure.remedy, then create another PodCheckpoint: this one will not be tried again.",
        }
        ValidationCompleted {
            "validateOnly was asked for, and nothing was found that would stop a checkpoint.",
            "status.findings has what was looked at.",
            "Create a PodCheckpoint without validateOnly to take the checkpoint.",
        }
        NotFailed {
            "Nothing has failed for good.",
            "Stalled is False.",
            "",
        }
        TargetFound {
            "The pod exists, runs, and its UID is pinned.",
            "status.sourcePodUID and status.nodeName are set.",
            "",
        }
        NotRequested {
            "The specification asks for something that needs no such step.",
            "For example validateOnly: no archive is written.",
            "",
        }
        NotReached {
            "An earlier step failed, so this one was not taken.",
            "status.failure names the step.",
            "",
        }
        NotNeeded {
            "No security setting had to be changed.",
            "status.patches is empty.",
            "",
        }
        ProbeNotRun {
            "ptrace was not proved on this target before the checkpoint.",
            "This version of the agent learns it from the checkpoint itself.",
            "",
        }
        SourceRuns {
            "The pod's processes run: not frozen, not stopped, not traced.",
            "Read from the kernel after the operation: freezer state, State and TracerPid of every process in the container's cgroup.",
            "",
        }
    }
    "The target" {
        PodNotFound {
            "No pod of that name exists in the namespace.",
            "The API server has no such pod.",
            "Check spec.sourcePodName and the namespace: `kubectl get pods -n NAMESPACE`. Then create another PodCheckpoint.",
        }
        PodNotRunning {
            "The pod has not started yet.",
            "Its phase is Pending.",
            "Wait until it runs (`kubectl wait --for=condition=Ready pod/NAME`), then create another PodCheckpoint.",
        }
        PodCompleted {
            "The pod has ended, so there are no processes to checkpoint.",
            "Its phase is Succeeded or Failed.",
            "Choose a running pod.",
        }
        PodTerminating {
            "The pod is being deleted.",
            "It has a deletionTimestamp.",
            "Choose a pod that stays.",
        }
        SourcePodReplaced {
            "Another pod of the same name has taken the place of the one that was meant.",
            "The pod's UID differs from spec.sourcePodUID or from status.sourcePodUID.",
            "Create another PodCheckpoint without sourcePodUID, or with the UID of the new pod.",
        }
        SourcePodGone {
            "The pod went away while it was being checkpointed.",
            "The runtime no longer knows a sandbox with its UID, or its processes have ended.",
            "Choose a pod that stays, and create another PodCheckpoint.",
        }
        ContainerNotFound {
            "The pod has no container of that name.",
            "The name stands in spec.containers but not in the pod.",
            "Use a name that `kubectl get pod NAME -o jsonpath={.spec.containers[*].name}` prints.",
        }
        ContainerNotRegular {
            "An init or ephemeral container was named; only regular containers can be checkpointed.",
            "The name is that of an init or ephemeral container of the pod.",
            "Name regular containers only.",
        }
        ContainerNotRunning {
            "A chosen container does not run.",
            "The pod's status says waiting or terminated, for example CrashLoopBackOff.",
            "See why with `kubectl describe pod NAME`; leave the container out of spec.containers or wait until it runs.",
        }
        PodHostPid {
            "The pod shares the node's process namespace; CRIU cannot dump it without the node's own processes.",
            "The pod has hostPID: true.",
            "Run the pod without hostPID.",
        }
        PodStatic {
            "The pod is a static pod of the kubelet; its API object is only a mirror and its UID is not the one on the node.",
            "The pod has the annotation kubernetes.io/config.mirror.",
            "Run the workload as an ordinary pod.",
        }
        TargetBusy {
            "Another PodCheckpoint is at work on the same pod.",
            "The message names it.",
            "Wait until the other one has finished, then create another PodCheckpoint.",
        }
        PodProtected {
            "The pod belongs to this operator; freezing it would freeze the checkpoint itself.",
            "The pod is in the operator's namespace.",
            "Choose another pod.",
        }
    }
    "The agent" {
        AgentStarting {
            "The agent pod on the node has been launched and has not reported yet.",
            "The agent pod is in the operator's namespace.",
            "",
        }
        AgentImageUnavailable {
            "The node cannot pull the agent's image.",
            "The agent pod waits in ErrImagePull, ImagePullBackOff, InvalidImageName or ErrImageNeverPull.",
            "Correct the chart values agent.image.* or the pull secret (`kubectl describe pod` of the agent has the registry's answer), then create another PodCheckpoint.",
        }
        AgentDenied {
            "The API server refused to create the agent pod.",
            "The message has its words: PodSecurity, a quota or an admission policy.",
            "Allow privileged pods in the operator's namespace: `kubectl label namespace NAMESPACE pod-security.kubernetes.io/enforce=privileged`, or lift the quota or policy that the message names.",
        }
        AgentRejected {
            "The node's kubelet refused the agent pod.",
            "The agent pod failed at admission, for example OutOfcpu, OutOfpods or NodeAffinity.",
            "Make room on the node, or lower the chart values agent.resources.",
        }
        AgentNotStarted {
            "The agent pod did not start within its time.",
            "The message has what the kubelet said of it.",
            "See `kubectl describe pod` of the agent in the operator's namespace.",
        }
        AgentLost {
            "The agent stopped reporting before it had finished.",
            "The deadline has passed, and the agent's pod is gone or silent. The next agent on this node thaws what it may have left frozen.",
            "See `kubectl logs` of the agent in the operator's namespace and the node's state, then create another PodCheckpoint.",
        }
        AgentInterrupted {
            "The agent was killed or restarted in the middle of the operation. It is never repeated by itself, since the pod may have been touched.",
            "The journal on the node has a begun checkpoint without an end.",
            "See `kubectl logs --previous` of the agent for why it died, then create another PodCheckpoint.",
        }
        NodeNotReady {
            "The node of the pod is not ready, so no agent can be started there.",
            "The node's Ready condition is not True; the kubelet may be stopped.",
            "Bring the node back (`kubectl describe node NODE`), then create another PodCheckpoint.",
        }
        NodeGone {
            "The node of the pod does not exist any more.",
            "The API server has no such node.",
            "Choose a pod on a living node. An archive on the lost node's disk is lost with it.",
        }
    }
    "The runtime and the methods" {
        RuntimeNotFound {
            "No container runtime socket was found on the node.",
            "None of the sockets that the agent looked at exists or answers; the message lists them.",
            "Set the chart value agent.runtimeSocket to the node's CRI socket.",
        }
        RuntimeUnavailable {
            "The container runtime did not answer.",
            "The call failed or took too long; the message has the error.",
            "Look at the runtime on the node: `systemctl status containerd` or `crio`.",
        }
        RuntimeTooOld {
            "The container runtime has no checkpoint call.",
            "CheckpointContainer answered Unimplemented, as containerd before 2.0 does.",
            "Update to containerd 2.x, or to CRI-O 1.25 or later with container checkpointing enabled.",
        }
        RuntimeCheckpointDisabled {
            "The container runtime can checkpoint, but that is switched off.",
            "The runtime's answer says so.",
            "containerd: set enable_criu = true in the CRI runtime plugin. CRI-O: set container_level_enabled (older: enable_criu_support = true). Then restart it.",
        }
        OciRuntimeUnsupported {
            "The OCI runtime of the container cannot checkpoint.",
            "Its answer says so, or its handler is one that has no checkpoint through the container runtime (Kata, gVisor).",
            "Run the pod with a RuntimeClass whose handler is runc or crun built with CRIU.",
        }
        CriuMissing {
            "CRIU is not installed on the node, or not where the runtime looks for it.",
            "The runtime's answer says that the criu binary was not found.",
            "Install criu 4.1 or later on the node and restart the container runtime: it remembers that CRIU was missing.",
        }
        CriuKernelMismatch {
            "CRIU on the node is too old for the node's kernel.",
            "CRIU's log has `Unexpected rt vDSO area bounds` or another failure to detect kernel features.",
            "Install criu 4.1 or later on the node; kernels from 6.13 on need it.",
        }
        MethodUnavailable {
            "The method cannot be used on this node or in this version.",
            "The message says what is missing.",
            "Use `method: Auto`, or one of the methods that are not in status.skippedMethods.",
        }
        MethodNotChosen {
            "Another method was preferred or asked for.",
            "status.method has the one that was used.",
            "",
        }
        KubeletDenied {
            "The kubelet refused the agent's token.",
            "It answered 401 or 403.",
            "Enable the kubelet's webhook authentication and authorization, and grant the agent `create` on nodes/checkpoint (chart value agent.kubelet.enabled).",
        }
        KubeletCheckpointUnavailable {
            "The kubelet has no checkpoint endpoint, or does not know the container.",
            "It answered 404 for a pod and a container that exist.",
            "Enable the kubelet's feature gate ContainerCheckpoint (on by default since Kubernetes 1.30).",
        }
        KubeletUntrusted {
            "The kubelet's certificate could not be verified.",
            "It is not signed by the configured authority, or not for the node's address.",
            "Set serverTLSBootstrap on the kubelet and approve its certificate, or give its authority in the chart value agent.kubelet.caBundle.",
        }
        KubeletUnreachable {
            "The kubelet did not answer.",
            "The connection to its port failed; the message has the error.",
            "Check that the agent can reach the node's address on port 10250.",
        }
    }
    "The archive" {
        StorageFull {
            "The archive root has too little free space.",
            "Free space was compared with an estimate from the memory of the containers, or the write failed with ENOSPC.",
            "Free space on the node's disk, or move the archive root with the chart value agent.archiveRoot.",
        }
        StorageNotWritable {
            "The archive root cannot be written.",
            "Creating or syncing a file there failed; the message has the error.",
            "Make the folder of the chart value agent.archiveRoot writable for root on the node.",
        }
        ArchiveIncomplete {
            "The runtime reported success but the archive lacks parts, or cannot be read.",
            "The message names what is missing.",
            "Look at the runtime's log on the node; the partial archive has been deleted.",
        }
        ArchiveIdentityMismatch {
            "The archive is of another container than the one that was asked for.",
            "The identity inside differs from the pod's; the archive has been deleted.",
            "Report this: it must not happen.",
        }
    }
    "The dump" {
        DeadlineExceeded {
            "The operation took longer than spec.timeoutSeconds. The pod has been made to run again.",
            "The message names the step and CRIU's last stage.",
            "Raise timeoutSeconds when the pod has much memory; otherwise look at the stage in the message.",
        }
        DumpFailed {
            "CRIU could not dump the processes, for a cause that is not in this list.",
            "The message has the first error lines of CRIU's log and the stage; status has the path of the whole log.",
            "Read the log on the node at the path in the message.",
        }
        PtraceDenied {
            "CRIU was not allowed to trace a process.",
            "CRIU's log has `Unable to interrupt task` or `Unseizable non-zombie`: another tracer, Yama, an LSM or a missing capability.",
            "Look for another tracer (`grep TracerPid /proc/PID/status`) and for denials in the node's audit log.",
        }
        SeccompSuspendDenied {
            "CRIU could not suspend the seccomp filter of a process.",
            "CRIU's log has `suspending seccomp failed`.",
            "The runtime must run CRIU with CAP_SYS_ADMIN and without a seccomp filter of its own, on a kernel with CONFIG_CHECKPOINT_RESTORE.",
        }
        LsmDenied {
            "AppArmor or SELinux denied what CRIU does inside a process.",
            "CRIU's log has `Unable to connect a transport socket: Permission denied`.",
            "Allow it in the profile, or run the pod with appArmorProfile type Unconfined.",
        }
        TaskUninterruptible {
            "A process waits in the kernel and cannot be stopped.",
            "CRIU's log has `state D` or a timeout while freezing.",
            "Find what it waits for (`cat /proc/PID/stack` on the node), usually a hung network file system; then create another PodCheckpoint.",
        }
        ZombieInTree {
            "A process that has ended is not reaped by its parent.",
            "CRIU's log has `zombie found while seizing`.",
            "Give the container an init that reaps (for example shareProcessNamespace), or mend the parent.",
        }
        ExternalFile {
            "A process has a file open that is on a mount outside its container.",
            "CRIU's log has `Can't lookup mount`, `mnt: ` or `No mapping`.",
            "Close or redirect that file: the log names its descriptor.",
        }
        TtyUnsupported {
            "A process has a terminal whose other end is outside the container.",
            "CRIU's log has `tty: ` and a missing master.",
            "Run the container without tty: true, and end `kubectl exec` and `kubectl attach` sessions.",
        }
        SocketUnsupported {
            "A process has a socket that CRIU cannot save.",
            "CRIU's log names the socket's family or protocol.",
            "Close it before the checkpoint, or leave the container out.",
        }
        TcpEstablished {
            "A process has an open TCP connection.",
            "CRIU's log has `Connected TCP socket`.",
            "Close the connections before the checkpoint, or let the runtime pass tcp-established in /etc/criu/runc.conf (crun.conf for crun) on the node.",
        }
        ExternalUnixSocket {
            "A process is connected to a unix socket whose other end is outside the container.",
            "CRIU's log has `External socket is used`.",
            "Close the connection before the checkpoint, or let the runtime pass ext-unix-sk in /etc/criu/runc.conf on the node.",
        }
        IoUringUnsupported {
            "A process uses io_uring, which CRIU cannot save.",
            "CRIU's log has `anon_inode:[io_uring]`.",
            "Switch io_uring off in the application.",
        }
        DeviceUnsupported {
            "A process has a device open that CRIU cannot save, for example a GPU.",
            "CRIU's log has `Can't dump file` with a device number.",
            "Close the device, or install the CRIU plugin of its vendor on the node.",
        }
        MountUnsupported {
            "A mount of the container cannot be saved.",
            "CRIU's log has `proper root mount` or names a file system.",
            "Remove that volume or mount from the container.",
        }
        SessionLeaderOutside {
            "A process belongs to a session that was begun outside the container's process namespace.",
            "CRIU's log has `A session leader of N is outside of its pid namespace`.",
            "End `kubectl exec` sessions; in a Kata guest use Kata 4.1.0 or later.",
        }
        FileLockUnsupported {
            "A process holds file locks.",
            "CRIU's log has `Some file locks are hold`.",
            "Let the runtime pass file-locks in /etc/criu/runc.conf on the node.",
        }
        KernelFeatureMissing {
            "The kernel lacks something that CRIU needs.",
            "CRIU's log names it, for example a sock_diag module.",
            "Load the module or boot a kernel with CONFIG_CHECKPOINT_RESTORE and the *_DIAG options.",
        }
        CriuCrashed {
            "CRIU ended without an answer.",
            "The runtime's answer has `EOF` on CRIU's socket, or the log ends in the middle.",
            "See the node's kernel log for an out-of-memory kill or a crash of criu.",
        }
        SourceAlreadyPaused {
            "The container was frozen before the checkpoint began, by someone else or by an earlier attempt.",
            "Its freezer says FROZEN, or the runtime says that it is paused.",
            "Find out who froze it; thaw it with `ctr -n k8s.io tasks resume ID` on the node, then create another PodCheckpoint.",
        }
    }
    "The pod afterwards" {
        SourceFrozen {
            "The pod is frozen and could not be thawed.",
            "Its freezer says FROZEN after thawing was tried.",
            "On the node: `ctr -n k8s.io tasks resume ID`, or write 0 to cgroup.freeze (v2) or THAWED to freezer.state (v1) of the container's cgroup.",
        }
        SourceStopped {
            "A process of the pod is stopped by a signal.",
            "Its State is T.",
            "On the node: `kill -CONT PID`, if you did not stop it yourself.",
        }
        SourceTraced {
            "A process of the pod is still traced.",
            "Its TracerPid is not 0; the message has the tracer.",
            "Detach the tracer that the message names.",
        }
        SourceUnknown {
            "The state of the pod after the operation could not be read.",
            "The message says why.",
            "Look at the pod on its node.",
        }
    }
}

/// The documentation page of all reasons, in Markdown.
pub fn markdown() -> String {
    let mut page = String::from(
        "<!-- Generated by `cargo run -p podcheckpoint-crds --bin crdgen`; the source is crds/src/reasons.rs. -->\n\
         # Reasons\n\n\
         Every word that `status.reason`, a condition, a finding, a failure or a skipped method can carry.\n",
    );
    for (section, reasons) in Reason::SECTIONS {
        page.push_str(&format!("\n## {section}\n"));
        for reason in *reasons {
            let ReasonDoc {
                meaning,
                evidence,
                remedy,
            } = reason.doc();
            page.push_str(&format!(
                "\n### {reason}\n\n{meaning}\n\n*Evidence:* {evidence}\n"
            ));
            if !remedy.is_empty() {
                page.push_str(&format!("\n*Remedy:* {remedy}\n"));
            }
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_found_again_by_its_word() {
        for reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.as_str()), Some(*reason));
        }
    }

    #[test]
    fn every_reason_says_what_it_means_and_what_was_seen() {
        for reason in Reason::ALL {
            let doc = reason.doc();
            assert!(
                doc.meaning.ends_with('.') && doc.evidence.ends_with('.'),
                "{reason}"
            );
        }
    }

    #[test]
    fn no_two_reasons_share_a_meaning() {
        let meanings: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|r| r.doc().meaning).collect();
        assert_eq!(meanings.len(), Reason::ALL.len());
    }
}
