//! What a checkpoint leaves on the node's disk: a verified archive under its name, or logs only.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use podcheckpoint_crds::{
    ArchiveFormat, ArchiveState, CheckpointLocation, CheckpointedContainer, DeletionPolicy, LocationType,
    NodeLocal, PodCheckpoint, Reason, Step,
};
use tokio::task::JoinError;

use super::{Deadline, Stop};
use crate::archive::{self, ArchiveError, Identity, Verified};
use crate::journal::write_synced;
use crate::node::cri::Container;
use crate::report::Report;
use crate::words::{human_bytes, human_duration};

/// An error with its cause.
pub(super) fn describe(error: &ArchiveError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Why the node's disk has no archive.
pub(super) fn not_stored(error: ArchiveError) -> Stop {
    Stop::new(Step::Archive, error.reason(), describe(&error))
}

/// What became of work on an archive that was done beside the loop.
pub(super) fn aside_of_archive<T>(done: Result<Result<T, ArchiveError>, JoinError>) -> Result<T, Stop> {
    let broken = |error: JoinError| Stop::new(Step::Archive, Reason::ArchiveIncomplete, error.to_string());
    done.map_err(broken)?.map_err(not_stored)
}

/// The note beside a complete archive that says what happens to it when its object is gone.
const POLICY: &str = "policy.json";

/// What failed leaves nothing but logs; what did not is named in the status. Without the note what is to become of it the
/// archive could be deleted with its object against its user's will.
pub(super) fn keep_or_remove(
    result: Result<(), Stop>,
    object: &PodCheckpoint,
    folder: &Path,
    report: &mut Report,
) -> Result<(), Stop> {
    let noted = result.and_then(|()| {
        let path = folder.join(POLICY);
        let written = write_synced(&path, &object.spec.deletion_policy);
        written.map_err(|source| not_stored(ArchiveError::Io { path, source }))
    });
    if noted.is_err() {
        remove_all_but_logs(folder);
        return noted;
    }
    let path = format!(
        "checkpoints/{}",
        object.metadata.uid.as_deref().unwrap_or_default()
    );
    report.status.checkpoint_location = Some(CheckpointLocation {
        r#type: LocationType::NodeLocal,
        node_local: Some(NodeLocal { path }),
    });
    report.archive_state(ArchiveState::Present);
    Ok(())
}

/// Whether what is in the folder stays when its object is gone. A note that cannot be read may say so.
pub fn keeps(folder: &Path) -> bool {
    match fs::read(folder.join(POLICY)) {
        Ok(json) => serde_json::from_slice(&json)
            .map_or(true, |policy: DeletionPolicy| policy == DeletionPolicy::Retain),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => {
            tracing::error!(folder = %folder.display(), %error, "what is to become of an archive is not known, so it stays");
            true
        }
    }
}

/// Verifies an archive within the deadline, and only then gives it its name.
pub(super) async fn store(
    deadline: Deadline,
    partial: &Path,
    name: &Path,
    verify: impl FnOnce(&Path) -> Result<Verified, ArchiveError> + Send + 'static,
) -> Result<Verified, Stop> {
    let (from, to) = (partial.to_owned(), name.to_owned());
    let verified = tokio::task::spawn_blocking(move || verify(&from).map(|verified| (from, verified)));
    let verified = tokio::time::timeout_at(deadline.until, verified).await;
    let (from, verified) = aside_of_archive(verified.map_err(|_| deadline.passed(Step::Archive))?)?;
    let published = tokio::task::spawn_blocking(move || archive::publish(&from, &to));
    aside_of_archive(published.await).map(|()| verified)
}

/// The archive of one container: its name below the folder.
pub(super) async fn store_container(
    deadline: Deadline,
    folder: &Path,
    direct: bool,
    expected: &Identity,
) -> Result<(String, Verified), Stop> {
    let (container, expected) = (expected.container.clone(), expected.clone());
    let verified = if direct {
        let partial = folder.join(format!("{container}.partial"));
        let verify = move |partial: &Path| archive::verify_folder(partial, &expected);
        store(deadline, &partial, &folder.join(&container), verify).await?
    } else {
        let verify = move |partial: &Path| archive::verify_tar(partial, &expected);
        let name = folder.join(format!("{container}.tar"));
        store(deadline, &partial_tar(folder, &container), &name, verify).await?
    };
    let name = if direct {
        container
    } else {
        format!("{container}.tar")
    };
    Ok((name, verified))
}

pub(super) fn describe_archive(
    container: &Container,
    path: String,
    verified: Verified,
    direct: bool,
) -> CheckpointedContainer {
    let stats = verified.stats.as_ref();
    CheckpointedContainer {
        name: container.name.clone(),
        container_id: container.id.clone(),
        path,
        size_bytes: i64::try_from(verified.size).unwrap_or(i64::MAX),
        sha256: verified.sha256.clone(),
        format: if direct {
            ArchiveFormat::Directory
        } else {
            ArchiveFormat::ContainerCheckpoint
        },
        frozen_micros: stats.map(|s| s.frozen_micros),
        freezing_micros: stats.map(|s| s.freezing_micros),
        memdump_micros: stats.map(|s| s.memdump_micros),
        memwrite_micros: stats.map(|s| s.memwrite_micros),
        pages_written: stats.map(|s| s.pages_written),
    }
}

/// A sandbox that was saved as a whole, in one archive for all its containers.
pub(super) struct Whole<'a> {
    pub(super) containers: &'a [Container],
    /// Name of the archive below the checkpoint's folder.
    pub(super) path: &'static str,
    pub(super) format: ArchiveFormat,
    /// How long it stood still.
    pub(super) stood: Duration,
}

impl Whole<'_> {
    /// Says in the report where the archive is.
    pub(super) fn tell(&self, verified: &Verified, report: &mut Report) {
        let one = |container: &Container| CheckpointedContainer {
            name: container.name.clone(),
            container_id: container.id.clone(),
            path: self.path.to_owned(),
            size_bytes: i64::try_from(verified.size).unwrap_or(i64::MAX),
            sha256: verified.sha256.clone(),
            format: self.format,
            frozen_micros: i64::try_from(self.stood.as_micros()).ok(),
            ..CheckpointedContainer::default()
        };
        report.status.checkpointed_containers = self.containers.iter().map(one).collect();
        report.status.size = Some(human_bytes(verified.size));
        report.status.frozen = Some(human_duration(self.stood));
    }
}

pub(super) fn partial_tar(folder: &Path, container: &str) -> PathBuf {
    folder.join(format!("{container}.tar.partial"))
}

/// After a failure: only the logs stay, and nothing if there are none.
pub(super) fn remove_all_but_logs(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let removed = match entry.file_type() {
            Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
            Ok(_) if path.extension().is_none_or(|e| e != "log") => fs::remove_file(&path),
            _ => Ok(()),
        };
        if let Err(error) = removed {
            tracing::error!(path = %path.display(), %error, "cannot delete a partial file");
        }
    }
    // Refused, as it should be, while logs are there.
    let _ = fs::remove_dir(folder);
}

/// Deletes an archive's folder; it is no error if there is none.
pub fn remove_folder(folder: &Path) {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::error!(folder = %folder.display(), %error, "cannot delete an archive");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_goes_with_its_object_only_if_nothing_says_that_it_stays() {
        let root = tempfile::tempdir().unwrap();
        let note = root.path().join(POLICY);
        assert!(!keeps(root.path()));
        for (words, stays) in [("\"Delete\"", false), ("\"Retain\"", true), ("\"Ret", true)] {
            fs::write(&note, words).unwrap();
            assert_eq!(keeps(root.path()), stays, "{words}");
        }
        fs::remove_file(&note).unwrap();
        fs::create_dir(&note).unwrap();
        assert!(keeps(root.path()), "a note that cannot be read");
    }

    #[test]
    fn after_a_failure_only_the_log_is_left() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("u-1");
        fs::create_dir_all(folder.join("main.partial/checkpoint")).unwrap();
        fs::write(folder.join("main.tar.partial"), b"x").unwrap();
        fs::write(folder.join("main.criu.log"), b"x").unwrap();
        remove_all_but_logs(&folder);
        let left: Vec<_> = fs::read_dir(&folder)
            .unwrap()
            .flatten()
            .map(|e| e.file_name())
            .collect();
        assert_eq!(left, ["main.criu.log"]);
        fs::remove_file(folder.join("main.criu.log")).unwrap();
        remove_all_but_logs(&folder);
        assert!(!folder.exists());
    }
}
