//! By which cgroups a process can be frozen, in cgroup v1 and v2, and whether it is.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::observation::FreezerState;
use crate::proc;

/// How many cgroups of a container are looked at for one that is frozen, those next to its own first. Runtimes freeze its
/// own or one right below; a container that makes thousands of them is not to keep whoever looks from working.
const LOOKED_AT: usize = 64;

/// How many digits make a cgroup's name that of another container, and not one that happens to be hexadecimal.
const DIGITS_OF_ID: usize = 32;

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

/// A cgroup that can be frozen, with those below it: a container's is the one that is named after the container.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Freezer {
    /// Which freezer.
    pub version: Version,
    /// Folder of the cgroup.
    pub path: PathBuf,
}

impl Freezer {
    /// The freezer of the cgroup that a process is in, which need not be its container's, see [`Self::of_container`]. In
    /// the hybrid layout it is v1's: that is what the runtimes use there.
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

    /// The freezer of a container, by one of its processes. The process may be in a cgroup below the container's: an init
    /// moves itself to one before it makes others, and crun puts the processes in one below the scope. runc freezes the
    /// container's own, so this is what is to be looked at and thawed.
    ///
    /// # Errors
    /// When the process is gone, or is in no cgroup of that container that can be frozen.
    pub fn of_container(pid: i32, container: &str) -> Result<Self, FreezerError> {
        Self::all_of_process(pid)?
            .iter()
            .find_map(|freezer| freezer.up_to(container))
            .ok_or(FreezerError::NoFreezer(pid))
    }

    /// The cgroup at or above this one that is named after a container. What is below it is the container's own making,
    /// so the first such name counts.
    fn up_to(&self, container: &str) -> Option<Self> {
        let names = |path: &Path| {
            let name = path.file_name().map(|name| name.to_string_lossy());
            !container.is_empty() && name.is_some_and(|name| name.contains(container))
        };
        // From the leaf to the root: the last one is the first name.
        let path = self.path.ancestors().filter(|path| names(path)).last()?;
        Some(self.at(path.to_owned()))
    }

    fn at(&self, path: PathBuf) -> Self {
        Self {
            version: self.version,
            path,
        }
    }

    /// It and the cgroups below it, those next to it first: a runtime may have told any of them to freeze. Those of
    /// containers inside this container are left out: nobody who freezes this one tells them, but who runs them may.
    pub fn levels(&self) -> impl Iterator<Item = Self> {
        let mut waiting = VecDeque::from([self.clone()]);
        std::iter::from_fn(move || {
            let level = waiting.pop_front()?;
            let below = folders(&level.path).map(|path| level.at(path));
            waiting.extend(below.filter(|below| !below.is_named_by_id()));
            Some(level)
        })
    }

    fn is_named_by_id(&self) -> bool {
        self.container().is_some_and(|id| id.len() >= DIGITS_OF_ID)
    }

    /// Whether it is frozen or about to be, also by one of its ancestors, or a part of it below.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn is_frozen(&self) -> Result<bool, FreezerError> {
        Ok(self.frozen_level()?.is_some())
    }

    /// The cgroup that is frozen or about to be: this one, also by one of its ancestors, or the nearest below. No file of
    /// this one tells of those below: it says what holds for all of it.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn frozen_level(&self) -> Result<Option<Self>, FreezerError> {
        if self.is_itself_frozen()? {
            return Ok(Some(self.clone()));
        }
        let mut below = self.levels().take(LOOKED_AT).skip(1);
        // What vanishes meanwhile is frozen no more.
        Ok(below.find(|level| level.is_itself_frozen().unwrap_or(false)))
    }

    fn is_itself_frozen(&self) -> Result<bool, FreezerError> {
        match self.version {
            // The ancestors' orders are in it, freezer.parent_freezing.
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
        // What is frozen below does not hold a process that is in this one.
        let frozen = self.is_itself_frozen().unwrap_or(false);
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
        let mut waiting = vec![self.path.clone()];
        while let Some(folder) = waiting.pop() {
            if let Ok(text) = fs::read_to_string(folder.join("cgroup.procs")) {
                pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            }
            waiting.extend(folders(&folder));
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

/// The folders in a folder; none when it is gone.
fn folders(path: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
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

    /// The container's freezer where its process is said to be in this cgroup.
    fn of_container(membership: &str, mounts: &str, container: &str) -> Option<(Version, String)> {
        let found = find(membership, mounts);
        let freezer = found.iter().find_map(|freezer| freezer.up_to(container))?;
        Some((freezer.version, freezer.path.display().to_string()))
    }

    const UNIFIED: &str = "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn a_process_below_its_containers_cgroup_is_of_the_containers_freezer() {
        let scope = "/kubepods.slice/kubepods-pod1.slice/cri-containerd-ab12.scope";
        let wanted = (Version::V2, format!("/sys/fs/cgroup{scope}"));
        // docker in docker, systemd, crun, and both of crun and one of them.
        for below in ["", "/init", "/init.scope", "/container", "/container/init.scope"] {
            let found = of_container(&format!("0::{scope}{below}\n"), UNIFIED, "ab12");
            assert_eq!(found, Some(wanted.clone()), "{below}");
        }
        let found = of_container("6:freezer:/kubepods/pod1/ab12/init\n0::/\n", HYBRID, "ab12");
        let wanted = "/sys/fs/cgroup/freezer/kubepods/pod1/ab12".to_owned();
        assert_eq!(found, Some((Version::V1, wanted)));
    }

    #[test]
    fn a_container_that_names_a_cgroup_of_its_own_after_itself_is_still_looked_at_as_a_whole() {
        let found = of_container("0::/pod1/ab12/docker/ab12/init\n", UNIFIED, "ab12");
        assert_eq!(found, Some((Version::V2, "/sys/fs/cgroup/pod1/ab12".into())));
    }

    #[test]
    fn a_process_in_no_cgroup_of_the_container_is_of_none_of_its_freezers() {
        assert_eq!(of_container("0::/pod1/cd34/init\n", UNIFIED, "ab12"), None);
        assert_eq!(of_container("0::/pod1/ab12\n", UNIFIED, ""), None);
        // The container's name in another hierarchy is no freezer.
        let elsewhere = "4:memory:/pod1/ab12\n6:freezer:/elsewhere\n0::/\n";
        assert_eq!(of_container(elsewhere, HYBRID, "ab12"), None);
        // In the hybrid layout the one that holds the container is taken.
        let found = of_container("6:freezer:/elsewhere\n0::/pod1/ab12\n", HYBRID, "ab12");
        let wanted = "/sys/fs/cgroup/unified/pod1/ab12".to_owned();
        assert_eq!(found, Some((Version::V2, wanted)));
    }

    /// The files are read alike wherever they are, so this needs no cgroup.
    #[test]
    fn what_is_frozen_below_is_seen_in_both_versions_but_not_in_a_container_inside() {
        let inner = "docker/00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
        for version in [Version::V1, Version::V2] {
            let folder = tempfile::tempdir().unwrap();
            let freezer = Freezer {
                version,
                path: folder.path().join("ab12"),
            };
            let write = |below: &str, frozen: bool| {
                let path = freezer.path.join(below);
                fs::create_dir_all(&path).unwrap();
                let (state, told) = if frozen {
                    ("FREEZING", "1")
                } else {
                    ("THAWED", "0")
                };
                fs::write(path.join("freezer.state"), format!("{state}\n")).unwrap();
                fs::write(path.join("cgroup.freeze"), format!("{told}\n")).unwrap();
                fs::write(path.join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
            };
            for below in ["", "container", "container/init", "docker"] {
                write(below, false);
            }
            write(inner, true);
            assert!(!freezer.is_frozen().unwrap(), "{version:?}");
            for below in ["", "container", "container/init"] {
                write(below, true);
                let found = freezer.frozen_level().unwrap().unwrap().path;
                assert_eq!(found, freezer.path.join(below).components().collect::<PathBuf>());
                write(below, false);
            }
            // A process in the upper one runs, whatever is frozen below.
            write("container", true);
            assert!(!freezer.state().frozen, "{version:?}");
            fs::remove_dir_all(&freezer.path).unwrap();
            assert!(freezer.is_frozen().is_err(), "{version:?}");
        }
    }

    /// The watchdog of one agent is started with it, and the journal of settings outlives an agent.
    #[test]
    fn what_an_earlier_version_wrote_is_read() {
        let text = r#"{"version":"V1","path":"/sys/fs/cgroup/freezer/pod1/ab12"}"#;
        let freezer: Freezer = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&freezer).unwrap(), text);
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
            let freezer = Freezer { version: Version::V2, path };
            let _ = (freezer.container(), freezer.up_to("c1"));
        }
    }

    #[test]
    fn the_root_cgroup_is_never_a_container() {
        assert_eq!(find("6:freezer:/\n0::/\n", HYBRID), []);
    }
}
