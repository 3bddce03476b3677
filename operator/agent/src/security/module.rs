//! Kernel modules: whether one is loaded, loading it from the node's own files, unloading it when nothing uses it.
//!
//! The kernel checks the file's signature where it is told to, and decompresses it. Nothing of the node is executed.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::system::{delete_module, finit_module};

use super::kernelfs::KernelFs;
use crate::node::nodefs::{self, NODE_ROOT};

/// The file is compressed, linux/module.h.
const COMPRESSED: i32 = 4;
/// Do not wait for users to leave, delete_module(2).
const NONBLOCK: i32 = 0o4000;

/// Whether it is loaded.
///
/// # Errors
/// When the kernel does not tell.
pub fn is_loaded(name: &str) -> io::Result<bool> {
    let text = KernelFs::Proc.read("modules")?;
    Ok(text.lines().any(|line| line.split(' ').next() == Some(name)))
}

/// Loads it. What it needs must be loaded.
///
/// # Errors
/// When the node has no such file, or the kernel refuses.
pub fn load(name: &str) -> io::Result<()> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let folder = format!("lib/modules/{release}");
    let mut index = String::new();
    File::from(open(&format!("{folder}/modules.dep"))?).read_to_string(&mut index)?;
    let path = file_of(name, &index).ok_or_else(|| {
        let words = format!("the node has no file of the module {name} for kernel {release}");
        io::Error::new(io::ErrorKind::NotFound, words)
    })?;
    let file = open(&format!("{folder}/{path}"))?;
    let flags = if path.ends_with(".ko") { 0 } else { COMPRESSED };
    match finit_module(&file, c"", flags) {
        // Somebody was faster.
        Err(Errno::EXIST) => Ok(()),
        other => Ok(other?),
    }
}

/// Unloads it; false when it is in use.
///
/// # Errors
/// When the kernel refuses.
pub fn unload(name: &str) -> io::Result<bool> {
    let name = CString::new(name)?;
    match delete_module(&name, NONBLOCK) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::AGAIN | Errno::BUSY) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The file of a module in modules.dep(5); pure. Files write `-` where the kernel has `_`.
fn file_of<'a>(name: &str, index: &'a str) -> Option<&'a str> {
    let files = index.lines().filter_map(|line| line.split(':').next());
    files.into_iter().find(|path| {
        let file = path.rsplit('/').next().unwrap_or_default();
        let stem = file.split_once(".ko").map_or("", |(stem, _)| stem);
        stem.replace('-', "_") == name && !path.starts_with('/') && !path.contains("..")
    })
}

/// A regular file of the node.
fn open(path: &str) -> io::Result<OwnedFd> {
    let file = nodefs::open(Path::new(NODE_ROOT), path)?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) == FileType::RegularFile {
        Ok(file)
    } else {
        Err(io::Error::other(format!("{path} is no file")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_found_by_the_kernels_name_for_it() {
        let index = "kernel/net/unix/unix_diag.ko.xz:\nkernel/net/x/af-packet-diag.ko: kernel/a.ko\n../evil.ko:\n/etc/abs.ko:\n";
        assert_eq!(
            file_of("unix_diag", index),
            Some("kernel/net/unix/unix_diag.ko.xz")
        );
        assert_eq!(
            file_of("af_packet_diag", index),
            Some("kernel/net/x/af-packet-diag.ko")
        );
        for absent in ["unix", "evil", "abs", "", "diag"] {
            assert_eq!(file_of(absent, index), None, "{absent}");
        }
    }
}
