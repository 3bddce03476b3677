//! A dump by the guest's own CRIU, through the debug console, whose images come out of the guest to the node.
//!
//! Nothing that makes the target run again is left to the agent, which may be gone: `dump.sh` is started detached in the
//! guest, holds the images on a tmpfs of its own, and takes everything away when the console's shell ends for whatever
//! reason, or its time is up. So a dump ends well, or fails, or is called off, in one way: the connection ends.

use std::path::{Path, PathBuf};
use std::time::Duration;

use podcheckpoint_crds::Reason;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::console::{self, ConsoleError};
use super::shell::{Shell, ShellError, is_sha256};
use super::survey::{self, Inner, Survey};
use crate::archive::{self, ArchiveError};
use crate::criu;
use crate::node::process::SourceState;
use crate::sandbox::{Vsock, facts};

/// What runs in the guest.
const SCRIPT: &str = include_str!("dump.sh");
/// How often it is asked whether CRIU has ended.
const TICK: Duration = Duration::from_millis(100);
/// How much of CRIU's log is taken after a failure, in bytes.
const LOG: u64 = 1 << 20;
/// How long one look at the target may take.
const LOOK: Duration = Duration::from_secs(5);

/// Why there are no images.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// No console.
    #[error("the guest's debug console is not open")]
    Console(#[from] ConsoleError),
    /// The conversation failed.
    #[error("the images did not come out of the guest")]
    Shell(#[from] ShellError),
    /// The process is another one, or gone.
    #[error("process {0} in the guest has ended")]
    Gone(i32),
    /// CRIU failed, in its own words.
    #[error("CRIU in the guest ended with {status}: {words}")]
    Failed {
        /// Exit status.
        status: String,
        /// What it printed.
        words: String,
        /// Its log.
        log: String,
    },
    /// What was to look after it has ended.
    #[error("the guest has taken the checkpoint back by itself, which it does when its time is up")]
    Abandoned,
    /// The guest names files that CRIU does not write.
    #[error("the guest's list of the images makes no sense: {0}")]
    List(String),
    /// A file is not the one that the guest has.
    #[error("{0} is not what it is in the guest, by its SHA-256")]
    Damaged(String),
    /// The node's disk.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The node's disk.
    #[error("{}", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl DumpError {
    /// The reason for the status, and the words for the message.
    pub fn explain(&self) -> (Reason, String) {
        let reason = match self {
            Self::Console(_) => Reason::GuestConsoleClosed,
            Self::Shell(_) | Self::Abandoned | Self::List(_) | Self::Damaged(_) => {
                Reason::GuestTransferFailed
            }
            Self::Gone(_) => Reason::SourcePodGone,
            Self::Failed { log, words, .. } if is_full(log) || is_full(words) => Reason::GuestMemoryShort,
            Self::Failed { log, words, .. } => {
                let diagnosis = criu::diagnose(words, Some(log));
                return (
                    diagnosis.reason,
                    format!("in the guest: {}", diagnosis.sentence()),
                );
            }
            Self::Archive(error) => error.reason(),
            Self::Disk { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Reason::StorageFull
            }
            Self::Disk { .. } => Reason::StorageNotWritable,
        };
        (reason, crate::node::chain(self))
    }

    /// CRIU's log, when it failed.
    pub fn log(&self) -> Option<&str> {
        match self {
            Self::Failed { log, .. } => Some(log),
            _ => None,
        }
    }
}

fn is_full(words: &str) -> bool {
    words.contains("No space left on device")
}

/// A guest in which a checkpoint may be under way, for whoever has to look at it later.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Place {
    /// The virtual machine monitor's process on the node.
    pub vmm: i32,
    /// When that process started: the number alone may come to mean another one.
    pub started: u64,
    /// The way into the guest.
    pub vsock: Vsock,
    /// The containers that are dumped.
    pub containers: Vec<String>,
    /// The PodCheckpoint's UID, which names what is in the guest meanwhile.
    pub uid: String,
}

/// What is in a guest now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Now {
    /// What the target does.
    pub state: SourceState,
    /// Whether something of the checkpoint is still there.
    pub left: bool,
}

impl Place {
    fn folder(&self) -> String {
        format!("/run/podcheckpoint-{}", self.uid)
    }

    /// Whether the machine is still the one that was recognised.
    pub fn alive(&self) -> bool {
        facts::started(self.vmm) == Some(self.started)
    }

    /// Looks at the target and at what the checkpoint has left, without touching either.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn look(&self) -> Result<Now, String> {
        if !self.alive() {
            return Ok(Now {
                state: SourceState::Gone,
                left: false,
            });
        }
        let mut text = String::new();
        let folder = self.folder();
        let states = self.containers.iter().map(|id| {
            format!(
                "for f in $(grep -l {id} /proc/[0-9]*/cgroup); do f=${{f%cgroup}}status; \
                 echo $f $(grep -E '^(State|TracerPid):' $f); done"
            )
        });
        let asks: Vec<String> = std::iter::once(format!("ls -d {folder}")).chain(states).collect();
        for said in self.ask(&asks).await? {
            text.push_str(&said);
        }
        Ok(now(&text, &folder))
    }

    /// Tells the guest that nobody wants the images any more. It finds out by itself when the console ends, but not
    /// every console does so at once, and before CRIU was started nobody in the guest waits for that.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn call_off(&self) -> Result<(), String> {
        let d = self.folder();
        let end = format!(
            "if [ -s {d}/lease.pid ]; then kill $(cat {d}/lease.pid); else umount -l {d}; rmdir {d}; fi"
        );
        self.ask(&[end]).await.map(drop)
    }

    async fn ask(&self, lines: &[String]) -> Result<Vec<String>, String> {
        let asked = async {
            let mut shell = console::by_vsock(&self.vsock).await?;
            let mut answers = Vec::new();
            for line in lines {
                answers.push(shell.run(line).await?.text);
            }
            shell.leave().await;
            Ok::<_, ConsoleError>(answers)
        };
        match tokio::time::timeout(LOOK, asked).await {
            Ok(answers) => answers.map_err(|error| crate::node::chain(&error)),
            Err(_) => Err(format!("no answer within {} s", LOOK.as_secs())),
        }
    }
}

/// Reads `FOLDER` and lines like `/proc/7/status State: S (sleeping) TracerPid: 0`; pure.
fn now(text: &str, folder: &str) -> Now {
    let mut processes = 0;
    let mut held = None;
    for line in text.lines() {
        let Some((pid, rest)) = line.split_once("/status State: ") else {
            continue;
        };
        let pid = pid.rsplit('/').next().and_then(|pid| pid.parse().ok());
        let tracer = rest.rsplit(' ').next().and_then(|tracer| tracer.parse().ok());
        let (Some(pid), Some(tracer)) = (pid, tracer) else {
            continue;
        };
        processes += 1;
        held = held.or(match rest.chars().next() {
            _ if tracer != 0 => Some(SourceState::Traced {
                pid,
                tracer,
                command: "in the guest".to_owned(),
            }),
            Some('T' | 't') => Some(SourceState::Stopped { pid }),
            _ => None,
        });
    }
    let state = match processes {
        0 => SourceState::Gone,
        _ => SourceState::Runs { processes },
    };
    Now {
        state: held.unwrap_or(state),
        left: text.lines().any(|line| line.trim() == folder),
    }
}

/// One container's dump.
#[derive(Debug)]
pub struct Order<'a> {
    /// The guest.
    pub place: &'a Place,
    /// What the guest has.
    pub survey: &'a Survey,
    /// The container.
    pub target: &'a Inner,
    /// After how long the guest ends it by itself.
    pub limit: Duration,
    /// Root of the archives, for a last look at the room there.
    pub archive_root: &'a Path,
}

impl Order<'_> {
    /// Dumps, and leaves the images in a folder that is there, in the layout of an archive. When this is dropped, the
    /// guest takes everything back.
    ///
    /// # Errors
    /// Why there are no images.
    pub async fn carry_out(&self, folder: &Path) -> Result<(), DumpError> {
        let mut shell = console::by_vsock(&self.place.vsock).await?;
        let done = self.converse(&mut shell, folder).await;
        shell.leave().await;
        done
    }

    async fn converse(&self, shell: &mut Shell<UnixStream>, folder: &Path) -> Result<(), DumpError> {
        self.prepare(shell).await?;
        self.start(shell).await?;
        self.wait(shell).await?;
        self.collect(shell, folder).await
    }

    async fn prepare(&self, shell: &mut Shell<UnixStream>) -> Result<(), DumpError> {
        let (target, d) = (self.target, self.place.folder());
        if survey::started(shell, target.pid).await? != Some(target.started) {
            return Err(DumpError::Gone(target.pid));
        }
        let trap = format!("umask 077; mkdir {d} && trap 'umount -l {d}; rmdir {d}' EXIT && trap exit HUP");
        shell.must("making a folder", &trap).await?;
        let room = self.survey.room >> 10;
        let mount = format!(
            "mount -t tmpfs -o size={room}k,mode=700 podcheckpoint {d} && mkdir {d}/images && mkfifo {d}/lease"
        );
        shell.must("mounting a tmpfs", &mount).await?;
        let without: String = target
            .external
            .iter()
            .map(|point| format!(".{point}\n"))
            .collect();
        for (name, content) in [
            ("script", SCRIPT),
            ("conf", &self.options()),
            ("without", &without),
        ] {
            let hash = Sha256::digest(content.as_bytes());
            let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
            shell
                .send(content.as_bytes(), &hash, &format!("{d}/{name}"))
                .await?;
        }
        shell.must("preparing", &format!("chmod 700 {d}/script")).await?;
        Ok(())
    }

    /// CRIU's options, as a file of its own: a line of the console's shell cannot be long.
    fn options(&self) -> String {
        let d = self.place.folder();
        let mut options = format!(
            "tree {}\nimages-dir {d}/images\nlog-file {d}/dump.log\nverbosity 4\nleave-running\n\
             manage-cgroups ignore\naction-script {d}/script\n",
            self.target.pid
        );
        for point in &self.target.external {
            options.push_str(&format!("external mnt[{point}]:{point}\n"));
        }
        options
    }

    /// From here on the script in the guest answers for the target.
    async fn start(&self, shell: &mut Shell<UnixStream>) -> Result<(), DumpError> {
        let (target, d) = (self.target, self.place.folder());
        let variables = format!(
            "export ROOTFS=/proc/{}/root ROOTFS_SINCE={} ROOTFS_TAR={} ROOTFS_DIFF={d}/rootfs-diff.tar ROOTFS_WITHOUT={d}/without",
            target.pid, target.since, self.survey.tar
        );
        shell.must("naming the target", &variables).await?;
        // Opened for both, so that neither waits for the other.
        shell
            .must("opening the lease", &format!("exec 9<> {d}/lease"))
            .await?;
        let limit = self.limit.as_secs();
        let start = format!(
            "{{ setsid sh {d}/script {d} {limit} dump --config {d}/conf 8< {d}/lease 9>&- < /dev/null > {d}/out 2>&1 & }}; \
             trap - EXIT HUP"
        );
        shell.must("starting CRIU", &start).await?;
        Ok(())
    }

    async fn wait(&self, shell: &mut Shell<UnixStream>) -> Result<(), DumpError> {
        let d = self.place.folder();
        let status = loop {
            let text = shell.run(&format!("readlink {d}/status; ls -d {d}")).await?.text;
            let mut lines = text.lines().map(str::trim);
            if let Some(status) = lines.clone().find(|line| line.parse::<u8>().is_ok()) {
                break status.to_owned();
            }
            if !lines.any(|line| line == d) {
                return Err(DumpError::Abandoned);
            }
            tokio::time::sleep(TICK).await;
        };
        if status == "0" {
            return Ok(());
        }
        let tail = |name: &str| format!("tail -c {LOG} {d}/{name} 2> /dev/null");
        let log = shell.run(&tail("dump.log")).await?.text;
        let words = shell.run(&tail("words")).await?.text;
        Err(DumpError::Failed {
            status,
            words: crate::words::tame(&words),
            log,
        })
    }

    async fn collect(&self, shell: &mut Shell<UnixStream>, folder: &Path) -> Result<(), DumpError> {
        let d = self.place.folder();
        // Kept short by going there: there are a few files for each process.
        let ask = format!(
            "cd {d} && wc -c images/* dump.log rootfs-diff.tar && sha256sum images/* dump.log rootfs-diff.tar"
        );
        let text = shell.must("listing the images", &ask).await?;
        shell.must("leaving the images", "cd /").await?;
        let files = list(&text)?;
        let total = files
            .iter()
            .fold(0, |total: u64, file| total.saturating_add(file.size));
        archive::check_room(self.archive_root, total, 1)?;
        for file in files {
            let path = folder.join(file.on_node());
            let disk = |source| DumpError::Disk {
                path: path.clone(),
                source,
            };
            let mut to = File::create(&path).await.map_err(disk)?;
            let from = format!("{d}/{}", file.name);
            let arrived = shell.receive(&from, file.size, &mut to).await?;
            to.flush().await.map_err(disk)?;
            if arrived != file.sha256 {
                return Err(DumpError::Damaged(file.name));
            }
        }
        Ok(())
    }
}

/// A file of a dump as the guest names it.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    name: String,
    size: u64,
    sha256: String,
}

impl Listed {
    /// Its name in an archive.
    fn on_node(&self) -> String {
        self.name.replace("images/", "checkpoint/")
    }
}

/// Reads what wc and sha256sum have printed; pure. The guest belongs to whoever runs the pod, so its names are checked.
fn list(text: &str) -> Result<Vec<Listed>, DumpError> {
    let mut sizes = std::collections::BTreeMap::new();
    let mut files = Vec::new();
    for line in text.lines() {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            [size, name] if name != "total" && size.parse::<u64>().is_ok() && size.len() < 20 => {
                sizes.insert(name.to_owned(), size.parse().unwrap_or_default());
            }
            [sum, name] if is_sha256(sum) => files.push((sum.to_owned(), name.to_owned())),
            _ => {}
        }
    }
    let listed = files.into_iter().map(|(sha256, name)| {
        let size = sizes.remove(&name);
        let size = size.ok_or_else(|| DumpError::List(format!("{name:?} has no size")))?;
        if is_known(&name) {
            Ok(Listed { name, size, sha256 })
        } else {
            Err(DumpError::List(format!("{name:?} is no name of an image")))
        }
    });
    let listed = listed.collect::<Result<Vec<_>, _>>()?;
    if listed.is_empty() || !sizes.is_empty() {
        return Err(DumpError::List(format!("{} files have no hash", sizes.len())));
    }
    Ok(listed)
}

fn is_known(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    match name.strip_prefix("images/") {
        Some(image) => !image.is_empty() && !image.starts_with('.') && image.chars().all(plain),
        None => name == "dump.log" || name == "rootfs-diff.tar",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUM: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn the_guests_list_is_read_with_sizes_and_hashes() {
        let text = format!(
            "      48 images/core-1.img\n       7 dump.log\n      55 total\n{SUM}  images/core-1.img\n{SUM}  dump.log\n"
        );
        let files = list(&text).unwrap();
        let seen: Vec<_> = files.iter().map(|f| (f.on_node(), f.size)).collect();
        assert_eq!(
            seen,
            [("checkpoint/core-1.img".into(), 48), ("dump.log".into(), 7)]
        );
    }

    #[test]
    fn a_guest_that_names_a_file_outside_of_the_archive_is_not_believed() {
        for name in [
            "../../etc/passwd",
            "images/../x",
            "images/.x",
            "images/",
            "/x",
            "spec.dump",
        ] {
            let text = format!("1 {name}\n{SUM}  {name}\n");
            assert!(matches!(list(&text), Err(DumpError::List(_))), "{name}");
        }
        assert!(list("").is_err());
        assert!(list("1 images/a.img\n").is_err());
    }

    #[test]
    fn a_target_is_said_to_run_only_when_no_process_is_held() {
        let line = |pid: u32, state: &str, tracer: u32| {
            format!("/proc/{pid}/status State: {state} TracerPid: {tracer}\n")
        };
        let (runs, folder) = (line(7, "S (sleeping)", 0), "/run/podcheckpoint-u");
        let state = |text: &str| now(text, folder).state;
        assert_eq!(state(&runs), SourceState::Runs { processes: 1 });
        assert_eq!(
            state(&format!("{runs}{}", line(8, "t (tracing stop)", 9))),
            SourceState::Traced {
                pid: 8,
                tracer: 9,
                command: "in the guest".into()
            }
        );
        assert_eq!(state(&line(8, "T (stopped)", 0)), SourceState::Stopped { pid: 8 });
        assert_eq!(state(""), SourceState::Gone);
        assert!(now(&format!("{folder}\n{runs}"), folder).left);
        assert!(
            !now(
                &format!("ls: {folder}: No such file or directory\n{runs}"),
                folder
            )
            .left
        );
    }
}
