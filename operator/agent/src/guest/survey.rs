//! What CRIU would find in a guest if it were run there, asked through the debug console. Changes nothing in the guest.

use std::time::Duration;

use podcheckpoint_crds::Reason;
use tokio::net::UnixStream;

use super::console::{self, ConsoleError};
use super::shell::{Shell, ShellError};
use crate::sandbox::Vsock;
use crate::words::tame;

/// How long all questions may take.
const LIMIT: Duration = Duration::from_secs(5);
/// The programs of the guest that are used, beside its shell and GNU tar.
const PROGRAMS: &str = "criu setsid timeout mkfifo mount umount df head wc sha256sum stty gzip readlink";
/// Memory that the guest keeps for itself, in bytes.
const RESERVE: u64 = 32 << 20;
/// What CRIU writes beside the target's memory, in bytes.
const BESIDE: u64 = 32 << 20;
/// File systems whose contents CRIU saves, or whose contents are the kernel's. Any other has to be there at a restore.
const SAVED: [&str; 13] = [
    "binfmt_misc",
    "cgroup",
    "cgroup2",
    "debugfs",
    "devpts",
    "fusectl",
    "mqueue",
    "proc",
    "pstore",
    "securityfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

/// Why CRIU is not run in the guest.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    /// No console.
    #[error("the guest's debug console is not open")]
    Console(#[from] ConsoleError),
    /// It was lost, or took too long.
    #[error("the guest's debug console broke off")]
    Shell(#[from] ShellError),
    /// It took too long.
    #[error("the guest did not tell within {} s what it has", LIMIT.as_secs())]
    Late,
    /// The image lacks programs.
    #[error("the guest's image lacks {}", .0.join(", "))]
    Missing(Vec<String>),
    /// There is too little memory.
    #[error("CRIU's images may take {needed} bytes of the guest's memory, and {available} are available")]
    Memory {
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that are available.
        available: u64,
    },
    /// The answer makes no sense.
    #[error("the guest does not tell {0}")]
    Nonsense(&'static str),
}

impl SurveyError {
    /// The reason for the status.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Console(_) | Self::Shell(_) => Reason::GuestConsoleClosed,
            Self::Late => Reason::GuestUnreachable,
            Self::Missing(_) => Reason::GuestToolMissing,
            Self::Memory { .. } => Reason::GuestMemoryShort,
            Self::Nonsense(_) => Reason::GuestUnhealthy,
        }
    }
}

/// A guest in which CRIU can be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// Version of CRIU.
    pub criu: Option<String>,
    /// Where GNU tar is.
    pub tar: String,
    /// Bytes that the images may take.
    pub room: u64,
    /// Bytes of memory of the containers.
    pub memory: u64,
    /// The containers in the order in which they were asked for.
    pub containers: Vec<Inner>,
}

/// A container as its guest sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inner {
    /// Its identifier.
    pub id: String,
    /// Its first process.
    pub pid: i32,
    /// When that process started, in clock ticks after the guest's boot.
    pub started: u64,
    /// The same in seconds since 1970.
    pub since: u64,
    /// Where its first three descriptors lead.
    pub descriptors: Vec<String>,
    /// Mount points whose contents CRIU leaves out.
    pub external: Vec<String>,
}

/// Asks the guest about itself and the containers, each with its first process there.
///
/// # Errors
/// What stands in the way.
pub async fn ask(vsock: &Vsock, containers: &[(String, i32)]) -> Result<Survey, SurveyError> {
    let asked = tokio::time::timeout(LIMIT, async {
        let mut shell = console::by_vsock(vsock).await?;
        let answers = answers(&mut shell, containers).await;
        shell.leave().await;
        answers
    });
    asked.await.map_err(|_| SurveyError::Late)?
}

async fn answers(shell: &mut Shell<UnixStream>, containers: &[(String, i32)]) -> Result<Survey, SurveyError> {
    let programs = format!(
        "for p in {PROGRAMS}; do command -v $p > /dev/null || echo MISSING $p; done; \
         t=$(which tar || command -v tar); echo TAR $t; $t --version 2>&1 | head -n 1"
    );
    let tar = programs_of(&shell.run(&programs).await?.text)?;
    let text = shell
        .run("grep -E '^(MemAvailable|btime)' /proc/meminfo /proc/stat; criu --version 2>&1")
        .await?
        .text;
    let value = |key: &str| number_after(&text, key);
    let available = value("MemAvailable:")
        .ok_or(SurveyError::Nonsense("its available memory"))?
        .saturating_mul(1024);
    let booted = value("btime ").ok_or(SurveyError::Nonsense("when it booted"))?;
    let criu = text.lines().find_map(|line| line.strip_prefix("Version: "));
    let (mut inner, mut memory) = (Vec::new(), 0);
    for (id, pid) in containers {
        memory = u64::saturating_add(memory, memory_of(shell, id).await?);
        inner.push(look(shell, id, *pid, booted).await?);
    }
    let needed = memory.saturating_add(BESIDE + RESERVE);
    if available < needed {
        return Err(SurveyError::Memory { needed, available });
    }
    Ok(Survey {
        criu: criu.map(|version| tame(version.trim())),
        tar,
        room: available - RESERVE,
        memory,
        containers: inner,
    })
}

/// Where GNU tar is, if nothing is missing; pure.
fn programs_of(text: &str) -> Result<String, SurveyError> {
    // At the beginning of a line only: line editors show the command once more.
    let words = |mark: &str| {
        let lines = text.lines().filter_map(|line| line.strip_prefix(mark));
        lines.map(|word| tame(word.trim())).collect::<Vec<_>>()
    };
    let mut missing = words("MISSING ");
    let tar = words("TAR ").pop().filter(|path| is_plain(path));
    if tar.is_none() || !text.contains("GNU tar") {
        missing.push("GNU tar".to_owned());
    }
    match tar {
        Some(tar) if missing.is_empty() => Ok(tar),
        _ => Err(SurveyError::Missing(missing)),
    }
}

/// An absolute path that needs no quotes.
fn is_plain(path: &str) -> bool {
    path.starts_with('/')
        && path
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"/._-".contains(&b))
}

fn number_after(text: &str, key: &str) -> Option<u64> {
    let (_, rest) = text.split_once(key)?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Resident anonymous and shared memory of every process of a container, in bytes.
async fn memory_of(shell: &mut Shell<UnixStream>, id: &str) -> Result<u64, ShellError> {
    let ask = format!(
        "for f in $(grep -l {id} /proc/[0-9]*/cgroup); do grep -E '^Rss(Anon|Shmem):' ${{f%cgroup}}status; done"
    );
    let text = shell.run(&ask).await?.text;
    let kibibytes = text.lines().filter_map(|line| number_after(line, ":"));
    Ok(kibibytes.fold(0, u64::saturating_add).saturating_mul(1024))
}

async fn look(shell: &mut Shell<UnixStream>, id: &str, pid: i32, booted: u64) -> Result<Inner, SurveyError> {
    let started = started(shell, pid).await?;
    let started = started.ok_or(SurveyError::Nonsense("when the container started"))?;
    let text = shell
        .run(&format!(
            "for n in 0 1 2; do readlink /proc/{pid}/fd/$n || echo; done"
        ))
        .await?
        .text;
    let lines: Vec<&str> = text.lines().collect();
    let descriptors = lines.iter().rev().take(3).rev().map(|line| tame(line)).collect();
    let mounts = shell.run(&format!("cat /proc/{pid}/mountinfo")).await?.text;
    Ok(Inner {
        id: id.to_owned(),
        pid,
        started,
        // A tick is a hundredth of a second everywhere. A second before, because boot time is a whole one.
        since: booted.saturating_add(started / 100).saturating_sub(1),
        descriptors,
        external: external(&mounts),
    })
}

/// When a process of the guest started, in clock ticks after boot.
pub(super) async fn started(shell: &mut Shell<UnixStream>, pid: i32) -> Result<Option<u64>, ShellError> {
    let text = shell.run(&format!("cat /proc/{pid}/stat")).await?.text;
    // The command is in brackets and may hold anything, brackets included.
    let field = |text: &str| text.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok();
    Ok(field(&text))
}

/// The mount points that CRIU has to be told of, because their contents are neither saved nor part of another mount;
/// pure. The root is not one of them: it is what a restore begins with.
fn external(mountinfo: &str) -> Vec<String> {
    struct Mount<'a> {
        device: &'a str,
        root: &'a str,
        point: &'a str,
        kind: &'a str,
    }
    let mounts: Vec<Mount<'_>> = mountinfo
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let mut fields = before.split(' ').skip(2);
            Some(Mount {
                device: fields.next()?,
                root: fields.next()?,
                point: fields.next()?,
                kind: after.split(' ').next()?,
            })
        })
        .collect();
    let whole = |m: &Mount<'_>| m.point == "/" || (m.root == "/" && SAVED.contains(&m.kind));
    let within = |m: &Mount<'_>, whole: &Mount<'_>| {
        let rest = m.root.strip_prefix(whole.root.trim_end_matches('/'));
        m.device == whole.device && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let known = |m: &Mount<'_>| {
        m.kind.starts_with("cgroup") || mounts.iter().filter(|o| whole(o)).any(|o| within(m, o))
    };
    let external = mounts.iter().filter(|m| m.point != "/" && !known(m));
    external.map(|m| m.point.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_neither_criu_nor_the_rootfs_has_is_external() {
        let mounts = "44 33 0:24 /kata/c1/rootfs / rw - tmpfs tmpfs rw\n\
            45 44 0:30 / /proc rw - proc proc rw\n\
            46 44 0:31 / /dev rw - tmpfs tmpfs rw\n\
            50 49 0:28 /c1 /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n\
            51 44 0:24 /kata/c1/mounts/hosts /etc/hosts rw - tmpfs tmpfs rw\n\
            52 44 0:24 /kata/c1/rootfs/srv /mnt rw - tmpfs tmpfs rw\n\
            53 44 0:24 /kata/c1/rootfs2 /other rw - tmpfs tmpfs rw\n\
            54 45 0:6 /null /proc/kcore ro - devtmpfs devtmpfs rw\n\
            55 45 0:31 /null /proc/keys ro - tmpfs tmpfs rw\n\
            56 44 8:1 / /data rw master:2 - ext4 /dev/sda1 rw\n\
            58 45 0:30 /bus /proc/bus ro - proc proc rw\n";
        assert_eq!(external(mounts), ["/etc/hosts", "/other", "/proc/kcore", "/data"]);
    }

    #[test]
    fn what_the_image_lacks_is_named_and_a_tar_that_is_not_gnus_is_not_one() {
        let good = "TAR /usr/bin/tar\ntar (GNU tar) 1.35\n";
        assert_eq!(programs_of(good).unwrap(), "/usr/bin/tar");
        let missing = |text: &str| programs_of(text).unwrap_err().to_string();
        assert_eq!(
            missing("MISSING criu\nTAR /bin/tar\ntar: unrecognized option '--version'\n"),
            "the guest's image lacks criu, GNU tar"
        );
        assert_eq!(
            missing("TAR /bin/$(x)\nGNU tar\n"),
            "the guest's image lacks GNU tar"
        );
        let echoed = format!("for p in criu; do command -v $p || echo MISSING $p; done; echo TAR $t\n{good}");
        assert!(programs_of(&echoed).is_ok());
        assert_eq!(missing("TAR\n"), "the guest's image lacks GNU tar");
    }
}
