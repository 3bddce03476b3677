//! The first look, which touches nothing: the target, what it runs in, and the method.

use std::time::{Duration, SystemTime};

use podcheckpoint_crds::{Finding, Method, Outcome, PodCheckpoint, Reason, RuntimeFacts, Step};

use super::containers::Subject;
use super::{Context, Deadline, Inspection, Stop, Work, describe, guest, gvisor, inside, machine};
use crate::archive::{self, ArchiveError};
use crate::guest::survey::Survey;
use crate::journal::aside;
use crate::node::cgroup::Freezer;
use crate::node::cri::{Container, Cri, Sandbox};
use crate::node::process::{Target, TargetError};
use crate::plan::{self, Plan};
use crate::report::Report;
use crate::sandbox::{self, Recognised};
use crate::words::human_bytes;

/// How long looking at the sandbox's processes may take: a process that hangs can make a look at it hang too.
const RECOGNISE: Duration = Duration::from_secs(10);

pub(super) async fn inspect(
    context: &Context,
    object: &PodCheckpoint,
    report: &mut Report,
) -> Result<Inspection, Stop> {
    let deadline = Deadline::of(object);
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
    // Whoever may write a status could name another pod's UID in it.
    let named = (
        object.metadata.namespace.as_deref(),
        object.spec.source_pod_name.as_str(),
    );
    if named != (Some(sandbox.namespace.as_str()), sandbox.name.as_str()) {
        let words = format!("the pod with UID {uid} is not pod {} of this namespace", named.1);
        return Err(stop(Reason::SourcePodReplaced, words));
    }
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
    let chosen = Chosen {
        pod_uid: uid,
        sandbox: &sandbox,
        containers: &containers,
        recognised: &recognised,
    };
    let work = chosen.work(object, plan.method, survey)?;
    // What saves a sandbox as a whole looks for room by itself.
    if let Work::Containers(subjects) = &work {
        check_target(context, &plan, subjects, report).await?;
    }
    Ok(Inspection {
        started: SystemTime::now(),
        deadline,
        pod_uid: uid.to_owned(),
        cri,
        sandbox,
        plan,
        work,
    })
}

/// The containers that are to be saved, with all that is known of where they run.
struct Chosen<'a> {
    pod_uid: &'a str,
    sandbox: &'a Sandbox,
    containers: &'a [Container],
    recognised: &'a Recognised,
}

impl Chosen<'_> {
    /// What the method has to do.
    fn work(
        &self,
        object: &PodCheckpoint,
        method: Method,
        survey: Result<Survey, (Reason, String)>,
    ) -> Result<Work, Stop> {
        let Self {
            pod_uid,
            sandbox,
            containers,
            recognised,
        } = *self;
        let lost = || {
            let words = format!(
                "{} has found nothing to save: {}",
                method.as_str(),
                recognised.evidence.join("; ")
            );
            Stop::new(Step::Inspect, Reason::MethodUnavailable, words)
        };
        Ok(match method {
            Method::VmSnapshot => {
                let machine = machine::Subject::new(pod_uid, sandbox, containers, recognised);
                Work::Machine(Box::new(machine.ok_or_else(lost)?))
            }
            Method::Guest => {
                let survey = survey.map_err(|(reason, words)| Stop::new(Step::Inspect, reason, words))?;
                let guest = guest::Subject::new(pod_uid, sandbox, containers, recognised, survey);
                Work::Guest(Box::new(guest.ok_or_else(lost)?))
            }
            Method::Gvisor => {
                let wanted = object.spec.containers.as_deref();
                let sandbox = gvisor::Subject::new(pod_uid, sandbox, wanted, recognised)?;
                Work::Gvisor(Box::new(sandbox))
            }
            Method::Auto | Method::Cri | Method::Kubelet | Method::Direct => {
                let subjects = containers
                    .iter()
                    .cloned()
                    .map(subject)
                    .collect::<Result<_, _>>()?;
                Work::Containers(subjects)
            }
        })
    }
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
pub(super) async fn look_for_room(
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

pub(super) fn note(report: &mut Report, check: &str, outcome: Result<(), Reason>, evidence: &str) {
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
}
