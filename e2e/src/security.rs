//! Security settings of a node, as the tests see them from outside of the operator.

#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null and never panics"
)]

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::scenario::{KIND, Namespace};
use crate::{eventually, get, kubectl, on_node};

/// Nothing of the operator's doing is left in force on a node.
///
/// # Errors
/// When something is.
pub fn assert_nothing_in_force(node: &str) -> Result<()> {
    let left = on_node(node, "ls /var/lib/podcheckpoint/patches 2> /dev/null || true")?;
    ensure!(left.trim().is_empty(), "the journal has {left}");
    eventually(Duration::from_secs(20), || {
        let report = get("", "checkpointnodes.podcheckpoint.dev", node)?;
        ensure!(report["status"]["patches"].is_null(), "{report:#}");
        Ok(())
    })
}

/// Takes a checkpoint on node2. On an emulated machine beside which others work, the probe may not have its answers in
/// time, and says so; then it is asked again. Gives the name of the one that counts.
///
/// # Errors
/// When it does not end, or the probe is too slow each time.
pub fn take_patiently(namespace: &Namespace, name: &str, spec: &Value) -> Result<(String, Value)> {
    for number in 0..10 {
        let name = format!("{name}-{number}");
        let status = namespace.take(&name, spec.clone())?;
        let slow = [
            "ProbeStalled",
            "CriuProbeStalled",
            "ProbeIncomplete",
            "RuntimeNotFound",
        ];
        if !slow.contains(&status["reason"].as_str().unwrap_or_default()) {
            return Ok((name, status));
        }
    }
    anyhow::bail!("the probe is too slow")
}

/// All security state of a node that the operator may change, each line a fact.
///
/// # Errors
/// When the node does not answer.
pub fn security_state(node: &str) -> Result<String> {
    // The profile of every container is loaded with the first of them.
    // A connection to a busy emulated machine may not be made in time.
    eventually(Duration::from_secs(30), || {
        on_node(
        node,
        "for f in /proc/sys/kernel/yama/ptrace_scope /proc/sys/kernel/modprobe /proc/sys/kernel/modules_disabled \
             /proc/sys/kernel/seccomp/actions_logged /sys/fs/selinux/enforce /sys/fs/selinux/booleans/deny_ptrace; do \
           [ ! -e $f ] || echo $f $(cat $f); done
         mountpoint -q /sys/kernel/security || mount -t securityfs securityfs /sys/kernel/security 2> /dev/null || true
         cd /sys/kernel/security/apparmor/policy/profiles 2> /dev/null && for p in *; do \
           echo apparmor $(cat $p/name) $(cat $p/mode) $(sha256sum < $p/raw_data); done
         sed 's/ .*//; /_diag$/!d; s/^/module /' /proc/modules | sort
         find /sys/fs/cgroup -name freezer.state -exec grep -l -e FROZEN -e FREEZING {} + 2> /dev/null | sed 's/^/frozen /'
         find /sys/fs/cgroup -name cgroup.freeze -exec grep -l 1 {} + 2> /dev/null | sed 's/^/frozen /'
         [ ! -d /var/lib/kubelet/seccomp ] || find /var/lib/kubelet/seccomp -type f -exec sha256sum {} +
         true",
    )
    })
}

/// The same as before a test, I6, but for modules: where it may, the kernel loads them itself when CRIU asks for sockets.
///
/// # Errors
/// When something is different.
pub fn assert_security_state(node: &str, before: &str) -> Result<()> {
    let after = security_state(node)?;
    let known: Vec<&str> = before.lines().collect();
    let of_kernel = |line: &&str| line.starts_with("module ") && !known.contains(line);
    let same = after.lines().filter(|line| !of_kernel(line)).eq(before.lines());
    ensure!(same, "the node was\n{before}\nand is\n{after}");
    Ok(())
}

/// What a user is told.
///
/// # Errors
/// When there is no such object.
pub fn described(namespace: &Namespace, name: &str) -> Result<String> {
    kubectl(&["-n", &namespace.0, "describe", KIND, name])
}
