//! The journal of changed settings on a real setting, a cgroup's freezer, and on a real disk: killed at any point, shared by
//! many, without room, with garbage in it. Needs root and a freezer; says so and does nothing otherwise.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use podcheckpoint_agent::node::cgroup::{Freezer, Version};
use podcheckpoint_agent::security::Security;
use podcheckpoint_agent::security::journal::{ChangeError, Holder, PatchJournal, Reverted};
use podcheckpoint_agent::security::setting::Setting;
use podcheckpoint_crds::{PodCheckpoint, PodCheckpointSpec, PodCheckpointStatus};

/// Where the child of a test keeps its journal, and its cgroup.
const CHILD: &str = "PODCHECKPOINT_TEST_JOURNAL";

/// A cgroup without processes that somebody has frozen. Removed when the test ends.
struct Frozen {
    cgroup: Freezer,
}

impl Frozen {
    fn new(name: &str) -> Option<Self> {
        let name = format!("podcheckpoint-test-{name}-{}", std::process::id());
        let trees = [
            ("/sys/fs/cgroup/freezer", Version::V1),
            ("/sys/fs/cgroup", Version::V2),
            ("/sys/fs/cgroup/unified", Version::V2),
        ];
        let made = trees.into_iter().find_map(|(tree, version)| {
            let path = Path::new(tree).join(&name);
            fs::create_dir(&path).ok()?;
            let file = if version == Version::V1 {
                "freezer.state"
            } else {
                "cgroup.freeze"
            };
            if path.join(file).exists() {
                return Some(Self {
                    cgroup: Freezer { version, path },
                });
            }
            let _ = fs::remove_dir(&path);
            None
        });
        if made.is_none() {
            eprintln!("SKIPPED: needs root and a cgroup that can be frozen");
        }
        made.inspect(|frozen| {
            frozen.setting().write("frozen", None).unwrap();
        })
    }

    fn setting(&self) -> Setting {
        Setting::Freezer {
            cgroup: self.cgroup.clone(),
            of_pod: false,
        }
    }

    fn state(&self) -> String {
        self.setting().read().unwrap()
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = self.setting().write("thawed", None);
        let _ = fs::remove_dir(&self.cgroup.path);
    }
}

fn holder(uid: &str) -> Holder {
    Holder {
        uid: uid.into(),
        at_most_seconds: 30,
    }
}

/// Not a test: what the killed child does, when it is started as one. It changes and puts back for ever.
#[test]
fn child_of_the_test_below() {
    let Some(root) = env::var_os(CHILD).map(PathBuf::from) else {
        return;
    };
    let setting: Setting = serde_json::from_slice(&fs::read(root.join("setting")).unwrap()).unwrap();
    let journal = PatchJournal::new(&root);
    fs::write(root.join("ready"), "").unwrap();
    loop {
        journal.change(&setting, holder("a"), None).unwrap();
        journal.change(&setting, holder("b"), None).unwrap();
        for uid in ["a", "b"] {
            journal.release(uid);
        }
    }
}

#[test]
fn a_change_is_put_back_after_a_kill_at_any_of_two_hundred_points() {
    let Some(frozen) = Frozen::new("killed") else {
        return;
    };
    let root = tempfile::tempdir().unwrap();
    fs::write(
        root.path().join("setting"),
        serde_json::to_vec(&frozen.setting()).unwrap(),
    )
    .unwrap();
    let (started, mut in_force) = (Instant::now(), 0);
    for point in 0..200_u64 {
        let _ = fs::remove_file(root.path().join("ready"));
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "child_of_the_test_below", "--nocapture"])
            .env(CHILD, root.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while !root.path().join("ready").exists() {
            thread::yield_now();
        }
        // Steps of a prime number spread over many rounds of the child.
        thread::sleep(Duration::from_micros(point * 7919 % 20_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let journal = PatchJournal::new(root.path());
        let thawed = frozen.state() == "thawed";
        in_force += usize::from(thawed);
        assert!(
            !thawed || !journal.entries().is_empty(),
            "point {point}: changed, and not in the journal"
        );
        assert!(journal.unreadable().is_empty(), "point {point}");
        let outcomes = journal.recover();
        assert!(
            outcomes.iter().all(|o| o.reverted == Reverted::Restored),
            "{outcomes:?}"
        );
        assert_eq!(frozen.state(), "frozen", "point {point}");
        assert!(journal.entries().is_empty(), "point {point}");
    }
    eprintln!(
        "200 points in {:?}, {in_force} of them with the change in force",
        started.elapsed()
    );
    assert!(in_force > 0, "no point was inside a change");
}

#[test]
fn twenty_checkpoints_share_a_change_and_the_last_one_puts_it_back() {
    let Some(frozen) = Frozen::new("shared") else {
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let journal = Arc::new(PatchJournal::new(root.path()));
    let workers: Vec<_> = (0..20)
        .map(|number| {
            let (journal, setting) = (journal.clone(), frozen.setting());
            thread::spawn(move || {
                let uid = format!("uid-{number}");
                for round in 0..10_u64 {
                    journal.change(&setting, holder(&uid), None).unwrap();
                    assert_eq!(setting.read().unwrap(), "thawed", "put back under {uid}");
                    thread::sleep(Duration::from_millis((number + round) % 5));
                    assert_eq!(setting.read().unwrap(), "thawed", "put back under {uid}");
                    let outcomes = journal.release(&uid);
                    assert!(
                        matches!(outcomes[..], [ref one] if !matches!(one.reverted, Reverted::Failed(_))),
                        "{outcomes:?}"
                    );
                }
            })
        })
        .collect();
    for worker in workers {
        worker.join().unwrap();
    }
    assert_eq!(frozen.state(), "frozen");
    assert!(journal.entries().is_empty());
}

#[test]
fn nothing_is_changed_when_the_disk_is_full() {
    let Some(frozen) = Frozen::new("full") else { return };
    let root = tempfile::tempdir().unwrap();
    let disk = root.path().to_str().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=16k", "tmpfs", disk])
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: needs the right to mount");
        return;
    }
    fs::create_dir(root.path().join("patches")).unwrap();
    let filled = fs::write(root.path().join("full"), vec![0; 1 << 20]);
    let journal = PatchJournal::new(root.path());
    let refused = journal.change(&frozen.setting(), holder("a"), None);
    let state = frozen.state();
    // With room again, it works, and an entry that could not be written is not taken for one.
    fs::remove_file(root.path().join("full")).unwrap();
    let entries = journal.entries();
    let changed = journal.change(&frozen.setting(), holder("a"), None);
    let released = journal.release("a");
    let unmounted = Command::new("umount").arg(disk).status().unwrap();
    assert!(filled.is_err() && unmounted.success());
    assert!(matches!(refused, Err(ChangeError::Journal(_))), "{refused:?}");
    assert_eq!((state.as_str(), entries.len()), ("frozen", 0));
    assert!(changed.is_ok(), "{changed:?}");
    assert!(
        matches!(released[..], [ref one] if one.reverted == Reverted::Restored),
        "{released:?}"
    );
}

#[test]
fn good_entries_are_put_back_beside_garbage_and_whatever_the_clock_says() {
    let Some(frozen) = Frozen::new("garbage") else {
        return;
    };
    for year in ["1970", "2026", "9999"] {
        let root = tempfile::tempdir().unwrap();
        let journal = PatchJournal::new(root.path());
        journal.change(&frozen.setting(), holder("a"), None).unwrap();
        let folder = root.path().join("patches");
        let entry = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&entry).unwrap()).unwrap();
        json["applied"] = format!("{year}-01-01T00:00:00Z").into();
        fs::write(&entry, json.to_string()).unwrap();
        for (name, bytes) in [
            ("a.json", &b"{\"setting\":"[..]),
            ("b.json", b"\0\xff\xfe"),
            ("c.json", b""),
            ("d.json", br#"{"setting":{"shell":"rm -rf /"}}"#),
        ] {
            fs::write(folder.join(name), bytes).unwrap();
        }
        std::os::unix::fs::symlink("/etc/passwd", folder.join("e.json")).unwrap();
        let later = PatchJournal::new(root.path());
        assert_eq!(later.unreadable().len(), 5);
        let outcomes = later.recover();
        assert!(
            matches!(outcomes[..], [ref one] if one.reverted == Reverted::Restored),
            "{outcomes:?}"
        );
        assert_eq!(frozen.state(), "frozen", "{year}");
        assert_eq!(
            later.unreadable().len(),
            5,
            "garbage is kept for who wants to see it"
        );
    }
}

#[test]
fn a_cgroup_that_is_replaced_by_a_link_is_not_written_through() {
    let Some(frozen) = Frozen::new("link") else { return };
    let root = tempfile::tempdir().unwrap();
    let victim = root.path().join("victim");
    fs::write(&victim, "1\n").unwrap();
    let fake = root.path().join("cgroup");
    fs::create_dir(&fake).unwrap();
    for file in ["freezer.state", "cgroup.freeze", "cgroup.events"] {
        std::os::unix::fs::symlink(&victim, fake.join(file)).unwrap();
    }
    let journal = PatchJournal::new(root.path());
    let setting = Setting::Freezer {
        cgroup: Freezer {
            version: Version::V2,
            path: fake,
        },
        of_pod: false,
    };
    assert!(journal.change(&setting, holder("a"), None).is_err());
    assert_eq!(fs::read_to_string(&victim).unwrap(), "1\n");
    assert_eq!(frozen.state(), "frozen");
}

/// The cgroup's files cannot be written for as long as this lives.
struct ReadOnly(PathBuf);

impl ReadOnly {
    fn new(folder: &Path) -> Self {
        let mount = |arguments: &[&str]| Command::new("mount").args(arguments).arg(folder).status();
        let path = folder.to_str().unwrap();
        assert!(mount(&["--bind", path]).unwrap().success());
        assert!(mount(&["-o", "remount,bind,ro"]).unwrap().success());
        Self(folder.to_owned())
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn what_could_not_be_put_back_is_tried_again_and_not_called_back() {
    let Some(frozen) = Frozen::new("settled") else {
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let (journal, setting) = (PatchJournal::new(root.path()), frozen.setting());
    let name = [setting.name()];
    journal.change(&setting, holder("a"), None).unwrap();
    let locked = ReadOnly::new(&frozen.cgroup.path);
    for outcomes in [journal.release("a"), journal.settle("a", &name)] {
        assert_eq!(outcomes.len(), 1);
        assert!(
            matches!(outcomes[0].reverted, Reverted::Failed(_)),
            "{outcomes:?}"
        );
    }
    assert_eq!(frozen.state(), "thawed");
    let left = journal.entries();
    assert!(
        left[0].holders.is_empty() && left[0].abandoned == ["a"],
        "{left:?}"
    );
    drop(locked);
    let outcomes = journal.settle("a", &name);
    assert_eq!(outcomes[0].reverted, Reverted::Restored);
    assert_eq!(frozen.state(), "frozen");
    assert!(journal.entries().is_empty() && journal.settle("a", &name).is_empty());
}

#[test]
fn what_could_not_be_put_back_goes_with_the_next_checkpoint_that_shares_it() {
    let Some(frozen) = Frozen::new("inherited") else {
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let (journal, setting) = (PatchJournal::new(root.path()), frozen.setting());
    journal.change(&setting, holder("a"), None).unwrap();
    let locked = ReadOnly::new(&frozen.cgroup.path);
    journal.release("a");
    drop(locked);
    journal.change(&setting, holder("b"), None).unwrap();
    let outcomes = journal.release("b");
    assert_eq!(outcomes[0].reverted, Reverted::Restored, "{outcomes:?}");
    assert_eq!(frozen.state(), "frozen");
}

/// Each cgroup that somebody has frozen is a setting of its own: what is below would not be frozen again.
#[test]
fn what_somebody_froze_below_is_no_part_of_the_setting() {
    let Some(frozen) = Frozen::new("below") else {
        return;
    };
    let path = frozen.cgroup.path.join("below");
    fs::create_dir(&path).unwrap();
    let below = Frozen {
        cgroup: Freezer {
            version: frozen.cgroup.version,
            path,
        },
    };
    below.setting().write("frozen", None).unwrap();
    let root = tempfile::tempdir().unwrap();
    let journal = PatchJournal::new(root.path());
    journal.change(&frozen.setting(), holder("a"), None).unwrap();
    assert_eq!(
        (frozen.state().as_str(), below.state().as_str()),
        ("thawed", "frozen")
    );
    journal.release("a");
    assert_eq!(
        (frozen.state().as_str(), below.state().as_str()),
        ("frozen", "frozen")
    );
    drop(below);
}

/// Whoever puts it back in the end: the next agent, or the end of another checkpoint that shared it.
#[tokio::test]
async fn who_could_not_put_it_back_is_told_what_became_of_it() {
    for next_agent in [true, false] {
        let Some(frozen) = Frozen::new("told") else {
            return;
        };
        let root = tempfile::tempdir().unwrap();
        let (journal, setting) = (PatchJournal::new(root.path()), frozen.setting());
        let patch = journal.change(&setting, holder("a"), None).unwrap().describe();
        let locked = ReadOnly::new(&frozen.cgroup.path);
        journal.release("a");
        drop(locked);
        let security = Arc::new(Security::new(root.path(), Vec::new()));
        if next_agent {
            security.recover(None).await;
        } else {
            journal.change(&setting, holder("b"), None).unwrap();
            security.release("b", Path::new("/nowhere")).await;
        }
        let mut object = PodCheckpoint::new("a", PodCheckpointSpec::default());
        object.metadata.uid = Some("a".into());
        object.status = Some(PodCheckpointStatus {
            patches: vec![patch],
            ..Default::default()
        });
        let outcomes = security.settle(&object, None).await;
        assert_eq!(outcomes.len(), 1, "{next_agent}");
        assert_eq!(outcomes[0].reverted, Reverted::Restored);
    }
}
