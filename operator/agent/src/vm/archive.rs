//! What a snapshot leaves on the disk: a folder with the state, a manifest that says what it is and how it is restored,
//! and SHA256SUMS over all of it.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::VmError;
use super::snapshot::{Copied, Taken};
use crate::archive::{ArchiveError, Verified, sum_folder};
use crate::sandbox::{Machine, VmmKind};

/// Name of the manifest.
pub const MANIFEST: &str = "manifest.json";

/// Who a snapshot is of.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Of {
    /// UID of the pod.
    pub pod_uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// Identifier of its sandbox.
    pub sandbox: String,
    /// Its containers: all that are in the machine, whether they were chosen or not.
    pub containers: Vec<String>,
}

/// Writes the manifest.
///
/// # Errors
/// When the disk refuses.
pub fn write_manifest(folder: &Path, of: &Of, machine: &Machine, taken: &Taken) -> Result<(), VmError> {
    let path = folder.join(MANIFEST);
    let json = serde_json::to_vec_pretty(&manifest(of, machine, taken)).map_err(io::Error::other);
    json.and_then(|json| fs::write(&path, json))
        .map_err(VmError::disk(&path))
}

fn manifest(of: &Of, machine: &Machine, taken: &Taken) -> serde_json::Value {
    let description = &taken.description;
    serde_json::json!({
        "kind": "VMSnapshot",
        "of": of,
        "takenAt": k8s_openapi::jiff::Timestamp::now().to_string(),
        "pausedMicros": u64::try_from(taken.paused.as_micros()).unwrap_or(u64::MAX),
        "vmm": machine.vmm.as_str(),
        "vmmVersion": description.version,
        "format": description.format,
        "memoryBytes": description.memory.or(machine.memory),
        "commandLine": machine.arguments,
        "disks": taken.disks,
        "consistency": consistency(&taken.disks),
        "guestClock": "The guest's clock goes on from the moment of the snapshot: set it after a restore (in the guest: hwclock --hctosys, or chronyc makestep).",
        "connections": "Network connections and vsock connections of the guest end with a restore.",
        "restore": taken.restore_with,
    })
}

fn consistency(disks: &[Copied]) -> &'static str {
    let left_out = disks
        .iter()
        .any(|disk| !disk.disk.read_only && disk.copy.is_none());
    if left_out {
        "crash-consistent; memory only: a disk that the guest writes to was not copied (see disks), and must be as it was at takenAt"
    } else {
        "crash-consistent: memory, devices and disks of one moment; nothing in the guest was told"
    }
}

/// Checks that everything is there and of the right pod, writes SHA256SUMS and syncs it all.
///
/// # Errors
/// When something is missing, of another pod, or the disk refuses.
pub fn verify(folder: &Path, expected: &Of) -> Result<Verified, ArchiveError> {
    #[derive(Deserialize)]
    struct Inside {
        of: Of,
        vmm: String,
    }
    let incomplete = |what: &str| ArchiveError::Incomplete(what.to_owned());
    let bytes = fs::read(folder.join(MANIFEST)).map_err(|_| incomplete(MANIFEST))?;
    let inside: Inside = serde_json::from_slice(&bytes)
        .map_err(|error| ArchiveError::Unreadable(format!("{MANIFEST}: {error}")))?;
    if inside.of != *expected {
        return Err(ArchiveError::Identity {
            found: format!(
                "pod {}/{} ({})",
                inside.of.namespace, inside.of.pod, inside.of.pod_uid
            ),
            expected: format!(
                "pod {}/{} ({})",
                expected.namespace, expected.pod, expected.pod_uid
            ),
        });
    }
    for name in files_of(&inside.vmm) {
        if !fs::symlink_metadata(folder.join(name)).is_ok_and(|m| m.is_file() && m.len() > 0) {
            return Err(incomplete(name));
        }
    }
    sum_folder(folder)
}

/// The files without which a state is none; pure. QEMU and libvirt write one.
fn files_of(vmm: &str) -> &'static [&'static str] {
    if vmm == VmmKind::Firecracker.as_str() {
        &["vmstate", "memory"]
    } else if vmm == VmmKind::CloudHypervisor.as_str() {
        &["config.json", "state.json", "memory-ranges"]
    } else {
        &["vmstate"]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_whole_when_every_file_of_its_monitor_is_there() {
        let of = Of {
            pod_uid: "u".into(),
            namespace: "shop".into(),
            pod: "cart".into(),
            sandbox: "s".into(),
            containers: vec!["main".into()],
        };
        for vmm in [VmmKind::Qemu, VmmKind::Firecracker, VmmKind::CloudHypervisor] {
            let folder = tempfile::tempdir().unwrap();
            let manifest = serde_json::json!({"of": of, "vmm": vmm.as_str()});
            fs::write(folder.path().join(MANIFEST), manifest.to_string()).unwrap();
            for name in files_of(vmm.as_str()) {
                let error = verify(folder.path(), &of).unwrap_err();
                assert!(error.to_string().contains(name), "{vmm:?}: {error}");
                fs::write(folder.path().join(name), "x").unwrap();
            }
            assert!(verify(folder.path(), &of).is_ok(), "{vmm:?}");
        }
    }
}
