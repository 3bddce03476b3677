//! What the agent has changed on this node and has to put back, on disk, so that it survives the agent and the power.
//!
//! There is one entry for each setting. It is written and synced before the setting is changed, and removed after it has
//! been put back. Checkpoints that need the same change share the entry; the last one out puts the setting back. A value
//! that somebody else wrote meanwhile is theirs and is left.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::jiff::Timestamp;
use podcheckpoint_crds::Patch;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::setting::{Setting, SettingError};
use crate::journal::{write_bytes_synced, write_synced};

/// A change that is or may be in force.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Entry {
    /// What was changed.
    pub setting: Setting,
    /// The value to put back.
    pub before: String,
    /// The value that was written.
    pub after: String,
    /// When.
    pub applied: Timestamp,
    /// The boot of the kernel whose setting it is: another one begins with its own values.
    pub boot: String,
    /// Container that its runtime calls paused, and has to again afterwards.
    pub paused: Option<String>,
    /// The checkpoints that need it.
    pub holders: Vec<Holder>,
    /// UIDs of those that needed it and could not put it back: they are to be told what becomes of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub abandoned: Vec<String>,
}

/// A checkpoint that needs a change.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Holder {
    /// UID of the PodCheckpoint.
    pub uid: String,
    /// Seconds that it needs it at most.
    pub at_most_seconds: i32,
}

impl Entry {
    /// As a status shows it.
    pub fn describe(&self) -> Patch {
        let longest = self.holders.iter().map(|holder| holder.at_most_seconds).max();
        Patch {
            applied_time: Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(self.applied)),
            ..describe(
                &self.setting,
                &self.before,
                &self.after,
                longest.unwrap_or_default(),
            )
        }
    }
}

/// A change that has not been made, as a status shows it.
pub fn describe(setting: &Setting, before: &str, after: &str, at_most_seconds: i32) -> Patch {
    Patch {
        kind: setting.kind(),
        setting: setting.name(),
        scope: setting.scope().to_owned(),
        before: before.to_owned(),
        after: after.to_owned(),
        exposes: setting.exposes().to_owned(),
        at_most_seconds,
        applied_time: None,
        reverted_time: None,
        outcome: None,
    }
}

/// What became of a change that was to be put back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reverted {
    /// It is as it was.
    Restored,
    /// So many other checkpoints still need it.
    Shared(usize),
    /// Somebody else has written another value, which was left.
    ChangedByOthers {
        /// Theirs.
        found: String,
    },
    /// Something uses it now, so it was left.
    InUse,
    /// It could not be put back yet; the entry stays.
    Failed(String),
}

/// One change and what became of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The change, with the holders that it had.
    pub entry: Entry,
    /// What became of it.
    pub reverted: Reverted,
}

/// A change could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The intent could not be written to disk, so nothing was changed.
    #[error("the journal of changed settings cannot be written, so nothing was changed: {0}")]
    Journal(#[source] io::Error),
    /// The setting could not be read or written.
    #[error("{setting}: {source}")]
    Setting {
        /// Its name.
        setting: String,
        /// Why.
        source: SettingError,
    },
    /// Another checkpoint had changed it, and somebody else has changed it since.
    #[error("{setting} was changed to {found} by somebody else while another checkpoint uses it")]
    Contended {
        /// Its name.
        setting: String,
        /// What it is.
        found: String,
    },
}

/// The journal of one node.
#[derive(Debug)]
pub struct PatchJournal {
    folder: PathBuf,
    boot: String,
    /// One change or revert at a time.
    turn: Mutex<()>,
    /// How often a setting has been written.
    writes: AtomicU64,
}

impl PatchJournal {
    /// The journal below an archive root; its folder is made when the first entry is written.
    pub fn new(archive_root: &Path) -> Self {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            folder: archive_root.join("patches"),
            boot: boot.trim().to_owned(),
            turn: Mutex::default(),
            writes: AtomicU64::default(),
        }
    }

    /// Another number whenever a setting has been changed or put back since: what was proved before may not hold.
    pub fn generation(&self) -> u64 {
        self.writes.load(Ordering::SeqCst)
    }

    fn write_setting(&self, setting: &Setting, value: &str, kept: Option<&[u8]>) -> Result<(), SettingError> {
        // Before and after: what is proved meanwhile is in doubt, too.
        self.writes.fetch_add(1, Ordering::SeqCst);
        let result = setting.write(value, kept);
        self.writes.fetch_add(1, Ordering::SeqCst);
        result
    }

    /// Changes a setting for a checkpoint, or shares a change that is in force. The entry is on disk before the setting is
    /// touched.
    ///
    /// # Errors
    /// Then nothing is changed for this checkpoint.
    pub fn change(
        &self,
        setting: &Setting,
        holder: Holder,
        paused: Option<String>,
    ) -> Result<Entry, ChangeError> {
        let _turn = self.turn();
        let failed = |source| ChangeError::Setting {
            setting: setting.name(),
            source,
        };
        if let Some(entry) = self.read(setting) {
            return self.share(entry, holder);
        }
        let change = setting.change().map_err(failed)?;
        if let Some(kept) = &change.kept {
            write_bytes_synced(&self.kept_path(setting), kept).map_err(ChangeError::Journal)?;
        }
        let entry = Entry {
            setting: setting.clone(),
            before: change.before,
            after: change.after,
            applied: Timestamp::now(),
            boot: self.boot.clone(),
            paused,
            holders: vec![holder],
            abandoned: Vec::new(),
        };
        self.write(&entry).map_err(ChangeError::Journal)?;
        match self.write_setting(setting, &entry.after, change.kept.as_deref()) {
            Ok(()) => Ok(entry),
            Err(source) => {
                // It may have been taken in part.
                if self.put_back(&entry) == Reverted::Restored {
                    self.remove(&entry.setting);
                }
                Err(failed(source))
            }
        }
    }

    /// Shares the changes in force that a checkpoint may profit from, and does not share yet: they must outlast it.
    ///
    /// # Errors
    /// When one of them cannot be shared.
    pub fn join(
        &self,
        holder: &Holder,
        wanted: impl Fn(&Setting) -> bool,
    ) -> Result<Vec<Entry>, ChangeError> {
        let _turn = self.turn();
        let entries = self.entries().into_iter();
        let held = |entry: &Entry| entry.holders.iter().any(|other| other.uid == holder.uid);
        entries
            .filter(|entry| wanted(&entry.setting) && !held(entry))
            .filter_map(|entry| match self.share(entry, holder.clone()) {
                // Whether it is needed is not known yet; if so, changing it fails, and says why.
                Err(error @ (ChangeError::Contended { .. } | ChangeError::Setting { .. })) => {
                    tracing::warn!(%error, "not shared");
                    None
                }
                shared => Some(shared),
            })
            .collect()
    }

    fn share(&self, mut entry: Entry, holder: Holder) -> Result<Entry, ChangeError> {
        let name = entry.setting.name();
        let current = entry.setting.read().map_err(|source| ChangeError::Setting {
            setting: name.clone(),
            source,
        })?;
        if current != entry.after {
            return Err(ChangeError::Contended {
                setting: name,
                found: current,
            });
        }
        entry.holders.retain(|other| other.uid != holder.uid);
        entry.holders.push(holder);
        self.write(&entry).map_err(ChangeError::Journal)?;
        Ok(entry)
    }

    /// Puts back what a checkpoint needed and no other one does.
    pub fn release(&self, uid: &str) -> Vec<Outcome> {
        let _turn = self.turn();
        let held = |entry: &Entry| entry.holders.iter().any(|holder| holder.uid == uid);
        let mut entries = self.entries();
        entries.retain(held);
        self.each(entries, |entry| self.let_go(entry, uid))
    }

    /// Puts back what a checkpoint that has ended left changed, of these settings: what could not be put back then may be
    /// now.
    pub fn settle(&self, uid: &str, settings: &[String]) -> Vec<Outcome> {
        let _turn = self.turn();
        let mut entries = self.entries();
        entries.retain(|entry| settings.contains(&entry.setting.name()));
        self.each(entries, |entry| self.let_go(entry, uid))
    }

    /// Puts back everything: for an agent that starts, when no checkpoint can be at work.
    pub fn recover(&self) -> Vec<Outcome> {
        let _turn = self.turn();
        let outcomes = self.each(self.entries(), |entry| {
            let reverted = self.put_back(&entry);
            self.abandon(&entry, &reverted);
            self.close(entry, reverted)
        });
        self.remove_what_is_kept_for_nothing();
        outcomes
    }

    /// The last change first. What something else still needed then is tried again after all the others: one module may
    /// be used by another.
    fn each(&self, mut entries: Vec<Entry>, put_back: impl Fn(Entry) -> Outcome) -> Vec<Outcome> {
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.applied));
        let outcomes: Vec<Outcome> = entries.into_iter().map(put_back).collect();
        let again = |mut outcome: Outcome| {
            if outcome.reverted == Reverted::InUse {
                outcome.reverted = self.put_back(&outcome.entry);
                if !matches!(outcome.reverted, Reverted::Failed(_)) {
                    self.remove(&outcome.entry.setting);
                }
            }
            outcome
        };
        outcomes.into_iter().rev().map(again).collect()
    }

    /// The changes in force.
    pub fn entries(&self) -> Vec<Entry> {
        self.files()
            .into_iter()
            .filter_map(|path| load(&path).ok())
            .collect()
    }

    /// Files that are no entries, with why.
    pub fn unreadable(&self) -> Vec<String> {
        let say = |path: PathBuf| {
            let error = load(&path).err()?;
            Some(format!("{}: {error}", path.display()))
        };
        self.files().into_iter().filter_map(say).collect()
    }

    fn let_go(&self, mut entry: Entry, uid: &str) -> Outcome {
        let all = entry.holders.clone();
        entry.holders.retain(|holder| holder.uid != uid);
        let others = entry.holders.len();
        if others > 0 {
            let reverted = match self.write(&entry) {
                Ok(()) => Reverted::Shared(others),
                Err(error) => Reverted::Failed(format!("the journal cannot be written: {error}")),
            };
            entry.holders = all;
            return Outcome { entry, reverted };
        }
        entry.holders = all;
        let reverted = self.put_back(&entry);
        self.abandon(&entry, &reverted);
        self.close(entry, reverted)
    }

    /// What could not be put back is nobody's any more: the next checkpoint that shares it tries again at its end.
    fn abandon(&self, entry: &Entry, reverted: &Reverted) {
        if !matches!(reverted, Reverted::Failed(_)) {
            return;
        }
        let mut nobodys = entry.clone();
        for holder in nobodys.holders.drain(..) {
            if !nobodys.abandoned.contains(&holder.uid) {
                nobodys.abandoned.push(holder.uid);
            }
        }
        if let Err(error) = self.write(&nobodys) {
            tracing::error!(%error, setting = entry.setting.name(), "the journal cannot be written");
        }
    }

    fn close(&self, entry: Entry, reverted: Reverted) -> Outcome {
        match &reverted {
            Reverted::Failed(_) | Reverted::Shared(_) | Reverted::InUse => {}
            Reverted::Restored | Reverted::ChangedByOthers { .. } => self.remove(&entry.setting),
        }
        tracing::info!(
            setting = entry.setting.name(),
            before = entry.before,
            ?reverted,
            "put back"
        );
        Outcome { entry, reverted }
    }

    fn put_back(&self, entry: &Entry) -> Reverted {
        // A kernel that was started again has its own values, and cgroups of other processes.
        if entry.boot != self.boot || entry.setting.is_gone() {
            return Reverted::Restored;
        }
        let current = match entry.setting.read() {
            Ok(current) => current,
            Err(error) => return Reverted::Failed(error.to_string()),
        };
        if current == entry.before {
            return Reverted::Restored;
        }
        if current != entry.after {
            return Reverted::ChangedByOthers { found: current };
        }
        let kept = fs::read(self.kept_path(&entry.setting)).ok();
        match self.write_setting(&entry.setting, &entry.before, kept.as_deref()) {
            Ok(()) => Reverted::Restored,
            Err(SettingError::InUse) => Reverted::InUse,
            Err(error) => Reverted::Failed(error.to_string()),
        }
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        // The journal is on disk: a panic of another turn has left nothing half done in memory.
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn files(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut paths: Vec<_> = files
            .map(|file| file.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
            .collect();
        paths.sort();
        paths
    }

    /// Where the bytes are that putting a setting back needs.
    fn kept_path(&self, setting: &Setting) -> PathBuf {
        self.path(setting).with_extension("kept")
    }

    /// They are written before the entry, so one without an entry belongs to a change that was never begun.
    fn remove_what_is_kept_for_nothing(&self) {
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        for path in files.map(|file| file.path()) {
            let kept = path.extension().is_some_and(|extension| extension == "kept");
            if kept && !path.with_extension("json").exists() {
                let _ = fs::remove_file(&path);
            }
        }
    }

    fn path(&self, setting: &Setting) -> PathBuf {
        let digest = Sha256::digest(setting.name().as_bytes());
        let name: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        self.folder.join(format!("{name}.json"))
    }

    fn read(&self, setting: &Setting) -> Option<Entry> {
        load(&self.path(setting)).ok()
    }

    fn write(&self, entry: &Entry) -> io::Result<()> {
        write_synced(&self.path(&entry.setting), entry)
    }

    fn remove(&self, setting: &Setting) {
        let path = self.path(setting);
        let removed = fs::remove_file(&path).and_then(|()| fs::File::open(&self.folder)?.sync_all());
        if let Err(error) = removed {
            tracing::error!(path = %path.display(), %error, "cannot remove an entry of the journal");
        }
        let _ = fs::remove_file(self.kept_path(setting));
    }
}

fn load(path: &Path) -> io::Result<Entry> {
    serde_json::from_slice(&fs::read(path)?).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::cgroup::{Freezer, Version};

    /// A journal, and a cgroup of version 2 as a fake: a folder with the file that says what is wanted of it.
    struct Fake {
        root: tempfile::TempDir,
        journal: PatchJournal,
    }

    impl Fake {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir(root.path().join("cgroup")).unwrap();
            fs::write(root.path().join("cgroup/cgroup.freeze"), "1\n").unwrap();
            let journal = PatchJournal::new(root.path());
            Self { root, journal }
        }

        fn setting(&self) -> Setting {
            let cgroup = Freezer {
                version: Version::V2,
                path: self.root.path().join("cgroup"),
            };
            Setting::Freezer {
                cgroup,
                of_pod: false,
            }
        }

        fn set(&self, value: &str) {
            fs::write(self.root.path().join("cgroup/cgroup.freeze"), value).unwrap();
        }

        /// As if the agent had changed it: the fake is on no cgroup file system, which the real write insists on.
        fn changed(&self, holders: &[&str]) -> Entry {
            let entry = Entry {
                setting: self.setting(),
                before: "frozen".into(),
                after: "thawed".into(),
                applied: Timestamp::now(),
                boot: self.journal.boot.clone(),
                paused: None,
                holders: holders.iter().map(|uid| holder(uid)).collect(),
                abandoned: Vec::new(),
            };
            self.journal.write(&entry).unwrap();
            self.set("0");
            entry
        }
    }

    fn holder(uid: &str) -> Holder {
        Holder {
            uid: uid.into(),
            at_most_seconds: 30,
        }
    }

    #[test]
    fn a_change_that_two_need_is_put_back_by_the_last_one() {
        let fake = Fake::new();
        fake.changed(&["a", "b"]);
        assert_eq!(fake.journal.release("a")[0].reverted, Reverted::Shared(1));
        assert_eq!(fake.journal.entries()[0].holders, [holder("b")]);
        fake.set("1");
        assert_eq!(fake.journal.release("b")[0].reverted, Reverted::Restored);
        assert!(fake.journal.entries().is_empty());
        assert!(fake.journal.release("b").is_empty());
    }

    #[test]
    fn a_third_checkpoint_shares_the_change_that_is_in_force() {
        let fake = Fake::new();
        fake.changed(&["a"]);
        let entry = fake.journal.change(&fake.setting(), holder("c"), None).unwrap();
        assert_eq!((entry.before.as_str(), entry.holders.len()), ("frozen", 2));
    }

    #[test]
    fn a_failed_revert_keeps_its_entry_for_the_next_agent() {
        let fake = Fake::new();
        fake.changed(&["a"]);
        // No cgroup file system: the write is refused.
        assert!(matches!(
            fake.journal.release("a")[0].reverted,
            Reverted::Failed(_)
        ));
        assert_eq!(fake.journal.entries().len(), 1);
        fake.set("1");
        assert_eq!(fake.journal.recover()[0].reverted, Reverted::Restored);
    }

    #[test]
    fn what_somebody_else_changed_is_not_shared() {
        let fake = Fake::new();
        fake.changed(&["a"]);
        fake.set("1");
        let error = fake
            .journal
            .change(&fake.setting(), holder("b"), None)
            .unwrap_err();
        assert!(matches!(error, ChangeError::Contended { .. }), "{error}");
    }

    #[test]
    fn nothing_is_changed_when_the_journal_cannot_be_written() {
        let fake = Fake::new();
        // A file where the folder should be.
        fs::write(fake.root.path().join("patches"), "").unwrap();
        let error = fake
            .journal
            .change(&fake.setting(), holder("a"), None)
            .unwrap_err();
        assert!(matches!(error, ChangeError::Journal(_)), "{error}");
        assert_eq!(fake.setting().read().unwrap(), "frozen");
    }

    #[test]
    fn a_kernel_that_was_started_again_has_nothing_to_be_put_back() {
        let fake = Fake::new();
        let mut entry = fake.changed(&["a"]);
        entry.boot = "another".into();
        fake.journal.write(&entry).unwrap();
        assert_eq!(fake.journal.recover()[0].reverted, Reverted::Restored);
        assert_eq!(fake.setting().read().unwrap(), "thawed");
    }

    #[test]
    fn garbage_is_reported_and_the_good_entries_are_used() {
        let fake = Fake::new();
        fake.changed(&["a"]);
        fs::write(fake.root.path().join("patches/zz.json"), b"{\"setting\":").unwrap();
        assert_eq!(fake.journal.entries().len(), 1);
        assert!(fake.journal.unreadable()[0].contains("zz.json"));
    }
}
