//! Security settings of the node: changed only as far as needed, and always put back.
//!
//! `plan` decides what has to be changed (pure), `setting` reads and writes each, `journal` remembers what has to be put
//! back, `kernelfs` makes sure that a write goes where it should. This module ties them to a checkpoint.

pub mod apparmor;
pub mod journal;
pub mod kernelfs;
pub mod module;
pub mod plan;
pub mod seccomp;
pub mod setting;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use podcheckpoint_crds::conditions::Verdict as Status;
use podcheckpoint_crds::{
    ConditionType, Patch, PatchKind, PatchOutcome, PodCheckpoint, Reason, SecurityPatches,
};

use self::journal::{ChangeError, Entry, Holder, Outcome, PatchJournal, Reverted, describe};
use self::seccomp::Profiles;
use self::setting::Setting;
use crate::node::cgroup::Freezer;
use crate::node::release::{called_paused, correct_books, pause_again};
use crate::node::watchdog;
use crate::report::Report;

/// Everything that the agent may change on its node.
#[derive(Debug)]
pub struct Security {
    journal: PatchJournal,
    archive_root: PathBuf,
    allowed: Vec<PatchKind>,
    profiles: Profiles,
    /// What an agent's start has put back, by the checkpoints that had needed it.
    recovered: Mutex<HashMap<String, Vec<Outcome>>>,
}

/// Why settings that stand in the way are not changed.
#[derive(Debug)]
pub struct Refusal {
    /// Reason of SecurityPrepared.
    pub reason: Reason,
    /// Its message.
    pub message: String,
    /// What would have to be changed.
    pub patches: Vec<Patch>,
}

impl Security {
    /// What may be changed is what the administrator allows.
    pub fn new(archive_root: &Path, allowed: Vec<PatchKind>) -> Self {
        Self {
            journal: PatchJournal::new(archive_root),
            archive_root: archive_root.to_owned(),
            allowed,
            profiles: Profiles::default(),
            recovered: Mutex::default(),
        }
    }

    /// Whether these settings may be changed for an object; if not, what would be, for its status.
    ///
    /// # Errors
    /// Why they may not.
    pub fn consent(&self, object: &PodCheckpoint, settings: &[Setting]) -> Result<(), Refusal> {
        let seconds = object.spec.timeout_seconds;
        let planned = |setting: &Setting| match setting.change() {
            Ok(change) => describe(setting, &change.before, &change.after, seconds),
            Err(error) => describe(setting, &format!("unknown: {error}"), setting.wanted(), seconds),
        };
        let changes: Vec<_> = settings.iter().map(|s| (s.kind(), s.name())).collect();
        match self.refusal(object, &changes) {
            None => Ok(()),
            Some((reason, message)) => Err(Refusal {
                reason,
                message,
                patches: settings.iter().map(planned).collect(),
            }),
        }
    }

    /// Why changes of these kinds and names are not made for an object, if they are not.
    pub fn refusal(
        &self,
        object: &PodCheckpoint,
        changes: &[(PatchKind, String)],
    ) -> Option<(Reason, String)> {
        let spec = &object.spec;
        refusal(spec.security_patches, spec.validate_only, &self.allowed, changes)
    }

    /// The seccomp profiles for pods' next starts.
    pub fn profiles(&self) -> &Profiles {
        &self.profiles
    }

    /// Changes a setting for an object; it is in the journal before it is changed.
    ///
    /// # Errors
    /// Then nothing was changed.
    pub async fn change(
        self: &Arc<Self>,
        object: &PodCheckpoint,
        setting: &Setting,
        runtime_socket: &Path,
    ) -> Result<Entry, ChangeError> {
        let holder = holder(object);
        let paused = match setting.freezer() {
            Some(cgroup) => called_paused(runtime_socket, cgroup).await,
            None => None,
        };
        let (this, wanted) = (self.clone(), setting.clone());
        let changed = tokio::task::spawn_blocking(move || this.journal.change(&wanted, holder, paused)).await;
        let changed = changed.unwrap_or_else(|error| {
            Err(ChangeError::Setting {
                setting: setting.name(),
                source: std::io::Error::other(error).into(),
            })
        });
        if let Ok(entry) = &changed {
            tracing::info!(
                setting = setting.name(),
                before = entry.before,
                after = entry.after,
                "changed"
            );
        }
        if changed.is_ok()
            && let Some(cgroup) = setting.freezer()
            && let Err(error) = correct_books(runtime_socket, std::slice::from_ref(cgroup)).await
        {
            tracing::warn!(%error, "containerd may still take a container for paused");
        }
        changed
    }

    /// Shares what other checkpoints have changed and this one may profit from: it must not be put back before this one
    /// has ended. A freezer is one pod's own, and only its own checkpoint changes it.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn join(
        self: &Arc<Self>,
        object: &PodCheckpoint,
        profiles: Vec<String>,
    ) -> Result<Vec<Entry>, ChangeError> {
        if object.spec.security_patches != SecurityPatches::Temporary || object.spec.validate_only {
            return Ok(Vec::new());
        }
        let (this, holder) = (self.clone(), holder(object));
        let wanted = move |setting: &Setting| {
            let profits = match setting {
                Setting::Freezer { .. } => false,
                Setting::AppArmorProfile { name } => profiles.contains(name),
                Setting::DenyPtrace | Setting::PtraceScope | Setting::KernelModule { .. } => true,
            };
            profits && this.allowed.contains(&setting.kind())
        };
        let this = self.clone();
        let joined = tokio::task::spawn_blocking(move || this.journal.join(&holder, wanted)).await;
        joined.unwrap_or_else(|error| Err(ChangeError::Journal(std::io::Error::other(error))))
    }

    /// Another number whenever this agent has changed a setting or put one back since.
    pub fn generation(&self) -> u64 {
        self.journal.generation()
    }

    /// Puts back what an object needed.
    pub async fn release(self: &Arc<Self>, uid: &str, runtime_socket: &Path) -> Vec<Outcome> {
        let (this, uid) = (self.clone(), uid.to_owned());
        let outcomes = tokio::task::spawn_blocking(move || this.journal.release(&uid)).await;
        let outcomes = outcomes.unwrap_or_default();
        self.remember_for_the_abandoned(&outcomes);
        pause_as_before(&outcomes, runtime_socket).await;
        outcomes
    }

    /// Those that could not put it back are told at the next look at them.
    fn remember_for_the_abandoned(&self, outcomes: &[Outcome]) {
        let mut recovered = self.recovered.lock().unwrap_or_else(PoisonError::into_inner);
        let over =
            |outcome: &&Outcome| !matches!(outcome.reverted, Reverted::Failed(_) | Reverted::Shared(_));
        for outcome in outcomes.iter().filter(over) {
            for uid in &outcome.entry.abandoned {
                recovered.entry(uid.clone()).or_default().push(outcome.clone());
            }
        }
    }

    /// What became of the changes that an object's status calls open. What could not be put back is tried again.
    pub async fn settle(
        self: &Arc<Self>,
        object: &PodCheckpoint,
        runtime_socket: Option<&Path>,
    ) -> Vec<Outcome> {
        let uid = object.metadata.uid.clone().unwrap_or_default();
        let recovered = self.recovered(&uid);
        if !recovered.is_empty() {
            return recovered;
        }
        let patches = object.status.as_ref().map_or(&[][..], |status| &status.patches);
        let open = patches.iter().filter(|patch| patch.is_open());
        let settings: Vec<String> = open.map(|patch| patch.setting.clone()).collect();
        let this = self.clone();
        let settled = tokio::task::spawn_blocking(move || this.journal.settle(&uid, &settings)).await;
        let outcomes = settled.unwrap_or_default();
        self.remember_for_the_abandoned(&outcomes);
        // It is told here and now.
        self.recovered(object.metadata.uid.as_deref().unwrap_or_default());
        self.pause_what_is_back(&outcomes, runtime_socket).await;
        outcomes
    }

    async fn pause_what_is_back(&self, outcomes: &[Outcome], runtime_socket: Option<&Path>) {
        if outcomes.is_empty() {
            return;
        }
        if let Ok(cri) = crate::node::cri::Cri::discover(runtime_socket).await {
            pause_as_before(outcomes, cri.socket()).await;
        }
    }

    /// Puts back what an earlier agent has left changed. Before anything else is done on the node.
    pub async fn recover(self: &Arc<Self>, runtime_socket: Option<&Path>) {
        if self.journal.entries().is_empty() {
            return;
        }
        // A watchdog of the earlier agent may still be making the target run: a cgroup that is frozen again under its eyes
        // would be thawed.
        let this = self.clone();
        let outcomes = tokio::task::spawn_blocking(move || {
            if let Err(error) = watchdog::wait_for_others(&this.archive_root) {
                tracing::warn!(%error, "a watchdog of an earlier agent may still be at work");
            }
            this.journal.recover()
        });
        let outcomes = outcomes.await.unwrap_or_default();
        self.pause_what_is_back(&outcomes, runtime_socket).await;
        let mut recovered = self.recovered.lock().unwrap_or_else(PoisonError::into_inner);
        for outcome in outcomes {
            let holders = outcome.entry.holders.iter().map(|holder| &holder.uid);
            for uid in holders.chain(&outcome.entry.abandoned) {
                recovered.entry(uid.clone()).or_default().push(outcome.clone());
            }
        }
    }

    /// What the agent's start has put back of an object's changes.
    pub fn recovered(&self, uid: &str) -> Vec<Outcome> {
        let mut recovered = self.recovered.lock().unwrap_or_else(PoisonError::into_inner);
        recovered.remove(uid).unwrap_or_default()
    }

    /// Whether a checkpoint has thawed this cgroup for its time, so that it is to run for now.
    pub fn keeps_thawed(&self, cgroup: &Freezer) -> bool {
        let entries = self.journal.entries();
        // Of a container also a part of it: thawing the container later would thaw that part as well.
        let mut thawed = entries.iter().filter_map(|entry| entry.setting.freezer());
        thawed.any(|thawed| thawed.version == cgroup.version && thawed.path.starts_with(&cgroup.path))
    }

    /// The changes in force, and the files of the journal that cannot be read.
    pub fn in_force(&self) -> (Vec<Patch>, Vec<String>) {
        let patches = self.journal.entries().iter().map(Entry::describe).collect();
        (patches, self.journal.unreadable())
    }
}

fn holder(object: &PodCheckpoint) -> Holder {
    Holder {
        uid: object.metadata.uid.clone().unwrap_or_default(),
        at_most_seconds: object.spec.timeout_seconds,
    }
}

/// Why settings are not changed, if they are not; pure.
fn refusal(
    mode: SecurityPatches,
    validate_only: bool,
    allowed: &[PatchKind],
    changes: &[(PatchKind, String)],
) -> Option<(Reason, String)> {
    let names: Vec<&str> = changes.iter().map(|(_, name)| name.as_str()).collect();
    let names = names.join(", ");
    if mode == SecurityPatches::Never {
        let message = format!("securityPatches is Never; Temporary would change {names}");
        return Some((Reason::PatchNotRequested, message));
    }
    if mode == SecurityPatches::Plan || validate_only {
        let message = format!("status.patches lists what would be changed: {names}");
        return Some((Reason::PatchPlanned, message));
    }
    let (kind, name) = changes.iter().find(|(kind, _)| !allowed.contains(kind))?;
    let message = format!(
        "the administrator does not allow changes of the kind {}: {name}",
        kind.as_str()
    );
    Some((Reason::PatchForbidden, message))
}

async fn pause_as_before(outcomes: &[Outcome], runtime_socket: &Path) {
    for outcome in outcomes.iter().filter(|o| o.reverted == Reverted::Restored) {
        let Some(container) = &outcome.entry.paused else {
            continue;
        };
        if let Err(error) = pause_again(runtime_socket, container).await {
            tracing::warn!(%error, container, "frozen again, but containerd does not call it paused");
        }
    }
}

/// Says in a report what became of the changes.
pub fn report_restored(report: &mut Report, outcomes: &[Outcome]) {
    let now = Time(Timestamp::now());
    for patch in report.status.patches.iter_mut().filter(|patch| patch.is_open()) {
        let outcome = outcomes.iter().find(|o| o.entry.setting.name() == patch.setting);
        // What is in no journal any more was put back by an agent that could not say so, nor what it had found.
        let back = outcome.is_none_or(|o| !matches!(o.reverted, Reverted::Failed(_)));
        patch.reverted_time = back.then(|| now.clone());
        patch.outcome = match outcome.map(|o| &o.reverted) {
            Some(Reverted::Shared(_)) => Some(PatchOutcome::Shared),
            Some(Reverted::ChangedByOthers { .. } | Reverted::InUse) => Some(PatchOutcome::ChangedByOthers),
            Some(Reverted::Restored) => Some(PatchOutcome::Restored),
            Some(Reverted::Failed(_)) | None => None,
        };
    }
    let (verdict, reason, message) = restored(&report.status.patches, outcomes);
    report.set(ConditionType::SecurityRestored, verdict, reason, message);
}

/// The worst of what became of the changes; pure.
fn restored(patches: &[Patch], outcomes: &[Outcome]) -> (Status, Reason, String) {
    let made = patches
        .iter()
        .filter(|patch| patch.applied_time.is_some() && !patch.is_kept())
        .count();
    if made == 0 && outcomes.is_empty() {
        return (Status::True, Reason::NotNeeded, "no setting was changed".into());
    }
    let words = outcomes.iter().map(|outcome| {
        let (name, before, after) = (
            outcome.entry.setting.name(),
            &outcome.entry.before,
            &outcome.entry.after,
        );
        match &outcome.reverted {
            Reverted::Restored => format!("{name} is {before} again"),
            Reverted::Shared(others) => {
                format!("{name} is still {after} for {others} other checkpoint(s)")
            }
            Reverted::ChangedByOthers { found } => {
                format!("{name} was {before}, the checkpoint made it {after}, and somebody else made it {found}, which was left")
            }
            Reverted::InUse => format!("{name} was {before}, and is in use by now, so it was left {after}"),
            Reverted::Failed(error) => format!("{name} could not be put back to {before}: {error}"),
        }
    });
    let message = words.collect::<Vec<_>>().join("; ");
    let any = |wanted: fn(&Reverted) -> bool| outcomes.iter().any(|outcome| wanted(&outcome.reverted));
    if any(|r| matches!(r, Reverted::Failed(_))) {
        return (Status::False, Reason::RevertFailed, message);
    }
    if any(|r| matches!(r, Reverted::ChangedByOthers { .. } | Reverted::InUse)) {
        return (Status::False, Reason::ChangedByOthers, message);
    }
    if any(|r| matches!(r, Reverted::Shared(_))) {
        return (Status::True, Reason::PatchShared, message);
    }
    let message = if message.is_empty() {
        format!(
            "{made} setting(s) were put back, unless somebody else had changed them since, by an agent that ended before it could say so"
        )
    } else {
        message
    };
    (Status::True, Reason::PatchesReverted, message)
}

/// The AppArmor profile of a process, the parent of a child profile; `None` when it is not confined.
pub fn profile_of(pid: i32) -> Option<String> {
    let label = std::fs::read_to_string(format!("/proc/{pid}/attr/current")).ok()?;
    let (name, _) = label.trim_end().rsplit_once(" (")?;
    Some(
        name.split_once("//")
            .map_or(name, |(parent, _)| parent)
            .to_owned(),
    )
}

/// Whether a cgroup that somebody had frozen is frozen again.
pub fn froze_again(outcomes: &[Outcome]) -> bool {
    outcomes
        .iter()
        .any(|o| o.entry.setting.freezer().is_some() && o.reverted == Reverted::Restored)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_that_the_administrator_does_not_allow_is_never_changed() {
        let changes = [(PatchKind::Selinux, "x".to_owned())];
        let ask =
            |mode, allowed: &[PatchKind]| refusal(mode, false, allowed, &changes).map(|(reason, _)| reason);
        assert_eq!(
            ask(SecurityPatches::Temporary, &[PatchKind::Freezer]),
            Some(Reason::PatchForbidden)
        );
        assert_eq!(ask(SecurityPatches::Temporary, &[PatchKind::Selinux]), None);
        assert_eq!(
            ask(SecurityPatches::Plan, &PatchKind::ALL),
            Some(Reason::PatchPlanned)
        );
        assert_eq!(
            ask(SecurityPatches::Never, &PatchKind::ALL),
            Some(Reason::PatchNotRequested)
        );
    }

    #[test]
    fn a_validation_changes_nothing() {
        let planned = refusal(
            SecurityPatches::Temporary,
            true,
            &PatchKind::ALL,
            &[(PatchKind::Yama, "x".to_owned())],
        );
        assert_eq!(planned.map(|(reason, _)| reason), Some(Reason::PatchPlanned));
    }

    #[test]
    fn only_what_is_back_is_called_back() {
        let entry = Entry {
            setting: Setting::DenyPtrace,
            before: "on".into(),
            after: "off".into(),
            applied: Timestamp::UNIX_EPOCH,
            boot: String::new(),
            paused: None,
            holders: Vec::new(),
            abandoned: Vec::new(),
        };
        let say = |reverted| {
            let outcome = Outcome {
                entry: entry.clone(),
                reverted,
            };
            let (status, reason, message) = restored(&[entry.describe()], &[outcome]);
            (status, reason, message.contains("deny_ptrace"))
        };
        assert_eq!(
            say(Reverted::Restored),
            (Status::True, Reason::PatchesReverted, true)
        );
        assert_eq!(
            say(Reverted::ChangedByOthers { found: "?".into() }),
            (Status::False, Reason::ChangedByOthers, true)
        );
        assert_eq!(
            say(Reverted::Failed("x".into())),
            (Status::False, Reason::RevertFailed, true)
        );
    }
}
