//! One checkpoint, from the first look at the node to the verified archive. The only module that touches the target.

pub(crate) mod guest;
mod gvisor;
mod inside;
pub(crate) mod machine;
mod next_start;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::Client;
use podcheckpoint_crds::conditions::Verdict;
use podcheckpoint_crds::{
    ArchiveFormat, ArchiveState, CheckpointLocation, CheckpointedContainer, ConditionType, Finding,
    LocationType, Method, NodeLocal, Outcome, PodCheckpoint, Reason, RuntimeFacts, Step,
};
use tokio_util::sync::CancellationToken;

use crate::archive::{self, ArchiveError, Identity, Verified};
use crate::criu;
use crate::guest::dump::Place;
use crate::journal::{Entry, Journal, TargetProcess, aside};
use crate::node::cgroup::{Control, Freezer};
use crate::node::cri::{Container, Cri, CriError, Sandbox};
use crate::node::kubelet::{Kubelet, KubeletError};
use crate::node::process::{SourceState, Target, TargetError, source_state};
use crate::node::release::correct_books;
use crate::node::runtime_files::RuntimeFiles;
use crate::node::tasks::{Tasks, TasksError};
use crate::node::watchdog::Watchdog;
use crate::plan::{self, Plan};
use crate::report::Report;
use crate::sandbox::{self, Recognised, Sentry};
use crate::security::setting::Setting;
use crate::security::{self, Refusal, Security};
use crate::validate::{self, NodeCheck, Refused};
use crate::vm::{self, Handle};

/// How much longer than the agent the watchdog waits: it is for an agent that is gone or stuck.
const WATCHDOG_GRACE: Duration = Duration::from_secs(2);
/// How long telling that the target has been proved may take.
const PROGRESS: Duration = Duration::from_secs(2);
/// How long looking at the sandbox's processes may take: a process that hangs can make a look at it hang too.
const RECOGNISE: Duration = Duration::from_secs(10);
/// How often a proof is repeated since settings were changed during it.
const PROOFS: usize = 20;
/// How long the target may take to run again after the dump.
const SETTLE: Duration = Duration::from_secs(5);
/// How often the freezer is looked at during a dump, which is how exactly the frozen time is known.
const FREEZER_TICK: Duration = Duration::from_millis(2);

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

/// A container that is to be checkpointed.
struct Subject {
    container: Container,
    target: Target,
}

/// What is to be done, as far as it has been found out.
struct Inspection {
    /// When the node was looked at: a log that is older is of another attempt.
    started: SystemTime,
    /// UID of the pod, as the controller pinned it.
    pod_uid: String,
    cri: Cri,
    sandbox: Sandbox,
    /// Containers whose processes are the node's; none when they are in a machine that is saved as a whole.
    subjects: Vec<Subject>,
    /// That machine.
    machine: Option<Box<machine::Subject>>,
    /// The guest whose own CRIU dumps them.
    guest: Option<Box<guest::Subject>>,
    /// The sandbox of gVisor that is saved as a whole.
    gvisor: Option<Box<gvisor::Subject>>,
    plan: Plan,
}

impl Inspection {
    fn freezers(&self) -> Vec<Freezer> {
        self.subjects.iter().map(|s| s.target.freezer.clone()).collect()
    }

    /// What the runtime is about to write, unless it only does what it is told step by step.
    fn files(&self, object: &PodCheckpoint) -> Option<RuntimeFiles> {
        let (namespace, pod) = (&self.sandbox.namespace, &self.sandbox.name);
        let of_kubelet = |s: &Subject| RuntimeFiles::of_kubelet(namespace, pod, &s.container.name);
        let kubelet = match self.plan.method {
            Method::Kubelet => self.subjects.iter().map(of_kubelet).collect(),
            Method::Cri => Vec::new(),
            _ => return None,
        };
        let since = Timestamp::now();
        Some(RuntimeFiles {
            containers: self.subjects.iter().map(|s| s.container.id.clone()).collect(),
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
    let freezers = found.as_ref().map(Inspection::freezers).unwrap_or_default();
    let socket = found.as_ref().ok().map(|found| found.cri.socket().to_owned());
    let machine = found
        .as_ref()
        .ok()
        .and_then(|found| Some(found.machine.as_ref()?.handle()));
    let sentry = found
        .as_ref()
        .ok()
        .and_then(|found| Some(found.gvisor.as_ref()?.sentry()));
    let guest = found
        .as_ref()
        .ok()
        .and_then(|found| Some(found.guest.as_ref()?.place(object)));
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
    let held = Held::new(uid, &freezers, machine.as_ref(), sentry.as_ref(), guest.as_ref());
    conclude(report, &held, &put_back, security::froze_again(&put_back)).await;
    phases.end("conclude");
    tracing::info!(
        namespace = object.metadata.namespace,
        name = object.metadata.name,
        "phases" = %phases,
        "the checkpoint has ended"
    );
}

/// How long each part of an operation took, for the log.
struct Phases {
    begun: Instant,
    ended: Vec<(&'static str, Duration)>,
}

impl Default for Phases {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            ended: Vec::new(),
        }
    }
}

impl Phases {
    /// A part has ended, and the next one begins.
    fn end(&mut self, name: &'static str) {
        self.ended.push((name, self.begun.elapsed()));
        self.begun = Instant::now();
    }
}

impl std::fmt::Display for Phases {
    /// `inspect=0.012 prove=0.110 ...`, in seconds.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (number, (name, duration)) in self.ended.iter().enumerate() {
            let space = if number == 0 { "" } else { " " };
            write!(f, "{space}{name}={:.4}", duration.as_secs_f64())?;
        }
        Ok(())
    }
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
    let found = found?;
    let prepared = match (&found.machine, &found.gvisor, &found.guest) {
        (Some(machine), ..) => machine.look(context, object, report).await,
        (None, Some(sandbox), _) => sandbox.look(context, object, report).await,
        (None, None, Some(guest)) => guest.look(context, report).await,
        (None, None, None) => prepare(client, context, object, &found, report).await,
    };
    phases.end("prove");
    prepared?;
    if object.spec.validate_only {
        return Ok(Taken::Nothing);
    }
    // For whoever watches; the end is reported again and again, this is not worth waiting for.
    let _ = tokio::time::timeout(PROGRESS, report.publish(client)).await;
    checkpoint(context, object, &found, report, cancelled, phases).await?;
    Ok(Taken::Archive)
}

/// Proves that ptrace works and, where a setting is in the way that may be changed, changes it and proves it again. One
/// cause can hide another, so this goes on for as long as a further setting is found.
async fn prepare(
    client: &Client,
    context: &Context,
    object: &PodCheckpoint,
    found: &Inspection,
    report: &mut Report,
) -> Result<(), Stop> {
    let mut changed: Vec<Setting> = Vec::new();
    let before = report.status.findings.len();
    let mut again = PROOFS;
    loop {
        let generation = context.security.generation();
        share(context, object, found, report, &mut changed).await?;
        report.status.findings.truncate(before);
        let proved = prove(context, object, found, report).await;
        // What another checkpoint has changed or put back meanwhile makes either answer worthless.
        let mut stale = || {
            let stale = again > 0 && context.security.generation() != generation;
            again -= usize::from(stale);
            stale
        };
        if stale() {
            continue;
        }
        let Err(refused) = proved else {
            if !changed.is_empty() {
                let names: Vec<String> = changed.iter().map(Setting::name).collect();
                let text = format!("for the time of the checkpoint: {}", names.join(", "));
                report.set(
                    ConditionType::SecurityPrepared,
                    Verdict::True,
                    Reason::Patched,
                    text,
                );
            }
            return Ok(());
        };
        if refused.stop.reason == Reason::SeccompListenerNotRestorable {
            next_start::prepare(context, object, found, report).await;
            return Err(refused.stop);
        }
        let planned = wanted(context, object, found, &refused, &changed);
        if planned.is_err() && stale() {
            continue;
        }
        let settings = planned.map_err(|refusal| unprepared(report, refusal, &refused.stop))?;
        for setting in settings {
            let entry = context
                .security
                .change(object, &setting, found.cri.socket())
                .await;
            let entry = entry.map_err(|error| {
                let message = error.to_string();
                report.set(
                    ConditionType::SecurityPrepared,
                    Verdict::False,
                    Reason::PatchFailed,
                    message,
                );
                refused.stop.clone()
            })?;
            report.status.patches.push(entry.describe());
            changed.push(setting);
        }
        // Whoever has to put it back if this agent does not return must know of it.
        let _ = tokio::time::timeout(PROGRESS, report.publish(client)).await;
    }
}

/// What other checkpoints have changed stays so until this one has ended.
async fn share(
    context: &Context,
    object: &PodCheckpoint,
    found: &Inspection,
    report: &mut Report,
    changed: &mut Vec<Setting>,
) -> Result<(), Stop> {
    let pids = found.subjects.iter().map(|subject| subject.target.pid);
    let profiles = pids.filter_map(security::profile_of).collect();
    let joined = context.security.join(object, profiles).await.map_err(|error| {
        report.set(
            ConditionType::SecurityPrepared,
            Verdict::False,
            Reason::PatchFailed,
            error.to_string(),
        );
        Stop::new(Step::ValidatePtrace, Reason::PatchFailed, error.to_string())
    })?;
    for entry in joined {
        report.status.patches.push(entry.describe());
        changed.push(entry.setting);
    }
    Ok(())
}

/// The settings that are to be changed next.
fn wanted(
    context: &Context,
    object: &PodCheckpoint,
    found: &Inspection,
    refused: &Refused,
    changed: &[Setting],
) -> Result<Vec<Setting>, Refusal> {
    let refusal = |reason, message: &str| Refusal {
        reason,
        message: message.to_owned(),
        patches: Vec::new(),
    };
    let cause = refused.stop.reason;
    let planned = match &refused.seen {
        Some(seen) => security::plan::plan(cause, seen, &found.pod_uid),
        None => Err("the probe did not answer, so the cause is not known"),
    };
    let planned = planned.and_then(|mut settings| {
        let missing = |setting: &Setting| !setting.read().is_ok_and(|value| setting.suffices(&value));
        settings.retain(|setting| !changed.contains(setting) && missing(setting));
        if settings.is_empty() {
            Err("nothing else that could be changed is the cause")
        } else {
            Ok(settings)
        }
    });
    if !changed.is_empty()
        && let Err(why) = planned
    {
        let text = format!("ptrace still does not work ({cause}), so what was changed is put back; {why}");
        return Err(refusal(Reason::PatchIneffective, &text));
    }
    let settings = planned.map_err(|why| refusal(Reason::NotFixable, why))?;
    context.security.consent(object, &settings)?;
    Ok(settings)
}

fn unprepared(report: &mut Report, refusal: Refusal, stop: &Stop) -> Stop {
    report.status.patches.extend(refusal.patches);
    report.set(
        ConditionType::SecurityPrepared,
        Verdict::False,
        refusal.reason,
        refusal.message,
    );
    stop.clone()
}

/// Proves that ptrace works on every process of the chosen containers.
async fn prove(
    context: &Context,
    object: &PodCheckpoint,
    found: &Inspection,
    report: &mut Report,
) -> Result<(), Box<Refused>> {
    let main = |s: &Subject| (s.target.pid, s.container.name.clone());
    let containers: Vec<_> = found.subjects.iter().map(main).collect();
    let members = |s: &Subject| {
        let name = s.container.name.clone();
        s.target
            .freezer
            .processes()
            .into_iter()
            .map(move |pid| (pid, name.clone()))
    };
    let target = validate::Target {
        containers: &containers,
        members: &found.subjects.iter().flat_map(members).collect(),
        runtime: found.cri.process().await,
        allow_degraded: object.spec.allow_degraded,
    };
    validate::validate(&context.node, &target, report).await
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
}

fn completed(report: &Report) -> String {
    let status = &report.status;
    let (count, size) = (
        status.checkpointed_containers.len(),
        status.size.as_deref().unwrap_or("?"),
    );
    format!("{count} container(s), {size}, verified by SHA-256")
}

/// What may stand still because of a checkpoint.
enum Held<'a> {
    /// Containers on the node's kernel.
    Containers(&'a [Freezer]),
    /// A virtual machine.
    Machine(&'a Handle),
    /// A pod on gVisor's kernel, and the PodCheckpoint's UID.
    Gvisor(&'a Sentry, &'a str),
    /// Containers on the kernel of a virtual machine.
    Guest(&'a Place),
}

impl<'a> Held<'a> {
    fn new(
        uid: &'a str,
        freezers: &'a [Freezer],
        machine: Option<&'a Handle>,
        sentry: Option<&'a Sentry>,
        guest: Option<&'a Place>,
    ) -> Self {
        match (machine, sentry, guest) {
            (Some(machine), ..) => Self::Machine(machine),
            (None, Some(sentry), _) => Self::Gvisor(sentry, uid),
            (None, None, Some(guest)) => Self::Guest(guest),
            (None, None, None) => Self::Containers(freezers),
        }
    }
}

/// The conditions that every operation ends with; SourceRunning is read from the kernel.
/// `frozen_again` says that the target was frozen before by somebody else, and is so again.
async fn conclude(
    report: &mut Report,
    held: &Held<'_>,
    put_back: &[security::journal::Outcome],
    frozen_again: bool,
) {
    if !report.has(ConditionType::PtraceValidated) {
        report.set(
            ConditionType::PtraceValidated,
            Verdict::Unknown,
            Reason::NotReached,
            "the target was not looked at",
        );
    }
    if !report.has(ConditionType::SecurityPrepared) {
        report.set(
            ConditionType::SecurityPrepared,
            Verdict::True,
            Reason::NotNeeded,
            "no setting was changed",
        );
    }
    security::report_restored(report, put_back);
    let untouched = is_untouched(report);
    let limit = if untouched || frozen_again {
        Duration::ZERO
    } else {
        SETTLE
    };
    let (verdict, reason, mut message) = match held {
        Held::Machine(machine) => machine::describe_source(machine).await,
        Held::Gvisor(sentry, uid) => gvisor::describe_source(sentry, uid).await,
        Held::Guest(place) => guest::describe_source(place).await,
        Held::Containers(freezers) => describe_source(settle(freezers, limit).await),
    };
    if verdict == Verdict::False && frozen_again {
        message.push_str("; it was so before the checkpoint, and was put back");
    } else if verdict == Verdict::False && untouched {
        message.push_str("; it was so before, and nothing was done to it");
    } else if reason == Reason::SourceUnknown && untouched {
        message.push_str("; nothing was done to it");
    }
    report.set(ConditionType::SourceRunning, verdict, reason, message);
}

/// It failed before anything was done to the target.
fn is_untouched(report: &Report) -> bool {
    let failure = report.status.failure.as_ref();
    failure.is_some_and(|failure| matches!(failure.step, Step::Inspect | Step::ValidatePtrace))
}

/// Waits, within bounds, until the target runs.
async fn settle(freezers: &[Freezer], limit: Duration) -> Option<SourceState> {
    if freezers.is_empty() {
        return None;
    }
    let started = Instant::now();
    loop {
        let state = source_state(freezers);
        let settled = matches!(state, SourceState::Runs { .. } | SourceState::Gone);
        if settled || started.elapsed() >= limit {
            return Some(state);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn describe_source(state: Option<SourceState>) -> (Verdict, Reason, String) {
    match state {
        None => (
            Verdict::Unknown,
            Reason::NotReached,
            "the pod was not touched".into(),
        ),
        Some(SourceState::Runs { processes }) => (
            Verdict::True,
            Reason::SourceRuns,
            format!("{processes} process(es) run; none is frozen, stopped or traced"),
        ),
        Some(SourceState::Frozen { cgroup }) => (
            Verdict::False,
            Reason::SourceFrozen,
            format!("{cgroup} is frozen"),
        ),
        Some(SourceState::Stopped { pid }) => (
            Verdict::False,
            Reason::SourceStopped,
            format!("process {pid} is stopped"),
        ),
        Some(SourceState::Traced { pid, tracer, command }) => (
            Verdict::False,
            Reason::SourceTraced,
            format!("process {pid} is traced by {tracer} ({command})"),
        ),
        Some(SourceState::Gone) => (
            Verdict::Unknown,
            Reason::SourcePodGone,
            "the pod's processes have ended".into(),
        ),
    }
}

/// Makes containers run that an earlier agent may have left frozen: first by the kernel, which always works, then in
/// the runtime's books, without which `kubectl exec` would go on being refused.
async fn release(context: &Context, freezers: &[Freezer]) {
    for freezer in freezers {
        if let Err(error) = freezer.thaw() {
            tracing::error!(%error, "cannot thaw");
        }
    }
    let Ok(cri) = Cri::discover(context.runtime_socket.as_deref()).await else {
        return;
    };
    if cri.version().is_containerd()
        && let Err(error) = correct_books(cri.socket(), freezers).await
    {
        tracing::warn!(%error, "containerd may still take a container for paused");
    }
}

/// The containers of an interrupted checkpoint that still run, each with whether somebody else had frozen it before.
fn left_by(entry: &Entry) -> Vec<(Freezer, bool)> {
    let open = |process: &TargetProcess| {
        let target = Target::open(process.pid, &process.container_id).ok()?;
        Some((target.freezer, process.frozen_before))
    };
    entry.pids.iter().filter_map(open).collect()
}

/// Thaws the containers of an interrupted checkpoint that nobody else wants frozen now.
pub async fn release_left(context: &Context, entry: &Entry) {
    release_unwanted(context, &left_by(entry)).await;
}

async fn release_unwanted(context: &Context, left: &[(Freezer, bool)]) {
    // An earlier agent may have frozen it again, and not have lived to say so.
    let ours = left
        .iter()
        .filter(|(freezer, before)| !before || context.security.keeps_thawed(freezer));
    let freezers: Vec<Freezer> = ours.map(|(freezer, _)| freezer.clone()).collect();
    release(context, &freezers).await;
}

/// Thaws what an earlier agent may have left frozen, and says what the target does now. The settings have been put back.
pub async fn recover(context: &Context, entry: &Entry, report: &mut Report) {
    let left = left_by(entry);
    let put_back = context.security.recovered(&entry.uid);
    release_unwanted(context, &left).await;
    let (freezers, frozen_before): (Vec<Freezer>, Vec<bool>) = left.into_iter().unzip();
    let message = "the agent was restarted in the middle of the checkpoint; partial files have been deleted";
    failed(report, &Stop::new(Step::Dump, Reason::AgentInterrupted, message));
    if let Some(machine) = &entry.machine {
        // The journal's entry stays for as long as this takes: the machine runs afterwards, or is gone.
        vm::watchdog::release_in_the_end(machine).await;
    }
    if let Some(sentry) = &entry.sentry {
        gvisor::release(sentry, &entry.uid).await;
    }
    if let Some(files) = entry.files.clone() {
        // The archive's folder is gone: the runtime cannot make a file in it.
        files.clear(|| ()).await;
    }
    // A guest takes back by itself whatever an agent that is gone had begun.
    let held = Held::new(
        &entry.uid,
        &freezers,
        entry.machine.as_ref(),
        entry.sentry.as_ref(),
        entry.guest.as_ref(),
    );
    conclude(report, &held, &put_back, frozen_before.contains(&true)).await;
}

// --- looking, without touching -------------------------------------------------------------------------------------

async fn inspect(context: &Context, object: &PodCheckpoint, report: &mut Report) -> Result<Inspection, Stop> {
    let stop = |reason, message: String| Stop::new(Step::Inspect, reason, message);
    let uid = object
        .status
        .as_ref()
        .and_then(|s| s.source_pod_uid.as_deref())
        .unwrap_or_default();
    let cri = Cri::discover(context.runtime_socket.as_deref())
        .await
        .map_err(|error| stop(Reason::RuntimeNotFound, error.to_string()))?;
    let sandbox = cri
        .sandbox_of_pod(uid)
        .await
        .map_err(|e| stop(Reason::RuntimeUnavailable, e.to_string()))?;
    let sandbox = sandbox.ok_or_else(|| {
        stop(
            Reason::SourcePodGone,
            format!(
                "the runtime has no ready sandbox of pod {} with UID {uid}",
                object.spec.source_pod_name
            ),
        )
    })?;
    let containers = choose_containers(object, &sandbox)?;
    let recognised = recognise(&sandbox, &containers, context.machines_in_pods).await;
    report.status.runtime = Some(runtime_facts(&cri, &sandbox, &containers, &recognised));
    let looked = inside::look(&cri, &recognised, &containers, object.spec.allow_degraded, report).await;
    let survey = guest::survey(object, &recognised, &containers, looked.as_ref()).await;
    let facts = plan::Facts {
        runtime: cri.version().name.clone(),
        runtime_major: cri.version().major(),
        sandbox: recognised.clone(),
        containers: containers.len(),
        kubelet: context.kubelet.is_some(),
        guest: survey.as_ref().map(drop).map_err(Clone::clone),
    };
    let (plan, skipped) = plan::choose(object.spec.method, &facts);
    report.status.skipped_methods = skipped;
    let plan = plan.map_err(|(reason, message)| stop(reason, message))?;
    report.status.method = Some(plan.method);
    report.status.consistency = Some(plan.consistency);
    let machine = (plan.method == Method::VmSnapshot)
        .then(|| machine::Subject::new(uid, &sandbox, &containers, &recognised))
        .flatten()
        .map(Box::new);
    let gvisor = match plan.method {
        Method::Gvisor => {
            let wanted = object.spec.containers.as_deref();
            Some(Box::new(gvisor::Subject::new(
                uid,
                &sandbox,
                wanted,
                &recognised,
            )?))
        }
        _ => None,
    };
    let guest = match (plan.method, survey) {
        (Method::Guest, Ok(survey)) => {
            guest::Subject::new(uid, &sandbox, &containers, &recognised, survey).map(Box::new)
        }
        _ => None,
    };
    let subjects: Vec<Subject> = match machine.is_some() || gvisor.is_some() || guest.is_some() {
        true => Vec::new(),
        false => containers.into_iter().map(subject).collect::<Result<_, _>>()?,
    };
    // What saves a sandbox as a whole looks for room by itself.
    if !subjects.is_empty() {
        check_target(context, &plan, &subjects, report).await?;
    }
    Ok(Inspection {
        started: SystemTime::now(),
        pod_uid: uid.to_owned(),
        cri,
        sandbox,
        subjects,
        machine,
        guest,
        gvisor,
        plan,
    })
}

fn choose_containers(object: &PodCheckpoint, sandbox: &Sandbox) -> Result<Vec<Container>, Stop> {
    let stop = |reason, message: String| Stop::new(Step::Inspect, reason, message);
    // What the controller pinned: the runtime does not tell regular containers from ephemeral ones.
    let pinned = object.status.as_ref().map(|s| s.source_containers.as_slice());
    let wanted = object
        .spec
        .containers
        .as_deref()
        .or(pinned.filter(|names| !names.is_empty()));
    // An exited container of the same name is an earlier attempt.
    let running = sandbox.containers.iter().filter(|c| c.running);
    let chosen: Vec<&Container> = running
        .filter(|c| wanted.is_none_or(|names| names.contains(&c.name)))
        .collect();
    if let Some(missing) =
        wanted.and_then(|names| names.iter().find(|n| !chosen.iter().any(|c| c.name == **n)))
    {
        return Err(stop(
            Reason::ContainerNotRunning,
            format!("container {missing} does not run"),
        ));
    }
    if chosen.is_empty() {
        return Err(stop(
            Reason::ContainerNotRunning,
            "no container of the pod runs".into(),
        ));
    }
    Ok(chosen.into_iter().cloned().collect())
}

/// What the pod's processes run in, before any of them is touched. When the node does not tell in time, nothing is known
/// and nothing is tried: what the runtime says does not rule out that a process is a machine's monitor.
async fn recognise(sandbox: &Sandbox, containers: &[Container], machines_in_pods: bool) -> Recognised {
    let first = containers.first();
    let (id, handler) = (sandbox.id.clone(), sandbox.handler.clone());
    let runtime_type = first.and_then(|c| c.runtime_type.clone());
    let binary = first.and_then(|c| c.binary.clone());
    let pids: Vec<i32> = containers.iter().filter_map(|c| c.pid).collect();
    // A container without a process would go by unseen, and be called saved with the machine of another one.
    let machines_in_pods = machines_in_pods && pids.len() == containers.len();
    let read = tokio::task::spawn_blocking(move || {
        sandbox::facts::read(&sandbox::Named {
            sandbox: &id,
            handler: &handler,
            runtime_type: runtime_type.as_deref(),
            binary: binary.as_deref(),
            pids: &pids,
            machines_in_pods,
        })
    });
    match tokio::time::timeout(RECOGNISE, read).await {
        Ok(Ok(facts)) => sandbox::recognise(&facts),
        _ => not_told(),
    }
}

fn not_told() -> Recognised {
    let words = format!(
        "the node did not tell within {} s what the pod's processes are",
        RECOGNISE.as_secs()
    );
    Recognised {
        evidence: vec![words],
        ..Recognised::default()
    }
}

fn subject(container: Container) -> Result<Subject, Stop> {
    let gone = |message: String| Stop::new(Step::Inspect, Reason::SourcePodGone, message);
    let pid = container.pid.ok_or_else(|| {
        gone(format!(
            "the runtime names no process of container {}",
            container.name
        ))
    })?;
    let target = Target::open(pid, &container.id).map_err(|error: TargetError| gone(error.to_string()))?;
    Ok(Subject { container, target })
}

fn runtime_facts(
    cri: &Cri,
    sandbox: &Sandbox,
    containers: &[Container],
    recognised: &Recognised,
) -> RuntimeFacts {
    let first = containers.first();
    let freezer = first.and_then(|c| Freezer::of_process(c.pid?).ok());
    RuntimeFacts {
        name: Some(cri.version().name.clone()),
        version: Some(cri.version().version.clone()),
        handler: Some(sandbox.handler.clone()).filter(|handler| !handler.is_empty()),
        oci_runtime: first.and_then(|c| c.runtime_type.clone()),
        criu_version: None,
        kernel: Some(rustix::system::uname().release().to_string_lossy().into_owned()),
        cgroup_version: freezer
            .filter(|_| recognised.shows_processes())
            .map(|freezer| freezer.number()),
        guest_kernel: None,
        sandbox: Some(recognised.describe()),
    }
}

/// What can be known to fail before anything is touched.
async fn check_target(
    context: &Context,
    plan: &Plan,
    subjects: &[Subject],
    report: &mut Report,
) -> Result<(), Stop> {
    let memory: u64 = subjects.iter().map(|s| s.target.memory_bytes()).sum();
    // containerd's CRI plugin and the kubelet behind it write each page to images, to a content store's tar, back to
    // files and into the archive; Direct writes it once.
    let copies = if plan.method == Method::Direct { 1 } else { 4 };
    look_for_room(context, memory, copies, "memory", report).await
}

/// Whether the archives' disk has room for so many bytes, so many times over, of `what`. It may hang.
async fn look_for_room(
    context: &Context,
    memory: u64,
    copies: u64,
    what: &str,
    report: &mut Report,
) -> Result<(), Stop> {
    let root = context.archive_root.clone();
    let check = move || archive::prepare(&root).and_then(|()| archive::check_room(&root, memory, copies));
    let room = match aside(check).await {
        Some(room) => room,
        None => Err(ArchiveError::Stalled {
            root: context.archive_root.clone(),
        }),
    };
    let evidence = room.as_ref().map_or_else(describe, |()| {
        format!("room for {} of {what}", human_bytes(memory))
    });
    let outcome = room.as_ref().copied().map_err(ArchiveError::reason);
    note(report, "archive root", outcome, &evidence);
    room.map_err(|error| Stop::new(Step::Inspect, error.reason(), describe(&error)))
}

fn note(report: &mut Report, check: &str, outcome: Result<(), Reason>, evidence: &str) {
    let reason = outcome.err();
    report.status.findings.push(Finding {
        check: check.to_owned(),
        outcome: if reason.is_none() {
            Outcome::Pass
        } else {
            Outcome::Fail
        },
        reason: reason.map(|r| r.as_str().to_owned()),
        evidence: evidence.to_owned(),
        remedy: reason.map(|r| r.doc().remedy.to_owned()),
    });
}

fn describe(error: &ArchiveError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

// --- touching ------------------------------------------------------------------------------------------------------

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
    let not_writable = |error: ArchiveError| Stop::new(Step::Archive, error.reason(), describe(&error));
    archive::prepare(&folder).map_err(not_writable)?;
    let files = found.files(object);
    begin(context, object, &uid, found, files.clone())?;
    if let Some(machine) = &found.machine {
        let result = machine
            .checkpoint(context, object, &folder, report, cancelled)
            .await;
        phases.end("snapshot");
        return keep_or_remove(result, &uid, &folder, report);
    }
    if let Some(sandbox) = &found.gvisor {
        let result = sandbox.checkpoint(object, &folder, report, cancelled).await;
        phases.end("save");
        return keep_or_remove(result, &uid, &folder, report);
    }
    if let Some(guest) = &found.guest {
        let result = guest
            .checkpoint(context, object, &folder, report, cancelled)
            .await;
        phases.end("dump");
        return keep_or_remove(result, &uid, &folder, report);
    }
    let deadline = Duration::from_secs(u64::try_from(object.spec.timeout_seconds).unwrap_or(1));
    let (dumped, mut frozen) = dump(context, found, &folder, deadline, cancelled).await;
    phases.end("dump");
    let result = match dumped {
        Ok(()) => finish(found, &folder, report).await,
        Err(stop) => Err(keep_logs(or_pods_end(stop, found), found, &folder)),
    };
    phases.end("archive");
    // A CRIU that has seized the processes thaws them: from then on only CRIU knows how long they stand still.
    frozen = frozen.max(longest_by_criu(report));
    report.status.frozen = (!frozen.is_zero()).then(|| human_duration(frozen));
    if let (Err(_), Some(files)) = (&result, files) {
        let folder = folder.clone();
        files.clear(move || remove_all_but_logs(&folder)).await;
    }
    keep_or_remove(result, &uid, &folder, report)
}

/// What failed leaves nothing but logs; what did not is named in the status.
fn keep_or_remove(
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

/// From here on the target may be touched, and the journal knows it.
fn begin(
    context: &Context,
    object: &PodCheckpoint,
    uid: &str,
    found: &Inspection,
    files: Option<RuntimeFiles>,
) -> Result<(), Stop> {
    let process = |s: &Subject| TargetProcess {
        container_id: s.container.id.clone(),
        pid: s.target.pid,
        frozen_before: context.security.keeps_thawed(&s.target.freezer),
    };
    let entry = Entry {
        uid: uid.to_owned(),
        namespace: object.metadata.namespace.clone().unwrap_or_default(),
        name: object.metadata.name.clone().unwrap_or_default(),
        deletion_policy: object.spec.deletion_policy,
        pids: found.subjects.iter().map(process).collect(),
        machine: found.machine.as_ref().map(|machine| machine.handle()),
        sentry: found.gvisor.as_ref().map(|sandbox| sandbox.sentry()),
        files,
        guest: found.guest.as_ref().map(|guest| guest.place(object)),
        result: None,
    };
    let written = context.journal.write(&entry);
    written.map_err(|error| {
        Stop::new(
            Step::Archive,
            Reason::StorageNotWritable,
            format!("the journal cannot be written: {error}"),
        )
    })
}

/// Dumps under the watchdog and the deadline. Whatever ends it, the target runs afterwards, or the report says so.
async fn dump(
    context: &Context,
    found: &Inspection,
    folder: &Path,
    deadline: Duration,
    cancelled: &CancellationToken,
) -> (Result<(), Stop>, Duration) {
    let freezers = found.freezers();
    let watchdog = match Watchdog::arm(
        &freezers,
        deadline + WATCHDOG_GRACE,
        found.cri.socket(),
        &context.archive_root,
    ) {
        Ok(watchdog) => watchdog,
        Err(error) => {
            let words = format!("the watchdog cannot be started: {error}");
            let stop = Stop::new(Step::Freeze, Reason::MethodUnavailable, words);
            return (Err(stop), Duration::ZERO);
        }
    };
    let work = by_method(context, found, folder, deadline);
    let mut frozen = Duration::ZERO;
    let result = tokio::select! {
        result = work => result,
        () = watch_freezers(&freezers, &mut frozen) => Ok(()),
        () = tokio::time::sleep(deadline) => Err(late(deadline)),
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

/// A pod that is deleted under a dump makes it fail in many words, none of which says so.
fn or_pods_end(stop: Stop, found: &Inspection) -> Stop {
    let ended = found.subjects.iter().find(|s| !s.target.alive());
    match ended {
        Some(subject) if !matches!(stop.reason, Reason::AgentInterrupted | Reason::DeadlineExceeded) => {
            let name = &subject.container.name;
            let words = format!("container {name} ended during the checkpoint: {}", stop.message);
            Stop::new(stop.step, Reason::SourcePodGone, words)
        }
        _ => stop,
    }
}

fn longest_by_criu(report: &Report) -> Duration {
    let all = report.status.checkpointed_containers.iter();
    let longest = all.filter_map(|c| c.frozen_micros).max().unwrap_or_default();
    Duration::from_micros(u64::try_from(longest).unwrap_or_default())
}

fn late(deadline: Duration) -> Stop {
    let message = format!(
        "the checkpoint did not end within {} s; the pod was made to run again",
        deadline.as_secs()
    );
    Stop::new(Step::Dump, Reason::DeadlineExceeded, message)
}

/// Adds up how long any of the containers was frozen. Never returns.
async fn watch_freezers(freezers: &[Freezer], frozen: &mut Duration) {
    let mut ticker = tokio::time::interval(FREEZER_TICK);
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
    for subject in &found.subjects {
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
    for subject in &found.subjects {
        let name = &subject.container.name;
        let written = kubelet
            .checkpoint(&found.sandbox.namespace, &found.sandbox.name, name, deadline)
            .await;
        let written =
            written.map_err(|error| explain_kubelet(&error, &subject.container.id, found.started))?;
        // The path is the node's; process 1 has the node's root.
        let on_node = Path::new("/proc/1/root").join(written.strip_prefix("/").unwrap_or(&written));
        let partial = partial_tar(folder, name);
        let taken = tokio::task::spawn_blocking(move || archive::take_over(&on_node, &partial)).await;
        let taken = taken.map_err(|e| Stop::new(Step::Archive, Reason::ArchiveIncomplete, e.to_string()))?;
        taken.map_err(|error| Stop::new(Step::Archive, error.reason(), describe(&error)))?;
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
    for subject in &found.subjects {
        tasks
            .pause(&subject.container.id)
            .await
            .map_err(|error| explain_dump(&error.to_string(), &[], found.started))?;
    }
    let mut result = Ok(());
    for subject in &found.subjects {
        result = dump_directly(&tasks, subject, folder, found.started).await;
        if result.is_err() {
            break;
        }
    }
    for subject in &found.subjects {
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
    made.map_err(|error| Stop::new(Step::Archive, error.reason(), describe(&error)))?;
    let result = tasks.checkpoint(&subject.container.id, &images, &work).await;
    result.map_err(|error| explain_dump(&error.to_string(), &logs, since))?;
    // While the container is still frozen: its files belong to the same moment as its memory.
    write_metadata(subject, &folder, &work)
        .map_err(|error| Stop::new(Step::Archive, error.reason(), describe(&error)))
}

/// The rest of the layout, beside CRIU's images.
fn write_metadata(subject: &Subject, folder: &Path, work: &Path) -> Result<(), ArchiveError> {
    let io = |path: PathBuf| move |source| ArchiveError::Io { path, source };
    write_container(&subject.container, folder)?;
    for file in ["dump.log", "stats-dump"] {
        let from = work.join(file);
        if from.exists() {
            fs::rename(&from, folder.join(file)).map_err(io(from))?;
        }
    }
    let _ = fs::remove_dir_all(work);
    archive::upper_layer(subject.target.pid).map_or(Ok(()), |upper| {
        archive::rootfs_diff(&upper, &folder.join("rootfs-diff.tar"))
    })
}

/// What the runtime knows of a container.
fn write_container(container: &Container, folder: &Path) -> Result<(), ArchiveError> {
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
    for subject in &found.subjects {
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
    for subject in &found.subjects {
        let container = &subject.container;
        let expected = Identity {
            pod_uid: found.pod_uid.clone(),
            namespace: found.sandbox.namespace.clone(),
            pod: found.sandbox.name.clone(),
            container: container.name.clone(),
        };
        let (folder, name, direct) = (
            folder.to_owned(),
            container.name.clone(),
            found.plan.method == Method::Direct,
        );
        let stored = tokio::task::spawn_blocking(move || store(&folder, &name, direct, &expected)).await;
        let stored =
            stored.map_err(|e| Stop::new(Step::Archive, Reason::ArchiveIncomplete, e.to_string()))?;
        let (path, verified) =
            stored.map_err(|error| Stop::new(Step::Archive, error.reason(), describe(&error)))?;
        total += verified.size;
        report
            .status
            .checkpointed_containers
            .push(describe_archive(container, path, verified, direct));
    }
    report.status.size = Some(human_bytes(total));
    Ok(())
}

fn store(
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

fn describe_archive(
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
struct Whole<'a> {
    containers: &'a [Container],
    /// Name of the archive below the checkpoint's folder.
    path: &'static str,
    format: ArchiveFormat,
    /// How long it stood still.
    stood: Duration,
}

impl Whole<'_> {
    /// Says in the report where the archive is.
    fn tell(&self, verified: &Verified, report: &mut Report) {
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

fn partial_tar(folder: &Path, container: &str) -> PathBuf {
    folder.join(format!("{container}.tar.partial"))
}

/// After a failure: only the logs stay, and nothing if there are none.
fn remove_all_but_logs(folder: &Path) {
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

fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or_default();
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {name}")
    }
}

fn human_duration(duration: Duration) -> String {
    if duration < Duration::from_secs(1) {
        format!("{} ms", duration.as_millis())
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_that_could_not_be_looked_at_is_not_tried() {
        let facts = plan::Facts {
            runtime: "containerd".into(),
            runtime_major: Some(2),
            sandbox: not_told(),
            containers: 1,
            kubelet: true,
            guest: Ok(()),
        };
        let (reason, words) = plan::choose(Method::Auto, &facts).0.unwrap_err();
        assert_eq!(reason, Reason::OciRuntimeUnsupported);
        assert!(words.contains("did not tell within"), "{words}");
    }

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

    #[test]
    fn sizes_and_times_are_for_people() {
        assert_eq!(
            (human_bytes(900), human_bytes(281_088)),
            ("900 B".into(), "274.5 KiB".into())
        );
        assert_eq!(
            (
                human_duration(Duration::from_millis(41)),
                human_duration(Duration::from_millis(2345))
            ),
            ("41 ms".into(), "2.3 s".into())
        );
    }

    #[test]
    fn a_frozen_source_is_never_reported_as_running() {
        let (verdict, reason, _) = describe_source(Some(SourceState::Frozen { cgroup: "/c".into() }));
        assert_eq!((verdict, reason), (Verdict::False, Reason::SourceFrozen));
    }
}
