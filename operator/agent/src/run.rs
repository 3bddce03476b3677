//! The agent's loop: watches the objects of its node and starts, cancels, reports and cleans up.

use std::collections::{HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use kube::{Api, Client, ResourceExt};
use podcheckpoint_crds::conditions::Verdict;
use podcheckpoint_crds::{
    ArchiveState, CheckpointNodeStatus, ConditionType, DeletionPolicy, Patch, PodCheckpoint, Reason, Step,
};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::capability;
use crate::journal::{DISK, Entry, aside};
use crate::node::runtime_files::RuntimeFiles;
use crate::operation::{self, Context, keeps, remove_folder};
use crate::report::{Report, ReportError};
use crate::security;

/// What to do about an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Ignore,
    /// Take its checkpoint.
    Begin,
    /// Refuse it: another object is at work on the same pod.
    Refuse,
    /// Look at it again when the pod has been released from an interrupted checkpoint.
    Wait,
    /// Stop what is running for it.
    Cancel,
    /// Delete its archive.
    Delete,
    /// Say that it was interrupted.
    Interrupted,
    /// Say again what came of it.
    Repeat,
    /// Say that its changes to the node's settings have been put back.
    Settle,
}

impl Decision {
    /// What it does to the pod, if anything.
    fn hold(self) -> Option<Hold> {
        match self {
            Self::Begin => Some(Hold::Checkpoint),
            Self::Interrupted => Some(Hold::Release),
            Self::Ignore
            | Self::Refuse
            | Self::Wait
            | Self::Cancel
            | Self::Delete
            | Self::Repeat
            | Self::Settle => None,
        }
    }
}

/// Why nothing else may touch a pod now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hold {
    /// It is made to run again after an interrupted checkpoint, which is over in a moment.
    Release,
    /// Its checkpoint is taken.
    Checkpoint,
}

/// What the agent knows of an object besides the object.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    /// An operation for it runs in this process.
    pub running: bool,
    /// What another object's operation does to the same pod.
    pub held: Option<Hold>,
    /// The journal has an entry without a result.
    pub begun: bool,
    /// The journal has an entry with a result.
    pub ended: bool,
    /// This process has ended an operation for it, and the API server knows.
    pub concluded: bool,
}

/// Decides from facts alone; pure.
pub fn decide(object: &PodCheckpoint, known: Known) -> Decision {
    let state = object.status.as_ref().and_then(|s| s.archive_state);
    let deleting = object.metadata.deletion_timestamp.is_some();
    let keep = object.spec.deletion_policy == DeletionPolicy::Retain && state == Some(ArchiveState::Present);
    if known.running {
        return if deleting {
            Decision::Cancel
        } else {
            Decision::Ignore
        };
    }
    if known.ended {
        return Decision::Repeat;
    }
    if known.concluded && matches!(state, None | Some(ArchiveState::Writing)) {
        // The watch is behind: what it shows was before the end.
        return Decision::Ignore;
    }
    if known.begun || (state == Some(ArchiveState::Writing) && !deleting) {
        return Decision::Interrupted;
    }
    // An agent puts everything back before it looks at any object.
    if object.has_open_patches() {
        return Decision::Settle;
    }
    if deleting {
        let gone = matches!(state, None | Some(ArchiveState::Nothing | ArchiveState::Deleted));
        return if (gone && !object.keeps_a_profile()) || keep {
            Decision::Ignore
        } else {
            Decision::Delete
        };
    }
    if object.is_terminal() || state.is_some() {
        return Decision::Ignore;
    }
    match known.held {
        None => Decision::Begin,
        // Whoever asked could not know that an agent was lost before, and has nothing to wait for.
        Some(Hold::Release) => Decision::Wait,
        Some(Hold::Checkpoint) => Decision::Refuse,
    }
}

struct Running {
    /// The pod that it touches, and how; none when it only reports or deletes files.
    pod: Option<(String, Hold)>,
    /// Fires when the pod is left: only the end has to be told then.
    left: CancellationToken,
    cancel: CancellationToken,
}

/// What work has come to.
#[derive(Default)]
struct Done {
    /// UID of its object.
    uid: String,
    /// Its end has been delivered.
    concluded: bool,
    /// The object, when a setting could not be put back for it: that is tried again.
    unsettled: Option<Box<PodCheckpoint>>,
}

/// After how long putting a setting back is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// The loop's state.
struct Agent {
    client: Client,
    context: Context,
    running: HashMap<String, Running>,
    /// Objects to look at again when an operation has ended.
    waiting: HashMap<String, PodCheckpoint>,
    /// Objects for which a setting could not be put back, and when that is tried again.
    unsettled: HashMap<String, PodCheckpoint>,
    again: Option<Instant>,
    /// Each gives what it has done.
    work: JoinSet<Done>,
    /// Objects whose end the API server has from this process, for as long as they exist.
    concluded: HashSet<String>,
    listed: HashSet<String>,
    reporter: Arc<Reporter>,
}

/// The report on this node, one writer at a time.
struct Reporter {
    client: Client,
    node: String,
    context: Context,
    last: Mutex<Option<CheckpointNodeStatus>>,
}

impl Reporter {
    async fn report(&self) {
        capability::report(
            &self.client,
            &self.node,
            &self.context,
            &mut *self.last.lock().await,
        )
        .await;
    }
}

/// Runs until `stop` fires; then what is running is cancelled and reported.
///
/// # Errors
/// When the watch cannot be kept up.
pub async fn run(
    client: Client,
    node: &str,
    context: Context,
    stop: CancellationToken,
) -> Result<(), watch::Error> {
    let api: Api<PodCheckpoint> = Api::all(client.clone());
    let config = watcher::Config::default().fields(&format!("status.nodeName={node}"));
    let mut events = pin!(watcher::watcher(api, config).default_backoff());
    let reporter = Arc::new(Reporter {
        client: client.clone(),
        node: node.to_owned(),
        context: context.clone(),
        last: Mutex::default(),
    });
    let mut agent = Agent {
        client,
        context,
        running: HashMap::new(),
        waiting: HashMap::new(),
        unsettled: HashMap::new(),
        again: None,
        work: JoinSet::new(),
        concluded: HashSet::new(),
        listed: HashSet::new(),
        reporter,
    };
    agent.recover_targets().await;
    operation::clear::resume(&agent.context).await;
    let security = agent.context.security.clone();
    security.recover(agent.context.runtime_socket.as_deref()).await;
    tracing::info!(node, "watching");
    agent.report_node();
    loop {
        tokio::select! {
            event = events.try_next() => match event {
                Ok(Some(event)) => agent.handle(event).await,
                Ok(None) => break,
                Err(error) => tracing::warn!(%error, "watch interrupted"),
            },
            Some(done) = agent.work.join_next(), if !agent.work.is_empty() => {
                let Done { uid, concluded, unsettled } = done.unwrap_or_else(|error| {
                    tracing::error!(%error, "work was broken off");
                    Done::default()
                });
                agent.running.remove(&uid);
                agent.concluded.extend(concluded.then(|| uid.clone()));
                for object in std::mem::take(&mut agent.waiting).into_values() {
                    agent.consider(object).await;
                }
                // Unless something newer of it is being looked at by now.
                if let Some(object) = unsettled.filter(|_| !agent.running.contains_key(&uid)) {
                    agent.again.get_or_insert_with(|| Instant::now() + AGAIN);
                    agent.unsettled.insert(uid, *object);
                }
                agent.report_node();
            }
            () = tokio::time::sleep_until(agent.again.unwrap_or_else(Instant::now)), if agent.again.is_some() => {
                agent.again = None;
                for object in std::mem::take(&mut agent.unsettled).into_values() {
                    agent.consider(object).await;
                }
            }
            () = stop.cancelled() => break,
        }
    }
    for running in agent.running.values() {
        running.cancel.cancel();
    }
    while agent.work.join_next().await.is_some() {}
    Ok(())
}

impl Agent {
    /// Before anything else, and without the API server: nothing that an earlier agent froze stays frozen.
    async fn recover_targets(&self) {
        for entry in self
            .context
            .journal
            .entries()
            .into_iter()
            .filter(|e| e.result.is_none())
        {
            tracing::warn!(
                name = entry.name,
                namespace = entry.namespace,
                "releasing after an interrupted checkpoint"
            );
            operation::release_left(&self.context, &entry).await;
            if let Some(machine) = &entry.machine {
                operation::machine::release(machine).await;
            }
            if let Some(place) = &entry.guest {
                operation::guest::release(place).await;
            }
        }
    }

    /// Beside the work: an operation may have found the node changed.
    fn report_node(&self) {
        let reporter = self.reporter.clone();
        tokio::spawn(async move { reporter.report().await });
    }

    async fn handle(&mut self, event: Event<PodCheckpoint>) {
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(object) => {
                self.listed.extend(object.uid());
                self.consider(object).await;
            }
            Event::InitDone => self.sweep(),
            Event::Apply(object) => self.consider(object).await,
            Event::Delete(object) => self.forget(&object.uid().unwrap_or_default()),
        }
    }

    /// `None` while the disk of the journal does not answer: what was begun or has ended is not known then, and to guess
    /// could cost a complete archive. An object whose operation was never announced has no entry.
    async fn known(&self, uid: &str, object: &PodCheckpoint) -> Option<Known> {
        let pod = source_uid(object);
        let (journal, of) = (self.context.journal.clone(), uid.to_owned());
        let entry = match aside(move || journal.read(&of)).await {
            Some(Ok(entry)) => entry,
            Some(Err(error)) => {
                tracing::error!(%error, "journal");
                None
            }
            None => {
                tracing::error!("the disk of the journal does not answer");
                let announced = object.status.as_ref().is_some_and(|s| s.archive_state.is_some());
                if announced {
                    return None;
                }
                None
            }
        };
        Some(Known {
            running: self.running.contains_key(uid),
            held: self
                .running
                .values()
                .filter(|running| !running.left.is_cancelled())
                .filter_map(|running| running.pod.as_ref())
                .filter(|(held, _)| *held == pod)
                .map(|(_, hold)| *hold)
                .max(),
            begun: entry.as_ref().is_some_and(|e| e.result.is_none()),
            ended: entry.is_some_and(|e| e.result.is_some()),
            concluded: self.concluded.contains(uid),
        })
    }

    async fn consider(&mut self, object: PodCheckpoint) {
        let Some(uid) = object.uid() else { return };
        self.waiting.remove(&uid);
        self.unsettled.remove(&uid);
        let Some(known) = self.known(&uid, &object).await else {
            // Whatever ends makes the loop look at what waits.
            self.work.spawn(async {
                tokio::time::sleep(DISK).await;
                Done::default()
            });
            self.waiting.insert(uid, object);
            return;
        };
        let decision = decide(&object, known);
        if known.running {
            // What is seen now may be the last that is ever seen of it, its deletion for one: looked at again at the end.
            self.waiting.insert(uid.clone(), object.clone());
        }
        if decision == Decision::Ignore {
            return;
        }
        tracing::info!(
            name = object.name_any(),
            namespace = object.namespace(),
            ?decision,
            "checkpoint"
        );
        if decision == Decision::Wait {
            self.waiting.insert(uid, object);
            return;
        }
        if decision == Decision::Cancel {
            if let Some(running) = self.running.get(&uid) {
                running.cancel.cancel();
            }
            return;
        }
        let (cancel, left) = (CancellationToken::new(), CancellationToken::new());
        self.running.insert(
            uid.clone(),
            Running {
                pod: decision.hold().map(|hold| (source_uid(&object), hold)),
                left: left.clone(),
                cancel: cancel.clone(),
            },
        );
        let (client, context) = (self.client.clone(), self.context.clone());
        self.work.spawn(async move {
            let report = carry_out(decision, &client, &context, &object, &cancel).await;
            // Whoever sees the end may begin the next checkpoint of the pod at once.
            left.cancel();
            let concluded = match &report {
                Some(report) => deliver(&client, &context, &object, report).await,
                None => false,
            };
            let still_open = |report: Report| report.status.patches.iter().any(Patch::is_open);
            let told = matches!(decision, Decision::Settle | Decision::Repeat) && concluded;
            let unsettled = told && report.is_some_and(still_open);
            Done {
                uid,
                concluded,
                unsettled: unsettled.then(|| Box::new(object)),
            }
        });
    }

    /// The object is gone for good: so is what belongs to it, unless it is to be kept.
    fn forget(&mut self, uid: &str) {
        self.concluded.remove(uid);
        self.waiting.remove(uid);
        self.unsettled.remove(uid);
        if let Some(running) = self.running.get(uid) {
            running.cancel.cancel();
            return;
        }
        self.remove_orphan(uid.to_owned());
    }

    /// Beside the loop: a disk that hangs must not keep the agent from other objects.
    fn remove_orphan(&self, uid: String) {
        let context = self.context.clone();
        tokio::spawn(async move {
            let (of, removed) = (context.clone(), uid.clone());
            let written = tokio::task::spawn_blocking(move || remove_orphan(&of, &removed)).await;
            if let Ok(Some(files)) = written {
                operation::clear::clear(&context, &uid, files).await;
            }
        });
    }

    /// After a whole list: what belongs to objects that went away while no agent was here.
    fn sweep(&mut self) {
        self.concluded.retain(|uid| self.listed.contains(uid));
        let folders = std::fs::read_dir(self.context.archive_root.join("checkpoints"));
        let folders = folders.into_iter().flatten().flatten();
        let archives = folders.filter_map(|folder| folder.file_name().into_string().ok());
        let begun = self.context.journal.entries().into_iter().map(|entry| entry.uid);
        let profiles = self.context.security.profiles().uids();
        let all: HashSet<String> = archives.chain(begun).chain(profiles).collect();
        for uid in all {
            if !self.listed.contains(&uid) && !self.running.contains_key(&uid) {
                self.remove_orphan(uid);
            }
        }
    }
}

/// Deletes what is left of an object that is gone, unless its archive is complete and to be kept. Gives what the runtime may
/// still be writing for it.
fn remove_orphan(context: &Context, uid: &str) -> Option<RuntimeFiles> {
    if let Err(error) = context.security.profiles().remove(uid) {
        tracing::error!(%error, uid, "a seccomp profile of an object that is gone is still there");
    }
    let folder = context.folder(uid);
    if keeps(&folder) {
        return None;
    }
    let entry = context.journal.read(uid).ok().flatten();
    let files = entry
        .filter(|entry| entry.result.is_none())
        .and_then(|entry| entry.files);
    if let Some(files) = &files {
        operation::clear::note(context, uid, files);
    }
    if folder.exists() {
        tracing::info!(uid, "deleting the archive of an object that is gone");
    }
    remove_folder(&folder);
    if let Err(error) = context.journal.remove(uid) {
        tracing::error!(%error, "journal");
    }
    files
}

fn source_uid(object: &PodCheckpoint) -> String {
    object
        .status
        .as_ref()
        .and_then(|s| s.source_pod_uid.clone())
        .unwrap_or_default()
}

/// What is to be said of it, if anything.
async fn carry_out(
    decision: Decision,
    client: &Client,
    context: &Context,
    object: &PodCheckpoint,
    cancel: &CancellationToken,
) -> Option<Report> {
    let uid = object.uid().unwrap_or_default();
    let mut report = Report::new(object);
    match decision {
        Decision::Ignore | Decision::Wait | Decision::Cancel => return None,
        Decision::Begin => {
            if !announce(client, &mut report).await {
                return None;
            }
            operation::run(client, context, object, &mut report, cancel).await;
        }
        Decision::Refuse => refuse(&mut report),
        Decision::Interrupted => {
            let entry = context.journal.read(&uid).ok().flatten();
            let folder = context.folder(&uid);
            aside(move || remove_folder(&folder)).await;
            report.status.patches = object
                .status
                .as_ref()
                .map(|s| s.patches.clone())
                .unwrap_or_default();
            operation::recover(context, &entry.unwrap_or_else(|| bare_entry(object)), &mut report).await;
            if object.is_terminal() {
                // The controller has given the agent up and said so: that stays the end.
                report.status.failure = None;
            }
        }
        Decision::Repeat => {
            if let Ok(Some(Entry {
                result: Some(result), ..
            })) = context.journal.read(&uid)
            {
                report.status = result;
            }
        }
        Decision::Settle => {
            take_over(object, &mut report);
            let settled = context.security.settle(object, context.runtime_socket.as_deref());
            security::report_restored(&mut report, &settled.await);
        }
        Decision::Delete => {
            let folder = context.folder(&uid);
            if aside(move || remove_folder(&folder)).await.is_none() {
                tracing::error!("the disk does not answer; the archive is not deleted");
                return None;
            }
            take_over(object, &mut report);
            if object.keeps_a_profile() {
                let (profiles, of) = (context.security.profiles().clone(), uid.clone());
                match aside(move || profiles.remove(&of)).await {
                    Some(Ok(())) => report.profiles_removed(),
                    Some(Err(error)) => {
                        tracing::error!(%error, "a seccomp profile is not deleted");
                        return None;
                    }
                    None => return None,
                }
            }
            report.status.checkpoint_location = None;
            if report.status.archive_state != Some(ArchiveState::Nothing) {
                report.archive_state(ArchiveState::Deleted);
            }
        }
    }
    Some(report)
}

/// Says that the operation begins, before anything is touched. False when the object is gone.
async fn announce(client: &Client, report: &mut Report) -> bool {
    let text = "looking at the node";
    report.set(
        ConditionType::Checkpointed,
        Verdict::Unknown,
        Reason::CheckpointInProgress,
        text,
    );
    report.archive_state(ArchiveState::Writing);
    match report.publish(client).await {
        // The cache may be behind: the controller can have given up, or the user, a moment ago.
        Ok(object) if object.is_terminal() || object.metadata.deletion_timestamp.is_some() => {
            report.archive_state(ArchiveState::Nothing);
            if let Err(error) = report.publish(client).await {
                tracing::warn!(%error, "not taken back");
            }
            false
        }
        Ok(_) => true,
        Err(error) => {
            tracing::warn!(%error, "not begun");
            false
        }
    }
}

fn refuse(report: &mut Report) {
    let message = "another PodCheckpoint is at work on this pod";
    report.fail(Step::Inspect, Reason::TargetBusy, message);
    report.set(
        ConditionType::Checkpointed,
        Verdict::False,
        Reason::TargetBusy,
        message,
    );
    for r#type in [
        ConditionType::PtraceValidated,
        ConditionType::SecurityPrepared,
        ConditionType::SecurityRestored,
        ConditionType::SourceRunning,
    ] {
        report.set(
            r#type,
            Verdict::Unknown,
            Reason::NotReached,
            "refused before the pod was touched",
        );
    }
    report.archive_state(ArchiveState::Nothing);
}

/// The agent's part of the status as it stands: server-side apply drops what is not repeated.
fn take_over(object: &PodCheckpoint, report: &mut Report) {
    let Some(old) = object.status.clone() else { return };
    let conditions = std::mem::take(&mut report.status.conditions);
    report.status = podcheckpoint_crds::PodCheckpointStatus {
        observed_generation: None,
        node_name: None,
        source_pod_uid: None,
        source_containers: Vec::new(),
        start_time: None,
        completion_time: None,
        reason: None,
        conditions,
        ..old
    };
}

fn bare_entry(object: &PodCheckpoint) -> Entry {
    Entry {
        uid: object.uid().unwrap_or_default(),
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        deletion_policy: object.spec.deletion_policy,
        pids: Vec::new(),
        machine: None,
        sentry: None,
        files: None,
        guest: None,
        result: None,
    }
}

/// Writes the result to the journal, then to the API server; the journal forgets it only when the API server has it.
/// True when it has.
async fn deliver(client: &Client, context: &Context, object: &PodCheckpoint, report: &Report) -> bool {
    let uid = object.uid().unwrap_or_default();
    let entry = Entry {
        result: Some(report.status.clone()),
        ..bare_entry(object)
    };
    let journal = context.journal.clone();
    match aside(move || journal.write(&entry)).await {
        Some(Ok(())) => {}
        Some(Err(error)) => tracing::error!(%error, "the result is not in the journal"),
        None => tracing::error!("the disk of the journal does not answer"),
    }
    match report.publish(client).await {
        Ok(_) => {}
        Err(ReportError::Gone) => {
            tracing::warn!(name = object.name_any(), "the object went away");
            if !keeps(&context.folder(&uid)) {
                remove_folder(&context.folder(&uid));
            }
        }
        Err(error) => {
            tracing::error!(%error, source = ?std::error::Error::source(&error).map(ToString::to_string), "the result could not be written; it is kept in the journal");
            return false;
        }
    }
    let journal = context.journal.clone();
    if let Some(Err(error)) = aside(move || journal.remove(&uid)).await {
        tracing::error!(%error, "journal");
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use podcheckpoint_crds::{PodCheckpointSpec, PodCheckpointStatus};
    use serde_json::json;

    fn object(state: Option<ArchiveState>, deleting: bool) -> PodCheckpoint {
        let mut object = PodCheckpoint::new("a", PodCheckpointSpec::default());
        object.status = Some(PodCheckpointStatus {
            archive_state: state,
            ..Default::default()
        });
        if deleting {
            let now = k8s_openapi::jiff::Timestamp::now();
            object.metadata.deletion_timestamp =
                Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now));
        }
        object
    }

    #[test]
    fn a_profile_for_the_next_start_is_deleted_with_its_object_and_not_before() {
        let kept = |deleting| {
            let mut object = object(Some(ArchiveState::Nothing), deleting);
            let patch = json!({"kind": "Seccomp", "setting": "x", "scope": "x", "before": "x", "after": "x", "exposes": "x",
                               "atMostSeconds": 0, "appliedTime": "2026-01-01T00:00:00Z"});
            object.status.as_mut().unwrap().patches = vec![serde_json::from_value(patch).unwrap()];
            object
        };
        assert_eq!(decide(&kept(true), Known::default()), Decision::Delete);
        assert_eq!(decide(&kept(false), Known::default()), Decision::Ignore);
        let mut gone = kept(true);
        gone.status.as_mut().unwrap().patches[0].reverted_time = Some(
            k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(k8s_openapi::jiff::Timestamp::UNIX_EPOCH),
        );
        assert_eq!(decide(&gone, Known::default()), Decision::Ignore);
    }

    #[test]
    fn a_new_object_is_begun_once() {
        assert_eq!(decide(&object(None, false), Known::default()), Decision::Begin);
        let running = Known {
            running: true,
            ..Known::default()
        };
        assert_eq!(decide(&object(None, false), running), Decision::Ignore);
    }

    #[test]
    fn a_watch_that_is_behind_does_not_undo_an_end() {
        let concluded = Known {
            concluded: true,
            ..Known::default()
        };
        for stale in [None, Some(ArchiveState::Writing)] {
            assert_eq!(decide(&object(stale, false), concluded), Decision::Ignore);
        }
        assert_eq!(
            decide(&object(Some(ArchiveState::Present), true), concluded),
            Decision::Delete
        );
    }

    #[test]
    fn a_second_object_on_the_same_pod_is_refused() {
        let busy = Known {
            held: Some(Hold::Checkpoint),
            ..Known::default()
        };
        assert_eq!(decide(&object(None, false), busy), Decision::Refuse);
    }

    #[test]
    fn an_object_whose_pod_is_being_released_waits_for_that() {
        let releasing = Known {
            held: Some(Hold::Release),
            ..Known::default()
        };
        assert_eq!(decide(&object(None, false), releasing), Decision::Wait);
        assert_eq!(decide(&object(None, true), releasing), Decision::Ignore);
    }

    #[test]
    fn deleting_an_archive_does_not_make_its_pod_busy() {
        assert_eq!((Decision::Delete.hold(), Decision::Repeat.hold()), (None, None));
        assert_eq!(Decision::Begin.hold(), Some(Hold::Checkpoint));
        assert_eq!(Decision::Interrupted.hold(), Some(Hold::Release));
    }

    #[test]
    fn a_begun_checkpoint_is_never_repeated_after_a_restart() {
        let begun = Known {
            begun: true,
            ..Known::default()
        };
        assert_eq!(
            decide(&object(Some(ArchiveState::Writing), false), begun),
            Decision::Interrupted
        );
        assert_eq!(
            decide(&object(Some(ArchiveState::Writing), false), Known::default()),
            Decision::Interrupted
        );
    }

    #[test]
    fn a_result_that_the_api_server_did_not_get_is_said_again() {
        let ended = Known {
            ended: true,
            ..Known::default()
        };
        assert_eq!(
            decide(&object(Some(ArchiveState::Writing), false), ended),
            Decision::Repeat
        );
    }

    #[test]
    fn deleting_a_running_object_cancels_it() {
        let running = Known {
            running: true,
            ..Known::default()
        };
        assert_eq!(
            decide(&object(Some(ArchiveState::Writing), true), running),
            Decision::Cancel
        );
    }

    #[test]
    fn an_archive_is_deleted_with_its_object_unless_it_is_to_be_kept() {
        let mut object = object(Some(ArchiveState::Present), true);
        assert_eq!(decide(&object, Known::default()), Decision::Delete);
        object.spec.deletion_policy = DeletionPolicy::Retain;
        assert_eq!(decide(&object, Known::default()), Decision::Ignore);
    }

    #[test]
    fn an_object_that_has_ended_is_left_alone() {
        assert_eq!(
            decide(&object(Some(ArchiveState::Nothing), false), Known::default()),
            Decision::Ignore
        );
        assert_eq!(
            decide(&object(Some(ArchiveState::Present), false), Known::default()),
            Decision::Ignore
        );
    }
}
