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

/// The cgroup below a container's scope that crun makes under systemd, and that it freezes instead of the scope.
const CRUNS: &str = "container";

/// How long one call may take: the container is frozen meanwhile.
const LIMIT: Duration = Duration::from_millis(500);

/// Corrects containerd's books about containers that run. Each that it calls paused is frozen for the moment of one
/// resume (tens of milliseconds), and thawed whatever comes of it. A container that has ended has no books to correct.
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
    if freezers.iter().all(has_ended) {
        return Ok(());
    }
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
    let outcome = match freezer.container() {
        Some(container) if !has_ended(freezer) => resume(tasks, freezer, container).await,
        _ => Ok(()),
    };
    // One that ends in the middle is asked about in vain, and would be for as long as anybody tries.
    outcome.or_else(|error| {
        if error.is_not_found() || has_ended(freezer) {
            Ok(())
        } else {
            Err(error)
        }
    })
}

/// The runtime removes the cgroup of a container that has ended.
fn has_ended(freezer: &Freezer) -> bool {
    !freezer.path.exists()
}

async fn resume(tasks: &Tasks, freezer: &Freezer, container: &str) -> Result<(), TasksError> {
    // What is frozen and called paused is no error in the books.
    if !tasks.is_paused(container, LIMIT).await? || freezer.is_frozen().unwrap_or(true) {
        return Ok(());
    }
    // Dropped on every path, also when the caller gives up in the middle.
    let _thawed = ThawOnDrop(freezer);
    let _ = freezer.freeze();
    // Each runtime looks only at the cgroup that it freezes itself. With another runtime there is no such one.
    let cruns = Freezer {
        version: freezer.version,
        path: freezer.path.join(CRUNS),
    };
    let _ = cruns.freeze();
    tasks.resume_within(container, LIMIT).await
}

struct ThawOnDrop<'a>(&'a Freezer);

impl Drop for ThawOnDrop<'_> {
    fn drop(&mut self) {
        let _ = self.0.thaw();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::sync::{Arc, Mutex};

    use h2::server::SendResponse;
    use prost::bytes::Bytes;
    use tokio::net::{UnixListener, UnixStream};

    use super::*;
    use crate::node::cgroup::Version;

    const ID: &str = "5f0d1c2b3a495867f6e5d4c3b2a190887766554433221100ffeeddccbbaa9988";

    /// Codes of gRPC.
    const UNKNOWN: u8 = 2;
    const NOT_FOUND: u8 = 5;

    /// What containerd answers to a call: a message, or a code. It may look around before.
    type Answer = Arc<dyn Fn(&str) -> Result<Vec<u8>, u8> + Send + Sync>;

    /// The answer to Get about a container that is called paused: field 1 has field 4, the status.
    fn called_paused() -> Result<Vec<u8>, u8> {
        Ok(vec![0x0a, 2, 0x20, 4])
    }

    /// A containerd that keeps a list of the calls.
    struct Containerd {
        folder: tempfile::TempDir,
        calls: Arc<Mutex<Vec<String>>>,
    }

    impl Containerd {
        fn new(answer: impl Fn(&str) -> Result<Vec<u8>, u8> + Send + Sync + 'static) -> Self {
            let (folder, answer) = (tempfile::tempdir().unwrap(), Arc::new(answer) as Answer);
            let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
            let calls = Arc::new(Mutex::new(Vec::new()));
            let list = calls.clone();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(serve(stream, answer.clone(), list.clone()));
                }
            });
            Self { folder, calls }
        }

        /// A container of it, whose folder has the files of a cgroup that runs and is none.
        fn container(&self) -> Freezer {
            let path = self.folder.path().join(ID);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("freezer.state"), "THAWED\n").unwrap();
            freezer(Version::V1, path)
        }

        async fn correct(&self, freezers: &[Freezer]) -> Result<(), TasksError> {
            correct_books(&self.folder.path().join("socket"), freezers).await
        }

        fn calls(&self) -> Vec<String> {
            self.calls.lock().unwrap().clone()
        }
    }

    async fn serve(stream: UnixStream, answer: Answer, calls: Arc<Mutex<Vec<String>>>) {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((request, respond))) = connection.accept().await {
            let call = request.uri().path().rsplit('/').next().unwrap().to_owned();
            calls.lock().unwrap().push(call.clone());
            send(respond, answer(&call));
        }
    }

    fn send(mut respond: SendResponse<Bytes>, answer: Result<Vec<u8>, u8>) {
        let head = http::Response::builder().header("content-type", "application/grpc");
        match answer {
            Ok(message) => {
                let mut stream = respond.send_response(head.body(()).unwrap(), false).unwrap();
                let mut frame = vec![0, 0, 0, 0, u8::try_from(message.len()).unwrap()];
                frame.extend(message);
                stream.send_data(frame.into(), false).unwrap();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", 0.into());
                stream.send_trailers(trailers).unwrap();
            }
            Err(code) => {
                let head = head.header("grpc-status", u16::from(code)).body(()).unwrap();
                respond.send_response(head, true).unwrap();
            }
        }
    }

    fn freezer(version: Version, path: PathBuf) -> Freezer {
        Freezer { version, path }
    }

    #[tokio::test]
    async fn a_container_that_containerd_no_longer_knows_has_no_books_to_correct() {
        let containerd = Containerd::new(|_| Err(NOT_FOUND));
        let container = containerd.container();
        containerd.correct(&[container]).await.unwrap();
        assert_eq!(containerd.calls(), ["Get"]);
    }

    #[tokio::test]
    async fn a_container_that_ends_before_it_is_resumed_has_no_books_to_correct() {
        let answer = |call: &str| {
            if call == "Get" {
                called_paused()
            } else {
                Err(NOT_FOUND)
            }
        };
        let containerd = Containerd::new(answer);
        let container = containerd.container();
        containerd.correct(&[container]).await.unwrap();
        assert_eq!(containerd.calls(), ["Get", "Resume"]);
    }

    #[tokio::test]
    async fn a_container_without_a_cgroup_has_no_books_to_correct_whatever_containerd_says() {
        let containerd = Containerd::new(|_| Err(UNKNOWN));
        let ended = freezer(Version::V2, containerd.folder.path().join(ID));
        containerd.correct(std::slice::from_ref(&ended)).await.unwrap();
        // Nor has it where containerd has ended as well.
        let nobody = containerd.folder.path().join("nobody");
        let answer = tokio::task::spawn_blocking(move || correct_books_blocking(&nobody, &[ended]));
        assert_eq!(answer.await.unwrap(), Ok(()));
    }

    #[tokio::test]
    async fn a_container_whose_cgroup_goes_while_containerd_is_asked_has_no_books_to_correct() {
        let gone: Arc<Mutex<Option<PathBuf>>> = Arc::default();
        let told = gone.clone();
        let containerd = Containerd::new(move |call| {
            if call == "Get" {
                return called_paused();
            }
            fs::remove_dir_all(told.lock().unwrap().take().unwrap()).unwrap();
            Err(UNKNOWN)
        });
        let container = containerd.container();
        *gone.lock().unwrap() = Some(container.path.clone());
        containerd.correct(&[container]).await.unwrap();
        assert_eq!(containerd.calls(), ["Get", "Resume"]);
    }

    #[tokio::test]
    async fn any_other_answer_about_a_container_that_runs_is_an_error() {
        for failing in ["Get", "Resume"] {
            let containerd = Containerd::new(move |call| {
                if call == failing {
                    return Err(UNKNOWN);
                }
                called_paused()
            });
            let container = containerd.container();
            let error = containerd.correct(&[container]).await.unwrap_err();
            assert!(
                matches!(&error, TasksError::Status { call, .. } if *call == failing),
                "{error}"
            );
        }
    }

    /// crun calls a container paused whose cgroup below the scope is told to freeze, runc one whose own is.
    #[tokio::test]
    async fn a_resume_finds_the_container_frozen_at_the_level_of_either_runtime_and_leaves_neither_so() {
        let trees: [(Version, &[&str]); 2] = [
            (Version::V1, &["/sys/fs/cgroup/freezer"]),
            (Version::V2, &["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]),
        ];
        for (version, trees) in trees {
            let name = format!("podcheckpoint-books-{}-{ID}.scope", std::process::id());
            let levels = trees.iter().find_map(|tree| {
                let own = freezer(version, Path::new(tree).join(&name));
                let below = freezer(version, own.path.join("container"));
                let made = fs::create_dir(&own.path).is_ok() && fs::create_dir(&below.path).is_ok();
                if made && below.is_told_to_freeze().is_ok() {
                    return Some([own, below]);
                }
                let _ = (fs::remove_dir(&below.path), fs::remove_dir(&own.path));
                None
            });
            let Some(levels) = levels else {
                eprintln!("SKIPPED: needs root and a freezer of {version:?}");
                continue;
            };
            let [own, below] = &levels;
            let seen: Arc<Mutex<Vec<bool>>> = Arc::default();
            let (list, looked_at) = (seen.clone(), levels.clone());
            let containerd = Containerd::new(move |call| {
                if call == "Get" {
                    return called_paused();
                }
                let told = looked_at.iter().map(|level| level.is_told_to_freeze().unwrap());
                list.lock().unwrap().extend(told);
                Ok(Vec::new())
            });
            let corrected = containerd.correct(std::slice::from_ref(own)).await;
            let after: Vec<bool> = levels.iter().map(|l| l.is_told_to_freeze().unwrap()).collect();
            let _ = (fs::remove_dir(&below.path), fs::remove_dir(&own.path));
            corrected.unwrap();
            assert_eq!(*seen.lock().unwrap(), [true, true], "{version:?}");
            assert_eq!(after, [false, false], "{version:?}");
        }
    }
}
