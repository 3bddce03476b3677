//! A process that outlives the agent and makes the target run again.
//!
//! A runtime that freezes a container thaws it with its caller's context: if the caller dies, the container can stay
//! frozen for ever. So before anything is frozen, the agent starts itself a second time as a watchdog, with a pipe
//! between them. When the pipe closes without a word, or the deadline passes, the watchdog thaws.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use podcheckpoint_probe::proc;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

use super::cgroup::{Control, Freezer};
use super::process::{Facts, SourceState, source_state};
use super::release::correct_books_blocking;

/// The byte by which the agent says that all is well.
const DONE: u8 = b'd';
/// How often a released target is looked at.
const TICK: Duration = Duration::from_millis(20);
/// How long a target must run undisturbed before the watchdog believes it: a runtime that is still at work may freeze
/// it once more.
const QUIET: Duration = Duration::from_secs(2);
/// How long the watchdog waits for a CRIU that has lost its caller to finish by itself, so that the target runs within
/// a second.
const TRACER_PATIENCE: Duration = Duration::from_millis(600);
/// How long CRIU's code must have been waiting for orders in a process before CRIU is ended: it then notices that CRIU
/// is gone and restores the process by itself, at the cost of two mappings that stay. Ended while that code is being put
/// there, which takes well below a millisecond, CRIU would take the process with it.
const SETTLED: Duration = Duration::from_millis(60);
/// When a CRIU is ended at any point: by then it hangs.
const TRACER_LIMIT: Duration = Duration::from_secs(10);
/// When the watchdog gives up.
const LIMIT: Duration = Duration::from_secs(60);

/// A watchdog that is armed. Dropped without [`Watchdog::disarm`], it releases the target.
#[derive(Debug)]
pub struct Watchdog {
    child: Child,
    pipe: Option<ChildStdin>,
}

impl Watchdog {
    /// Starts a watchdog over containers; when this returns it is out of the agent's cgroup and waits.
    ///
    /// # Errors
    /// When it cannot be started. Then nothing may be frozen.
    pub fn arm(
        freezers: &[Freezer],
        deadline: Duration,
        runtime_socket: &Path,
        archive_root: &Path,
    ) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("watchdog")
            .arg(deadline.as_secs().to_string())
            .arg(runtime_socket)
            .arg(archive_root);
        command.arg(serde_json::to_string(freezers).map_err(io::Error::other)?);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let pipe = child.stdin.take();
        let mut answer = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut answer)?;
        }
        if answer.trim() == "armed" {
            Ok(Self { child, pipe })
        } else {
            Err(io::Error::other("the watchdog did not start"))
        }
    }

    /// Tells the watchdog that the target runs, and waits for its end.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn disarm(mut self) -> io::Result<()> {
        if let Some(mut pipe) = self.pipe.take() {
            pipe.write_all(&[DONE])?;
        }
        self.child.wait().map(drop)
    }

    /// Lets the watchdog make the target run, and waits until it has done so or given up.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn release(mut self) -> io::Result<()> {
        drop(self.pipe.take());
        self.child.wait().map(drop)
    }
}

/// The file below the archive root that every watchdog holds a shared lock on for as long as it may thaw something.
fn lock_file(archive_root: &Path) -> io::Result<File> {
    File::create(archive_root.join("watchdog.lock"))
}

/// The first thing that a watchdog does: from then on it does not end with the agent. What it gives is held until its end.
pub(crate) fn leave_agent(archive_root: &Path) -> io::Result<Option<File>> {
    let lock = hold_lock(archive_root);
    if let Err(error) = &lock {
        say(&format!("no lock: {error}"));
    }
    if let Err(error) = leave_agents_cgroup() {
        say(&format!("cannot leave the agent's cgroup: {error}"));
        return Err(error);
    }
    // The agent's terminal signals are not for this process.
    let _ = rustix::process::setsid();
    Ok(lock.ok())
}

/// Says that a watchdog is at work for as long as the file is open.
fn hold_lock(archive_root: &Path) -> io::Result<File> {
    lock_file(archive_root).and_then(|file| Ok(flock(&file, FlockOperation::LockShared).map(|()| file)?))
}

/// Waits until no watchdog is at work, an earlier agent's included.
///
/// # Errors
/// When one still is after it should have given up.
pub fn wait_for_others(archive_root: &Path) -> io::Result<()> {
    let (file, started) = (lock_file(archive_root)?, Instant::now());
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(error) if started.elapsed() >= LIMIT => return Err(error.into()),
            Err(_) => sleep(TICK),
        }
    }
}

/// The watchdog's own `main`. `deadline` is in seconds, `freezers` is JSON.
pub fn main(deadline: u64, runtime_socket: &Path, archive_root: &Path, freezers: &str) -> ExitCode {
    let Ok(freezers) = serde_json::from_str::<Vec<Freezer>>(freezers) else {
        return ExitCode::from(2);
    };
    let Ok(_held) = leave_agent(archive_root) else {
        return ExitCode::FAILURE;
    };
    // Books that were left wrong before would make this checkpoint one of running processes.
    if let Err(error) = correct_books_blocking(runtime_socket, &freezers) {
        say(&format!("containerd's books cannot be read: {error}"));
    }
    println!("armed");
    if wait(Duration::from_secs(deadline)) {
        return ExitCode::SUCCESS;
    }
    let started = Instant::now();
    let runs = release(&freezers, started);
    say(&format!(
        "released the target; it {}",
        if runs { "runs" } else { "does not run" }
    ));
    if let Err(error) = correct_books(runtime_socket, &freezers, started) {
        say(&format!("containerd may still call the target paused: {error}"));
    }
    if runs {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Writes to the agent's log, which ends with the agent: nobody may be there to read, and that must not end the watchdog.
pub(crate) fn say(message: &str) {
    let _ = writeln!(io::stderr(), "watchdog: {message}");
}

/// The runtime ends every process in the cgroup of a container whose first process has died, when the container has
/// the node's pid namespace. The root of each hierarchy is no container's.
fn leave_agents_cgroup() -> io::Result<()> {
    let mounts = proc::text("/proc/self/mountinfo")?;
    let own = std::process::id().to_string();
    for root in cgroup_roots(&mounts) {
        std::fs::write(root.join("cgroup.procs"), &own)?;
    }
    Ok(())
}

fn cgroup_roots(mountinfo: &str) -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = mountinfo
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let cgroup = after.starts_with("cgroup ") || after.starts_with("cgroup2 ");
            let mut fields = before.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            (cgroup && root == "/").then(|| Path::new(point).to_owned())
        })
        .collect();
    roots.sort();
    roots.dedup();
    roots
}

/// Waits for the agent's word; false when the agent is gone or late.
pub(crate) fn wait(deadline: Duration) -> bool {
    let started = Instant::now();
    let stdin = io::stdin();
    loop {
        let Some(left) = deadline.checked_sub(started.elapsed()) else {
            return false;
        };
        let Ok(timeout) = Timespec::try_from(left) else {
            return false;
        };
        let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) | Err(_) => return false,
            Ok(_) => {
                let mut byte = [0];
                return matches!(rustix::io::read(&stdin, &mut byte), Ok(1)) && byte == [DONE];
            }
        }
    }
}

/// Thaws until the target runs undisturbed; true if it does, or has ended.
fn release(freezers: &[Freezer], started: Instant) -> bool {
    let mut quiet_since: Option<Instant> = None;
    let mut infected = Infected::default();
    while started.elapsed() < LIMIT {
        // Looked at before it is thawed: a CRIU that is still at work freezes for a moment only, and tries again later.
        if freezers
            .iter()
            .any(|freezer| freezer.is_frozen().unwrap_or(false))
        {
            quiet_since = None;
            thaw(freezers);
        }
        match source_state(freezers) {
            SourceState::Gone => return true,
            state if !is_held(&state) => {
                if quiet_since.get_or_insert_with(Instant::now).elapsed() >= QUIET {
                    return true;
                }
            }
            _ => {
                quiet_since = None;
                let harmless = infected.settled(freezers) && started.elapsed() >= TRACER_PATIENCE;
                if harmless || started.elapsed() >= TRACER_LIMIT {
                    end_abandoned_tracers(freezers);
                    infected = Infected::default();
                }
            }
        }
        sleep(TICK);
    }
    false
}

/// Whether the checkpoint holds the target. Somebody else's debugger or stop signal is not ours to end or to wait for.
fn is_held(state: &SourceState) -> bool {
    match state {
        SourceState::Frozen { .. } => true,
        SourceState::Traced { command, .. } => command == "criu",
        SourceState::Runs { .. } | SourceState::Stopped { .. } | SourceState::Gone => false,
    }
}

/// The processes in which a tracer lets code run.
#[derive(Default)]
struct Infected {
    pids: Vec<i32>,
    since: Option<Instant>,
}

impl Infected {
    /// Whether they have been the same ones for [`SETTLED`]. Those that the tracer only holds are in state t.
    fn settled(&mut self, freezers: &[Freezer]) -> bool {
        let facts = freezers.iter().flat_map(Freezer::processes).filter_map(Facts::of);
        let pids: Vec<i32> = facts
            .filter(|f| f.tracer != 0 && f.state != 't')
            .map(|f| f.pid)
            .collect();
        if pids.is_empty() || pids != self.pids {
            (self.pids, self.since) = (pids, Some(Instant::now()));
            return false;
        }
        self.since.is_some_and(|since| since.elapsed() >= SETTLED)
    }
}

fn thaw(freezers: &[Freezer]) {
    for freezer in freezers {
        let _ = freezer.thaw();
    }
}

/// Corrects containerd's books. Its shim answers nothing while a checkpoint is still under way, so this is tried until
/// it does; what the checkpoint freezes meanwhile is thawed.
fn correct_books(runtime_socket: &Path, freezers: &[Freezer], started: Instant) -> Result<(), String> {
    loop {
        thaw(freezers);
        let outcome = correct_books_blocking(runtime_socket, freezers);
        if outcome.is_ok() || started.elapsed() >= LIMIT {
            return outcome;
        }
        sleep(TICK);
    }
}

/// Ends a CRIU that still traces the target: the kernel detaches what a dead tracer has traced.
fn end_abandoned_tracers(freezers: &[Freezer]) {
    let tracers = freezers
        .iter()
        .flat_map(Freezer::processes)
        .filter_map(Facts::of)
        .map(|f| f.tracer);
    for tracer in tracers.filter(|t| *t > 0) {
        let command = proc::text(format!("/proc/{tracer}/comm")).unwrap_or_default();
        // Nobody else's debugger is ended.
        if command.trim() == "criu"
            && let Some(pid) = Pid::from_raw(tracer)
        {
            say(&format!("ending criu {tracer}, which did not finish"));
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn somebody_elses_debugger_is_not_waited_for() {
        let traced = |command: &str| SourceState::Traced {
            pid: 1,
            tracer: 2,
            command: command.into(),
        };
        assert!(is_held(&traced("criu")));
        assert!(!is_held(&traced("strace")));
    }

    #[test]
    fn a_tracer_that_has_no_code_in_the_target_is_not_called_settled() {
        let nowhere = Freezer {
            version: crate::node::cgroup::Version::V2,
            path: "/nonexistent".into(),
        };
        let mut infected = Infected::default();
        assert!(!infected.settled(std::slice::from_ref(&nowhere)));
        sleep(SETTLED);
        assert!(!infected.settled(&[nowhere]));
    }

    /// Its cgroup, with one process below it, is removed again when the test ends.
    struct Container {
        freezer: Freezer,
        below: PathBuf,
        process: Child,
    }

    impl Container {
        fn new() -> Option<Self> {
            let path = format!(
                "/sys/fs/cgroup/freezer/podcheckpoint-watched-{}",
                std::process::id()
            );
            let below = Path::new(&path).join("init");
            std::fs::create_dir(&path).ok()?;
            std::fs::create_dir(&below).ok()?;
            let process = Command::new("sleep").arg("600").spawn().ok()?;
            let container = Self {
                freezer: Freezer {
                    version: crate::node::cgroup::Version::V1,
                    path: path.into(),
                },
                below,
                process,
            };
            let pid = container.process.id().to_string();
            std::fs::write(container.below.join("cgroup.procs"), pid).ok()?;
            Some(container)
        }
    }

    impl Drop for Container {
        fn drop(&mut self) {
            let _ = self.freezer.thaw();
            let _ = self.process.kill();
            let _ = self.process.wait();
            let _ = std::fs::remove_dir(&self.below);
            let _ = std::fs::remove_dir(&self.freezer.path);
        }
    }

    #[test]
    fn a_container_that_is_frozen_once_more_is_thawed_also_when_another_has_ended() {
        let Some(container) = Container::new() else {
            eprintln!("SKIPPED: needs root and a freezer of cgroup v1");
            return;
        };
        let ended = Freezer {
            path: container.freezer.path.join("ended"),
            ..container.freezer.clone()
        };
        let freezers = [ended, container.freezer.clone()];
        container.freezer.freeze().unwrap();
        let again = container.freezer.clone();
        let runtime = std::thread::spawn(move || {
            sleep(Duration::from_millis(500));
            again.freeze()
        });
        let runs = release(&freezers, Instant::now());
        runtime.join().unwrap().unwrap();
        assert!(runs);
        assert_eq!(source_state(&freezers), SourceState::Runs { processes: 1 });
    }

    #[test]
    fn every_hierarchy_is_left_and_bind_mounts_of_parts_are_not_roots() {
        let mounts = "92 86 0:34 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
            93 86 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            94 86 0:34 /kubepods /mnt rw - cgroup cgroup rw,freezer\n\
            95 86 0:39 / /tmp rw - tmpfs tmpfs rw\n";
        assert_eq!(
            cgroup_roots(mounts),
            [
                Path::new("/sys/fs/cgroup/freezer"),
                Path::new("/sys/fs/cgroup/unified")
            ]
        );
    }
}
