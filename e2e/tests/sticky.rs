//! What only a reboot undoes, on node2, which has a kernel of its own. It is started again at the end of each test.
//! Needs what `tests/cluster.rs` needs.
#![cfg(feature = "cluster")]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null; a panic is a failed test"
)]

use std::time::Duration;

use anyhow::{Result, ensure};
use podcheckpoint_e2e::scenario::{
    HEAVY, KIND, Namespace, OPERATOR, archive, assert_condition, assert_failed, assert_ready,
};
use podcheckpoint_e2e::{cut_power, eventually, get, kubectl, on_node};
use serde_json::json;

/// The agent of before the power failed is not waited for: the kubelet takes its time to start it again.
fn without_old_agents() -> Result<()> {
    kubectl(&[
        "-n",
        OPERATOR,
        "delete",
        "pod",
        "-l",
        "app.kubernetes.io/component=agent",
        "--force",
        "--grace-period=0",
    ])
    .map(drop)
}

#[test]
fn lockdown_is_no_cause_and_yama_3_is_one_that_only_a_reboot_removes() -> Result<()> {
    let namespace = Namespace::new("sticky")?;
    namespace.counter("counter", "node2")?;
    on_node(
        "node2",
        "mountpoint -q /sys/kernel/security || mount -t securityfs securityfs /sys/kernel/security",
    )?;
    for mode in ["integrity", "confidentiality"] {
        on_node("node2", &format!("echo {mode} > /sys/kernel/security/lockdown"))?;
        let status = namespace.take(mode, json!({"sourcePodName": "counter"}))?;
        assert_condition(&status, "PtraceValidated", "True", "PtraceWorks");
        assert_ready("node2", &status)?;
        ensure!(!archive(&status, "main").is_empty());
    }

    on_node("node2", "sysctl -qw kernel.yama.ptrace_scope=3")?;
    let status = namespace.take(
        "yama",
        json!({"sourcePodName": "counter", "securityPatches": "Temporary"}),
    )?;
    assert_failed(&status, "ValidatePtrace", "YamaNoAttach");
    assert_condition(&status, "SecurityPrepared", "False", "NotFixable");
    let described = kubectl(&["-n", &namespace.0, "describe", KIND, "yama"])?;
    for words in ["kernel.yama.ptrace_scope is 3", "reboot"] {
        ensure!(described.contains(words), "no {words:?} in\n{described}");
    }
    let refused = on_node("node2", "sysctl -w kernel.yama.ptrace_scope=0 2>&1 || true")?;
    ensure!(refused.contains("Invalid argument"), "{refused}");

    cut_power("node2")?;
    without_old_agents()?;
    let scope = on_node("node2", "cat /proc/sys/kernel/yama/ptrace_scope")?;
    ensure!(scope.trim() != "3", "{scope}");
    let after = Namespace::new("sticky-after")?;
    after.counter("counter", "node2")?;
    let status = after.take("again", json!({"sourcePodName": "counter", "validateOnly": true}))?;
    assert_condition(&status, "PtraceValidated", "True", "PtraceWorks");
    Ok(())
}

#[test]
fn a_power_failure_in_the_middle_of_a_change_leaves_nothing_in_force() -> Result<()> {
    let namespace = Namespace::new("power")?;
    namespace.pod("heavy", "node2", &[("main", HEAVY)])?;
    // Filling its memory takes a machine without hardware help a while.
    eventually(Duration::from_secs(240), || namespace.count("heavy", "main"))?;
    let uid = get(&namespace.0, "pod", "heavy")?["metadata"]["uid"].clone();
    let freeze = format!(
        "for d in /sys/fs/cgroup/kubepods/*/pod{}/*/; do grep -q . $d/cgroup.procs || continue
           p=$(head -n 1 $d/cgroup.procs); [ $(cat /proc/$p/comm) = pause ] || echo 1 > $d/cgroup.freeze; done",
        uid.as_str().unwrap_or_default()
    );
    on_node("node2", &freeze)?;
    namespace.checkpoint(
        "cut",
        json!({"sourcePodName": "heavy", "securityPatches": "Temporary"}),
    )?;
    eventually(Duration::from_secs(60), || {
        let status = &get(&namespace.0, KIND, "cut")?["status"];
        ensure!(!status["patches"][0]["appliedTime"].is_null(), "{status:#}");
        ensure!(
            status["completionTime"].is_null(),
            "it ended before the power failed"
        );
        Ok(())
    })?;
    let journal = on_node("node2", "ls /var/lib/podcheckpoint/patches")?;
    ensure!(!journal.trim().is_empty(), "not in the journal while in force");

    cut_power("node2")?;
    without_old_agents()?;
    let status = namespace.ended("cut")?;
    assert_condition(&status, "Stalled", "True", "AgentInterrupted");
    assert_condition(&status, "SecurityRestored", "True", "PatchesReverted");
    ensure!(!status["patches"][0]["revertedTime"].is_null(), "{status:#}");
    eventually(Duration::from_secs(30), || {
        let left = on_node(
            "node2",
            "ls -A /var/lib/podcheckpoint/patches /var/lib/podcheckpoint/journal",
        )?;
        ensure!(!left.contains(".json"), "{left}");
        Ok(())
    })
}
