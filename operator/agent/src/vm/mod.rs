//! Snapshots of the virtual machine of a sandbox. No process in the guest is touched and no ptrace is needed.
//!
//! One small trait, a driver for each monitor. `snapshot` is the order in which they are used, `watchdog` the process that
//! makes the machine run again whatever happens to the agent, `archive` what is left on the disk.

pub mod archive;
pub mod by_hand;
mod http;
mod libvirt;
mod qemu;
mod qmp;
pub mod snapshot;
pub mod watchdog;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use futures::future::BoxFuture;
use podcheckpoint_crds::Reason;
use serde::{Deserialize, Serialize};

use crate::sandbox::{Machine, SocketPath, VmmKind, facts};
use crate::words::tame;

/// How long a monitor may take to greet. QMP serves one client: another one is accepted and never greeted.
pub const GREETING: Duration = Duration::from_secs(1);
/// How long a monitor may take for an answer to a question.
const ANSWER: Duration = Duration::from_secs(3);

/// A machine could not be looked at, saved or made to run.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VmError {
    /// There is nothing to connect to.
    #[error("the monitor cannot be reached at {}: {}", tame(socket), tame(why))]
    Unreachable {
        /// The socket, or the domain.
        socket: String,
        /// Why.
        why: String,
    },
    /// Somebody else is the one client.
    #[error("the monitor at {} accepted and did not greet within {} s: it has another client", tame(.0), GREETING.as_secs())]
    Busy(String),
    /// No answer, or one that makes no sense.
    #[error("{request}: {}", tame(answer))]
    Answer {
        /// What was asked.
        request: String,
        /// What came back.
        answer: String,
    },
    /// The monitor refuses.
    #[error("{request}: the monitor answered: {}", tame(answer))]
    Refused {
        /// What was asked.
        request: String,
        /// What came back.
        answer: String,
    },
    /// Devices are in the way.
    #[error("{}", tame(&.0.join("; ")))]
    Devices(Vec<String>),
    /// The machine stands still already.
    #[error("the machine does not run, its monitor calls it {:?}; nothing was done to it", tame(.0))]
    NotRunning(String),
    /// Saving would take too long.
    #[error("{0}")]
    Budget(String),
    /// Saving took too long.
    #[error("the snapshot did not end within {} s; the machine was made to run again", .0.as_secs())]
    Late(Duration),
    /// The machine's process is another one, or gone.
    #[error("the virtual machine monitor, process {0}, has ended")]
    Gone(i32),
    /// The disk refuses.
    #[error("{}: {}", path.display(), tame(why))]
    Disk {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
        /// There is no room.
        full: bool,
    },
    /// The disk says nothing.
    #[error("{}: the disk did not answer within {} s", path.display(), limit.as_secs())]
    Stalled {
        /// What was asked for.
        path: PathBuf,
        /// For how long.
        limit: Duration,
    },
    /// No watchdog, so nothing may be paused.
    #[error("the watchdog cannot be started: {0}")]
    Watchdog(String),
    /// Called off.
    #[error("cancelled")]
    Cancelled,
}

impl VmError {
    /// The reason for the status.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Unreachable { .. } => Reason::VmMonitorNotFound,
            Self::Busy(_) => Reason::VmMonitorBusy,
            Self::Answer { .. } => Reason::VmMonitorFailed,
            Self::Refused { answer, .. } if is_full(answer) => Reason::StorageFull,
            Self::Refused { .. } => Reason::VmSnapshotFailed,
            Self::Devices(_) => Reason::VmDeviceNotSnapshottable,
            Self::NotRunning(_) => Reason::VmAlreadyPaused,
            Self::Budget(_) => Reason::VmPauseBudgetExceeded,
            Self::Late(_) => Reason::DeadlineExceeded,
            Self::Gone(_) => Reason::SourcePodGone,
            Self::Disk { full: true, .. } => Reason::StorageFull,
            Self::Disk { .. } => Reason::StorageNotWritable,
            Self::Stalled { .. } => Reason::StorageStalled,
            Self::Watchdog(_) => Reason::MethodUnavailable,
            Self::Cancelled => Reason::AgentInterrupted,
        }
    }

    fn disk(path: &Path) -> impl Fn(std::io::Error) -> Self {
        move |error| Self::Disk {
            path: path.to_owned(),
            full: error.kind() == std::io::ErrorKind::StorageFull,
            why: error.to_string(),
        }
    }
}

/// Does something with a disk that may hang, aside. What has not ended in time goes on by itself.
async fn on_disk<T: Send + 'static>(
    limit: Duration,
    path: &Path,
    work: impl FnOnce() -> Result<T, VmError> + Send + 'static,
) -> Result<T, VmError> {
    let stalled = || VmError::Stalled {
        path: path.to_owned(),
        limit,
    };
    let failed = |error: tokio::task::JoinError| VmError::disk(path)(std::io::Error::other(error));
    let done = tokio::time::timeout(limit, tokio::task::spawn_blocking(work)).await;
    done.map_err(|_| stalled())?.map_err(failed)?
}

static AGENT: OnceLock<PathBuf> = OnceLock::new();

/// Names the agent's program for a process that is another one, such as a test.
pub fn set_agent_program(path: PathBuf) {
    let _ = AGENT.set(path);
}

/// This program, which starts itself in other roles.
pub(crate) fn agent_program() -> PathBuf {
    AGENT
        .get()
        .cloned()
        .unwrap_or_else(|| PathBuf::from("/proc/self/exe"))
}

fn is_full(words: &str) -> bool {
    words.contains("No space left on device")
}

/// What is needed to reach a machine's monitor again, from another process and later.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Handle {
    /// The monitor.
    pub vmm: VmmKind,
    /// Its process.
    pub pid: i32,
    /// When that process started: the number alone may come to mean another one.
    pub started: u64,
    /// Its socket.
    pub monitor: Option<SocketPath>,
    /// Its libvirt domain.
    pub domain: Option<String>,
}

impl Handle {
    /// The handle of a machine.
    pub fn of(machine: &Machine) -> Self {
        Self {
            vmm: machine.vmm,
            pid: machine.pid,
            started: machine.started,
            monitor: machine.monitor.clone(),
            domain: machine.domain.clone(),
        }
    }

    /// Whether the process is still the one that was recognised.
    pub fn alive(&self) -> bool {
        facts::started(self.pid) == Some(self.started)
    }

    /// Connects to the monitor.
    ///
    /// # Errors
    /// When it is gone, not there, busy or answers nonsense.
    pub async fn open(&self) -> Result<Box<dyn Driver>, VmError> {
        if !self.alive() {
            return Err(VmError::Gone(self.pid));
        }
        if let Some(domain) = &self.domain {
            return libvirt::Libvirt::new(domain, self.pid).map(|driver| Box::new(driver) as Box<dyn Driver>);
        }
        let unreachable = || VmError::Unreachable {
            socket: self.vmm.as_str().to_owned(),
            why: "it has no control socket".to_owned(),
        };
        let socket = self.monitor.as_ref().ok_or_else(unreachable)?;
        match self.vmm {
            VmmKind::Qemu => Ok(Box::new(qemu::Qemu::connect(socket, self.pid).await?)),
            VmmKind::CloudHypervisor => Ok(Box::new(http::CloudHypervisor::new(socket))),
            VmmKind::Firecracker => Ok(Box::new(http::Firecracker::new(socket, self.pid))),
            VmmKind::Dragonball | VmmKind::StratoVirt => Err(unreachable()),
        }
    }
}

/// What a monitor says of its machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Description {
    /// Version of the monitor.
    pub version: String,
    /// Its word for what the machine does now.
    pub state: String,
    /// Whether that word means that it runs.
    pub running: bool,
    /// Bytes of memory of the guest.
    pub memory: Option<u64>,
    /// Why it cannot be saved.
    pub blockers: Vec<String>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// How the state will be written.
    pub format: String,
}

/// A disk of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Disk {
    /// Name of the device.
    pub device: String,
    /// File or block device, as the monitor sees it.
    pub file: String,
    /// Format of its contents.
    pub format: String,
    /// Whether the guest cannot write to it.
    pub read_only: bool,
}

/// A machine, by its monitor.
pub trait Driver: Send {
    /// What it is and does. Changes nothing.
    fn describe(&mut self) -> BoxFuture<'_, Result<Description, VmError>>;

    /// Does beforehand what needs a disk, which may hang.
    fn prepare<'a>(&'a mut self, _folder: &'a Path) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Makes it stand still; it does when this returns.
    fn pause(&mut self) -> BoxFuture<'_, Result<(), VmError>>;

    /// Writes its state into a folder that is there and empty.
    fn save<'a>(&'a mut self, folder: &'a Path) -> BoxFuture<'a, Result<(), VmError>>;

    /// Gives up a save that is under way, if any, and makes the machine run; it does when this returns.
    fn resume(&mut self) -> BoxFuture<'_, Result<(), VmError>>;

    /// A copy of the connection, when the monitor serves only one: whoever has it can shut it down for another one.
    fn connection(&self) -> Option<OwnedFd> {
        None
    }

    /// How the state is restored, in sentences and commands for the manifest.
    fn restore_with(&self) -> &'static [&'static str];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_disk_that_hangs_is_not_waited_for() {
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let hangs = move || {
            let _ = held.recv();
            Ok(())
        };
        let error = on_disk(Duration::from_millis(10), Path::new("/archives"), hangs).await;
        drop(hold);
        assert_eq!(error.unwrap_err().reason(), Reason::StorageStalled);
    }
}
