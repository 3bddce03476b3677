//! Files of the node's own, found through its first process, whatever links lead to them.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;

/// The root folder of the node: that of its first process.
pub const NODE_ROOT: &str = "/proc/1/root";

/// The kubelet's own folder below it, where it is not told another one.
pub const KUBELET: &str = "var/lib/kubelet";

/// Where else distributions let the kubelet have it: k0s and microk8s. Those of k3s and RKE2 leave it where it is.
pub const KUBELETS: [&str; 3] = [
    KUBELET,
    "var/lib/k0s/kubelet",
    "var/snap/microk8s/common/var/lib/kubelet",
];

/// How often a path is followed again that something was moved or mounted under meanwhile.
const TRIES: usize = 8;

/// Opens a file or folder below `root` for reading. It belongs to root, or to whom this process runs as, and nobody else may
/// write to it.
///
/// # Errors
/// When it is not there, or others may write to it.
pub fn open(root: &Path, path: &str) -> io::Result<OwnedFd> {
    let file = follow(root, Path::new(path), OFlags::RDONLY)?;
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

/// When something of a file or folder below `root` was changed last, its content, owner or name. The clock is the node's.
///
/// # Errors
/// When it is not there, or may not be seen.
pub fn changed(root: &Path, path: &Path) -> io::Result<SystemTime> {
    let found = File::from(follow(root, path, OFlags::PATH)?).metadata()?;
    let seconds = u64::try_from(found.ctime()).unwrap_or_default();
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

/// Opens what a path leads to when `root` is the root folder, for links as well: an absolute one is the node's.
fn follow(root: &Path, path: &Path, how: OFlags) -> io::Result<OwnedFd> {
    let root = rustix::fs::open(root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let open = || openat2(&root, path, how | OFlags::CLOEXEC, Mode::empty(), within);
    let mut opened = open();
    // The kernel gives up at `..` when anything was renamed or mounted anywhere meanwhile, openat2(2).
    for _ in 1..TRIES {
        if !matches!(opened, Err(Errno::AGAIN)) {
            break;
        }
        opened = open();
    }
    Ok(opened?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn an_absolute_link_leads_to_a_folder_of_the_node_and_not_of_the_agent() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("disk/containerd/c1")).unwrap();
        std::fs::create_dir_all(root.path().join("var/lib")).unwrap();
        symlink("/disk/containerd", root.path().join("var/lib/containerd")).unwrap();
        for path in ["var/lib/containerd/c1", "/var/lib/containerd/c1"] {
            let changed = changed(root.path(), Path::new(path)).unwrap();
            assert!(changed <= SystemTime::now());
        }
        let error = changed(root.path(), Path::new("var/lib/containerd/c2")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
