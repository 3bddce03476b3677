//! The order of a snapshot: look, refuse what cannot work, arm the watchdog, pause, save, resume, on every path.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, SeekFrom, seek};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::watchdog::{Watchdog, release_in_the_end};
use super::{Description, Disk, Driver, Handle, VmError, on_disk};
use crate::archive::{self, ArchiveError};
use crate::sandbox::view::{Found, View};
use crate::sandbox::{Machine, ShimKind, VmmKind};
use crate::words::tame;

/// How much longer than the agent the watchdog waits.
const GRACE: Duration = Duration::from_secs(2);
/// Kata's shim in Go asks the guest's agent every 5 s and waits for 30 s (virtcontainers/monitor.go).
const KATA_GO: Duration = Duration::from_secs(25);
/// Kata's shim in Rust asks every 30 s and waits for 90 s (health_check_request_timeout_ms).
const KATA_RUST: Duration = Duration::from_secs(80);
/// How much is written to find out how fast the disk is.
const TRIAL: usize = 32 << 20;

/// How long that may take: no machine is paused for a disk that is slower, or hangs.
const TRIAL_LIMIT: Duration = Duration::from_secs(20);
/// How long the watchdog may take to start.
const ARM: Duration = Duration::from_secs(10);

/// What a snapshot may do.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Folder of all archives.
    pub archive_root: PathBuf,
    /// Until when it must have ended.
    pub deadline: Duration,
    /// What may be lost is accepted.
    pub allow_degraded: bool,
    /// Fires when it is called off.
    pub cancelled: CancellationToken,
}

/// What is known before anything is done.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Estimate {
    /// Bytes that are written at most.
    pub bytes: u64,
    /// Bytes a second that the disk of the archive root took just now.
    pub speed: u64,
    /// How long the machine may stand still.
    pub allowed: Duration,
}

/// A snapshot that has been taken; the machine runs.
#[derive(Clone, Debug)]
pub struct Taken {
    /// What the monitor said before.
    pub description: Description,
    /// Its disks, with the copies that were made.
    pub disks: Vec<Copied>,
    /// How long the machine stood still.
    pub paused: Duration,
    /// How it is restored.
    pub restore_with: &'static [&'static str],
}

/// A disk and its copy.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Copied {
    /// The disk.
    #[serde(flatten)]
    pub disk: Disk,
    /// Its copy in the archive, of the moment of the memory.
    pub copy: Option<String>,
    /// Why there is none.
    pub not_copied: Option<String>,
}

/// A machine that can be saved as far as is known.
pub struct Ready {
    handle: Handle,
    driver: Box<dyn Driver>,
    description: Description,
    estimate: Estimate,
}

impl Ready {
    /// In words, for a finding.
    pub fn words(&self) -> String {
        let (d, e) = (&self.description, &self.estimate);
        tame(&format!(
            "{} {}: {}; at most {} MiB to write at {} MiB/s, {} s allowed",
            self.handle.vmm.as_str(),
            d.version,
            d.state,
            e.bytes >> 20,
            e.speed >> 20,
            e.allowed.as_secs()
        ))
    }
}

/// Looks at a machine and refuses what could not be saved, or not in time. Changes nothing.
///
/// # Errors
/// Why it cannot be saved.
pub async fn check(machine: &Machine, limits: &Limits) -> Result<Ready, VmError> {
    let handle = Handle::of(machine);
    let stopped = |error: VmError| explain_stopped(error, machine.pid);
    let mut driver = handle.open().await.map_err(stopped)?;
    let description = driver.describe().await.map_err(stopped)?;
    if !description.running {
        return Err(VmError::NotRunning(description.state));
    }
    let mut blockers = description.blockers.clone();
    if !limits.allow_degraded {
        blockers.extend(resets_vsock(machine));
    }
    if !blockers.is_empty() {
        return Err(VmError::Devices(blockers));
    }
    let bytes = bytes(machine, &description);
    let root = limits.archive_root.clone();
    let jail = (machine.vmm == VmmKind::Firecracker).then_some((machine.pid, memory(machine, &description)));
    let trial = move || {
        jail.map_or(Ok(()), |(pid, memory)| room_in_jail(pid, memory, &root))?;
        room_and_speed(&root, bytes)
    };
    let speed = on_disk(TRIAL_LIMIT, &limits.archive_root, trial).await?;
    let estimate = Estimate {
        bytes,
        speed,
        allowed: allowed(machine.shim, limits.deadline),
    };
    fits(&estimate)?;
    Ok(Ready {
        handle,
        driver,
        description,
        estimate,
    })
}

/// A stopped monitor accepts and says nothing, which is not what another client looks like.
fn explain_stopped(error: VmError, pid: i32) -> VmError {
    let state = crate::node::process::Facts::of(pid).map(|facts| facts.state);
    match (&error, state) {
        (VmError::Busy(_) | VmError::Answer { .. }, Some('T' | 't')) => VmError::Answer {
            request: "the virtual machine monitor".to_owned(),
            answer: format!("process {pid} is stopped by a signal or a tracer and answers nothing"),
        },
        _ => error,
    }
}

/// Kata's shim talks to the guest's agent over vsock and ends a sandbox whose agent it has lost.
fn resets_vsock(machine: &Machine) -> Option<String> {
    let firecracker = machine.vmm == VmmKind::Firecracker && machine.shim != ShimKind::Other;
    firecracker.then(|| {
        "a snapshot by Firecracker closes the guest's vsock connections, the one to Kata's agent among them, after which Kata may end the pod; to go on nevertheless, set allowDegraded".to_owned()
    })
}

fn allowed(shim: ShimKind, deadline: Duration) -> Duration {
    match shim {
        ShimKind::KataGo => deadline.min(KATA_GO),
        ShimKind::KataRust => deadline.min(KATA_RUST),
        ShimKind::Other => deadline,
    }
}

/// Whether the state can be written in time; pure.
fn fits(estimate: &Estimate) -> Result<(), VmError> {
    let seconds = estimate.bytes as f64 / estimate.speed.max(1) as f64;
    if seconds <= estimate.allowed.as_secs_f64() {
        return Ok(());
    }
    Err(VmError::Budget(format!(
        "{} MiB to write at {} MiB/s take about {seconds:.0} s, and the machine may stand still for {} s",
        estimate.bytes >> 20,
        estimate.speed >> 20,
        estimate.allowed.as_secs()
    )))
}

/// Bytes to write: the memory, and the disks' files that are copied.
fn bytes(machine: &Machine, description: &Description) -> u64 {
    let writable = description.disks.iter().filter(|disk| !disk.read_only);
    let disks: u64 = writable
        .filter_map(|disk| file_of(disk, machine.pid).ok())
        .map(|(_, size)| size)
        .sum();
    memory(machine, description).saturating_add(disks)
}

/// QEMU writes no memory that the guest has never used, so that what it has in memory is enough; the others write all.
fn memory(machine: &Machine, description: &Description) -> u64 {
    let resident = resident(machine.pid);
    let whole = description.memory.or(machine.memory).unwrap_or(resident);
    match machine.vmm {
        VmmKind::CloudHypervisor | VmmKind::Firecracker => whole,
        _ => whole.min(resident.max(1)),
    }
}

/// Firecracker writes inside its jail, from where the state is copied to the archive root.
fn room_in_jail(pid: i32, memory: u64, root: &Path) -> Result<(), VmError> {
    use std::os::unix::fs::MetadataExt;
    let place = Path::new("the jail of Firecracker");
    let wrong = VmError::disk(place);
    let jail = View::root_of(pid).map_err(&wrong)?;
    let same = fs::metadata(jail.name()).and_then(|jail| Ok(jail.dev() == fs::metadata(root)?.dev()));
    let copies = if same.map_err(&wrong)? { 2 } else { 1 };
    archive::check_room(&jail.name(), memory, copies).map_err(|error| VmError::Disk {
        path: place.to_owned(),
        full: error.reason() == podcheckpoint_crds::Reason::StorageFull,
        why: error.to_string(),
    })
}

/// Memory of a process that is in memory or swapped out, from /proc/PID/status.
fn resident(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    // Huge pages are in none of the others, proc_pid_status(5).
    let wanted = ["RssAnon:", "RssShmem:", "RssFile:", "VmSwap:", "HugetlbPages:"];
    let lines = status
        .lines()
        .filter(|line| wanted.iter().any(|key| line.starts_with(key)));
    let kibibytes = lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kibibytes.sum::<u64>() * 1024
}

fn room_and_speed(root: &Path, bytes: u64) -> Result<u64, VmError> {
    let disk = |error: ArchiveError| {
        let full = error.reason() == podcheckpoint_crds::Reason::StorageFull;
        VmError::Disk {
            path: root.to_owned(),
            why: error.to_string(),
            full,
        }
    };
    archive::check_room(root, bytes, 1).map_err(disk)?;
    static TRIALS: AtomicUsize = AtomicUsize::new(0);
    let number = TRIALS.fetch_add(1, Ordering::Relaxed);
    let path = root.join(format!(".speed-{}-{number}", std::process::id()));
    let begun = Instant::now();
    let written = File::create(&path).and_then(|mut file| {
        // Without a name it goes with whoever dies in the middle.
        fs::remove_file(&path)?;
        let chunk = vec![0x5a; 1 << 20];
        (0..TRIAL >> 20).try_for_each(|_| file.write_all(&chunk))?;
        file.sync_data()
    });
    let took = begun.elapsed();
    written.map_err(VmError::disk(&path))?;
    Ok((TRIAL as f64 / took.as_secs_f64().max(0.000_1)) as u64)
}

/// Takes the snapshot into a folder that is there and empty. Whatever comes of it, the machine runs when this returns,
/// or it said so.
///
/// # Errors
/// Why there is none, and whether the machine runs nevertheless is for the caller to ask.
pub async fn take(ready: Ready, folder: &Path, limits: &Limits) -> Result<Taken, VmError> {
    let Ready {
        handle,
        mut driver,
        description,
        estimate,
    } = ready;
    driver.prepare(folder).await?;
    let watchdog = arm(&handle, estimate.allowed, limits, driver.connection()).await?;
    let restore_with = driver.restore_with();
    let begun = Instant::now();
    let saved = tokio::select! {
        saved = hold(driver.as_mut(), folder, &description, handle.pid) => saved,
        () = tokio::time::sleep(estimate.allowed) => Err(late(&estimate, limits)),
        () = limits.cancelled.cancelled() => Err(VmError::Cancelled),
    };
    let resumed = driver.resume().await;
    let paused = begun.elapsed();
    // A monitor that serves one client must be free for the watchdog.
    drop(driver);
    let runs = resumed.is_ok();
    let end = move || {
        if runs {
            watchdog.disarm()
        } else {
            watchdog.release()
        }
    };
    if let Ok(Err(error)) = tokio::task::spawn_blocking(end).await {
        tracing::error!(%error, "the watchdog is gone");
        if !runs {
            release_in_the_end(&handle).await;
        }
    }
    let disks = saved?;
    resumed?;
    Ok(Taken {
        description,
        disks,
        paused,
        restore_with,
    })
}

/// The watchdog looks at the archive root, whose disk may hang.
async fn arm(
    handle: &Handle,
    allowed: Duration,
    limits: &Limits,
    connection: Option<OwnedFd>,
) -> Result<Watchdog, VmError> {
    let (handle, root) = (handle.clone(), limits.archive_root.clone());
    let arm = move || Watchdog::arm(&handle, allowed + GRACE, &root, connection, ARM);
    // Starting a process may take as long as the word that it waits.
    match tokio::time::timeout(ARM * 2, tokio::task::spawn_blocking(arm)).await {
        Ok(Ok(armed)) => armed,
        Ok(Err(error)) => Err(VmError::Watchdog(error.to_string())),
        Err(_) => Err(VmError::Watchdog(format!(
            "it was not there within {} s",
            (ARM * 2).as_secs()
        ))),
    }
}

fn late(estimate: &Estimate, limits: &Limits) -> VmError {
    if estimate.allowed >= limits.deadline {
        return VmError::Late(estimate.allowed);
    }
    VmError::Budget(format!(
        "the snapshot was not written within the {} s that the sandbox may stand still, at most {} MiB; the machine was made to run again",
        estimate.allowed.as_secs(),
        estimate.bytes >> 20
    ))
}

async fn hold(
    driver: &mut dyn Driver,
    folder: &Path,
    description: &Description,
    pid: i32,
) -> Result<Vec<Copied>, VmError> {
    driver.pause().await?;
    driver.save(folder).await?;
    let (disks, folder) = (description.disks.clone(), folder.to_owned());
    // Given up with this future: a copy must not go on in a folder that is being removed.
    let stop = CancellationToken::new();
    let guard = stop.clone().drop_guard();
    let copied = tokio::task::spawn_blocking(move || copy_disks(disks, pid, &folder, &stop)).await;
    drop(guard);
    copied.map_err(|error| VmError::Watchdog(error.to_string()))?
}

fn copy_disks(
    disks: Vec<Disk>,
    pid: i32,
    folder: &Path,
    stop: &CancellationToken,
) -> Result<Vec<Copied>, VmError> {
    let copy = |(number, disk): (usize, Disk)| {
        let not = |why: &str| {
            Ok(Copied {
                disk: disk.clone(),
                copy: None,
                not_copied: Some(why.to_owned()),
            })
        };
        if disk.read_only {
            return not("the guest cannot write to it");
        }
        let (found, _) = match file_of(&disk, pid) {
            Ok(found) => found,
            Err(why) => return not(&why),
        };
        let name = format!("disk{number}");
        let to = folder.join(&name);
        found
            .read()
            .and_then(|source| copy_sparse(&source, &to, stop))
            .map_err(VmError::disk(&to))?;
        Ok(Copied {
            disk,
            copy: Some(name),
            not_copied: None,
        })
    };
    disks.into_iter().enumerate().map(copy).collect()
}

/// The file of a disk as the monitor sees it, and how many bytes of it are on the disk.
fn file_of(disk: &Disk, pid: i32) -> Result<(Found, u64), String> {
    let path = Path::new(&disk.file);
    if !path.is_absolute() {
        return Err(format!("{:?} is no file", disk.file));
    }
    let found = View::root_of(pid).and_then(|root| root.find(path));
    let found = found.map_err(|error| format!("{}: {error}", disk.file))?;
    if found.is(FileType::RegularFile) {
        let blocks = u64::try_from(found.stat.st_blocks).unwrap_or_default();
        Ok((found, blocks.saturating_mul(512)))
    } else {
        Err(format!("{} is no regular file", disk.file))
    }
}

/// Copies a file with its holes; on file systems that can, its blocks are shared.
pub(super) fn copy_sparse(source: &File, to: &Path, stop: &CancellationToken) -> io::Result<()> {
    let target = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)?;
    if rustix::fs::ioctl_ficlone(target.as_fd(), source.as_fd()).is_ok() {
        return Ok(());
    }
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut at = 0;
    while at < length {
        // ENXIO: nothing but a hole is left.
        let Ok(data) = seek(source, SeekFrom::Data(at)) else {
            break;
        };
        let hole = seek(source, SeekFrom::Hole(data)).unwrap_or(length);
        copy_range(source, &target, data..hole, stop)?;
        at = hole;
    }
    Ok(())
}

fn copy_range(source: &File, target: &File, range: Range<u64>, stop: &CancellationToken) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; 1 << 20];
    let mut at = range.start;
    while at < range.end {
        if stop.is_cancelled() {
            return Err(io::Error::other("given up"));
        }
        let want = usize::try_from(range.end - at)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let part = buffer.get_mut(..want).unwrap_or_default();
        let read = source.read_at(part, at)?;
        if read == 0 {
            break;
        }
        target.write_all_at(part.get(..read).unwrap_or_default(), at)?;
        at += read as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_that_the_health_check_would_not_survive_is_refused_with_the_numbers() {
        let estimate = |allowed| Estimate {
            bytes: 4 << 30,
            speed: 100 << 20,
            allowed,
        };
        let allowed = super::allowed(ShimKind::KataGo, Duration::from_secs(300));
        let VmError::Budget(words) = fits(&estimate(allowed)).unwrap_err() else {
            panic!("no budget")
        };
        assert_eq!(
            words,
            "4096 MiB to write at 100 MiB/s take about 41 s, and the machine may stand still for 25 s"
        );
        assert!(
            fits(&estimate(super::allowed(
                ShimKind::KataRust,
                Duration::from_secs(300)
            )))
            .is_ok()
        );
    }

    #[test]
    fn the_users_deadline_is_kept_where_no_health_check_is_known() {
        assert_eq!(
            allowed(ShimKind::Other, Duration::from_secs(7)),
            Duration::from_secs(7)
        );
        assert_eq!(
            allowed(ShimKind::KataGo, Duration::from_secs(7)),
            Duration::from_secs(7)
        );
    }

    #[test]
    fn monitors_with_an_http_interface_write_the_whole_memory() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let description = Description {
            memory: Some(1 << 50),
            ..Description::default()
        };
        let of = |vmm| {
            let machine = Machine {
                vmm,
                pid,
                started: 1,
                arguments: Vec::new(),
                monitor: None,
                vsock: None,
                memory: None,
                confidential: None,
                domain: None,
                shim: ShimKind::Other,
            };
            memory(&machine, &description)
        };
        assert_eq!(of(VmmKind::Firecracker), 1 << 50);
        assert_eq!(of(VmmKind::CloudHypervisor), 1 << 50);
        assert!(of(VmmKind::Qemu) < 1 << 40);
        let root = std::env::temp_dir();
        let full = room_in_jail(pid, 1 << 60, &root).unwrap_err();
        assert_eq!(full.reason(), podcheckpoint_crds::Reason::StorageFull);
        assert!(room_in_jail(pid, 0, &root).is_ok());
    }

    #[test]
    fn a_copy_has_the_contents_and_the_holes() {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"middle", 32 << 20).unwrap();
        let stop = CancellationToken::new();
        copy_sparse(&File::open(&from).unwrap(), &to, &stop).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn a_copy_that_was_given_up_writes_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        fs::write(&from, b"x").unwrap();
        let (source, target) = (File::open(&from).unwrap(), File::create(&to).unwrap());
        let stop = CancellationToken::new();
        stop.cancel();
        assert!(copy_range(&source, &target, 0..1, &stop).is_err());
        assert_eq!(fs::metadata(&to).unwrap().len(), 0);
    }
}
