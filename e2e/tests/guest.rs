//! Pods in virtual machines: the operator looks into the guest from the outside. The machines are real, with a kernel of
//! their own, but without hardware help (e2e/kata-tcg). Needs what `cluster.rs` needs.
#![cfg(feature = "cluster")]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null; a panic is a failed test"
)]

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use podcheckpoint_e2e::scenario::{
    IMAGE, Namespace, Undo, assert_condition, assert_every_condition_has_a_documented_reason, condition,
};
use podcheckpoint_e2e::{apply_with, get, kubectl, on_node};
use serde_json::{Value, json};

/// A counter that leaves emulated code some time for others.
const SLOW_COUNT: &str = "i=0; while true; do i=$((i+1)); echo $i > /tmp/n; sleep 1; done";

/// A pod in a machine of its own, that runs.
fn machine(namespace: &Namespace, name: &str, class: &str, annotations: &Value) -> Result<Machine> {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace.0, "annotations": annotations},
        "spec": {
            "runtimeClassName": class, "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", SLOW_COUNT]}],
        },
    });
    podcheckpoint_e2e::apply(&pod.to_string())?;
    let wanted = format!("pod/{name}");
    kubectl(&[
        "-n",
        &namespace.0,
        "wait",
        "--for=condition=Ready",
        &wanted,
        "--timeout=240s",
    ])?;
    let pod = get(&namespace.0, "pod", name)?;
    let id = pod["status"]["containerStatuses"][0]["containerID"].as_str();
    let (_, container) = id.and_then(|id| id.split_once("//")).context("no container ID")?;
    let uid = pod["metadata"]["uid"].as_str().context("no UID")?;
    // Its sandbox is the machine whose process is in the pod's cgroup.
    let sandbox = on_node(
        "node1",
        &format!(
            "for m in /run/vc/vm/*; do grep -q {uid} /proc/$(cat $m/pid)/cgroup && basename $m; done; true"
        ),
    )?;
    Ok(Machine {
        sandbox: sandbox.trim().to_owned(),
        container: container.to_owned(),
    })
}

struct Machine {
    sandbox: String,
    container: String,
}

impl Machine {
    /// Runs a line in the guest as `kata-runtime exec` would, by the debug console.
    fn run(&self, line: &str) -> Result<String> {
        let quoted = line.replace('\'', r"'\''");
        on_node(
            "node1",
            &format!("containerd-shim-kata-tcg-v2 exec {} '{quoted}'", self.sandbox),
        )
    }
}

/// A name for each look.
static LOOKS: AtomicU32 = AtomicU32::new(0);

/// Looks into the pod. A guest that does not answer in the five seconds that the operator gives it is left alone, and
/// emulated code on a busy machine may need longer, or not let the probe reach every thread in its own deadline: then it
/// is asked again, for what the operator says when it was told.
fn look(namespace: &Namespace, pod: &str) -> Result<Value> {
    let mut last = Value::Null;
    for _ in 0..8 {
        let name = format!("look-{}", LOOKS.fetch_add(1, Ordering::Relaxed));
        last = namespace.take(&name, json!({"sourcePodName": pod, "validateOnly": true}))?;
        assert_every_condition_has_a_documented_reason(&last);
        let (_, reason) = condition(&last, "PtraceValidated");
        let in_time = !evidence(&last, "guest").contains("within the 5 s") && reason != "ProbeIncomplete";
        if in_time {
            break;
        }
    }
    Ok(last)
}

fn evidence(status: &Value, check: &str) -> String {
    let findings = status["findings"].as_array().cloned().unwrap_or_default();
    let found = findings.into_iter().find(|finding| finding["check"] == check);
    found.unwrap_or_default()["evidence"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn tracers_hang_in_the_guest_and_the_operator_names_the_cause_from_the_outside() -> Result<()> {
    let namespace = Namespace::new("guest")?;
    let machine = machine(&namespace, "seed", "kata-tcg", &json!({}))?;
    let free = look(&namespace, "seed")?;
    assert_condition(&free, "PtraceValidated", "True", "PtraceWorks");
    let guest = free["runtime"]["guestKernel"].as_str().unwrap_or_default();
    ensure!(
        !guest.is_empty() && free["runtime"]["kernel"] != guest,
        "{free:#}"
    );

    let cgroup = format!("/sys/fs/cgroup/{}", machine.container);
    let freeze = |on: u8| machine.run(&format!("echo {on} > {cgroup}/cgroup.freeze"));
    let _thaw = Undo(|| drop(freeze(0)));
    freeze(1)?;
    let frozen = look(&namespace, "seed")?;
    assert_condition(&frozen, "PtraceValidated", "False", "TargetFrozen");
    let message = frozen["conditions"].to_string();
    ensure!(
        message.contains("in the guest, by the debug console"),
        "{frozen:#}"
    );
    ensure!(
        message.contains(&machine.container),
        "the cgroup is not named: {frozen:#}"
    );
    assert_condition(&frozen, "SourceRunning", "True", "SourceRuns");

    // The story that started the project, told by the tools themselves.
    let target = format!("$(head -n 1 {cgroup}/cgroup.procs)");
    let hangs = |tool: &str| -> Result<()> {
        let told = machine.run(&format!("timeout -s KILL 5 {tool}; echo status $?"))?;
        ensure!(told.contains("status 137"), "{tool} did not hang: {told}");
        Ok(())
    };
    hangs(&format!("strace -p {target}"))?;
    freeze(0)?;
    assert_condition(
        &look(&namespace, "seed")?,
        "PtraceValidated",
        "True",
        "PtraceWorks",
    );
    namespace.assert_source_went_on("seed", "main")?;
    // CRIU comes last: one that is killed with its code in the target leaves a target that cannot go on.
    freeze(1)?;
    machine.run("mkdir -p /tmp/images")?;
    hangs(&format!(
        "criu dump -D /tmp/images --leave-running -j --external mnt[]:ms --manage-cgroups=ignore -t {target}"
    ))
}

#[test]
fn a_stock_guest_is_looked_into_by_exec_and_an_annotation_opens_its_console() -> Result<()> {
    let namespace = Namespace::new("stock-guest")?;
    machine(&namespace, "stock", "kata-tcg-stock", &json!({}))?;
    let status = look(&namespace, "stock")?;
    assert_condition(&status, "PtraceValidated", "True", "PtraceWorks");
    let way = evidence(&status, "guest");
    ensure!(
        way.contains("the runtime's exec, with the container's own rights"),
        "{way}"
    );
    ensure!(
        way.contains("nothing in the guest listens on vsock port 1026"),
        "{way}"
    );
    assert_nothing_left(&namespace, "stock")?;
    kubectl(&["-n", &namespace.0, "delete", "pod", "stock"])?;

    // Exactly what the remedy of GuestUnreachable says.
    let opened = json!({"io.katacontainers.config.hypervisor.kernel_params": "agent.debug_console agent.debug_console_vport=1026"});
    let machine = machine(&namespace, "opened", "kata-tcg-stock", &opened)?;
    let status = look(&namespace, "opened")?;
    assert_condition(&status, "PtraceValidated", "True", "PtraceWorks");
    let way = evidence(&status, "guest");
    ensure!(
        way.contains("looked into the guest by the debug console"),
        "{way}"
    );
    let left = machine.run("ls -a /tmp /run")?;
    ensure!(!left.contains("podcheckpoint"), "{left}");
    Ok(())
}

fn assert_nothing_left(namespace: &Namespace, pod: &str) -> Result<()> {
    let left = kubectl(&[
        "-n",
        &namespace.0,
        "exec",
        pod,
        "--",
        "ls",
        "-a",
        "/tmp",
        "/var/tmp",
        "/run",
        "/root",
        "/",
    ])
    .or_else(|_| kubectl(&["-n", &namespace.0, "exec", pod, "--", "ls", "-a", "/tmp", "/"]))?;
    ensure!(!left.contains("podcheckpoint"), "{left}");
    Ok(())
}

#[test]
fn a_guest_that_hangs_is_unreachable_and_holds_nobody_up() -> Result<()> {
    let namespace = Namespace::new("hung-guest")?;
    let machine = machine(&namespace, "hung", "kata-tcg", &json!({}))?;
    let signal = |name: &str| {
        on_node(
            "node1",
            &format!("kill -{name} $(cat /run/vc/vm/{}/pid)", machine.sandbox),
        )
    };
    let _go_on = Undo(|| drop(signal("CONT")));
    signal("STOP")?;
    let status = namespace.take("hung", json!({"sourcePodName": "hung", "validateOnly": true}))?;
    assert_condition(&status, "PtraceValidated", "Unknown", "GuestUnreachable");
    let said = status["conditions"].to_string();
    ensure!(said.contains("debug_console_enabled = true"), "{status:#}");
    signal("CONT")?;
    // Not by the console again: the vsock device of the test's machines was seen not to answer after such a stop.
    namespace.assert_source_went_on("hung", "main")
}

/// The block of the README in that language which has the words.
fn documented(language: &str, words: &str) -> Result<String> {
    let readme = include_str!("../../README.md");
    let fence = format!("```{language}\n");
    let blocks = readme.split(fence.as_str()).skip(1);
    let block = blocks
        .filter_map(|rest| rest.split("```").next())
        .find(|block| block.contains(words));
    block
        .map(str::to_owned)
        .with_context(|| format!("no {language} block with {words}"))
}

#[test]
fn what_the_readme_says_about_guests_can_be_used_as_it_stands() -> Result<()> {
    let class = documented("yaml", "kind: RuntimeClass")?;
    apply_with(&["apply", "--dry-run=server", "-f", "-"], &class)?;
    documented("toml", "[agent.kata]\ndebug_console_enabled = true")?;
    for line in documented("kconfig", "CONFIG_CHECKPOINT_RESTORE")?.lines() {
        let option = line
            .strip_suffix("=y")
            .and_then(|line| line.strip_prefix("CONFIG_"));
        let option = option.with_context(|| format!("not a line of a kernel's configuration: {line}"))?;
        ensure!(
            option
                .chars()
                .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'),
            "{line}"
        );
    }
    Ok(())
}
