//! Pods on gVisor's kernel, and the restore of their archives with runsc outside Kubernetes, beside the pod.

#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON yields null and never panics"
)]

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::restore::own_spec;
use crate::scenario::{IMAGE, Namespace};
use crate::{kubectl, on_node, on_node_with};

/// Where the restored sandbox and its books are.
const FOLDER: &str = "/var/lib/podcheckpoint/restored/gvisor";
const RUNSC: &str = "runsc --root /run/restored-gvisor --network=none --ignore-cgroups";

/// Starts a pod of the RuntimeClass gvisor whose containers keep what they write in their root filesystems.
///
/// # Errors
/// When it does not run in time.
pub fn pod(namespace: &Namespace, name: &str, containers: &[(&str, &str)]) -> Result<()> {
    let container = |(name, script): &(&str, &str)| json!({"name": name, "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", script]});
    let containers: Vec<Value> = containers.iter().map(container).collect();
    let spec =
        json!({"runtimeClassName": "gvisor", "terminationGracePeriodSeconds": 0, "containers": containers});
    namespace.manifest("v1", "Pod", name, spec)?;
    let pod = format!("pod/{name}");
    kubectl(&[
        "-n",
        &namespace.0,
        "wait",
        "--for=condition=Ready",
        &pod,
        "--timeout=90s",
    ])
    .map(drop)
}

/// The process of gVisor's kernel of a pod with this UID.
///
/// # Errors
/// When there is none.
pub fn sentry(uid: &str) -> Result<String> {
    let script = format!(
        "for p in $(pgrep -f '^runsc-sandbox'); do if grep -q pod{uid} /proc/$p/cgroup; then echo $p; exit; fi; done; exit 1"
    );
    Ok(on_node("node1", &script)?.trim().to_owned())
}

/// Runs runsc on the sandbox of a pod with this UID, in the pod's own books; `SANDBOX` is its identifier.
///
/// # Errors
/// When it fails.
pub fn runsc(uid: &str, arguments: &str) -> Result<String> {
    let pid = sentry(uid)?;
    let script = format!(
        "a=$(tr '\\0' '\\n' < /proc/{pid}/cmdline); SANDBOX=$(echo \"$a\" | tail -n 1)
         runsc $(echo \"$a\" | grep -m1 '^--root=') {arguments}"
    );
    on_node("node1", &script)
}

/// A sandbox that was restored.
#[derive(Debug)]
pub struct Restored(Value);

/// Restores an archive on node1.
///
/// # Errors
/// When a step fails, with what was printed.
pub fn restore(archive: &str) -> Result<Restored> {
    let manifest: Value = serde_json::from_str(&on_node("node1", &format!("cat {archive}/manifest.json"))?)
        .context("reading the manifest")?;
    let restored = Restored(manifest);
    restored.remove()?;
    let mut members = vec![("sandbox".to_owned(), restored.0["of"]["sandbox"].clone())];
    for container in restored.containers() {
        let name = container["name"].as_str().unwrap_or_default();
        members.push((format!("containers/{name}"), container["id"].clone()));
    }
    for (folder, id) in members {
        one(archive, &folder, id.as_str().unwrap_or_default())?;
    }
    Ok(restored)
}

fn one(archive: &str, folder: &str, id: &str) -> Result<()> {
    let bundle = format!("{FOLDER}/{folder}");
    let text = on_node("node1", &format!("cat {archive}/{folder}/config.json"))?;
    let spec: Value = serde_json::from_str(&text).context("reading a specification")?;
    let annotations = &spec["annotations"];
    let names = [
        "io.kubernetes.cri.image-name",
        "io.kubernetes.cri.podsandbox.image-name",
    ];
    let image = names
        .iter()
        .find_map(|name| annotations[name].as_str().map(str::to_owned));
    let image = image.context("the specification names no image")?;
    // A root filesystem that can be written has an overlay in gVisor's kernel, and the state must have the same ones.
    let read_only = spec["root"]["readonly"].clone();
    let (mut config, copies) = own_spec(spec, &bundle, id);
    config["root"]["readonly"] = json!(read_only.as_bool().unwrap_or_default());
    for namespace in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
        if let Some(namespace) = namespace.as_object_mut() {
            namespace.remove("path");
        }
    }
    on_node(
        "node1",
        &format!(
            "mkdir -p {bundle}/rootfs; ctr -n k8s.io images mount --rw {image} {bundle}/rootfs >/dev/null"
        ),
    )?;
    on_node_with(
        "node1",
        &format!("cat > {bundle}/config.json"),
        config.to_string().as_bytes(),
    )?;
    for (from, to) in copies {
        on_node("node1", &format!("mkdir -p $(dirname {to}); cp -a {from} {to}"))?;
    }
    let run = format!(
        "{RUNSC} restore --detach --image-path {archive} --bundle {bundle} {id} </dev/null >{bundle}/out 2>&1 ||
           {{ cat {bundle}/out >&2; exit 1; }}"
    );
    on_node("node1", &run).map(drop)
}

impl Restored {
    fn containers(&self) -> Vec<Value> {
        self.0["of"]["containers"].as_array().cloned().unwrap_or_default()
    }

    /// Where a counter stands.
    ///
    /// # Errors
    /// When the container cannot be asked.
    pub fn count(&self, container: &str) -> Result<u64> {
        let all = self.containers();
        let found = all.iter().find(|c| c["name"] == container);
        let id = found
            .and_then(|c| c["id"].as_str())
            .context("no such container")?;
        let read = || {
            let text = on_node("node1", &format!("{RUNSC} exec {id} cat /tmp/n"))?;
            text.trim()
                .parse()
                .with_context(|| format!("not a count: {text:?}"))
        };
        crate::eventually(Duration::from_secs(20), read)
    }

    /// Ends it and removes what was made for it.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn remove(&self) -> Result<()> {
        let script = format!(
            "for id in $({RUNSC} list -quiet); do {RUNSC} delete -force $id; done
             for bundle in {FOLDER}/sandbox {FOLDER}/containers/*; do
               ctr -n k8s.io images unmount --rm $bundle/rootfs >/dev/null 2>&1; done
             rm -rf {FOLDER}"
        );
        on_node("node1", &script).map(drop)
    }
}
