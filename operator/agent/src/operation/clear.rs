//! What the runtime goes on writing after a checkpoint was called off is deleted, if need be by the agent after this one.
//!
//! The operation's own entry in the journal goes when its end is told, which does not wait for the runtime without end.
//! From then on an entry beside it says what is still to be deleted.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use podcheckpoint_crds::{Reason, Step};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{Context, Inspection, Stop, keep};
use crate::journal::{aside, entries_in, path_in, write_synced};
use crate::node::nodefs::NODE_ROOT;
use crate::node::runtime_files::{RuntimeFiles, started};

/// How long the end of a checkpoint waits for the runtime; what takes longer goes on by itself.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked at meanwhile.
const TICK: Duration = Duration::from_millis(100);

/// Called when nobody waits any more for what the runtime writes for an object. Returns when the runtime has ended its work
/// and what it wrote is deleted, or after ten seconds; then that goes on beside everything else.
pub(crate) async fn clear(context: &Context, uid: &str, files: RuntimeFiles) {
    let clearing = Clearing::new(context, uid, files.called_off());
    let mut work = tokio::spawn(clearing.carry_out(Path::new(NODE_ROOT)));
    if tokio::time::timeout(PATIENCE, &mut work).await.is_err() {
        tracing::warn!(
            uid,
            "the runtime still works on a checkpoint that was called off; its files are deleted later"
        );
    }
}

/// Writes down that the files of an object are to be cleared, before its entry in the journal goes and [`clear`] is called.
pub(crate) fn note(context: &Context, uid: &str, files: &RuntimeFiles) {
    Clearing::new(context, uid, files.clone().called_off()).note();
}

/// Waits for a runtime that still writes an earlier checkpoint of one of the containers, and refuses this one when that
/// takes too long: both would use the same folder, and the end of the earlier one would delete the files of the other.
/// Before the operation is in the journal.
pub(super) async fn wait_for_earlier(found: &Inspection, files: Option<&RuntimeFiles>) -> Result<(), Stop> {
    let Some(files) = files.cloned() else {
        return Ok(());
    };
    let since = found.cri.process().await.and_then(started);
    let limit = Instant::now() + PATIENCE.min(found.deadline.left());
    let id = loop {
        let files = files.clone();
        let look = move || {
            let container = files.at_work_on(Path::new(NODE_ROOT), since);
            container.map(str::to_owned)
        };
        // A disk of the runtime's that hangs is found by the checkpoint itself.
        match aside(look).await.flatten() {
            None => return Ok(()),
            Some(id) if Instant::now() >= limit => break id,
            Some(_) => tokio::time::sleep(TICK).await,
        }
    };
    let subject = found.subjects().iter().find(|s| s.container.id == id);
    Err(busy(subject.map_or(&id, |s| &s.container.name)))
}

fn busy(container: &str) -> Stop {
    let words = format!(
        "the runtime still writes an earlier checkpoint of container {container}, which was called off; a second one would lose its files to the end of the first"
    );
    Stop::new(Step::Freeze, Reason::TargetBusy, words)
}

/// Goes on with what an earlier agent has not lived to clear. Before anything else is begun: what the journal has without a
/// result now is cleared when its interruption is concluded, and twice would take the file of somebody else.
pub(crate) async fn resume(context: &Context) {
    let looked = context.clone();
    let Some(left) = aside(move || left(&looked)).await else {
        tracing::error!("the disk of the journal does not answer; what is still to be cleared is not known");
        return;
    };
    for clearing in left {
        tracing::warn!(
            uid = clearing.entry.uid,
            "the runtime may still write a checkpoint that was called off"
        );
        tokio::spawn(clearing.carry_out(Path::new(NODE_ROOT)));
    }
}

fn left(context: &Context) -> Vec<Clearing> {
    let mut begun = context.journal.entries();
    begun.retain(|entry| entry.result.is_none());
    let left: Vec<Entry> = entries_in(&folder(context));
    left.into_iter()
        .filter(|left| !begun.iter().any(|entry| entry.uid == left.uid))
        .map(|entry| Clearing::new(context, &entry.uid, entry.files))
        .collect()
}

fn folder(context: &Context) -> PathBuf {
    context.archive_root.join("clearing")
}

/// What is still to be cleared of one object.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    /// The object.
    uid: String,
    /// What the runtime may be writing.
    files: RuntimeFiles,
}

#[derive(Clone)]
struct Clearing {
    entry: Entry,
    /// The entry's file.
    path: PathBuf,
    /// Where the object's archive would be.
    archive: PathBuf,
}

impl Clearing {
    fn new(context: &Context, uid: &str, files: RuntimeFiles) -> Self {
        let uid = uid.to_owned();
        Self {
            path: path_in(&folder(context), &uid),
            archive: context.folder(&uid),
            entry: Entry { uid, files },
        }
    }

    fn note(&self) {
        if let Err(error) = write_synced(&self.path, &self.entry) {
            let path = self.path.display();
            tracing::error!(%path, %error, "an agent after this one would not know what the runtime writes");
        }
    }

    async fn carry_out(self, root: &Path) {
        // Else there is nothing to wait for, and nothing that the next agent would have to know.
        if self.entry.files.is_at_work(root) {
            let noted = self.clone();
            if aside(move || noted.note()).await.is_none() {
                tracing::error!("the disk of the journal does not answer");
            }
        }
        self.entry.files.clone().clear(root).await;
        let _ = tokio::task::spawn_blocking(move || self.end()).await;
    }

    fn end(&self) {
        keep::remove_all_but_logs(&self.archive);
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(path = %self.path.display(), %error, "journal");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{self, Journal};
    use crate::node::nodefs::KUBELET;
    use crate::security::Security;
    use podcheckpoint_crds::{DeletionPolicy, PodCheckpointStatus};
    use std::fs;
    use std::sync::Arc;

    fn context(archive_root: &Path) -> Context {
        Context {
            runtime_socket: None,
            kubelet: None,
            journal: Journal::new(archive_root),
            security: Arc::new(Security::new(archive_root, Vec::new())),
            archive_root: archive_root.to_owned(),
            node: Arc::default(),
            machines_in_pods: false,
        }
    }

    fn files() -> RuntimeFiles {
        RuntimeFiles {
            containers: vec!["c1".into()],
            root: Some("/data/cri".into()),
            kubelet: vec![RuntimeFiles::of_kubelet("shop", "cart", "main")],
            since: "2026-01-01T10:00:00Z".parse().unwrap(),
            until: "2026-01-01T10:00:05Z".parse().unwrap(),
        }
    }

    fn at_work(root: &Path) -> PathBuf {
        let folder = root.join("data/cri/containers/c1/ctrd-checkpoint");
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_runtime_writes_after_the_agent_has_died_is_deleted_by_the_next_one() {
        let root = tempfile::tempdir().unwrap();
        let context = context(&root.path().join("archives"));
        let of_kubelet = root.path().join(KUBELET).join("checkpoints");
        let at_work = at_work(root.path());
        let first = Clearing::new(&context, "u-1", files());
        let node = root.path().to_owned();
        let agent = tokio::spawn(async move { first.carry_out(&node).await });
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(!agent.is_finished());
        agent.abort();
        assert!(agent.await.is_err());
        fs::create_dir_all(&of_kubelet).unwrap();
        let late = of_kubelet.join("checkpoint-cart_shop-main-2026-01-01T10:00:01Z.tar");
        fs::write(&late, "memory").unwrap();
        let archive = context.folder("u-1");
        fs::create_dir_all(&archive).unwrap();
        fs::write(archive.join("main.tar.partial"), "memory").unwrap();
        fs::write(archive.join("main.criu.log"), "why").unwrap();
        fs::remove_dir(at_work).unwrap();
        let mut left = left(&context);
        assert_eq!(left[0].entry.files, files());
        left.remove(0).carry_out(root.path()).await;
        assert!(!late.exists() && !archive.join("main.tar.partial").exists());
        assert!(archive.join("main.criu.log").exists());
        assert!(left.is_empty() && super::left(&context).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_runtime_that_has_ended_leaves_nothing_to_write_down() {
        let root = tempfile::tempdir().unwrap();
        let context = context(&root.path().join("archives"));
        let clearing = Clearing::new(&context, "u-1", files());
        clearing.carry_out(root.path()).await;
        assert!(!folder(&context).exists());
    }

    #[test]
    fn what_the_end_of_an_interrupted_checkpoint_will_clear_is_not_cleared_twice() {
        let root = tempfile::tempdir().unwrap();
        let context = context(root.path());
        let entry = |result| journal::Entry {
            uid: "u-1".into(),
            namespace: "shop".into(),
            name: "cart".into(),
            deletion_policy: DeletionPolicy::Delete,
            pids: Vec::new(),
            machine: None,
            sentry: None,
            files: Some(files()),
            guest: None,
            result,
        };
        note(&context, "u-1", &files());
        context.journal.write(&entry(None)).unwrap();
        assert!(left(&context).is_empty());
        let told = Some(PodCheckpointStatus::default());
        context.journal.write(&entry(told)).unwrap();
        assert_eq!(left(&context).len(), 1);
    }
}
