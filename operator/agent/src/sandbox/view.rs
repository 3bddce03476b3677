//! The files of a process as the process sees them, without ever leaving what it sees.
//!
//! A path below /proc/PID/root that is opened in the ordinary way follows a symbolic link of the process on the node. So
//! the root is opened once, and everything below it is resolved by the kernel with that folder as its root.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat, fstat, open, openat2};

/// A folder of a process, and all that is below it.
#[derive(Debug)]
pub struct View(OwnedFd);

impl View {
    /// What a process sees at `/`.
    ///
    /// # Errors
    /// When it has ended.
    pub fn root_of(pid: i32) -> io::Result<Self> {
        Self::at(&format!("/proc/{pid}/root"))
    }

    /// What a process means by a name that does not begin with `/`.
    ///
    /// # Errors
    /// When it has ended.
    pub fn folder_of(pid: i32) -> io::Result<Self> {
        Self::at(&format!("/proc/{pid}/cwd"))
    }

    fn at(link: &str) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(open(link, flags, Mode::empty())?))
    }

    /// Finds a file without opening it: neither a device nor a pipe notices.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(&self, path: &Path) -> io::Result<Found> {
        let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        Found::of(openat2(&self.0, path, flags, Mode::empty(), within)?)
    }

    /// Finds a file that must be in this very folder, and no link.
    ///
    /// # Errors
    /// When there is none.
    pub fn find_here(&self, name: &str) -> io::Result<Found> {
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Found::of(openat2(&self.0, name, flags, Mode::empty(), within)?)
    }
}

impl View {
    /// A name by which the kernel reaches it. Good as long as this value.
    pub fn name(&self) -> PathBuf {
        name_of(&self.0)
    }
}

fn name_of(file: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

impl AsFd for View {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A file that was found: whatever its name comes to mean later, it is this one.
#[derive(Debug)]
pub struct Found {
    file: OwnedFd,
    /// What it is.
    pub stat: Stat,
}

impl Found {
    fn of(file: OwnedFd) -> io::Result<Self> {
        let stat = fstat(&file)?;
        Ok(Self { file, stat })
    }

    /// Whether it is of a kind.
    pub fn is(&self, kind: FileType) -> bool {
        FileType::from_raw_mode(self.stat.st_mode) == kind
    }

    /// A name by which the kernel reaches it, short enough for a socket's address. Good as long as this value.
    pub fn name(&self) -> PathBuf {
        name_of(&self.file)
    }

    /// Opens it for reading, when it is a regular file.
    ///
    /// # Errors
    /// When it is none.
    pub fn read(&self) -> io::Result<File> {
        if self.is(FileType::RegularFile) {
            File::open(self.name())
        } else {
            Err(io::Error::other("no regular file"))
        }
    }

    /// The folder, when it is one.
    ///
    /// # Errors
    /// When it is none.
    pub fn folder(self) -> io::Result<View> {
        if self.is(FileType::Directory) {
            Ok(View(self.file))
        } else {
            Err(io::ErrorKind::NotADirectory.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn view(folder: &Path) -> View {
        View::at(folder.to_str().unwrap()).unwrap()
    }

    #[test]
    fn a_link_leads_to_what_the_process_sees_and_never_to_the_node() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/shadow"), "the pod's").unwrap();
        symlink("/etc/shadow", root.path().join("absolute")).unwrap();
        symlink("../../../../../../etc/shadow", root.path().join("etc/up")).unwrap();
        symlink(outside.path(), root.path().join("outside")).unwrap();
        let view = view(root.path());
        for path in ["/etc/shadow", "/absolute", "/etc/up", "../../absolute"] {
            let file = view.find(Path::new(path)).unwrap().read().unwrap();
            assert_eq!(io::read_to_string(file).unwrap(), "the pod's", "{path}");
        }
        assert!(view.find(Path::new("/outside")).is_err());
    }

    #[test]
    fn what_must_be_in_the_folder_is_no_link_and_what_is_read_is_a_regular_file() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "x").unwrap();
        symlink("file", root.path().join("link")).unwrap();
        let view = view(root.path());
        assert!(view.find_here("file").unwrap().read().is_ok());
        assert!(!view.find_here("link").is_ok_and(|found| found.read().is_ok()));
        assert!(view.find_here("../file").is_err());
        let folder = view.find(Path::new("/")).unwrap();
        assert!(folder.read().is_err());
        assert!(folder.folder().is_ok());
    }
}
