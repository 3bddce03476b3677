//! What the agent has begun on this node, on disk, so that it survives the agent.
//!
//! An entry is written and synced before the target is touched, and removed when the API server has the result. An
//! entry without a result at the agent's start means that it was interrupted; a checkpoint is never repeated from here.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use podcheckpoint_crds::{DeletionPolicy, PodCheckpointStatus};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::guest::dump::Place;
use crate::node::runtime_files::RuntimeFiles;
use crate::sandbox::Sentry;
use crate::vm::Handle;

/// One operation.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Entry {
    /// UID of the PodCheckpoint; names the entry and the archive's folder.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What happens to the archive when the object is deleted.
    pub deletion_policy: DeletionPolicy,
    /// Main processes of the containers that may be frozen, on the node.
    pub pids: Vec<TargetProcess>,
    /// The virtual machine that may be paused.
    #[serde(default)]
    pub machine: Option<Handle>,
    /// gVisor's kernel that may be writing.
    #[serde(default)]
    pub sentry: Option<Sentry>,
    /// What the runtime may be writing.
    #[serde(default)]
    pub files: Option<RuntimeFiles>,
    /// The guest in which CRIU may be at work.
    #[serde(default)]
    pub guest: Option<Place>,
    /// The agent's part of the status, once the operation has ended and as long as the API server does not have it.
    pub result: Option<PodCheckpointStatus>,
}

/// A process, so that it can be told from another one that got its number later.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TargetProcess {
    /// Container that it is the main process of.
    pub container_id: String,
    /// Its number on the node.
    pub pid: i32,
    /// Somebody had frozen its container before the checkpoint, which thawed it. Only for as long as that change is in the
    /// journal of the security settings may it be thawed again.
    #[serde(default)]
    pub frozen_before: bool,
}

/// How long the archive root's disk may take to answer: one that hangs must not take the agent with it.
pub const DISK: Duration = Duration::from_secs(5);

/// Does something with a disk that may hang, aside. `None` when it has not ended in time; it then goes on by itself.
pub async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let done = tokio::time::timeout(DISK, tokio::task::spawn_blocking(work)).await;
    done.ok()?.ok()
}

/// The journal of one node.
#[derive(Clone, Debug)]
pub struct Journal {
    folder: PathBuf,
}

/// The journal or an archive's folder could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{}", path.display())]
pub struct JournalError {
    path: PathBuf,
    source: io::Error,
}

impl Journal {
    /// The journal below an archive root; its folder is made when the first entry is written.
    pub fn new(archive_root: &Path) -> Self {
        Self {
            folder: archive_root.join("journal"),
        }
    }

    /// Writes an entry so that it is on disk when this returns.
    ///
    /// # Errors
    /// When the disk refuses. Then the target must not be touched.
    pub fn write(&self, entry: &Entry) -> Result<(), JournalError> {
        let path = self.path(&entry.uid);
        write_synced(&path, entry).map_err(|source| JournalError { path, source })
    }

    /// Removes an entry; it is no error if there is none.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove(&self, uid: &str) -> Result<(), JournalError> {
        let path = self.path(uid);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(JournalError { path, source }),
            _ => Ok(()),
        }
    }

    /// The entry of an object.
    ///
    /// # Errors
    /// When it exists and cannot be read.
    pub fn read(&self, uid: &str) -> Result<Option<Entry>, JournalError> {
        let path = self.path(uid);
        read(&path).map_err(|source| JournalError { path, source })
    }

    /// Every entry. One that cannot be read is left out and logged: it must not keep the agent from its work.
    pub fn entries(&self) -> Vec<Entry> {
        entries_in(&self.folder)
    }

    fn path(&self, uid: &str) -> PathBuf {
        path_in(&self.folder, uid)
    }
}

/// The file of an object in a folder of journal entries.
pub(crate) fn path_in(folder: &Path, uid: &str) -> PathBuf {
    // UIDs come from the API server; anything else in them must not lead out of the folder.
    let safe: String = uid
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
        .collect();
    folder.join(format!("{safe}.json"))
}

/// Every entry in a folder of them, without those that cannot be read, which are logged.
pub(crate) fn entries_in<T: DeserializeOwned>(folder: &Path) -> Vec<T> {
    let Ok(files) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = files
        .flatten()
        .map(|file| file.path())
        .filter(|p| p.extension().is_some_and(|e| e == "json"));
    paths
        .filter_map(|path| match read(&path) {
            Ok(entry) => entry,
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "journal entry cannot be read");
                None
            }
        })
        .collect()
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a value as JSON beside its name, syncs it, renames it and syncs the folder.
///
/// # Errors
/// When the disk refuses; the old file is then still there.
pub fn write_synced(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write_bytes_synced(path, &serde_json::to_vec(value).map_err(io::Error::other)?)
}

/// As [`write_synced`], for bytes.
///
/// # Errors
/// As there.
pub fn write_bytes_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let partial = path.with_extension("partial");
    let mut file = File::create(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&partial, path)?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(uid: &str) -> Entry {
        Entry {
            uid: uid.into(),
            namespace: "shop".into(),
            name: "cart".into(),
            deletion_policy: DeletionPolicy::Delete,
            machine: None,
            sentry: None,
            files: None,
            guest: None,
            pids: vec![TargetProcess {
                container_id: "c1".into(),
                pid: 42,
                frozen_before: true,
            }],
            result: None,
        }
    }

    #[test]
    fn an_entry_is_read_back_as_it_was_written() {
        let root = tempfile::tempdir().unwrap();
        let journal = Journal::new(root.path());
        journal.write(&entry("a-1")).unwrap();
        assert_eq!(journal.read("a-1").unwrap(), Some(entry("a-1")));
        assert_eq!(journal.entries(), vec![entry("a-1")]);
    }

    #[test]
    fn a_removed_entry_is_gone_and_removing_it_again_is_no_error() {
        let root = tempfile::tempdir().unwrap();
        let journal = Journal::new(root.path());
        journal.write(&entry("a")).unwrap();
        journal.remove("a").unwrap();
        journal.remove("a").unwrap();
        assert_eq!(journal.read("a").unwrap(), None);
    }

    #[test]
    fn a_torn_entry_does_not_hide_the_others() {
        let root = tempfile::tempdir().unwrap();
        let journal = Journal::new(root.path());
        journal.write(&entry("good")).unwrap();
        fs::write(root.path().join("journal/torn.json"), b"{\"uid\":").unwrap();
        assert_eq!(journal.entries(), vec![entry("good")]);
    }

    #[test]
    fn a_uid_cannot_lead_out_of_the_folder() {
        let root = tempfile::tempdir().unwrap();
        let journal = Journal::new(root.path());
        assert_eq!(
            journal.path("../../etc/passwd"),
            root.path().join("journal/etcpasswd.json")
        );
    }
}
