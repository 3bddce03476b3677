//! The checkpoint of a pod in a virtual machine by the CRIU of its guest.

use std::fs;
use std::path::Path;
use std::time::Duration;

use podcheckpoint_crds::conditions::Verdict;
use podcheckpoint_crds::{Method, PodCheckpoint, Reason, Step};
use podcheckpoint_probe::verdict::verdict;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::conclude::describe_source as source;
use super::containers::{longest_by_criu, write_container};
use super::inspect::look_for_room;
use super::keep::{describe_archive, not_stored, store_container};
use super::{Context, Deadline, Stop, WATCHDOG_GRACE};
use crate::archive::{self, ArchiveError, Identity};
use crate::guest::dump::{DumpError, Now, Order, Place};
use crate::guest::survey::{self, Inner, Survey};
use crate::guest::{Look, Way};
use crate::node::cri::{Container, Sandbox};
use crate::node::process::SourceState;
use crate::report::Report;
use crate::sandbox::{Machine, Recognised, Vsock};
use crate::validate;
use crate::words::{human_bytes, human_duration};

/// How long a guest may take to be as it was: it waits for CRIU, and then for the kernel.
const SETTLE: Duration = Duration::from_secs(15);
/// How often it is looked at meanwhile.
const TICK: Duration = Duration::from_millis(300);
/// Name of what says how the archive is restored.
const MANIFEST: &str = "guest.json";
/// How it is restored.
const RESTORE: [&str; 4] = [
    "Be root on a machine, or in a guest, with CRIU of this version or a later one and a processor that has what this guest's had.",
    "Make ROOTFS from the container's image, unpack rootfs-diff.tar over it, and make it a mount point: mount --bind ROOTFS ROOTFS",
    "criu restore --restore-detached --images-dir ARCHIVE/checkpoint --root ROOTFS --manage-cgroups=ignore, and for each path in `external` --external 'mnt[PATH]:SOURCE'",
    "SOURCE is a copy of what the volume or file held, and /dev/null for a path below /proc.",
];

/// Whether the guest's CRIU can be used, and with what. Asked only if it may be.
///
/// # Errors
/// Reason and words why not.
pub(super) async fn survey(
    object: &PodCheckpoint,
    recognised: &Recognised,
    containers: &[Container],
    looked: Option<&Look>,
) -> Result<Survey, (Reason, String)> {
    if !matches!(object.spec.method, Method::Auto | Method::Guest) {
        let words = "another method was asked for or preferred".to_owned();
        return Err((Reason::MethodNotChosen, words));
    }
    let (vsock, pids) = door(recognised.machine(), looked, object.spec.allow_degraded)?;
    let asked: Vec<(String, i32)> = containers.iter().map(|c| c.id.clone()).zip(pids).collect();
    let survey = survey::ask(vsock, &asked).await;
    survey.map_err(|error| (error.reason(), crate::node::chain(&error)))
}

/// The way into a guest in which ptrace works, and the first processes of the containers there; pure.
fn door<'a>(
    machine: Option<&'a Machine>,
    looked: Option<&'a Look>,
    allow_degraded: bool,
) -> Result<(&'a Vsock, Vec<i32>), (Reason, String)> {
    let seen = match looked {
        Some(Look::Seen(seen)) => seen,
        Some(closed) => return Err((Reason::GuestUnreachable, closed.obstacles())),
        None => {
            return Err((
                Reason::MethodUnavailable,
                "the guest was not looked into".to_owned(),
            ));
        }
    };
    if seen.way != Way::Console {
        let closed: Vec<String> = seen.closed.iter().map(ToString::to_string).collect();
        return Err((Reason::GuestConsoleClosed, closed.join("; ")));
    }
    let Some(vsock) = machine.and_then(|machine| machine.vsock.as_ref()) else {
        let words = "the debug console is a serial port, which does not notice that the agent is gone";
        return Err((Reason::GuestConsoleClosed, words.to_owned()));
    };
    let judgement = validate::judge(&verdict(&seen.observations), allow_degraded);
    if judgement.refused {
        return Err((judgement.reason, format!("in the guest: {}", judgement.message)));
    }
    Ok((vsock, seen.pids.clone()))
}

/// Containers in a guest that are to be dumped there.
pub(super) struct Subject {
    vmm: i32,
    started: u64,
    vsock: Vsock,
    survey: Survey,
    of: Vec<(Container, Identity)>,
}

impl Subject {
    pub(super) fn new(
        pod_uid: &str,
        sandbox: &Sandbox,
        containers: &[Container],
        recognised: &Recognised,
        survey: Survey,
    ) -> Option<Self> {
        let machine = recognised.machine()?;
        let of = containers.iter().map(|container| {
            let identity = Identity {
                pod_uid: pod_uid.to_owned(),
                namespace: sandbox.namespace.clone(),
                pod: sandbox.name.clone(),
                container: container.name.clone(),
            };
            (container.clone(), identity)
        });
        Some(Self {
            vmm: machine.pid,
            started: machine.started,
            vsock: machine.vsock.clone()?,
            survey,
            of: of.collect(),
        })
    }

    pub(super) fn place(&self, object: &PodCheckpoint) -> Place {
        Place {
            vmm: self.vmm,
            started: self.started,
            vsock: self.vsock.clone(),
            containers: self.survey.containers.iter().map(|c| c.id.clone()).collect(),
            uid: object.metadata.uid.clone().unwrap_or_default(),
        }
    }

    /// That ptrace works was proved before the method was chosen; what is left is the node's disk.
    pub(super) async fn look(&self, context: &Context, report: &mut Report) -> Result<(), Stop> {
        if let Some(runtime) = &mut report.status.runtime {
            runtime.criu_version = self.survey.criu.clone();
        }
        look_for_room(context, self.survey.memory, 1, "the guest's memory", report).await
    }

    /// Dumps one container after the other and leaves an archive of each in the folder.
    pub(super) async fn checkpoint(
        &self,
        context: &Context,
        object: &PodCheckpoint,
        deadline: Deadline,
        folder: &Path,
        report: &mut Report,
        cancelled: &CancellationToken,
    ) -> Result<(), Stop> {
        let place = self.place(object);
        for (number, ((container, identity), target)) in
            self.of.iter().zip(&self.survey.containers).enumerate()
        {
            if number > 0 {
                // Its folder has the same name; what is wrong in the guest is said when it cannot be made.
                let _ = settled(&place).await;
            }
            let order = Order {
                place: &place,
                survey: &self.survey,
                target,
                limit: deadline.left() + WATCHDOG_GRACE,
                archive_root: &context.archive_root,
            };
            let dump = self.dump(&order, container, folder);
            // What is dropped here ends in the guest as well, which then lets the target go.
            tokio::select! {
                result = dump => if let Err(stop) = result {
                    return Err(or_machines_end(stop, &place).await);
                },
                () = tokio::time::sleep_until(deadline.until) => return Err(deadline.passed(Step::Dump)),
                () = cancelled.cancelled() => {
                    let words = "cancelled: the PodCheckpoint was deleted or the agent is ending";
                    return Err(Stop::new(Step::Dump, Reason::AgentInterrupted, words));
                }
            }
            self.keep(container, identity, deadline, folder, report).await?;
        }
        let sizes = report.status.checkpointed_containers.iter().map(|c| c.size_bytes);
        let total = u64::try_from(sizes.sum::<i64>()).unwrap_or_default();
        report.status.size = Some(human_bytes(total));
        let frozen = longest_by_criu(report);
        report.status.frozen = (!frozen.is_zero()).then(|| human_duration(frozen));
        Ok(())
    }

    async fn dump(&self, order: &Order<'_>, container: &Container, folder: &Path) -> Result<(), Stop> {
        let name = &container.name;
        let partial = folder.join(format!("{name}.partial"));
        let made = archive::prepare(&partial).and_then(|()| archive::prepare(&partial.join("checkpoint")));
        made.map_err(not_stored)?;
        if let Err(error) = order.carry_out(&partial).await {
            return Err(failed(&error, &folder.join(format!("{name}.criu.log"))));
        }
        let described = write_container(container, &partial);
        described
            .and_then(|()| self.write_manifest(order.target, &partial))
            .map_err(not_stored)
    }

    /// What the layout of an archive does not say: whose CRIU it was, and what has to be there at a restore.
    fn write_manifest(&self, target: &Inner, folder: &Path) -> Result<(), ArchiveError> {
        let manifest = serde_json::json!({
            "kind": "Guest",
            "takenAt": k8s_openapi::jiff::Timestamp::now().to_string(),
            "criuVersion": self.survey.criu,
            "external": target.external,
            "files": "rootfs-diff.tar has the files of the root filesystem that were changed since the container started, by the guest's clock; which ones were deleted is not known",
            "restore": RESTORE,
        });
        // As runc and crun have it: where the first three descriptors lead.
        let descriptors = serde_json::json!(target.descriptors);
        for (name, content) in [
            (MANIFEST, format!("{manifest:#}")),
            ("checkpoint/descriptors.json", descriptors.to_string()),
        ] {
            let path = folder.join(name);
            fs::write(&path, content).map_err(|source| ArchiveError::Io { path, source })?;
        }
        Ok(())
    }

    async fn keep(
        &self,
        container: &Container,
        identity: &Identity,
        deadline: Deadline,
        folder: &Path,
        report: &mut Report,
    ) -> Result<(), Stop> {
        let (path, verified) = store_container(deadline, folder, true, identity).await?;
        let archives = &mut report.status.checkpointed_containers;
        archives.push(describe_archive(container, path, verified, true));
        Ok(())
    }
}

/// A pod that is deleted under a dump takes the guest with it. All that the console tells is that it ended, and that a
/// moment before the machine is gone.
async fn or_machines_end(stop: Stop, place: &Place) -> Stop {
    let broke = matches!(
        stop.reason,
        Reason::GuestTransferFailed | Reason::GuestConsoleClosed
    );
    let until = Instant::now() + Duration::from_secs(2);
    while broke && place.alive() && Instant::now() < until {
        tokio::time::sleep(TICK).await;
    }
    if place.alive() {
        return stop;
    }
    let words = format!(
        "the virtual machine ended during the checkpoint: {}",
        stop.message
    );
    Stop::new(stop.step, Reason::SourcePodGone, words)
}

/// CRIU's log is kept, since the guest keeps nothing.
fn failed(error: &DumpError, log: &Path) -> Stop {
    let (reason, message) = error.explain();
    let mut stop = Stop::new(Step::Dump, reason, message);
    if error.log().is_some_and(|words| fs::write(log, words).is_ok()) {
        stop.message = format!("{}; CRIU's log is {} on the node", stop.message, log.display());
        stop.log = Some(log.to_owned());
    }
    stop
}

/// Calls off what is still in the guest, and looks until the target runs and nothing is left there, within bounds.
async fn settled(place: &Place) -> Result<Now, String> {
    let (begun, mut told) = (Instant::now(), false);
    loop {
        let seen = place.look().await;
        let runs = |now: &Now| matches!(now.state, SourceState::Runs { .. } | SourceState::Gone);
        let settled = seen.as_ref().is_ok_and(|now| runs(now) && !now.left);
        if settled || begun.elapsed() >= SETTLE {
            return seen;
        }
        if !told && seen.is_ok_and(|now| now.left) {
            told = place.call_off().await.is_ok();
        }
        tokio::time::sleep(TICK).await;
    }
}

/// Calls off what an earlier agent has begun: its guest lets the target go by itself, and this at once.
pub(crate) async fn release(place: &Place) {
    if let Err(why) = place.call_off().await {
        tracing::warn!(
            uid = place.uid,
            why,
            "the guest is left to end a checkpoint by itself"
        );
    }
}

/// What the target does now, as its guest says.
pub(super) async fn describe_source(place: &Place) -> (Verdict, Reason, String) {
    match settled(place).await {
        Ok(now) => {
            let (verdict, reason, mut words) = source(Some(now.state));
            if now.left {
                tracing::error!(uid = place.uid, "the guest still has files of the checkpoint");
                words.push_str("; files of the checkpoint are still there");
            }
            (verdict, reason, format!("in the guest: {words}"))
        }
        Err(why) => {
            let words = format!("the guest does not say whether the pod runs: {why}");
            (Verdict::Unknown, Reason::SourceUnknown, words)
        }
    }
}
