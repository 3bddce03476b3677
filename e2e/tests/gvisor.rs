//! Pods on gVisor's kernel, with Debian's runsc and gVisor's own shim, through the operator. Needs what `cluster.rs`
//! needs.
#![cfg(feature = "cluster")]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null; a panic is a failed test"
)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use podcheckpoint_e2e::gvisor::{pod, restore, runsc, sentry};
use podcheckpoint_e2e::scenario::{
    COUNT, HEAVY, KIND, Namespace, Undo, archive, assert_condition,
    assert_every_condition_has_a_documented_reason, assert_failed, assert_ready, without_agents,
};
use podcheckpoint_e2e::{eventually, get, kubectl, on_node, uid};
use serde_json::{Value, json};

/// Waits until a pod has filled its memory and counts: random bytes come slowly through gVisor on a busy machine.
fn counts(namespace: &Namespace, pod: &str) -> Result<()> {
    eventually(Duration::from_secs(120), || namespace.count(pod, "main")).map(drop)
}

/// Waits until gVisor's kernel of a pod has the file of a checkpoint open: from then on the pod stands still.
fn saving(pod: &str) -> Result<()> {
    let pid = sentry(pod)?;
    eventually(Duration::from_secs(60), || {
        on_node("node1", &format!("ls -l /proc/{pid}/fd | grep -q checkpoint.img"))
    })
    .map(drop)
}

/// Waits until no file of a checkpoint of this object is there or open.
fn nothing_left(pod: &str, object: &str) -> Result<()> {
    let pid = sentry(pod)?;
    let look = format!(
        "find /var/lib/podcheckpoint/checkpoints -path '*{object}*'; ls -l /proc/{pid}/fd | grep {object} || true"
    );
    eventually(Duration::from_secs(90), || {
        let left = on_node("node1", &look)?;
        ensure!(left.trim().is_empty(), "{left}");
        Ok(())
    })
}

#[test]
fn a_pod_of_two_containers_on_gvisors_kernel_is_saved_whole_and_its_archive_goes_on() -> Result<()> {
    let namespace = Namespace::new("gvisor")?;
    pod(&namespace, "two", &[("main", COUNT), ("side", COUNT)])?;
    let before = [namespace.count("two", "main")?, namespace.count("two", "side")?];
    let status = namespace.take("whole", json!({"sourcePodName": "two"}))?;
    assert_ready("node1", &status)?;
    assert_every_condition_has_a_documented_reason(&status);
    assert_condition(&status, "PtraceValidated", "Unknown", "GvisorNeedsNoPtrace");
    assert_eq!(
        (
            &status["method"],
            &status["consistency"],
            &status["runtime"]["sandbox"]["kind"]
        ),
        (&json!("GVisor"), &json!("Pod"), &json!("GVisor"))
    );
    let skipped: Vec<&str> = status["skippedMethods"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|s| s["reason"].as_str())
        .collect();
    let (other, none) = ("OciRuntimeUnsupported", "MethodUnavailable");
    assert_eq!(skipped, [other, other, other, none, none], "{status:#}");
    assert_eq!(status["checkpointedContainers"].as_array().map(Vec::len), Some(2));
    let looks = status["findings"].as_array().into_iter().flatten();
    let rooms = looks.filter(|finding| finding["check"] == "archive root").count();
    assert_eq!(rooms, 1, "{status:#}");
    let archive = archive(&status, "main");
    on_node(
        "node1",
        &format!("cd {archive} && sha256sum --quiet --check SHA256SUMS"),
    )?;

    let restored = restore(&archive)?;
    for (name, before) in ["main", "side"].into_iter().zip(before) {
        let first = restored.count(name)?;
        ensure!(first >= before, "{name} began anew: {first} < {before}");
        eventually(Duration::from_secs(20), || {
            ensure!(restored.count(name)? > first, "{name} stands at {first}");
            Ok(())
        })?;
        namespace.assert_source_went_on("two", name)?;
    }
    restored.remove()
}

#[test]
fn the_report_on_the_node_has_gvisors_method_for_its_handler() -> Result<()> {
    let namespace = Namespace::new("gvisor-node")?;
    pod(&namespace, "counter", &[("main", COUNT)])?;
    let status = namespace.take("look", json!({"sourcePodName": "counter", "validateOnly": true}))?;
    assert_condition(&status, "Ready", "True", "ValidationCompleted");
    let report = get("", "checkpointnodes.podcheckpoint.dev", "node1")?;
    let handlers = report["status"]["handlers"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let handler = handlers
        .iter()
        .find(|h| h["name"] == "gvisor")
        .context("no handler")?;
    assert_eq!(handler["methods"], json!(["GVisor"]), "{handler:#}");
    Ok(())
}

#[test]
fn an_agent_killed_while_gvisors_kernel_writes_leaves_the_pod_running() -> Result<()> {
    let namespace = Namespace::new("gvisor-killed")?;
    pod(&namespace, "heavy", &[("main", HEAVY)])?;
    counts(&namespace, "heavy")?;
    let of_pod = uid(&namespace.0, "pod", "heavy")?;
    namespace.checkpoint("killed", json!({"sourcePodName": "heavy"}))?;
    let object = uid(&namespace.0, KIND, "killed")?;
    saving(&of_pod)?;
    on_node("node1", "kill -KILL $(pgrep -f '^/podcheckpoint-agent run')")?;
    nothing_left(&of_pod, &object)?;
    namespace.assert_source_went_on("heavy", "main")?;
    let status = namespace.ended("killed")?;
    assert_failed(&status, "Dump", "AgentInterrupted");
    assert_condition(&status, "SourceRunning", "True", "SourceRuns");
    without_agents()?;
    let after = namespace.take("after", json!({"sourcePodName": "heavy"}))?;
    assert_ready("node1", &after)
}

#[test]
fn a_checkpoint_that_gvisors_kernel_does_not_end_in_time_fails_and_the_pod_goes_on() -> Result<()> {
    let namespace = Namespace::new("gvisor-late")?;
    // So much that no machine writes it within the second.
    let more = "dd if=/dev/urandom of=/dev/shm/a bs=1M count=200 2>/dev/null; cd /dev/shm; cat a a a a a a a a > b; cd /";
    pod(&namespace, "heavy", &[("main", &format!("{more}; {COUNT}"))])?;
    counts(&namespace, "heavy")?;
    let of_pod = uid(&namespace.0, "pod", "heavy")?;
    let status = namespace.take("late", json!({"sourcePodName": "heavy", "timeoutSeconds": 1}))?;
    assert_failed(&status, "Dump", "DeadlineExceeded");
    assert_condition(&status, "SourceRunning", "True", "SourceRuns");
    nothing_left(&of_pod, &uid(&namespace.0, KIND, "late")?)?;
    namespace.assert_source_went_on("heavy", "main")
}

#[test]
fn what_gvisor_cannot_do_is_refused_with_a_reason_and_the_pod_goes_on() -> Result<()> {
    let namespace = Namespace::new("gvisor-refused")?;
    pod(&namespace, "two", &[("main", COUNT), ("side", COUNT)])?;
    namespace.counter("runc", "node1")?;
    let cases = [
        (
            "part",
            json!({"sourcePodName": "two", "containers": ["main"]}),
            "GvisorIndivisible",
        ),
        (
            "criu",
            json!({"sourcePodName": "two", "method": "CRI"}),
            "OciRuntimeUnsupported",
        ),
        (
            "direct",
            json!({"sourcePodName": "two", "method": "Direct"}),
            "OciRuntimeUnsupported",
        ),
        (
            "other",
            json!({"sourcePodName": "runc", "method": "GVisor"}),
            "MethodUnavailable",
        ),
    ];
    for (name, spec, reason) in cases {
        assert_failed(&namespace.take(name, spec)?, "Inspect", reason);
    }
    namespace.assert_source_went_on("two", "main")
}

#[test]
fn a_sandbox_that_somebody_has_paused_or_stopped_is_named_and_left_so() -> Result<()> {
    let namespace = Namespace::new("gvisor-paused")?;
    pod(&namespace, "counter", &[("main", COUNT)])?;
    namespace.count("counter", "main")?;
    let of_pod = uid(&namespace.0, "pod", "counter")?;
    let message = |status: &Value| {
        status["failure"]["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    runsc(&of_pod, "pause $SANDBOX")?;
    let status = namespace.take("paused", json!({"sourcePodName": "counter"}))?;
    runsc(&of_pod, "resume $SANDBOX")?;
    assert_failed(&status, "Inspect", "GvisorPaused");
    assert_condition(&status, "SourceRunning", "False", "GvisorPaused");

    let pid = sentry(&of_pod)?;
    let _undo = Undo(|| {
        let _ = on_node("node1", &format!("kill -CONT {pid}"));
    });
    on_node("node1", &format!("kill -STOP {pid}"))?;
    let status = namespace.take("stopped", json!({"sourcePodName": "counter"}))?;
    on_node("node1", &format!("kill -CONT {pid}"))?;
    assert_failed(&status, "Inspect", "GvisorSilent");
    assert_condition(&status, "SourceRunning", "False", "SourceStopped");
    ensure!(message(&status).contains("state T"), "{status:#}");

    assert_ready(
        "node1",
        &namespace.take("again", json!({"sourcePodName": "counter"}))?,
    )?;
    namespace.assert_source_went_on("counter", "main")?;
    kubectl(&["-n", &namespace.0, "delete", "pod", "counter", "--timeout=60s"]).map(drop)
}
