//! Freezing and thawing a container: the only place that writes to a freezer.

pub use podcheckpoint_probe::freezer::{Freezer, FreezerError, Version};

use crate::security::kernelfs::write_cgroup;

/// What the agent may do to a freezer; the probe only reads it.
pub trait Control {
    /// Thaws it and every level of it below that was told to freeze: which of them a runtime tells depends on the runtime,
    /// and a process runs only when none above it is frozen. Thawing what is not frozen changes nothing.
    ///
    /// # Errors
    /// When the cgroup is gone or the kernel refuses.
    fn thaw(&self) -> Result<(), FreezerError>;

    /// Thaws this very cgroup, and leaves those below it as somebody wanted them.
    ///
    /// # Errors
    /// When the cgroup is gone or the kernel refuses.
    fn thaw_itself(&self) -> Result<(), FreezerError>;

    /// Freezes this very cgroup: for the moment that the runtime needs to correct its books, see `release`, or because somebody else
    /// had frozen it before the checkpoint, see `security`.
    ///
    /// # Errors
    /// When the cgroup is gone or the kernel refuses.
    fn freeze(&self) -> Result<(), FreezerError>;
}

impl Control for Freezer {
    fn thaw(&self) -> Result<(), FreezerError> {
        let mut outcome = self.thaw_itself();
        let told = |level: &Freezer| level.is_told_to_freeze().unwrap_or(false);
        for level in self.levels().skip(1).filter(told) {
            match level.thaw_itself() {
                // One that is removed meanwhile holds nobody.
                Err(_) if !level.path.exists() => {}
                Err(error) => outcome = Err(error),
                Ok(()) => {}
            }
        }
        outcome
    }

    fn thaw_itself(&self) -> Result<(), FreezerError> {
        match self.version {
            Version::V1 => write(self, "freezer.state", "THAWED"),
            Version::V2 => write(self, "cgroup.freeze", "0"),
        }
    }

    fn freeze(&self) -> Result<(), FreezerError> {
        match self.version {
            Version::V1 => write(self, "freezer.state", "FROZEN"),
            Version::V2 => write(self, "cgroup.freeze", "1"),
        }
    }
}

fn write(freezer: &Freezer, file: &str, value: &str) -> Result<(), FreezerError> {
    let path = freezer.path.join(file);
    write_cgroup(&path, value).map_err(|source| FreezerError::Io { path, source })
}
