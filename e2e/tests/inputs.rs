//! Pods, nodes and settings with which no checkpoint can be taken, or only with care. Each ends with a reason that says
//! what stands in the way, in bounded time, and the pod stays as it was. Needs what `cluster.rs` needs.
//!
//! Some change node1 for a while: run them one at a time.
#![cfg(feature = "cluster")]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null; a panic is a failed test"
)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podcheckpoint_e2e::golden::assert_described_as;
use podcheckpoint_e2e::scenario::{
    COUNT, HEAVY, IMAGE, KIND, Namespace, OPERATOR, Undo, archive, assert_condition, assert_failed,
    assert_ready, assert_undisturbed, condition, document, without_agents,
};
use podcheckpoint_e2e::{apply, eventually, get, kubectl, kubectl_refused, on_node, on_node_with, uid};
use serde_json::{Value, json};

/// A pod with one container, on node1.
fn pod(script: &str, more: &Value) -> Value {
    let mut spec = json!({
        "nodeName": "node1", "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", script]}],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    spec
}

/// Words of a failure.
fn message(status: &Value) -> &str {
    status["failure"]["message"].as_str().unwrap_or_default()
}

#[test]
fn a_pod_that_cannot_be_a_source_is_refused_and_says_why() -> Result<()> {
    let namespace = Namespace::new("bad-sources")?;
    let n = namespace.0.as_str();
    let leave = || {
        let free = r#"{"metadata":{"finalizers":null}}"#;
        let _ = kubectl(&["-n", n, "patch", "pod", "leaving", "--type=merge", "-p", free]);
        let _ = on_node("node1", "rm -f /etc/kubernetes/manifests/e2e.json");
    };
    let _undo = Undo(leave);
    let leaving = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "leaving", "namespace": n, "finalizers": ["e2e.podcheckpoint.dev/stays"]},
        "spec": pod("sleep 1000", &json!({"terminationGracePeriodSeconds": 600})),
    });
    apply(&leaving.to_string())?;
    let fixed = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "fixed", "namespace": n},
        "spec": pod("sleep 1000", &json!({"nodeName": null})),
    });
    on_node(
        "node1",
        &format!("cat > /etc/kubernetes/manifests/e2e.json <<'EOF'\n{fixed}\nEOF"),
    )?;
    namespace.counter("debugged", "node1")?;
    let debugger = json!({"spec": {"ephemeralContainers": [
        {"name": "debugger", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh"], "stdin": true, "tty": true}
    ]}})
    .to_string();
    let attach = [
        "patch",
        "pod",
        "debugged",
        "--subresource=ephemeralcontainers",
        "-p",
        &debugger,
    ];
    kubectl(&[&["-n", n][..], &attach].concat())?;
    eventually(Duration::from_secs(60), || {
        let debugged = get(n, "pod", "debugged")?;
        let state = &debugged["status"]["ephemeralContainerStatuses"][0]["state"];
        ensure!(!state["running"].is_null(), "{state}");
        Ok(())
    })?;
    for name in ["leaving", "fixed-node1"] {
        eventually(Duration::from_secs(30), || get(n, "pod", name))?;
        namespace.wait_for_pod(name)?;
    }
    kubectl(&["-n", n, "delete", "pod", "leaving", "--wait=false"])?;

    let cases = [
        ("leaving", json!({"sourcePodName": "leaving"}), "PodTerminating"),
        ("static", json!({"sourcePodName": "fixed-node1"}), "PodStatic"),
        (
            "ephemeral",
            json!({"sourcePodName": "debugged", "containers": ["debugger"]}),
            "ContainerNotRegular",
        ),
    ];
    for (name, spec, _) in &cases {
        namespace.checkpoint(name, spec.clone())?;
    }
    // An open debug container is none of the pod's business, so it is left out and does not stand in the way.
    let debugged = namespace.take("debugged", json!({"sourcePodName": "debugged"}))?;
    assert_ready("node1", &debugged)?;
    let containers: Vec<_> = debugged["checkpointedContainers"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|c| c["name"].clone())
        .collect();
    assert_eq!(containers, ["main"]);
    for (name, _, reason) in cases {
        assert_failed(&namespace.ended(name)?, "ResolveTarget", reason);
        assert_described_as(n, name, &format!("source-{name}"))?;
    }

    // The checkpoint above has made sure that there is an agent.
    for component in ["agent", "controller"] {
        let label = format!("app.kubernetes.io/component={component}");
        let name = kubectl(&[
            "-n",
            OPERATOR,
            "get",
            "pod",
            "-l",
            &label,
            "-o",
            "jsonpath={.items[0].metadata.name}",
        ])?;
        let object = format!("e2e-{component}");
        let spec = json!({"sourcePodName": name});
        apply(&document(
            OPERATOR,
            "podcheckpoint.dev/v1alpha1",
            "PodCheckpoint",
            &object,
            &spec,
        ))?;
        let _undo = Undo(|| drop(kubectl(&["-n", OPERATOR, "delete", KIND, &object])));
        let status = eventually(Duration::from_secs(20), || {
            let status = get(OPERATOR, KIND, &object)?["status"].clone();
            ensure!(!status["completionTime"].is_null(), "{status:#}");
            Ok(status)
        })?;
        assert_failed(&status, "ResolveTarget", "PodProtected");
    }
    Ok(())
}

#[test]
fn a_pod_on_the_nodes_network_or_on_a_cordoned_node_can_be_checkpointed() -> Result<()> {
    let namespace = Namespace::new("unusual")?;
    namespace.manifest("v1", "Pod", "hostnet", pod(COUNT, &json!({"hostNetwork": true})))?;
    namespace.counter("counter", "node1")?;
    namespace.wait_for_pod("hostnet")?;
    let status = namespace.take("hostnet", json!({"sourcePodName": "hostnet"}))?;
    assert_ready("node1", &status)?;
    namespace.assert_source_went_on("hostnet", "main")?;
    let _undo = Undo(|| drop(kubectl(&["uncordon", "node1"])));
    kubectl(&["cordon", "node1"])?;
    without_agents()?;
    let status = namespace.take("cordoned", json!({"sourcePodName": "counter"}))?;
    assert_ready("node1", &status)?;
    namespace.assert_source_went_on("counter", "main")
}

#[test]
fn a_namespace_that_is_being_deleted_takes_no_new_checkpoint_and_lets_the_old_ones_go() -> Result<()> {
    let namespace = Namespace::new("going")?;
    let n = namespace.0.clone();
    namespace.pod("heavy", "node1", &[("main", HEAVY)])?;
    namespace.count("heavy", "main")?;
    let done = namespace.take("done", json!({"sourcePodName": "heavy"}))?;
    let path = archive(&done, "main");
    on_node("node1", &format!("test -s {path}"))?;
    namespace.checkpoint("running", json!({"sourcePodName": "heavy"}))?;
    let running = format!("/var/lib/podcheckpoint/checkpoints/{}", uid(&n, KIND, "running")?);
    // What holds the namespace long enough to be asked for a checkpoint in it.
    let hold = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "hold", "namespace": n, "finalizers": ["e2e.podcheckpoint.dev/stays"]},
    });
    apply(&hold.to_string())?;
    kubectl(&["delete", "namespace", &n, "--wait=false"])?;
    let spec = json!({"sourcePodName": "heavy"});
    let late = document(&n, "podcheckpoint.dev/v1alpha1", "PodCheckpoint", "late", &spec);
    let answer = kubectl_refused(&["create", "-f", "-"], &late)?;
    assert!(answer.contains("being terminated"), "{answer}");
    kubectl(&[
        "-n",
        &n,
        "patch",
        "configmap",
        "hold",
        "--type=merge",
        "-p",
        r#"{"metadata":{"finalizers":null}}"#,
    ])?;
    // I10 and I7: the object with an archive and the one in the middle of its dump go, and so do their files.
    kubectl(&["wait", "--for=delete", &format!("namespace/{n}"), "--timeout=60s"])?;
    eventually(Duration::from_secs(10), || {
        on_node(
            "node1",
            &format!("! test -e $(dirname {path}) && ! test -e {running}"),
        )
        .map(drop)
    })
}

#[test]
fn what_criu_cannot_save_is_named_with_the_stage_and_the_whole_log() -> Result<()> {
    let namespace = Namespace::new("unsavable")?;
    let n = namespace.0.as_str();
    let count = format!("( {COUNT} ) &");
    // A socket of a family and with options that this kernel does not tell CRIU, and an open TCP connection.
    let packet = format!("{count} exec arping -I eth0 10.244.0.99");
    let tcp = format!(
        "{count} nc -l -p 5000 </dev/zero >/dev/null & sleep 1; sleep 100000 | nc 127.0.0.1 5000 >/dev/null"
    );
    namespace.manifest("v1", "Pod", "packet", pod(&packet, &json!({})))?;
    namespace.manifest("v1", "Pod", "tcp", pod(&tcp, &json!({})))?;
    for name in ["packet", "tcp"] {
        namespace.wait_for_pod(name)?;
        namespace.count(name, "main")?;
    }
    eventually(Duration::from_secs(10), || {
        let connected = kubectl(&["-n", n, "exec", "tcp", "--", "netstat", "-tn"])?;
        ensure!(connected.contains("ESTABLISHED"), "{connected}");
        Ok(())
    })?;
    let cases = [
        ("packet", "CRI", "SocketUnsupported", "sockets: Can't get"),
        ("packet", "Direct", "SocketUnsupported", "sockets: Can't get"),
        ("packet", "Kubelet", "SocketUnsupported", "sockets: Can't get"),
        ("tcp", "CRI", "TcpEstablished", "Connected TCP socket"),
        ("tcp", "Direct", "TcpEstablished", "Connected TCP socket"),
    ];
    for (source, method, reason, words) in cases {
        let name = format!("{source}-{}", method.to_lowercase());
        let status = namespace.take(&name, json!({"sourcePodName": source, "method": method}))?;
        assert_failed(&status, "Dump", reason);
        assert_condition(&status, "Checkpointed", "False", reason);
        assert_condition(&status, "SourceRunning", "True", "SourceRuns");
        assert_described_as(n, &name, &format!("unsavable-{name}"))?;
        let said = message(&status);
        assert!(said.contains(words) && said.contains("Error (criu/"), "{said}");
        assert!(
            said.contains("(CRIU stopped while reading what a process has open)"),
            "{said}"
        );
        let log = status["failure"]["logPath"]
            .as_str()
            .context("no path of the log")?;
        let whole = on_node("node1", &format!("cat {log}"))?;
        assert!(
            whole.contains(words) && whole.contains("Dumping FAILED"),
            "{whole}"
        );
        // I5 and I7: nothing but the log is left, and it goes with its object.
        assert_eq!(
            on_node("node1", &format!("ls $(dirname {log})"))?.trim(),
            "main.criu.log"
        );
        kubectl(&["-n", n, "delete", KIND, &name, "--timeout=30s"])?;
        eventually(Duration::from_secs(10), || {
            on_node("node1", &format!("! test -e $(dirname {log})")).map(drop)
        })?;
        assert_undisturbed(&uid(n, "pod", source)?)?;
    }
    namespace.assert_source_went_on("packet", "main")?;
    namespace.assert_source_went_on("tcp", "main")
}

/// Deletes a pod in the middle of its dump and puts another one of the same name in its place.
fn replace_during_dump(namespace: &Namespace, method: &str) -> Result<()> {
    let n = namespace.0.as_str();
    let (name, source) = (method.to_lowercase(), format!("heavy-{}", method.to_lowercase()));
    let old = uid(n, "pod", &source)?;
    namespace.checkpoint(&name, json!({"sourcePodName": source, "method": method}))?;
    // The dump has begun when the kernel says so.
    // Its own CRIU is the only one on the node.
    let begun = "for i in $(seq 500); do pgrep -x criu >/dev/null && exit 0; sleep 0.02; done; exit 1";
    on_node("node1", begun).context("CRIU was not started")?;
    kubectl(&["-n", n, "delete", "pod", &source, "--force", "--grace-period=0"])?;
    namespace.counter(&source, "node1")?;
    let new = uid(n, "pod", &source)?;
    let status = namespace.ended(&name)?;
    ensure!(status["sourcePodUID"] == old.as_str(), "{status:#}");
    // The dump may win against the deletion.
    if condition(&status, "Ready").0 != "True" {
        assert_failed(&status, "Dump", "SourcePodGone");
        let source = condition(&status, "SourceRunning");
        ensure!(source == ("Unknown".into(), "SourcePodGone".into()), "{source:?}");
    }
    assert_undisturbed(&new)?;
    namespace.assert_source_went_on(&source, "main")?;
    // A frozen process cannot be ended, so the pod would stay on the node for ever.
    eventually(Duration::from_secs(30), || {
        let left = on_node(
            "node1",
            &format!("find /sys/fs/cgroup/freezer -path '*pod{old}*' -name freezer.state"),
        )?;
        ensure!(left.is_empty(), "still there: {left}");
        Ok(())
    })
}

#[test]
fn a_pod_that_is_deleted_or_replaced_during_its_dump_ends_it_and_its_successor_is_not_touched() -> Result<()>
{
    let namespace = Namespace::new("replaced")?;
    let methods = ["CRI", "Direct", "Kubelet"];
    for method in methods {
        let name = format!("heavy-{}", method.to_lowercase());
        namespace.pod(&name, "node1", &[("main", HEAVY)])?;
    }
    for method in methods {
        namespace.count(&format!("heavy-{}", method.to_lowercase()), "main")?;
        replace_during_dump(&namespace, method).context(method)?;
    }
    Ok(())
}

#[test]
fn a_stopped_kubelet_does_not_stop_the_runtime_and_a_node_that_is_not_ready_is_named() -> Result<()> {
    let namespace = Namespace::new("kubelet")?;
    namespace.counter("counter", "node1")?;
    let first = namespace.take("first", json!({"sourcePodName": "counter"}))?;
    assert_ready("node1", &first)?;
    let restart = || {
        let _ = on_node("node1", "rm -f /run/kubelet.stop");
        let ready = ["wait", "--for=condition=Ready", "node/node1", "--timeout=60s"];
        let _ = kubectl(&ready);
    };
    let undo = Undo(restart);
    on_node("node1", "touch /run/kubelet.stop; kill $(cat /run/kubelet.pid)")?;
    // The node still counts as ready, and an agent is there.
    namespace.checkpoint("cri", json!({"sourcePodName": "counter", "method": "CRI"}))?;
    assert_ready("node1", &namespace.ended("cri")?)?;
    let status = namespace.take(
        "kubelet",
        json!({"sourcePodName": "counter", "method": "Kubelet"}),
    )?;
    assert_failed(&status, "Dump", "KubeletUnreachable");
    assert_described_as(&namespace.0, "kubelet", "kubelet-stopped")?;
    assert_condition(&status, "SourceRunning", "True", "SourceRuns");
    eventually(Duration::from_secs(60), || {
        let node: Value = serde_json::from_str(&kubectl(&["get", "node", "node1", "-o", "json"])?)?;
        ensure!(condition(&node["status"], "Ready").0 != "True", "still ready");
        Ok(())
    })?;
    let begun = Instant::now();
    let status = namespace.take("not-ready", json!({"sourcePodName": "counter"}))?;
    assert_failed(&status, "ResolveTarget", "NodeNotReady");
    assert_described_as(&namespace.0, "not-ready", "node-not-ready")?;
    ensure!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_undisturbed(&uid(&namespace.0, "pod", "counter")?)?;
    drop(undo);
    namespace.assert_source_went_on("counter", "main")
}

fn helm(arguments: &[&str]) -> Result<()> {
    let output = std::process::Command::new("helm").args(arguments).output()?;
    ensure!(
        output.status.success(),
        "helm {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Who may write everything of a namespace may write statuses too, and so the UID of a pod that is none of theirs.
#[test]
fn a_status_that_names_the_pod_of_another_namespace_has_nothing_done_to_it() -> Result<()> {
    let (theirs, ours) = (Namespace::new("victim")?, Namespace::new("forger")?);
    theirs.counter("counter", "node1")?;
    let victim = uid(&theirs.0, "pod", "counter")?;
    assert_failed(
        &ours.take("first", json!({"sourcePodName": "counter"}))?,
        "ResolveTarget",
        "PodNotFound",
    );
    let forged = json!({"status": {
        "conditions": [], "completionTime": null, "failure": null, "reason": null, "archiveState": null,
        "nodeName": "node1", "sourcePodUID": victim, "sourceContainers": [],
        "startTime": on_node("node1", "date -u +%FT%TZ")?.trim(),
    }});
    kubectl(&[
        "-n",
        &ours.0,
        "patch",
        KIND,
        "first",
        "--subresource=status",
        "--type=merge",
        "-p",
        &forged.to_string(),
    ])?;
    let status = ours.ended("first")?;
    assert_failed(&status, "Inspect", "SourcePodReplaced");
    assert_undisturbed(&victim)?;
    theirs.assert_source_went_on("counter", "main")
}

#[test]
fn an_agent_whose_image_does_not_exist_is_said_at_once_and_not_waited_for() -> Result<()> {
    let namespace = Namespace::new("no-image")?;
    namespace.counter("counter", "node1")?;
    let _undo = Undo(|| {
        let _ = helm(&[
            "rollback",
            "podcheckpoint",
            "--namespace",
            OPERATOR,
            "--wait",
            "--timeout",
            "60s",
        ]);
    });
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/podcheckpoint");
    let change = [
        "--reuse-values",
        "--set",
        "agent.image.tag=missing",
        "--wait",
        "--timeout",
        "60s",
    ];
    helm(
        &[
            &["upgrade", "podcheckpoint", chart, "--namespace", OPERATOR][..],
            &change,
        ]
        .concat(),
    )?;
    // Only now: until then one may still be started with the old image for what other tests have left to be deleted.
    without_agents()?;
    let begun = Instant::now();
    let status = namespace.take("first", json!({"sourcePodName": "counter"}))?;
    assert_failed(&status, "StartAgent", "AgentImageUnavailable");
    let said = message(&status);
    assert!(said.contains("localhost/podcheckpoint-agent:missing"), "{said}");
    ensure!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    assert_condition(&status, "SourceRunning", "Unknown", "NotReached");
    namespace.assert_source_went_on("counter", "main")
}

#[test]
fn an_archive_root_that_is_full_or_cannot_be_written_is_named_and_nothing_partial_is_left() -> Result<()> {
    let namespace = Namespace::new("storage")?;
    // Changed files of the root file system are not in the estimate: the disk fills in the middle of the checkpoint.
    let big = format!("dd if=/dev/urandom of=/big bs=1M count=90 2>/dev/null; {COUNT}");
    for name in ["cri", "direct", "kubelet"] {
        namespace.pod(name, "node1", &[("main", &big)])?;
    }
    namespace.counter("small", "node1")?;
    let _undo = Undo(|| {
        let _ = on_node(
            "node1",
            "while umount -l /var/lib/podcheckpoint-e2e 2>/dev/null; do :; done",
        );
        let _ = on_node(
            "node1",
            "grep -q 'e2e-small /var/lib/podcheckpoint ' /proc/mounts && umount -l /var/lib/podcheckpoint",
        );
        let _ = without_agents();
    });
    on_node(
        "node1",
        "mount -t tmpfs -o size=80m e2e-small /var/lib/podcheckpoint",
    )?;
    without_agents()?;
    for (name, method) in [("cri", "CRI"), ("direct", "Direct"), ("kubelet", "Kubelet")] {
        namespace.count(name, "main")?;
        let status = namespace.take(name, json!({"sourcePodName": name, "method": method}))?;
        // With CRI it is the runtime that writes.
        let step = if method == "CRI" { "Dump" } else { "Archive" };
        assert_failed(&status, step, "StorageFull");
        assert_condition(&status, "SourceRunning", "True", "SourceRuns");
        namespace.assert_source_went_on(name, "main")?;
        let left = on_node(
            "node1",
            "find /var/lib/podcheckpoint /var/lib/kubelet/checkpoints -type f -size +1M",
        )?;
        assert_eq!(left.trim(), "", "{method} left a partial archive");
    }
    on_node("node1", "mount -o remount,size=20m /var/lib/podcheckpoint")?;
    let status = namespace.take("no-room", json!({"sourcePodName": "small"}))?;
    assert_failed(&status, "Inspect", "StorageFull");
    assert_described_as(&namespace.0, "no-room", "storage-full")?;
    assert!(status["frozen"].is_null(), "frozen for what cannot work");
    on_node("node1", "mount -o remount,ro /var/lib/podcheckpoint")?;
    let status = namespace.take("read-only", json!({"sourcePodName": "small"}))?;
    assert_failed(&status, "Inspect", "StorageNotWritable");
    assert_described_as(&namespace.0, "read-only", "storage-read-only")?;
    assert!(message(&status).contains("Read-only file system"), "{status:#}");
    namespace.assert_source_went_on("small", "main")
}

/// An ext4 file system for a node that has no program to make one, as bytes.
fn file_system() -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("image");
    let made = std::process::Command::new("mkfs.ext4")
        .arg("-q")
        .arg(&image)
        .arg("256M")
        .status()?;
    ensure!(made.success(), "mkfs.ext4 ended with {made}");
    // Nearly all of it is holes, which tar leaves out.
    let packed = std::process::Command::new("tar")
        .args(["-cSf", "-", "-C"])
        .arg(folder.path())
        .arg("image")
        .output()?;
    Ok(packed.stdout)
}

#[test]
fn an_archive_root_whose_disk_hangs_is_named_and_the_agent_goes_on() -> Result<()> {
    let namespace = Namespace::new("stalled-disk")?;
    namespace.counter("counter", "node1")?;
    let undo = "fsfreeze -u /var/lib/podcheckpoint 2>/dev/null; umount -l /var/lib/podcheckpoint; rm -f /var/lib/etcd/e2e.image; true";
    let _undo = Undo(|| {
        let _ = on_node("node1", undo);
        let _ = without_agents();
    });
    let make = "cd /var/lib/etcd && tar -xSf - && mv image e2e.image && mount -o loop e2e.image /var/lib/podcheckpoint";
    on_node_with("node1", make, &file_system()?)?;
    without_agents()?;
    assert_ready(
        "node1",
        &namespace.take("before", json!({"sourcePodName": "counter"}))?,
    )?;
    // A frozen file system makes whoever writes to it wait, as a dead server of a network file system does.
    on_node("node1", "fsfreeze -f /var/lib/podcheckpoint")?;
    let status = namespace.take("hangs", json!({"sourcePodName": "counter"}))?;
    assert_failed(&status, "Inspect", "StorageStalled");
    assert_described_as(&namespace.0, "hangs", "storage-stalled")?;
    assert!(status["frozen"].is_null(), "frozen for what cannot work");
    namespace.assert_source_went_on("counter", "main")?;
    on_node("node1", "fsfreeze -u /var/lib/podcheckpoint")?;
    let status = namespace.take("after", json!({"sourcePodName": "counter"}))?;
    assert_ready("node1", &status)
}

#[test]
fn a_node_without_criu_without_its_runtimes_socket_or_with_a_runtime_that_has_no_checkpoint_says_so()
-> Result<()> {
    let namespace = Namespace::new("node-parts")?;
    namespace.counter("counter", "node1")?;
    let class = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "e2e-crun"}, "handler": "crun"});
    apply(&class.to_string())?;
    let _undo = Undo(|| {
        let back = "[ ! -e /usr/sbin/criu.e2e ] || mv /usr/sbin/criu.e2e /usr/sbin/criu
            [ ! -e /run/containerd/e2e.sock ] || mv /run/containerd/e2e.sock /run/containerd/containerd.sock";
        let _ = on_node("node1", back);
        let _ = kubectl(&["delete", "runtimeclass", "e2e-crun", "--ignore-not-found"]);
    });
    // On node2: crun wants nothing to do with both cgroup versions at once.
    let spec = json!({"runtimeClassName": "e2e-crun", "nodeName": "node2"});
    namespace.manifest("v1", "Pod", "crun", pod(COUNT, &spec))?;
    namespace.wait_for_pod("crun")?;
    let methods = ["CRI", "Direct"];
    for method in methods {
        let name = format!("crun-{}", method.to_lowercase());
        let status = namespace.take(&name, json!({"sourcePodName": "crun", "method": method}))?;
        assert_failed(&status, "Dump", "OciRuntimeUnsupported");
        assert_described_as(&namespace.0, &name, &name)?;
        assert_condition(&status, "SourceRunning", "True", "SourceRuns");
    }
    namespace.assert_source_went_on("crun", "main")?;

    on_node("node1", "mv /usr/sbin/criu /usr/sbin/criu.e2e")?;
    let status = namespace.take("no-criu", json!({"sourcePodName": "counter"}))?;
    assert_failed(&status, "ValidatePtrace", "CriuMissing");
    assert_described_as(&namespace.0, "no-criu", "criu-missing")?;
    on_node("node1", "mv /usr/sbin/criu.e2e /usr/sbin/criu")?;
    assert_ready(
        "node1",
        &namespace.take("criu-back", json!({"sourcePodName": "counter"}))?,
    )?;

    on_node(
        "node1",
        "mv /run/containerd/containerd.sock /run/containerd/e2e.sock",
    )?;
    let status = namespace.take("no-socket", json!({"sourcePodName": "counter"}))?;
    assert_failed(&status, "Inspect", "RuntimeNotFound");
    assert_described_as(&namespace.0, "no-socket", "runtime-not-found")?;
    assert!(
        message(&status).contains("/run/containerd/containerd.sock: does not exist"),
        "{status:#}"
    );
    on_node(
        "node1",
        "mv /run/containerd/e2e.sock /run/containerd/containerd.sock",
    )?;
    assert_ready(
        "node1",
        &namespace.take("socket-back", json!({"sourcePodName": "counter"}))?,
    )?;
    namespace.assert_source_went_on("counter", "main")
}
