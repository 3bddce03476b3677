//! Pods in real virtual machines, on node1: a snapshot is taken through the operator and restored in a new machine, and
//! what stands in the way of one has its reason.
#![cfg(feature = "cluster")]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null and never panics"
)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podcheckpoint_e2e::scenario::{
    COUNT, IMAGE, Namespace, archive, assert_condition, assert_failed, assert_ready, condition,
    without_agents,
};
use podcheckpoint_e2e::{eventually, get, kubectl, on_node};
use serde_json::{Value, json};

/// A pod with one container, `main`, in a machine of a RuntimeClass.
fn pod(space: &Namespace, name: &str, class: &str, script: &str) -> Result<()> {
    let container =
        json!({"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", script]});
    space.manifest(
        "v1",
        "Pod",
        name,
        json!({"runtimeClassName": class, "terminationGracePeriodSeconds": 0, "containers": [container]}),
    )?;
    let wait = [
        "-n",
        &space.0,
        "wait",
        "--for=condition=Ready",
        &format!("pod/{name}"),
        "--timeout=180s",
    ];
    kubectl(&wait).map(drop)
}

/// The pod counts on and was never restarted. A machine without hardware help is slow on one that does other things too.
fn goes_on(space: &Namespace, pod: &str) -> Result<()> {
    let count = || eventually(Duration::from_secs(60), || space.count(pod, "main"));
    let before = count().context("before")?;
    eventually(Duration::from_secs(60), || {
        let now = space.count(pod, "main")?;
        ensure!(now > before, "the counter stands at {before}");
        Ok(())
    })?;
    let pod = get(&space.0, "pod", pod)?;
    let restarts = &pod["status"]["containerStatuses"][0]["restartCount"];
    ensure!(*restarts == 0, "restarted: {restarts}");
    Ok(())
}

/// A new machine from an archive, with sockets of its own. Its console is on two pipes.
struct Restored;

impl Restored {
    /// As manifest.json says: the same arguments, with other places for sockets, and a state to come up from.
    fn start(archive: &str, id: &str) -> Result<Self> {
        let manifest = on_node("node1", &format!("cat {archive}/manifest.json"))?;
        let manifest: Value = serde_json::from_str(&manifest)?;
        ensure!(
            manifest["format"]
                .as_str()
                .is_some_and(|f| f.contains("mapped-ram")),
            "{manifest:#}"
        );
        let source = format!("/run/vc/vm/{id}/");
        let words = manifest["commandLine"].as_array().context("no command line")?;
        let words = words.iter().filter_map(Value::as_str).map(|word| {
            let console = format!("socket,id=console,path={source}console.sock,server=on,wait=off");
            word.replace(&console, "pipe,id=console,path=/run/restored/console")
                .replace(&source, "/run/restored/")
        });
        let command: Vec<String> = words.map(|word| format!("'{word}'")).collect();
        let capability = |name: &str| format!(r#"{{"capability":"{name}","state":true}}"#);
        let script = format!(
            r#"rm -rf /run/restored; mkdir /run/restored; cd /run/restored; mkfifo console.in console.out
            (echo '{{"execute":"qmp_capabilities"}}'
             echo '{{"execute":"migrate-set-capabilities","arguments":{{"capabilities":[{}]}}}}'
             echo '{{"execute":"migrate-incoming","arguments":{{"uri":"file:{archive}/vmstate"}}}}'
             while ! grep -q '"status": "paused", "running": false' said 2> /dev/null; do echo '{{"execute":"query-status"}}'; sleep 1; done
             echo '{{"execute":"cont"}}'; sleep 600) | {} -qmp stdio -incoming defer > said 2> errors &
            echo $! > group; (exec sleep 600) > console.in & (exec sleep 600) < console.out & true"#,
            capability("mapped-ram"),
            command.join(" "),
        );
        on_node(
            "node1",
            &format!(
                "setsid sh -c '{}' > /dev/null 2>&1 < /dev/null; true",
                script.replace('\'', r"'\''")
            ),
        )?;
        Ok(Self)
    }

    /// The highest count that any process of the guest has written.
    fn count(&self) -> Result<u64> {
        let ask = "echo 'echo COUNT=$(cat /proc/[0-9]*/root/tmp/n 2>/dev/null | sort -n | tail -n 1)' > /run/restored/console.in
            timeout 3 cat /run/restored/console.out | tr -d '\\r'; true";
        let said = on_node("node1", ask)?;
        let mut counts = said
            .lines()
            .filter_map(|line| line.trim().strip_prefix("COUNT=")?.parse().ok());
        let errors = || on_node("node1", "cat /run/restored/errors /run/restored/said").unwrap_or_default();
        counts
            .next_back()
            .with_context(|| format!("no count in {said:?}; {}", errors()))
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        let end = "for p in $(grep -alE '/run/restored/|^sleep.600' /proc/[0-9]*/cmdline | cut -d/ -f3); do
            case $(cat /proc/$p/comm) in qemu*|sleep) kill -KILL $p;; esac; done; rm -rf /run/restored; true";
        let _ = on_node("node1", end);
    }
}

#[test]
fn a_pod_in_a_machine_is_saved_through_the_operator_and_goes_on_in_a_new_machine() -> Result<()> {
    let space = Namespace::new("machine")?;
    pod(&space, "counter", "kata-tcg-snap", COUNT)?;
    let before = space.count("counter", "main")?;
    let status = space.take(
        "snapshot",
        json!({"sourcePodName": "counter", "method": "VMSnapshot"}),
    )?;
    assert_ready("node1", &status)?;
    // What the node sees of the monitor is no verdict: it is the guest's, or there is none.
    let validated = condition(&status, "PtraceValidated");
    let found = status["conditions"]
        .to_string()
        .contains("in the guest, by the debug console");
    ensure!(
        (validated.0 == "True" && found) || validated.0 == "Unknown",
        "{status:#}"
    );
    let sandbox = &status["runtime"]["sandbox"];
    ensure!(
        sandbox["kind"] == "Kata" && sandbox["vmm"] == "QEMU",
        "{sandbox:#}"
    );
    goes_on(&space, "counter")?;

    let archive = archive(&status, "main");
    on_node(
        "node1",
        &format!("cd {archive} && sha256sum --check --quiet SHA256SUMS"),
    )?;
    let manifest: Value = serde_json::from_str(&on_node("node1", &format!("cat {archive}/manifest.json"))?)?;
    let id = manifest["of"]["sandbox"].as_str().context("no sandbox")?;
    let restored = Restored::start(&archive, id)?;
    let first = eventually(Duration::from_secs(90), || restored.count())?;
    let source = space.count("counter", "main")?;
    ensure!(
        first >= before && first < source,
        "{before} <= {first} < {source}"
    );
    eventually(Duration::from_secs(30), || {
        ensure!(restored.count()? > first, "it stands at {first}");
        Ok(())
    })?;
    goes_on(&space, "counter")
}

#[test]
fn a_machine_whose_agent_is_killed_while_it_is_paused_runs_again() -> Result<()> {
    let space = Namespace::new("machine-killed")?;
    let fill = format!("dd if=/dev/urandom of=/dev/shm/x bs=1M count=60 2>/dev/null; {COUNT}");
    pod(&space, "counter", "kata-tcg-snap", &fill)?;
    eventually(Duration::from_secs(60), || space.count("counter", "main"))?;
    without_agents()?;
    space.checkpoint(
        "snapshot",
        json!({"sourcePodName": "counter", "method": "VMSnapshot"}),
    )?;
    // The state is begun when the machine stands still. The agent is ended at once, in the same shell.
    let killed = on_node(
        "node1",
        "for i in $(seq 3000); do find /var/lib/podcheckpoint/checkpoints/*/vm.partial/vmstate -size +0 2> /dev/null | grep -q . && break; sleep 0.01; done
         for p in $(grep -al '^/podcheckpoint-agent.run' /proc/[0-9]*/cmdline | cut -d/ -f3); do kill -KILL $p && echo $p; done",
    )?;
    ensure!(!killed.trim().is_empty(), "no agent was killed");
    let begun = Instant::now();
    goes_on(&space, "counter")?;
    ensure!(begun.elapsed() < Duration::from_secs(90), "{:?}", begun.elapsed());
    let status = space.ended("snapshot")?;
    assert_failed(&status, "Dump", "AgentInterrupted");
    assert_condition(&status, "SourceRunning", "True", "SourceRuns");
    let left = on_node(
        "node1",
        "ls -d /var/lib/podcheckpoint/checkpoints/*/vm.partial 2> /dev/null; true",
    )?;
    ensure!(left.trim().is_empty(), "left: {left}");
    goes_on(&space, "counter")
}

#[test]
fn what_stands_in_the_way_of_a_snapshot_is_named_and_nothing_is_paused() -> Result<()> {
    let space = Namespace::new("machine-refused")?;
    for (class, reason, words) in [
        ("kata-tcg", "VmDeviceNotSnapshottable", "vhost-user-vsock"),
        ("kata-tcg-stock", "VmMonitorBusy", "qmp.sock"),
    ] {
        pod(&space, class, class, COUNT)?;
        let begun = Instant::now();
        let name = format!("snapshot-{class}");
        let status = space.take(&name, json!({"sourcePodName": class, "method": "VMSnapshot"}))?;
        assert_failed(&status, "Inspect", reason);
        let message = status["failure"]["message"].as_str().unwrap_or_default();
        ensure!(message.contains(words), "{message}");
        ensure!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
        goes_on(&space, class)?;
        kubectl(&["-n", &space.0, "delete", "pod", class])?;
    }
    Ok(())
}
