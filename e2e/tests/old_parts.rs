//! A node as many still are: containerd 1.7, which cannot make checkpoints, and a CRIU that is older than the kernel. Needs
//! the operator on a cluster that was started with `e2e/cluster up --containerd debian --criu 3.17`.
#![cfg(feature = "old-parts")]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null; a panic is a failed test"
)]

use anyhow::{Result, ensure};
use podcheckpoint_e2e::golden::assert_described_as;
use podcheckpoint_e2e::scenario::{
    Namespace, assert_condition, assert_failed, assert_ready, assert_undisturbed, without_agents,
};
use podcheckpoint_e2e::{get, on_node};
use serde_json::json;

#[test]
fn an_old_criu_is_refused_before_the_pod_is_frozen_and_an_old_containerd_is_got_around() -> Result<()> {
    let namespace = Namespace::new("old-parts")?;
    namespace.counter("counter", "node1")?;
    let pod = get(&namespace.0, "pod", "counter")?["metadata"]["uid"].clone();
    let version = on_node("node1", "criu --version | head -n 1; containerd --version")?;
    ensure!(version.contains("3.17") && version.contains("1.7."), "{version}");

    // Left to itself this CRIU needs 20 s to fail here, with the pod frozen.
    let status = namespace.take(
        "old-criu",
        json!({"sourcePodName": "counter", "method": "Direct"}),
    )?;
    assert_failed(&status, "ValidatePtrace", "CriuKernelMismatch");
    assert_described_as(&namespace.0, "old-criu", "criu-too-old")?;
    assert_condition(&status, "SourceRunning", "True", "SourceRuns");
    ensure!(
        status["frozen"].is_null(),
        "frozen for what cannot work: {status:#}"
    );
    ensure!(
        status["runtime"]["criuVersion"]
            .as_str()
            .is_some_and(|v| v.starts_with("3.17")),
        "{status:#}"
    );
    assert_undisturbed(pod.as_str().unwrap_or_default())?;

    on_node("node1", "mv /usr/sbin/criu.new /usr/sbin/criu")?;
    without_agents()?;
    for method in ["CRI", "Kubelet"] {
        let name = format!("old-containerd-{}", method.to_lowercase());
        let status = namespace.take(&name, json!({"sourcePodName": "counter", "method": method}))?;
        assert_failed(&status, "Inspect", "RuntimeTooOld");
        assert_described_as(&namespace.0, &name, &name)?;
    }
    let status = namespace.take("auto", json!({"sourcePodName": "counter"}))?;
    assert_ready("node1", &status)?;
    ensure!(status["method"] == "Direct", "{status:#}");
    let skipped = status["skippedMethods"].to_string();
    ensure!(skipped.contains("RuntimeTooOld"), "{skipped}");
    namespace.assert_source_went_on("counter", "main")
}
