//! The checkpoint of a pod on gVisor's kernel, which takes it itself.

use std::path::Path;
use std::time::Duration;

use podcheckpoint_crds::conditions::Verdict;
use podcheckpoint_crds::{ArchiveFormat, ConditionType, PodCheckpoint, Reason, Step};
use tokio_util::sync::CancellationToken;

use super::inspect::{look_for_room, note};
use super::keep::{Whole, not_stored, store};
use super::{Context, Deadline, Stop};
use crate::archive;
use crate::gvisor::archive::{Member, Of};
use crate::gvisor::save::{self, Seen};
use crate::gvisor::{self, GvisorError};
use crate::node::cgroup::Freezer;
use crate::node::cri::{Container, Sandbox};
use crate::node::process::Facts;
use crate::report::Report;
use crate::sandbox::{Recognised, Sentry};

/// Name of the archive below the checkpoint's folder.
const NAME: &str = "gvisor";
/// How long a kernel that an earlier agent has let write is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A sandbox that is to be saved, and whose it is.
pub(super) struct Subject {
    sentry: Sentry,
    of: Of,
    /// Every running container of the pod.
    containers: Vec<Container>,
}

impl Subject {
    /// Refuses what gVisor cannot do: to save some of the containers only.
    pub(super) fn new(
        pod_uid: &str,
        sandbox: &Sandbox,
        wanted: Option<&[String]>,
        recognised: &Recognised,
    ) -> Result<Self, Stop> {
        let stop = |reason, message| Stop::new(Step::Inspect, reason, message);
        let evidence = || recognised.evidence.join("; ");
        let sentry = recognised.sentry.clone();
        let sentry = sentry.ok_or_else(|| stop(Reason::GvisorKernelNotFound, evidence()))?;
        let running: Vec<Container> = sandbox.containers.iter().filter(|c| c.running).cloned().collect();
        if let Some(words) = left_out(wanted, running.iter().map(|c| c.name.as_str())) {
            return Err(stop(Reason::GvisorIndivisible, words));
        }
        Ok(Self {
            sentry,
            of: Of {
                pod_uid: pod_uid.to_owned(),
                namespace: sandbox.namespace.clone(),
                pod: sandbox.name.clone(),
                sandbox: sandbox.id.clone(),
                containers: running.iter().map(Member::of).collect(),
            },
            containers: running,
        })
    }

    pub(super) fn sentry(&self) -> Sentry {
        self.sentry.clone()
    }

    async fn seen(&self) -> Result<Seen, GvisorError> {
        let ids: Vec<String> = self.containers.iter().map(|c| c.id.clone()).collect();
        save::look(&self.sentry, &ids).await
    }

    /// Finds out whether the sandbox could be saved. ptrace is not tried: it would be on gVisor's kernel.
    pub(super) async fn look(
        &self,
        context: &Context,
        object: &PodCheckpoint,
        report: &mut Report,
    ) -> Result<(), Stop> {
        let text = "the pod runs on gVisor's kernel, which saves it without ptrace; its processes were not looked at";
        report.set(
            ConditionType::PtraceValidated,
            Verdict::Unknown,
            Reason::GvisorNeedsNoPtrace,
            text,
        );
        let (outcome, words) = match self.seen().await {
            Ok(seen) => {
                let (pid, version) = (self.sentry.pid, seen.version);
                let words = format!("runsc {version}: the sandbox runs; its kernel is process {pid}");
                (Ok(()), words)
            }
            Err(error) => (Err(error.reason()), error.to_string()),
        };
        note(report, "gVisor", outcome, &words);
        outcome.map_err(|reason| Stop::new(Step::Inspect, reason, words))?;
        if !self.sentry.overlay {
            let words =
                "runsc runs with --overlay2=none: files of the root filesystem stay outside of the state";
            note(report, "root filesystem", Err(Reason::GvisorFilesOutside), words);
            if !object.spec.allow_degraded {
                return Err(Stop::new(Step::Inspect, Reason::GvisorFilesOutside, words));
            }
        }
        let memory = self.memory();
        look_for_room(context, memory, 1, "gVisor's memory", report).await
    }

    /// The pod's memory is a file that gVisor's kernel has mapped.
    fn memory(&self) -> u64 {
        crate::node::process::resident_bytes(self.sentry.pid)
    }

    /// Takes the checkpoint and leaves its archive in the folder.
    pub(super) async fn checkpoint(
        &self,
        deadline: Deadline,
        folder: &Path,
        report: &mut Report,
        cancelled: &CancellationToken,
    ) -> Result<(), Stop> {
        let dump = |error: GvisorError| Stop::new(Step::Dump, error.reason(), error.to_string());
        let partial = folder.join(format!("{NAME}.partial"));
        archive::prepare(&partial).map_err(not_stored)?;
        let seen = self.seen().await.map_err(dump)?;
        let saved = save::save(&self.sentry, &partial, deadline.limit, cancelled).await;
        let stood = saved.map_err(dump)?;
        gvisor::archive::describe(&partial, &self.of, &self.sentry, &seen).map_err(dump)?;
        let (of, name) = (self.of.clone(), folder.join(NAME));
        let verify = move |partial: &Path| gvisor::archive::verify(partial, &of);
        let verified = store(deadline, &partial, &name, verify).await?;
        let whole = Whole {
            containers: &self.containers,
            path: NAME,
            format: ArchiveFormat::Gvisor,
            stood,
        };
        whole.tell(&verified, report);
        Ok(())
    }
}

/// The containers that were not asked for, in words; pure.
fn left_out<'a>(wanted: Option<&[String]>, running: impl Iterator<Item = &'a str>) -> Option<String> {
    let wanted = wanted?;
    let others: Vec<&str> = running.filter(|name| !wanted.iter().any(|w| w == name)).collect();
    (!others.is_empty()).then(|| format!("in the same sandbox runs {}", others.join(", ")))
}

/// What the pod does now, by the process of gVisor's kernel and by what runsc knows. `uid` is the PodCheckpoint's, which
/// is in the path of whatever is written for it.
pub(super) async fn describe_source(sentry: &Sentry, uid: &str) -> (Verdict, Reason, String) {
    let pid = sentry.pid;
    let no = |reason, words: String| (Verdict::False, reason, words);
    let Some(facts) = Facts::of(pid).filter(|_| sentry.alive()) else {
        let words = format!("gVisor's kernel, process {pid}, has ended");
        return (Verdict::Unknown, Reason::SourcePodGone, words);
    };
    let freezer = Freezer::of_process(pid).ok();
    if let Some(freezer) = freezer.filter(|f| f.is_frozen().unwrap_or(false)) {
        return no(
            Reason::SourceFrozen,
            format!("{} is frozen", freezer.path.display()),
        );
    }
    if matches!(facts.state, 'T' | 't') {
        let words = format!("gVisor's kernel, process {pid}, is stopped");
        return no(Reason::SourceStopped, words);
    }
    if save::is_saving(sentry, uid) {
        let words = format!("gVisor's kernel, process {pid}, still writes the checkpoint");
        return no(Reason::GvisorSaving, words);
    }
    match save::is_paused(sentry).await {
        Ok(false) => (
            Verdict::True,
            Reason::SourceRuns,
            format!("gVisor's kernel, process {pid}, runs and writes no checkpoint"),
        ),
        Ok(true) => no(Reason::GvisorPaused, "runsc calls the sandbox paused".to_owned()),
        Err(error) => (Verdict::Unknown, Reason::SourceUnknown, error.to_string()),
    }
}

/// Waits for a kernel that an earlier agent has let write: it then lets the pod go on by itself.
pub(super) async fn release(sentry: &Sentry, uid: &str) {
    if !save::wait_until_through(sentry, uid, PATIENCE).await {
        tracing::error!(
            pid = sentry.pid,
            "gVisor's kernel still writes, and its pod stands still"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_is_saved_whole_or_not_at_all() {
        let some = ["main".to_owned()];
        let running = ["main", "side"];
        assert_eq!(left_out(None, running.into_iter()), None);
        assert_eq!(left_out(Some(&some), ["main"].into_iter()), None);
        assert_eq!(
            left_out(Some(&some), running.into_iter()).as_deref(),
            Some("in the same sandbox runs side")
        );
    }
}
