//! Thawing containers whose first process is not in the container's own cgroup but in one below it, on real cgroups of
//! both versions. Needs root and a cgroup that can be frozen; says so and does nothing otherwise.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use podcheckpoint_agent::node::cgroup::{Control, Freezer, Version};
use podcheckpoint_agent::node::process::{SourceState, Target, source_state};

/// A container's ID, as containerd gives them.
const ID: &str = "5f0d1c2b3a495867f6e5d4c3b2a190887766554433221100ffeeddccbbaa9988";
/// The ID of a container that runs inside that one.
const INNER: &str = "aa11bb22cc33dd44ee55ff6600778899aa11bb22cc33dd44ee55ff6600778899";

/// The cgroup of a container with some below it, and a process in one of them. Removed when the test ends.
struct Container {
    version: Version,
    /// Folders, the container's own first.
    folders: Vec<PathBuf>,
    process: Child,
}

impl Container {
    /// `below` are the folders below the container's; the process is in the first.
    fn new(version: Version, name: &str, below: &[&str]) -> Option<Self> {
        let roots: &[&str] = match version {
            Version::V1 => &["/sys/fs/cgroup/freezer"],
            Version::V2 => &["/sys/fs/cgroup", "/sys/fs/cgroup/unified"],
        };
        let own = format!("podcheckpoint-{name}-{}-{ID}.scope", std::process::id());
        let made = roots.iter().find_map(|root| {
            let path = Path::new(root).join(&own);
            fs::create_dir(&path).ok()?;
            if path.join(told_file(version)).exists() {
                return Some(path);
            }
            let _ = fs::remove_dir(&path);
            None
        });
        let Some(path) = made else {
            eprintln!("SKIPPED: needs root and a freezer of {version:?}");
            return None;
        };
        let process = Command::new("sleep").arg("600").spawn().unwrap();
        let mut folders = vec![path.clone()];
        folders.extend(below.iter().map(|part| path.join(part)));
        let container = Self {
            version,
            folders,
            process,
        };
        for folder in &container.folders {
            fs::create_dir_all(folder).unwrap();
        }
        let home = container.folders.get(1).unwrap_or(&path);
        fs::write(home.join("cgroup.procs"), container.process.id().to_string()).unwrap();
        Some(container)
    }

    fn target(&self) -> Target {
        Target::open(i32::try_from(self.process.id()).unwrap(), ID).unwrap()
    }

    /// Freezes one folder, as a runtime does it, and waits until it is so.
    fn freeze(&self, folder: usize) {
        let path = &self.folders[folder];
        let value = if self.version == Version::V1 {
            "FROZEN"
        } else {
            "1"
        };
        fs::write(path.join(told_file(self.version)), value).unwrap();
        let started = Instant::now();
        while !is_at_rest(self.version, path) {
            assert!(
                started.elapsed() < Duration::from_secs(5),
                "{} is not frozen",
                path.display()
            );
            sleep(Duration::from_millis(2));
        }
    }

    /// Whether this very folder was told to freeze.
    fn is_told(&self, folder: usize) -> bool {
        let freezer = Freezer {
            version: self.version,
            path: self.folders[folder].clone(),
        };
        freezer.is_told_to_freeze().unwrap()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let thawed = if self.version == Version::V1 {
            "THAWED"
        } else {
            "0"
        };
        for folder in &self.folders {
            let _ = fs::write(folder.join(told_file(self.version)), thawed);
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        let own = self.folders[0].clone();
        for folder in self.folders.iter().rev() {
            // What `mkdir -p` has made on the way as well.
            for path in folder.ancestors().take_while(|path| path.starts_with(&own)) {
                let _ = fs::remove_dir(path);
            }
        }
    }
}

fn told_file(version: Version) -> &'static str {
    match version {
        Version::V1 => "freezer.state",
        Version::V2 => "cgroup.freeze",
    }
}

fn is_at_rest(version: Version, path: &Path) -> bool {
    match version {
        Version::V1 => fs::read_to_string(path.join("freezer.state")).unwrap().trim() == "FROZEN",
        Version::V2 => fs::read_to_string(path.join("cgroup.events"))
            .unwrap()
            .contains("frozen 1"),
    }
}

/// `frozen` is what the runtime freezes: 0 is the container's own cgroup.
fn thawed_whatever_was_frozen(name: &str, below: &[&str], frozen: &[usize]) {
    for version in [Version::V1, Version::V2] {
        let Some(container) = Container::new(version, name, below) else {
            continue;
        };
        let target = container.target();
        assert!(!target.freezer.is_frozen().unwrap(), "{version:?}");
        for folder in frozen {
            container.freeze(*folder);
        }
        let freezers = [target.freezer];
        assert!(freezers[0].is_frozen().unwrap(), "{version:?}");
        assert!(
            matches!(source_state(&freezers), SourceState::Frozen { .. }),
            "{version:?}"
        );
        freezers[0].thaw().unwrap();
        for folder in 0..container.folders.len() {
            assert!(!container.is_told(folder), "{version:?}, folder {folder}");
        }
        assert!(!freezers[0].is_frozen().unwrap(), "{version:?}");
        let state = source_state(&freezers);
        assert_eq!(state, SourceState::Runs { processes: 1 }, "{version:?}");
    }
}

#[test]
fn a_container_whose_first_process_moved_below_its_cgroup_is_thawed_where_runc_freezes_it() {
    thawed_whatever_was_frozen("moved", &["init"], &[0]);
}

#[test]
fn a_container_is_thawed_where_crun_freezes_it_below_the_scope() {
    thawed_whatever_was_frozen("crun", &["container"], &[1]);
}

#[test]
fn a_container_of_crun_whose_first_process_moved_is_thawed_between_the_two() {
    thawed_whatever_was_frozen("crun-moved", &["container/init", "container"], &[2]);
}

#[test]
fn every_level_that_was_told_to_freeze_is_thawed() {
    thawed_whatever_was_frozen("levels", &["container/init", "container"], &[0, 1, 2]);
}

#[test]
fn a_container_whose_process_is_in_its_own_cgroup_is_thawed_as_ever() {
    thawed_whatever_was_frozen("plain", &[], &[0]);
}

#[test]
fn the_freezer_is_the_containers_also_when_its_first_process_moved_below() {
    for version in [Version::V1, Version::V2] {
        let Some(container) = Container::new(version, "path", &["init", "other"]) else {
            continue;
        };
        let target = container.target();
        assert_eq!(target.freezer.path, container.folders[0], "{version:?}");
        assert_eq!(target.freezer.version, version);
        // The runtime's books are corrected by it.
        assert_eq!(target.freezer.container(), Some(ID), "{version:?}");
        // Also a process that is in another of its cgroups than the first is the container's.
        let other = Command::new("sleep").arg("600").spawn();
        let mut other = other.unwrap();
        fs::write(container.folders[2].join("cgroup.procs"), other.id().to_string()).unwrap();
        let mut seen = target.freezer.processes();
        let _ = other.kill();
        let _ = other.wait();
        seen.sort_unstable();
        let mut wanted = [target.pid, i32::try_from(other.id()).unwrap()];
        wanted.sort_unstable();
        assert_eq!(seen, wanted, "{version:?}");
    }
}

/// `docker pause` in a container with docker in it: no checkpoint has frozen that, and none may thaw it.
#[test]
fn a_container_inside_the_container_that_somebody_has_paused_stays_paused() {
    let inner = format!("docker/{INNER}");
    for version in [Version::V1, Version::V2] {
        let Some(container) = Container::new(version, "inner", &["init", &inner]) else {
            continue;
        };
        container.freeze(2);
        let freezers = [container.target().freezer];
        assert!(!freezers[0].is_frozen().unwrap(), "{version:?}");
        container.freeze(0);
        assert!(freezers[0].is_frozen().unwrap(), "{version:?}");
        freezers[0].thaw().unwrap();
        assert!(container.is_told(2), "{version:?}");
        assert!(!container.is_told(0), "{version:?}");
        let state = source_state(&freezers);
        assert_eq!(state, SourceState::Runs { processes: 1 }, "{version:?}");
    }
}

#[test]
fn one_container_that_has_ended_does_not_hide_another_that_is_frozen() {
    for version in [Version::V1, Version::V2] {
        let Some(container) = Container::new(version, "second", &[]) else {
            continue;
        };
        let ended = Freezer {
            version,
            path: container.folders[0].join("ended"),
        };
        let freezers = [ended, container.target().freezer];
        container.freeze(0);
        assert!(
            matches!(source_state(&freezers), SourceState::Frozen { .. }),
            "{version:?}"
        );
        freezers[1].thaw().unwrap();
        let state = source_state(&freezers);
        assert_eq!(state, SourceState::Runs { processes: 1 }, "{version:?}");
        // Nothing is left when the other has ended as well.
        assert_eq!(source_state(&freezers[..1]), SourceState::Gone, "{version:?}");
    }
}
