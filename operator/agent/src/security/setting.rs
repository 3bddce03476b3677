//! The settings that can be changed for the time of a checkpoint: reading and writing each.

use std::io;
use std::time::{Duration, Instant};

use podcheckpoint_crds::PatchKind;
use serde::{Deserialize, Serialize};

use sha2::{Digest, Sha256};

use super::apparmor::{self, ProfileError};
use super::kernelfs::KernelFs;
use super::module;
use crate::node::cgroup::{Control, Freezer, FreezerError, Version};

/// How long a cgroup may take to come to rest after it was told to freeze.
const SETTLE: Duration = Duration::from_secs(1);

const LOADED: &str = "loaded";
const NOT_LOADED: &str = "not loaded";

/// The boolean that forbids ptrace under SELinux.
const DENY_PTRACE: &str = "deny_ptrace";
/// Yama's setting below /proc, Documentation/admin-guide/LSM/Yama.rst.
const PTRACE_SCOPE: &str = "sys/kernel/yama/ptrace_scope";

/// One setting of the node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Setting {
    /// A cgroup that holds the target: `frozen` or `thawed`.
    Freezer {
        /// The cgroup that was told to freeze.
        cgroup: Freezer,
        /// It is the whole pod's and not only one container's.
        of_pod: bool,
    },
    /// SELinux' boolean deny_ptrace: `on` or `off`.
    DenyPtrace,
    /// kernel.yama.ptrace_scope: `0` to `3`.
    PtraceScope,
    /// An AppArmor profile: its mode, and a hash of the policy that it was loaded from.
    AppArmorProfile {
        /// Its name in the first namespace, which may hold any character.
        name: String,
    },
    /// A module of the kernel: `loaded` or `not loaded`.
    KernelModule {
        /// Its name, as the kernel writes it.
        name: String,
    },
}

/// What a change would do to a setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The value now.
    pub before: String,
    /// The value that a checkpoint needs.
    pub after: String,
    /// Bytes that putting it back needs besides the value.
    pub kept: Option<Vec<u8>>,
}

/// A setting could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SettingError {
    /// The kernel refused, or has no such setting.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A cgroup could not be read or written.
    #[error(transparent)]
    Freezer(#[from] FreezerError),
    /// The kernel took the value and has another one.
    #[error("{wanted} was written, and it is {found}")]
    NotTaken {
        /// What was written.
        wanted: String,
        /// What is there.
        found: String,
    },
    /// An AppArmor profile could not be read or loaded.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// A module that something uses is not unloaded.
    #[error("it is in use")]
    InUse,
    /// A value that this setting cannot have.
    #[error("{0:?} is no value of this setting")]
    BadValue(String),
}

impl Setting {
    /// Its kind.
    pub fn kind(&self) -> PatchKind {
        match self {
            Self::Freezer { .. } => PatchKind::Freezer,
            Self::DenyPtrace => PatchKind::Selinux,
            Self::PtraceScope => PatchKind::Yama,
            Self::AppArmorProfile { .. } => PatchKind::AppArmor,
            Self::KernelModule { .. } => PatchKind::KernelModule,
        }
    }

    /// Its name, for people and as what tells settings apart.
    pub fn name(&self) -> String {
        match self {
            Self::Freezer { cgroup, .. } => format!("freezer {}", cgroup.path.display()),
            Self::DenyPtrace => format!("SELinux boolean {DENY_PTRACE}"),
            Self::PtraceScope => "kernel.yama.ptrace_scope".into(),
            // As the kernel gave it, but for what would break a line.
            Self::AppArmorProfile { name } => format!("AppArmor profile {}", name.escape_debug()),
            Self::KernelModule { name } => format!("kernel module {name}"),
        }
    }

    /// What a change affects besides the target.
    pub fn scope(&self) -> &'static str {
        match self {
            Self::Freezer { of_pod: false, .. } => "container",
            Self::Freezer { of_pod: true, .. } => "pod",
            Self::AppArmorProfile { .. } => "profile",
            Self::DenyPtrace | Self::PtraceScope | Self::KernelModule { .. } => "node",
        }
    }

    /// What a change exposes.
    pub fn exposes(&self) -> &'static str {
        match self {
            Self::Freezer { .. } => "the processes run, which whoever froze them did not want",
            Self::DenyPtrace => {
                "SELinux no longer forbids any process of the node to trace what it otherwise may trace"
            }
            Self::PtraceScope => {
                "any process of the node may trace processes of its own user, not only its children"
            }
            Self::AppArmorProfile { .. } => {
                "every process of the node under this profile may do what it does not mention, and the kernel logs it; what it denies by name stays denied"
            }
            Self::KernelModule { .. } => {
                "processes of the node can use what the module offers, here to list sockets, and its code runs in the kernel"
            }
        }
    }

    /// What a change would do; reads, and changes nothing.
    ///
    /// # Errors
    /// When the kernel has no such setting, or it cannot be changed.
    pub fn change(&self) -> Result<Change, SettingError> {
        if let Self::AppArmorProfile { name } = self {
            let profile = apparmor::read(name)?.ok_or_else(|| SettingError::BadValue(NOT_LOADED.into()))?;
            let changed = apparmor::complaining(name, &profile.policy)?;
            return Ok(Change {
                before: profile_value(&profile.mode, &profile.policy),
                after: profile_value("complain", &changed),
                kept: Some(profile.policy),
            });
        }
        Ok(Change {
            before: self.read()?,
            after: self.wanted().to_owned(),
            kept: None,
        })
    }

    /// The value that a checkpoint needs, in a word.
    pub fn wanted(&self) -> &'static str {
        match self {
            Self::Freezer { .. } => "thawed",
            Self::DenyPtrace => "off",
            Self::PtraceScope => "0",
            Self::AppArmorProfile { .. } => "complain",
            Self::KernelModule { .. } => LOADED,
        }
    }

    /// Whether the value is what a checkpoint needs.
    pub fn suffices(&self, value: &str) -> bool {
        value.split(',').next() == Some(self.wanted())
    }

    /// Reads it.
    ///
    /// # Errors
    /// When the kernel has no such setting.
    pub fn read(&self) -> Result<String, SettingError> {
        match self {
            Self::Freezer { cgroup, .. } => {
                let told = cgroup.is_told_to_freeze()?;
                Ok(if told { "frozen" } else { "thawed" }.to_owned())
            }
            // "1 0": the value, and the one that is pending.
            Self::DenyPtrace => {
                let text = KernelFs::Selinux.read(&format!("booleans/{DENY_PTRACE}"))?;
                Ok(if text.starts_with('1') { "on" } else { "off" }.to_owned())
            }
            Self::PtraceScope => Ok(KernelFs::Proc.read(PTRACE_SCOPE)?),
            Self::AppArmorProfile { name } => Ok(apparmor::read(name)?
                .map_or(NOT_LOADED.to_owned(), |profile| {
                    profile_value(&profile.mode, &profile.policy)
                })),
            Self::KernelModule { name } => {
                let loaded = module::is_loaded(name)?;
                Ok(if loaded { LOADED } else { NOT_LOADED }.to_owned())
            }
        }
    }

    /// Writes it, and reads it again. `kept` is what its [`Change`] kept.
    ///
    /// # Errors
    /// When the kernel refuses, or has another value afterwards.
    pub fn write(&self, value: &str, kept: Option<&[u8]>) -> Result<(), SettingError> {
        match (self, value) {
            (Self::Freezer { cgroup, .. }, "thawed") => cgroup.thaw_itself()?,
            (Self::Freezer { cgroup, .. }, "frozen") => freeze(cgroup)?,
            (Self::DenyPtrace, "on" | "off") => {
                let digit = if value == "on" { "1" } else { "0" };
                KernelFs::Selinux.write(&format!("booleans/{DENY_PTRACE}"), digit)?;
                KernelFs::Selinux.write("commit_pending_bools", "1")?;
            }
            (Self::PtraceScope, "0" | "1" | "2") => KernelFs::Proc.write(PTRACE_SCOPE, value)?,
            (Self::AppArmorProfile { name }, _) => {
                let kept = kept.ok_or_else(|| SettingError::BadValue(value.to_owned()))?;
                if self.suffices(value) {
                    apparmor::load(&apparmor::complaining(name, kept)?)?;
                } else {
                    apparmor::load(kept)?;
                }
            }
            (Self::KernelModule { name }, LOADED) => module::load(name)?,
            (Self::KernelModule { name }, NOT_LOADED) => {
                if !module::unload(name)? {
                    return Err(SettingError::InUse);
                }
            }
            _ => return Err(SettingError::BadValue(value.to_owned())),
        }
        let found = self.read()?;
        if found == value {
            Ok(())
        } else {
            Err(SettingError::NotTaken {
                wanted: value.to_owned(),
                found,
            })
        }
    }

    /// What it is of does not exist any more, so that there is nothing to put back.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Freezer { cgroup, .. } if !cgroup.path.exists())
    }

    /// The cgroup, if it is one.
    pub fn freezer(&self) -> Option<&Freezer> {
        match self {
            Self::Freezer { cgroup, .. } => Some(cgroup),
            Self::DenyPtrace
            | Self::PtraceScope
            | Self::AppArmorProfile { .. }
            | Self::KernelModule { .. } => None,
        }
    }
}

/// Mode and hash: a profile that somebody else has loaded anew is another value, also in the same mode.
fn profile_value(mode: &str, policy: &[u8]) -> String {
    let digest = Sha256::digest(policy);
    let hash: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{mode}, policy {hash}")
}

fn freeze(cgroup: &Freezer) -> Result<(), SettingError> {
    let started = Instant::now();
    cgroup.freeze()?;
    // cgroup v1 freezes what can be frozen at once, and the rest whenever it is asked again.
    while cgroup.version == Version::V1 && !cgroup.has_come_to_rest() && started.elapsed() < SETTLE {
        std::thread::sleep(Duration::from_millis(5));
        cgroup.freeze()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_a_setting_cannot_have_is_never_written() {
        assert!(matches!(
            Setting::PtraceScope.write("3", None),
            Err(SettingError::BadValue(_))
        ));
        assert!(matches!(
            Setting::DenyPtrace.write("1\n0", None),
            Err(SettingError::BadValue(_))
        ));
    }

    #[test]
    fn a_cgroup_that_is_gone_needs_nothing() {
        let cgroup = Freezer {
            version: Version::V2,
            path: "/nowhere".into(),
        };
        assert!(
            Setting::Freezer {
                cgroup,
                of_pod: false
            }
            .is_gone()
        );
    }
}
