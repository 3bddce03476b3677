//! Which settings have to be changed; pure.

use podcheckpoint_crds::Reason;
use podcheckpoint_probe::observation::{End, FreezerState, Observations, Process, Step, Subject};

use super::setting::Setting;
use crate::node::cgroup::{Freezer, Version};

/// The settings that remove the cause, or why there are none.
///
/// # Errors
/// A sentence for the user, when nothing that can be changed on a running node removes the cause.
pub fn plan(cause: Reason, seen: &Observations, pod_uid: &str) -> Result<Vec<Setting>, &'static str> {
    match cause {
        Reason::TargetFrozen | Reason::TargetFrozenStopped => frozen(seen, pod_uid),
        Reason::SELinuxDenied if seen.kernel.selinux_deny_ptrace == Some(true) && seen.hidden.is_empty() => {
            Ok(vec![Setting::DenyPtrace])
        }
        Reason::SELinuxDenied => Err(
            "SELinux denies by a rule of its policy and not by the boolean deny_ptrace, and only who knows the policy can change that",
        ),
        Reason::LsmDenied => profiles(seen),
        Reason::KernelFeatureMissing => modules(seen),
        Reason::YamaScopeRestricted => Ok(vec![Setting::PtraceScope]),
        Reason::YamaNoAttach => Err("ptrace_scope 3 cannot be lowered while the kernel runs"),
        Reason::AlreadyTraced => Err("another's tracer is not ended from here"),
        Reason::SeccompNotifyUnanswered => Err("another's seccomp listener is not closed from here"),
        _ => Err("no security setting that can be changed on a running node is the cause"),
    }
}

/// The profiles under which a canary was refused something.
fn profiles(seen: &Observations) -> Result<Vec<Setting>, &'static str> {
    let mut settings = Vec::new();
    let refused = seen.steps.iter().filter(|record| {
        record.subject == Subject::Canary
            && record.step != Step::Profile
            && matches!(record.end, End::Errno(_) | End::Killed(_))
    });
    for record in refused {
        let process = seen.processes.iter().find(|process| process.pid == record.pid);
        let name = process
            .and_then(Process::profile)
            .ok_or("the profile that denies it has no name")?;
        if name.starts_with(':') || name.contains("//&") {
            return Err(
                "the profile is in a namespace of its own or one of a stack, and is not changed from here",
            );
        }
        // A child profile is loaded with its parent.
        let name = name.split_once("//").map_or(name, |(parent, _)| parent);
        let setting = Setting::AppArmorProfile {
            name: name.to_owned(),
        };
        if !settings.contains(&setting) {
            settings.push(setting);
        }
    }
    if settings.is_empty() {
        return Err("no profile is known that denies it");
    }
    Ok(settings)
}

/// The modules by which the kernel lists sockets, each after those that it needs.
fn modules(seen: &Observations) -> Result<Vec<Setting>, &'static str> {
    const MODULES: [(&str, &[&str]); 5] = [
        ("UNIX_DIAG", &["unix_diag"]),
        ("INET_DIAG", &["inet_diag", "tcp_diag"]),
        ("INET_UDP_DIAG", &["inet_diag", "udp_diag"]),
        ("PACKET_DIAG", &["af_packet_diag"]),
        ("NETLINK_DIAG", &["netlink_diag"]),
    ];
    let mut settings = Vec::new();
    let missing = MODULES
        .iter()
        .filter(|(feature, _)| seen.kernel.features.get(*feature) == Some(&false));
    for name in missing.flat_map(|(_, names)| names.iter()) {
        let setting = Setting::KernelModule {
            name: (*name).to_owned(),
        };
        if !settings.contains(&setting) {
            settings.push(setting);
        }
    }
    if settings.is_empty() {
        return Err("what the kernel lacks is in no module that is known to bring it");
    }
    Ok(settings)
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
    use podcheckpoint_probe::observation::Record;

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
    fn only_the_profile_that_refused_something_is_changed() {
        let process = |pid, label: &str| Process {
            pid,
            label: Some(label.into()),
            ..Process::default()
        };
        let refused = |pid, step| Record {
            subject: Subject::Canary,
            step,
            pid,
            tid: pid,
            end: End::Errno(13),
            micros: 0,
        };
        let mut seen = Observations {
            processes: vec![
                process(7, "strict//hat (enforce)"),
                process(8, "other (enforce)"),
                process(9, "a b/../c (enforce)"),
            ],
            steps: vec![
                refused(7, Step::UnixSocket),
                refused(7, Step::ProcFolder),
                refused(8, Step::Profile),
                refused(9, Step::CgroupFile),
            ],
            ..Observations::default()
        };
        let names: Vec<_> = plan(Reason::LsmDenied, &seen, UID)
            .unwrap()
            .iter()
            .map(Setting::name)
            .collect();
        assert_eq!(names, ["AppArmor profile strict", "AppArmor profile a b/../c"]);
        seen.processes = vec![process(7, ":ns:strict (enforce)")];
        seen.steps.truncate(1);
        assert!(plan(Reason::LsmDenied, &seen, UID).is_err());
        assert!(plan(Reason::LsmDenied, &Observations::default(), UID).is_err());
    }

    #[test]
    fn only_modules_that_are_missing_are_loaded_and_each_after_what_it_needs() {
        let mut seen = Observations::default();
        assert!(plan(Reason::KernelFeatureMissing, &seen, UID).is_err());
        for (feature, present) in [
            ("UNIX_DIAG", true),
            ("INET_DIAG", false),
            ("INET_UDP_DIAG", false),
        ] {
            seen.kernel.features.insert(feature.into(), present);
        }
        let names: Vec<_> = plan(Reason::KernelFeatureMissing, &seen, UID)
            .unwrap()
            .iter()
            .map(Setting::name)
            .collect();
        assert_eq!(
            names,
            [
                "kernel module inet_diag",
                "kernel module tcp_diag",
                "kernel module udp_diag"
            ]
        );
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
        seen.hidden = vec![7];
        assert!(plan(Reason::SELinuxDenied, &seen, UID).is_err());
    }
}
