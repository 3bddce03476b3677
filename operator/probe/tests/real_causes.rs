//! The probe against real causes on the real kernel: the right reason with its evidence, within two seconds, and the
//! target goes on as it was.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test; JSON yields null"
)]

#[allow(dead_code, reason = "each test file uses a part of it")]
mod causes;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use causes::{Cgroup, Target, can, is_root, probe};

/// Which of two security modules denied is told by elimination: a BPF program that is loaded for another test is seen.
static LOADS_BPF: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn probe_target(target: &Target) -> Result<causes::Answer> {
    probe(None, &["--pid", &target.pid().to_string()])
}

/// A target that the probe calls healthy, and that is.
fn passes(mode: &[&str], words: &[&str]) -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(mode)?;
    target.assert_goes_on()?;
    let answer = probe_target(&target)?;
    answer.assert("PtraceWorks", words)?;
    ensure!(answer.outcome() == "Pass");
    target.assert_untraced()?;
    target.assert_goes_on()
}

/// A target of which the probe says this, and that goes on all the same.
fn refuses(mode: &[&str], reason: &str, words: &[&str]) -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(mode)?;
    probe_target(&target)?.assert(reason, words)?;
    target.assert_untraced()?;
    target.assert_goes_on()
}

/// The probe, in a context of which it says this, on a healthy target.
fn under(context: &str, mode: &[&str], reason: &str, words: &[&str]) -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(mode)?;
    let answer = probe(Some(context), &["--pid", &target.pid().to_string()])?;
    answer.assert(reason, words)?;
    target.assert_untraced()?;
    target.assert_goes_on()
}

// --- healthy -------------------------------------------------------------------------------------------------------

#[test]
fn a_healthy_target_passes_and_goes_on() -> Result<()> {
    passes(&["plain"], &["1 thread(s) of 1 process(es)"])
}

#[test]
fn a_shell_that_starts_the_probe_is_proved_without_the_probe() -> Result<()> {
    let probe = env!("CARGO_BIN_EXE_podcheckpoint-probe");
    let output = std::process::Command::new("sh")
        .args(["-c", &format!("{probe} --json --pid $$; exit $?")])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{text}");
    ensure!(
        text.contains("1 thread(s) of 1 process(es) stopped and let go"),
        "{text}"
    );
    Ok(())
}

#[test]
fn a_thousand_threads_are_all_proved() -> Result<()> {
    passes(&["threads", "1000"], &["1000 thread(s) of 1 process(es)"])
}

#[test]
fn two_hundred_processes_are_all_proved() -> Result<()> {
    passes(&["tree", "200"], &["200 thread(s) of 200 process(es)"])
}

#[test]
fn threads_that_come_and_go_are_no_failure() -> Result<()> {
    passes(&["churn"], &[])
}

#[test]
fn processes_that_come_and_go_are_no_failure() -> Result<()> {
    passes(&["forks"], &[])
}

#[test]
fn a_child_that_has_ended_is_no_failure() -> Result<()> {
    passes(&["zombie-child"], &[])
}

#[test]
fn a_target_that_is_not_dumpable_passes_for_root() -> Result<()> {
    passes(&["not-dumpable"], &[])
}

#[test]
fn a_target_with_a_filter_of_its_own_passes_for_root() -> Result<()> {
    passes(&["filtered"], &[])
}

#[test]
fn a_target_that_denies_itself_new_code_passes() -> Result<()> {
    passes(&["mdwe"], &[])
}

#[test]
fn processes_with_names_that_are_no_text_are_all_proved() -> Result<()> {
    passes(&["strange-name"], &["2 thread(s) of 2 process(es)"])
}

#[test]
fn a_target_in_a_user_namespace_below_passes() -> Result<()> {
    passes(&["user-namespace"], &[])
}

// --- the tracer's side ---------------------------------------------------------------------------------------------

#[test]
fn a_filter_that_refuses_ptrace_is_named() -> Result<()> {
    under(
        "errno",
        &["plain"],
        "SeccompBlocksTracer",
        &["EPERM", "Seccomp: 2"],
    )
}

#[test]
fn a_filter_that_kills_is_named() -> Result<()> {
    under("kill", &["plain"], "SeccompKillsTracer", &["SIGSYS"])
}

#[test]
fn a_filter_that_traps_is_named() -> Result<()> {
    under("trap", &["plain"], "SeccompKillsTracer", &["SIGSYS"])
}

#[test]
fn a_listener_that_does_not_answer_is_named_with_who_holds_it() -> Result<()> {
    let words = [
        "state S in seccomp_do_user_notification",
        "(probe-fixture)",
        "the tracer was ended",
    ];
    under("silent-listener", &["plain"], "SeccompNotifyUnanswered", &words)
}

#[test]
fn where_ptrace_hangs_by_itself_no_target_is_attached_to() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(&["plain"])?;
    let answer = probe(Some("silent-listener"), &["--pid", &target.pid().to_string()])?;
    let steps = answer.report["observations"]["steps"].as_array();
    let ends: Vec<_> = steps
        .into_iter()
        .flatten()
        .filter(|step| step["subject"] == "Target")
        .map(|step| &step["end"])
        .collect();
    ensure!(
        ends.len() == 1 && ends[0]["skipped"] == "ptrace does not reach the kernel",
        "{ends:#?}"
    );
    Ok(())
}

#[test]
fn a_listener_that_is_gone_is_named() -> Result<()> {
    under("listener-gone", &["plain"], "SeccompListenerGone", &["ENOSYS"])
}

#[test]
fn a_tracer_with_any_filter_cannot_dump_a_target_with_one() -> Result<()> {
    under(
        "harmless-filter",
        &["filtered"],
        "TracerSeccompFiltered",
        &["Seccomp: 2"],
    )
}

#[test]
fn a_tracer_with_a_harmless_filter_may_dump_a_target_without_one() -> Result<()> {
    under("harmless-filter", &["plain"], "PtraceWorks", &[])
}

#[test]
fn a_tracer_without_the_capability_is_named() -> Result<()> {
    under(
        "unprivileged",
        &["plain"],
        "MissingPtraceCapability",
        &["CapEff is 0000000000000000"],
    )
}

#[test]
fn a_tracer_in_a_nested_user_namespace_cannot_trace_out() -> Result<()> {
    under(
        "user-namespace",
        &["plain"],
        "MissingPtraceCapability",
        &["user namespace"],
    )
}

#[test]
fn a_tracer_without_the_capability_cannot_trace_what_is_not_dumpable() -> Result<()> {
    under(
        "unprivileged",
        &["not-dumpable"],
        "TargetNotDumpable",
        &["belongs to root"],
    )
}

#[test]
fn a_tracer_without_the_capability_cannot_trace_another_user() -> Result<()> {
    under(
        "unprivileged",
        &["other-user"],
        "MissingPtraceCapability",
        &["4243"],
    )
}

#[test]
fn a_landlocked_tracer_is_named() -> Result<()> {
    let _alone = LOADS_BPF.lock();
    under("landlock", &["plain"], "LandlockDenied", &["Landlock (ABI"])
}

#[test]
fn a_bpf_program_that_denies_is_named_with_its_hook() -> Result<()> {
    let words = ["EPERM", "deny_tracing (id ", "on bpf_lsm_ptrace_access_check"];
    if !is_root() {
        return Ok(());
    }
    let alone = LOADS_BPF.lock();
    let Some(missing) = missing_for_bpf_lsm()? else {
        return under("bpf-lsm", &["plain"], "BpfLsmDenied", &words);
    };
    drop(alone);
    match causes::guest::probe("bpf-lsm")? {
        // An emulated machine beside others is no measure of time.
        Some(answer) => answer.assert_says("BpfLsmDenied", &words),
        None => {
            can(&missing, false);
            Ok(())
        }
    }
}

/// What this machine lacks for such a program. Hardened kernels refuse its type even to root.
fn missing_for_bpf_lsm() -> Result<Option<String>> {
    let modules = podcheckpoint_probe::sys::security_modules().unwrap_or_default();
    if !modules.iter().any(|name| name == "bpf") {
        return Ok(Some("bpf among the kernel's active security modules".into()));
    }
    if !Path::new(podcheckpoint_probe::btf::KERNEL).exists() {
        return Ok(Some(format!(
            "the kernel's BTF in {}",
            podcheckpoint_probe::btf::KERNEL
        )));
    }
    let tried = Command::new(causes::FIXTURE)
        .args(["under", "bpf-lsm", "true"])
        .output()?;
    // Any other failure is the fixture's own, and fails the test.
    let refused = String::from_utf8_lossy(&tried.stderr).contains("bpf 5: Operation not permitted");
    Ok(refused.then(|| "a kernel that lets root load BPF programs of the type LSM".into()))
}

/// All that the probe has to say in a guest of a target that can be traced: the guest has no modules of its kernel.
const NO_MODULES: &str = "KernelFeatureMissing";

/// Name, state of SELinux as ENFORCE:DENY_PTRACE:TYPE of the target, reason, and words in the evidence.
const UNDER_SELINUX: [(&str, &str, &str, &[&str]); 5] = [
    (
        "the_boolean_of_selinux_that_forbids_ptrace_is_named",
        "1:1:base_t",
        "SELinuxDenied",
        &[
            "EACCES",
            "avc:  denied  { ptrace }",
            "its policy denies process ptrace, deny_ptrace is on",
            "tracer system_u:system_r:base_t:s0, target system_u:system_r:base_t:s0",
        ],
    ),
    ("selinux_that_allows_it_passes", "1:0:base_t", NO_MODULES, &[]),
    (
        "a_rule_of_selinux_that_denies_a_type_is_named_and_not_the_boolean",
        "1:0:guarded_t",
        "SELinuxDenied",
        &[
            "EACCES",
            "its policy denies process ptrace, deny_ptrace is off",
            "target system_u:system_r:guarded_t:s0",
        ],
    ),
    (
        "a_rule_of_selinux_that_hides_a_type_is_named_and_not_the_boolean",
        "1:0:hidden_t",
        "SELinuxDenied",
        &["status cannot be read: EACCES", "SELinux enforces"],
    ),
    ("selinux_that_only_logs_passes", "0:1:base_t", NO_MODULES, &[]),
];

#[test]
fn selinux_is_named_with_what_its_policy_denies_and_only_where_it_does() -> Result<()> {
    let states = UNDER_SELINUX.map(|(_, state, _, _)| state);
    let Some(answers) = causes::guest::probe_under_selinux(&states)? else {
        return Ok(());
    };
    for ((name, _, reason, words), answer) in UNDER_SELINUX.iter().zip(&answers) {
        causes::record(name, &answer.report);
        answer.assert_says(reason, words).context(*name)?;
    }
    Ok(())
}

// --- the target's side ---------------------------------------------------------------------------------------------

#[test]
fn another_tracer_is_named() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(&["plain"])?;
    let tracer = causes::tracer(target.pid())?;
    let who = format!("process {} (probe-fixture)", tracer.id());
    probe_target(&target)?.assert("AlreadyTraced", &[&who])?;
    target.assert_goes_on()
}

#[test]
fn a_tracer_of_one_thread_only_is_found() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(&["threads", "20"])?;
    let tid = causes::last_thread(target.pid())?;
    let tracer = causes::tracer(tid)?;
    let words = [format!("thread {tid}"), format!("process {}", tracer.id())];
    probe_target(&target)?.assert("AlreadyTraced", &[&words[0], &words[1]])?;
    target.assert_goes_on()
}

#[test]
fn a_first_thread_that_has_ended_is_named() -> Result<()> {
    refuses(&["zombie-leader"], "TargetExiting", &["first thread"])
}

#[test]
fn a_process_that_has_ended_is_named() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(&["zombie-child"])?;
    let zombie = causes::eventually(std::time::Duration::from_secs(2), || {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", target.pid()))?;
        let pid = children.split_whitespace().next().context("no child")?.to_owned();
        ensure!(fs::read_to_string(format!("/proc/{pid}/status"))?.contains("State:\tZ"));
        Ok(pid)
    })?;
    probe(None, &["--pid", &zombie])?.assert("TargetExiting", &[&zombie])
}

#[test]
fn a_process_that_does_not_exist_is_named() -> Result<()> {
    probe(None, &["--pid", "4194304"])?.assert("TargetPidNotVisible", &["4194304"])
}

#[test]
fn a_probe_in_a_process_namespace_of_its_own_says_that_it_cannot_see_out() -> Result<()> {
    let words = [
        "/proc has no process",
        "the probe is not in the machine's first process namespace",
    ];
    under("process-namespace", &["plain"], "TargetPidNotVisible", &words)
}

#[test]
fn a_number_that_was_read_in_a_container_is_told_with_the_right_one() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(&["process-namespace"])?;
    let status = fs::read_to_string(format!("/proc/{}/status", target.pid()))?;
    let numbers = status
        .lines()
        .find(|line| line.starts_with("NSpid:"))
        .unwrap_or_default();
    let own = numbers
        .split_whitespace()
        .nth(2)
        .context("it is in no namespace of its own")?;
    if !can(
        "a number that nobody has",
        !Path::new(&format!("/proc/{own}")).exists(),
    ) {
        return Ok(());
    }
    probe_target(&target)?.assert("PtraceWorks", &["1 thread(s) of 1 process(es)"])?;
    let right = format!("process {} (probe-fixture) has this number", target.pid());
    let answer = probe(None, &["--pid", own])?;
    answer.assert("TargetPidNotVisible", &[&format!("no process {own};"), &right])?;
    target.assert_untraced()?;
    target.assert_goes_on()
}

#[test]
fn a_thread_of_the_kernel_is_named() -> Result<()> {
    if !can(
        "kthreadd",
        fs::read_to_string("/proc/2/comm").is_ok_and(|c| c == "kthreadd\n"),
    ) {
        return Ok(());
    }
    probe(None, &["--pid", "2"])?.assert("TargetKernelThread", &["kthreadd"])
}

#[test]
fn a_pending_trap_is_named() -> Result<()> {
    refuses(&["pending-trap"], "PendingSigtrap", &["SIGTRAP is pending"])
}

#[test]
fn a_listener_of_the_targets_own_is_degraded() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(&["listener"])?;
    let answer = probe_target(&target)?;
    answer.assert("SeccompListenerNotRestorable", &["USER_NOTIF"])?;
    ensure!(answer.outcome() == "Degraded");
    target.assert_goes_on()
}

#[test]
fn a_vfork_parent_is_named_with_where_it_waits() -> Result<()> {
    refuses(&["vfork"], "TargetUninterruptible", &["state D", "vfork"])
}

#[test]
fn an_exec_that_cannot_end_is_named() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(&["exec"])?;
    let answer = probe_target(&target)?;
    // The tracer that holds one of its threads is the root, and why a tracer would hang is said too.
    answer.assert("AlreadyTraced", &["(probe-fixture)"])?;
    let findings = answer.report["verdict"]["findings"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    ensure!(
        findings.iter().any(|f| f["reason"] == "TargetExecInProgress"),
        "{:#}",
        answer.report
    );
    ensure!(answer.took.as_secs() < 2);
    Ok(())
}

// --- frozen and stopped --------------------------------------------------------------------------------------------

fn frozen(v1: bool, stopped: bool, name: &str, reason: &str) -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let Some(cgroup) = Cgroup::new(v1, name) else {
        can(if v1 { "a cgroup v1 freezer" } else { "cgroup v2" }, false);
        return Ok(());
    };
    let target = Target::start(&["plain"])?;
    cgroup.add(target.pid())?;
    if stopped {
        causes::signal(target.pid(), "STOP")?;
        causes::eventually(std::time::Duration::from_secs(2), || {
            ensure!(target.state() == 'T');
            Ok(())
        })?;
    }
    cgroup.freeze()?;
    let answer = probe_target(&target);
    cgroup.thaw();
    let answer = answer?;
    answer.assert(reason, &[&cgroup.path()])?;
    ensure!(answer.report["verdict"]["outcome"] == "Fail");
    target.assert_untraced()?;
    if stopped {
        ensure!(target.state() == 'T', "it was continued");
        causes::signal(target.pid(), "CONT")?;
    }
    target.assert_goes_on()?;
    // Thawed, emptied and removed before the target ends.
    drop(cgroup);
    Ok(())
}

#[test]
fn a_target_frozen_by_cgroup_v1_is_never_attached_to() -> Result<()> {
    frozen(true, false, "v1", "TargetFrozen")
}

#[test]
fn a_target_frozen_by_cgroup_v2_is_never_attached_to() -> Result<()> {
    frozen(false, false, "v2", "TargetFrozen")
}

#[test]
fn a_target_stopped_and_frozen_by_cgroup_v1_is_told_apart() -> Result<()> {
    frozen(true, true, "v1-stopped", "TargetFrozenStopped")
}

#[test]
fn a_target_stopped_and_frozen_by_cgroup_v2_is_told_apart() -> Result<()> {
    frozen(false, true, "v2-stopped", "TargetFrozenStopped")
}

#[test]
fn the_cgroup_above_that_was_told_to_freeze_is_named() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let Some(above) = Cgroup::new(false, "nested") else {
        can("cgroup v2", false);
        return Ok(());
    };
    let target = Target::start(&["plain"])?;
    let below = above.below()?;
    below.add(target.pid())?;
    above.freeze()?;
    let answer = probe_target(&target);
    above.thaw();
    answer?.assert("TargetFrozen", &[&below.path(), &format!("by {}", above.path())])?;
    target.assert_goes_on()?;
    drop((below, above));
    Ok(())
}

#[test]
fn a_stopped_target_stays_stopped() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(&["plain"])?;
    causes::signal(target.pid(), "STOP")?;
    causes::eventually(std::time::Duration::from_secs(2), || {
        ensure!(target.state() == 'T');
        Ok(())
    })?;
    probe_target(&target)?.assert("TargetStopped", &["stopped by a signal"])?;
    target.assert_untraced()?;
    ensure!(target.state() == 'T', "it was continued");
    causes::signal(target.pid(), "CONT")?;
    target.assert_goes_on()
}

// --- code in the target --------------------------------------------------------------------------------------------

/// Nothing is executed in a target unless that is asked for.
fn injected(target: &Target) -> Result<causes::Answer> {
    probe(None, &["--inject", "--pid", &target.pid().to_string()])
}

/// What a target has open and mapped.
fn belongings(target: &Target) -> Result<String> {
    let folder = format!("/proc/{}", target.pid());
    let mut files: Vec<String> = fs::read_dir(format!("{folder}/fd"))?
        .flatten()
        .map(|fd| format!("{fd:?} {:?}", fs::read_link(fd.path())))
        .collect();
    files.sort();
    Ok(files.join("\n") + &fs::read_to_string(format!("{folder}/maps"))?)
}

#[test]
fn system_calls_executed_in_a_target_leave_no_trace() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    for mode in ["plain", "threads", "filtered", "mdwe", "signals"] {
        let target = Target::start(&[mode, "3"])?;
        target.assert_goes_on()?;
        let before = belongings(&target)?;
        for _ in 0..50 {
            let answer = injected(&target)?;
            answer.assert("PtraceWorks", &[]).context(mode)?;
            let steps = answer.report["observations"]["steps"].to_string();
            ensure!(
                steps.contains("\"Connect\"") && steps.contains("\"Restore\""),
                "{steps}"
            );
            target.assert_untraced()?;
        }
        ensure!(belongings(&target)? == before, "{mode}: {}", belongings(&target)?);
        target.assert_goes_on().context(mode)?;
    }
    Ok(())
}

fn rejects(mode: &str, words: &[&str]) -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(&[mode])?;
    // From outside nothing can be seen of it.
    probe_target(&target)?.assert("PtraceWorks", &[])?;
    injected(&target)?.assert("ParasiteRejected", words)?;
    target.assert_untraced()?;
    target.assert_goes_on()
}

#[test]
fn a_target_that_may_map_no_more_rejects_what_criu_puts_into_it() -> Result<()> {
    rejects("no-memory", &["mapping a file in memory as code", "ENOMEM"])
}

#[test]
fn a_target_that_may_open_no_more_rejects_what_criu_puts_into_it() -> Result<()> {
    rejects("no-files", &["memfd_create", "EMFILE"])
}

#[test]
fn a_target_in_a_landlock_domain_without_abstract_sockets_rejects_what_criu_puts_into_it() -> Result<()> {
    rejects("scoped", &["connecting to an abstract socket", "EPERM"])
}

#[test]
fn nothing_is_executed_in_a_target_that_was_not_proved() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let target = Target::start(&["plain"])?;
    let _tracer = causes::tracer(target.pid())?;
    let answer = injected(&target)?;
    answer.assert("AlreadyTraced", &[])?;
    let steps = answer.report["observations"]["steps"].to_string();
    ensure!(!steps.contains("\"Inject\""), "{steps}");
    Ok(())
}

// --- CRIU ----------------------------------------------------------------------------------------------------------

#[test]
fn a_machine_without_criu_is_told_so() -> Result<()> {
    let answer = probe(None, &["--node", "--criu-program", "/nonexistent/criu"])?;
    answer.assert("CriuMissing", &[])
}

#[test]
fn a_criu_that_hangs_a_fake_is_ended_and_its_wait_is_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let fake = script(
        folder.path(),
        "[ \"$1\" = --version ] && echo 'Version: 4.2' && exit; echo 'Error (fake.c:1): about to hang' >&2; exec sleep 60",
    )?;
    let target = Target::start(&["plain"])?;
    let answer = probe(
        None,
        &[
            "--pid",
            &target.pid().to_string(),
            "--criu",
            "--criu-program",
            &fake,
        ],
    )?;
    answer.assert("CriuProbeStalled", &["CRIU 4.2", "sleep", "about to hang"])
}

#[test]
fn a_criu_that_is_too_old_a_fake_is_told_by_its_own_words() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let fake = script(
        folder.path(),
        "[ \"$1\" = --version ] && echo 'Version: 3.19' && exit; echo 'Error (criu/vdso.c:1): vdso: Unexpected rt vDSO area bounds' >&2; exit 1",
    )?;
    probe(None, &["--node", "--criu-program", &fake])?
        .assert("CriuKernelMismatch", &["CRIU 3.19", "vDSO area bounds"])
}

/// `criu check` in a machine where CRIU has written its cache.
fn with_cache(missing: Option<i64>) -> Result<Option<causes::Answer>> {
    if !is_root() {
        return Ok(None);
    }
    let Some(machine) = causes::criu_cache(missing)? else {
        return Ok(None);
    };
    let cache = || fs::read(format!("/proc/{}/root/run/criu.kdat", machine.pid));
    let before = cache()?;
    let answer = probe(
        None,
        &["--node", "--criu-namespaces-of", &machine.pid.to_string()],
    )?;
    ensure!(cache()? == before, "the cache was changed");
    let looked = &answer.report["observations"]["criu"]["withCache"];
    ensure!(looked["good"] == true, "{:#}", answer.report);
    Ok(Some(answer))
}

#[test]
fn a_cache_that_was_written_when_the_kernel_denied_something_is_stale() -> Result<()> {
    let Some(answer) = with_cache(Some(libc::SYS_clone3))? else {
        return Ok(());
    };
    ensure!(answer.outcome() == "Degraded", "{:#}", answer.report);
    let words = [
        "only with /run/criu.kdat",
        "clone3() with set_tid not supported",
        "only without it: nothing",
    ];
    answer.assert("CriuCacheStale", &words)
}

#[test]
fn a_cache_that_is_true_is_not_called_stale() -> Result<()> {
    match with_cache(None)? {
        Some(answer) => answer.assert("PtraceWorks", &[]),
        None => Ok(()),
    }
}

fn script(folder: &Path, text: &str) -> Result<String> {
    let path = folder.join("criu-fake");
    fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(path.to_string_lossy().into_owned())
}
