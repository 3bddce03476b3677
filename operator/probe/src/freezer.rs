//! By which cgroups a process can be frozen, in cgroup v1 and v2, and whether it is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::observation::FreezerState;
use crate::proc;

/// A cgroup could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FreezerError {
    /// A file could not be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The process is in no cgroup that could be frozen.
    #[error("process {0} is in no cgroup of its own that can be frozen")]
    NoFreezer(i32),
}

/// Which freezer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Version {
    /// The freezer hierarchy of cgroup v1: freezer.state.
    V1,
    /// The unified hierarchy: cgroup.freeze and cgroup.events.
    V2,
}

/// A cgroup that can be frozen.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Freezer {
    /// Which freezer.
    pub version: Version,
    /// Folder of the cgroup.
    pub path: PathBuf,
}

impl Freezer {
    /// The freezer of the container whose process this is. In the hybrid layout it is v1's: that is what the runtimes
    /// use there.
    ///
    /// # Errors
    /// When the process is gone or is in the root cgroup.
    pub fn of_process(pid: i32) -> Result<Self, FreezerError> {
        Self::all_of_process(pid)?
            .into_iter()
            .next()
            .ok_or(FreezerError::NoFreezer(pid))
    }

    /// Every freezer that holds a process: in the hybrid layout it can be frozen by either hierarchy. v1 comes first.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn all_of_process(pid: i32) -> Result<Vec<Self>, FreezerError> {
        let membership = read(Path::new(&format!("/proc/{pid}/cgroup")))?;
        let mounts = read(Path::new("/proc/self/mountinfo"))?;
        Ok(find(&membership, &mounts))
    }

    /// Whether it is frozen, also by one of its ancestors, or about to be.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn is_frozen(&self) -> Result<bool, FreezerError> {
        match self.version {
            Version::V1 => Ok(read(&self.path.join("freezer.state"))?.trim() != "THAWED"),
            // cgroup.events says what is so; cgroup.freeze only what is wanted of this one cgroup.
            Version::V2 => {
                let wanted = read(&self.path.join("cgroup.freeze"))?.trim() == "1";
                let frozen = read(&self.path.join("cgroup.events"))?
                    .lines()
                    .any(|line| line == "frozen 1");
                Ok(wanted || frozen)
            }
        }
    }

    /// Whether this very cgroup was told to freeze, and not only one above it.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn is_told_to_freeze(&self) -> Result<bool, FreezerError> {
        is_told(self.version, &self.path)
    }

    /// Whether all that was told to freeze is frozen; cgroup v1 takes several attempts.
    pub fn has_come_to_rest(&self) -> bool {
        match self.version {
            Version::V1 => {
                read(&self.path.join("freezer.state")).is_ok_and(|state| state.trim() != "FREEZING")
            }
            Version::V2 => true,
        }
    }

    /// What it does now, and which cgroup above it was told to freeze.
    pub fn state(&self) -> FreezerState {
        let frozen = self.is_frozen().unwrap_or(false);
        let told = |folder: &&Path| is_told(self.version, folder).unwrap_or(false);
        let by = self.path.ancestors().find(told).filter(|_| frozen);
        FreezerState {
            version: self.number(),
            path: self.path.display().to_string(),
            frozen,
            by: by.map(|path| path.display().to_string()),
        }
    }

    /// The container that it is of. Runtimes name the cgroup after it: ID, or PREFIX-ID.scope under systemd.
    pub fn container(&self) -> Option<&str> {
        let name = self.path.file_name()?.to_str()?;
        let name = name.strip_suffix(".scope").unwrap_or(name);
        let id = name.rsplit('-').next()?;
        (!id.is_empty() && id.bytes().all(|b| b.is_ascii_hexdigit())).then_some(id)
    }

    /// Every process in it and below.
    pub fn processes(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        let mut folders = vec![self.path.clone()];
        while let Some(folder) = folders.pop() {
            if let Ok(text) = fs::read_to_string(folder.join("cgroup.procs")) {
                pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            }
            let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
            folders.extend(
                entries
                    .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
                    .map(|e| e.path()),
            );
        }
        pids
    }

    /// 1 or 2, as the status shows it.
    pub fn number(&self) -> i32 {
        match self.version {
            Version::V1 => 1,
            Version::V2 => 2,
        }
    }
}

fn is_told(version: Version, folder: &Path) -> Result<bool, FreezerError> {
    let file = match version {
        Version::V1 => "freezer.self_freezing",
        Version::V2 => "cgroup.freeze",
    };
    Ok(read(&folder.join(file))?.trim() == "1")
}

fn read(path: &Path) -> Result<String, FreezerError> {
    proc::text(path).map_err(|source| FreezerError::Io {
        path: path.to_owned(),
        source,
    })
}

/// Finds the freezers from /proc/PID/cgroup (cgroups(7)) and /proc/self/mountinfo (proc(5)).
fn find(membership: &str, mountinfo: &str) -> Vec<Freezer> {
    let line = |wanted: &dyn Fn(&str, &str) -> bool| {
        membership.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            (wanted(id, controllers) && path != "/").then(|| path.to_owned())
        })
    };
    let freezer = |version, mount: Option<PathBuf>, path: Option<String>| {
        Some(Freezer {
            version,
            path: mount?.join(path?.trim_start_matches('/')),
        })
    };
    let v1 = line(&|_, controllers| controllers.split(',').any(|c| c == "freezer"));
    let v2 = line(&|id, controllers| id == "0" && controllers.is_empty());
    let v1 = freezer(Version::V1, mount(mountinfo, "cgroup", Some("freezer")), v1);
    let v2 = freezer(Version::V2, mount(mountinfo, "cgroup2", None), v2);
    v1.into_iter().chain(v2).collect()
}

/// Mount point of a whole cgroup file system, not of a part of it; the last one wins, since it covers those before.
fn mount(mountinfo: &str, kind: &str, option: Option<&str>) -> Option<PathBuf> {
    let of = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let found = after.next()? == kind;
        let options = after.nth(1).unwrap_or_default();
        let mut before = before.split(' ').skip(3);
        let (root, point) = (before.next()?, before.next()?);
        (found && root == "/" && option.is_none_or(|o| options.split(',').any(|x| x == o)))
            .then(|| PathBuf::from(point))
    };
    mountinfo.lines().filter_map(of).next_back()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::damaged::damaged;

    const HYBRID: &str = "86 85 0:28 / /sys/fs/cgroup rw shared:12 - tmpfs tmpfs rw,mode=755\n\
        92 86 0:34 / /sys/fs/cgroup/freezer rw,relatime shared:18 - cgroup cgroup rw,freezer\n\
        96 86 0:38 / /sys/fs/cgroup/unified rw,relatime shared:22 - cgroup2 cgroup2 rw\n";

    #[test]
    fn in_the_hybrid_layout_both_can_freeze_and_v1_comes_first() {
        let found = find("6:freezer:/kubepods/pod1/c1\n0::/kubepods/pod1/c1\n", HYBRID);
        let paths: Vec<_> = found
            .iter()
            .map(|f| (f.version, f.path.to_str().unwrap()))
            .collect();
        assert_eq!(
            paths,
            [
                (Version::V1, "/sys/fs/cgroup/freezer/kubepods/pod1/c1"),
                (Version::V2, "/sys/fs/cgroup/unified/kubepods/pod1/c1"),
            ]
        );
    }

    #[test]
    fn the_unified_hierarchy_is_taken_where_there_is_no_other() {
        let mounts = "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = find("0::/kubepods.slice/c1.scope\n", mounts);
        assert_eq!(
            found.first().unwrap().path,
            Path::new("/sys/fs/cgroup/kubepods.slice/c1.scope")
        );
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn the_container_is_read_from_the_name_of_its_cgroup() {
        let of = |path: &str| {
            Freezer {
                version: Version::V2,
                path: path.into(),
            }
            .container()
            .map(str::to_owned)
        };
        assert_eq!(of("/sys/fs/cgroup/kubepods/pod1/ab12"), Some("ab12".into()));
        assert_eq!(
            of("/sys/fs/cgroup/kubepods.slice/cri-containerd-ab12.scope"),
            Some("ab12".into())
        );
        assert_eq!(of("/sys/fs/cgroup/system.slice"), None);
    }

    #[test]
    fn a_mount_of_a_part_of_a_hierarchy_is_not_taken_for_the_whole() {
        let mounts = format!("{HYBRID}99 86 0:34 /kubepods/agent /mnt rw - cgroup cgroup rw,freezer\n");
        let found = find("6:freezer:/kubepods/pod1/c1\n", &mounts);
        assert_eq!(
            found.first().unwrap().path,
            Path::new("/sys/fs/cgroup/freezer/kubepods/pod1/c1")
        );
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            membership in damaged("6:freezer:/kubepods/pod1/c1\n0::/kubepods/pod1/c1\n"),
            mounts in damaged(HYBRID),
        ) {
            let _ = find(&membership, &mounts);
            let path = PathBuf::from(membership);
            let _ = Freezer { version: Version::V2, path }.container();
        }
    }

    #[test]
    fn the_root_cgroup_is_never_a_container() {
        assert_eq!(find("6:freezer:/\n0::/\n", HYBRID), []);
    }
}
