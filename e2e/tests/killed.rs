//! The controller, the agent or the object goes away in the middle: the pod runs again at once, nothing is dumped twice,
//! and the object ends. Needs what `cluster.rs` needs; run these one at a time.
//!
//! Where each invariant is asserted:
//!
//! | Invariant | Asserted by |
//! |---|---|
//! | I1 the target runs within 1 s | `assert_undisturbed` in every test here, `a_deadline_ends_the_dump_and_the_target_runs` |
//! | I2 one dump per target at a time | `two_checkpoints_of_one_pod_at_once_never_dump_at_the_same_time` |
//! | I3 what Ready=True promises | `assert_ready` in `scenario.rs`, in every test with a success |
//! | I4 terminal stays terminal | `a_watch_that_is_behind_does_not_undo_an_end` (agent), `a_controller_killed_at_any_moment_ends_each_checkpoint_once` |
//! | I5 no success with a partial archive | `assert_failed` in `scenario.rs`, `an_archive_root_that_is_full_...` (inputs) |
//! | I6 security state after equals before | every test in `security.rs`, `a_change_survives_the_agents_death_in_no_case` first |
//! | I7 no orphans | `a_checkpoint_deleted_while_it_is_written_leaves_no_file_and_no_agent` |
//! | I8 documented reasons | `assert_every_condition_has_a_documented_reason` in `scenario.rs` |
//! | I9 no secret leaves the archive | `a_secret_in_the_pods_memory_is_only_in_the_archive` |
//! | I10 deletion completes | `a_checkpoint_deleted_while_it_is_written_...`, `a_namespace_that_is_being_deleted_...` (inputs) |
#![cfg(feature = "cluster")]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null; a panic is a failed test"
)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use podcheckpoint_e2e::scenario::{
    COUNT, HEAVY, KIND, Namespace, OPERATOR, archive, assert_every_condition_has_a_documented_reason,
    assert_failed, assert_ready, assert_undisturbed, without_agents,
};
use podcheckpoint_e2e::{eventually, get, kubectl, on_node, uid};
use serde_json::json;

fn writing(namespace: &Namespace, name: &str) -> Result<()> {
    eventually(Duration::from_secs(20), || {
        let state = get(&namespace.0, KIND, name)?["status"]["archiveState"].clone();
        ensure!(!state.is_null(), "not begun");
        Ok(())
    })
}

#[test]
fn a_checkpoint_deleted_while_it_is_written_leaves_no_file_and_no_agent() -> Result<()> {
    let namespace = Namespace::new("deleted")?;
    namespace.pod("heavy", "node1", &[("main", HEAVY)])?;
    namespace.count("heavy", "main")?;
    let pod = uid(&namespace.0, "pod", "heavy")?;
    for method in ["CRI", "Direct", "Kubelet"] {
        let name = method.to_lowercase();
        namespace.checkpoint(&name, json!({"sourcePodName": "heavy", "method": method}))?;
        writing(&namespace, &name)?;
        let object = uid(&namespace.0, KIND, &name)?;
        kubectl(&["-n", &namespace.0, "delete", KIND, &name, "--timeout=30s"]).context(name)?;
        assert_undisturbed(&pod)?;
        eventually(Duration::from_secs(20), || {
            let left = on_node(
                "node1",
                &format!(
                    "find /var/lib/podcheckpoint -path '*{object}*'; find /var/lib/kubelet/checkpoints -size +1M;
                     pgrep -x criu || true"
                ),
            )?;
            ensure!(left.trim().is_empty(), "{method} left {left}");
            Ok(())
        })?;
    }
    namespace.assert_source_went_on("heavy", "main")?;
    assert_ready(
        "node1",
        &namespace.take("after", json!({"sourcePodName": "heavy"}))?,
    )
}

/// Kills the controller's process. Its pod goes too: the kubelet would start a killed container ever later.
fn kill_controller() -> Result<()> {
    for node in ["node1", "node2"] {
        on_node(
            node,
            "pgrep -f '^/podcheckpoint-controller' | xargs -r kill -KILL",
        )?;
    }
    let controller = "app.kubernetes.io/component=controller";
    let force = ["--force", "--grace-period=0"];
    kubectl(&[&["-n", OPERATOR, "delete", "pod", "-l", controller][..], &force].concat()).map(drop)
}

#[test]
fn a_controller_killed_at_any_moment_ends_each_checkpoint_once() -> Result<()> {
    let namespace = Namespace::new("controller-steps")?;
    namespace.pod("heavy", "node1", &[("main", HEAVY)])?;
    namespace.count("heavy", "main")?;
    let pod = uid(&namespace.0, "pod", "heavy")?;
    // A field that the status has from each step on, or nothing at all.
    let steps = ["", "nodeName", "archiveState", "checkpointLocation"];
    for (number, field) in steps.into_iter().enumerate() {
        let name = format!("step-{number}");
        without_agents()?;
        namespace.checkpoint(&name, json!({"sourcePodName": "heavy"}))?;
        eventually(Duration::from_secs(30), || {
            let status = get(&namespace.0, KIND, &name)?["status"].clone();
            ensure!(field.is_empty() || !status[field].is_null(), "{status:#}");
            Ok(())
        })?;
        kill_controller()?;
        std::thread::sleep(Duration::from_secs(1));
        let status = namespace.ended(&name).context(field)?;
        assert_ready("node1", &status)?;
        assert_every_condition_has_a_documented_reason(&status);
        assert_undisturbed(&pod)?;
        // I4: the next controller has nothing to say of it any more.
        let end = status["completionTime"].clone();
        std::thread::sleep(Duration::from_secs(1));
        ensure!(get(&namespace.0, KIND, &name)?["status"]["completionTime"] == end);
    }
    namespace.assert_source_went_on("heavy", "main")
}

#[test]
fn a_secret_in_the_pods_memory_is_only_in_the_archive() -> Result<()> {
    let namespace = Namespace::new("secret")?;
    let n = namespace.0.as_str();
    // Put together in the pod, so that the specification does not have it.
    let secret = "s3cr3t-of-the-e2e-tests";
    let script = format!("s=s3cr3t; s=$s-of-the-e2e-tests; {COUNT}; echo $s");
    namespace.pod("holder", "node1", &[("main", &script)])?;
    namespace.count("holder", "main")?;
    let status = namespace.take("first", json!({"sourcePodName": "holder"}))?;
    assert_ready("node1", &status)?;
    let path = archive(&status, "main");
    on_node("node1", &format!("grep -qa {secret} {path}"))
        .context("the test does not see what it looks for")?;
    let said = [
        kubectl(&["-n", n, "get", KIND, "first", "-o", "yaml"])?,
        kubectl(&["-n", n, "get", "events", "-o", "yaml"])?,
        kubectl(&[
            "-n",
            OPERATOR,
            "logs",
            "-l",
            "app.kubernetes.io/component=agent",
            "--tail=-1",
        ])?,
        kubectl(&[
            "-n",
            OPERATOR,
            "logs",
            "-l",
            "app.kubernetes.io/component=controller",
            "--tail=-1",
        ])?,
    ];
    for text in said {
        ensure!(!text.is_empty() && !text.contains(secret), "{text}");
    }
    let mode = on_node("node1", &format!("stat -c %a $(dirname {path})"))?;
    assert_eq!(mode.trim(), "700");
    Ok(())
}

#[test]
fn an_agent_that_is_gone_for_good_is_given_up_and_the_pod_runs() -> Result<()> {
    let namespace = Namespace::new("lost")?;
    namespace.pod("heavy", "node1", &[("main", HEAVY)])?;
    namespace.count("heavy", "main")?;
    let pod = uid(&namespace.0, "pod", "heavy")?;
    namespace.checkpoint("lost", json!({"sourcePodName": "heavy", "timeoutSeconds": 5}))?;
    writing(&namespace, "lost")?;
    // Without the kubelet no agent comes back.
    let back = || drop(on_node("node1", "rm -f /run/kubelet.stop"));
    let undo = podcheckpoint_e2e::scenario::Undo(back);
    on_node(
        "node1",
        "touch /run/kubelet.stop; kill -KILL $(cat /run/kubelet.pid) $(pgrep -f '^/podcheckpoint-agent run')",
    )?;
    std::thread::sleep(Duration::from_secs(1));
    assert_undisturbed(&pod)?;
    let status = namespace.ended("lost")?;
    assert_failed(&status, "Dump", "AgentLost");
    drop(undo);
    kubectl(&["wait", "--for=condition=Ready", "node/node1", "--timeout=60s"])?;
    without_agents()?;
    namespace.assert_source_went_on("heavy", "main")?;
    // The next agent cleans up after the lost one, and does not change the end.
    assert_ready(
        "node1",
        &namespace.take("after", json!({"sourcePodName": "heavy"}))?,
    )?;
    assert_failed(&get(&namespace.0, KIND, "lost")?["status"], "Dump", "AgentLost");
    Ok(())
}
