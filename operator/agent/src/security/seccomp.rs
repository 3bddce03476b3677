//! A seccomp profile for the pod's next start: a filter cannot be taken off a running process.
//!
//! A filter that asks a listener comes back from a checkpoint without its listener. The profile made here is the
//! container's own, but for what it asks about, which is allowed. It lies where the kubelet looks for Localhost profiles, in
//! a folder of the PodCheckpoint's own, for as long as that exists; it changes nothing until a pod names it.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use podcheckpoint_crds::{Patch, PatchKind};
use rustix::fs::{Mode, mkdirat};
use serde_json::Value;

use crate::journal::write_bytes_synced;
use crate::node::nodefs::{self, KUBELET, NODE_ROOT};

/// Where it looks for Localhost profiles, below that.
const SECCOMP: &str = "seccomp";
/// Our folder there.
const OURS: &str = "podcheckpoint";

/// Names of the OCI runtime specification, config-linux.md, section Seccomp.
const NOTIFY: &str = "SCMP_ACT_NOTIFY";
const ALLOW: &str = "SCMP_ACT_ALLOW";
/// Only a filter with a listener may have it, seccomp(2).
const WAIT_KILLABLE: &str = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";

/// A profile without a listener.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// As the kubelet's runtime reads it.
    pub text: Value,
    /// The system calls that the listener was asked about, and that are allowed now.
    pub calls: Vec<String>,
}

/// The profile of a container, without its listener; `None` when its own specification asks no listener. Pure.
pub fn without_listener(spec: &Value) -> Option<Profile> {
    let mut text = spec.pointer("/linux/seccomp")?.clone();
    let profile = text.as_object_mut()?;
    let mut calls = Vec::new();
    for rule in profile.get_mut("syscalls").and_then(Value::as_array_mut)? {
        let Some(rule) = rule
            .as_object_mut()
            .filter(|rule| rule.get("action") == Some(&NOTIFY.into()))
        else {
            continue;
        };
        let names = rule.get("names").and_then(Value::as_array);
        calls.extend(
            names
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned),
        );
        rule.insert("action".into(), ALLOW.into());
        rule.remove("errnoRet");
    }
    // A profile that asks about whatever it does not name would have to allow everything.
    if calls.is_empty() || profile.get("defaultAction") == Some(&NOTIFY.into()) {
        return None;
    }
    for of_listener in ["listenerPath", "listenerMetadata"] {
        profile.remove(of_listener);
    }
    if let Some(flags) = profile.get_mut("flags").and_then(Value::as_array_mut) {
        flags.retain(|flag| flag != WAIT_KILLABLE);
    }
    calls.sort();
    calls.dedup();
    Some(Profile { text, calls })
}

/// The name by which a pod refers to a profile.
pub fn localhost_profile(uid: &str, container: &str) -> String {
    format!("{OURS}/{uid}/{container}.json")
}

/// As a status shows it. It lasts for as long as its object.
pub fn describe(uid: &str, container: &str, profile: &Profile) -> Patch {
    Patch {
        kind: PatchKind::Seccomp,
        setting: format!("seccomp profile {}", localhost_profile(uid, container)),
        scope: "the next pod that names it".into(),
        before: "not there".into(),
        after: format!(
            "the container's own profile, but {} allowed",
            profile.calls.join(", ")
        ),
        exposes: "a pod that names it may make those system calls without asking the listener".into(),
        at_most_seconds: 0,
        applied_time: None,
        reverted_time: None,
        outcome: None,
    }
}

/// The part of a pod's manifest that uses the profiles of its containers.
pub fn manifest<'a>(uid: &str, containers: impl Iterator<Item = &'a str>) -> String {
    let container = |name: &str| {
        format!(
            "{{name: {name}, securityContext: {{seccompProfile: {{type: Localhost, localhostProfile: {}}}}}}}",
            localhost_profile(uid, name)
        )
    };
    let containers: Vec<String> = containers.map(container).collect();
    format!("`containers: [{}]`", containers.join(", "))
}

/// The profiles on a node.
#[derive(Clone, Debug)]
pub struct Profiles {
    root: PathBuf,
}

impl Default for Profiles {
    fn default() -> Self {
        Self {
            root: NODE_ROOT.into(),
        }
    }
}

impl Profiles {
    /// Writes the profile of a container.
    ///
    /// # Errors
    /// When the kubelet's folder is not there, others than root may write to it, or the disk refuses.
    pub fn write(&self, uid: &str, container: &str, profile: &Profile) -> io::Result<()> {
        let kubelet = nodefs::open(&self.root, KUBELET)?;
        match mkdirat(&kubelet, SECCOMP, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let folder = self.folder()?;
        let path = below(&folder).join(localhost_profile(uid, container));
        write_bytes_synced(&path, &serde_json::to_vec_pretty(&profile.text)?)
    }

    /// Removes the profiles of an object.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove(&self, uid: &str) -> io::Result<()> {
        let folder = match self.folder() {
            Ok(folder) => folder,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let ours = below(&folder).join(OURS);
        match fs::remove_dir_all(ours.join(uid)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Others' profiles keep it.
        let _ = fs::remove_dir(ours);
        Ok(())
    }

    /// The objects that have profiles on this node.
    pub fn uids(&self) -> Vec<String> {
        let Ok(folder) = self.folder() else {
            return Vec::new();
        };
        let names = fs::read_dir(below(&folder).join(OURS))
            .into_iter()
            .flatten()
            .flatten();
        names
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    fn folder(&self) -> io::Result<OwnedFd> {
        nodefs::open(&self.root, &format!("{KUBELET}/{SECCOMP}"))
    }
}

/// The path of an open folder, in which nobody but root can place links.
fn below(folder: &OwnedFd) -> PathBuf {
    Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn spec() -> Value {
        json!({"linux": {"seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG", WAIT_KILLABLE],
            "listenerPath": "/run/agent.sock", "listenerMetadata": "x",
            "syscalls": [
                {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["mount", "chmod"], "action": "SCMP_ACT_NOTIFY"},
                {"names": ["ptrace"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
            ],
        }}})
    }

    #[test]
    fn only_what_the_listener_was_asked_about_is_allowed() {
        let profile = without_listener(&spec()).unwrap();
        assert_eq!(profile.calls, ["chmod", "mount"]);
        let mut wanted = spec()["linux"]["seccomp"].clone();
        wanted["syscalls"][1]["action"] = json!("SCMP_ACT_ALLOW");
        wanted["flags"] = json!(["SECCOMP_FILTER_FLAG_LOG"]);
        let wanted_keys = wanted.as_object_mut().unwrap();
        wanted_keys.remove("listenerPath");
        wanted_keys.remove("listenerMetadata");
        assert_eq!(profile.text, wanted);
    }

    #[test]
    fn a_profile_that_asks_nothing_or_about_everything_gives_none() {
        assert_eq!(without_listener(&json!({})), None);
        let mut quiet = spec();
        quiet["linux"]["seccomp"]["syscalls"][1]["action"] = json!("SCMP_ACT_ERRNO");
        assert_eq!(without_listener(&quiet), None);
        let mut all = spec();
        all["linux"]["seccomp"]["defaultAction"] = json!(NOTIFY);
        assert_eq!(without_listener(&all), None);
    }

    fn node() -> (tempfile::TempDir, Profiles) {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join(KUBELET)).unwrap();
        let profiles = Profiles {
            root: root.path().to_owned(),
        };
        (root, profiles)
    }

    #[test]
    fn a_profile_is_there_until_it_is_removed_and_others_stay() {
        let (root, profiles) = node();
        let profile = without_listener(&spec()).unwrap();
        profiles.write("u-1", "main", &profile).unwrap();
        profiles.write("u-2", "main", &profile).unwrap();
        let path = root
            .path()
            .join(KUBELET)
            .join(SECCOMP)
            .join(localhost_profile("u-1", "main"));
        assert_eq!(
            serde_json::from_slice::<Value>(&fs::read(&path).unwrap()).unwrap(),
            profile.text
        );
        let mut uids = profiles.uids();
        uids.sort();
        assert_eq!(uids, ["u-1", "u-2"]);
        profiles.remove("u-1").unwrap();
        profiles.remove("u-1").unwrap();
        assert_eq!(profiles.uids(), ["u-2"]);
        profiles.remove("u-2").unwrap();
        assert!(!root.path().join(KUBELET).join(SECCOMP).join(OURS).exists());
    }

    #[test]
    fn a_link_out_of_the_node_and_a_folder_that_others_may_write_are_not_followed() {
        let (root, profiles) = node();
        let outside = tempfile::tempdir().unwrap();
        let profile = without_listener(&spec()).unwrap();
        let seccomp = root.path().join(KUBELET).join(SECCOMP);
        symlink(outside.path(), &seccomp).unwrap();
        profiles.write("u-1", "main", &profile).unwrap_err();
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        fs::remove_file(&seccomp).unwrap();
        fs::create_dir(&seccomp).unwrap();
        fs::set_permissions(&seccomp, fs::Permissions::from_mode(0o777)).unwrap();
        let error = profiles.write("u-1", "main", &profile).unwrap_err();
        assert!(error.to_string().contains("others than root"), "{error}");
    }
}
