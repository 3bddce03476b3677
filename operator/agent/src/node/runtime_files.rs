//! What the runtime goes on writing when nobody waits for its checkpoint any more.
//!
//! containerd 2.4 does not look at its caller once CRIU has ended: it copies the images to and fro and writes the archive
//! where it was told to (internal/cri/server/container_checkpoint_linux.go), and the kubelet that passed the call on
//! deletes nothing (pkg/kubelet/kubelet.go, CheckpointContainer). So the memory of a pod would come to lie where nobody
//! looks for it, seconds after its checkpoint was called off.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use k8s_openapi::jiff::Timestamp;
use podcheckpoint_probe::proc;
use rustix::fs::{AtFlags, Dir, unlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::nodefs::{self, KUBELETS};

/// Where containerd keeps what it knows of containers, when it does not tell: of itself, k3s, RKE2, k0s and microk8s.
const KNOWN_ROOTS: [&str; 5] = [
    "/var/lib/containerd/io.containerd.grpc.v1.cri",
    "/var/lib/rancher/k3s/agent/containerd/io.containerd.grpc.v1.cri",
    "/var/lib/rancher/rke2/agent/containerd/io.containerd.grpc.v1.cri",
    "/var/lib/k0s/containerd/io.containerd.grpc.v1.cri",
    "/var/snap/microk8s/common/var/lib/containerd/io.containerd.grpc.v1.cri",
];
/// What containerd has there for as long as it works on a container's checkpoint.
const AT_WORK: &str = "ctrd-checkpoint";
/// How often is looked.
const TICK: Duration = Duration::from_millis(200);
/// What is cut off from the time at which a file was changed.
const TRUNCATED: Duration = Duration::from_secs(1);
/// What is there for longer is nobody's work: no checkpoint may take so long.
const OLD: Duration = Duration::from_secs(2 * 3600);
/// When the runtime is given up: what it has there is of a containerd that is gone.
const LIMIT: Duration = Duration::from_secs(600);

/// When a process was started, by the clock as it is set now; never too late. None when it has ended.
pub fn started(pid: i32) -> Option<SystemTime> {
    let after_boot = Duration::from_millis(proc::stat(pid)?.start_time.saturating_mul(10));
    // The kernel gives whole seconds, rounded up.
    let up = Duration::from_secs(u64::try_from(rustix::system::sysinfo().uptime).ok()?);
    SystemTime::now().checked_sub(up.checked_sub(after_boot)?)
}

/// What the runtime writes for one checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RuntimeFiles {
    /// The containers' IDs.
    pub containers: Vec<String>,
    /// The folder in which containerd keeps what it knows of containers; one of the known ones when it did not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<PathBuf>,
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

    /// The same, when nobody waits for the runtime any more: what it is asked from now on is not this checkpoint.
    pub fn called_off(self) -> Self {
        let until = self.until.min(Timestamp::now());
        Self { until, ..self }
    }

    /// Deletes what the runtime writes until it has ended its work, or for ten minutes.
    pub(crate) async fn clear(mut self, root: &Path) {
        let started = tokio::time::Instant::now();
        loop {
            // Looked at first: what it writes at its very end must not be missed.
            let at_work = self.is_at_work(root);
            if let Err(error) = self.remove(root) {
                tracing::error!(%error, "what the kubelet has written cannot be deleted");
            }
            if !at_work || started.elapsed() >= LIMIT {
                return;
            }
            tokio::time::sleep(TICK).await;
        }
    }

    /// Whether the runtime still writes.
    pub(crate) fn is_at_work(&self, root: &Path) -> bool {
        self.at_work_on(root, None).is_some()
    }

    /// The first of the containers on whose checkpoint the runtime is at work. What was there before a runtime that has been
    /// running since then is of one that is gone.
    pub(crate) fn at_work_on(&self, root: &Path, running_since: Option<SystemTime>) -> Option<&str> {
        let known = || KNOWN_ROOTS.map(PathBuf::from).to_vec();
        let roots = self.root.clone().map_or_else(known, |told| vec![told]);
        let before = |changed| running_since?.duration_since(changed).ok();
        let recent = |changed: SystemTime| changed.elapsed().is_ok_and(|age| age < OLD);
        let begun_by_this_one = |changed| {
            running_since.is_none()
                || recent(changed) && before(changed).is_none_or(|before| before <= TRUNCATED)
        };
        let at_work = |id: &&String| {
            let of_container = Path::new("containers").join(id).join(AT_WORK);
            let mut places = roots.iter().map(|folder| folder.join(&of_container));
            places.any(|place| nodefs::changed(root, &place).is_ok_and(begun_by_this_one))
        };
        self.containers.iter().find(at_work).map(String::as_str)
    }

    /// Deletes the kubelet's file for each container, once.
    fn remove(&mut self, root: &Path) -> io::Result<()> {
        let mut result = Ok(());
        for kubelet in KUBELETS {
            if self.kubelet.is_empty() {
                break;
            }
            match self.remove_in(root, kubelet) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => result = Err(error),
                _ => {}
            }
        }
        result
    }

    /// Its name is the only sign of whose file it is: it is the first one that was named after the runtime was asked.
    fn remove_in(&mut self, root: &Path, kubelet: &str) -> io::Result<()> {
        let folder = nodefs::open(root, &format!("{kubelet}/checkpoints"))?;
        let names = Dir::read_from(&folder)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<Vec<_>>>()?;
        let mut result = Ok(());
        for begin in std::mem::take(&mut self.kubelet) {
            let Some(name) = self.first_of(&begin, &names) else {
                self.kubelet.push(begin);
                continue;
            };
            tracing::info!(
                name,
                "deleting what the kubelet wrote for a checkpoint that was called off"
            );
            match unlinkat(&folder, name, AtFlags::empty()) {
                // Somebody else was faster.
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => {
                    self.kubelet.push(begin);
                    result = Err(error.into());
                }
            }
        }
        result
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
            root: None,
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
        let of_kubelet = root.path().join(KUBELETS[0]).join("checkpoints");
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
        files().clear(root.path()).await;
        assert!(runtime.is_finished() && !at_work.exists());
        assert!(!late.exists() && others.exists());
    }

    #[test]
    fn containerd_is_seen_at_work_where_it_says_it_is_and_else_where_distributions_put_it() {
        let containers = "io.containerd.grpc.v1.cri/containers";
        let at_work = |place: &str, files: &RuntimeFiles| {
            let root = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(root.path().join(place)).unwrap();
            files.is_at_work(root.path())
        };
        for known in [
            "var/lib/containerd",
            "var/lib/rancher/k3s/agent/containerd",
            "var/lib/rancher/rke2/agent/containerd",
            "var/lib/k0s/containerd",
            "var/snap/microk8s/common/var/lib/containerd",
        ] {
            assert!(at_work(
                &format!("{known}/{containers}/c1/ctrd-checkpoint"),
                &files()
            ));
            assert!(!at_work(
                &format!("{known}/{containers}/c2/ctrd-checkpoint"),
                &files()
            ));
            assert!(!at_work(&format!("{known}/{containers}/c1"), &files()));
        }
        let told = RuntimeFiles {
            root: Some("/data/containerd/io.containerd.grpc.v1.cri".into()),
            ..files()
        };
        let theirs = format!("data/containerd/{containers}/c1/ctrd-checkpoint");
        let others = format!("var/lib/containerd/{containers}/c1/ctrd-checkpoint");
        assert!(at_work(&theirs, &told) && !at_work(&theirs, &files()));
        assert!(!at_work(&others, &told));
    }

    #[test]
    fn what_a_runtime_left_that_was_restarted_since_is_not_taken_for_its_work() {
        let root = tempfile::tempdir().unwrap();
        let containers = root
            .path()
            .join("var/lib/containerd/io.containerd.grpc.v1.cri/containers");
        std::fs::create_dir_all(containers.join("c2/ctrd-checkpoint")).unwrap();
        let both = RuntimeFiles {
            containers: vec!["c1".into(), "c2".into()],
            ..files()
        };
        let now = SystemTime::now();
        let at_work_on = |since| both.at_work_on(root.path(), since);
        assert_eq!(at_work_on(Some(now - Duration::from_secs(60))), Some("c2"));
        assert_eq!(at_work_on(Some(now + Duration::from_secs(60))), None);
        assert_eq!(at_work_on(None), Some("c2"));
        assert_eq!(files().at_work_on(root.path(), None), None);
    }

    #[test]
    fn a_process_was_started_when_the_clock_says_so() {
        let before = SystemTime::now();
        let mut process = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(process.id()).unwrap();
        let seen = started(pid).unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
        assert!(seen <= SystemTime::now());
        assert!(before.duration_since(seen).unwrap_or_default() < Duration::from_secs(2));
        assert_eq!(started(pid), None);
    }

    #[test]
    fn what_an_agent_wrote_down_before_containerd_was_asked_where_it_is_can_be_read() {
        let old = r#"{"containers": ["c1"], "kubelet": ["checkpoint-cart_shop-main-"],
            "since": "2026-01-01T10:00:00.7Z", "until": "2026-01-01T10:00:05Z"}"#;
        assert_eq!(serde_json::from_str::<RuntimeFiles>(old).unwrap(), files());
    }

    #[test]
    fn the_file_of_the_kubelet_is_deleted_wherever_a_distribution_lets_it_write() {
        for kubelet in KUBELETS {
            let root = tempfile::tempdir().unwrap();
            let folder = root.path().join(kubelet).join("checkpoints");
            std::fs::create_dir_all(&folder).unwrap();
            let file = folder.join("checkpoint-cart_shop-main-2026-01-01T10:00:01Z.tar");
            std::fs::write(&file, "memory").unwrap();
            let mut files = files();
            files.remove(root.path()).unwrap();
            assert!(!file.exists() && files.kubelet.is_empty());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_runtime_that_is_gone_has_left_is_not_waited_for_without_end() {
        let root = tempfile::tempdir().unwrap();
        let stale = "var/lib/containerd/io.containerd.grpc.v1.cri/containers/c1/ctrd-checkpoint";
        std::fs::create_dir_all(root.path().join(stale)).unwrap();
        let started = tokio::time::Instant::now();
        files().clear(root.path()).await;
        assert!(started.elapsed() >= LIMIT);
    }
}
