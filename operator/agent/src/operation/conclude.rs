//! The end of every operation, also of one whose agent died: the source runs, or the status says what holds it.

use std::time::{Duration, Instant};

use podcheckpoint_crds::conditions::Verdict;
use podcheckpoint_crds::{ConditionType, Reason, Step};

use super::{Context, Stop, clear, failed, guest, gvisor, machine};
use crate::guest::dump::Place;
use crate::journal::{Entry, TargetProcess};
use crate::node::cgroup::{Control, Freezer};
use crate::node::cri::Cri;
use crate::node::process::{SourceState, Target, source_state};
use crate::node::release::correct_books;
use crate::report::Report;
use crate::sandbox::Sentry;
use crate::security;
use crate::vm::{self, Handle};

/// How long the target may take to run again after the dump.
const SETTLE: Duration = Duration::from_secs(5);

/// What may stand still because of a checkpoint.
pub(super) enum Held {
    /// Containers on the node's kernel.
    Containers(Vec<Freezer>),
    /// A virtual machine.
    Machine(Handle),
    /// A pod on gVisor's kernel, and the PodCheckpoint's UID.
    Gvisor(Sentry, String),
    /// Containers on the kernel of a virtual machine.
    Guest(Place),
}

impl Default for Held {
    /// Nothing was found.
    fn default() -> Self {
        Self::Containers(Vec::new())
    }
}

impl Held {
    /// What an interrupted checkpoint may have left standing still, if it was not these containers.
    fn of_entry(entry: &Entry, freezers: Vec<Freezer>) -> Self {
        let machine = entry.machine.clone().map(Self::Machine);
        let sentry = || {
            entry
                .sentry
                .clone()
                .map(|sentry| Self::Gvisor(sentry, entry.uid.clone()))
        };
        let guest = || entry.guest.clone().map(Self::Guest);
        machine
            .or_else(sentry)
            .or_else(guest)
            .unwrap_or(Self::Containers(freezers))
    }
}

/// The conditions that every operation ends with; SourceRunning is read from the kernel.
/// `frozen_again` says that the target was frozen before by somebody else, and is so again.
pub(super) async fn conclude(
    report: &mut Report,
    held: &Held,
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

pub(super) fn describe_source(state: Option<SourceState>) -> (Verdict, Reason, String) {
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
        clear::clear(context, &entry.uid, files).await;
    }
    // A guest takes back by itself whatever an agent that is gone had begun.
    let held = Held::of_entry(entry, freezers);
    conclude(report, &held, &put_back, frozen_before.contains(&true)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frozen_source_is_never_reported_as_running() {
        let (verdict, reason, _) = describe_source(Some(SourceState::Frozen { cgroup: "/c".into() }));
        assert_eq!((verdict, reason), (Verdict::False, Reason::SourceFrozen));
    }
}
