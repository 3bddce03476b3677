//! The order of a checkpoint by gVisor's kernel: look, ask, wait until it is through.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::{GvisorError, runsc};
use crate::sandbox::Sentry;

/// How long runsc may take to tell what it knows.
const ANSWER: Duration = Duration::from_secs(5);
/// How often a kernel that writes is looked at.
const TICK: Duration = Duration::from_millis(50);
/// How long a kernel that writes is waited for when its checkpoint is not wanted any more.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is known of a sandbox before anything is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Version of runsc.
    pub version: String,
    /// Bundle of the sandbox itself on the node, and then of each container that was asked about, in that order.
    pub bundles: Vec<PathBuf>,
}

/// Looks at a sandbox and its containers. Changes nothing.
///
/// # Errors
/// When runsc does not know them or does not answer, and when one is paused: its checkpoint would be one of a pod that
/// stands still, and stay so after a restore.
pub async fn look(sentry: &Sentry, containers: &[String]) -> Result<Seen, GvisorError> {
    let version = runsc::run(sentry, &["--version"], ANSWER).await?;
    let mut bundles = Vec::new();
    for id in std::iter::once(&sentry.sandbox).chain(containers) {
        let state = runsc::state(sentry, id, ANSWER).await?;
        if state.status == "paused" {
            return Err(GvisorError::Paused(id.clone()));
        }
        bundles.push(PathBuf::from(state.bundle));
    }
    let first = version.lines().next().unwrap_or_default();
    Ok(Seen {
        version: first.trim_start_matches("runsc version ").to_owned(),
        bundles,
    })
}

/// Whether a container of the sandbox is paused in runsc's books.
///
/// # Errors
/// When runsc does not answer.
pub async fn is_paused(sentry: &Sentry) -> Result<bool, GvisorError> {
    let state = runsc::state(sentry, &sentry.sandbox, ANSWER).await?;
    Ok(state.status == "paused")
}

/// Lets the kernel write its state into a folder that is there. Whatever comes of it, the kernel is through with it when
/// this returns, or is so slow that [`is_saving`] still says so. The time is how long the pod stood still at most.
///
/// # Errors
/// Why there is no state.
pub async fn save(
    sentry: &Sentry,
    folder: &Path,
    deadline: Duration,
    cancelled: &CancellationToken,
) -> Result<Duration, GvisorError> {
    let path = folder.to_string_lossy();
    let arguments = [
        "checkpoint",
        "--leave-running",
        "--image-path",
        &path,
        &sentry.sandbox,
    ];
    let begun = Instant::now();
    let result = tokio::select! {
        // What is awaited here ends by the deadline; runsc is given no time of its own.
        result = runsc::run(sentry, &arguments, Duration::MAX) => result.map(drop),
        () = tokio::time::sleep(deadline) => Err(late(sentry, folder, deadline)),
        () = cancelled.cancelled() => Err(GvisorError::Cancelled),
    };
    // Also after a success: runsc is answered before the kernel has closed its files.
    wait_until_through(sentry, &path, PATIENCE).await;
    match result {
        Ok(()) => Ok(begun.elapsed()),
        Err(GvisorError::Cancelled) => Err(GvisorError::Cancelled),
        // What runsc says then is that a connection was closed.
        Err(_) if !sentry.alive() => Err(GvisorError::Gone(sentry.pid)),
        Err(error) => Err(error),
    }
}

/// A kernel that was handed no file did not take the call at all.
fn late(sentry: &Sentry, folder: &Path, deadline: Duration) -> GvisorError {
    if is_saving(sentry, &folder.to_string_lossy()) {
        GvisorError::Late(deadline)
    } else {
        runsc::silent(sentry, "checkpoint", deadline)
    }
}

/// Waits until the kernel holds no file of a checkpoint open any more; false when it still does.
pub async fn wait_until_through(sentry: &Sentry, part_of_path: &str, limit: Duration) -> bool {
    let started = Instant::now();
    while is_saving(sentry, part_of_path) {
        if started.elapsed() >= limit {
            return false;
        }
        tokio::time::sleep(TICK).await;
    }
    true
}

/// Whether the kernel holds a file open whose path has this part. It closes the files of a checkpoint after it has let
/// the pod's tasks run again.
pub fn is_saving(sentry: &Sentry, part_of_path: &str) -> bool {
    let entries = fs::read_dir(format!("/proc/{}/fd", sentry.pid))
        .into_iter()
        .flatten()
        .flatten();
    let mut links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    sentry.alive() && links.any(|link| link.to_string_lossy().contains(part_of_path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::facts;

    fn own() -> Sentry {
        let pid = i32::try_from(std::process::id()).unwrap();
        Sentry {
            pid,
            started: facts::started(pid).unwrap(),
            root: "/nonexistent".into(),
            sandbox: "s".into(),
            overlay: true,
        }
    }

    #[test]
    fn whoever_holds_a_file_of_the_checkpoint_open_is_saving() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint.img");
        let part = folder.path().to_string_lossy().into_owned();
        assert!(!is_saving(&own(), &part));
        let file = fs::File::create(&path).unwrap();
        assert!(is_saving(&own(), &part));
        fs::remove_file(&path).unwrap();
        assert!(is_saving(&own(), &part), "also when the file has been deleted");
        drop(file);
        assert!(!is_saving(&own(), &part));
    }

    #[test]
    fn another_process_that_got_the_number_is_not_saving() {
        let folder = tempfile::tempdir().unwrap();
        let _file = fs::File::create(folder.path().join("checkpoint.img")).unwrap();
        let other = Sentry { started: 1, ..own() };
        assert!(!is_saving(&other, &folder.path().to_string_lossy()));
    }
}
