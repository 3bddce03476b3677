//! What was seen, as data: it serialises, so that a recorded case replays as a test. No judgement is made here.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Everything that one run of the probe saw.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Observations {
    /// Version of the probe.
    pub version: String,
    /// The kernel that the probe ran on.
    pub kernel: Kernel,
    /// The probe itself, as a tracer.
    pub tracer: Tracer,
    /// What was asked for.
    pub targets: Vec<i32>,
    /// The target's processes, before anything was done to them.
    pub processes: Vec<Process>,
    /// Targets that are there, and about which the probe may not read (EACCES).
    pub hidden: Vec<i32>,
    /// Processes that are not a target, and have the number of one that is missing in a namespace of their own.
    pub namesakes: Vec<Namesake>,
    /// What was tried, in order.
    pub steps: Vec<Record>,
    /// Lines of the kernel's log, written during the run, in which it says that it denied something.
    pub denials: Vec<String>,
    /// CRIU on this machine, where it was looked at.
    pub criu: Option<Criu>,
    /// What could not be looked at, and why.
    pub gaps: Vec<String>,
    /// Threads of the target that were proved.
    pub threads_proved: usize,
    /// Microseconds that the whole run took.
    pub micros: u64,
}

/// Facts about the kernel that do not depend on the target.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Kernel {
    /// Release, as uname(2) has it.
    pub release: String,
    /// Architecture.
    pub machine: String,
    /// Active security modules, `None` when the kernel does not tell.
    pub lsm: Option<Vec<String>>,
    /// kernel.yama.ptrace_scope, where Yama is active.
    pub yama: Option<i32>,
    /// Lockdown mode: none, integrity or confidentiality. It never denies ptrace; recorded to say so.
    pub lockdown: Option<String>,
    /// Whether SELinux enforces.
    pub selinux_enforcing: Option<bool>,
    /// SELinux's boolean deny_ptrace.
    pub selinux_deny_ptrace: Option<bool>,
    /// Version of Landlock's interface, 0 without Landlock.
    pub landlock_abi: i32,
    /// Loaded BPF programs of the type LSM, `None` when they could not be listed.
    pub bpf_lsm: Option<Vec<LsmProgram>>,
    /// What CRIU needs of the kernel, found out by using it: false is missing.
    pub features: BTreeMap<String, bool>,
}

/// A BPF program that sits on one of the kernel's security hooks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LsmProgram {
    /// Its number.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// The function of the kernel that it sits on, where the kernel tells.
    pub hook: Option<String>,
}

/// The probe as a tracer.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Tracer {
    /// Process number in its own namespace.
    pub pid: i32,
    /// Effective user.
    pub uid: u32,
    /// Effective capabilities, a bit each.
    pub capabilities: u64,
    /// Seccomp mode: 0 none, 1 strict, 2 filter.
    pub seccomp: u8,
    /// Its user namespace is the initial one.
    pub initial_user_namespace: bool,
    /// Its process namespace is the machine's first one, `None` when that could not be read.
    pub initial_process_namespace: Option<bool>,
    /// AppArmor or SELinux label.
    pub label: Option<String>,
    /// What SELinux' policy does not let it do to a child of its own, `None` when it could not be asked.
    pub selinux_denies: Option<Vec<String>>,
}

/// A process with another number in its own namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Namesake {
    /// Number in its own namespace.
    pub own: i32,
    /// Number in the probe's namespace.
    pub pid: i32,
    /// Name.
    pub comm: String,
}

/// One process of the target.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    /// Number in the probe's namespace.
    pub pid: i32,
    /// Name, as the kernel has it: at most 15 bytes, never the arguments.
    pub comm: String,
    /// When it was started, in clock ticks since boot: with the number it identifies a process.
    pub start_time: u64,
    /// It is a thread of the kernel.
    pub kernel_thread: bool,
    /// It was asked for, and not found by its parent.
    pub root: bool,
    /// Effective user.
    pub uid: u32,
    /// Effective capabilities, a bit each.
    pub capabilities: u64,
    /// Its files in /proc are owned by root although another user runs it, which the kernel does to what is not dumpable.
    pub not_dumpable: bool,
    /// Where its user namespace is, seen from the tracer's.
    pub user_namespace: UserNamespace,
    /// Its network namespace is that of process 1, which CRIU on a node shares and does not save.
    pub first_network: bool,
    /// AppArmor or SELinux label.
    pub label: Option<String>,
    /// What SELinux' policy does not let the tracer do to it, `None` when it could not be asked.
    pub selinux_denies: Option<Vec<String>>,
    /// Its session was begun outside its process namespace.
    pub session_outside: bool,
    /// Number of threads.
    pub threads: usize,
    /// Threads with something that matters: not merely running or sleeping, traced, filtered, a trap pending.
    pub notable: Vec<Thread>,
    /// The cgroups by which it can be frozen.
    pub freezers: Vec<FreezerState>,
}

impl Process {
    /// Its AppArmor profile, where it is confined by one: labels are `NAME (MODE)`, and SELinux' have no mode.
    pub fn profile(&self) -> Option<&str> {
        let (name, mode) = self.label.as_deref()?.rsplit_once(" (")?;
        (mode.ends_with(')') && !name.is_empty()).then_some(name)
    }

    /// Its first thread has ended. Other threads may be in that state for a moment, which means nothing.
    pub fn leader_ended(&self) -> bool {
        let leader = self.notable.iter().find(|thread| thread.tid == self.pid);
        leader.is_some_and(|thread| matches!(thread.state, 'Z' | 'X'))
    }
}

/// Where a user namespace is, seen from the tracer's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum UserNamespace {
    /// The same.
    Same,
    /// Below: the tracer's capabilities hold in it.
    Below,
    /// Not below: they do not.
    Outside,
    /// It could not be read.
    #[default]
    Unknown,
}

/// A thread with something that matters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Thread {
    /// Number.
    pub tid: i32,
    /// State, one letter as in /proc/PID/status.
    pub state: char,
    /// Its tracer, 0 for none.
    pub tracer: i32,
    /// The tracer's name.
    pub tracer_comm: Option<String>,
    /// Seccomp mode.
    pub seccomp: u8,
    /// SIGTRAP is pending.
    pub trap_pending: bool,
    /// Where it waits in the kernel, for threads that cannot be interrupted.
    pub wchan: Option<String>,
}

/// A cgroup by which a process can be frozen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FreezerState {
    /// cgroup version, 1 or 2.
    pub version: i32,
    /// The cgroup.
    pub path: String,
    /// It is frozen or about to be.
    pub frozen: bool,
    /// The cgroup that was told to freeze: this one or one above it.
    pub by: Option<String>,
}

/// To what something was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
pub enum Subject {
    /// Nothing but the machine: controls that need no ptrace.
    Control,
    /// A child of the probe's own.
    Own,
    /// The target.
    Target,
    /// A child of the probe's own under the target's security label: the pid is the process whose label it is.
    Canary,
}

/// What was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
pub enum Step {
    /// A short sleep ends: the clock runs.
    Clock,
    /// A child is forked, ends and is reaped.
    ForkAndWait,
    /// A child stops by a signal and its parent is told, without ptrace.
    StopWithoutPtrace,
    /// ptrace(PTRACE_INTERRUPT) of a process that cannot exist: the call reaches the kernel.
    Reach,
    /// /proc/PID/maps is read.
    Maps,
    /// kcmp(2): access for reading.
    Kcmp,
    /// process_vm_readv(2): access for attaching, without attaching.
    ReadMemory,
    /// pidfd_getfd(2): the same by another way.
    GetFd,
    /// PTRACE_SEIZE.
    Seize,
    /// PTRACE_INTERRUPT.
    Interrupt,
    /// The thread reports that it stopped.
    Stop,
    /// PTRACE_GETREGSET.
    Registers,
    /// PTRACE_PEEKDATA.
    Peek,
    /// PTRACE_POKEDATA of the same word.
    Poke,
    /// PTRACE_PEEKSIGINFO.
    SignalInfo,
    /// PTRACE_GETSIGMASK.
    SignalMask,
    /// PTRACE_O_SUSPEND_SECCOMP.
    SuspendSeccomp,
    /// PTRACE_SECCOMP_GET_FILTER.
    SeccompFilter,
    /// PTRACE_GET_RSEQ_CONFIGURATION.
    Rseq,
    /// A hardware breakpoint traps.
    Breakpoint,
    /// PTRACE_DETACH; its value is how many microseconds the thread stood still.
    Detach,
    /// The thread is untraced again.
    RunsAgain,
    /// The canary takes the target's AppArmor profile.
    Profile,
    /// A unix socket of the type SOCK_SEQPACKET carries a message: how CRIU talks to its code in the target.
    UnixSocket,
    /// /proc is opened, as CRIU's code in the target does.
    ProcFolder,
    /// /proc/self/cgroup is opened, as CRIU's code in the target does.
    CgroupFile,
    /// One system call is executed in the thread, where that was asked for.
    Inject,
    /// memfd_create(2) in the thread.
    MemFile,
    /// That file is opened from outside and mapped in the thread as code.
    MapCode,
    /// The thread connects to an abstract socket in its network namespace.
    Connect,
    /// Code, registers and signal mask are put back and the thread is let go; its value is how many microseconds it stood
    /// still.
    Restore,
}

impl Step {
    /// All of them, in the order of the ladder.
    pub const ALL: [Self; 31] = [
        Self::Clock,
        Self::ForkAndWait,
        Self::StopWithoutPtrace,
        Self::Reach,
        Self::Maps,
        Self::Kcmp,
        Self::ReadMemory,
        Self::GetFd,
        Self::Seize,
        Self::Interrupt,
        Self::Stop,
        Self::Registers,
        Self::Peek,
        Self::Poke,
        Self::SignalInfo,
        Self::SignalMask,
        Self::SuspendSeccomp,
        Self::SeccompFilter,
        Self::Rseq,
        Self::Breakpoint,
        Self::Detach,
        Self::RunsAgain,
        Self::Profile,
        Self::UnixSocket,
        Self::ProcFolder,
        Self::CgroupFile,
        Self::Inject,
        Self::MemFile,
        Self::MapCode,
        Self::Connect,
        Self::Restore,
    ];
}

/// One thing that was tried, and how it ended.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// To what.
    pub subject: Subject,
    /// What.
    pub step: Step,
    /// Process, 0 where there is none.
    pub pid: i32,
    /// Thread.
    pub tid: i32,
    /// How it ended.
    pub end: End,
    /// Microseconds that it took.
    pub micros: u32,
}

/// How a step ended.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum End {
    /// It worked; what the number is depends on the step.
    Done(i64),
    /// The kernel refused, with this error number.
    Errno(i32),
    /// The tracer was killed by this signal.
    Killed(i32),
    /// It did not end in time.
    Stalled(Box<Stall>),
    /// It was not tried, since something cheaper had shown that it would hang or cannot work.
    Skipped(String),
}

/// A tracer that did not come back, seen from outside.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Stall {
    /// The tracer at the deadline.
    pub tracer: Sample,
    /// The target's thread at the deadline.
    pub target: Sample,
    /// The tracer ended when it was killed.
    pub tracer_killed: bool,
    /// The target's thread is untraced afterwards.
    pub target_untraced: bool,
    /// Processes that hold a seccomp listener, as `PID (NAME)`.
    pub listeners: Vec<String>,
}

/// What a task did at one moment, from /proc.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Sample {
    /// State, one letter; a space when it could not be read.
    pub state: char,
    /// Its tracer.
    pub tracer: i32,
    /// Where it waits in the kernel.
    pub wchan: Option<String>,
    /// Number of the system call that it is in.
    pub syscall: Option<i64>,
    /// The functions of its kernel stack, innermost first.
    pub stack: Vec<String>,
}

/// CRIU on this machine.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Criu {
    /// Where it is, `None` when there is none.
    pub path: Option<String>,
    /// Its version.
    pub version: Option<String>,
    /// Exit status of `criu check --all`; `None` when it did not end in time.
    pub status: Option<i32>,
    /// It says that it looks good, perhaps apart from features that not every process needs.
    pub good: bool,
    /// What it wrote, shortened: its errors and warnings.
    pub lines: Vec<String>,
    /// What its children were doing at the deadline, as `NAME: WCHAN`.
    pub waiting: Vec<String>,
    /// Microseconds that it took.
    pub micros: u64,
    /// The same with a copy of the cache that it keeps in /run, where there is one and it was looked at.
    pub with_cache: Option<Box<Criu>>,
}
