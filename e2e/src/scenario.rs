//! The pieces that scenarios on a cluster are made of: a namespace with pods, a PodCheckpoint and its end, and what a
//! finished one promises.

#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null and never panics"
)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

pub use crate::golden::assert_described_as;
use crate::restore::restore;
use crate::{apply, eventually, get, kubectl, on_node};

/// The full name of the resource.
pub const KIND: &str = "podcheckpoints.podcheckpoint.dev";
/// The image of the test pods.
pub const IMAGE: &str = "localhost/busybox:1";
/// The namespace of the operator.
pub const OPERATOR: &str = "podcheckpoint-system";
/// A counter in memory, shown in `/tmp/n`. The file is written in place and keeps its size: CRIU restores no open file that
/// has another size than at the dump, and a volume is copied later than that.
pub const COUNT: &str = "i=0; while true; do i=$((i+1)); printf '%09d\\n' $i 1<>/tmp/n; sleep 0.1; done";

/// A namespace of a test's own, deleted at its end.
#[derive(Debug)]
pub struct Namespace(pub String);

impl Namespace {
    /// Makes the namespace anew and waits for its service account.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub fn new(name: &str) -> Result<Self> {
        let name = format!("e2e-{name}");
        let _ = kubectl(&["delete", "namespace", &name, "--ignore-not-found"]);
        kubectl(&["create", "namespace", &name])?;
        eventually(Duration::from_secs(20), || {
            get(&name, "serviceaccount", "default")
        })?;
        Ok(Self(name))
    }

    /// Starts a pod and waits until it runs.
    ///
    /// # Errors
    /// When it does not run in time.
    pub fn pod(&self, name: &str, node: &str, containers: &[(&str, &str)]) -> Result<()> {
        let containers: Vec<Value> = containers
            .iter()
            .map(|(name, script)| {
                json!({"name": name, "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", script],
                       "volumeMounts": [{"name": format!("tmp-{name}"), "mountPath": "/tmp"}]})
            })
            .collect();
        let volumes: Vec<Value> = containers
            .iter()
            .map(|c| json!({"name": c["volumeMounts"][0]["name"], "emptyDir": {}}))
            .collect();
        self.manifest("v1", "Pod", name, json!({
            "nodeName": node, "terminationGracePeriodSeconds": 0, "containers": containers, "volumes": volumes,
        }))?;
        self.wait_for_pod(name)
    }

    /// Waits until a pod runs.
    ///
    /// # Errors
    /// When it does not run in time.
    pub fn wait_for_pod(&self, name: &str) -> Result<()> {
        kubectl(&[
            "-n",
            &self.0,
            "wait",
            "--for=condition=Ready",
            &format!("pod/{name}"),
            "--timeout=180s",
        ])
        .map(drop)
    }

    /// Starts a pod with one container, `main`, that counts.
    ///
    /// # Errors
    /// When it does not run in time.
    pub fn counter(&self, name: &str, node: &str) -> Result<()> {
        self.pod(name, node, &[("main", COUNT)])
    }

    /// Applies an object of this namespace.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub fn manifest(&self, version: &str, kind: &str, name: &str, spec: Value) -> Result<()> {
        apply(&document(&self.0, version, kind, name, &spec))
    }

    /// Applies a PodCheckpoint.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub fn checkpoint(&self, name: &str, spec: Value) -> Result<()> {
        self.manifest("podcheckpoint.dev/v1alpha1", "PodCheckpoint", name, spec)
    }

    /// Waits for the end of a PodCheckpoint; its status.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn ended(&self, name: &str) -> Result<Value> {
        // A virtual machine without hardware help, on a machine that does other things too, needs a minute for what takes
        // seconds otherwise.
        eventually(Duration::from_secs(240), || {
            let object = get(&self.0, KIND, name)?;
            let status = object["status"].clone();
            ensure!(
                !status["completionTime"].is_null(),
                "{name} has not ended: {status:#}"
            );
            Ok(status)
        })
    }

    /// Applies a PodCheckpoint and waits for its end; its status.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn take(&self, name: &str, spec: Value) -> Result<Value> {
        self.checkpoint(name, spec)?;
        self.ended(name)
    }

    /// Where a counter stands.
    ///
    /// # Errors
    /// When the container cannot be asked.
    pub fn count(&self, pod: &str, container: &str) -> Result<u64> {
        let text = eventually(Duration::from_secs(10), || {
            let text = kubectl(&["-n", &self.0, "exec", pod, "-c", container, "--", "cat", "/tmp/n"])?;
            // The file is empty for the moment between its truncation and the write.
            ensure!(!text.trim().is_empty());
            Ok(text)
        })?;
        text.trim()
            .parse()
            .with_context(|| format!("not a count: {text:?}"))
    }

    /// The pod was never restarted, counts on, and can be exec'd into.
    ///
    /// # Errors
    /// When it is not so.
    pub fn assert_source_went_on(&self, pod: &str, container: &str) -> Result<()> {
        let before = self.count(pod, container)?;
        eventually(Duration::from_secs(10), || {
            ensure!(
                self.count(pod, container)? > before,
                "the counter stands at {before}"
            );
            Ok(())
        })?;
        let pod = get(&self.0, "pod", pod)?;
        for status in pod["status"]["containerStatuses"]
            .as_array()
            .into_iter()
            .flatten()
        {
            ensure!(status["restartCount"] == 0, "restarted: {status}");
        }
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = kubectl(&["delete", "namespace", &self.0, "--wait=false"]);
    }
}

/// An object as JSON text.
pub fn document(namespace: &str, version: &str, kind: &str, name: &str, spec: &Value) -> String {
    json!({"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec}).to_string()
}

/// Status and reason of a condition; empty when there is none.
pub fn condition(status: &Value, r#type: &str) -> (String, String) {
    let all = status["conditions"].as_array().cloned().unwrap_or_default();
    let found = all.into_iter().find(|c| c["type"] == r#type).unwrap_or_default();
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    (text("status"), text("reason"))
}

/// Compares status and reason of a condition.
pub fn assert_condition(status: &Value, r#type: &str, verdict: &str, reason: &str) {
    assert_eq!(
        condition(status, r#type),
        (verdict.into(), reason.into()),
        "{type}: {status:#}"
    );
}

/// Where a container's archive lies on its node.
pub fn archive(status: &Value, container: &str) -> String {
    let folder = status["checkpointLocation"]["nodeLocal"]["path"]
        .as_str()
        .unwrap_or_default();
    let all = status["checkpointedContainers"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let found = all
        .into_iter()
        .find(|c| c["name"] == container)
        .unwrap_or_default();
    format!(
        "/var/lib/podcheckpoint/{folder}/{}",
        found["path"].as_str().unwrap_or_default()
    )
}

/// I3: what Ready=True promises.
///
/// # Errors
/// When an archive is not what the status says.
pub fn assert_ready(node: &str, status: &Value) -> Result<()> {
    assert_condition(status, "Ready", "True", "CheckpointCompleted");
    assert_condition(status, "Stalled", "False", "NotFailed");
    assert_condition(status, "SourceRunning", "True", "SourceRuns");
    for container in status["checkpointedContainers"].as_array().into_iter().flatten() {
        let path = archive(status, container["name"].as_str().unwrap_or_default());
        let file = if container["format"] == "ContainerCheckpoint" {
            path
        } else {
            format!("{path}/SHA256SUMS")
        };
        let sum = on_node(node, &format!("sha256sum {file}"))?;
        ensure!(
            sum.split(' ').next() == container["sha256"].as_str(),
            "{file} has another hash: {sum}"
        );
        ensure!(container["sizeBytes"].as_i64() > Some(0), "empty");
    }
    Ok(())
}

/// Restores and compares: the restored counter goes on from the value at the dump.
///
/// # Errors
/// When it does not.
pub fn assert_restores(node: &str, archive: &str, id: &str, at_least: u64) -> Result<()> {
    let restored = restore(node, archive, IMAGE, id)?;
    let outcome = (|| {
        restored.run("rm -f /tmp/n")?;
        let read = || -> Result<u64> { Ok(restored.run("cat /tmp/n")?.trim().parse()?) };
        let first = eventually(Duration::from_secs(20), read)?;
        ensure!(first >= at_least, "began anew: {first} < {at_least}");
        eventually(Duration::from_secs(20), || {
            ensure!(read()? > first, "stands at {first}");
            Ok(())
        })
    })();
    restored.remove()?;
    outcome
}

/// A counter beside a process with 300 MB of memory of its own, so that a dump lasts long enough to be interrupted. Random,
/// so that no page is left out; not in /dev/shm, which belongs to the sandbox and is no part of a container's dump. It
/// counts once the memory is full.
pub const HEAVY: &str = "{ head -c 300000000 /dev/urandom; : > /tmp/full; exec sleep 1000000; } | tail -c 300000000 & until [ -e /tmp/full ]; do sleep 0.1; done; i=0; while true; do i=$((i+1)); printf '%09d\\n' $i 1<>/tmp/n; sleep 0.1; done";

/// I1, from the kernel and not from anybody's books: no process of a pod on node1 is frozen, stopped or traced.
///
/// # Errors
/// When one is, with what was seen.
pub fn assert_undisturbed(uid: &str) -> Result<()> {
    let look = format!(
        "for f in $(find /sys/fs/cgroup/freezer -path '*pod{uid}*' -name freezer.state); do cat $f; done 2>/dev/null | sort -u
         for p in $(find /sys/fs/cgroup/freezer -path '*pod{uid}*' -name cgroup.procs -exec cat {{}} + 2>/dev/null); do
           grep -hE '^(State|TracerPid)' /proc/$p/status; done 2>/dev/null | sort -u"
    );
    let seen = on_node("node1", &look)?;
    ensure!(
        !seen.contains("FROZEN") && !seen.contains("FREEZING"),
        "frozen: {seen}"
    );
    ensure!(!seen.contains("T (") && !seen.contains("t ("), "stopped: {seen}");
    ensure!(
        seen.lines()
            .filter(|line| line.starts_with("TracerPid"))
            .all(|line| line.ends_with("\t0")),
        "traced: {seen}"
    );
    Ok(())
}

/// Ends the operator's agents. A new one is made for the next checkpoint; one that was killed would be started by the
/// kubelet ever later.
///
/// # Errors
/// When they do not go.
pub fn without_agents() -> Result<()> {
    let agents = "app.kubernetes.io/component=agent";
    kubectl(&[
        "-n",
        OPERATOR,
        "delete",
        "pod",
        "-l",
        agents,
        "--wait",
        "--timeout=180s",
    ])
    .map(drop)
}

/// Does something when it is dropped: what a test has changed on a node is changed back also when it fails.
pub struct Undo<F: FnMut()>(pub F);

impl<F: FnMut()> Drop for Undo<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// A failure as the API promises it: an end in Stalled, with the cause, the step, words and a remedy. I8 goes with it.
pub fn assert_failed(status: &Value, step: &str, reason: &str) {
    assert_condition(status, "Stalled", "True", reason);
    let failure = &status["failure"];
    assert_eq!(
        (
            failure["step"].as_str(),
            failure["reason"].as_str(),
            status["reason"].as_str()
        ),
        (Some(step), Some(reason), Some(reason)),
        "{status:#}"
    );
    let said = |key: &str| failure[key].as_str().is_some_and(|words| !words.is_empty());
    assert!(said("message") && said("remedy"), "{status:#}");
    assert!(
        status["checkpointLocation"].is_null() && status["checkpointedContainers"].is_null(),
        "a failure with an archive: {status:#}"
    );
    assert_every_condition_has_a_documented_reason(status);
}

/// I8.
pub fn assert_every_condition_has_a_documented_reason(status: &Value) {
    let documented = include_str!("../../crds/reasons.md");
    for condition in status["conditions"].as_array().into_iter().flatten() {
        let reason = condition["reason"].as_str().unwrap_or_default();
        assert!(
            documented
                .lines()
                .any(|line| line.strip_prefix("### ") == Some(reason)),
            "{condition} has an undocumented reason"
        );
    }
}
