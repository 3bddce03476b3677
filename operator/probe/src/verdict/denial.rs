//! Why the kernel denies: by its own words where it logs them, otherwise by elimination in the kernel's own order.

use podcheckpoint_crds::Reason;

use super::words::{error, outcome_word, step_word};
use super::{Finding, fail};
use crate::facts::CAP_SYS_PTRACE;
use crate::observation::{End, Observations, Process, Record, Step, Subject, UserNamespace};

/// Why the kernel denies, by elimination in the kernel's own order (ptrace(2), __ptrace_may_access).
pub(super) fn denial(seen: &Observations, process: &Process, own: &[&Record], record: &Record) -> Finding {
    const CHECK: &str = "right to trace";
    let pid = Some(process.pid);
    let End::Errno(errno) = record.end else {
        return fail(CHECK, Reason::PtraceDeniedUnexplained, pid, "denied");
    };
    let ends: Vec<String> = own
        .iter()
        .filter(|r| is_access(r.step))
        .map(|r| format!("{:?} {}", r.step, outcome_word(&r.end)))
        .collect();
    let evidence = format!(
        "{} of process {} gave {} ({})",
        step_word(record.step),
        process.pid,
        error(errno),
        ends.join(", ")
    );
    let reading_denied = own
        .iter()
        .any(|r| r.step == Step::Kcmp && matches!(r.end, End::Errno(e) if denies(e)));
    let (reason, why) = cause_of_denial(seen, process, reading_denied);
    fail(CHECK, reason, pid, format!("{evidence}; {why}"))
}

fn cause_of_denial(seen: &Observations, process: &Process, reading_denied: bool) -> (Reason, String) {
    if let Some(found) = logged(seen, Some(process)) {
        return found;
    }
    let yama = seen.kernel.yama;
    if yama == Some(3) && !reading_denied {
        return (Reason::YamaNoAttach, "kernel.yama.ptrace_scope is 3".into());
    }
    // Whoever denies reading hides the namespace as well; all are below the first one.
    let within = match process.user_namespace {
        UserNamespace::Same | UserNamespace::Below => true,
        UserNamespace::Unknown => seen.tracer.initial_user_namespace,
        _ => false,
    };
    let capable = has(seen.tracer.capabilities) && within;
    if !capable && let Some(found) = incapable(seen, process, reading_denied) {
        return found;
    }
    if yama == Some(3) {
        return (Reason::YamaNoAttach, "kernel.yama.ptrace_scope is 3; reading is denied too, which Yama does not do: there is a second cause".into());
    }
    security_module(seen, Some(process)).unwrap_or_else(|| {
        let label = seen.tracer.label.as_deref().unwrap_or("none");
        let why = format!(
            "ruled out: seccomp, another tracer, Yama ({yama:?}), capabilities, security labels ({label}), BPF programs, Landlock"
        );
        (Reason::PtraceDeniedUnexplained, why)
    })
}

/// The kernel's own word for it.
fn logged(seen: &Observations, process: Option<&Process>) -> Option<(Reason, String)> {
    seen.denials.iter().find_map(|line| {
        let logged = format!("the kernel's log: {line}");
        if line.contains("apparmor=\"DENIED\" operation=\"ptrace\"") {
            return Some((Reason::AppArmorDenied, logged));
        }
        let words = || selinux(seen, process).map_or(String::new(), |words| format!("; {words}"));
        line.contains("avc:")
            .then(|| (Reason::SELinuxDenied, format!("{logged}{}", words())))
    })
}

/// What SELinux has to do with a denial; `None` when it is not in force, or its policy allows all that is asked for.
fn selinux(seen: &Observations, process: Option<&Process>) -> Option<String> {
    if seen.kernel.selinux_enforcing != Some(true) {
        return None;
    }
    let tracer = &seen.tracer;
    let (denies, theirs) = process.map_or((&tracer.selinux_denies, &tracer.label), |process| {
        (&process.selinux_denies, &process.label)
    });
    let policy = match denies.as_deref() {
        Some([]) => return None,
        Some(denied) => format!("its policy denies {}", denied.join(" and ")),
        None => "its policy could not be asked".to_owned(),
    };
    let boolean = match seen.kernel.selinux_deny_ptrace {
        Some(true) => "deny_ptrace is on",
        Some(false) => "deny_ptrace is off",
        None => "it has no boolean deny_ptrace",
    };
    let label = |label: &Option<String>| label.clone().unwrap_or_else(|| "unknown".to_owned());
    Some(format!(
        "SELinux enforces, {policy}, {boolean}; tracer {}, target {}",
        label(&tracer.label),
        label(theirs)
    ))
}

/// Without CAP_SYS_PTRACE over the target.
fn incapable(seen: &Observations, process: &Process, reading_denied: bool) -> Option<(Reason, String)> {
    let lacks = format!("the tracer's CapEff is {:016x}", seen.tracer.capabilities);
    if process.user_namespace == UserNamespace::Outside {
        return Some((
            Reason::MissingPtraceCapability,
            "the target's user namespace is not the tracer's nor below it".into(),
        ));
    }
    if process.user_namespace == UserNamespace::Unknown && !seen.tracer.initial_user_namespace {
        let why = "the tracer is in a user namespace below the first one, and cannot see the target's";
        return Some((Reason::MissingPtraceCapability, why.into()));
    }
    if let Some(scope @ 1..) = seen.kernel.yama
        && !reading_denied
    {
        let reason = if scope == 3 {
            Reason::YamaNoAttach
        } else {
            Reason::YamaScopeRestricted
        };
        return Some((
            reason,
            format!("kernel.yama.ptrace_scope is {scope}, and {lacks}"),
        ));
    }
    if process.not_dumpable && process.uid == seen.tracer.uid {
        return Some((
            Reason::TargetNotDumpable,
            format!(
                "/proc/{}/maps belongs to root although user {} runs it, and {lacks}",
                process.pid, process.uid
            ),
        ));
    }
    let equal = process.uid == seen.tracer.uid && process.capabilities & !seen.tracer.capabilities == 0;
    (!equal).then(|| {
        let why = format!(
            "{lacks}, without CAP_SYS_PTRACE; the target's user is {} and its CapEff {:016x}",
            process.uid, process.capabilities
        );
        (Reason::MissingPtraceCapability, why)
    })
}

/// A security module that may deny although nothing was logged, the most telling first.
pub(super) fn security_module(seen: &Observations, process: Option<&Process>) -> Option<(Reason, String)> {
    if let Some(found) = logged(seen, process) {
        return Some(found);
    }
    let kernel = &seen.kernel;
    let active = |name: &str| {
        kernel
            .lsm
            .as_ref()
            .is_some_and(|all| all.iter().any(|module| module == name))
    };
    let label = seen.tracer.label.as_deref().unwrap_or("unconfined");
    let theirs = process
        .and_then(|process| process.label.as_deref())
        .unwrap_or("unknown");
    if let Some(words) = selinux(seen, process) {
        return Some((
            Reason::SELinuxDenied,
            format!("{words}; no denial was found in the kernel's log"),
        ));
    }
    // A profile can be unconfined too: `runc (unconfined)`.
    let unconfined = label.starts_with("unconfined") || label.ends_with("(unconfined)");
    if active("apparmor") && !unconfined {
        return Some((
            Reason::AppArmorDenied,
            format!("tracer {label}, target {theirs}; no denial was found in the kernel's log"),
        ));
    }
    let programs = bpf_programs(seen);
    if !programs.is_empty() {
        return Some((
            Reason::BpfLsmDenied,
            format!(
                "BPF programs are loaded that may deny it: {}",
                programs.join(", ")
            ),
        ));
    }
    let own_works = seen
        .steps
        .iter()
        .any(|r| r.subject == Subject::Own && r.step == Step::Seize && matches!(r.end, End::Done(_)));
    (kernel.landlock_abi > 0 && own_works && process.is_some()).then(|| {
        let why = format!("the probe's own child can be traced, every other cause is ruled out, and Landlock (ABI {}) is active", kernel.landlock_abi);
        (Reason::LandlockDenied, why)
    })
}

/// BPF programs that can deny ptrace: those on its hook or on the one for capabilities, and those of which the kernel
/// does not tell where they sit. systemd, for one, has a program on another hook.
fn bpf_programs(seen: &Observations) -> Vec<String> {
    let suspect = |hook: Option<&str>| {
        matches!(
            hook,
            None | Some("bpf_lsm_ptrace_access_check" | "bpf_lsm_capable")
        )
    };
    let programs = seen.kernel.bpf_lsm.iter().flatten();
    programs
        .filter(|program| suspect(program.hook.as_deref()))
        .map(|program| {
            let hook = program.hook.as_deref().unwrap_or("a hook that is not told");
            format!("{} (id {}) on {hook}", program.name, program.id)
        })
        .collect()
}

pub(super) fn has(capabilities: u64) -> bool {
    capabilities & CAP_SYS_PTRACE != 0
}

pub(super) fn is_access(step: Step) -> bool {
    matches!(
        step,
        Step::Maps | Step::Kcmp | Step::ReadMemory | Step::GetFd | Step::Seize
    )
}

pub(super) fn denies(errno: i32) -> bool {
    matches!(errno, libc::EPERM | libc::EACCES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::LsmProgram;

    /// As seen by a tracer that lacks nothing, on a target of which SELinux' policy denies this.
    fn under_selinux(deny_ptrace: Option<bool>, denied: Option<&[&str]>) -> (Reason, String) {
        let mut seen = Observations::default();
        seen.kernel.selinux_enforcing = Some(true);
        seen.kernel.selinux_deny_ptrace = deny_ptrace;
        seen.tracer.capabilities = CAP_SYS_PTRACE;
        seen.tracer.label = Some("a:b:spc_t:s0".into());
        let denied = denied.map(|denied| denied.iter().map(|what| (*what).to_owned()).collect());
        let process = Process {
            label: Some("a:b:container_t:s0".into()),
            selinux_denies: denied,
            user_namespace: UserNamespace::Same,
            ..Process::default()
        };
        cause_of_denial(&seen, &process, false)
    }

    #[test]
    fn selinux_is_blamed_only_for_what_its_policy_denies() {
        let (reason, why) = under_selinux(Some(true), Some(&["process ptrace"]));
        assert_eq!(reason, Reason::SELinuxDenied);
        assert!(why.contains("denies process ptrace, deny_ptrace is on"), "{why}");
        assert!(
            why.contains("tracer a:b:spc_t:s0, target a:b:container_t:s0"),
            "{why}"
        );
        let (reason, _) = under_selinux(Some(true), Some(&[]));
        assert_eq!(reason, Reason::PtraceDeniedUnexplained);
    }

    #[test]
    fn selinux_that_cannot_be_asked_is_suspected() {
        let (reason, why) = under_selinux(None, None);
        assert_eq!(reason, Reason::SELinuxDenied);
        assert!(
            why.contains("could not be asked, it has no boolean deny_ptrace"),
            "{why}"
        );
    }

    #[test]
    fn only_a_program_that_can_deny_ptrace_is_blamed() {
        let mut seen = Observations::default();
        let program = |hook: Option<&str>| LsmProgram {
            id: 7,
            name: "x".into(),
            hook: hook.map(str::to_owned),
        };
        seen.kernel.bpf_lsm = Some(vec![program(Some("bpf_lsm_file_open"))]);
        assert_eq!(bpf_programs(&seen), [""; 0]);
        seen.kernel.bpf_lsm = Some(vec![program(None), program(Some("bpf_lsm_ptrace_access_check"))]);
        assert_eq!(
            bpf_programs(&seen),
            [
                "x (id 7) on a hook that is not told",
                "x (id 7) on bpf_lsm_ptrace_access_check"
            ]
        );
    }
}
