//! A node on which SELinux enforces: what its policy denies is named, planned, or allowed for the time of a checkpoint and
//! denied again. Needs the operator on a cluster that was started with `e2e/cluster up --nodes 2 --lsm selinux`.
#![cfg(feature = "selinux")]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null; a panic is a failed test"
)]

use std::time::Duration;

use anyhow::{Result, ensure};
use podcheckpoint_e2e::scenario::{
    COUNT, KIND, Namespace, Undo, archive, assert_condition, assert_failed, assert_ready, assert_restores,
};
use podcheckpoint_e2e::security::{assert_nothing_in_force, described, security_state, take_patiently};
use podcheckpoint_e2e::{eventually, get, on_node};
use serde_json::json;

const NODE: &str = "node2";
const BOOLEAN: &str = "/sys/fs/selinux/booleans/deny_ptrace";

/// All security state but the modules that list sockets: the kernel loads them for whoever first lists some.
fn state() -> Result<String> {
    let all = security_state(NODE)?;
    let lines = all.lines().filter(|line| !line.starts_with("module "));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// The same as before a test: I6.
fn assert_state(before: &str) -> Result<()> {
    let after = state()?;
    ensure!(after == before, "the node was\n{before}\nand is\n{after}");
    Ok(())
}

fn set_deny_ptrace(on: bool) -> Result<()> {
    let value = u8::from(on);
    let script = format!("echo {value} > {BOOLEAN} && echo 1 > /sys/fs/selinux/commit_pending_bools");
    on_node(NODE, &script).map(drop)
}

/// The boolean forbids ptrace until the test ends.
fn deny_ptrace() -> Result<Undo<impl FnMut()>> {
    set_deny_ptrace(true)?;
    Ok(Undo(|| {
        let _ = set_deny_ptrace(false);
    }))
}

/// Whether the boolean is on. The file has its value and the one that is pending.
fn denies_ptrace() -> Result<bool> {
    Ok(on_node(NODE, &format!("cat {BOOLEAN}"))?.starts_with('1'))
}

/// Notes each value that the boolean has, until it is asked for them.
fn watch() -> Result<impl FnOnce() -> Result<String>> {
    let begin = format!(
        "rm -f /run/watched /run/watch.stop
         setsid sh -c 'while [ ! -e /run/watch.stop ]; do head -c 1 {BOOLEAN}; echo; sleep 0.1; done | uniq > /run/watched.new
                       mv /run/watched.new /run/watched' > /dev/null 2>&1 < /dev/null &"
    );
    on_node(NODE, &begin)?;
    Ok(|| {
        let end = "touch /run/watch.stop; until [ -e /run/watched ]; do sleep 0.1; done; cat /run/watched";
        on_node(NODE, end)
    })
}

#[test]
fn the_boolean_that_forbids_ptrace_is_named_and_off_only_for_the_checkpoint() -> Result<()> {
    let namespace = Namespace::new("selinux")?;
    namespace.counter("counter", NODE)?;
    let _denied = deny_ptrace()?;
    let before = state()?;
    ensure!(before.contains(&format!("{BOOLEAN} 1 1")), "{before}");

    let spec = |mode: &str| json!({"sourcePodName": "counter", "securityPatches": mode});
    let (name, never) = take_patiently(&namespace, "never", &spec("Never"))?;
    assert_failed(&never, "ValidatePtrace", "SELinuxDenied");
    assert_condition(&never, "SecurityPrepared", "False", "PatchNotRequested");
    let text = described(&namespace, &name)?;
    for words in [
        "its policy denies process ptrace, deny_ptrace is on",
        "target system_u:system_r:base_t:s0",
        "setsebool deny_ptrace off",
    ] {
        ensure!(text.contains(words), "no {words:?} in\n{text}");
    }
    let (_, plan) = take_patiently(&namespace, "plan", &spec("Plan"))?;
    assert_condition(&plan, "SecurityPrepared", "False", "PatchPlanned");
    let planned = &plan["patches"][0];
    ensure!(
        planned["kind"] == "SELinux" && planned["scope"] == "node" && planned["appliedTime"].is_null(),
        "{plan:#}"
    );
    ensure!(planned["before"] == "on" && planned["after"] == "off", "{plan:#}");
    assert_state(&before)?;

    let watched = watch()?;
    let (_, status) = take_patiently(&namespace, "temporary", &spec("Temporary"))?;
    let watched = watched()?;
    assert_ready(NODE, &status)?;
    assert_condition(&status, "SecurityPrepared", "True", "Patched");
    assert_condition(&status, "SecurityRestored", "True", "PatchesReverted");
    let patch = &status["patches"][0];
    ensure!(
        patch["kind"] == "SELinux" && patch["before"] == "on" && patch["after"] == "off",
        "{status:#}"
    );
    ensure!(
        !patch["appliedTime"].is_null() && !patch["revertedTime"].is_null(),
        "{status:#}"
    );
    ensure!(watched == "1\n0\n1\n", "the boolean was {watched}");
    assert_state(&before)?;
    assert_nothing_in_force(NODE)?;
    namespace.assert_source_went_on("counter", "main")?;
    // CRIU traces what it restores.
    set_deny_ptrace(false)?;
    assert_restores(NODE, &archive(&status, "main"), "selinux", 1)
}

#[test]
fn a_rule_that_is_not_the_booleans_is_not_fixable_and_turning_it_off_in_vain_is_undone() -> Result<()> {
    let namespace = Namespace::new("selinux-rule")?;
    let guarded = format!("printf system_u:system_r:guarded_t:s0 > /proc/self/attr/current; {COUNT}");
    namespace.pod("guarded", NODE, &[("main", &guarded)])?;
    let spec = json!({"sourcePodName": "guarded", "securityPatches": "Temporary"});

    let before = state()?;
    let (name, status) = take_patiently(&namespace, "off", &spec)?;
    assert_failed(&status, "ValidatePtrace", "SELinuxDenied");
    assert_condition(&status, "SecurityPrepared", "False", "NotFixable");
    assert_condition(&status, "SecurityRestored", "True", "NotNeeded");
    ensure!(status["patches"].is_null(), "{status:#}");
    let text = described(&namespace, &name)?;
    for words in ["deny_ptrace is off", "target system_u:system_r:guarded_t:s0"] {
        ensure!(text.contains(words), "no {words:?} in\n{text}");
    }
    assert_state(&before)?;

    // That the boolean is on hides that there is such a rule.
    let _denied = deny_ptrace()?;
    let before = state()?;
    let (_, status) = take_patiently(&namespace, "on", &spec)?;
    assert_failed(&status, "ValidatePtrace", "SELinuxDenied");
    assert_condition(&status, "SecurityPrepared", "False", "PatchIneffective");
    assert_condition(&status, "SecurityRestored", "True", "PatchesReverted");
    assert_state(&before)?;
    assert_nothing_in_force(NODE)?;
    namespace.assert_source_went_on("guarded", "main")
}

#[test]
fn the_boolean_is_on_again_after_the_agents_death() -> Result<()> {
    let namespace = Namespace::new("selinux-killed")?;
    namespace.counter("counter", NODE)?;
    let _denied = deny_ptrace()?;
    namespace.checkpoint(
        "killed",
        json!({"sourcePodName": "counter", "securityPatches": "Temporary"}),
    )?;
    let killed = on_node(
        NODE,
        &format!(
            "for i in $(seq 600); do [ \"$(head -c 1 {BOOLEAN})\" = 1 ] || break; sleep 0.1; done
             [ \"$(head -c 1 {BOOLEAN})\" = 0 ] || exit 0
             for p in $(grep -al '^/podcheckpoint-agent.run' /proc/[0-9]*/cmdline | cut -d/ -f3); do kill -KILL $p && echo $p; done"
        ),
    )?;
    ensure!(!killed.trim().is_empty(), "no agent was killed while it was off");
    eventually(Duration::from_secs(60), || {
        ensure!(denies_ptrace()?, "it is still off");
        Ok(())
    })?;
    namespace.ended("killed")?;
    eventually(Duration::from_secs(30), || {
        let status = &get(&namespace.0, KIND, "killed")?["status"];
        let open = status["patches"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|patch| !patch["appliedTime"].is_null() && patch["revertedTime"].is_null());
        ensure!(!open, "{status:#}");
        Ok(())
    })?;
    ensure!(denies_ptrace()?, "it was turned off for nothing");
    assert_nothing_in_force(NODE)?;
    namespace.assert_source_went_on("counter", "main")
}
