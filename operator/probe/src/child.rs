//! Disposable children: whatever may hang happens in one, and its parent holds the deadline.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;

use crate::sys::{self, Fork, Waited};

/// How long a child may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Without a word from it.
    pub silence: Duration,
    /// In all, as long as it talks: the last step that it announces may take until it counts as silent.
    pub total: Duration,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By itself.
    Exited(i32),
    /// By a signal that was not the parent's.
    Killed(i32),
    /// It was silent for too long; it has been killed. False when even that did not end it.
    Silent(bool),
    /// It went on talking past its total; it has been killed.
    Late,
}

/// A child could not be started.
#[derive(Debug, thiserror::Error)]
#[error("a child process cannot be started: {0}")]
pub struct ChildError(#[from] nix::errno::Errno);

/// A child at work.
#[derive(Debug)]
pub struct Child {
    pid: i32,
    reader: OwnedFd,
}

/// Starts `work` in a child. What it writes waits in a pipe until [`Child::attend`].
///
/// # Errors
/// When there is no room for a process or a pipe.
pub fn start(work: impl FnOnce(&mut File)) -> Result<Child, ChildError> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    match sys::fork().map_err(nix::errno::Errno::from_raw)? {
        Fork::Child => {
            drop(reader);
            work(&mut File::from(writer));
            sys::exit(0)
        }
        Fork::Parent(pid) => Ok(Child { pid, reader }),
    }
}

impl Child {
    /// Ends a child whose answer does not matter any more.
    pub fn abandon(self) {
        end(self.pid);
    }

    /// Hands what the child writes to `heard` as it comes, and calls `silent` with its number before it is killed for its
    /// silence, while both tasks can still be looked at. The limits begin now.
    pub fn attend(self, limits: Limits, mut heard: impl FnMut(&[u8]), silent: impl FnOnce(i32)) -> Ending {
        match listen(self.reader, limits, &mut heard) {
            Over::Closed => reap(self.pid, limits.silence, silent),
            Over::Silent => {
                silent(self.pid);
                Ending::Silent(end(self.pid))
            }
            Over::Late => {
                end(self.pid);
                Ending::Late
            }
        }
    }
}

/// [`start`] and [`Child::attend`].
///
/// # Errors
/// As [`start`].
pub fn run(
    limits: Limits,
    work: impl FnOnce(&mut File),
    heard: impl FnMut(&[u8]),
    silent: impl FnOnce(i32),
) -> Result<Ending, ChildError> {
    Ok(start(work)?.attend(limits, heard, silent))
}

enum Over {
    Closed,
    Silent,
    Late,
}

fn listen(reader: OwnedFd, limits: Limits, heard: &mut impl FnMut(&[u8])) -> Over {
    let mut reader = File::from(reader);
    let mut buffer = [0u8; 16 * 1024];
    let (started, mut last) = (Instant::now(), Instant::now());
    loop {
        // Past its total a child is late when it says something more; one that does not is silent, and may hang.
        let left = limits.silence.saturating_sub(last.elapsed());
        let milliseconds = u16::try_from(left.as_millis()).unwrap_or(u16::MAX).max(1);
        let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(milliseconds)) {
            Ok(ready) if ready > 0 => match reader.read(&mut buffer) {
                Ok(0) | Err(_) => return Over::Closed,
                Ok(count) => {
                    heard(buffer.get(..count).unwrap_or_default());
                    last = Instant::now();
                    if started.elapsed() > limits.total {
                        return Over::Late;
                    }
                }
            },
            _ if last.elapsed() >= limits.silence => return Over::Silent,
            _ => {}
        }
    }
}

/// A child that has closed its end is about to exit; one that does not is treated as silent.
fn reap(pid: i32, limit: Duration, silent: impl FnOnce(i32)) -> Ending {
    match wait_until(pid, limit) {
        Some(Waited::Exited(status)) => Ending::Exited(status),
        Some(Waited::Killed(signal)) => Ending::Killed(signal),
        _ => {
            silent(pid);
            Ending::Silent(end(pid))
        }
    }
}

/// Kills a child; whether it ended within half a second, which it does not in the middle of an uninterruptible wait.
pub fn end(pid: i32) -> bool {
    sys::kill(pid, libc::SIGKILL);
    wait_until(pid, Duration::from_millis(500)).is_some()
}

/// Waits for the end of a child; `None` when it does not come in time.
pub fn wait_until(pid: i32, limit: Duration) -> Option<Waited> {
    let started = Instant::now();
    loop {
        match sys::wait(pid, false) {
            Ok(Waited::Nothing | Waited::Stopped(..)) => {}
            Ok(ended) => return Some(ended),
            Err(_) => return Some(Waited::Exited(0)),
        }
        if started.elapsed() > limit {
            return None;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Runs `work` in a child and gives its answer, `None` when it did not answer in time: for reads of /proc that can
/// block.
pub fn ask(limit: Duration, work: impl FnOnce() -> Vec<u8>) -> Option<Vec<u8>> {
    let mut answer = Vec::new();
    let limits = Limits {
        silence: limit,
        total: limit,
    };
    let write = |out: &mut File| {
        let _ = out.write_all(&work());
    };
    let ending = run(limits, write, |bytes| answer.extend_from_slice(bytes), |_| {});
    matches!(ending, Ok(Ending::Exited(0))).then_some(answer)
}
