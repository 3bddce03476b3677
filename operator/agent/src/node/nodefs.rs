//! Files of the node's own, found through its first process, whatever links lead to them.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, openat2};

/// The root folder of the node: that of its first process.
pub const NODE_ROOT: &str = "/proc/1/root";

/// The kubelet's own folder below it, where it is not told another one.
pub const KUBELET: &str = "var/lib/kubelet";

/// Opens a file or folder below `root` for reading. It belongs to root, or to whom this process runs as, and nobody else may
/// write to it.
///
/// # Errors
/// When it is not there, or others may write to it.
pub fn open(root: &Path, path: &str) -> io::Result<OwnedFd> {
    let root = rustix::fs::open(root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = openat2(
        &root,
        path,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
        within,
    )?;
    let found = fstat(&file)?;
    let owned = found.st_uid == 0 || found.st_uid == rustix::process::geteuid().as_raw();
    if owned && found.st_mode & 0o022 == 0 {
        Ok(file)
    } else {
        Err(io::Error::other(format!(
            "{path} may be written by others than root"
        )))
    }
}
