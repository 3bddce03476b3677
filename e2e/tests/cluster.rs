//! The operator on a real cluster, as its users meet it. Needs the feature `cluster`, kubectl, KUBECONFIG, the local
//! cluster with both nodes and the operator installed: `e2e/test` provides all of it.
#![cfg(feature = "cluster")]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null; a panic is a failed test"
)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use podcheckpoint_e2e::golden::assert_described_as;
use podcheckpoint_e2e::restore::restore;
use podcheckpoint_e2e::scenario::{
    COUNT, HEAVY, IMAGE, KIND, Namespace, OPERATOR, archive, assert_condition, assert_failed, assert_ready,
    assert_restores, assert_undisturbed, condition, document, without_agents,
};
use podcheckpoint_e2e::{apply_with, eventually, get, kubectl, kubectl_refused, on_node, uid};
use serde_json::{Value, json};

fn checkpoint_and_restore_on(node: &str) -> Result<()> {
    let namespace = Namespace::new(&format!("restore-{node}"))?;
    namespace.counter("counter", node)?;
    let before = namespace.count("counter", "main")?;
    let status = namespace.take("first", json!({"sourcePodName": "counter"}))?;
    assert_ready(node, &status)?;
    namespace.assert_source_went_on("counter", "main")?;
    assert_restores(
        node,
        &archive(&status, "main"),
        &format!("restored-{node}"),
        before,
    )
}

#[test]
fn a_checkpoint_on_cgroup_v1_restores_and_the_source_goes_on() -> Result<()> {
    checkpoint_and_restore_on("node1")
}

#[test]
fn a_checkpoint_on_cgroup_v2_with_apparmor_restores_and_the_source_goes_on() -> Result<()> {
    checkpoint_and_restore_on("node2")
}

#[test]
fn a_restored_pod_still_has_its_open_file_its_listener_and_its_child() -> Result<()> {
    let namespace = Namespace::new("restored-parts")?;
    let script = String::from(
        "exec 7>>/tmp/held; echo before >&7; nc -l -p 5001 >/dev/null & sleep 100000 & \
         i=0; while true; do i=$((i+1)); printf '%09d\\n' $i 1<>/tmp/n; [ ! -e /tmp/ask ] || { rm /tmp/ask; echo after >&7; }; sleep 0.1; done",
    );
    // CRIU 4.1.1 cannot dump any TCP socket on the kernel of node1: it asks for options that only unix sockets have there.
    namespace.pod("parts", "node2", &[("main", &script)])?;
    namespace.count("parts", "main")?;
    for method in ["CRI", "Direct"] {
        let name = format!("restored-parts-{}", method.to_lowercase());
        let status = namespace.take(&name, json!({"sourcePodName": "parts", "method": method}))?;
        assert_ready("node2", &status)?;
        let restored = restore("node2", &archive(&status, "main"), IMAGE, &name)?;
        let outcome = (|| {
            let children = restored.run("cat /proc/[0-9]*/cmdline | tr \"\\0\" \" \"")?;
            ensure!(children.contains("sleep 100000"), "no child: {children}");
            // By process 1: who looks is in no process namespace of the container, and has no /proc/self there.
            let listeners = restored.run("cat /proc/1/net/tcp /proc/1/net/tcp6")?;
            let port = format!(":{:04X} ", 5001);
            ensure!(listeners.contains(&port), "no listener: {listeners}");
            // It writes to the descriptor that it had open, when it is asked to.
            restored.run("touch /tmp/ask")?;
            eventually(Duration::from_secs(10), || {
                let held = restored.run("cat /tmp/held")?;
                ensure!(held == "before\nafter\n", "{held}");
                Ok(())
            })
        })();
        restored.remove()?;
        outcome.with_context(|| name)?;
    }
    namespace.assert_source_went_on("parts", "main")
}

#[test]
fn each_method_takes_a_checkpoint_and_says_why_the_others_were_not_used() -> Result<()> {
    let namespace = Namespace::new("methods")?;
    namespace.counter("counter", "node1")?;
    for method in ["CRI", "Kubelet", "Direct"] {
        let before = namespace.count("counter", "main")?;
        let name = method.to_lowercase();
        let status = namespace.take(&name, json!({"sourcePodName": "counter", "method": method}))?;
        assert_ready("node1", &status)?;
        assert_eq!(status["method"], method);
        assert_described_as(&namespace.0, &name, &format!("success-{name}"))?;
        let skipped = status["skippedMethods"].as_array().map(Vec::len);
        assert_eq!(skipped, Some(5), "{status:#}");
        assert_restores(
            "node1",
            &archive(&status, "main"),
            &format!("restored-{name}"),
            before,
        )?;
    }
    let status = namespace.take("vm", json!({"sourcePodName": "counter", "method": "VMSnapshot"}))?;
    assert_condition(&status, "Stalled", "True", "MethodUnavailable");
    namespace.assert_source_went_on("counter", "main")
}

#[test]
fn two_containers_are_one_cut_and_one_of_two_can_be_chosen() -> Result<()> {
    let namespace = Namespace::new("two")?;
    namespace.pod("pair", "node1", &[("left", COUNT), ("right", COUNT)])?;
    let both = namespace.take("both", json!({"sourcePodName": "pair"}))?;
    assert_ready("node1", &both)?;
    assert_eq!(
        (both["method"].as_str(), both["consistency"].as_str()),
        (Some("Direct"), Some("Pod"))
    );
    assert_eq!(both["checkpointedContainers"].as_array().map(Vec::len), Some(2));
    let one = namespace.take("one", json!({"sourcePodName": "pair", "containers": ["right"]}))?;
    assert_ready("node1", &one)?;
    assert_eq!(one["checkpointedContainers"][0]["name"], "right");
    let cri = namespace.take("cri", json!({"sourcePodName": "pair", "method": "CRI"}))?;
    assert_eq!(cri["consistency"], "PerContainer");
    namespace.assert_source_went_on("pair", "left")?;
    namespace.assert_source_went_on("pair", "right")
}

#[test]
fn a_target_that_cannot_be_checkpointed_ends_with_its_reason_and_a_remedy() -> Result<()> {
    let namespace = Namespace::new("bad-targets")?;
    namespace.counter("counter", "node1")?;
    let container = |command: &str| json!([{"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", command]}]);
    let pod = |name: &str, spec: Value| namespace.manifest("v1", "Pod", name, spec);
    pod(
        "pending",
        json!({"nodeSelector": {"nowhere": "x"}, "containers": container("sleep 1000")}),
    )?;
    pod(
        "done",
        json!({"nodeName": "node1", "restartPolicy": "Never", "containers": container("true")}),
    )?;
    pod(
        "crashing",
        json!({"nodeName": "node1", "containers": container("exit 1")}),
    )?;
    pod(
        "hostpid",
        json!({"nodeName": "node1", "hostPID": true, "terminationGracePeriodSeconds": 0, "containers": container("sleep 1000")}),
    )?;
    let mut init = container("true");
    init[0]["name"] = json!("setup");
    pod(
        "withinit",
        json!({"nodeName": "node1", "terminationGracePeriodSeconds": 0, "initContainers": init, "containers": container("sleep 1000")}),
    )?;
    for running in ["hostpid", "withinit"] {
        kubectl(&[
            "-n",
            &namespace.0,
            "wait",
            "--for=condition=Ready",
            &format!("pod/{running}"),
            "--timeout=60s",
        ])?;
    }
    eventually(Duration::from_secs(120), || {
        ensure!(get(&namespace.0, "pod", "done")?["status"]["phase"] == "Succeeded");
        let crashing = get(&namespace.0, "pod", "crashing")?;
        let container = &crashing["status"]["containerStatuses"][0];
        // Terminated or, a little later, waiting in CrashLoopBackOff: it does not run, and has been tried again.
        ensure!(container["restartCount"].as_i64() >= Some(1) && container["state"]["running"].is_null());
        Ok(())
    })?;
    let cases = [
        ("missing", json!({"sourcePodName": "nobody"}), "PodNotFound"),
        ("pending", json!({"sourcePodName": "pending"}), "PodNotRunning"),
        ("done", json!({"sourcePodName": "done"}), "PodCompleted"),
        (
            "crashing",
            json!({"sourcePodName": "crashing"}),
            "ContainerNotRunning",
        ),
        ("hostpid", json!({"sourcePodName": "hostpid"}), "PodHostPid"),
        (
            "init",
            json!({"sourcePodName": "withinit", "containers": ["setup"]}),
            "ContainerNotRegular",
        ),
        (
            "unknown",
            json!({"sourcePodName": "counter", "containers": ["nobody"]}),
            "ContainerNotFound",
        ),
        (
            "replaced",
            json!({"sourcePodName": "counter", "sourcePodUID": "00000000-0000-0000-0000-000000000000"}),
            "SourcePodReplaced",
        ),
    ];
    for (name, spec, reason) in cases {
        let status = namespace.take(name, spec)?;
        assert_described_as(&namespace.0, name, &format!("target-{name}"))?;
        assert_condition(&status, "Stalled", "True", reason);
        assert_eq!(status["reason"], reason);
        assert!(
            !status["failure"]["remedy"]
                .as_str()
                .unwrap_or_default()
                .is_empty(),
            "{status:#}"
        );
        let wait = [
            "-n",
            &namespace.0,
            "wait",
            "--for=condition=Stalled",
            &format!("{KIND}/{name}"),
            "--timeout=5s",
        ];
        kubectl(&wait)?;
    }
    Ok(())
}

#[test]
fn bad_specifications_are_refused_at_admission() -> Result<()> {
    let namespace = Namespace::new("admission")?;
    let cases = [
        (json!({}), "sourcePodName"),
        (json!({"sourcePodName": "../etc"}), "sourcePodName"),
        (json!({"sourcePodName": "other/pod"}), "sourcePodName"),
        (
            json!({"sourcePodName": "p", "timeoutSeconds": 0}),
            "timeoutSeconds",
        ),
        (
            json!({"sourcePodName": "p", "timeoutSeconds": 3601}),
            "timeoutSeconds",
        ),
        (json!({"sourcePodName": "p", "containers": []}), "containers"),
        (
            json!({"sourcePodName": "p", "containers": ["a", "a"]}),
            "Duplicate",
        ),
        (json!({"sourcePodName": "p", "containers": ["A_b"]}), "containers"),
        (json!({"sourcePodName": "p", "method": "Magic"}), "method"),
    ];
    for (spec, words) in cases {
        let manifest = document(
            &namespace.0,
            "podcheckpoint.dev/v1alpha1",
            "PodCheckpoint",
            "bad",
            &spec,
        );
        let answer = kubectl_refused(&["create", "-f", "-"], &manifest)?;
        assert!(answer.contains(words), "{spec}: {answer}");
    }
    namespace.take("missing", json!({"sourcePodName": "nobody"}))?;
    let edit = r#"{"spec":{"timeoutSeconds":5}}"#;
    let answer = kubectl_refused(
        &[
            "-n",
            &namespace.0,
            "patch",
            KIND,
            "missing",
            "--type=merge",
            "-p",
            edit,
        ],
        "",
    )?;
    assert!(answer.contains("spec is immutable"), "{answer}");
    Ok(())
}

#[test]
fn who_may_not_exec_may_not_checkpoint() -> Result<()> {
    let namespace = Namespace::new("rbac")?;
    let n = namespace.0.as_str();
    kubectl(&["-n", n, "create", "serviceaccount", "user"])?;
    let subject = format!("--serviceaccount={n}:user");
    kubectl(&[
        "-n",
        n,
        "create",
        "rolebinding",
        "edit",
        "--clusterrole=podcheckpoint-editor",
        &subject,
    ])?;
    let user = format!("--as=system:serviceaccount:{n}:user");
    let manifest = document(
        n,
        "podcheckpoint.dev/v1alpha1",
        "PodCheckpoint",
        "mine",
        &json!({"sourcePodName": "p"}),
    );
    let answer = kubectl_refused(&["create", "-f", "-", &user], &manifest)?;
    assert!(answer.contains("pods/exec"), "{answer}");
    kubectl(&[
        "-n",
        n,
        "create",
        "role",
        "exec",
        "--verb=create",
        "--resource=pods/exec",
        "--resource-name=p",
    ])?;
    kubectl(&["-n", n, "create", "rolebinding", "exec", "--role=exec", &subject])?;
    eventually(Duration::from_secs(10), || {
        let answer = kubectl_refused(&["create", "-f", "-", &user], &manifest);
        // It is refused no more, so expecting a refusal fails.
        ensure!(answer.is_err() || get(n, KIND, "mine").is_ok(), "still refused");
        Ok(())
    })
}

#[test]
fn an_agents_token_cannot_touch_an_object_of_another_node() -> Result<()> {
    let namespace = Namespace::new("agent-token")?;
    namespace.counter("counter", "node1")?;
    namespace.take("first", json!({"sourcePodName": "counter"}))?;
    let manifest = json!({
        "apiVersion": "podcheckpoint.dev/v1alpha1", "kind": "PodCheckpoint",
        "metadata": {"name": "first", "namespace": namespace.0}, "status": {"frozen": "forged"},
    })
    .to_string();
    let act = |node: &str| {
        let extra = format!("--as-user-extra=authentication.kubernetes.io/node-name={node}");
        let user = "--as=system:serviceaccount:podcheckpoint-system:podcheckpoint-agent";
        // A merge by kubectl would read first, and the agent may only patch.
        let server_side = [
            "apply",
            "--server-side",
            "--subresource=status",
            "--force-conflicts",
            "-f",
            "-",
        ];
        apply_with(
            &[&server_side[..], &["--field-manager=forger", user, &extra]].concat(),
            &manifest,
        )
    };
    let refused = format!(
        "{:#}",
        act("node2").expect_err("an agent of node2 wrote to an object of node1")
    );
    assert!(refused.contains("node2"), "{refused}");
    act("node1")
}

#[test]
fn an_archive_goes_with_its_object_unless_it_is_to_be_kept() -> Result<()> {
    let namespace = Namespace::new("deletion")?;
    namespace.counter("counter", "node1")?;
    for (policy, kept) in [("Delete", false), ("Retain", true)] {
        let name = policy.to_lowercase();
        let status = namespace.take(
            &name,
            json!({"sourcePodName": "counter", "deletionPolicy": policy}),
        )?;
        let path = archive(&status, "main");
        kubectl(&["-n", &namespace.0, "delete", KIND, &name, "--timeout=30s"])?;
        assert_eq!(
            on_node("node1", &format!("test -e {path}")).is_ok(),
            kept,
            "{policy}"
        );
        on_node("node1", &format!("rm -rf $(dirname {path})"))?;
    }
    let status = namespace.take(
        "short",
        json!({"sourcePodName": "counter", "ttlSecondsAfterFinished": 1}),
    )?;
    assert_condition(&status, "Ready", "True", "CheckpointCompleted");
    eventually(Duration::from_secs(20), || {
        ensure!(
            get(&namespace.0, KIND, "short").is_err(),
            "outlived its time to live"
        );
        Ok(())
    })
}

#[test]
fn validate_only_takes_nothing() -> Result<()> {
    let namespace = Namespace::new("validate")?;
    namespace.counter("counter", "node1")?;
    let status = namespace.take("look", json!({"sourcePodName": "counter", "validateOnly": true}))?;
    assert_condition(&status, "Ready", "True", "ValidationCompleted");
    assert_described_as(&namespace.0, "look", "success-validate-only")?;
    assert!(
        status["checkpointLocation"].is_null() && status["frozen"].is_null(),
        "{status:#}"
    );
    Ok(())
}

fn agents_pid() -> Result<String> {
    let pid = on_node("node1", "pgrep -f '^/podcheckpoint-agent run'")?;
    pid.split_whitespace()
        .next()
        .map(str::to_owned)
        .context("no agent runs")
}

fn killed_agent(namespace: &Namespace, name: &str, method: &str, after: Duration) -> Result<()> {
    // A new pod each time: the kubelet would wait ever longer before it starts a killed container again.
    without_agents()?;
    namespace.checkpoint(
        name,
        json!({"sourcePodName": "heavy", "method": method, "timeoutSeconds": 60}),
    )?;
    eventually(Duration::from_secs(20), || {
        // Not only Writing: a dump may be over before this looks, and then there is nothing to interrupt.
        ensure!(!get(&namespace.0, KIND, name)?["status"]["archiveState"].is_null());
        Ok(())
    })?;
    std::thread::sleep(after);
    on_node("node1", &format!("kill -KILL {}", agents_pid()?))?;
    std::thread::sleep(Duration::from_secs(1));
    assert_undisturbed(&uid(&namespace.0, "pod", "heavy")?)?;
    let status = namespace.ended(name)?;
    let (stalled, reason) = condition(&status, "Stalled");
    let finished_before = condition(&status, "Ready").0 == "True";
    ensure!(
        finished_before || (stalled == "True" && reason == "AgentInterrupted"),
        "{status:#}"
    );
    namespace.assert_source_went_on("heavy", "main")
}

#[test]
fn a_killed_agent_leaves_the_target_running_and_never_dumps_twice() -> Result<()> {
    let namespace = Namespace::new("agent-killed")?;
    namespace.pod("heavy", "node1", &[("main", HEAVY)])?;
    namespace.count("heavy", "main")?;
    for (number, milliseconds) in [0, 150, 500, 2000].into_iter().enumerate() {
        for method in ["CRI", "Direct", "Kubelet"] {
            let name = format!("{}-{number}", method.to_lowercase());
            killed_agent(&namespace, &name, method, Duration::from_millis(milliseconds)).context(name)?;
            // containerd goes on for a while, whoever is gone; the kubelet deletes nothing.
            eventually(Duration::from_secs(20), || {
                let left = on_node("node1", "find /var/lib/kubelet/checkpoints -type f")?;
                ensure!(left.is_empty(), "{method} left {left}");
                Ok(())
            })?;
        }
    }
    let status = namespace.take("after", json!({"sourcePodName": "heavy"}))?;
    assert_ready("node1", &status)
}

#[test]
fn a_killed_controller_finishes_the_checkpoint_once() -> Result<()> {
    let namespace = Namespace::new("controller-killed")?;
    namespace.pod("heavy", "node1", &[("main", HEAVY)])?;
    namespace.checkpoint("first", json!({"sourcePodName": "heavy"}))?;
    let controller = "app.kubernetes.io/component=controller";
    kubectl(&[
        "-n",
        OPERATOR,
        "delete",
        "pod",
        "-l",
        controller,
        "--force",
        "--grace-period=0",
    ])?;
    let status = namespace.ended("first")?;
    assert_ready("node1", &status)?;
    namespace.assert_source_went_on("heavy", "main")
}

#[test]
fn a_deadline_ends_the_dump_and_the_target_runs() -> Result<()> {
    let namespace = Namespace::new("deadline")?;
    namespace.pod("heavy", "node1", &[("main", HEAVY)])?;
    namespace.count("heavy", "main")?;
    let status = namespace.take("late", json!({"sourcePodName": "heavy", "timeoutSeconds": 1}))?;
    assert_failed(&status, "Dump", "DeadlineExceeded");
    assert_condition(&status, "SourceRunning", "True", "SourceRuns");
    namespace.assert_source_went_on("heavy", "main")
}

#[test]
fn two_checkpoints_of_one_pod_at_once_never_dump_at_the_same_time() -> Result<()> {
    let namespace = Namespace::new("at-once")?;
    namespace.pod("heavy", "node1", &[("main", HEAVY)])?;
    namespace.count("heavy", "main")?;
    for name in ["one", "other"] {
        namespace.checkpoint(name, json!({"sourcePodName": "heavy"}))?;
    }
    let ends = [namespace.ended("one")?, namespace.ended("other")?];
    let reasons: Vec<_> = ends
        .iter()
        .map(|s| s["reason"].as_str().unwrap_or_default())
        .collect();
    assert!(reasons.contains(&"CheckpointCompleted"), "{reasons:?}");
    assert!(
        reasons
            .iter()
            .all(|r| ["CheckpointCompleted", "TargetBusy"].contains(r)),
        "{reasons:?}"
    );
    namespace.assert_source_went_on("heavy", "main")
}

#[test]
fn a_pod_under_a_debugger_is_refused_at_once_and_the_debugger_is_named() -> Result<()> {
    let namespace = Namespace::new("traced")?;
    namespace.counter("counter", "node1")?;
    let uid = get(&namespace.0, "pod", "counter")?["metadata"]["uid"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    // A debugger that somebody else has attached: the classic of a denied ptrace.
    let attach = format!(
        "for p in $(find /sys/fs/cgroup/freezer -path '*pod{uid}*' -name cgroup.procs -exec cat {{}} +); do
           [ \"$(cat /proc/$p/comm)\" != sh ] || echo $p; done"
    );
    let target = on_node("node1", &attach)?.trim().to_owned();
    let strace = format!("strace -p {target} -o /dev/null >/dev/null 2>&1 & echo $!; sleep 1");
    let tracer = on_node("node1", &strace)?.trim().to_owned();
    let outcome = (|| {
        let status = namespace.take("traced", json!({"sourcePodName": "counter"}))?;
        assert_condition(&status, "Stalled", "True", "AlreadyTraced");
        assert_condition(&status, "PtraceValidated", "False", "AlreadyTraced");
        assert_condition(&status, "SourceRunning", "False", "SourceTraced");
        let message = status["failure"]["message"].as_str().unwrap_or_default();
        ensure!(
            message.contains(&format!("process {tracer} (strace)")),
            "{message}"
        );
        ensure!(status["frozen"].is_null(), "frozen for what cannot work");
        Ok(())
    })();
    on_node("node1", &format!("kill {tracer}"))?;
    outcome?;
    namespace.assert_source_went_on("counter", "main")?;
    let status = namespace.take("after", json!({"sourcePodName": "counter"}))?;
    assert_ready("node1", &status)
}
