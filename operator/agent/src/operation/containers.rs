//! The checkpoint of containers whose processes are the node's, by the container runtime.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use podcheckpoint_crds::{Method, Reason, Step};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::keep::{aside_of_archive, describe_archive, not_stored, partial_tar, store_container};
use super::phases::Phases;
use super::{Context, Inspection, Stop, WATCHDOG_GRACE};
use crate::archive::{self, ArchiveError, Identity};
use crate::criu;
use crate::node::cgroup::{Control, Freezer};
use crate::node::cri::{Container, CriError};
use crate::node::kubelet::KubeletError;
use crate::node::process::{SourceState, Target, source_state};
use crate::node::tasks::{Tasks, TasksError};
use crate::node::watchdog::Watchdog;
use crate::report::Report;
use crate::words::{human_bytes, human_duration};

/// How often the freezer is looked at during a dump, which is how exactly the frozen time is known.
const FREEZER_TICK: Duration = Duration::from_millis(2);

/// A container that is to be checkpointed.
pub(super) struct Subject {
    pub(super) container: Container,
    pub(super) target: Target,
}

/// Takes the checkpoint and leaves the archives in the folder.
pub(super) async fn checkpoint(
    context: &Context,
    found: &Inspection,
    folder: &Path,
    report: &mut Report,
    cancelled: &CancellationToken,
    phases: &mut Phases,
) -> Result<(), Stop> {
    let (dumped, mut frozen) = dump(context, found, folder, cancelled).await;
    phases.end("dump");
    let result = match dumped {
        Ok(()) => finish(found, folder, report).await,
        Err(stop) => Err(keep_logs(or_pods_end(stop, found), found, folder)),
    };
    // A CRIU that has seized the processes thaws them: from then on only CRIU knows how long they stand still.
    frozen = frozen.max(longest_by_criu(report));
    report.status.frozen = (!frozen.is_zero()).then(|| human_duration(frozen));
    result
}

/// Dumps under the watchdog and the deadline. Whatever ends it, the target runs afterwards, or the report says so.
async fn dump(
    context: &Context,
    found: &Inspection,
    folder: &Path,
    cancelled: &CancellationToken,
) -> (Result<(), Stop>, Duration) {
    let (freezers, deadline) = (found.freezers(), found.deadline);
    let watchdog = match arm(context, found, deadline.limit + WATCHDOG_GRACE).await {
        Ok(watchdog) => watchdog,
        Err(error) => {
            let words = format!("the watchdog cannot be started: {error}");
            let stop = Stop::new(Step::Freeze, Reason::MethodUnavailable, words);
            return (Err(stop), Duration::ZERO);
        }
    };
    let work = by_method(context, found, folder, deadline.limit);
    let mut frozen = Duration::ZERO;
    let result = tokio::select! {
        result = work => result,
        () = watch_freezers(&freezers, &mut frozen) => Ok(()),
        () = tokio::time::sleep_until(deadline.until) => Err(deadline.passed(Step::Dump)),
        () = cancelled.cancelled() => Err(Stop::new(Step::Dump, Reason::AgentInterrupted, "cancelled: the PodCheckpoint was deleted or the agent is ending")),
    };
    let undisturbed = result.is_ok() && matches!(source_state(&freezers), SourceState::Runs { .. });
    let end = move || {
        if undisturbed {
            watchdog.disarm()
        } else {
            watchdog.release()
        }
    };
    if let Ok(Err(error)) = tokio::task::spawn_blocking(end).await {
        tracing::error!(%error, "the watchdog is gone");
    }
    (result, frozen)
}

/// Beside the loop: a child process takes its time to start.
async fn arm(context: &Context, found: &Inspection, limit: Duration) -> std::io::Result<Watchdog> {
    let (freezers, root) = (found.freezers(), context.archive_root.clone());
    let socket = found.cri.socket().to_owned();
    let arm = move || Watchdog::arm(&freezers, limit, &socket, &root);
    let armed = tokio::task::spawn_blocking(arm).await;
    armed.unwrap_or_else(|error| Err(std::io::Error::other(error)))
}

/// A pod that is deleted under a dump makes it fail in many words, none of which says so.
fn or_pods_end(stop: Stop, found: &Inspection) -> Stop {
    let ended = found.subjects().iter().find(|s| !s.target.alive());
    match ended {
        Some(subject) if !matches!(stop.reason, Reason::AgentInterrupted | Reason::DeadlineExceeded) => {
            let name = &subject.container.name;
            let words = format!("container {name} ended during the checkpoint: {}", stop.message);
            Stop::new(stop.step, Reason::SourcePodGone, words)
        }
        _ => stop,
    }
}

pub(super) fn longest_by_criu(report: &Report) -> Duration {
    let all = report.status.checkpointed_containers.iter();
    let longest = all.filter_map(|c| c.frozen_micros).max().unwrap_or_default();
    Duration::from_micros(u64::try_from(longest).unwrap_or_default())
}

/// Adds up how long any of the containers was frozen. Never returns.
async fn watch_freezers(freezers: &[Freezer], frozen: &mut Duration) {
    let mut ticker = tokio::time::interval(FREEZER_TICK);
    // A look that takes longer than a tick, at a container with many cgroups, is not made up for.
    ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = Instant::now();
    loop {
        ticker.tick().await;
        let now = Instant::now();
        if freezers.iter().any(|f| f.is_frozen().unwrap_or(false)) {
            *frozen += now - last;
        }
        last = now;
    }
}

async fn by_method(
    context: &Context,
    found: &Inspection,
    folder: &Path,
    deadline: Duration,
) -> Result<(), Stop> {
    match found.plan.method {
        Method::Kubelet => by_kubelet(context, found, folder, deadline).await,
        Method::Direct => by_tasks(found, folder).await,
        _ => by_cri(found, folder, deadline).await,
    }
}

async fn by_cri(found: &Inspection, folder: &Path, deadline: Duration) -> Result<(), Stop> {
    for subject in found.subjects() {
        let partial = partial_tar(folder, &subject.container.name);
        let result = found
            .cri
            .checkpoint(&subject.container.id, &partial, deadline)
            .await;
        result.map_err(|error| explain_cri(&error, &subject.container.id, found.started))?;
    }
    Ok(())
}

fn explain_cri(error: &CriError, container: &str, since: SystemTime) -> Stop {
    if error.is_unimplemented() {
        let diagnosis = criu::diagnose(&error.to_string(), None);
        let reason = if diagnosis.reason == Reason::DumpFailed {
            Reason::RuntimeTooOld
        } else {
            diagnosis.reason
        };
        return Stop::new(Step::Dump, reason, error.to_string());
    }
    explain_dump(&error.to_string(), &criu::log_candidates(container), since)
}

async fn by_kubelet(
    context: &Context,
    found: &Inspection,
    folder: &Path,
    deadline: Duration,
) -> Result<(), Stop> {
    let Some(kubelet) = &context.kubelet else {
        return Err(Stop::new(
            Step::Dump,
            Reason::MethodUnavailable,
            "the agent may not ask the kubelet",
        ));
    };
    for subject in found.subjects() {
        let name = &subject.container.name;
        let written = kubelet
            .checkpoint(&found.sandbox.namespace, &found.sandbox.name, name, deadline)
            .await;
        let written =
            written.map_err(|error| explain_kubelet(&error, &subject.container.id, found.started))?;
        // The path is the node's; process 1 has the node's root.
        let on_node = Path::new("/proc/1/root").join(written.strip_prefix("/").unwrap_or(&written));
        let partial = partial_tar(folder, name);
        let taken = tokio::task::spawn_blocking(move || archive::take_over(&on_node, &partial));
        aside_of_archive(taken.await)?;
    }
    Ok(())
}

fn explain_kubelet(error: &KubeletError, container: &str, since: SystemTime) -> Stop {
    match error.reason() {
        Some(reason) => Stop::new(Step::Dump, reason, error.to_string()),
        None => explain_dump(&error.to_string(), &criu::log_candidates(container), since),
    }
}

/// All containers are frozen before any is dumped. Each is thawed by CRIU's runtime or by us; the watchdog makes sure.
async fn by_tasks(found: &Inspection, folder: &Path) -> Result<(), Stop> {
    let failed = |error: TasksError| Stop::new(Step::Freeze, Reason::RuntimeUnavailable, error.to_string());
    let tasks = Tasks::connect(found.cri.socket()).await.map_err(failed)?;
    for subject in found.subjects() {
        tasks
            .pause(&subject.container.id)
            .await
            .map_err(|error| explain_dump(&error.to_string(), &[], found.started))?;
    }
    let mut result = Ok(());
    for subject in found.subjects() {
        result = dump_directly(&tasks, subject, folder, found.started).await;
        if result.is_err() {
            break;
        }
    }
    for subject in found.subjects() {
        if let Err(error) = tasks.resume(&subject.container.id).await {
            tracing::warn!(%error, container = subject.container.name, "not resumed by containerd; thawing");
            let _ = subject.target.freezer.thaw();
        }
    }
    result
}

async fn dump_directly(
    tasks: &Tasks,
    subject: &Subject,
    folder: &Path,
    since: SystemTime,
) -> Result<(), Stop> {
    let logs = log_places(folder, &subject.container);
    let work = work_folder(folder, &subject.container);
    let folder = folder.join(format!("{}.partial", subject.container.name));
    let images = folder.join("checkpoint");
    let made = archive::prepare(&folder)
        .and_then(|()| archive::prepare(&images))
        .and_then(|()| archive::prepare(&work));
    made.map_err(not_stored)?;
    let result = tasks.checkpoint(&subject.container.id, &images, &work).await;
    result.map_err(|error| explain_dump(&error.to_string(), &logs, since))?;
    // While the container is still frozen: its files belong to the same moment as its memory. Beside the loop, which
    // holds the deadline: they may be many.
    let (container, pid) = (subject.container.clone(), subject.target.pid);
    let written = tokio::task::spawn_blocking(move || write_metadata(&container, pid, &folder, &work));
    aside_of_archive(written.await)
}

/// The rest of the layout, beside CRIU's images.
fn write_metadata(container: &Container, pid: i32, folder: &Path, work: &Path) -> Result<(), ArchiveError> {
    let io = |path: PathBuf| move |source| ArchiveError::Io { path, source };
    write_container(container, folder)?;
    for file in ["dump.log", "stats-dump"] {
        let from = work.join(file);
        if from.exists() {
            fs::rename(&from, folder.join(file)).map_err(io(from))?;
        }
    }
    let _ = fs::remove_dir_all(work);
    archive::upper_layer(pid).map_or(Ok(()), |upper| {
        archive::rootfs_diff(&upper, &folder.join("rootfs-diff.tar"))
    })
}

/// What the runtime knows of a container.
pub(super) fn write_container(container: &Container, folder: &Path) -> Result<(), ArchiveError> {
    let io = |path: PathBuf| move |source| ArchiveError::Io { path, source };
    let spec = container.spec.clone().unwrap_or_default();
    let config = serde_json::json!({
        "id": container.id, "name": container.name, "runtime": container.runtime_type,
        "rootfsImage": container.image, "rootfsImageName": container.image,
    });
    fs::write(folder.join("spec.dump"), spec.to_string()).map_err(io(folder.join("spec.dump")))?;
    fs::write(folder.join("config.dump"), config.to_string()).map_err(io(folder.join("config.dump")))
}

fn explain_dump(words: &str, logs: &[PathBuf], since: SystemTime) -> Stop {
    let log = log_of_this_attempt(logs, since).and_then(|path| fs::read(path).ok());
    let log = log.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let diagnosis = criu::diagnose(words, log.as_deref());
    Stop::new(Step::Dump, diagnosis.reason, diagnosis.sentence())
}

/// Where CRIU's log of a container may be: where Direct asked for it, or where the runtime leaves it.
fn log_places(folder: &Path, container: &Container) -> Vec<PathBuf> {
    let direct = work_folder(folder, container).join("dump.log");
    std::iter::once(direct)
        .chain(criu::log_candidates(&container.id))
        .collect()
}

/// CRIU's working folder for one container, with the method Direct.
fn work_folder(folder: &Path, container: &Container) -> PathBuf {
    folder.join(format!("{}.partial", container.name)).join("work")
}

/// containerd leaves the log of a failed dump where the next one's will be: an old one would explain the wrong failure.
fn log_of_this_attempt(logs: &[PathBuf], since: SystemTime) -> Option<&PathBuf> {
    // File times are coarser than the clock.
    let slack = Duration::from_millis(50);
    let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified());
    logs.iter()
        .find(|path| modified(path).is_ok_and(|modified| modified + slack >= since))
}

/// Keeps CRIU's whole log beside where the archive would be, before the runtime deletes it, and says where.
fn keep_logs(mut stop: Stop, found: &Inspection, folder: &Path) -> Stop {
    for subject in found.subjects() {
        let container = &subject.container;
        let logs = log_places(folder, container);
        let kept = folder.join(format!("{}.criu.log", container.name));
        let log = log_of_this_attempt(&logs, found.started);
        if log.is_some_and(|log| fs::copy(log, &kept).is_ok()) {
            stop.log.get_or_insert_with(|| kept.clone());
            stop.message = format!("{}; CRIU's log is {} on the node", stop.message, kept.display());
        }
    }
    stop
}

/// Verifies every archive and gives it its name.
async fn finish(found: &Inspection, folder: &Path, report: &mut Report) -> Result<(), Stop> {
    let mut total = 0;
    for subject in found.subjects() {
        let container = &subject.container;
        let expected = Identity {
            pod_uid: found.pod_uid.clone(),
            namespace: found.sandbox.namespace.clone(),
            pod: found.sandbox.name.clone(),
            container: container.name.clone(),
        };
        let direct = found.plan.method == Method::Direct;
        let (path, verified) = store_container(found.deadline, folder, direct, &expected).await?;
        total += verified.size;
        report
            .status
            .checkpointed_containers
            .push(describe_archive(container, path, verified, direct));
    }
    report.status.size = Some(human_bytes(total));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_of_an_earlier_attempt_does_not_explain_this_one() {
        let root = tempfile::tempdir().unwrap();
        let log = root.path().join("criu-dump.log");
        fs::write(&log, "(00.1) Error (criu/x.c:1): Can't lookup mount=1\n").unwrap();
        let later = SystemTime::now() + Duration::from_secs(60);
        assert_eq!(
            explain_dump("something new", std::slice::from_ref(&log), later).reason,
            Reason::DumpFailed
        );
        assert_eq!(
            explain_dump("something new", &[log], SystemTime::UNIX_EPOCH).reason,
            Reason::ExternalFile
        );
    }
}
