//! The settings that can be changed for the time of a checkpoint: reading and writing each.

use std::io;
use std::time::{Duration, Instant};

use podcheckpoint_crds::PatchKind;
use serde::{Deserialize, Serialize};

use super::kernelfs::KernelFs;
use crate::node::cgroup::{Control, Freezer, FreezerError, Version};

/// How long a cgroup may take to come to rest after it was told to freeze.
const SETTLE: Duration = Duration::from_secs(1);

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
        }
    }

    /// Its name, for people and as what tells settings apart.
    pub fn name(&self) -> String {
        match self {
            Self::Freezer { cgroup, .. } => format!("freezer {}", cgroup.path.display()),
            Self::DenyPtrace => format!("SELinux boolean {DENY_PTRACE}"),
            Self::PtraceScope => "kernel.yama.ptrace_scope".into(),
        }
    }

    /// What a change affects besides the target.
    pub fn scope(&self) -> &'static str {
        match self {
            Self::Freezer { of_pod: false, .. } => "container",
            Self::Freezer { of_pod: true, .. } => "pod",
            Self::DenyPtrace | Self::PtraceScope => "node",
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
        }
    }

    /// The value that a checkpoint needs.
    pub fn wanted(&self) -> &'static str {
        match self {
            Self::Freezer { .. } => "thawed",
            Self::DenyPtrace => "off",
            Self::PtraceScope => "0",
        }
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
        }
    }

    /// Writes it, and reads it again.
    ///
    /// # Errors
    /// When the kernel refuses, or has another value afterwards.
    pub fn write(&self, value: &str) -> Result<(), SettingError> {
        match (self, value) {
            (Self::Freezer { cgroup, .. }, "thawed") => cgroup.thaw()?,
            (Self::Freezer { cgroup, .. }, "frozen") => freeze(cgroup)?,
            (Self::DenyPtrace, "on" | "off") => {
                let digit = if value == "on" { "1" } else { "0" };
                KernelFs::Selinux.write(&format!("booleans/{DENY_PTRACE}"), digit)?;
                KernelFs::Selinux.write("commit_pending_bools", "1")?;
            }
            (Self::PtraceScope, "0" | "1" | "2") => KernelFs::Proc.write(PTRACE_SCOPE, value)?,
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
            Self::DenyPtrace | Self::PtraceScope => None,
        }
    }
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
            Setting::PtraceScope.write("3"),
            Err(SettingError::BadValue(_))
        ));
        assert!(matches!(
            Setting::DenyPtrace.write("1\n0"),
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
