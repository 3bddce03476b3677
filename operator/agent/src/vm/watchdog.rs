//! A process that outlives the agent and makes a machine run again.
//!
//! It is started before the machine is paused. When the agent goes away without a word, or the deadline passes, it tells
//! the monitor to give up what is under way and to let the machine run. A monitor that serves one client is free again
//! when that client has died; for an agent that lives and hangs, the watchdog holds a copy of the agent's connection and
//! shuts it down.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::net::{Shutdown, shutdown};

use super::{Handle, VmError, agent_program};
use crate::node::watchdog::{leave_agent, say, wait};

/// The byte by which the agent says that all is well.
const DONE: u8 = b'd';
/// How often a machine that does not run yet is told to.
const TICK: Duration = Duration::from_millis(50);
/// For how long it is told so often: Firecracker and Cloud Hypervisor answer nothing while they write.
const LIMIT: Duration = Duration::from_secs(60);
/// How often afterwards, for as long as there is a machine.
const SLOW_TICK: Duration = Duration::from_secs(2);

/// A watchdog that is armed. Dropped without [`Watchdog::disarm`], it makes the machine run.
#[derive(Debug)]
pub struct Watchdog {
    child: Option<Child>,
    word: Option<UnixStream>,
}

impl Watchdog {
    /// Starts a watchdog; when this returns it is out of the agent's cgroup and waits. `connection` is the agent's own
    /// one to a monitor that serves only one, and `limit` how long it may take until it waits.
    ///
    /// # Errors
    /// When it cannot be started. Then nothing may be paused.
    pub fn arm(
        handle: &Handle,
        deadline: Duration,
        archive_root: &Path,
        connection: Option<OwnedFd>,
        limit: Duration,
    ) -> Result<Self, VmError> {
        let failed = |error: io::Error| VmError::Watchdog(error.to_string());
        let handle = serde_json::to_string(handle).map_err(|error| failed(io::Error::other(error)))?;
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let mut command = Command::new(agent_program());
        command
            .arg("vm-watchdog")
            .arg(deadline.as_millis().to_string())
            .arg(archive_root)
            .arg(handle);
        command.stdin(OwnedFd::from(theirs));
        command.stdout(connection.map_or_else(Stdio::null, Stdio::from));
        let child = command.spawn().map_err(failed)?;
        // The command still has the other end, which would keep the pair open.
        drop(command);
        let mut this = Self {
            child: Some(child),
            word: None,
        };
        let mut answer = String::new();
        let read = ours
            .set_read_timeout(Some(limit))
            .and_then(|()| ours.try_clone())
            .and_then(|clone| BufReader::new(clone).read_line(&mut answer));
        if read.is_ok() && answer.trim() == "armed" {
            this.word = Some(ours);
            return Ok(this);
        }
        // Nothing is paused yet, so nobody needs it.
        let _ = this.child.as_mut().map(Child::kill);
        let why = read.err().map(|error| format!(": {error}")).unwrap_or_default();
        Err(failed(io::Error::other(format!(
            "it did not say that it waits{why}"
        ))))
    }

    fn wait(&mut self) -> io::Result<()> {
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        let status = child.wait()?;
        if status.success() {
            Ok(())
        } else {
            Err(io::Error::other(format!("it ended with {status}")))
        }
    }

    /// Tells the watchdog that the machine runs, and waits for its end.
    ///
    /// # Errors
    /// When it is gone already, or failed.
    pub fn disarm(mut self) -> io::Result<()> {
        if let Some(mut word) = self.word.take() {
            word.write_all(&[DONE])?;
        }
        self.wait()
    }

    /// Lets the watchdog make the machine run, and waits until it has done so.
    ///
    /// # Errors
    /// When it ended without having done so: the machine is gone, or somebody has ended the watchdog.
    pub fn release(mut self) -> io::Result<()> {
        drop(self.word.take());
        self.wait()
    }
}

impl Drop for Watchdog {
    /// Whoever is not waited for stays as a zombie. The wait is for another thread: the machine may take its time.
    fn drop(&mut self) {
        drop(self.word.take());
        if let Some(mut child) = self.child.take() {
            std::thread::spawn(move || child.wait());
        }
    }
}

/// The watchdog's own `main`.
pub fn main(deadline: Duration, archive_root: &Path, handle: &str) -> ExitCode {
    let Ok(handle) = serde_json::from_str::<Handle>(handle) else {
        return ExitCode::from(2);
    };
    let Ok(_held) = leave_agent(archive_root) else {
        return ExitCode::FAILURE;
    };
    if rustix::io::write(io::stdin(), b"armed\n").is_err() {
        return ExitCode::FAILURE;
    }
    if wait(deadline) {
        return ExitCode::SUCCESS;
    }
    // The copy of the agent's connection, if there is one: an agent that hangs must not keep the monitor.
    let _ = shutdown(io::stdout(), Shutdown::Both);
    let outcome = release_blocking(&handle);
    match &outcome {
        Ok(()) => say("the machine runs"),
        Err(error) => say(&format!("the machine could not be made to run: {error}")),
    }
    if outcome.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn release_blocking(handle: &Handle) -> Result<(), VmError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| VmError::Watchdog(error.to_string()))?;
    let started = Instant::now();
    loop {
        match runtime.block_on(release(handle)) {
            Ok(()) => return Ok(()),
            Err(error @ VmError::Gone(_)) => return Err(error),
            Err(_) => sleep(pace(started.elapsed())),
        }
    }
}

/// How long to wait after an attempt.
fn pace(elapsed: Duration) -> Duration {
    if elapsed < LIMIT { TICK } else { SLOW_TICK }
}

/// Makes a machine run, for as long as there is one.
pub async fn release_in_the_end(handle: &Handle) {
    let started = Instant::now();
    let mut told = false;
    loop {
        match release(handle).await {
            Ok(()) | Err(VmError::Gone(_)) => return,
            Err(error) if !told => {
                tracing::error!(%error, "a machine may still be paused; it is told again and again to run")
            }
            Err(_) => {}
        }
        told = true;
        tokio::time::sleep(pace(started.elapsed())).await;
    }
}

/// Makes a machine run, once.
///
/// # Errors
/// When it does not run afterwards.
pub async fn release(handle: &Handle) -> Result<(), VmError> {
    handle.open().await?.resume().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_answers_nothing_for_long_is_told_less_often_and_never_given_up() {
        assert_eq!(pace(Duration::ZERO), TICK);
        assert_eq!(pace(LIMIT), SLOW_TICK);
        assert_eq!(pace(Duration::MAX), SLOW_TICK);
    }

    #[tokio::test]
    async fn a_machine_that_is_gone_is_waited_for_no_longer() {
        let gone = Handle {
            vmm: crate::sandbox::VmmKind::Firecracker,
            pid: i32::MAX,
            started: 1,
            monitor: None,
            domain: None,
        };
        release_in_the_end(&gone).await;
        assert!(matches!(
            release_blocking_in_a_thread(gone),
            Err(VmError::Gone(_))
        ));
    }

    fn release_blocking_in_a_thread(handle: Handle) -> Result<(), VmError> {
        std::thread::spawn(move || release_blocking(&handle))
            .join()
            .unwrap()
    }
}
