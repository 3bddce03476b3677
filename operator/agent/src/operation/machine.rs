//! The checkpoint of a pod that runs in a virtual machine: a snapshot of the whole machine.

use std::path::Path;
use std::time::Duration;

use podcheckpoint_crds::conditions::Verdict;
use podcheckpoint_crds::{ArchiveFormat, ConditionType, PodCheckpoint, Reason, SandboxKind, Step};
use tokio_util::sync::CancellationToken;

use super::inspect::note;
use super::keep::{Whole, not_stored, store};
use super::{Context, Deadline, Stop};
use crate::archive;
use crate::node::cri::{Container, Sandbox};
use crate::report::Report;
use crate::sandbox::{Machine, Recognised};
use crate::vm::archive::Of;
use crate::vm::snapshot::{self, Limits};
use crate::vm::{self, Handle, VmError};
use crate::words::tame;

/// Name of the archive below the checkpoint's folder.
const NAME: &str = "vm";
/// How long the question what the machine does now may take.
const LOOK: Duration = Duration::from_secs(5);

/// A machine that is to be saved, and whose it is.
pub(super) struct Subject {
    machine: Machine,
    of: Of,
    /// The containers that were asked for; the others of the pod are in the machine as well.
    containers: Vec<Container>,
}

impl Subject {
    pub(super) fn new(
        pod_uid: &str,
        sandbox: &Sandbox,
        containers: &[Container],
        recognised: &Recognised,
    ) -> Option<Self> {
        // Kata's machine has every container of the pod in it, an ordinary pod's the one that runs it.
        let whole = recognised.kind == SandboxKind::Kata;
        let inside =
            |c: &&Container| c.running && (whole || containers.iter().any(|chosen| chosen.id == c.id));
        let inside = sandbox.containers.iter().filter(inside);
        Some(Self {
            machine: recognised.machine()?.clone(),
            of: Of {
                pod_uid: pod_uid.to_owned(),
                namespace: sandbox.namespace.clone(),
                pod: sandbox.name.clone(),
                sandbox: sandbox.id.clone(),
                containers: inside.map(|c| c.name.clone()).collect(),
            },
            containers: containers.to_vec(),
        })
    }

    pub(super) fn handle(&self) -> Handle {
        Handle::of(&self.machine)
    }

    /// Finds out whether the machine could be saved. Nothing on the node can say anything about ptrace in there.
    pub(super) async fn look(
        &self,
        context: &Context,
        object: &PodCheckpoint,
        report: &mut Report,
    ) -> Result<(), Stop> {
        if !report.has(ConditionType::PtraceValidated) {
            let text = "the pod runs in a virtual machine, which is saved as a whole; its processes were not looked at";
            report.set(
                ConditionType::PtraceValidated,
                Verdict::Unknown,
                Reason::GuestNotProbed,
                text,
            );
        }
        let limits = limits(context, object, Deadline::of(object), &CancellationToken::new());
        let ready = snapshot::check(&self.machine, &limits).await;
        let words = match &ready {
            Ok(ready) => ready.words(),
            Err(error) => error.to_string(),
        };
        let outcome = ready.map(drop).map_err(|error| error.reason());
        note(report, "virtual machine", outcome, &words);
        outcome.map_err(|reason| Stop::new(Step::Inspect, reason, words))
    }

    /// Takes the snapshot and leaves its archive in the folder.
    pub(super) async fn checkpoint(
        &self,
        context: &Context,
        object: &PodCheckpoint,
        deadline: Deadline,
        folder: &Path,
        report: &mut Report,
        cancelled: &CancellationToken,
    ) -> Result<(), Stop> {
        let dump = |error: VmError| Stop::new(Step::Dump, error.reason(), error.to_string());
        let limits = limits(context, object, deadline, cancelled);
        let partial = folder.join(format!("{NAME}.partial"));
        archive::prepare(&partial).map_err(not_stored)?;
        let ready = snapshot::check(&self.machine, &limits).await.map_err(dump)?;
        let taken = snapshot::take(ready, &partial, &limits).await.map_err(dump)?;
        vm::archive::write_manifest(&partial, &self.of, &self.machine, &taken).map_err(dump)?;
        let (of, name) = (self.of.clone(), folder.join(NAME));
        let verify = move |partial: &Path| vm::archive::verify(partial, &of);
        let verified = store(deadline, &partial, &name, verify).await?;
        let whole = Whole {
            containers: &self.containers,
            path: NAME,
            format: ArchiveFormat::VirtualMachine,
            stood: taken.paused,
        };
        whole.tell(&verified, report);
        Ok(())
    }
}

fn limits(
    context: &Context,
    object: &PodCheckpoint,
    deadline: Deadline,
    cancelled: &CancellationToken,
) -> Limits {
    Limits {
        archive_root: context.archive_root.clone(),
        deadline: deadline.limit,
        allow_degraded: object.spec.allow_degraded,
        cancelled: cancelled.clone(),
    }
}

/// What the machine does now, as its monitor says.
pub(super) async fn describe_source(handle: &Handle) -> (Verdict, Reason, String) {
    let ask = async { handle.open().await?.describe().await };
    let unknown = |why: String| (Verdict::Unknown, Reason::SourceUnknown, why);
    match tokio::time::timeout(LOOK, ask).await {
        Err(_) => unknown("the monitor does not say whether the machine runs".to_owned()),
        Ok(Err(VmError::Gone(pid))) => {
            let words = format!("the virtual machine monitor, process {pid}, has ended");
            (Verdict::Unknown, Reason::SourcePodGone, words)
        }
        Ok(Err(error)) => unknown(error.to_string()),
        Ok(Ok(seen)) if seen.running => (
            Verdict::True,
            Reason::SourceRuns,
            format!("the machine runs, its monitor calls it {}", tame(&seen.state)),
        ),
        Ok(Ok(seen)) => {
            let words = format!(
                "the machine stands still, its monitor calls it {}",
                tame(&seen.state)
            );
            (Verdict::False, Reason::VmPaused, words)
        }
    }
}

/// Makes a machine run that an earlier agent may have left paused, if it can be done at once.
pub(crate) async fn release(handle: &Handle) {
    match vm::watchdog::release(handle).await {
        Ok(()) | Err(VmError::Gone(_)) => {}
        Err(error) => tracing::error!(%error, "a machine may still be paused"),
    }
}
