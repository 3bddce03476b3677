//! What the kernel says of the target's processes.

use std::os::fd::OwnedFd;

use podcheckpoint_probe::proc;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::cgroup::{Freezer, FreezerError};

/// The target is not, or no longer, what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The process is gone.
    #[error("process {0} has ended")]
    Gone(i32),
    /// The process is another container's.
    #[error("process {pid} is not in the cgroup of container {container}")]
    Other {
        /// The process.
        pid: i32,
        /// The container that it should be in.
        container: String,
    },
    /// Its cgroup cannot be read.
    #[error(transparent)]
    Cgroup(#[from] FreezerError),
}

/// The main process of a container, pinned so that its number cannot come to mean another process.
#[derive(Debug)]
pub struct Target {
    /// Keeps the number from being given to another process while it is looked at.
    pidfd: OwnedFd,
    /// Number of the process on the node.
    pub pid: i32,
    /// The container's freezer.
    pub freezer: Freezer,
}

impl Target {
    /// Pins a process and checks that it is in the cgroup of its container, or in one below that.
    ///
    /// # Errors
    /// When it is gone or another's.
    pub fn open(pid: i32, container: &str) -> Result<Self, TargetError> {
        let number = Pid::from_raw(pid).ok_or(TargetError::Gone(pid))?;
        let pidfd = pidfd_open(number, PidfdFlags::empty()).map_err(|_| TargetError::Gone(pid))?;
        // Every runtime names a container's cgroup after the container, some with a prefix or as a systemd scope.
        let freezer = Freezer::of_container(pid, container);
        // What has ended is in no cgroup, or in the root's.
        if !is_alive(&pidfd) {
            return Err(TargetError::Gone(pid));
        }
        let freezer = freezer.map_err(|error| match error {
            FreezerError::NoFreezer(_) => TargetError::Other {
                pid,
                container: container.to_owned(),
            },
            error @ FreezerError::Io { .. } => error.into(),
        })?;
        Ok(Self { pidfd, pid, freezer })
    }

    /// Whether the pinned process still runs; the number alone would not tell.
    pub fn alive(&self) -> bool {
        is_alive(&self.pidfd)
    }

    /// Bytes of memory that a dump has to write at most: resident anonymous and shared pages of every process.
    pub fn memory_bytes(&self) -> u64 {
        self.freezer.processes().into_iter().map(resident_bytes).sum()
    }
}

fn is_alive(pidfd: &OwnedFd) -> bool {
    // A pidfd is readable once its process has ended, pidfd_open(2).
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(0))
}

/// Resident anonymous and shared memory of a process, from /proc/PID/status.
pub fn resident_bytes(pid: i32) -> u64 {
    let status = proc::text(format!("/proc/{pid}/status")).unwrap_or_default();
    let kibibytes = |key: &str| -> u64 {
        let value = field(&status, key).unwrap_or_default();
        value.trim_end_matches("kB").trim().parse().unwrap_or(0)
    };
    (kibibytes("RssAnon") + kibibytes("RssShmem")) * 1024
}

fn field<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':').map(str::trim))
}

/// What one process is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its number.
    pub pid: i32,
    /// One letter, as /proc/PID/status has it.
    pub state: char,
    /// Number of its tracer, 0 if there is none.
    pub tracer: i32,
}

impl Facts {
    /// Facts of a process, `None` when it has ended. /proc/PID/status never blocks.
    pub fn of(pid: i32) -> Option<Self> {
        let status = proc::text(format!("/proc/{pid}/status")).ok()?;
        let state = field(&status, "State")?.chars().next()?;
        let tracer = field(&status, "TracerPid")?.parse().ok()?;
        Some(Self { pid, state, tracer })
    }
}

/// Whether the target runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceState {
    /// It runs.
    Runs {
        /// Number of its processes.
        processes: usize,
    },
    /// A cgroup is frozen.
    Frozen {
        /// Its folder.
        cgroup: String,
    },
    /// A process is stopped.
    Stopped {
        /// The process.
        pid: i32,
    },
    /// A process is traced.
    Traced {
        /// The process.
        pid: i32,
        /// Its tracer.
        tracer: i32,
        /// Name of the tracer.
        command: String,
    },
    /// It has ended.
    Gone,
}

/// Reads whether the containers with these freezers run. One that has ended says nothing of the others.
pub fn source_state(freezers: &[Freezer]) -> SourceState {
    let mut facts = Vec::new();
    for freezer in freezers {
        // An ended container's cgroup cannot be read, and has no processes either: of none at all it is said below that
        // they have ended.
        if let Ok(Some(level)) = freezer.frozen_level() {
            return SourceState::Frozen {
                cgroup: level.path.display().to_string(),
            };
        }
        facts.extend(freezer.processes().into_iter().filter_map(Facts::of));
    }
    classify(&facts)
}

fn classify(facts: &[Facts]) -> SourceState {
    let alive: Vec<_> = facts.iter().filter(|f| !matches!(f.state, 'Z' | 'X')).collect();
    if let Some(f) = alive.iter().find(|f| f.tracer != 0) {
        let command = proc::text(format!("/proc/{}/comm", f.tracer))
            .unwrap_or_default()
            .trim()
            .to_owned();
        return SourceState::Traced {
            pid: f.pid,
            tracer: f.tracer,
            command,
        };
    }
    if let Some(f) = alive.iter().find(|f| matches!(f.state, 'T' | 't')) {
        return SourceState::Stopped { pid: f.pid };
    }
    if alive.is_empty() {
        SourceState::Gone
    } else {
        SourceState::Runs {
            processes: alive.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(state: char, tracer: i32) -> Facts {
        Facts {
            pid: 7,
            state,
            tracer,
        }
    }

    #[test]
    fn a_sleeping_process_runs() {
        assert_eq!(classify(&[facts('S', 0)]), SourceState::Runs { processes: 1 });
    }

    #[test]
    fn a_traced_process_is_not_called_running() {
        assert!(matches!(
            classify(&[facts('S', 0), facts('t', 99)]),
            SourceState::Traced {
                pid: 7,
                tracer: 99,
                ..
            }
        ));
    }

    #[test]
    fn a_stopped_process_is_not_called_running() {
        assert_eq!(classify(&[facts('T', 0)]), SourceState::Stopped { pid: 7 });
    }

    #[test]
    fn containers_that_have_ended_are_nothing_that_runs() {
        let version = super::super::cgroup::Version::V2;
        let path = "/nonexistent".into();
        assert_eq!(source_state(&[Freezer { version, path }]), SourceState::Gone);
        assert_eq!(classify(&[]), SourceState::Gone);
    }

    #[test]
    fn only_zombies_are_nothing_that_runs() {
        assert_eq!(classify(&[facts('Z', 0)]), SourceState::Gone);
    }

    #[test]
    fn a_process_outside_the_containers_cgroup_is_refused() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(matches!(
            Target::open(own, "no-such-container"),
            Err(TargetError::Other { .. })
        ));
    }

    #[test]
    fn the_facts_of_this_process_are_read() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(Facts::of(own).unwrap().tracer, 0);
    }
}
