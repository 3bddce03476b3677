//! Pods that cannot be traced, each for a real reason: `kubectl describe` alone names the cause and the remedy, and the
//! pod is left as it was. Needs what `tests/cluster.rs` needs.
#![cfg(feature = "cluster")]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null; a panic is a failed test"
)]

use std::time::Duration;

use anyhow::{Result, ensure};
use podcheckpoint_e2e::scenario::{
    IMAGE, KIND, Namespace, Undo, assert_condition, assert_failed, assert_ready, assert_undisturbed,
    condition,
};
use podcheckpoint_e2e::security::take_patiently;
use podcheckpoint_e2e::{eventually, get, kubectl, on_node, put_program, uid};
use serde_json::{Value, json};

/// Where the test programs are on a node and in the pods.
const PROGRAMS: &str = "/run/podcheckpoint-test";

/// A pod whose only process is a target of the probe's fixtures.
fn fixture_pod(namespace: &Namespace, node: &str, mode: &str) -> Result<()> {
    let command = [
        "sh",
        "-c",
        &format!("exec {PROGRAMS}/probe-fixture target /tmp/progress {mode}"),
    ]
    .map(str::to_owned);
    namespace.manifest("v1", "Pod", mode, json!({
        // One that is started again while its pod is deleted could be what the runtime cannot end, see below.
        "nodeName": node, "terminationGracePeriodSeconds": 0, "restartPolicy": "Never",
        "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": command,
            "volumeMounts": [{"name": "programs", "mountPath": PROGRAMS}, {"name": "tmp", "mountPath": "/tmp"}]}],
        "volumes": [{"name": "programs", "hostPath": {"path": PROGRAMS}}, {"name": "tmp", "emptyDir": {}}],
    }))
}

/// The fixture has said on its standard output that its cause is there.
fn ready(namespace: &Namespace, pod: &str) -> Result<()> {
    eventually(Duration::from_secs(180), || {
        let log = kubectl(&["-n", &namespace.0, "logs", pod])?;
        ensure!(log.starts_with("ready"), "{pod} says {log:?}");
        Ok(())
    })
}

/// Shell words that print the main process of a pod's container, on its node.
fn main_process(namespace: &Namespace, node: &str, pod: &str, name: &str) -> Result<String> {
    let uid = uid(&namespace.0, "pod", pod)?;
    let script = format!(
        "for p in $(find /sys/fs/cgroup -path '*pod{uid}*' -name cgroup.procs -exec cat {{}} + | sort -un); do
           [ \"$(cat /proc/$p/comm)\" != {name} ] || echo $p; done | head -n 1"
    );
    let pid = on_node(node, &script)?.trim().to_owned();
    ensure!(!pid.is_empty(), "no process {name} of {pod}");
    Ok(pid)
}

fn validate(namespace: &Namespace, name: &str, pod: &str) -> Result<Value> {
    namespace.take(name, json!({"sourcePodName": pod, "validateOnly": true}))
}

/// What a user sees, and nothing else: the reason, the evidence, and what to do.
fn assert_described(
    namespace: &Namespace,
    name: &str,
    status: &Value,
    reason: &str,
    evidence: &[&str],
) -> Result<()> {
    assert_condition(status, "PtraceValidated", "False", reason);
    assert_condition(status, "Stalled", "True", reason);
    ensure!(
        status["frozen"].is_null(),
        "it was frozen for nothing: {status:#}"
    );
    let described = kubectl(&["-n", &namespace.0, "describe", KIND, name])?;
    let remedy = status["failure"]["remedy"].as_str().unwrap_or_default();
    ensure!(!remedy.is_empty(), "no remedy: {status:#}");
    for words in evidence.iter().chain([&reason, &remedy]) {
        ensure!(described.contains(words), "{name}: no {words:?} in\n{described}");
    }
    Ok(())
}

#[test]
fn a_stale_cache_of_the_nodes_criu_is_named_until_the_remedy_is_followed() -> Result<()> {
    const CACHE: &str = "/run/criu.kdat";
    put_program("node1", "probe-fixture", PROGRAMS)?;
    let namespace = Namespace::new("stale-cache")?;
    namespace.counter("counter", "node1")?;
    let _true_again = Undo(|| drop(on_node("node1", &format!("rm -f {CACHE}"))));
    // As when CRIU has first run under a profile that does not know clone3.
    let write = format!(
        "rm -f {CACHE}; {PROGRAMS}/probe-fixture under without-clone3 criu check > /dev/null 2>&1; test -s {CACHE}"
    );
    on_node("node1", &write)?;
    let stale = validate(&namespace, "stale", "counter")?;
    let evidence = ["only with /run/criu.kdat", "clone3() with set_tid not supported"];
    assert_described(&namespace, "stale", &stale, "CriuCacheStale", &evidence)?;

    on_node("node1", &format!("rm {CACHE}"))?;
    let status = validate(&namespace, "removed", "counter")?;
    assert_condition(&status, "PtraceValidated", "True", "PtraceWorks");
    namespace.assert_source_went_on("counter", "main")
}

fn refuses_on(node: &str) -> Result<()> {
    put_program(node, "probe-fixture", PROGRAMS)?;
    let namespace = Namespace::new(&format!("unprobeable-{node}"))?;
    let cases: [(&str, &str, &[&str]); 6] = [
        ("pending-trap", "PendingSigtrap", &["SIGTRAP is pending"]),
        ("zombie-leader", "TargetExiting", &["first thread"]),
        ("vfork", "TargetUninterruptible", &["state D", "vfork"]),
        (
            "exec",
            "AlreadyTraced",
            &["(probe-fixture)", "TargetExecInProgress"],
        ),
        (
            "listener",
            "SeccompListenerNotRestorable",
            &["USER_NOTIF", "allowDegraded"],
        ),
        ("threads", "", &[]),
    ];
    for (mode, ..) in cases {
        fixture_pod(&namespace, node, mode)?;
    }
    for (mode, reason, evidence) in cases {
        ready(&namespace, mode)?;
        let status = validate(&namespace, mode, mode)?;
        if reason.is_empty() {
            assert_condition(&status, "Ready", "True", "ValidationCompleted");
            assert_condition(&status, "PtraceValidated", "True", "PtraceWorks");
        } else {
            assert_described(&namespace, mode, &status, reason, evidence)?;
        }
        let pod = get(&namespace.0, "pod", mode)?;
        ensure!(
            pod["status"]["phase"] == "Running" && pod["status"]["containerStatuses"][0]["restartCount"] == 0,
            "{mode} does not go on: {:#}",
            pod["status"]
        );
    }
    // The runtime takes a process whose first thread has ended for one that has ended, and would let the others be.
    let pid = main_process(&namespace, node, "zombie-leader", "probe-fixture")?;
    on_node(node, &format!("kill -KILL {pid}")).map(drop)
}

#[test]
fn what_stands_in_the_way_of_ptrace_is_described_on_cgroup_v1() -> Result<()> {
    refuses_on("node1")
}

#[test]
fn what_stands_in_the_way_of_ptrace_is_described_on_cgroup_v2() -> Result<()> {
    refuses_on("node2")
}

/// What only CRIU's own code meets, inside the target: CRIU's words are made into a reason, and the remedy names the
/// command that finds the call. The operator itself executes nothing in a pod.
#[test]
fn what_a_target_does_not_let_criu_do_inside_it_has_a_reason_of_its_own() -> Result<()> {
    put_program("node1", "probe-fixture", PROGRAMS)?;
    let namespace = Namespace::new("inside")?;
    let cases = [("no-files", "memfd"), ("scoped", "connect a transport socket")];
    for (mode, words) in cases {
        fixture_pod(&namespace, "node1", mode)?;
        ready(&namespace, mode)?;
        let status = namespace.take(mode, json!({"sourcePodName": mode}))?;
        assert_condition(&status, "PtraceValidated", "True", "PtraceWorks");
        assert_failed(&status, "Dump", "ParasiteRejected");
        assert_condition(&status, "SourceRunning", "True", "SourceRuns");
        let message = status["failure"]["message"].as_str().unwrap_or_default();
        let remedy = status["failure"]["remedy"].as_str().unwrap_or_default();
        ensure!(
            message.contains(words) && remedy.contains("--inject"),
            "{message} {remedy}"
        );
        assert_undisturbed(&uid(&namespace.0, "pod", mode)?)?;
        // What CRIU leaves in a process when it fails there does not make the next verdict another one.
        let again = validate(&namespace, &format!("{mode}-again"), mode)?;
        assert_condition(&again, "PtraceValidated", "True", "PtraceWorks");
    }
    Ok(())
}

#[test]
fn a_degraded_verdict_is_accepted_only_when_the_user_says_so() -> Result<()> {
    put_program("node1", "probe-fixture", PROGRAMS)?;
    let namespace = Namespace::new("degraded")?;
    fixture_pod(&namespace, "node1", "listener")?;
    ready(&namespace, "listener")?;
    let refused = namespace.take("refused", json!({"sourcePodName": "listener"}))?;
    assert_condition(&refused, "Stalled", "True", "SeccompListenerNotRestorable");
    let accepted = namespace.take(
        "accepted",
        json!({"sourcePodName": "listener", "allowDegraded": true}),
    )?;
    // It is attempted; what CRIU makes of it is CRIU's.
    assert_condition(
        &accepted,
        "PtraceValidated",
        "False",
        "SeccompListenerNotRestorable",
    );
    ensure!(!accepted["frozen"].is_null(), "not attempted: {accepted:#}");
    assert_condition(&accepted, "SourceRunning", "True", "SourceRuns");
    Ok(())
}

// --- frozen and stopped, from the node -----------------------------------------------------------------------------

/// Folder of a container's or a pod's freezer on a node.
fn freezer(namespace: &Namespace, node: &str, pod: &str, of_pod: bool) -> Result<String> {
    let uid = uid(&namespace.0, "pod", pod)?;
    let file = if node == "node1" {
        "freezer.state"
    } else {
        "cgroup.freeze"
    };
    let root = if node == "node1" {
        "/sys/fs/cgroup/freezer"
    } else {
        "/sys/fs/cgroup"
    };
    let pid = main_process(namespace, node, pod, "sh")?;
    let key = if node == "node1" { ":freezer:" } else { "0::" };
    let script = format!("sed -n 's/^.*{key}//p' /proc/{pid}/cgroup | tail -n 1");
    let path = on_node(node, &script)?.trim().to_owned();
    let path = if of_pod {
        path.rsplit_once('/')
            .map_or(path.clone(), |(above, _)| above.to_owned())
    } else {
        path
    };
    ensure!(path.contains(&uid), "{path} is not of pod {uid}");
    Ok(format!("{root}{path}/{file}"))
}

fn frozen_on(node: &str, of_pod: bool, stopped: bool) -> Result<()> {
    let what = if of_pod { "pod" } else { "container" };
    let namespace = Namespace::new(&format!("frozen-{node}-{what}-{stopped}"))?;
    namespace.counter("counter", node)?;
    let (freeze, thaw) = if node == "node1" {
        ("FROZEN", "THAWED")
    } else {
        ("1", "0")
    };
    let file = freezer(&namespace, node, "counter", of_pod)?;
    let pid = main_process(&namespace, node, "counter", "sh")?;
    if stopped {
        on_node(node, &format!("kill -STOP {pid}; sleep 0.2"))?;
    }
    on_node(node, &format!("echo {freeze} > {file}; sleep 0.2"))?;
    let outcome = validate(&namespace, "look", "counter").and_then(|status| {
        let reason = if stopped {
            "TargetFrozenStopped"
        } else {
            "TargetFrozen"
        };
        let folder = file.rsplit_once('/').map_or("", |(folder, _)| folder);
        assert_described(&namespace, "look", &status, reason, &[folder])?;
        // Somebody froze it, and not we: it is left so.
        assert_condition(&status, "SourceRunning", "False", "SourceFrozen");
        ensure!(
            on_node(node, &format!("cat {file}"))?.trim() == freeze,
            "it was thawed"
        );
        Ok(())
    });
    on_node(node, &format!("echo {thaw} > {file}; kill -CONT {pid}"))?;
    outcome?;
    namespace.assert_source_went_on("counter", "main")
}

#[test]
fn a_container_frozen_by_cgroup_v1_is_refused_and_left_as_it_is() -> Result<()> {
    frozen_on("node1", false, false)
}

#[test]
fn a_stopped_and_frozen_container_is_refused_and_left_as_it_is() -> Result<()> {
    frozen_on("node1", false, true)
}

#[test]
fn a_container_frozen_by_cgroup_v2_is_refused_and_left_as_it_is() -> Result<()> {
    frozen_on("node2", false, false)
}

#[test]
fn a_pod_frozen_above_its_container_is_refused_and_the_cgroup_is_named() -> Result<()> {
    frozen_on("node2", true, false)
}

#[test]
fn a_stopped_process_is_told_and_stays_stopped() -> Result<()> {
    let namespace = Namespace::new("stopped")?;
    namespace.counter("counter", "node1")?;
    let pid = main_process(&namespace, "node1", "counter", "sh")?;
    on_node("node1", &format!("kill -STOP {pid}; sleep 0.2"))?;
    let outcome = validate(&namespace, "look", "counter").and_then(|status| {
        assert_described(
            &namespace,
            "look",
            &status,
            "TargetStopped",
            &["stopped by a signal"],
        )?;
        let state = on_node("node1", &format!("grep State /proc/{pid}/status"))?;
        ensure!(state.contains("T (stopped)"), "{state}");
        Ok(())
    });
    on_node("node1", &format!("kill -CONT {pid}"))?;
    outcome?;
    namespace.assert_source_went_on("counter", "main")
}

// --- the same probe, by hand in a container ------------------------------------------------------------------------

/// Runs the probe by `kubectl exec`; its findings.
fn probe_in(namespace: &Namespace, pod: &str, container: &str, pid: &str) -> Result<Value> {
    let script = format!("{PROGRAMS}/podcheckpoint-probe --json --pid {pid} | tail -n 1");
    let line = kubectl(&[
        "-n",
        &namespace.0,
        "exec",
        pod,
        "-c",
        container,
        "--",
        "sh",
        "-c",
        &script,
    ])?;
    let report: Value = serde_json::from_str(&line)?;
    Ok(report["verdict"]["findings"][0].clone())
}

/// A pod with a target and, in the same process namespace, a container to probe from.
fn pair(namespace: &Namespace, name: &str, security: Value) -> Result<()> {
    let container = |name: &str, security: &Value| {
        json!({"name": name, "image": IMAGE, "imagePullPolicy": "Never", "command": ["sleep", "100000"], "securityContext": security,
               "volumeMounts": [{"name": "programs", "mountPath": PROGRAMS}, {"name": "kmsg", "mountPath": "/dev/kmsg"}]})
    };
    let target = container("target", &json!({"runAsUser": 0}));
    let tracer = container("tracer", &security);
    namespace.manifest("v1", "Pod", name, json!({
        "nodeName": "node2", "terminationGracePeriodSeconds": 0, "shareProcessNamespace": true,
        "containers": [target, tracer],
        "volumes": [{"name": "programs", "hostPath": {"path": PROGRAMS}}, {"name": "kmsg", "hostPath": {"path": "/dev/kmsg"}}],
    }))?;
    kubectl(&[
        "-n",
        &namespace.0,
        "wait",
        "--for=condition=Ready",
        &format!("pod/{name}"),
        "--timeout=90s",
    ])
    .map(drop)
}

/// Number of the target's process in the shared namespace: the first sleep, as containers start in their order.
fn target_of(namespace: &Namespace, pod: &str) -> Result<String> {
    let find = "for p in $(ls /proc | grep '^[0-9]' | sort -n); do
      [ \"$(cat /proc/$p/comm)\" != sleep ] || { echo $p; break; }; done";
    Ok(kubectl(&[
        "-n",
        &namespace.0,
        "exec",
        pod,
        "-c",
        "tracer",
        "--",
        "sh",
        "-c",
        find,
    ])?
    .trim()
    .to_owned())
}

fn yama(scope: i32) -> Result<()> {
    on_node("node2", &format!("sysctl -qw kernel.yama.ptrace_scope={scope}")).map(drop)
}

#[test]
fn yama_1_and_2_stop_only_a_tracer_without_the_capability() -> Result<()> {
    put_program("node2", "podcheckpoint-probe", PROGRAMS)?;
    let namespace = Namespace::new("yama")?;
    namespace.counter("counter", "node2")?;
    pair(&namespace, "plain", json!({"runAsUser": 0}))?;
    pair(
        &namespace,
        "capable",
        json!({"capabilities": {"add": ["SYS_PTRACE"]}}),
    )?;
    let outcome = (|| {
        for scope in [1, 2] {
            yama(scope)?;
            let plain = probe_in(&namespace, "plain", "tracer", &target_of(&namespace, "plain")?)?;
            ensure!(plain["reason"] == "YamaScopeRestricted", "{scope}: {plain:#}");
            let capable = probe_in(
                &namespace,
                "capable",
                "tracer",
                &target_of(&namespace, "capable")?,
            )?;
            ensure!(capable["reason"] == "PtraceWorks", "{scope}: {capable:#}");
            // The agent has the capability, so that the setting is no cause and is not called one.
            let status = validate(&namespace, &format!("scope-{scope}"), "counter")?;
            assert_condition(&status, "PtraceValidated", "True", "PtraceWorks");
        }
        Ok(())
    })();
    yama(0)?;
    outcome
}

#[test]
fn apparmor_is_named_with_the_line_of_the_kernels_log() -> Result<()> {
    put_program("node2", "podcheckpoint-probe", PROGRAMS)?;
    let namespace = Namespace::new("apparmor")?;
    // Two containers of the default profile may trace each other: the target is made unconfined.
    let container = |name: &str, security: Value| {
        json!({"name": name, "image": IMAGE, "imagePullPolicy": "Never", "command": ["sleep", "100000"], "securityContext": security,
               "volumeMounts": [{"name": "programs", "mountPath": PROGRAMS}, {"name": "kmsg", "mountPath": "/dev/kmsg"}]})
    };
    let capabilities = json!({"add": ["SYS_PTRACE", "SYSLOG"]});
    namespace.manifest("v1", "Pod", "pair", json!({
        "nodeName": "node2", "terminationGracePeriodSeconds": 0, "shareProcessNamespace": true,
        "containers": [container("target", json!({"appArmorProfile": {"type": "Unconfined"}})),
                       container("tracer", json!({"capabilities": capabilities}))],
        "volumes": [{"name": "programs", "hostPath": {"path": PROGRAMS}}, {"name": "kmsg", "hostPath": {"path": "/dev/kmsg"}}],
    }))?;
    kubectl(&[
        "-n",
        &namespace.0,
        "wait",
        "--for=condition=Ready",
        "pod/pair",
        "--timeout=90s",
    ])?;
    let finding = probe_in(&namespace, "pair", "tracer", &target_of(&namespace, "pair")?)?;
    ensure!(finding["reason"] == "AppArmorDenied", "{finding:#}");
    let evidence = finding["evidence"].as_str().unwrap_or_default();
    ensure!(evidence.contains("cri-containerd.apparmor.d"), "{evidence}");
    Ok(())
}

#[test]
fn a_bpf_program_that_denies_ptrace_to_the_whole_node_is_named() -> Result<()> {
    put_program("node2", "probe-fixture", PROGRAMS)?;
    let namespace = Namespace::new("bpf-lsm")?;
    namespace.counter("counter", "node2")?;
    let start = format!(
        "setsid {PROGRAMS}/probe-fixture under bpf-lsm-for-all sleep 1000 < /dev/null > /run/e2e-bpf.log 2>&1 & p=$!
         for i in $(seq 300); do [ \"$(cat /proc/$p/comm)\" != sleep ] || break; sleep 0.1; done; cat /run/e2e-bpf.log >&2; echo $p"
    );
    let pid = on_node("node2", &start)?.trim().to_owned();
    let undo = Undo(|| {
        let _ = on_node("node2", &format!("kill -KILL {pid}"));
    });
    let (_, status) = take_patiently(&namespace, "first", &json!({"sourcePodName": "counter"}))?;
    drop(undo);
    assert_failed(&status, "ValidatePtrace", "BpfLsmDenied");
    let said = status["failure"]["message"].as_str().unwrap_or_default();
    ensure!(said.contains("deny_tracing"), "{said}");
    let (_, after) = take_patiently(&namespace, "after", &json!({"sourcePodName": "counter"}))?;
    assert_ready("node2", &after)?;
    namespace.assert_source_went_on("counter", "main")
}

#[test]
fn the_node_says_what_it_can_checkpoint() -> Result<()> {
    let namespace = Namespace::new("capability")?;
    for node in ["node1", "node2"] {
        namespace.counter(node, node)?;
        validate(&namespace, node, node)?;
        let report = eventually(Duration::from_secs(20), || {
            let report = get("", "checkpointnodes.podcheckpoint.dev", node)?;
            ensure!(!report["status"]["checkedTime"].is_null(), "not filled");
            Ok(report)
        })?;
        assert_eq!(
            condition(&report["status"], "Ready"),
            ("True".into(), "PtraceWorks".into()),
            "{report:#}"
        );
        ensure!(
            report["status"]["summary"]
                .as_str()
                .is_some_and(|s| s.contains("default: CRI, Kubelet, Direct")),
            "{report:#}"
        );
        ensure!(
            report["metadata"]["ownerReferences"][0]["kind"] == "Node",
            "{report:#}"
        );
    }
    let table = kubectl(&["get", "checkpointnodes.podcheckpoint.dev"])?;
    ensure!(table.contains("CRIU") && table.contains("HANDLERS"), "{table}");
    Ok(())
}
