//! Archives on the node's disk: room for them, verification, and giving them their names.
//!
//! What is in an archive is whatever the target chose to have in its memory and files, so nothing is ever unpacked
//! here: entries are only read.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use podcheckpoint_crds::Reason;
use sha2::{Digest, Sha256};

use crate::criu::{DumpStats, parse_stats};
use crate::journal::DISK;

/// Largest metadata entry that is read into memory, in bytes.
const METADATA_LIMIT: u64 = 4 << 20;
/// Free space that must remain beside an archive, in bytes.
const RESERVE: u64 = 64 << 20;
/// What every archive must hold: without these CRIU cannot restore.
const REQUIRED: [&str; 4] = [
    "checkpoint/inventory.img",
    "checkpoint/pstree.img",
    "config.dump",
    "spec.dump",
];

/// An archive is not what it should be, or the disk refuses.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The disk refuses.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It lacks something.
    #[error("the archive has no {0}")]
    Incomplete(String),
    /// It cannot be read to its end.
    #[error("the archive cannot be read: {0}")]
    Unreadable(String),
    /// It is of another container.
    #[error("the archive is of {found}, not of {expected}")]
    Identity {
        /// Who it is of.
        found: String,
        /// Who it should be of.
        expected: String,
    },
    /// There is too little room.
    #[error("{free} bytes are free at {}, and about {needed} are needed", root.display())]
    Full {
        /// Where.
        root: PathBuf,
        /// Bytes that are free.
        free: u64,
        /// Bytes that are needed.
        needed: u64,
    },
    /// The disk did not answer in time.
    #[error("{} did not take a small file within {} s", root.display(), DISK.as_secs())]
    Stalled {
        /// The archive root.
        root: PathBuf,
    },
}

impl ArchiveError {
    /// The reason for the status.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => Reason::StorageFull,
            Self::Io { .. } => Reason::StorageNotWritable,
            Self::Incomplete(_) | Self::Unreadable(_) => Reason::ArchiveIncomplete,
            Self::Identity { .. } => Reason::ArchiveIdentityMismatch,
            Self::Full { .. } => Reason::StorageFull,
            Self::Stalled { .. } => Reason::StorageStalled,
        }
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> ArchiveError {
    move |source| ArchiveError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Who an archive must be of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// UID of the pod.
    pub pod_uid: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Name of the container.
    pub container: String,
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "container {} of pod {}/{} ({})",
            self.container, self.namespace, self.pod, self.pod_uid
        )
    }
}

/// An archive that is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Bytes.
    pub size: u64,
    /// SHA-256, in hexadecimal.
    pub sha256: String,
    /// CRIU's times, if the runtime kept them.
    pub stats: Option<DumpStats>,
}

/// Makes a folder that only root may enter, and proves that it can be written.
///
/// # Errors
/// When the disk refuses.
pub fn prepare(folder: &Path) -> Result<(), ArchiveError> {
    fs::create_dir_all(folder).map_err(at(folder))?;
    fs::set_permissions(folder, Permissions::from_mode(0o700)).map_err(at(folder))?;
    let proof = folder.join(".writable");
    File::create(&proof)
        .and_then(|file| file.sync_all())
        .map_err(at(&proof))?;
    match fs::remove_file(&proof) {
        // Another checkpoint has just proved the same.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(at(&proof)),
    }
}

/// Checks that there is room for a dump of so much memory. `copies` is how often the method writes each page before
/// the archive is whole.
///
/// # Errors
/// [`ArchiveError::Full`] when there is not.
pub fn check_room(root: &Path, memory: u64, copies: u64) -> Result<(), ArchiveError> {
    let stat = rustix::fs::statvfs(root).map_err(|e| at(root)(e.into()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let needed = memory.saturating_mul(copies).saturating_add(RESERVE);
    if free < needed {
        Err(ArchiveError::Full {
            root: root.to_owned(),
            free,
            needed,
        })
    } else {
        Ok(())
    }
}

/// Reads a tar once: checks that it is whole, complete and of the right container, and hashes it.
///
/// # Errors
/// When it is not, or cannot be read.
pub fn verify_tar(path: &Path, expected: &Identity) -> Result<Verified, ArchiveError> {
    let file = File::open(path).map_err(at(path))?;
    let mut hashed = Hashed {
        inner: io::BufReader::with_capacity(1 << 20, file),
        hash: Sha256::new(),
        bytes: 0,
    };
    let mut found = Contents::default();
    {
        let mut tar = tar::Archive::new(&mut hashed);
        let unreadable = |error: io::Error| ArchiveError::Unreadable(error.to_string());
        for entry in tar.entries().map_err(unreadable)? {
            found.take(entry.map_err(unreadable)?).map_err(unreadable)?;
        }
    }
    // What follows the end mark belongs to the file, and so to its hash.
    io::copy(&mut hashed, &mut io::sink()).map_err(at(path))?;
    found.check(expected)?;
    let sha256 = hex(&hashed.hash.finalize());
    Ok(Verified {
        size: hashed.bytes,
        sha256,
        stats: found.stats,
    })
}

/// Checks a folder in the layout of an archive, writes SHA256SUMS into it and syncs everything.
///
/// # Errors
/// When something is missing, of another container, or the disk refuses.
pub fn verify_folder(folder: &Path, expected: &Identity) -> Result<Verified, ArchiveError> {
    let mut found = Contents::default();
    let verified = sum_files(folder, |name, file| found.take_file(name, file))?;
    found.check(expected)?;
    Ok(Verified {
        stats: found.stats,
        ..verified
    })
}

/// Writes SHA256SUMS into a folder and syncs everything in it.
///
/// # Errors
/// When the disk refuses.
pub fn sum_folder(folder: &Path) -> Result<Verified, ArchiveError> {
    sum_files(folder, |_, _| Ok(()))
}

fn sum_files(
    folder: &Path,
    mut take: impl FnMut(&str, &mut Hashed<io::BufReader<&File>>) -> io::Result<()>,
) -> Result<Verified, ArchiveError> {
    let mut sums = String::new();
    let mut size = 0;
    for relative in files_below(folder).map_err(at(folder))? {
        let path = folder.join(&relative);
        let name = relative.to_string_lossy().into_owned();
        let file = File::open(&path).map_err(at(&path))?;
        let mut hashed = Hashed {
            inner: io::BufReader::with_capacity(1 << 20, &file),
            hash: Sha256::new(),
            bytes: 0,
        };
        take(&name, &mut hashed).map_err(at(&path))?;
        io::copy(&mut hashed, &mut io::sink()).map_err(at(&path))?;
        file.sync_all().map_err(at(&path))?;
        size += hashed.bytes;
        sums.push_str(&format!("{}  {name}\n", hex(&hashed.hash.finalize())));
    }
    let path = folder.join("SHA256SUMS");
    fs::write(&path, &sums)
        .and_then(|()| File::open(&path)?.sync_all())
        .map_err(at(&path))?;
    Ok(Verified {
        size,
        sha256: hex(&Sha256::digest(sums.as_bytes())),
        stats: None,
    })
}

/// Every regular file below a folder, relative to it, in order. Links are not followed.
fn files_below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file()
                && let Ok(relative) = entry.path().strip_prefix(folder)
            {
                files.push(relative.to_owned());
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Syncs a file, makes it root's alone, gives it its name and syncs the folder.
///
/// # Errors
/// When the disk refuses; the file then still has its partial name.
pub fn publish(partial: &Path, name: &Path) -> Result<(), ArchiveError> {
    let mode = if partial.is_dir() { 0o700 } else { 0o600 };
    let sync = || {
        File::open(partial)?.sync_all()?;
        fs::set_permissions(partial, Permissions::from_mode(mode))?;
        fs::rename(partial, name)?;
        name.parent()
            .map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    };
    sync().map_err(at(name))
}

/// Takes a file from another file system: copied to a partial name there, and removed here.
///
/// # Errors
/// When the disk refuses.
pub fn take_over(from: &Path, to: &Path) -> Result<(), ArchiveError> {
    let copied = fs::copy(from, to).map_err(at(to));
    // Also when there is no room for the copy: the pod's memory must not stay where nobody looks for it.
    let removed = fs::remove_file(from).map_err(at(from));
    copied.and(removed)
}

/// Writes the changed files of a container's root file system as a tar.
///
/// # Errors
/// When the disk refuses.
pub fn rootfs_diff(upper: &Path, to: &Path) -> Result<(), ArchiveError> {
    let write = || {
        let mut tar = tar::Builder::new(File::create(to)?);
        tar.follow_symlinks(false);
        append_layer(&mut tar, upper, Path::new(""))?;
        tar.into_inner()?.sync_all()
    };
    write().map_err(at(to))
}

/// Appends what is in one folder of an overlay's upper layer. What the overlay marks as deleted becomes a whiteout as
/// OCI image layers have it (image-spec, layer.md), since a restored container is unpacked from those.
fn append_layer<W: io::Write>(tar: &mut tar::Builder<W>, folder: &Path, inside: &Path) -> io::Result<()> {
    if is_opaque(folder) {
        append_empty(tar, &inside.join(".wh..wh..opq"))?;
    }
    let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), inside.join(entry.file_name()));
        let metadata = entry.metadata()?;
        if is_whiteout(&metadata) {
            let mut whiteout = OsString::from(".wh.");
            whiteout.push(entry.file_name());
            append_empty(tar, &inside.join(whiteout))?;
        } else if metadata.file_type().is_socket() {
            // Tar has none; who listens on it makes it anew.
        } else {
            tar.append_path_with_name(&path, &name)?;
            if metadata.is_dir() {
                append_layer(tar, &path, &name)?;
            }
        }
    }
    Ok(())
}

fn append_empty<W: io::Write>(tar: &mut tar::Builder<W>, name: &Path) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o600);
    tar.append_data(&mut header, name, io::empty())
}

/// A deleted file is a character device 0/0 (Documentation/filesystems/overlayfs.rst).
fn is_whiteout(metadata: &fs::Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

/// A folder that hides the one below it is marked by an extended attribute (Documentation/filesystems/overlayfs.rst).
fn is_opaque(folder: &Path) -> bool {
    ["trusted.overlay.opaque", "user.overlay.opaque"]
        .into_iter()
        .any(|attribute| {
            let mut value = [0; 1];
            let read = rustix::fs::lgetxattr(folder, attribute, &mut value[..]);
            matches!(read, Ok(1)) && value == *b"y"
        })
}

/// The upper layer of a process's root file system, if it is an overlay.
pub fn upper_layer(pid: i32) -> Option<PathBuf> {
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?;
    let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/"))?;
    let (_, after) = root.split_once(" - overlay ")?;
    let upper = after
        .split([' ', ','])
        .find_map(|option| option.strip_prefix("upperdir="))?;
    // The path is the node's, and so is process 1.
    Some(Path::new("/proc/1/root").join(upper.trim_start_matches('/')))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

struct Hashed<R> {
    inner: R,
    hash: Sha256,
    bytes: u64,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.update(buffer.get(..read).unwrap_or_default());
        self.bytes += read as u64;
        Ok(read)
    }
}

/// What was seen in an archive.
#[derive(Default)]
struct Contents {
    /// Which of [`REQUIRED`] were there and not empty. Other names are not kept: there may be any number.
    required: Vec<&'static str>,
    core: bool,
    spec: Option<Vec<u8>>,
    stats: Option<DumpStats>,
}

impl Contents {
    fn take<R: Read>(&mut self, mut entry: tar::Entry<'_, R>) -> io::Result<()> {
        // A link named like a required file is not that file.
        if !entry.header().entry_type().is_file() {
            return Ok(());
        }
        let name = entry
            .path()?
            .to_string_lossy()
            .trim_start_matches("./")
            .to_owned();
        self.take_file(&name, &mut entry)
    }

    fn take_file(&mut self, name: &str, content: &mut impl Read) -> io::Result<()> {
        let mut read = || {
            let mut bytes = Vec::new();
            content
                .take(METADATA_LIMIT)
                .read_to_end(&mut bytes)
                .map(|_| bytes)
        };
        let mut empty = false;
        match name {
            "spec.dump" => self.spec = Some(read()?),
            "stats-dump" | "checkpoint/stats-dump" => self.stats = parse_stats(&read()?),
            _ => empty = content.take(1).read(&mut [0])? == 0,
        }
        if empty {
            return Ok(());
        }
        self.core |= name.starts_with("checkpoint/core-");
        if let Some(required) = REQUIRED.into_iter().find(|required| *required == name) {
            if self.required.contains(&required) {
                return Err(io::Error::other(format!("{required} is there twice")));
            }
            self.required.push(required);
        }
        Ok(())
    }

    fn check(&self, expected: &Identity) -> Result<(), ArchiveError> {
        for required in REQUIRED {
            if !self.required.contains(&required) {
                return Err(ArchiveError::Incomplete(required.to_owned()));
            }
        }
        if !self.core {
            return Err(ArchiveError::Incomplete("checkpoint/core-*.img".into()));
        }
        let spec = self.spec.as_deref().unwrap_or_default();
        let found = identity(spec).ok_or_else(|| ArchiveError::Incomplete("identity in spec.dump".into()))?;
        if found == *expected {
            Ok(())
        } else {
            Err(ArchiveError::Identity {
                found: found.to_string(),
                expected: expected.to_string(),
            })
        }
    }
}

/// Who an OCI specification is of, by the annotations of containerd or CRI-O.
pub fn identity(spec: &[u8]) -> Option<Identity> {
    let spec: serde_json::Value = serde_json::from_slice(spec).ok()?;
    let annotations = spec.get("annotations")?;
    let text = |value: &serde_json::Value, key: &str| value.get(key)?.as_str().map(str::to_owned);
    if let Some(pod_uid) = text(annotations, "io.kubernetes.cri.sandbox-uid") {
        return Some(Identity {
            pod_uid,
            namespace: text(annotations, "io.kubernetes.cri.sandbox-namespace")?,
            pod: text(annotations, "io.kubernetes.cri.sandbox-name")?,
            container: text(annotations, "io.kubernetes.cri.container-name")?,
        });
    }
    let labels: serde_json::Value =
        serde_json::from_str(annotations.get("io.kubernetes.cri-o.Labels")?.as_str()?).ok()?;
    Some(Identity {
        pod_uid: text(&labels, "io.kubernetes.pod.uid")?,
        namespace: text(&labels, "io.kubernetes.pod.namespace")?,
        pod: text(&labels, "io.kubernetes.pod.name")?,
        container: text(&labels, "io.kubernetes.container.name")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubelets_archive_is_deleted_also_when_it_cannot_be_copied() {
        let root = tempfile::tempdir().unwrap();
        let from = root.path().join("kubelet.tar");
        fs::write(&from, "memory").unwrap();
        let nowhere = root.path().join("missing/main.tar");
        assert!(take_over(&from, &nowhere).is_err());
        assert!(!from.exists());
    }

    const SPEC: &str = r#"{"annotations":{"io.kubernetes.cri.sandbox-uid":"u-1","io.kubernetes.cri.sandbox-namespace":"shop",
        "io.kubernetes.cri.sandbox-name":"cart","io.kubernetes.cri.container-name":"main"}}"#;

    fn expected() -> Identity {
        Identity {
            pod_uid: "u-1".into(),
            namespace: "shop".into(),
            pod: "cart".into(),
            container: "main".into(),
        }
    }

    fn write_tar(path: &Path, entries: &[(&str, &[u8])]) {
        let mut tar = tar::Builder::new(File::create(path).unwrap());
        for (name, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o600);
            tar.append_data(&mut header, name, *content).unwrap();
        }
        tar.finish().unwrap();
    }

    fn complete() -> Vec<(&'static str, &'static [u8])> {
        vec![
            ("checkpoint/inventory.img", b"i"),
            ("checkpoint/pstree.img", b"p"),
            ("checkpoint/core-1.img", b"c"),
            ("config.dump", b"{}"),
            ("spec.dump", SPEC.as_bytes()),
        ]
    }

    fn verify(entries: &[(&str, &[u8])]) -> Result<Verified, ArchiveError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        write_tar(&path, entries);
        verify_tar(&path, &expected())
    }

    #[test]
    fn a_complete_archive_is_accepted_with_the_hash_of_the_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        write_tar(&path, &complete());
        let verified = verify_tar(&path, &expected()).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(
            (verified.size, verified.sha256),
            (bytes.len() as u64, hex(&Sha256::digest(&bytes)))
        );
    }

    #[test]
    fn an_archive_without_one_required_part_is_refused() {
        for missing in REQUIRED {
            let entries: Vec<_> = complete()
                .into_iter()
                .filter(|(name, _)| *name != missing)
                .collect();
            assert_eq!(
                verify(&entries).unwrap_err().reason(),
                Reason::ArchiveIncomplete,
                "{missing}"
            );
        }
    }

    #[test]
    fn an_archive_of_another_pod_of_the_same_name_is_refused() {
        let other = SPEC.replace("u-1", "u-2");
        let mut entries = complete();
        entries[4].1 = Box::leak(other.into_bytes().into_boxed_slice());
        assert_eq!(
            verify(&entries).unwrap_err().reason(),
            Reason::ArchiveIdentityMismatch
        );
    }

    #[test]
    fn a_second_identity_behind_the_first_is_refused() {
        let mut entries = complete();
        entries.push(("spec.dump", SPEC.as_bytes()));
        assert_eq!(verify(&entries).unwrap_err().reason(), Reason::ArchiveIncomplete);
    }

    #[test]
    fn an_empty_image_is_a_missing_one() {
        let mut entries = complete();
        entries[2].1 = b"";
        assert!(verify(&entries).unwrap_err().to_string().contains("core-"));
    }

    #[test]
    fn a_name_that_leads_out_of_the_archive_stands_for_no_required_part() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        let mut tar = tar::Builder::new(File::create(&path).unwrap());
        for (name, content) in complete() {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            let name = if name == "config.dump" {
                "x/../config.dump"
            } else {
                name
            };
            // set_path refuses such a name, so a hostile writer is imitated byte by byte.
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            tar.append(&header, content).unwrap();
        }
        tar.finish().unwrap();
        assert!(
            verify_tar(&path, &expected())
                .unwrap_err()
                .to_string()
                .contains("config.dump")
        );
    }

    #[test]
    fn the_changed_files_keep_links_and_folders_and_leave_sockets_out() {
        let folder = tempfile::tempdir().unwrap();
        let upper = folder.path().join("upper");
        fs::create_dir_all(upper.join("etc/deep")).unwrap();
        fs::write(upper.join("etc/deep/file"), b"content").unwrap();
        std::os::unix::fs::symlink("/etc/shadow", upper.join("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(upper.join("socket")).unwrap();
        let to = folder.path().join("diff.tar");
        rootfs_diff(&upper, &to).unwrap();
        let mut tar = tar::Archive::new(File::open(&to).unwrap());
        let names: Vec<_> = tar
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, ["etc", "etc/deep", "etc/deep/file", "link"]);
    }

    #[test]
    fn a_truncated_archive_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        let mut entries = complete();
        let pages = vec![7; 100_000];
        entries.push(("checkpoint/pages-1.img", &pages));
        write_tar(&path, &entries);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(fs::metadata(&path).unwrap().len() - 50_000).unwrap();
        assert_eq!(
            verify_tar(&path, &expected()).unwrap_err().reason(),
            Reason::ArchiveIncomplete
        );
    }

    #[test]
    fn a_link_named_like_a_required_file_is_not_that_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        let mut tar = tar::Builder::new(File::create(&path).unwrap());
        for (name, content) in complete().into_iter().filter(|(name, _)| *name != "config.dump") {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, name, content).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, "config.dump", "/etc/shadow")
            .unwrap();
        tar.finish().unwrap();
        assert_eq!(
            verify_tar(&path, &expected()).unwrap_err().reason(),
            Reason::ArchiveIncomplete
        );
    }

    #[test]
    fn a_folder_gets_the_sums_of_all_its_files() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("checkpoint")).unwrap();
        for (name, content) in complete() {
            fs::write(folder.path().join(name), content).unwrap();
        }
        let verified = verify_folder(folder.path(), &expected()).unwrap();
        let sums = fs::read(folder.path().join("SHA256SUMS")).unwrap();
        assert_eq!(verified.sha256, hex(&Sha256::digest(&sums)));
        assert_eq!(String::from_utf8(sums).unwrap().lines().count(), complete().len());
    }

    #[test]
    fn too_little_room_is_said_with_both_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let error = check_room(folder.path(), u64::MAX / 4, 2).unwrap_err();
        assert_eq!(error.reason(), Reason::StorageFull);
    }

    #[test]
    fn a_published_archive_is_roots_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (partial, name) = (folder.path().join("a.partial"), folder.path().join("a"));
        fs::write(&partial, b"x").unwrap();
        publish(&partial, &name).unwrap();
        assert_eq!(fs::metadata(&name).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!partial.exists());
    }

    #[test]
    fn the_identity_is_read_from_cri_o_too() {
        let spec = r#"{"annotations":{"io.kubernetes.cri-o.Labels":"{\"io.kubernetes.pod.uid\":\"u-1\",\"io.kubernetes.pod.namespace\":\"shop\",\"io.kubernetes.pod.name\":\"cart\",\"io.kubernetes.container.name\":\"main\"}"}}"#;
        assert_eq!(identity(spec.as_bytes()), Some(expected()));
    }
}
