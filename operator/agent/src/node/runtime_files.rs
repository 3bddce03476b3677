//! What the runtime goes on writing when nobody waits for its checkpoint any more.
//!
//! containerd 2.4 does not look at its caller once CRIU has ended: it copies the images to and fro and writes the archive
//! where it was told to (internal/cri/server/container_checkpoint_linux.go), and the kubelet that passed the call on
//! deletes nothing (pkg/kubelet/kubelet.go, CheckpointContainer). So the memory of a pod would come to lie where nobody
//! looks for it, seconds after its checkpoint was called off.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use rustix::fs::{AtFlags, Dir, unlinkat};
use serde::{Deserialize, Serialize};

use super::nodefs::{self, KUBELET, NODE_ROOT};

/// Where containerd keeps what it knows of containers; the second one is that of k3s.
const CONTAINERD: [&str; 2] = ["var/lib/containerd", "var/lib/rancher/k3s/agent/containerd"];
/// What containerd has there for as long as it works on a container's checkpoint.
const AT_WORK: &str = "ctrd-checkpoint";
/// How often is looked.
const TICK: Duration = Duration::from_millis(200);
/// How long the end of a checkpoint waits for the runtime; what takes longer goes on by itself.
const PATIENCE: Duration = Duration::from_secs(10);
/// When the runtime is given up: what it has there is of a containerd that is gone.
const LIMIT: Duration = Duration::from_secs(600);

/// What the runtime writes for one checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RuntimeFiles {
    /// The containers' IDs.
    pub containers: Vec<String>,
    /// How the kubelet's files begin, one for each container; none when it is not the kubelet that is asked.
    pub kubelet: Vec<String>,
    /// When the runtime was asked first.
    pub since: Timestamp,
    /// The deadline: after it, nothing was asked for.
    pub until: Timestamp,
}

impl RuntimeFiles {
    /// How the kubelet's file for a container begins; what follows is a time in RFC 3339, in whole seconds.
    pub fn of_kubelet(namespace: &str, pod: &str, container: &str) -> String {
        format!("checkpoint-{pod}_{namespace}-{container}-")
    }

    /// Called when nobody waits for the runtime any more. Returns when it has ended its work and what it wrote is deleted, or
    /// after ten seconds; then that goes on beside everything else, and `afterwards` is done at its end.
    pub async fn clear(self, afterwards: impl FnOnce() + Send + 'static) {
        let until = self.until.min(Timestamp::now());
        let mut work = tokio::spawn(async move {
            Self { until, ..self }.clear_below(Path::new(NODE_ROOT)).await;
            afterwards();
        });
        if tokio::time::timeout(PATIENCE, &mut work).await.is_err() {
            tracing::warn!(
                "the runtime still works on a checkpoint that was called off; its files are deleted later"
            );
        }
    }

    async fn clear_below(mut self, root: &Path) {
        let started = tokio::time::Instant::now();
        loop {
            // Looked at first: what it writes at its very end must not be missed.
            let at_work = self.is_at_work(root);
            match self.remove(root) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::error!(%error, "what the kubelet has written cannot be deleted");
                }
                _ => {}
            }
            if !at_work || started.elapsed() >= LIMIT {
                return;
            }
            tokio::time::sleep(TICK).await;
        }
    }

    fn is_at_work(&self, root: &Path) -> bool {
        let place = |base: &str, id: &str| -> PathBuf {
            let of_cri = root.join(base).join("io.containerd.grpc.v1.cri");
            of_cri.join("containers").join(id).join(AT_WORK)
        };
        let mut places = CONTAINERD
            .iter()
            .flat_map(|base| self.containers.iter().map(move |id| place(base, id)));
        places.any(|place| place.exists())
    }

    /// Deletes the kubelet's file for each container, once. Its name is the only sign of whose file it is: it is the first
    /// one that was named after the runtime was asked.
    fn remove(&mut self, root: &Path) -> io::Result<()> {
        if self.kubelet.is_empty() {
            return Ok(());
        }
        let folder = nodefs::open(root, &format!("{KUBELET}/checkpoints"))?;
        let names = Dir::read_from(&folder)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<Vec<_>>>()?;
        for begin in std::mem::take(&mut self.kubelet) {
            let Some(name) = self.first_of(&begin, &names) else {
                self.kubelet.push(begin);
                continue;
            };
            tracing::info!(
                name,
                "deleting what the kubelet wrote for a checkpoint that was called off"
            );
            unlinkat(&folder, name, AtFlags::empty())?;
        }
        Ok(())
    }

    fn first_of<'a>(&self, begin: &str, names: &'a [String]) -> Option<&'a str> {
        let asked = self.since.as_second()..=self.until.as_second();
        let ours = names.iter().filter_map(|name| {
            let time = name.strip_prefix(begin)?.strip_suffix(".tar")?;
            let second = time.parse::<Timestamp>().ok()?.as_second();
            asked.contains(&second).then_some((second, name.as_str()))
        });
        Some(ours.min()?.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: &str) -> Timestamp {
        time.parse().unwrap()
    }

    fn files() -> RuntimeFiles {
        RuntimeFiles {
            containers: vec!["c1".into()],
            kubelet: vec![RuntimeFiles::of_kubelet("shop", "cart", "main")],
            since: at("2026-01-01T10:00:00.7Z"),
            until: at("2026-01-01T10:00:05Z"),
        }
    }

    #[test]
    fn the_first_file_that_the_kubelet_named_during_the_checkpoint_of_this_container_is_ours() {
        let first = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            files().first_of(&files().kubelet[0], &names).map(str::to_owned)
        };
        let ours = "checkpoint-cart_shop-main-2026-01-01T10:00:00Z.tar";
        let later = "checkpoint-cart_shop-main-2026-01-01T11:00:05+01:00.tar";
        assert_eq!(first(&[later]).as_deref(), Some(later));
        assert_eq!(first(&[later, ours]).as_deref(), Some(ours));
        for other in [
            "checkpoint-cart_shop-main-2026-01-01T09:59:59Z.tar",
            "checkpoint-cart_shop-main-2026-01-01T10:00:06Z.tar",
            "checkpoint-cart_shop-main-side-2026-01-01T10:00:01Z.tar",
            "checkpoint-other_shop-main-2026-01-01T10:00:01Z.tar",
            "checkpoint-cart_shop-main-.tar",
            "somebody's.tar",
        ] {
            assert_eq!(first(&[other]), None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_runtime_writes_after_it_was_called_off_is_deleted_when_it_has_ended() {
        let root = tempfile::tempdir().unwrap();
        let of_kubelet = root.path().join(KUBELET).join("checkpoints");
        let at_work = root
            .path()
            .join("var/lib/containerd/io.containerd.grpc.v1.cri/containers/c1/ctrd-checkpoint");
        std::fs::create_dir_all(&of_kubelet).unwrap();
        std::fs::create_dir_all(&at_work).unwrap();
        // Of somebody who asked the kubelet a second later.
        let others = of_kubelet.join("checkpoint-cart_shop-main-2026-01-01T10:00:02Z.tar");
        let late = of_kubelet.join("checkpoint-cart_shop-main-2026-01-01T10:00:01Z.tar");
        let (write, end, theirs) = (late.clone(), at_work.clone(), others.clone());
        let runtime = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(3)).await;
            std::fs::write(write, "memory").unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
            std::fs::write(theirs, "memory").unwrap();
            std::fs::remove_dir(end).unwrap();
        });
        files().clear_below(root.path()).await;
        assert!(runtime.is_finished() && !at_work.exists());
        assert!(!late.exists() && others.exists());
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_runtime_that_is_gone_has_left_is_not_waited_for_without_end() {
        let root = tempfile::tempdir().unwrap();
        let stale = "var/lib/containerd/io.containerd.grpc.v1.cri/containers/c1/ctrd-checkpoint";
        std::fs::create_dir_all(root.path().join(stale)).unwrap();
        let started = tokio::time::Instant::now();
        files().clear_below(root.path()).await;
        assert!(started.elapsed() >= LIMIT);
    }
}
