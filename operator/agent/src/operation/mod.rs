//! One checkpoint, from the first look at the node to the verified archive. The only module that touches the target.

pub(crate) mod clear;
mod conclude;
mod containers;
pub(crate) mod guest;
mod gvisor;
mod inside;
mod inspect;
mod keep;
pub(crate) mod machine;
mod next_start;
mod phases;
mod prove;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::Client;
use podcheckpoint_crds::conditions::Verdict;
use podcheckpoint_crds::{ArchiveState, ConditionType, Method, PodCheckpoint, Reason, Step};
use tokio_util::sync::CancellationToken;

use crate::archive::{self, ArchiveError};
use crate::journal::{Entry, Journal, TargetProcess};
use crate::node::cgroup::Freezer;
use crate::node::cri::{Cri, Sandbox};
use crate::node::kubelet::Kubelet;
use crate::node::runtime_files::RuntimeFiles;
use crate::plan::Plan;
use crate::report::Report;
use crate::security::{self, Security};
use crate::validate::NodeCheck;

use conclude::{Held, conclude};
pub use conclude::{recover, release_left};
use inspect::inspect;
use keep::{describe, keep_or_remove};
pub use keep::{keeps, remove_folder};
use phases::Phases;
use prove::prepare;

/// How much longer than the agent the watchdog waits: it is for an agent that is gone or stuck.
const WATCHDOG_GRACE: Duration = Duration::from_secs(2);
/// How long telling that the target has been proved may take.
const PROGRESS: Duration = Duration::from_secs(2);

/// What an operation needs of its surroundings.
#[derive(Clone)]
pub struct Context {
    /// Socket that the administrator named.
    pub runtime_socket: Option<PathBuf>,
    /// The kubelet, if it may be asked.
    pub kubelet: Option<Kubelet>,
    /// Root of all archives.
    pub archive_root: PathBuf,
    /// The journal below it.
    pub journal: Journal,
    /// What the probe found out about this node.
    pub node: Arc<NodeCheck>,
    /// What may be changed on this node, and has to be put back.
    pub security: Arc<Security>,
    /// Whether a machine that runs in an ordinary pod is taken for the pod.
    pub machines_in_pods: bool,
}

impl Context {
    /// Folder of one object's archives.
    pub fn folder(&self, uid: &str) -> PathBuf {
        self.archive_root.join("checkpoints").join(uid)
    }
}

/// The end of the time that the user gives to a checkpoint. It begins when everything has been looked at and proved.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    limit: Duration,
    until: Instant,
}

impl Deadline {
    fn of(object: &PodCheckpoint) -> Self {
        let limit = Duration::from_secs(u64::try_from(object.spec.timeout_seconds).unwrap_or(1));
        Self {
            limit,
            until: Instant::now() + limit,
        }
    }

    fn left(self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// Why a step did not end in time.
    fn passed(self, step: Step) -> Stop {
        let message = format!(
            "the checkpoint did not end within {} s; the pod was made to run again",
            self.limit.as_secs()
        );
        Stop::new(step, Reason::DeadlineExceeded, message)
    }
}

/// Why an operation ends early. This is data for the status, not an error of the agent.
#[derive(Clone, Debug)]
pub struct Stop {
    /// The step that could not be taken.
    pub step: Step,
    /// Why, in one word.
    pub reason: Reason,
    /// Why, with what was seen.
    pub message: String,
    /// CRIU's log of it, kept on the node.
    pub log: Option<PathBuf>,
}

impl Stop {
    /// An early end.
    pub fn new(step: Step, reason: Reason, message: impl Into<String>) -> Self {
        Self {
            step,
            reason,
            message: message.into(),
            log: None,
        }
    }
}

/// What is to be done, as far as it has been found out.
struct Inspection {
    /// When the node was looked at: a log that is older is of another attempt.
    started: SystemTime,
    deadline: Deadline,
    /// UID of the pod, as the controller pinned it.
    pod_uid: String,
    cri: Cri,
    sandbox: Sandbox,
    plan: Plan,
    work: Work,
}

/// What is to be saved, and by whom.
enum Work {
    /// Containers whose processes are the node's, by the container runtime.
    Containers(Vec<containers::Subject>),
    /// A machine as a whole, by its monitor.
    Machine(Box<machine::Subject>),
    /// Containers in a machine, by the CRIU of its guest.
    Guest(Box<guest::Subject>),
    /// A sandbox as a whole, by gVisor's kernel.
    Gvisor(Box<gvisor::Subject>),
}

impl Inspection {
    /// The containers whose processes are the node's.
    fn subjects(&self) -> &[containers::Subject] {
        match &self.work {
            Work::Containers(subjects) => subjects,
            Work::Machine(_) | Work::Guest(_) | Work::Gvisor(_) => &[],
        }
    }

    fn freezers(&self) -> Vec<Freezer> {
        self.subjects().iter().map(|s| s.target.freezer.clone()).collect()
    }

    /// What may stand still from now on.
    fn held(&self, object: &PodCheckpoint) -> Held {
        match &self.work {
            Work::Containers(_) => Held::Containers(self.freezers()),
            Work::Machine(machine) => Held::Machine(machine.handle()),
            Work::Guest(guest) => Held::Guest(guest.place(object)),
            Work::Gvisor(sandbox) => {
                Held::Gvisor(sandbox.sentry(), object.metadata.uid.clone().unwrap_or_default())
            }
        }
    }

    /// What the runtime is about to write, unless it only does what it is told step by step.
    async fn files(&self, object: &PodCheckpoint) -> Option<RuntimeFiles> {
        let (namespace, pod) = (&self.sandbox.namespace, &self.sandbox.name);
        let subjects = self.subjects();
        let of_kubelet =
            |s: &containers::Subject| RuntimeFiles::of_kubelet(namespace, pod, &s.container.name);
        let kubelet = match self.plan.method {
            Method::Kubelet => subjects.iter().map(of_kubelet).collect(),
            Method::Cri => Vec::new(),
            _ => return None,
        };
        let root = self.cri.root().await;
        let since = Timestamp::now();
        Some(RuntimeFiles {
            root,
            containers: subjects.iter().map(|s| s.container.id.clone()).collect(),
            kubelet,
            since,
            until: since + SignedDuration::from_secs(object.spec.timeout_seconds.into()),
        })
    }
}

/// Takes the checkpoint of one object and leaves in `report` what came of it. `cancelled` fires when the object is
/// deleted or the agent ends.
pub async fn run(
    client: &Client,
    context: &Context,
    object: &PodCheckpoint,
    report: &mut Report,
    cancelled: &CancellationToken,
) {
    let mut phases = Phases::default();
    let found = inspect(context, object, report).await;
    phases.end("inspect");
    let socket = found.as_ref().ok().map(|found| found.cri.socket().to_owned());
    let held = found.as_ref().ok().map(|found| found.held(object));
    match take(client, context, object, found, report, cancelled, &mut phases).await {
        Ok(Taken::Archive) => {
            let text = completed(report);
            report.set(
                ConditionType::Checkpointed,
                Verdict::True,
                Reason::CheckpointCompleted,
                text,
            );
        }
        Ok(Taken::Nothing) => {
            let text = "validateOnly: no checkpoint was taken";
            report.set(
                ConditionType::Checkpointed,
                Verdict::Unknown,
                Reason::NotRequested,
                text,
            );
            report.archive_state(ArchiveState::Nothing);
        }
        Err(stop) => failed(report, &stop),
    }
    let uid = object.metadata.uid.as_deref().unwrap_or_default();
    let put_back = match &socket {
        Some(socket) => context.security.release(uid, socket).await,
        None => Vec::new(),
    };
    conclude(
        report,
        &held.unwrap_or_default(),
        &put_back,
        security::froze_again(&put_back),
    )
    .await;
    phases.end("conclude");
    tracing::info!(
        namespace = object.metadata.namespace,
        name = object.metadata.name,
        "phases" = %phases,
        "the checkpoint has ended"
    );
}

/// What came of an operation that did not fail.
enum Taken {
    Archive,
    /// Only validation was asked for.
    Nothing,
}

async fn take(
    client: &Client,
    context: &Context,
    object: &PodCheckpoint,
    found: Result<Inspection, Stop>,
    report: &mut Report,
    cancelled: &CancellationToken,
    phases: &mut Phases,
) -> Result<Taken, Stop> {
    let mut found = found?;
    let prepared = match &found.work {
        Work::Containers(_) => prepare(client, context, object, &found, report).await,
        Work::Machine(machine) => machine.look(context, object, report).await,
        Work::Guest(guest) => guest.look(context, report).await,
        Work::Gvisor(sandbox) => sandbox.look(context, object, report).await,
    };
    phases.end("prove");
    prepared?;
    if object.spec.validate_only {
        return Ok(Taken::Nothing);
    }
    found.deadline = Deadline::of(object);
    // For whoever watches; the end is reported again and again, this is not worth waiting for.
    let _ = tokio::time::timeout(PROGRESS, report.publish(client)).await;
    checkpoint(context, object, &found, report, cancelled, phases).await?;
    Ok(Taken::Archive)
}

fn failed(report: &mut Report, stop: &Stop) {
    report.fail(stop.step, stop.reason, stop.message.clone());
    if let Some(failure) = &mut report.status.failure {
        failure.log_path = stop.log.as_ref().map(|path| path.display().to_string());
    }
    report.set(
        ConditionType::Checkpointed,
        Verdict::False,
        stop.reason,
        stop.message.clone(),
    );
    report.archive_state(ArchiveState::Nothing);
    // Of several containers some may have been archived before another one failed.
    report.status.checkpointed_containers.clear();
    report.status.checkpoint_location = None;
    report.status.size = None;
}

fn completed(report: &Report) -> String {
    let status = &report.status;
    let (count, size) = (
        status.checkpointed_containers.len(),
        status.size.as_deref().unwrap_or("?"),
    );
    format!("{count} container(s), {size}, verified by SHA-256")
}

async fn checkpoint(
    context: &Context,
    object: &PodCheckpoint,
    found: &Inspection,
    report: &mut Report,
    cancelled: &CancellationToken,
    phases: &mut Phases,
) -> Result<(), Stop> {
    let uid = object.metadata.uid.clone().unwrap_or_default();
    let folder = context.folder(&uid);
    let files = found.files(object).await;
    clear::wait_for_earlier(found, files.as_ref()).await?;
    let not_writable = |error: ArchiveError| Stop::new(Step::Archive, error.reason(), describe(&error));
    archive::prepare(&folder).map_err(not_writable)?;
    if let Err(stop) = begin(context, object, &uid, found, files.clone()) {
        keep::remove_all_but_logs(&folder);
        return Err(stop);
    }
    let result = match &found.work {
        Work::Containers(_) => {
            containers::checkpoint(context, found, &folder, report, cancelled, phases).await
        }
        Work::Machine(machine) => {
            machine
                .checkpoint(context, object, found.deadline, &folder, report, cancelled)
                .await
        }
        Work::Guest(guest) => {
            guest
                .checkpoint(context, object, found.deadline, &folder, report, cancelled)
                .await
        }
        Work::Gvisor(sandbox) => {
            sandbox
                .checkpoint(found.deadline, &folder, report, cancelled)
                .await
        }
    };
    phases.end(match &found.work {
        Work::Containers(_) => "archive",
        Work::Machine(_) => "snapshot",
        Work::Guest(_) => "dump",
        Work::Gvisor(_) => "save",
    });
    if let (Err(_), Some(files)) = (&result, files) {
        clear::clear(context, &uid, files).await;
    }
    keep_or_remove(result, object, &folder, report)
}

/// From here on the target may be touched, and the journal knows it.
fn begin(
    context: &Context,
    object: &PodCheckpoint,
    uid: &str,
    found: &Inspection,
    files: Option<RuntimeFiles>,
) -> Result<(), Stop> {
    let process = |s: &containers::Subject| TargetProcess {
        container_id: s.container.id.clone(),
        pid: s.target.pid,
        frozen_before: context.security.keeps_thawed(&s.target.freezer),
    };
    let mut entry = Entry {
        uid: uid.to_owned(),
        namespace: object.metadata.namespace.clone().unwrap_or_default(),
        name: object.metadata.name.clone().unwrap_or_default(),
        deletion_policy: object.spec.deletion_policy,
        pids: found.subjects().iter().map(process).collect(),
        machine: None,
        sentry: None,
        files,
        guest: None,
        result: None,
    };
    match found.held(object) {
        Held::Containers(_) => {}
        Held::Machine(machine) => entry.machine = Some(machine),
        Held::Guest(place) => entry.guest = Some(place),
        Held::Gvisor(sentry, _) => entry.sentry = Some(sentry),
    }
    let written = context.journal.write(&entry);
    written.map_err(|error| {
        Stop::new(
            Step::Archive,
            Reason::StorageNotWritable,
            format!("the journal cannot be written: {error}"),
        )
    })
}
