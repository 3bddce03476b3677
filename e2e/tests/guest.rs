//! Pods in virtual machines: the operator looks into the guest from the outside. The machines are real, with a kernel of
//! their own, but without hardware help (e2e/kata-tcg). Needs what `cluster.rs` needs.
#![cfg(feature = "cluster")]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null; a panic is a failed test"
)]

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use podcheckpoint_e2e::scenario::{
    IMAGE, Namespace, Undo, archive, assert_condition, assert_every_condition_has_a_documented_reason,
    assert_failed, assert_ready, condition,
};
use podcheckpoint_e2e::{apply_with, eventually, get, kubectl, on_node};
use serde_json::{Value, json};

/// A counter that leaves emulated code some time for others.
const SLOW_COUNT: &str = "i=0; while true; do i=$((i+1)); echo $i > /tmp/n; sleep 1; done";

/// Memory that takes emulated code some seconds to send out of a guest, and the same counter.
const HEAVY_COUNT: &str = "x=$(yes 0123456789abcde | head -c 24000000); i=0; while true; do i=$((i+1)); echo $i > /tmp/n; sleep 1; done";

/// A pod in a machine of its own, that runs.
fn machine(namespace: &Namespace, name: &str, class: &str, annotations: &Value) -> Result<Machine> {
    start(
        namespace,
        name,
        class,
        annotations,
        &[json!({"command": ["sh", "-c", SLOW_COUNT]})],
        &json!([]),
    )
}

/// Starts a pod in a machine of its own. A container is called main unless it says otherwise.
fn start(
    namespace: &Namespace,
    name: &str,
    class: &str,
    annotations: &Value,
    containers: &[Value],
    volumes: &Value,
) -> Result<Machine> {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace.0, "annotations": annotations},
        "spec": {
            "runtimeClassName": class, "terminationGracePeriodSeconds": 0, "volumes": volumes,
            "containers": [],
        },
    });
    let described = containers.iter().map(|container| {
        let mut described = json!({"name": "main", "image": IMAGE, "imagePullPolicy": "Never"});
        for (key, value) in container.as_object().into_iter().flatten() {
            described[key] = value.clone();
        }
        described
    });
    pod["spec"]["containers"] = described.collect();
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
    // In the order of their names.
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

/// The seed of the project as it was met: in the guest ptrace asks a listener that never answers.
#[test]
fn a_listener_in_the_guest_that_does_not_answer_is_named_from_the_outside_in_five_seconds() -> Result<()> {
    const PROFILE: &str = "/var/lib/kubelet/seccomp/e2e-silent.json";
    let namespace = Namespace::new("silent-guest")?;
    let written = on_node(
        "node1",
        &format!(
            r#"mkdir -p $(dirname {PROFILE})
               echo '{{"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/silent.sock",
                       "syscalls": [{{"names": ["ptrace"], "action": "SCMP_ACT_NOTIFY"}}]}}' > {PROFILE}"#
        ),
    );
    let _profile = Undo(|| drop(on_node("node1", &format!("rm -f {PROFILE}"))));
    written?;
    let annotations = json!({
        "io.katacontainers.config.hypervisor.kernel_params": "kata-tcg.silent=/run/silent.sock",
        "io.katacontainers.config.runtime.disable_guest_seccomp": "false",
    });
    let container = json!({
        "command": ["sh", "-c", SLOW_COUNT],
        "securityContext": {"seccompProfile": {"type": "Localhost", "localhostProfile": "e2e-silent.json"}},
    });
    start(
        &namespace,
        "silent",
        "kata-tcg-stock",
        &annotations,
        &[container],
        &json!([]),
    )?;
    let begun = std::time::Instant::now();
    let status = look(&namespace, "silent")?;
    assert_condition(&status, "PtraceValidated", "False", "SeccompNotifyUnanswered");
    println!(
        "named {:.1} s after the first question",
        begun.elapsed().as_secs_f64()
    );
    let said = status["conditions"].to_string();
    ensure!(said.contains("in the guest, by the runtime's exec"), "{status:#}");
    namespace.assert_source_went_on("silent", "main")
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

/// Takes a checkpoint, again and again while the guest answers too late to be looked into.
fn take(namespace: &Namespace, spec: &Value) -> Result<Value> {
    let mut last = Value::Null;
    for _ in 0..8 {
        let name = format!("take-{}", LOOKS.fetch_add(1, Ordering::Relaxed));
        last = namespace.take(&name, spec.clone())?;
        assert_every_condition_has_a_documented_reason(&last);
        let said = last["skippedMethods"].to_string() + &last["failure"].to_string();
        let late = [
            "within the 5 s",
            "within 5 s",
            "within 1500 ms",
            "ProbeIncomplete",
        ];
        if !late.iter().any(|words| said.contains(words)) {
            break;
        }
    }
    Ok(last)
}

fn skipped(status: &Value, method: &str) -> (String, String) {
    let all = status["skippedMethods"].as_array().cloned().unwrap_or_default();
    let found = all
        .into_iter()
        .find(|s| s["method"] == method)
        .unwrap_or_default();
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    (text("reason"), text("message"))
}

impl Machine {
    /// The first process of the container in the guest.
    fn pid(&self) -> Result<String> {
        let ask = format!("cat /run/kata-containers/{}/init.pid", self.container);
        Ok(self.run(&ask)?.trim().to_owned())
    }

    /// Nothing of a checkpoint is in the guest any more, and its processes are nobody's.
    fn assert_nothing_left(&self) -> Result<()> {
        eventually(Duration::from_secs(60), || {
            let left = self.run(
                "ls -d /run/podcheckpoint* 2> /dev/null; grep podcheckpoint /proc/mounts; pidof criu; true",
            )?;
            ensure!(left.trim().is_empty(), "left in the guest: {left}");
            let held = self.run(&format!(
                "grep -E '^(State|TracerPid)' /proc/{}/status",
                self.pid()?
            ))?;
            ensure!(
                held.contains("TracerPid:\t0") && !held.contains("(stopped)"),
                "{held}"
            );
            Ok(())
        })
    }
}

/// What the manifest of the archive says, done by hand in the guest of another pod that has the archive as a volume.
fn restore_in(machine: &Machine, archive: &str) -> Result<()> {
    let manifest: Value = serde_json::from_str(&on_node("node1", &format!("cat {archive}/guest.json"))?)?;
    assert_eq!(manifest["kind"], "Guest");
    let (pid, inside) = (
        machine.pid()?,
        format!("/run/kata-containers/{}", machine.container),
    );
    machine.run(&format!(
        "mkdir -p /run/restored/external; cp -a {inside}/rootfs /run/restored/rootfs"
    ))?;
    machine.run("mount --bind /run/restored/rootfs /run/restored/rootfs")?;
    machine.run(&format!(
        "ln -s $(dirname $(find {inside}/mounts -name guest.json)) /run/restored/archive"
    ))?;
    machine.run("/usr/bin/tar -x -f /run/restored/archive/rootfs-diff.tar -C /run/restored/rootfs")?;
    // The restored one has to write it anew.
    machine.run("rm /run/restored/rootfs/tmp/n")?;
    for (number, path) in manifest["external"].as_array().into_iter().flatten().enumerate() {
        let path = path.as_str().context("no path")?;
        let mut source = "/dev/null".to_owned();
        if !path.starts_with("/proc/") {
            source = format!("/run/restored/external/{number}");
            machine.run(&format!("cp -a /proc/{pid}/root{path} {source}"))?;
        }
        machine.run(&format!(
            "echo \"external mnt[{path}]:{source}\" >> /run/restored/conf"
        ))?;
    }
    let restored = machine.run(
        "cd /run/restored; criu restore --config conf -D archive/checkpoint/ -W . -o log -v4 --root /run/restored/rootfs \
         --manage-cgroups=ignore --restore-detached; echo status $?; grep Error log; true",
    )?;
    ensure!(restored.contains("status 0"), "{restored}");
    Ok(())
}

#[test]
fn the_containers_of_a_pod_in_a_guest_are_dumped_by_the_guests_criu_and_one_goes_on_in_another_guest()
-> Result<()> {
    let namespace = Namespace::new("guest-criu")?;
    let both = ["main", "side"].map(|name| json!({"name": name, "command": ["sh", "-c", SLOW_COUNT]}));
    let source = start(&namespace, "source", "kata-tcg", &json!({}), &both, &json!([]))?;
    let before = namespace.count("source", "main")?;
    let status = take(&namespace, &json!({"sourcePodName": "source"}))?;
    assert_ready("node1", &status)?;
    assert_condition(&status, "PtraceValidated", "True", "PtraceWorks");
    assert_eq!(status["method"], "Guest", "{status:#}");
    ensure!(
        status["conditions"].to_string().contains("in the guest: "),
        "{status:#}"
    );
    source.assert_nothing_left()?;
    // One after the other, and the status does not call it one moment.
    assert_eq!(status["consistency"], "PerContainer", "{status:#}");
    for container in ["main", "side"] {
        let folder = archive(&status, container);
        on_node(
            "node1",
            &format!("cd {folder} && sha256sum --quiet --check SHA256SUMS"),
        )?;
    }
    let archive = archive(&status, "main");
    let dumped = on_node("node1", &format!("tar -xOf {archive}/rootfs-diff.tar ./tmp/n"))?;
    let dumped: u64 = dumped.trim().parse()?;
    ensure!(dumped >= before, "{dumped} < {before}");

    let volume = json!([{"name": "archive", "hostPath": {"path": archive}}]);
    let mounts = json!({
        "command": ["sleep", "3600"],
        "volumeMounts": [{"name": "archive", "mountPath": "/archive", "readOnly": true}],
    });
    let other = start(&namespace, "other", "kata-tcg", &json!({}), &[mounts], &volume)?;
    restore_in(&other, &archive)?;
    let count = || -> Result<u64> { Ok(other.run("cat /run/restored/rootfs/tmp/n")?.trim().parse()?) };
    let first = eventually(Duration::from_secs(30), count)?;
    ensure!(first >= dumped, "it began anew: {first} < {dumped}");
    eventually(Duration::from_secs(30), || {
        ensure!(count()? > first, "it stands at {first}");
        Ok(())
    })?;
    namespace.assert_source_went_on("source", "side")?;
    namespace.assert_source_went_on("source", "main")
}

#[test]
fn a_guest_without_criu_is_told_what_it_lacks_and_its_machine_is_saved_if_that_is_possible() -> Result<()> {
    let namespace = Namespace::new("guest-without")?;
    let hidden = json!({"io.katacontainers.config.hypervisor.kernel_params": "kata-tcg.hide=/usr/sbin/criu kata-tcg.hide=/usr/bin/tar"});
    machine(&namespace, "without", "kata-tcg", &hidden)?;
    let status = take(
        &namespace,
        &json!({"sourcePodName": "without", "method": "Guest"}),
    )?;
    assert_failed(&status, "Inspect", "GuestToolMissing");
    ensure!(
        status["failure"]["message"]
            .to_string()
            .contains("lacks criu, GNU tar"),
        "{status:#}"
    );
    // Its vsock is a device that no snapshot has.
    let status = take(&namespace, &json!({"sourcePodName": "without"}))?;
    assert_failed(&status, "Inspect", "VmDeviceNotSnapshottable");
    assert_eq!(skipped(&status, "Guest").0, "GuestToolMissing", "{status:#}");
    namespace.assert_source_went_on("without", "main")?;
    kubectl(&["-n", &namespace.0, "delete", "pod", "without"])?;

    machine(&namespace, "snap", "kata-tcg-snap", &json!({}))?;
    let status = take(&namespace, &json!({"sourcePodName": "snap"}))?;
    assert_ready("node1", &status)?;
    assert_eq!(status["method"], "VMSnapshot", "{status:#}");
    let (reason, words) = skipped(&status, "Guest");
    ensure!(
        reason == "GuestConsoleClosed" && words.contains("serial port"),
        "{status:#}"
    );
    Ok(())
}

#[test]
fn a_dump_in_a_guest_that_is_called_off_leaves_the_pod_running_and_nothing_behind() -> Result<()> {
    let namespace = Namespace::new("guest-off")?;
    let heavy = json!({"command": ["sh", "-c", HEAVY_COUNT]});
    let machine = start(&namespace, "heavy", "kata-tcg", &json!({}), &[heavy], &json!([]))?;
    eventually(Duration::from_secs(180), || namespace.count("heavy", "main"))?;
    let spec = json!({"sourcePodName": "heavy", "method": "Guest", "timeoutSeconds": 12});
    let status = take(&namespace, &spec)?;
    assert_failed(&status, "Dump", "DeadlineExceeded");
    assert_condition(&status, "SourceRunning", "True", "SourceRuns");
    machine.assert_nothing_left()?;
    namespace.assert_source_went_on("heavy", "main")?;

    let pid = machine.pid()?;
    for attempt in 0..8 {
        let name = format!("killed-{attempt}");
        namespace.checkpoint(&name, json!({"sourcePodName": "heavy", "method": "Guest"}))?;
        // Until CRIU holds the process.
        let seen = machine.run(&format!(
            "for i in $(seq 600); do case $(grep TracerPid /proc/{pid}/status) in *[1-9]*) \
             [ -d /run/podcheckpoint-* ] && echo held && break;; esac; usleep 50000; done"
        ))?;
        if !seen.contains("held") {
            namespace.ended(&name)?;
            continue;
        }
        on_node("node1", "kill -KILL $(pgrep -f '^/podcheckpoint-agent run')")?;
        machine.assert_nothing_left()?;
        namespace.assert_source_went_on("heavy", "main")?;
        let status = namespace.ended(&name)?;
        assert_condition(&status, "Checkpointed", "False", "AgentInterrupted");
        assert_condition(&status, "SourceRunning", "True", "SourceRuns");
        return Ok(());
    }
    anyhow::bail!("CRIU was never seen at work")
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
