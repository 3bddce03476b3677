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
    /// How to see it by hand: commands. Empty when the evidence says it already.
    pub confirm: &'static str,
    /// What to do about it. Empty when nothing needs to be done.
    pub remedy: &'static str,
    /// What else the remedy affects. Empty when that is nothing but the target.
    pub affects: &'static str,
}

macro_rules! reasons {
    (@or) => { "" };
    (@or $text:literal) => { $text };
    ($($section:literal { $($name:ident {
        $meaning:literal, $evidence:literal, $remedy:literal $(,)?
        $(confirm: $confirm:literal, affects: $affects:literal $(,)?)?
    })* })*) => {
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
                    $($(Self::$name => ReasonDoc {
                        meaning: $meaning,
                        evidence: $evidence,
                        confirm: reasons!(@or $($confirm)?),
                        remedy: $remedy,
                        affects: reasons!(@or $($affects)?),
                    },)*)*
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
        SourceRuns {
            "The pod's processes run: not frozen, not stopped, not traced.",
            "Read from the kernel after the operation: freezer state, State and TracerPid of every process in the container's cgroup.",
            "",
        }
    }
    "Security settings" {
        PatchNotRequested {
            "A setting that stands in the way could be changed for the time of the checkpoint, but spec.securityPatches is Never.",
            "status.patches lists what would be changed.",
            "Change the setting yourself as status.failure.remedy says, or create another PodCheckpoint with securityPatches: Temporary.",
        }
        PatchPlanned {
            "A setting would have to be changed for the time of the checkpoint; only a plan was asked for.",
            "status.patches lists what would be changed, from what to what, and what that exposes.",
            "Create another PodCheckpoint with securityPatches: Temporary to have it changed, used and put back.",
        }
        PatchForbidden {
            "A setting would have to be changed, and the administrator does not allow that kind of change.",
            "The message names the kind; the chart's value securityPatches.allowed does not list it.",
            "Ask the administrator to add the kind to the chart's value securityPatches.allowed, or to change the setting by hand.",
        }
        Patched {
            "The settings that stood in the way are changed, and ptrace was proved to work with that.",
            "status.patches has each setting, its value before and after, and when it was changed and put back.",
            "",
        }
        ProfileForNextStart {
            "What stands in the way is a filter that a running process cannot lose. A seccomp profile without it is on the node for the pod's next start, and stays for as long as this PodCheckpoint exists.",
            "status.patches names the profile and the system calls that it allows; the message has the part of the manifest that uses it.",
            "Start the pod again on the same node with the part of the manifest that the message has, and create another PodCheckpoint.",
        }
        PatchIneffective {
            "The setting was changed and ptrace still did not work, so it was put back at once.",
            "PtraceValidated has the cause that remained.",
            "Follow status.failure.remedy.",
        }
        PatchFailed {
            "A setting could not be changed.",
            "The message has the error. Nothing is changed before the journal on the node is on disk.",
            "Make room on the node's disk if the journal could not be written; otherwise change the setting by hand.",
        }
        NotFixable {
            "Nothing that can be changed on a running node removes the cause.",
            "PtraceValidated has the cause.",
            "Follow status.failure.remedy.",
        }
        PatchesReverted {
            "Every setting that was changed is back to what it was.",
            "Each was read again after it was put back; status.patches has the times.",
            "",
        }
        PatchShared {
            "Another checkpoint still needs the same change, and will put it back.",
            "The journal on the node names the other one.",
            "Nothing needs to be done: the last one puts it back.",
        }
        ChangedByOthers {
            "Somebody else gave the setting another value meanwhile; theirs was left.",
            "The message has the value before, ours and theirs.",
            "Decide which value is right, and set it by hand.",
        }
        RevertFailed {
            "A setting could not be put back yet.",
            "The message has the error; the journal on the node keeps the value, and the agent on the node tries again every half minute.",
            "Put it back by hand to the value that the message names if it is urgent.",
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
            "The pod's UID differs from spec.sourcePodUID or from status.sourcePodUID, or the pod with that UID has another name.",
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
            "Another PodCheckpoint is at work on the same pod, or the runtime still writes an earlier one that was called off.",
            "The message says which of both. While containerd writes, it has a folder ctrd-checkpoint among its files of the container.",
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
            "Run the pod with a RuntimeClass whose handler is runc, or crun built with CRIU on a node that has its library (package libcriu2).",
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
    "ptrace" {
        PtraceWorks {
            "Everything that CRIU does through ptrace works on this target.",
            "Every thread of every process was seized, stopped, looked at as CRIU does it, let go, and runs untraced again; the finding has the counts.",
            "",
        }
        ProbeIncomplete {
            "The probe could not look at everything, so it gives no verdict.",
            "The finding names what could not be looked at.",
            "Run it by hand on the node: `podcheckpoint-probe --pid PID`.",
        }
        ProbeStalled {
            "The probe itself did not answer in time, so it gives no verdict. It has been ended, and nothing is left traced.",
            "The finding names the last step that it announced.",
            "Run it by hand on the node: `podcheckpoint-probe --pid PID --json`.",
        }
        GuestUnhealthy {
            "The machine cannot do what needs no ptrace at all: sleep, fork and wait, or stop a child. Nothing said about ptrace there would mean anything.",
            "One of the controls did not end, or ended wrongly.",
            "Look at the machine itself: its clock source, its load, its console. In a micro-VM guest: give it a working clock source and at least one whole CPU.",
            confirm: "`time sleep 1; sh -c 'exit 7'; echo $?`",
            affects: "The whole guest.",
        }
        SeccompNotifyUnanswered {
            "The tracer sleeps in the kernel, since a seccomp filter asks a listener whether it may call ptrace, and the listener does not answer. strace and CRIU hang there without a word.",
            "The tracer is in state S in seccomp_do_user_notification, in the system call ptrace, and the target's TracerPid is 0. Processes that hold a seccomp listener are named.",
            "Restart or mend the process that holds the listener. Closing the listener turns the hang into ENOSYS. A filter cannot be taken off a running process: start the tracer's pod again with `securityContext: {seccompProfile: {type: Unconfined}}`.",
            confirm: "`cat /proc/TRACER/wchan; ls -l /proc/*/fd 2>/dev/null | grep 'seccomp notify'`",
            affects: "The tracer's own pod, and whoever else the listener serves.",
        }
        SeccompKillsTracer {
            "A seccomp filter kills the tracer when it calls ptrace.",
            "The probe's child died by SIGSYS in its first call, of a process that cannot exist.",
            "Run the tracer without that filter: `securityContext: {seccompProfile: {type: Unconfined}}`. A filter cannot be taken off a running process.",
            confirm: "`grep Seccomp /proc/self/status; dmesg | grep type=1326`",
            affects: "The tracer's own pod.",
        }
        SeccompListenerGone {
            "A seccomp filter asks a listener about ptrace that exists no more, or answers that there is no such call.",
            "ptrace of a process that cannot exist gives ENOSYS instead of ESRCH, and the tracer has a seccomp filter.",
            "Start the tracer's pod again: a filter without its listener cannot be mended. Or use `seccompProfile: {type: Unconfined}`.",
            confirm: "`grep Seccomp /proc/self/status; strace -p 1`",
            affects: "The tracer's own pod.",
        }
        SeccompBlocksTracer {
            "A seccomp filter forbids the tracer to call ptrace.",
            "ptrace of a process that cannot exist gives EPERM instead of ESRCH, and the tracer has a seccomp filter.",
            "Run the tracer privileged or with `securityContext: {seccompProfile: {type: Unconfined}}`. A filter cannot be taken off a running process.",
            confirm: "`grep Seccomp /proc/self/status`",
            affects: "The tracer's own pod.",
        }
        TracerSeccompFiltered {
            "The tracer has a seccomp filter of its own, and the kernel lets nobody with one suspend or read the filters of others. The target has a filter, so CRIU cannot dump it from there.",
            "PTRACE_O_SUSPEND_SECCOMP gives EPERM or PTRACE_SECCOMP_GET_FILTER gives EACCES; the Seccomp fields of both are not 0.",
            "Run what calls CRIU (the agent, or the container runtime's service) without a seccomp filter: `seccompProfile: {type: Unconfined}`, or no SystemCallFilter in the systemd unit.",
            confirm: "`grep Seccomp /proc/self/status /proc/PID/status`",
            affects: "The tracer's own pod or service.",
        }
        YamaNoAttach {
            "Yama forbids every ptrace on this kernel (ptrace_scope 3), also to root.",
            "kernel.yama.ptrace_scope is 3; reading access (kcmp) may be allowed while attaching is denied.",
            "None without a reboot: the value 3 cannot be lowered while the kernel runs. Drain the node, remove the setting from /etc/sysctl.d, reboot.",
            confirm: "`cat /proc/sys/kernel/yama/ptrace_scope`",
            affects: "Every pod on the node: it has to be drained.",
        }
        YamaScopeRestricted {
            "Yama allows ptrace only to a parent (ptrace_scope 1) or only with CAP_SYS_PTRACE (2), and the tracer lacks the capability.",
            "kernel.yama.ptrace_scope is 1 or 2, the tracer's CapEff lacks bit 19, and the target is not its child.",
            "Give the tracer the capability: `securityContext: {capabilities: {add: [SYS_PTRACE]}}` or privileged. Lowering ptrace_scope would do too, but for every process of the node.",
            confirm: "`cat /proc/sys/kernel/yama/ptrace_scope; grep CapEff /proc/self/status`",
            affects: "The tracer's own pod; the sysctl would affect the whole node.",
        }
        MissingPtraceCapability {
            "The tracer has no CAP_SYS_PTRACE over the target, and is not its equal in users and capabilities.",
            "Reading and attaching are both denied; the tracer's CapEff lacks bit 19, or the target's user namespace is not the tracer's nor below it.",
            "Run the tracer privileged and in the host's user namespace (`hostUsers: true`), or add SYS_PTRACE; CRIU needs SYS_ADMIN or CHECKPOINT_RESTORE too.",
            confirm: "`grep CapEff /proc/self/status; ls -l /proc/self/ns/user /proc/PID/ns/user`",
            affects: "The tracer's own pod.",
        }
        TargetNotDumpable {
            "The target has made itself not dumpable (prctl PR_SET_DUMPABLE, or a set-user-ID program), and the tracer has no CAP_SYS_PTRACE.",
            "/proc/PID/maps belongs to root although another user runs the process.",
            "Trace with CAP_SYS_PTRACE, as the agent on the node has it; the target need not be changed.",
            confirm: "`stat -c %U /proc/PID/maps; grep Uid /proc/PID/status`",
            affects: "The tracer's own pod.",
        }
        AppArmorDenied {
            "AppArmor denies the tracer to trace the target.",
            "The kernel's log has `apparmor=\"DENIED\" operation=\"ptrace\"` for the probe, or the tracer is confined by a profile and nothing else denies.",
            "Run the tracer unconfined (`securityContext: {appArmorProfile: {type: Unconfined}}`): an unconfined tracer is never denied. Otherwise both profiles need a rule: `ptrace (trace,read) peer=TARGET` and `ptrace (tracedby,readby) peer=TRACER`.",
            confirm: "`cat /proc/self/attr/current /proc/PID/attr/current; dmesg | grep 'operation=\"ptrace\"'`",
            affects: "A profile that is changed: every process on the node that runs under it.",
        }
        SELinuxDenied {
            "SELinux denies the tracer to trace the target.",
            "SELinux enforces, and its policy, asked for the contexts of tracer and target, denies `process ptrace` (attaching) or `file read` (looking); where the kernel's log has it, the AVC for the probe.",
            "Run the tracer as spc_t (`securityContext: {seLinuxOptions: {type: spc_t}}`); when the boolean is the cause, `setsebool deny_ptrace off` without -P for the time of the checkpoint; otherwise let the policy allow what it denies (`audit2allow -M NAME` of the AVC, `semodule -i NAME.pp`).",
            confirm: "`getsebool deny_ptrace; ausearch -m avc -ts recent | grep ptrace`",
            affects: "The boolean: every domain on the node. A rule: the domain that it names.",
        }
        BpfLsmDenied {
            "A BPF program attached to the kernel's security hooks seems to deny ptrace; Tetragon and KubeArmor do such things.",
            "Everything else allows it, and a BPF program sits on the hook for ptrace or on the one for capabilities (before kernel 6.0: on any hook); the finding has its name and number.",
            "Exempt the tracer in the policy of the tool that loaded the program.",
            confirm: "`bpftool prog show id ID; bpftool link`",
            affects: "What that policy protects.",
        }
        LandlockDenied {
            "The tracer has restricted itself with Landlock, which allows ptrace only inside its own domain.",
            "The probe may trace its own child and not the target, everything else allows it, and Landlock is active.",
            "Start the tracer without Landlock; a domain cannot be left.",
            confirm: "`strace -f -e trace=landlock_restrict_self COMMAND` at the tracer's start",
            affects: "The tracer's own process.",
        }
        PtraceDeniedUnexplained {
            "The kernel denies ptrace, and none of the known causes fits what was seen.",
            "The finding lists what was ruled out, and where the evidence contradicts itself.",
            "Look at the kernel's log and at security tools of the vendor; please report the output of `podcheckpoint-probe --pid PID --json`.",
            confirm: "`dmesg | tail; strace -f -p PID`",
            affects: "Unknown.",
        }
        PtraceOperationFailed {
            "The target can be attached to, but one of the operations that CRIU needs is refused.",
            "The finding names the operation and the error.",
            "Look at the kernel's log; a hypervisor or a security tool that handles ptrace half is the usual cause.",
            confirm: "`podcheckpoint-probe --pid PID --json`",
            affects: "Unknown.",
        }
        PtraceStalled {
            "A ptrace operation does not return, and none of the known causes of a hang fits.",
            "The finding has the step, the error, and where both tasks wait in the kernel.",
            "Look at the stacks in the finding; please report them.",
            confirm: "`cat /proc/TRACER/stack /proc/TARGET/stack`",
            affects: "Unknown.",
        }
        AlreadyTraced {
            "Somebody else traces the target already; there can be only one tracer.",
            "TracerPid of a thread is not 0; the finding names the tracer and its command.",
            "End that debugger, or ask whoever runs it. It is not killed for you.",
            confirm: "`grep TracerPid /proc/PID/task/*/status`",
            affects: "The debugging session.",
        }
        TargetExiting {
            "The process, or its first thread, has ended and is not yet gone.",
            "Its state is Z or X. CRIU cannot save a process whose first thread has ended while others run on.",
            "Wait for it to end, or mend the program: the first thread must outlive the others.",
            confirm: "`grep State /proc/PID/task/*/status`",
            affects: "Nothing else.",
        }
        TargetPidNotVisible {
            "There is no such process in the probe's process namespace.",
            "/proc has no such number. The finding says whether the probe is outside the machine's first process namespace, and which processes have that number in a namespace of their own.",
            "If the probe is in a namespace of its own, run it in the host's (`hostPID: true`), and give the number that the process has there. If the number was read in a container, give the one in the finding. Otherwise the process has ended.",
            confirm: "`grep NSpid /proc/*/status`",
            affects: "The tracer's own pod.",
        }
        TargetKernelThread {
            "The target is a thread of the kernel, which nobody can trace.",
            "Its flags in /proc/PID/stat have PF_KTHREAD.",
            "Choose a process of a container.",
        }
        TargetFrozen {
            "The container was frozen before the checkpoint began, by someone else or by an earlier attempt. In a frozen cgroup v1 a tracer waits for ever; in v2 CRIU does, once it has put its code in.",
            "freezer.state says FROZEN (v1), or cgroup.events says frozen 1 (v2), of its cgroup or one above; the finding names the one that was told to freeze.",
            "Find out who froze it, then thaw it: `ctr -n k8s.io tasks resume ID` on the node, or write THAWED to freezer.state (v1) or 0 to cgroup.freeze (v2) of the cgroup in the finding.",
            confirm: "`cat /proc/PID/cgroup; cat CGROUP/freezer.state CGROUP/cgroup.events`",
            affects: "Everything in that cgroup.",
        }
        TargetFrozenStopped {
            "The target is stopped by a signal and frozen. PTRACE_SEIZE itself does not return then.",
            "The cgroup is frozen and a thread waits in do_signal_stop; a tracer waits in state D in ptrace_attach.",
            "Thaw the cgroup first, as for TargetFrozen; then continue the process (`kill -CONT PID`) if its owner agrees.",
            confirm: "`cat /proc/PID/wchan /proc/PID/cgroup`",
            affects: "Everything in that cgroup.",
        }
        TargetUninterruptible {
            "A thread waits in the kernel in a way that nothing can interrupt, so that it cannot be stopped.",
            "Its state is D each time that it was looked at; the finding has the function that it waits in. CRIU's log has `state D` or a timeout while freezing.",
            "Find what it waits for (`cat /proc/PID/stack` on the node): usually a hung network or FUSE file system, or a vfork whose child has not yet called exec. Then create another PodCheckpoint.",
            confirm: "`grep State /proc/PID/task/*/status; cat /proc/PID/wchan`",
            affects: "Whoever else uses that file system.",
        }
        TargetExecInProgress {
            "The target is in the middle of execve and waits for a thread of its own that cannot end. A tracer waits for it in PTRACE_SEIZE.",
            "The target waits in begin_new_exec or de_thread; a tracer waits in state S in ptrace_attach.",
            "Try again a moment later. If it lasts, another tracer holds one of its threads: let that one go.",
            confirm: "`cat /proc/PID/wchan; grep TracerPid /proc/PID/task/*/status`",
            affects: "Nothing else.",
        }
        TargetStopped {
            "The target is stopped by a signal (SIGSTOP, SIGTSTP, or a terminal).",
            "The state of a thread is T.",
            "Continue it (`kill -CONT PID`) if its owner agrees. A stopped and then frozen process cannot be seized in cgroup v1.",
            confirm: "`grep State /proc/PID/task/*/status`",
            affects: "The target sees that it was continued.",
        }
        PendingSigtrap {
            "SIGTRAP waits for a thread that blocks it. CRIU needs that signal for itself and refuses.",
            "Bit 4 of SigPnd or ShdPnd in the thread's status is set.",
            "Try again; if it stays, the program blocks SIGTRAP, which it should not.",
            confirm: "`grep -E 'SigPnd|ShdPnd|SigBlk' /proc/PID/task/*/status`",
            affects: "Nothing else.",
        }
        SeccompListenerNotRestorable {
            "The target's seccomp filter asks a listener. The dump works, but a restored process has no listener, and every call that the filter asks about gives ENOSYS.",
            "A filter of the target returns SECCOMP_RET_USER_NOTIF.",
            "Run the pod with a seccomp profile without SCMP_ACT_NOTIFY (`securityPatches: Temporary` writes one to the node), or set allowDegraded if the restored process can live without those calls.",
            confirm: "`podcheckpoint-probe --pid PID`",
            affects: "The next start of the pod.",
        }
        ParasiteRejected {
            "CRIU's own code, which runs for a moment inside the target, is not let do there what it needs: a file in memory, that file mapped as code, a connection to CRIU's socket.",
            "The same call, executed in the target by the probe, gave an error; or CRIU's log says so. The target's limits (RLIMIT_AS, RLIMIT_NOFILE), its Landlock domain, its AppArmor or SELinux label and PR_SET_SYSCALL_USER_DISPATCH decide.",
            "Find the call with `podcheckpoint-probe --inject --pid PID`. Look at the limits of the running process (`prlimit --pid PID`) and raise the soft one, at most to the hard one (`prlimit --pid PID --as=unlimited:`, `prlimit --pid PID --nofile=NUMBER:`); a Landlock domain and a label stay for as long as the process lives, so start the pod without that restriction.",
            confirm: "`podcheckpoint-probe --inject --pid PID`, `cat /proc/PID/limits`, `cat /proc/PID/attr/current`",
            affects: "The target, and what it may use.",
        }
        HardwareBreakpointsBroken {
            "Hardware breakpoints do not trap on this (virtual) machine. CRIU before 4.2 uses them and waits for ever.",
            "A child of the probe ran over a breakpoint that was set in its debug registers, and nothing happened; SEV-SNP and TDX guests are like that.",
            "Install CRIU 4.2 or later, which notices.",
            confirm: "`podcheckpoint-probe --node --json | grep Breakpoint`",
            affects: "CRIU on the node.",
        }
        KernelLacksCheckpointRestore {
            "The kernel was built without CONFIG_CHECKPOINT_RESTORE. Stock Kata guest kernels are.",
            "kcmp gives ENOSYS, /proc/sys/kernel/ns_last_pid is missing, or PTRACE_O_SUSPEND_SECCOMP gives EINVAL.",
            "Boot a kernel with CONFIG_CHECKPOINT_RESTORE; no live change exists.",
            confirm: "`ls /proc/sys/kernel/ns_last_pid; zgrep CHECKPOINT_RESTORE /proc/config.gz /boot/config-$(uname -r)`",
            affects: "The node, or every guest of that RuntimeClass.",
        }
        CriuProbeStalled {
            "`criu check` did not end in time: CRIU would hang in the same place with the pod already frozen.",
            "The finding has what it wrote and what its processes waited for at the deadline.",
            "If it waits in iptables, the node resolves names too slowly or the lock in /run/xtables.lock is held; otherwise install CRIU 4.1 or later.",
            confirm: "`time criu check --all`",
            affects: "CRIU on the node.",
        }
        CriuCacheStale {
            "CRIU's cache of what the kernel can do, /run/criu.kdat, is not true. The runtime's CRIU goes by it and does not notice.",
            "`criu check` says something else with the cache than without it; the finding has the lines that differ. It was written when CRIU ran where the kernel denied it something, as under a seccomp profile. What `criu check` does not report is not compared.",
            "Remove the cache on the node: `rm /run/criu.kdat`. CRIU writes it anew the next time it runs.",
            confirm: "`criu check --all; mv /run/criu.kdat /run/criu.kdat.old; criu check --all`",
            affects: "The next run of CRIU on the node, which takes a moment longer.",
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
        StorageStalled {
            "The disk of the archive root does not answer: a network file system whose server is gone, a frozen file system, a full queue. CRIU would hang there with the pod frozen and its log empty.",
            "Creating, syncing and deleting a small file there did not end within 5 s.",
            "See what the disk waits for (`dmesg`, `findmnt -T /var/lib/podcheckpoint`, processes in state D), or move the archive root to a local disk with the chart value agent.archiveRoot.",
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
            "The checkpoint took longer than spec.timeoutSeconds, and was called off. SourceRunning says what the pod does now.",
            "failure.step is Archive when the dump had ended and the archive was being verified; else it was under way.",
            "Raise timeoutSeconds when the pod has much memory; otherwise look at CRIU's log, if there is one.",
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
            "A child of the probe's own under the same AppArmor profile was refused a unix socket or /proc, or CRIU's log has `Unable to connect a transport socket: Permission denied`. The dump would fail with the processes frozen.",
            "Add the rules that the message names to the pod's AppArmor profile, or run the pod with appArmorProfile type Unconfined. `securityPatches: Temporary` puts the profile into complain mode for the time of the checkpoint.",
            confirm: "`cat /proc/PID/attr/current; dmesg | grep 'apparmor=\"DENIED\"'`",
            affects: "The profile: every process on the node that runs under it.",
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
        SessionLeaderOutsidePidns {
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
            "The kernel does not list sockets when it is asked, without which CRIU saves no network namespace, or CRIU's log names something else. `criu check` may call the same kernel good.",
            "Load the modules with `modprobe -a unix_diag tcp_diag udp_diag af_packet_diag` and see why the kernel may not load them itself (a blacklist in /etc/modprobe.d), or boot a kernel with CONFIG_CHECKPOINT_RESTORE and the *_DIAG options. `securityPatches: Temporary` loads them for the time of the checkpoint.",
            confirm: "`lsmod | grep _diag; cat /proc/sys/kernel/modules_disabled; grep -r _diag /etc/modprobe.d`",
            affects: "A module: the node.",
        }
        CriuCrashed {
            "CRIU ended without an answer.",
            "The runtime's answer has `EOF` on CRIU's socket, or the log ends in the middle.",
            "See the node's kernel log for an out-of-memory kill or a crash of criu.",
        }
    }
    "Virtual machines" {
        GuestNotProbed {
            "The pod runs in a virtual machine, and what the node sees of its monitor says nothing about ptrace inside.",
            "status.runtime.sandbox has the virtual machine monitor and how it was recognised.",
            "Nothing for a snapshot of the machine: it needs no ptrace.",
        }
        GuestUnreachable {
            "The pod runs in a virtual machine, and no way into it was open in five seconds, so nothing can be said about ptrace there.",
            "The message has each way with the reason why it was not open: Kata's debug console, and the runtime's exec into the container.",
            "Kata: set `debug_console_enabled = true` below [agent.kata] in Kata's configuration.toml, or give the pod the annotation `io.katacontainers.config.hypervisor.kernel_params: \"agent.debug_console agent.debug_console_vport=1026\"`, and create the pod anew.",
            confirm: "`kata-runtime exec SANDBOX`, or `kubectl exec POD -- sh -c true`",
            affects: "Whoever is root on the node gets a shell of the guest's root, which is not so in a confidential guest's threat model.",
        }
        GuestConsoleClosed {
            "CRIU in the guest needs a shell of the guest's root by a stream that ends when the agent does, and there is none. The container's own rights are not enough.",
            "The message says why Kata's debug console could not be used, or that it is a serial port, which does not notice that the agent is gone.",
            "Kata: set `debug_console_enabled = true` below [agent.kata] in Kata's configuration.toml, or give the pod the annotation `io.katacontainers.config.hypervisor.kernel_params: \"agent.debug_console agent.debug_console_vport=1026\"`, and create the pod anew.",
            confirm: "`kata-runtime exec SANDBOX`",
            affects: "Whoever is root on the node gets a shell of the guest's root, which is not so in a confidential guest's threat model.",
        }
        GuestToolMissing {
            "The guest's image lacks a program without which CRIU cannot be run in it.",
            "The message names it. Of tar, GNU's is needed: CRIU packs what is in a tmpfs with options that others do not have.",
            "Put criu 4.1 or later, GNU tar, gzip, coreutils and util-linux into the guest's image (Kata: EXTRA_PKGS of its osbuilder), and create the pod anew.",
            confirm: "In the guest: `criu check; tar --version`",
            affects: "Every new pod of that guest image.",
        }
        GuestMemoryShort {
            "The guest's memory has no room for CRIU's images, which are there until they have been read.",
            "The message has what the target's memory takes and what the guest has available; or CRIU's log has `No space left on device`.",
            "Give the guest more memory: default_memory in Kata's configuration.toml, or the annotation `io.katacontainers.config.hypervisor.default_memory`, about twice of what the containers use.",
        }
        GuestTransferFailed {
            "What CRIU wrote in the guest did not come out of it whole, so there is no archive.",
            "The connection ended, a file's SHA-256 is another one than in the guest, or the guest named a file that CRIU writes nowhere.",
            "Create another PodCheckpoint. When it happens again, see whether somebody else in the guest writes to its consoles.",
        }
        VmmUnsupported {
            "The virtual machine monitor of the sandbox offers no snapshot to anybody else.",
            "status.runtime.sandbox names it: Dragonball runs inside its shim and StratoVirt has no snapshot here.",
            "Run the pod with a RuntimeClass whose hypervisor is QEMU, Cloud Hypervisor or Firecracker.",
        }
        VmConfidential {
            "The guest is a confidential one: its memory is encrypted against the node, so no snapshot of it could be restored.",
            "The arguments of the virtual machine monitor turn on TDX, SEV, SEV-SNP or secure execution.",
            "Run the pod without confidential computing if it has to be checkpointed.",
        }
        VmMonitorNotFound {
            "The virtual machine monitor has no socket by which it could be told to pause and to save, or none that may be believed.",
            "None of its open sockets is a control socket, going by its arguments; or somebody else serves it; or the pod has several monitors, or several containers beside the one with the monitor. The message says which.",
            "Kata with QEMU: set enable_debug = true and extra_monitor_socket = \"qmp\" below [hypervisor.qemu] in Kata's configuration.toml, and create the pod anew.",
            confirm: "`tr '\\0' '\\n' < /proc/VMM/cmdline; ss -xlp`",
            affects: "Every new pod of that RuntimeClass: whoever can open that socket controls its machine.",
        }
        VmMonitorBusy {
            "The monitor's one client is somebody else, usually the runtime's shim.",
            "The socket accepted, and the monitor did not greet within one second: QMP serves one client at a time.",
            "Kata with QEMU: set enable_debug = true and extra_monitor_socket = \"qmp\" below [hypervisor.qemu] in Kata's configuration.toml, and create the pod anew.",
            confirm: "`socat - UNIX-CONNECT:SOCKET`",
            affects: "Every new pod of that RuntimeClass: whoever can open that socket controls its machine.",
        }
        VmMonitorFailed {
            "The monitor answered something that it must not, or stopped answering.",
            "The message has the request and what came back. Nothing was begun, or the machine was made to run again.",
            "See whether the virtual machine monitor is alive and not overloaded, and what else uses its socket.",
        }
        VmDeviceNotSnapshottable {
            "A device of the machine cannot be saved.",
            "The monitor names it (QEMU: `query-migrate`, blocked-reasons), or it is a virtio-fs, vhost-user or VFIO device.",
            "Kata: use shared_fs = \"none\" with a block based root filesystem, and no vhost-user or VFIO devices, for pods that are to be checkpointed.",
        }
        VmAlreadyPaused {
            "The machine does not run: somebody else has paused it, or it has stopped by itself.",
            "The monitor says so before anything was done; the message has its word.",
            "Find who has paused it and let it run, then create another PodCheckpoint.",
        }
        VmPauseBudgetExceeded {
            "Saving the guest's memory would take longer than the sandbox may stand still: Kata ends a sandbox whose agent does not answer.",
            "The message has the size of the memory, the disk's measured speed, and the time that is allowed.",
            "Give the guest less memory, the archive root a faster disk, or Kata's runtime-rs a larger health_check_request_timeout_ms.",
        }
        VmSnapshotFailed {
            "The monitor could not save the machine.",
            "The message has the monitor's own words. The machine was made to run again.",
            "See the message; a write error means the disk of the archive root.",
        }
        VmPaused {
            "The machine stands still and could not be made to run again.",
            "The monitor says so after it was told to go on.",
            "On the node, QEMU: `{\"execute\":\"cont\"}` on its QMP socket; Cloud Hypervisor: `ch-remote --api-socket SOCKET resume`; libvirt: `virsh resume DOMAIN`.",
        }
    }
    "gVisor" {
        GvisorNeedsNoPtrace {
            "The pod runs on gVisor's kernel, whose own checkpoint needs no ptrace. On the node there is only that kernel's process, and ptrace of it says nothing about the pod.",
            "status.runtime.sandbox says how gVisor was recognised.",
            "",
        }
        GvisorKernelNotFound {
            "The pod runs in gVisor, but the process of its kernel was not found, so runsc's folder and the sandbox's identifier for it are not known.",
            "Among the processes of the sandbox none is runsc-sandbox, or it has no --root.",
            "See on the node with `ps -ef | grep runsc-sandbox` whether the sandbox runs.",
        }
        GvisorIndivisible {
            "gVisor's kernel saves all containers of the pod together, and only some were asked for.",
            "The message names the others that run in the sandbox.",
            "Leave spec.containers out, or name all of them.",
        }
        GvisorFilesOutside {
            "What the pod has changed in its root filesystem is not in the state that gVisor's kernel writes, so the restored pod would miss it.",
            "runsc runs with --overlay2=none; see `tr '\\0' '\\n' < /proc/PID/cmdline` of runsc-sandbox.",
            "Leave runsc's --overlay2 at its default and create the pod anew, or set allowDegraded: true if the pod changes nothing there.",
        }
        GvisorPaused {
            "The gVisor sandbox is paused: its checkpoint would be one of a pod that stands still.",
            "`runsc state` says paused before anything was done.",
            "On the node: `runsc --root ROOT resume ID`, if you did not pause it yourself; then create another PodCheckpoint.",
        }
        GvisorSilent {
            "gVisor's kernel does not answer.",
            "runsc waited for it until the deadline; the message has the state of its process (T: stopped by a signal). It was handed no file, so it did nothing.",
            "See what the process waits for; on the node: `kill -CONT PID`, if it is stopped.",
        }
        GvisorCheckpointFailed {
            "gVisor's kernel could not save the pod, which goes on.",
            "The message has runsc's own words.",
            "See the message. A sandbox with `--network=host`, or with a device or file of the node that gVisor cannot save, has to be run without it.",
        }
        GvisorSaving {
            "gVisor's kernel is still writing, and the pod stands still until it is through. It cannot be told to stop.",
            "It holds the files of the checkpoint open.",
            "Wait; the pod goes on by itself. A disk that does not answer is the usual cause: see `dmesg` on the node.",
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

/// All that is to be said of one reason, in Markdown, without its heading.
pub fn text(reason: Reason) -> String {
    let ReasonDoc {
        meaning,
        evidence,
        confirm,
        remedy,
        affects,
    } = reason.doc();
    let parts = [
        ("Evidence", evidence),
        ("See it by hand", confirm),
        ("Remedy", remedy),
        ("The remedy affects", affects),
    ];
    let mut text = format!("{meaning}\n");
    for (name, part) in parts.into_iter().filter(|(_, part)| !part.is_empty()) {
        text.push_str(&format!("\n*{name}:* {part}\n"));
    }
    text
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
            page.push_str(&format!("\n### {reason}\n\n{}", text(*reason)));
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
