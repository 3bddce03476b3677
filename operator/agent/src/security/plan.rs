//! Which settings have to be changed; pure.

use podcheckpoint_crds::Reason;
use podcheckpoint_probe::observation::{FreezerState, Observations};

use super::setting::Setting;
use crate::node::cgroup::{Freezer, Version};

/// The settings that remove the cause, or why there are none.
///
/// # Errors
/// A sentence for the user, when nothing that can be changed on a running node removes the cause.
pub fn plan(cause: Reason, seen: &Observations, pod_uid: &str) -> Result<Vec<Setting>, &'static str> {
    match cause {
        Reason::TargetFrozen | Reason::TargetFrozenStopped => frozen(seen, pod_uid),
        Reason::SELinuxDenied if seen.kernel.selinux_deny_ptrace == Some(true) => {
            Ok(vec![Setting::DenyPtrace])
        }
        Reason::SELinuxDenied => Err(
            "SELinux denies by a rule of its policy and not by the boolean deny_ptrace, and only who knows the policy can change that",
        ),
        Reason::YamaScopeRestricted => Ok(vec![Setting::PtraceScope]),
        Reason::YamaNoAttach => Err("ptrace_scope 3 cannot be lowered while the kernel runs"),
        Reason::AlreadyTraced => Err("another's tracer is not ended from here"),
        Reason::SeccompNotifyUnanswered => Err("another's seccomp listener is not closed from here"),
        _ => Err("no security setting that can be changed on a running node is the cause"),
    }
}

fn frozen(seen: &Observations, pod_uid: &str) -> Result<Vec<Setting>, &'static str> {
    let mut settings = Vec::new();
    let states = seen.processes.iter().flat_map(|process| &process.freezers);
    for state in states.filter(|state| state.frozen) {
        let setting = thaw(state, pod_uid)
            .ok_or("the cgroup that was frozen is above the pod's, and holds other pods as well")?;
        if !settings.contains(&setting) {
            settings.push(setting);
        }
    }
    if settings.is_empty() {
        return Err("it is frozen, but not by a cgroup that the agent can see");
    }
    Ok(settings)
}

/// Only a cgroup of this pod may be thawed.
fn thaw(state: &FreezerState, pod_uid: &str) -> Option<Setting> {
    let by = state.by.as_ref()?;
    // Under systemd the UID is written with underscores.
    let is_pods = |part: &str| part.contains(pod_uid) || part.contains(&pod_uid.replace('-', "_"));
    let (above, name) = by.rsplit_once('/')?;
    if pod_uid.is_empty() || !by.split('/').any(is_pods) {
        return None;
    }
    let version = if state.version == 1 {
        Version::V1
    } else {
        Version::V2
    };
    let cgroup = Freezer {
        version,
        path: by.into(),
    };
    let of_pod = is_pods(name) && !above.split('/').any(is_pods);
    Some(Setting::Freezer { cgroup, of_pod })
}

#[cfg(test)]
mod tests {
    use super::*;
    use podcheckpoint_probe::observation::Process;

    const UID: &str = "557ee713-cd67-4343-80a3-1ebcafb6d7c2";

    fn frozen_by(path: &str, by: &str) -> Observations {
        let freezer = FreezerState {
            version: 2,
            path: path.into(),
            frozen: true,
            by: Some(by.into()),
        };
        let process = |pid| Process {
            pid,
            freezers: vec![freezer.clone()],
            ..Process::default()
        };
        Observations {
            processes: vec![process(7), process(8)],
            ..Observations::default()
        }
    }

    #[test]
    fn the_cgroup_that_was_told_to_freeze_is_thawed_once_for_all_its_processes() {
        let container = format!("/sys/fs/cgroup/kubepods/pod{UID}/0a1b");
        let planned = plan(Reason::TargetFrozen, &frozen_by(&container, &container), UID).unwrap();
        assert_eq!(planned.len(), 1);
        assert_eq!(planned[0].scope(), "container");
    }

    #[test]
    fn a_frozen_pod_is_thawed_as_a_pod_also_under_systemd() {
        let pod = format!(
            "/sys/fs/cgroup/kubepods.slice/kubepods-pod{}.slice",
            UID.replace('-', "_")
        );
        let container = format!("{pod}/cri-containerd-0a1b.scope");
        let planned = plan(Reason::TargetFrozen, &frozen_by(&container, &pod), UID).unwrap();
        assert_eq!(planned[0].scope(), "pod");
        assert_eq!(planned[0].name(), format!("freezer {pod}"));
    }

    #[test]
    fn what_holds_other_pods_is_never_thawed() {
        let container = format!("/sys/fs/cgroup/kubepods/pod{UID}/0a1b");
        let above = frozen_by(&container, "/sys/fs/cgroup/kubepods");
        assert!(
            plan(Reason::TargetFrozen, &above, UID)
                .unwrap_err()
                .contains("other pods")
        );
        assert!(plan(Reason::TargetFrozen, &frozen_by(&container, &container), "").is_err());
    }

    #[test]
    fn what_cannot_be_fixed_is_said_and_nothing_is_planned() {
        for cause in [
            Reason::YamaNoAttach,
            Reason::AlreadyTraced,
            Reason::TargetUninterruptible,
            Reason::PtraceDeniedUnexplained,
            Reason::PtraceWorks,
        ] {
            assert!(plan(cause, &Observations::default(), UID).is_err(), "{cause}");
        }
    }

    #[test]
    fn selinux_is_loosened_only_where_the_boolean_is_the_cause() {
        let mut seen = Observations::default();
        seen.kernel.selinux_enforcing = Some(true);
        assert!(plan(Reason::SELinuxDenied, &seen, UID).is_err());
        seen.kernel.selinux_deny_ptrace = Some(true);
        assert_eq!(
            plan(Reason::SELinuxDenied, &seen, UID),
            Ok(vec![Setting::DenyPtrace])
        );
    }
}
