//! What a checkpoint leaves on the node's disk: a verified archive under its name, or logs only.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use podcheckpoint_crds::{
    ArchiveFormat, ArchiveState, CheckpointLocation, CheckpointedContainer, LocationType, NodeLocal,
};

use super::Stop;
use crate::archive::{self, ArchiveError, Identity, Verified};
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

/// What failed leaves nothing but logs; what did not is named in the status.
pub(super) fn keep_or_remove(
    result: Result<(), Stop>,
    uid: &str,
    folder: &Path,
    report: &mut Report,
) -> Result<(), Stop> {
    if result.is_err() {
        remove_all_but_logs(folder);
    } else {
        let path = format!("checkpoints/{uid}");
        report.status.checkpoint_location = Some(CheckpointLocation {
            r#type: LocationType::NodeLocal,
            node_local: Some(NodeLocal { path }),
        });
        report.archive_state(ArchiveState::Present);
    }
    result
}

pub(super) fn store(
    folder: &Path,
    name: &str,
    direct: bool,
    expected: &Identity,
) -> Result<(String, Verified), ArchiveError> {
    if direct {
        let partial = folder.join(format!("{name}.partial"));
        let verified = archive::verify_folder(&partial, expected)?;
        archive::publish(&partial, &folder.join(name))?;
        return Ok((name.to_owned(), verified));
    }
    let partial = partial_tar(folder, name);
    let verified = archive::verify_tar(&partial, expected)?;
    let file = format!("{name}.tar");
    archive::publish(&partial, &folder.join(&file))?;
    Ok((file, verified))
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
