//! What a checkpoint by gVisor's kernel leaves on the disk: a folder with the state, the OCI specification of the sandbox
//! and of each container, a manifest that says what it is and how it is restored, and SHA256SUMS over all of it.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::save::Seen;
use super::{GvisorError, STATE};
use crate::archive::{ArchiveError, Verified, sum_folder};
use crate::node::cri::Container;
use crate::sandbox::Sentry;

/// Name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// How it is restored, for the manifest.
const RESTORE: [&str; 5] = [
    "Use the runsc version that is named here: another one need not understand the state.",
    "Make a bundle of the sandbox and of each container: its config.json from this archive, and a folder rootfs from its image. What the pod has changed there is in the state.",
    "In each config.json, let the sources of bind mounts be what the volumes held, and leave the paths of namespaces out. root.readonly and the annotations must stay as they are.",
    "First the sandbox, under its own identifier: runsc --root ROOT --network=none --ignore-cgroups restore --detach --image-path ARCHIVE --bundle BUNDLE SANDBOX",
    "Then each container, under its own identifier, in the same way. The pod goes on when the last of them is there.",
];

/// Who a checkpoint is of.
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
    /// Its containers: all that are in the sandbox.
    pub containers: Vec<Member>,
}

/// A container of the sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// Its name in the pod.
    pub name: String,
    /// Its identifier, by which the state knows it.
    pub id: String,
    /// Its image as the pod names it.
    pub image: Option<String>,
}

impl Member {
    /// A container as the runtime tells of it.
    pub fn of(container: &Container) -> Self {
        Self {
            name: container.name.clone(),
            id: container.id.clone(),
            image: container.image.clone(),
        }
    }
}

/// Writes everything but the state.
///
/// # Errors
/// When the disk refuses or a specification cannot be read.
pub fn describe(folder: &Path, of: &Of, sentry: &Sentry, seen: &Seen) -> Result<(), GvisorError> {
    let names = std::iter::once("sandbox".to_owned())
        .chain(of.containers.iter().map(|c| format!("containers/{}", c.name)));
    for (name, bundle) in names.zip(&seen.bundles) {
        let from = on_node(bundle).join("config.json");
        let to = folder.join(name);
        fs::create_dir_all(&to)
            .and_then(|()| fs::copy(&from, to.join("config.json")))
            .map_err(|error| unusable(&from, &error))?;
    }
    let path = folder.join(MANIFEST);
    let json = serde_json::to_vec_pretty(&manifest(of, sentry, seen)).map_err(io::Error::other);
    json.and_then(|json| fs::write(&path, json))
        .map_err(|error| unusable(&path, &error))
}

/// Process 1 has the node's root.
fn on_node(path: &Path) -> std::path::PathBuf {
    Path::new("/proc/1/root").join(path.strip_prefix("/").unwrap_or(path))
}

fn unusable(path: &Path, error: &io::Error) -> GvisorError {
    GvisorError::Unusable {
        what: path.display().to_string(),
        why: error.to_string(),
    }
}

fn manifest(of: &Of, sentry: &Sentry, seen: &Seen) -> serde_json::Value {
    serde_json::json!({
        "kind": "GVisor",
        "of": of,
        "takenAt": k8s_openapi::jiff::Timestamp::now().to_string(),
        "runscVersion": seen.version,
        "runscRoot": sentry.root,
        "consistency": consistency(sentry.overlay),
        "connections": "Network connections to the outside end with a restore.",
        "restore": RESTORE,
    })
}

fn consistency(overlay: bool) -> &'static str {
    if overlay {
        "memory and the root filesystems' changes of one moment, of every container of the pod; volumes are not in the archive"
    } else {
        "memory of one moment, of every container of the pod; neither volumes nor what was changed in the root filesystems are in the archive"
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
    }
    let incomplete = |what: &str| ArchiveError::Incomplete(what.to_owned());
    let bytes = fs::read(folder.join(MANIFEST)).map_err(|_| incomplete(MANIFEST))?;
    let inside: Inside = serde_json::from_slice(&bytes)
        .map_err(|error| ArchiveError::Unreadable(format!("{MANIFEST}: {error}")))?;
    if inside.of != *expected {
        return Err(ArchiveError::Identity {
            found: identity(&inside.of),
            expected: identity(expected),
        });
    }
    let specifications = expected
        .containers
        .iter()
        .map(|c| format!("containers/{}/config.json", c.name));
    let required = [STATE.to_owned(), "sandbox/config.json".to_owned()];
    for name in required.into_iter().chain(specifications) {
        let filled = fs::metadata(folder.join(&name)).is_ok_and(|m| m.len() > 0);
        if !filled {
            return Err(incomplete(&name));
        }
    }
    sum_folder(folder)
}

fn identity(of: &Of) -> String {
    format!("pod {}/{} ({})", of.namespace, of.pod, of.pod_uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of() -> Of {
        Of {
            pod_uid: "u".into(),
            namespace: "n".into(),
            pod: "p".into(),
            sandbox: "s".into(),
            containers: vec![Member {
                name: "main".into(),
                id: "c".into(),
                image: None,
            }],
        }
    }

    fn whole(folder: &Path) {
        let sentry = Sentry {
            pid: 1,
            started: 1,
            root: "/r".into(),
            sandbox: "s".into(),
            overlay: true,
        };
        let seen = Seen {
            version: "1".into(),
            bundles: Vec::new(),
        };
        describe(folder, &of(), &sentry, &seen).unwrap();
        for name in ["sandbox", "containers/main"] {
            fs::create_dir_all(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("config.json"), "{}").unwrap();
        }
        fs::write(folder.join(STATE), "state").unwrap();
    }

    #[test]
    fn what_is_whole_and_of_the_pod_is_verified() {
        let folder = tempfile::tempdir().unwrap();
        whole(folder.path());
        assert!(verify(folder.path(), &of()).unwrap().size > 0);
        let sums = fs::read_to_string(folder.path().join("SHA256SUMS")).unwrap();
        assert_eq!(sums.lines().count(), 4);
    }

    #[test]
    fn an_empty_state_is_no_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        whole(folder.path());
        fs::write(folder.path().join(STATE), "").unwrap();
        assert!(matches!(
            verify(folder.path(), &of()),
            Err(ArchiveError::Incomplete(what)) if what == STATE
        ));
    }

    #[test]
    fn another_pods_checkpoint_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        whole(folder.path());
        let other = Of {
            pod_uid: "other".into(),
            ..of()
        };
        assert!(matches!(
            verify(folder.path(), &other),
            Err(ArchiveError::Identity { .. })
        ));
    }
}
