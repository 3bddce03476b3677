//! The kernel's own file systems, from mounts that nobody else can see: no path on the node can lead a write astray.
//!
//! A tenant's container may hold symbolic links and mounts of its own, and `/proc/PID/root` leads through them
//! (CVE-2019-16884 and its like). So each file system is mounted anew, without a place in any tree (fsmount(2)), files are
//! opened below it without following links, and what was opened is checked to be of that file system.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FsWord, Mode, OFlags, ResolveFlags, fstatfs, openat2};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// One of the kernel's file systems. The numbers are those of statfs(2), linux/magic.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFs {
    /// procfs.
    Proc,
    /// selinuxfs.
    Selinux,
    /// securityfs.
    Security,
}

impl KernelFs {
    fn name(self) -> &'static str {
        match self {
            Self::Proc => "proc",
            Self::Selinux => "selinuxfs",
            Self::Security => "securityfs",
        }
    }

    fn magic(self) -> FsWord {
        match self {
            Self::Proc => 0x9fa0,
            Self::Selinux => 0xf97c_ff8c,
            Self::Security => 0x7363_6673,
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When the kernel has no such file system or file, or refuses.
    pub fn read(self, path: &str) -> io::Result<String> {
        let mut text = String::new();
        self.open(path, OFlags::RDONLY)?.read_to_string(&mut text)?;
        Ok(text.trim().to_owned())
    }

    /// Writes a file in one write(2), as these files want it.
    ///
    /// # Errors
    /// When the kernel has no such file system or file, or refuses.
    pub fn write(self, path: &str, value: &str) -> io::Result<()> {
        self.write_bytes(path, value.as_bytes())
    }

    /// As [`Self::write`], for what is no text.
    ///
    /// # Errors
    /// As there.
    pub fn write_bytes(self, path: &str, value: &[u8]) -> io::Result<()> {
        let written = self.open(path, OFlags::WRONLY)?.write(value)?;
        if written == value.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    fn open(self, path: &str, access: OFlags) -> io::Result<File> {
        let root = self.mount()?;
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let file = openat2(&root, path, access | OFlags::CLOEXEC, Mode::empty(), within)?;
        check(&file, self.magic())?;
        Ok(file.into())
    }

    fn mount(self) -> io::Result<OwnedFd> {
        let context = fsopen(self.name(), FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
    }
}

/// The folder in which AppArmor shows its loaded policy. It is of a file system that cannot be mounted, and is reached
/// through a link that the kernel itself makes.
#[derive(Debug)]
pub struct PolicyFolder(OwnedFd);

impl PolicyFolder {
    /// Opens it.
    ///
    /// # Errors
    /// When the kernel has no AppArmor, or refuses.
    pub fn open() -> io::Result<Self> {
        const APPARMORFS: FsWord = 0x5a3c_69f0;
        let root = KernelFs::Security.mount()?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(&root, "apparmor/policy", flags, Mode::empty())?;
        check(&folder, APPARMORFS)?;
        Ok(Self(folder))
    }

    /// The entries of the profiles that are loaded.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn profiles(&self) -> io::Result<Vec<String>> {
        let folder = self.open_below("profiles", OFlags::RDONLY | OFlags::DIRECTORY)?;
        let entries = rustix::fs::Dir::new(folder)?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str().ok().map(str::to_owned));
        Ok(names.filter(|name| !name.starts_with('.')).collect())
    }

    /// Reads a file, up to a limit.
    ///
    /// # Errors
    /// When there is none, or the kernel refuses.
    pub fn read(&self, path: &str, limit: usize) -> io::Result<Vec<u8>> {
        let file = File::from(self.open_below(path, OFlags::RDONLY)?);
        let mut bytes = Vec::new();
        file.take(u64::try_from(limit).unwrap_or(u64::MAX))
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Below the folder the kernel's own links may be followed: the policy of a profile is one.
    fn open_below(&self, path: &str, access: OFlags) -> io::Result<OwnedFd> {
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        Ok(openat2(
            &self.0,
            path,
            access | OFlags::CLOEXEC,
            Mode::empty(),
            within,
        )?)
    }
}

/// Writes a file of a cgroup hierarchy, which is reached by its path on the node.
///
/// # Errors
/// When it is no file of a cgroup, or the kernel refuses.
pub fn write_cgroup(path: &Path, value: &str) -> io::Result<()> {
    const CGROUP: FsWord = 0x27_e0eb;
    const CGROUP2: FsWord = 0x6367_7270;
    let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    check(&file, CGROUP).or_else(|_| check(&file, CGROUP2))?;
    File::from(file).write_all(value.as_bytes())
}

fn check(file: &OwnedFd, magic: FsWord) -> io::Result<()> {
    let found = fstatfs(file)?.f_type;
    if found == magic {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "the file is of another file system ({found:#x}) than expected ({magic:#x})"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_cgroups_is_not_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("freezer.state");
        std::fs::write(&file, "FROZEN").unwrap();
        assert!(write_cgroup(&file, "THAWED").is_err());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "FROZEN");
    }

    #[test]
    fn a_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("cgroup.freeze");
        std::os::unix::fs::symlink("/sys/fs/cgroup/cgroup.procs", &link).unwrap();
        let error = write_cgroup(&link, "1").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::LOOP.raw_os_error()));
    }

    /// Mounting takes privileges that a developer's machine may not give.
    #[test]
    fn a_private_mount_reads_the_kernel_and_cannot_be_left() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: needs root");
            return;
        }
        assert!(!KernelFs::Proc.read("sys/kernel/osrelease").unwrap().is_empty());
        for outside in ["../etc/passwd", "/etc/passwd", "self/status", "1/root/etc/passwd"] {
            assert!(KernelFs::Proc.read(outside).is_err(), "{outside}");
        }
    }
}
