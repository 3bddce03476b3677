//! Restores an archive with runc, outside Kubernetes, beside the pod that it was taken of: the proof that it is one.

#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null and never panics"
)]

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{on_node, on_node_with};

/// A container that was restored.
#[derive(Debug)]
pub struct Restored {
    /// Node on which it runs.
    pub node: String,
    /// Its name for runc.
    pub id: String,
    /// Its main process.
    pub pid: String,
}

/// Restores the archive of one container. `archive` is a tar or a folder on the node, `image` what its root file
/// system is made of.
///
/// # Errors
/// When a step fails, with what was printed.
pub fn restore(node: &str, archive: &str, image: &str, id: &str) -> Result<Restored> {
    let bundle = format!("/var/lib/podcheckpoint/restored/{id}");
    let unpack = format!(
        "ctr -n k8s.io images unmount --rm {bundle}/rootfs >/dev/null 2>&1
         set -e; rm -rf {bundle}; mkdir -p {bundle}/rootfs {bundle}/work; cd {bundle}
         if [ -d {archive} ]; then cp -a {archive}/. .; else tar xf {archive}; fi
         ctr -n k8s.io images mount --rw {image} {bundle}/rootfs >/dev/null
         [ ! -s rootfs-diff.tar ] || tar xf rootfs-diff.tar -C rootfs
         cat spec.dump"
    );
    let spec: Value = serde_json::from_str(&on_node(node, &unpack)?).context("reading spec.dump")?;
    let (mut config, copies) = own_spec(spec, &bundle, id);
    // CRIU would put the processes into the cgroup of the pod that they were saved in, which may be gone, or frozen.
    config["annotations"]["org.criu.config"] = json!(format!("{bundle}/criu.conf"));
    on_node(node, &format!("echo manage-cgroups=ignore > {bundle}/criu.conf"))?;
    on_node_with(
        node,
        &format!("cat > {bundle}/config.json"),
        config.to_string().as_bytes(),
    )?;
    for (from, to) in copies {
        on_node(node, &format!("mkdir -p $(dirname {to}); cp -a {from} {to}"))?;
    }
    let run = format!(
        "set -e; cd {bundle}; ip netns add {id}; ip netns exec {id} ip link set lo up
         runc --root /run/restored restore --detach --bundle {bundle} --image-path {bundle}/checkpoint \\
           --work-path {bundle}/work --pid-file {bundle}/pid {id} </dev/null >{bundle}/out 2>&1 ||
           {{ cat {bundle}/out >&2; grep Error {bundle}/work/restore.log >&2; exit 1; }}
         cat {bundle}/pid"
    );
    let pid = on_node(node, &run)?.trim().to_owned();
    Ok(Restored {
        node: node.to_owned(),
        id: id.to_owned(),
        pid,
    })
}

impl Restored {
    /// Runs a shell script in the restored container's file system.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, script: &str) -> Result<String> {
        on_node(
            &self.node,
            &format!("nsenter -t {} -m -n -r /bin/sh -c '{script}'", self.pid),
        )
    }

    /// Ends it and removes what was made for it.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn remove(&self) -> Result<()> {
        let (id, bundle) = (&self.id, format!("/var/lib/podcheckpoint/restored/{}", self.id));
        let script = format!(
            "runc --root /run/restored delete --force {id}; ip netns del {id}
             ctr -n k8s.io images unmount --rm {bundle}/rootfs >/dev/null; rm -rf {bundle}"
        );
        on_node(&self.node, &script).map(drop)
    }
}

/// The container's own specification, with namespaces, volumes and a cgroup of its own instead of the pod's. The
/// second value is what has to be copied.
pub(crate) fn own_spec(mut spec: Value, bundle: &str, id: &str) -> (Value, Vec<(String, String)>) {
    spec["root"] = json!({ "path": "rootfs" });
    spec["linux"]["cgroupsPath"] = json!(format!("/podcheckpoint-restored/{id}"));
    for namespace in spec["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
        let network = namespace["type"] == "network";
        if let Some(namespace) = namespace.as_object_mut() {
            namespace.remove("path");
            if network {
                namespace.insert("path".into(), json!(format!("/run/netns/{id}")));
            }
        }
    }
    let mut copies = Vec::new();
    for (number, mount) in spec["mounts"].as_array_mut().into_iter().flatten().enumerate() {
        if mount["type"] == "bind" {
            let own = format!("{bundle}/mounts/{number}");
            copies.push((
                mount["source"].as_str().unwrap_or_default().to_owned(),
                own.clone(),
            ));
            mount["source"] = json!(own);
        }
    }
    (spec, copies)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_container_shares_nothing_with_the_pod() {
        let spec = json!({
            "root": {"path": "/run/x"},
            "linux": {"cgroupsPath": "/kubepods/x", "namespaces": [{"type": "network", "path": "/proc/1/ns/net"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}]},
            "mounts": [{"type": "proc", "source": "proc"}, {"type": "bind", "source": "/var/lib/kubelet/x", "destination": "/x"}],
        });
        let (own, copies) = own_spec(spec, "/b", "r1");
        assert_eq!(
            own["linux"]["namespaces"],
            json!([{"type": "network", "path": "/run/netns/r1"}, {"type": "ipc"}])
        );
        assert_eq!(
            copies,
            [("/var/lib/kubelet/x".to_owned(), "/b/mounts/1".to_owned())]
        );
        assert_eq!(own["mounts"][1]["source"], "/b/mounts/1");
    }
}
