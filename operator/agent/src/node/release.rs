//! Making containerd agree that a container runs again.
//!
//! A container that is thawed behind containerd's back stays "paused" in the books of its shim: `kubectl exec` and exec
//! probes are refused, the next checkpoint is taken of running processes, and a resume answers "container not paused",
//! because the OCI runtime looks at the freezer. The only way back is through a resume of a container that is frozen.

use std::path::Path;
use std::time::Duration;

use super::cgroup::{Control, Freezer};
use super::cri::Cri;
use super::tasks::{Tasks, TasksError};

/// How long one call may take: the container is frozen meanwhile.
const LIMIT: Duration = Duration::from_millis(500);

/// Corrects containerd's books about containers that run. Each that it calls paused is frozen for the moment of one
/// resume (tens of milliseconds), and thawed whatever comes of it.
///
/// # Errors
/// The last error of containerd; the containers run also then.
pub async fn correct_books(socket: &Path, freezers: &[Freezer]) -> Result<(), TasksError> {
    let tasks = Tasks::connect(socket).await?;
    let mut outcome = Ok(());
    for freezer in freezers {
        if let Err(error) = correct(&tasks, freezer).await {
            outcome = Err(error);
        }
    }
    outcome
}

/// [`correct_books`] for a caller that has no async runtime. A runtime other than containerd has no
/// such books.
pub(super) fn correct_books_blocking(socket: &Path, freezers: &[Freezer]) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let cri = Cri::discover(Some(socket))
            .await
            .map_err(|error| error.to_string())?;
        if !cri.version().is_containerd() {
            return Ok(());
        }
        correct_books(cri.socket(), freezers)
            .await
            .map_err(|error| error.to_string())
    })
}

/// The container whose freezer this is, if containerd calls it paused. Another runtime keeps no such books.
pub async fn called_paused(socket: &Path, freezer: &Freezer) -> Option<String> {
    let container = freezer.container()?;
    let tasks = Tasks::connect(socket).await.ok()?;
    let paused = tasks.is_paused(container, LIMIT).await.ok()?;
    paused.then(|| container.to_owned())
}

/// Makes containerd call a container paused that is frozen again: otherwise whoever had paused it could not resume it.
///
/// # Errors
/// What containerd answered, or that it did not.
pub async fn pause_again(socket: &Path, container: &str) -> Result<(), TasksError> {
    let tasks = Tasks::connect(socket).await?;
    let answer = tokio::time::timeout(LIMIT, tasks.pause(container)).await;
    answer.map_err(|_| TasksError::Timeout {
        call: "Pause",
        limit: LIMIT,
    })?
}

async fn correct(tasks: &Tasks, freezer: &Freezer) -> Result<(), TasksError> {
    let Some(container) = freezer.container() else {
        return Ok(());
    };
    // What is frozen and called paused is no error in the books.
    if !tasks.is_paused(container, LIMIT).await? || freezer.is_frozen().unwrap_or(true) {
        return Ok(());
    }
    // Dropped on every path, also when the caller gives up in the middle.
    let _thawed = ThawOnDrop(freezer);
    let _ = freezer.freeze();
    tasks.resume_within(container, LIMIT).await
}

struct ThawOnDrop<'a>(&'a Freezer);

impl Drop for ThawOnDrop<'_> {
    fn drop(&mut self) {
        let _ = self.0.thaw();
    }
}
