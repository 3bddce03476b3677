//! What the processes of a pod really run in: a container on the node's kernel, a virtual machine, or gVisor.
//!
//! `facts` is the only reader, and looks at processes and their open sockets, never at paths that a runtime is believed
//! to use. `recognise` decides from these facts alone and says by what. `view` opens files as a process sees them, and
//! `socket` reaches a socket that way.

pub mod facts;
pub mod recognise;
pub mod socket;
pub mod view;
mod vmm;

pub use facts::{Facts, Named, Process};
pub use recognise::{Recognised, recognise};
pub use socket::SocketPath;

use std::path::PathBuf;

use podcheckpoint_crds::{SandboxFacts, SandboxKind};
use serde::{Deserialize, Serialize};

/// A virtual machine monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum VmmKind {
    /// QEMU, with or without libvirt.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
    /// Dragonball: a library inside Kata's shim.
    Dragonball,
    /// StratoVirt.
    StratoVirt,
}

impl VmmKind {
    /// The name as it stands in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU",
            Self::CloudHypervisor => "CloudHypervisor",
            Self::Firecracker => "Firecracker",
            Self::Dragonball => "Dragonball",
            Self::StratoVirt => "StratoVirt",
        }
    }
}

/// How a host program talks to the guest's vsock.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Vsock {
    /// A unix socket that takes `CONNECT PORT`.
    Hybrid(SocketPath),
    /// A context identifier of the kernel's vsock.
    Cid(u32),
}

/// Whose health check ends a machine that stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum ShimKind {
    /// Kata's shim in Go.
    KataGo,
    /// Kata's shim in Rust (runtime-rs).
    KataRust,
    /// Another one, or one that is not known.
    Other,
}

/// The virtual machine of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The monitor.
    pub vmm: VmmKind,
    /// Its process on the node.
    pub pid: i32,
    /// When that process started, in clock ticks after boot: with the number it names one process for ever.
    pub started: u64,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Socket by which it is controlled: QMP, or its HTTP interface.
    pub monitor: Option<SocketPath>,
    /// The way to the guest's vsock.
    pub vsock: Option<Vsock>,
    /// Bytes of memory of the guest, as far as the arguments tell.
    pub memory: Option<u64>,
    /// How the memory is kept from the node.
    pub confidential: Option<String>,
    /// Name of the libvirt domain, when libvirt keeps it.
    pub domain: Option<String>,
    /// Whose health check there is.
    pub shim: ShimKind,
}

/// gVisor's kernel of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Sentry {
    /// Its process on the node.
    pub pid: i32,
    /// When that process started, in clock ticks after boot.
    pub started: u64,
    /// Where its runsc keeps its books, on the node.
    pub root: PathBuf,
    /// The sandbox's identifier for runsc.
    pub sandbox: String,
    /// Whether what the pod changes in its root filesystems is kept by the kernel, and so is in its state.
    pub overlay: bool,
}

impl Sentry {
    /// Whether the process is still the one that was recognised.
    pub fn alive(&self) -> bool {
        facts::started(self.pid) == Some(self.started)
    }
}

impl Recognised {
    /// The machine, when the sandbox is one.
    pub fn machine(&self) -> Option<&Machine> {
        self.machine.as_ref()
    }

    /// Whether the node sees the pod's own processes. A virtual machine monitor or a sentry is not the pod.
    pub fn shows_processes(&self) -> bool {
        matches!(self.kind, SandboxKind::Container | SandboxKind::Unknown)
    }

    /// As the status has it.
    pub fn describe(&self) -> SandboxFacts {
        SandboxFacts {
            kind: self.kind,
            runtime: self.runtime.clone(),
            vmm: self.machine.as_ref().map(|m| m.vmm.as_str().to_owned()),
            vmm_pid: self.machine.as_ref().map(|m| m.pid),
            confidential: self.machine.as_ref().and_then(|m| m.confidential.clone()),
            evidence: self.evidence.clone(),
        }
    }
}
