//! CRIU on this machine: where it is, its version, and what `criu check --all` says, under a deadline. It runs beside
//! the ladder. It looks at the kernel anew: a cache in /run that was written under other circumstances is covered up,
//! and nothing of the machine is changed. Where nobody waits for a verdict on a target it is run again with a copy of that
//! cache, by which the runtime's CRIU goes.

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Pid, pipe2, setpgid};

use crate::child;
use crate::facts;
use crate::observation::Criu;
use crate::proc;
use crate::sys::{self, Fork, Waited};

/// How long CRIU's own check may take beside a target, so that a verdict comes within two seconds. It takes a tenth of
/// that, and on an emulated machine more than half.
pub const LIMIT: Duration = Duration::from_millis(1600);
/// How long it may take where nobody waits for a verdict on a target.
pub const PATIENT: Duration = Duration::from_secs(5);
/// Where CRIU keeps what it has once found out about the kernel.
const CACHE: &str = "/run/criu.kdat";
/// How many of its lines are kept, and how long each may be.
const LINES: usize = 12;
const LINE: usize = 300;
const FOLDERS: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// Where CRIU is to be looked for.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// The program; found in the usual folders when absent.
    pub program: Option<PathBuf>,
    /// Folders to look in, in this order; the usual ones when there are none.
    pub folders: Vec<PathBuf>,
    /// How long its check may take, and the one with the cache again as long.
    pub limit: Duration,
    /// Check again with the cache that is there.
    pub cached: bool,
    /// A process whose mount, network, IPC and host name namespaces are entered first: the host's first one, from a
    /// container.
    pub namespaces_of: Option<i32>,
}

/// A check that goes on.
pub struct Running {
    child: Option<(i32, OwnedFd)>,
    started: Instant,
    place: Place,
}

/// Starts the check.
pub fn start(place: &Place) -> Running {
    Running {
        child: begin(place, false).ok(),
        started: Instant::now(),
        place: place.clone(),
    }
}

fn begin(place: &Place, cached: bool) -> Result<(i32, OwnedFd), nix::errno::Errno> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    match sys::fork().map_err(nix::errno::Errno::from_raw)? {
        Fork::Parent(pid) => Ok((pid, reader)),
        Fork::Child => {
            drop(reader);
            // A group of its own, so that what CRIU starts can be ended with it.
            let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
            check(place, cached, writer);
            sys::exit(127)
        }
    }
}

/// In the child: becomes `criu check`. Returns only when there is none, or no cache that it could use.
fn check(place: &Place, cached: bool, out: OwnedFd) {
    if place.namespaces_of.is_some_and(|pid| enter(pid).is_err()) {
        sys::exit(126);
    }
    let cache = if cached { fs::read(CACHE).ok() } else { None };
    let covered = cover_cache(cache.as_deref()).is_ok();
    // As it is, and not as a copy, it is never used: CRIU writes it anew when it is another version's.
    if cached && !(covered && cache.is_some()) {
        return;
    }
    let Some(program) = find(place) else { return };
    let Ok(errors) = out.try_clone() else { return };
    let mut report = fs::File::from(out);
    let version = Command::new(&program)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    let version = version.map(|output| output.stdout).unwrap_or_default();
    let version = String::from_utf8_lossy(&version);
    let version = version
        .lines()
        .find_map(|line| line.strip_prefix("Version:"))
        .unwrap_or_default()
        .trim();
    let _ = std::io::Write::write_all(
        &mut report,
        format!("{}\n{version}\n", program.display()).as_bytes(),
    );
    let _error = Command::new(&program)
        .args(["check", "--all"])
        .env_clear()
        .env("PATH", FOLDERS.join(":"))
        .stdin(Stdio::null())
        .stdout(report)
        .stderr(errors)
        .exec();
}

fn find(place: &Place) -> Option<PathBuf> {
    if let Some(program) = &place.program {
        return program.exists().then(|| program.clone());
    }
    let usual = FOLDERS.iter().map(PathBuf::from);
    place
        .folders
        .iter()
        .cloned()
        .chain(usual)
        .map(|folder| folder.join("criu"))
        .find(|program| program.exists())
}

fn enter(pid: i32) -> nix::Result<()> {
    let open =
        |name: &str| fs::File::open(format!("/proc/{pid}/ns/{name}")).map_err(|_| nix::errno::Errno::ENOENT);
    // All are opened before the first is entered: then /proc is another one.
    let namespaces = [
        (open("net")?, CloneFlags::CLONE_NEWNET),
        (open("ipc")?, CloneFlags::CLONE_NEWIPC),
        (open("uts")?, CloneFlags::CLONE_NEWUTS),
        (open("mnt")?, CloneFlags::CLONE_NEWNS),
    ];
    namespaces
        .into_iter()
        .try_for_each(|(file, kind)| setns(file, kind))
}

/// Gives this process a /run of its own, with nothing in it but this cache. Without the right to do so the cache is used
/// as it is.
fn cover_cache(cache: Option<&[u8]>) -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
    let copied = cache.map_or(Ok(()), |cache| fs::write(CACHE, cache));
    copied.map_err(|_| nix::errno::Errno::EIO)
}

impl Running {
    /// Waits for the end of each check, but never past its limit. `None` when it could not be started.
    pub fn finish(self) -> Option<Criu> {
        let mut criu = conclude(self.child?, self.started, self.started + self.place.limit);
        if self.place.cached && criu.path.is_some() && criu.status.is_some() {
            let started = Instant::now();
            let again = begin(&self.place, true).ok();
            let again = again.map(|child| conclude(child, started, started + self.place.limit));
            // Without a path there was no cache.
            criu.with_cache = again.filter(|again| again.path.is_some()).map(Box::new);
        }
        Some(criu)
    }
}

fn conclude((pid, reader): (i32, OwnedFd), started: Instant, until: Instant) -> Criu {
    let (text, closed) = read_until(until, reader);
    // What has closed its end is about to exit.
    let ended = child::wait_until(pid, Duration::from_millis(if closed { 200 } else { 0 }));
    let waiting = if ended.is_none() { waiting(pid) } else { Vec::new() };
    if ended.is_none() {
        // The child is the leader of a group that only it and what it started are in.
        sys::kill(-pid, libc::SIGKILL);
        child::end(pid);
    }
    let status = match ended {
        Some(Waited::Exited(status)) => Some(status),
        Some(Waited::Killed(signal)) => Some(128 + signal),
        _ => None,
    };
    let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    parse(&text, status, waiting, micros)
}

/// Reads to the end, which is true, or until the deadline.
fn read_until(deadline: Instant, reader: OwnedFd) -> (String, bool) {
    let mut reader = fs::File::from(reader);
    let (mut bytes, mut buffer) = (Vec::new(), [0u8; 4096]);
    let closed = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let milliseconds = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
        if left.is_zero() || !poll(&mut fds, PollTimeout::from(milliseconds)).is_ok_and(|ready| ready > 0) {
            break false;
        }
        match reader.read(&mut buffer) {
            Ok(0) | Err(_) => break true,
            Ok(count) => bytes.extend_from_slice(buffer.get(..count).unwrap_or_default()),
        }
    };
    (String::from_utf8_lossy(&bytes).into_owned(), closed)
}

/// What CRIU and its children wait for.
fn waiting(pid: i32) -> Vec<String> {
    let describe = |pid: i32| {
        let status = proc::status(pid)?;
        let place = facts::wchan(pid).unwrap_or_else(|| format!("state {}", status.state));
        Some(format!("{}: {place}", status.comm))
    };
    proc::tree(pid).into_iter().filter_map(describe).take(8).collect()
}

fn parse(text: &str, status: Option<i32>, waiting: Vec<String>, micros: u64) -> Criu {
    let mut lines = text.lines();
    let first = |line: Option<&str>| line.map(str::to_owned).filter(|line| !line.is_empty());
    let (path, version) = (first(lines.next()), first(lines.next()));
    let kept = lines
        .clone()
        .map(|line| {
            line.chars()
                .filter(|c| !c.is_control())
                .take(LINE)
                .collect::<String>()
        })
        .filter(|line| !line.is_empty());
    let mut kept: Vec<String> = kept.collect();
    let good = lines.any(|line| line.starts_with("Looks good"));
    if good {
        // What its checks say first: two runs are compared by that, and one of them says more before.
        kept.sort_by_key(|line| !line.contains("cr-check.c:"));
    }
    kept.truncate(LINES);
    Criu {
        good,
        lines: kept,
        path,
        version,
        status,
        waiting,
        micros,
        with_cache: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::damaged::damaged;

    const TEXT: &str = "/usr/sbin/criu\n4.1.1\nWarn  (criu/x.c:1): no soft dirty\nLooks good but some kernel features are missing\n";

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic_or_keep_too_much(text in damaged(TEXT)) {
            let criu = parse(&text, Some(0), Vec::new(), 5);
            proptest::prop_assert!(criu.lines.len() <= LINES);
        }
    }

    #[test]
    fn what_looks_good_apart_from_options_is_good() {
        let criu = parse(TEXT, Some(1), Vec::new(), 5);
        assert!(criu.good);
        assert_eq!(
            (criu.path.as_deref(), criu.version.as_deref()),
            (Some("/usr/sbin/criu"), Some("4.1.1"))
        );
        assert_eq!(criu.lines.len(), 2);
    }

    #[test]
    fn a_machine_without_criu_has_neither_path_nor_version() {
        let criu = parse("", Some(127), Vec::new(), 5);
        assert_eq!((criu.path, criu.version, criu.good), (None, None, false));
    }
}
