//! Security settings that stand in the way: explained, planned, or changed for the time of a checkpoint and put back.
//! Needs what `tests/cluster.rs` needs.
#![cfg(feature = "cluster")]
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null; a panic is a failed test"
)]

use std::time::Duration;

use anyhow::{Result, ensure};
use podcheckpoint_e2e::scenario::{
    COUNT, HEAVY, IMAGE, KIND, Namespace, Undo, archive, assert_condition, assert_described_as,
    assert_failed, assert_ready, assert_restores, document, without_agents,
};
use podcheckpoint_e2e::security::{
    assert_nothing_in_force, assert_security_state, described, security_state, take_patiently,
};
use podcheckpoint_e2e::{eventually, get, kubectl, kubectl_refused, on_node, uid};
use serde_json::{Value, json};

/// A pod of a counter that somebody has frozen. Thawed when the test ends, so that it can be deleted.
struct Frozen<'a> {
    namespace: &'a Namespace,
    node: &'static str,
    file: String,
    pod: &'static str,
}

impl<'a> Frozen<'a> {
    fn new(namespace: &'a Namespace, node: &'static str, pod: &'static str) -> Result<Self> {
        Self::with(namespace, node, pod, COUNT)
    }

    fn with(namespace: &'a Namespace, node: &'static str, pod: &'static str, script: &str) -> Result<Self> {
        namespace.pod(pod, node, &[("main", script)])?;
        namespace.count(pod, "main")?;
        let uid = get(&namespace.0, "pod", pod)?["metadata"]["uid"].clone();
        let uid = uid.as_str().unwrap_or_default();
        let (tree, file) = if node == "node1" {
            ("/sys/fs/cgroup/freezer", "freezer.state")
        } else {
            ("/sys/fs/cgroup", "cgroup.freeze")
        };
        // The container with the shell; the other one below the pod is the sandbox.
        let find = format!(
            "for d in $(find {tree} -path '*pod{uid}/*' -name {file} -exec dirname {{}} ';'); do
               for p in $(cat $d/cgroup.procs); do [ \"$(cat /proc/$p/comm)\" != sh ] || echo $d/{file}; done; done | head -n 1"
        );
        let file = on_node(node, &find)?.trim().to_owned();
        ensure!(!file.is_empty(), "no freezer of {pod}");
        let frozen = Self {
            namespace,
            node,
            file,
            pod,
        };
        frozen.set(true)?;
        Ok(frozen)
    }

    fn set(&self, frozen: bool) -> Result<()> {
        let value = match (self.node, frozen) {
            ("node1", true) => "FROZEN",
            ("node1", false) => "THAWED",
            (_, true) => "1",
            (_, false) => "0",
        };
        on_node(self.node, &format!("echo {value} > {}; sleep 0.2", self.file)).map(drop)
    }

    fn is_frozen(&self) -> Result<bool> {
        let state = on_node(self.node, &format!("cat {}", self.file))?;
        Ok(matches!(state.trim(), "FROZEN" | "1"))
    }

    fn take(&self, name: &str, patches: &str) -> Result<Value> {
        self.namespace.take(
            name,
            json!({"sourcePodName": self.pod, "securityPatches": patches}),
        )
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = self.set(false);
    }
}

fn thawed_for_the_checkpoint(node: &'static str) -> Result<()> {
    let namespace = Namespace::new(&format!("thaw-{node}"))?;
    let frozen = Frozen::new(&namespace, node, "counter")?;
    let before = security_state(node)?;

    let never = frozen.take("never", "Never")?;
    assert_condition(&never, "Stalled", "True", "TargetFrozen");
    assert_condition(&never, "SecurityPrepared", "False", "PatchNotRequested");
    let plan = frozen.take("plan", "Plan")?;
    assert_condition(&plan, "SecurityPrepared", "False", "PatchPlanned");
    let planned = &plan["patches"][0];
    ensure!(
        planned["kind"] == "Freezer" && planned["before"] == "frozen" && planned["after"] == "thawed",
        "{plan:#}"
    );
    ensure!(
        planned["scope"] == "container" && planned["appliedTime"].is_null(),
        "{plan:#}"
    );
    ensure!(frozen.is_frozen()?, "a plan changed something");
    if node == "node1" {
        assert_described_as(&namespace.0, "never", "security-never")?;
        assert_described_as(&namespace.0, "plan", "security-plan")?;
    }

    let status = frozen.take("temporary", "Temporary")?;
    assert_condition(&status, "Ready", "True", "CheckpointCompleted");
    assert_condition(&status, "PtraceValidated", "True", "PtraceWorks");
    assert_condition(&status, "SecurityPrepared", "True", "Patched");
    assert_condition(&status, "SecurityRestored", "True", "PatchesReverted");
    // As it was before: somebody wants it to stand still.
    assert_condition(&status, "SourceRunning", "False", "SourceFrozen");
    let patch = &status["patches"][0];
    ensure!(
        !patch["appliedTime"].is_null() && !patch["revertedTime"].is_null(),
        "{status:#}"
    );
    ensure!(frozen.is_frozen()?, "it was not frozen again");
    let text = described(&namespace, "temporary")?;
    for words in [
        "NodeSecurityPatched",
        "NodeSecurityRestored",
        "was put back",
        "Freezer",
    ] {
        eventually(Duration::from_secs(10), || {
            let text = described(&namespace, "temporary")?;
            ensure!(text.contains(words), "no {words:?} in\n{text}");
            Ok(())
        })?;
    }
    ensure!(!text.contains("secret"), "{text}");
    let of_node = kubectl(&["describe", "node", node])?;
    ensure!(of_node.contains("NodeSecurityPatched"), "{of_node}");
    if node == "node1" {
        assert_described_as(&namespace.0, "temporary", "security-temporary")?;
    }
    assert_nothing_in_force(node)?;
    assert_security_state(node, &before)?;
    assert_restores(node, &archive(&status, "main"), &format!("thawed-{node}"), 1)?;
    frozen.set(false)?;
    namespace.assert_source_went_on("counter", "main")
}

#[test]
fn what_somebody_froze_is_thawed_for_the_checkpoint_and_frozen_again_on_cgroup_v1() -> Result<()> {
    thawed_for_the_checkpoint("node1")
}

#[test]
fn what_somebody_froze_is_thawed_for_the_checkpoint_and_frozen_again_on_cgroup_v2() -> Result<()> {
    thawed_for_the_checkpoint("node2")
}

#[test]
fn a_patch_that_does_not_help_is_put_back_and_the_rest_is_said() -> Result<()> {
    let namespace = Namespace::new("no-help")?;
    let frozen = Frozen::new(&namespace, "node1", "counter")?;
    // Stopped as well: thawed it would still not run.
    let pid = on_node(
        "node1",
        &format!("head -n 1 $(dirname {})/cgroup.procs", frozen.file),
    )?;
    let pid = pid.trim();
    frozen.set(false)?;
    on_node("node1", &format!("kill -STOP {pid}; sleep 0.2"))?;
    frozen.set(true)?;
    let before = security_state("node1")?;
    let outcome = frozen.take("first", "Temporary").and_then(|status| {
        assert_condition(&status, "Stalled", "True", "TargetStopped");
        assert_condition(&status, "SecurityPrepared", "False", "PatchIneffective");
        assert_condition(&status, "SecurityRestored", "True", "PatchesReverted");
        ensure!(frozen.is_frozen()?, "it was not frozen again");
        assert_security_state("node1", &before)
    });
    frozen.set(false)?;
    on_node("node1", &format!("kill -CONT {pid}"))?;
    outcome?;
    assert_nothing_in_force("node1")?;
    namespace.assert_source_went_on("counter", "main")
}

#[test]
fn what_no_setting_can_mend_is_called_not_fixable() -> Result<()> {
    let namespace = Namespace::new("not-fixable")?;
    namespace.counter("counter", "node1")?;
    let uid = get(&namespace.0, "pod", "counter")?["metadata"]["uid"].clone();
    let stop = format!(
        "for p in $(cat $(find /sys/fs/cgroup/freezer -path '*pod{}/*' -name cgroup.procs)); do
           [ \"$(cat /proc/$p/comm)\" != sh ] || echo $p; done | head -n 1",
        uid.as_str().unwrap_or_default()
    );
    let pid = on_node("node1", &stop)?;
    let pid = pid.trim();
    on_node("node1", &format!("kill -STOP {pid}; sleep 0.2"))?;
    let outcome = namespace
        .take(
            "first",
            json!({"sourcePodName": "counter", "securityPatches": "Temporary"}),
        )
        .and_then(|status| {
            assert_condition(&status, "SecurityPrepared", "False", "NotFixable");
            assert_condition(&status, "SecurityRestored", "True", "NotNeeded");
            assert_described_as(&namespace.0, "first", "security-not-fixable")
        });
    on_node("node1", &format!("kill -CONT {pid}"))?;
    outcome?;
    namespace.assert_source_went_on("counter", "main")
}

#[test]
fn who_may_checkpoint_may_not_by_that_loosen_a_node() -> Result<()> {
    let namespace = Namespace::new("patch-right")?;
    namespace.counter("counter", "node1")?;
    let ns = &namespace.0;
    kubectl(&["-n", ns, "create", "serviceaccount", "user"])?;
    let account = format!("{ns}:user");
    let role = |name: &str, role: &str| {
        kubectl(&[
            "-n",
            ns,
            "create",
            "rolebinding",
            name,
            &format!("--clusterrole={role}"),
            &format!("--serviceaccount={account}"),
        ])
    };
    role("edit", "edit")?;
    role("checkpoint", "podcheckpoint-editor")?;
    let user = format!("--as=system:serviceaccount:{account}");
    let spec =
        |mode: &str| json!({"sourcePodName": "counter", "securityPatches": mode, "validateOnly": true});
    let manifest = |name: &str, mode: &str| {
        document(
            ns,
            "podcheckpoint.dev/v1alpha1",
            "PodCheckpoint",
            name,
            &spec(mode),
        )
    };
    let refused = kubectl_refused(&["create", &user, "-f", "-"], &manifest("a", "Temporary"))?;
    ensure!(refused.contains("patch-node-security"), "{refused}");
    podcheckpoint_e2e::apply_with(&["create", &user, "-f", "-"], &manifest("b", "Plan"))?;
    role("patch", "podcheckpoint-security-patcher")?;
    eventually(Duration::from_secs(10), || {
        podcheckpoint_e2e::apply_with(&["create", &user, "-f", "-"], &manifest("c", "Temporary"))
    })
}

/// Ends the agent of node1 that works, if there is one. Its watchdogs live on.
const KILL_AGENT: &str = "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2> /dev/null)\" != podcheckpoint-a ] || \
                          ! grep -qz '^run$' $p/cmdline || kill -KILL ${p#/proc/}; done; true";

#[test]
fn a_change_survives_the_agents_death_in_no_case() -> Result<()> {
    let namespace = Namespace::new("patch-killed")?;
    let frozen = Frozen::with(&namespace, "node1", "heavy", HEAVY)?;
    let before = security_state("node1")?;
    frozen.take("warm", "Plan")?;
    // At moments that spread over the whole of an operation. Every second time, the next agent does not live to say what
    // it has put back either.
    for (number, after) in [5_u32, 60, 120, 200, 300, 450, 700, 1200, 2500, 3500]
        .into_iter()
        .enumerate()
    {
        let name = format!("killed-{number}");
        namespace.checkpoint(
            &name,
            json!({"sourcePodName": "heavy", "securityPatches": "Temporary"}),
        )?;
        eventually(Duration::from_secs(20), || {
            let state = get(&namespace.0, KIND, &name)?["status"]["archiveState"].clone();
            ensure!(!state.is_null());
            Ok(())
        })?;
        std::thread::sleep(Duration::from_millis(after.into()));
        on_node("node1", KILL_AGENT)?;
        if number % 2 == 1 {
            let put_back = "for i in $(seq 2000); do ls /var/lib/podcheckpoint/patches | grep -q json || break; sleep 0.005; done";
            on_node("node1", &format!("{put_back}; {KILL_AGENT}"))?;
        }
        // No back-off for the next one.
        without_agents()?;
        let status = namespace.ended(&name)?;
        eventually(Duration::from_secs(60), || {
            let status = &get(&namespace.0, KIND, &name)?["status"];
            let open = status["patches"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|patch| !patch["appliedTime"].is_null() && patch["revertedTime"].is_null());
            ensure!(!open, "{status:#}");
            ensure!(frozen.is_frozen()?, "{name}: it was not frozen again: {status:#}");
            Ok(())
        })?;
        ensure!(
            status["conditions"].as_array().is_some_and(|all| !all.is_empty()),
            "{status:#}"
        );
    }
    assert_nothing_in_force("node1")?;
    assert_security_state("node1", &before)?;
    frozen.set(false)?;
    namespace.assert_source_went_on("heavy", "main")
}

/// A profile as an administrator may write one for a shell: it mentions no unix socket and nothing in /proc.
const STRICT: &str = "
  network inet stream,
  signal (receive,send) peer=@{profile_name},
  signal (receive) peer=unconfined,
  /bin/* rix,
  / r,
  /tmp/** rw,
  /etc/** r,
  /dev/** rw,
  /lib/** mr,
  /usr/** mr,
";

fn profile_text(name: &str, rules: &str) -> String {
    format!("abi <abi/4.0>,\nprofile \"{name}\" flags=(attach_disconnected,mediate_deleted) {{{rules}}}\n")
}

/// Loads a profile on node2, and removes it when the test ends.
fn profile(name: &str, rules: &str) -> Result<Undo<impl FnMut()>> {
    let text = profile_text(name, rules);
    podcheckpoint_e2e::on_node_with("node2", "apparmor_parser --skip-cache --replace", text.as_bytes())?;
    let name = name.to_owned();
    Ok(Undo(move || {
        let remove = "cat > /tmp/name; cat /tmp/name > /sys/kernel/security/apparmor/.remove";
        let _ = podcheckpoint_e2e::on_node_with("node2", remove, name.as_bytes());
    }))
}

/// A pod of a counter under a profile.
fn confined(namespace: &Namespace, pod: &str, profile: &str, script: &str) -> Result<()> {
    namespace.manifest("v1", "Pod", pod, json!({
        "nodeName": "node2", "terminationGracePeriodSeconds": 0,
        "securityContext": {"appArmorProfile": {"type": "Localhost", "localhostProfile": profile}},
        "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", script],
                        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]}],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }))?;
    namespace.wait_for_pod(pod)
}

#[test]
fn an_apparmor_profile_that_stops_criu_is_named_before_the_dump_and_complains_only_during_it() -> Result<()> {
    let namespace = Namespace::new("apparmor")?;
    let _profile = profile("e2e-strict", STRICT)?;
    confined(&namespace, "strict", "e2e-strict", COUNT)?;
    let before = security_state("node2")?;
    ensure!(before.contains("apparmor e2e-strict enforce"), "{before}");

    let spec = |mode: &str| json!({"sourcePodName": "strict", "securityPatches": mode});
    let (name, never) = take_patiently(&namespace, "never", &spec("Never"))?;
    assert_failed(&never, "ValidatePtrace", "LsmDenied");
    assert_condition(&never, "SecurityPrepared", "False", "PatchNotRequested");
    let text = described(&namespace, &name)?;
    for words in ["e2e-strict", "network unix", "apparmor=\"DENIED\""] {
        ensure!(text.contains(words), "no {words:?} in\n{text}");
    }
    let (_, plan) = take_patiently(&namespace, "plan", &spec("Plan"))?;
    assert_condition(&plan, "SecurityPrepared", "False", "PatchPlanned");
    let planned = &plan["patches"][0];
    ensure!(
        planned["kind"] == "AppArmor" && planned["scope"] == "profile",
        "{plan:#}"
    );
    ensure!(
        planned["before"]
            .as_str()
            .is_some_and(|v| v.starts_with("enforce, policy "))
            && planned["after"]
                .as_str()
                .is_some_and(|v| v.starts_with("complain, policy ")),
        "{plan:#}"
    );
    assert_security_state("node2", &before)?;

    let (_, status) = take_patiently(&namespace, "temporary", &spec("Temporary"))?;
    assert_ready("node2", &status)?;
    assert_condition(&status, "SecurityPrepared", "True", "Patched");
    assert_condition(&status, "SecurityRestored", "True", "PatchesReverted");
    assert_security_state("node2", &before)?;
    assert_nothing_in_force("node2")?;
    namespace.assert_source_went_on("strict", "main")
}

#[test]
fn a_profile_whose_name_looks_like_a_path_is_changed_and_no_other_file_is() -> Result<()> {
    const ODD: &str = "e2e ../odd [name]";
    let namespace = Namespace::new("odd-profile")?;
    let _profile = profile(ODD, STRICT)?;
    confined(&namespace, "strict", ODD, COUNT)?;
    let before = security_state("node2")?;
    ensure!(before.contains(&format!("apparmor {ODD} enforce")), "{before}");
    let spec = json!({"sourcePodName": "strict", "securityPatches": "Temporary"});
    let (_, status) = take_patiently(&namespace, "first", &spec)?;
    assert_ready("node2", &status)?;
    ensure!(
        status["patches"][0]["setting"] == format!("AppArmor profile {ODD}"),
        "{status:#}"
    );
    assert_security_state("node2", &before)?;
    assert_nothing_in_force("node2")?;
    namespace.assert_source_went_on("strict", "main")
}

#[test]
fn a_profile_that_somebody_else_loads_in_the_middle_stays_theirs_and_both_values_are_named() -> Result<()> {
    let namespace = Namespace::new("others")?;
    let name = "e2e-others";
    let _profile = profile(name, STRICT)?;
    confined(&namespace, "strict", name, COUNT)?;
    eventually(Duration::from_secs(60), || namespace.count("strict", "main"))?;
    // Compiled beforehand: it is loaded in the moment in which the checkpoint has the profile complain.
    let theirs = profile_text(
        name,
        &format!("{STRICT}  network unix,\n  /proc/ r,\n  /proc/** r,\n"),
    );
    let compile = "cat > /run/theirs && apparmor_parser --skip-cache -o /run/theirs.bin /run/theirs";
    podcheckpoint_e2e::on_node_with("node2", compile, theirs.as_bytes())?;
    let load = format!(
        "for i in $(seq 3000); do
           if grep -q '^{name} (complain)' /sys/kernel/security/apparmor/profiles; then
             cat /run/theirs.bin > /sys/kernel/security/apparmor/.replace; exit; fi; sleep 0.02; done; exit 1"
    );
    let somebody = std::thread::spawn(move || on_node("node2", &load));
    let spec = json!({"sourcePodName": "strict", "securityPatches": "Temporary"});
    let (checkpoint, status) = take_patiently(&namespace, "first", &spec)?;
    somebody
        .join()
        .map_err(|_| anyhow::anyhow!("the other party did not load its profile"))??;
    assert_condition(&status, "SecurityRestored", "False", "ChangedByOthers");
    ensure!(status["patches"][0]["outcome"] == "ChangedByOthers", "{status:#}");
    ensure!(security_state("node2")?.contains("apparmor e2e-others enforce"));
    assert_nothing_in_force("node2")?;
    let text = described(&namespace, &checkpoint)?;
    for words in [
        "was enforce, policy",
        "the checkpoint made it complain, policy",
        "somebody else made it enforce, policy",
    ] {
        ensure!(text.contains(words), "no {words:?} in\n{text}");
    }
    assert_described_as(&namespace.0, &checkpoint, "security-changed-by-others")?;
    namespace.assert_source_went_on("strict", "main")
}

#[test]
fn checkpoints_that_need_the_same_profile_at_once_all_have_it_and_the_last_puts_it_back() -> Result<()> {
    const PODS: [&str; 3] = ["a", "b", "c"];
    let namespace = Namespace::new("shared")?;
    let _profile = profile("e2e-shared", STRICT)?;
    for pod in PODS {
        confined(&namespace, pod, "e2e-shared", COUNT)?;
    }
    let before = security_state("node2")?;
    let ended = std::thread::scope(|scope| {
        let take = |pod: &'static str| {
            let spec = json!({"sourcePodName": pod, "securityPatches": "Temporary"});
            take_patiently(&namespace, pod, &spec)
        };
        let all: Vec<_> = PODS.map(|pod| scope.spawn(move || take(pod))).into();
        all.into_iter().map(|one| one.join()).collect::<Vec<_>>()
    });
    let mut outcomes = Vec::new();
    for one in ended {
        let (_, status) = one.map_err(|_| anyhow::anyhow!("a checkpoint's thread"))??;
        assert_ready("node2", &status)?;
        assert_condition(&status, "SecurityPrepared", "True", "Patched");
        outcomes.push(status["patches"][0]["outcome"].clone());
    }
    // Whether they met is the scheduler's business; the last one puts it back in any case.
    ensure!(outcomes.contains(&"Restored".into()), "{outcomes:?}");
    let known = |outcome: &Value| outcome == "Restored" || outcome == "Shared";
    ensure!(outcomes.iter().all(known), "{outcomes:?}");
    assert_security_state("node2", &before)?;
    assert_nothing_in_force("node2")?;
    PODS.iter()
        .try_for_each(|pod| namespace.assert_source_went_on(pod, "main"))
}

/// A profile whose listener is asked about mknod. A file descriptor that is received as nothing is closed: the listener is
/// gone as soon as the container has it.
fn asking_profile() -> Result<Undo<impl FnMut()>> {
    on_node(
        "node1",
        r#"mkdir -p /var/lib/kubelet/seccomp
           echo '{"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/e2e-seccomp.sock",
                  "syscalls": [{"names": ["mknod", "mknodat"], "action": "SCMP_ACT_NOTIFY"}]}' > /var/lib/kubelet/seccomp/e2e-asks.json
           setsid perl -MIO::Socket::UNIX -e '
             $s = IO::Socket::UNIX->new(Local => "/run/e2e-seccomp.sock", Listen => 5) or die $!;
             while ($c = $s->accept) { 1 while sysread $c, $x, 4096 }' < /dev/null > /dev/null 2>&1 &
           echo $! > /run/e2e-seccomp.pid"#,
    )?;
    Ok(Undo(|| {
        let _ = on_node(
            "node1",
            "kill $(cat /run/e2e-seccomp.pid); rm -f /run/e2e-seccomp.* /var/lib/kubelet/seccomp/e2e-asks.json",
        );
    }))
}

/// A pod on node1 with a Localhost profile.
fn filtered(namespace: &Namespace, pod: &str, profile: &str, script: &str) -> Result<()> {
    namespace.manifest("v1", "Pod", pod, json!({
        "nodeName": "node1", "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", script],
                        "securityContext": {"seccompProfile": {"type": "Localhost", "localhostProfile": profile}}}],
    }))?;
    namespace.wait_for_pod(pod)
}

#[test]
fn a_filter_that_asks_a_listener_gets_a_profile_without_it_for_the_next_start() -> Result<()> {
    const OURS: &str = "/var/lib/kubelet/seccomp/podcheckpoint";
    let namespace = Namespace::new("seccomp")?;
    let _profile = asking_profile()?;
    // One process, so that there is one finding.
    filtered(&namespace, "asks", "e2e-asks.json", "exec sleep 1000000")?;
    let before = security_state("node1")?;
    let take = |name: &str, mode: &str| {
        let status = namespace.take(name, json!({"sourcePodName": "asks", "securityPatches": mode}))?;
        assert_failed(&status, "ValidatePtrace", "SeccompListenerNotRestorable");
        assert_condition(&status, "SecurityRestored", "True", "NotNeeded");
        anyhow::Ok(status)
    };
    assert_condition(
        &take("never", "Never")?,
        "SecurityPrepared",
        "False",
        "PatchNotRequested",
    );
    let plan = take("plan", "Plan")?;
    assert_condition(&plan, "SecurityPrepared", "False", "PatchPlanned");
    ensure!(plan["patches"][0]["appliedTime"].is_null(), "{plan:#}");
    assert_security_state("node1", &before)?;

    let status = take("temporary", "Temporary")?;
    assert_condition(&status, "SecurityPrepared", "False", "ProfileForNextStart");
    assert_described_as(&namespace.0, "temporary", "security-next-start")?;
    let profile = format!(
        "podcheckpoint/{}/main.json",
        uid(&namespace.0, KIND, "temporary")?
    );
    filtered(&namespace, "next", &profile, COUNT)?;
    let next = namespace.take("next", json!({"sourcePodName": "next"}))?;
    assert_ready("node1", &next)?;

    // It stays for as long as its object, whoever runs the agent.
    without_agents()?;
    on_node("node1", &format!("test -s /var/lib/kubelet/seccomp/{profile}"))?;
    kubectl(&["-n", &namespace.0, "delete", KIND, "temporary", "--timeout=60s"])?;
    on_node("node1", &format!("! test -e {OURS}"))?;
    assert_security_state("node1", &before)?;
    namespace.assert_source_went_on("next", "main")
}

#[test]
fn modules_that_the_node_may_not_load_itself_are_loaded_for_the_checkpoint() -> Result<()> {
    const MODULES: &str =
        "unix_diag tcp_diag udp_diag raw_diag mptcp_diag af_packet_diag netlink_diag inet_diag";
    let namespace = Namespace::new("modules")?;
    namespace.counter("counter", "node2")?;
    let _allowed = Undo(|| {
        let _ = on_node("node2", "rm -f /etc/modprobe.d/e2e.conf");
    });
    on_node(
        "node2",
        &format!(
            "for m in {MODULES}; do echo blacklist $m; done > /etc/modprobe.d/e2e.conf; modprobe -r -q {MODULES} || true"
        ),
    )?;
    let before = security_state("node2")?;
    let none = || {
        let state = security_state("node2")?;
        ensure!(!state.contains("module "), "{state}");
        anyhow::Ok(())
    };
    none()?;

    let spec = |mode: &str| json!({"sourcePodName": "counter", "securityPatches": mode});
    let (_, never) = take_patiently(&namespace, "never", &spec("Never"))?;
    assert_failed(&never, "ValidatePtrace", "KernelFeatureMissing");
    let (_, plan) = take_patiently(&namespace, "plan", &spec("Plan"))?;
    let names: Vec<_> = plan["patches"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|patch| patch["setting"].clone())
        .collect();
    ensure!(
        names.len() == 6 && names.contains(&"kernel module unix_diag".into()),
        "{names:?}"
    );
    none()?;

    let (_, status) = take_patiently(&namespace, "temporary", &spec("Temporary"))?;
    assert_ready("node2", &status)?;
    assert_condition(&status, "SecurityRestored", "True", "PatchesReverted");
    none()?;
    assert_security_state("node2", &before)?;
    assert_nothing_in_force("node2")?;
    namespace.assert_source_went_on("counter", "main")
}

#[test]
fn without_room_for_the_journal_nothing_is_changed_and_garbage_in_it_is_reported() -> Result<()> {
    const PATCHES: &str = "/var/lib/podcheckpoint/patches";
    let namespace = Namespace::new("journal")?;
    let frozen = Frozen::new(&namespace, "node1", "counter")?;
    // An agent sees what is mounted below its folder when it starts.
    let disk = Undo(|| {
        let _ = without_agents();
        let _ = on_node("node1", &format!("umount -l {PATCHES}"));
    });
    without_agents()?;
    on_node(
        "node1",
        &format!(
            "mkdir -p {PATCHES} && mount -t tmpfs -o size=4k,nr_inodes=3 tmpfs {PATCHES} && touch {PATCHES}/a {PATCHES}/b"
        ),
    )?;
    let status = frozen.take("full", "Temporary")?;
    assert_condition(&status, "Stalled", "True", "TargetFrozen");
    assert_condition(&status, "SecurityPrepared", "False", "PatchFailed");
    ensure!(status["patches"].is_null(), "{status:#}");
    ensure!(frozen.is_frozen()?, "changed without a journal");
    let text = described(&namespace, "full")?;
    ensure!(text.contains("No space left on device"), "{text}");
    drop(disk);

    let _garbage = Undo(|| {
        let _ = on_node("node1", &format!("rm -f {PATCHES}/garbage.json"));
        let _ = without_agents();
    });
    on_node(
        "node1",
        &format!("echo '{{\"setting\":' > {PATCHES}/garbage.json"),
    )?;
    let status = frozen.take("garbage", "Temporary")?;
    assert_condition(&status, "Ready", "True", "CheckpointCompleted");
    assert_condition(&status, "SecurityRestored", "True", "PatchesReverted");
    ensure!(frozen.is_frozen()?, "it was not frozen again");
    eventually(Duration::from_secs(20), || {
        let report = kubectl(&["get", "checkpointnodes.podcheckpoint.dev", "node1", "-o", "yaml"])?;
        ensure!(report.contains("garbage.json"), "{report}");
        Ok(())
    })
}
