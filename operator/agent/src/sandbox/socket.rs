//! A unix socket as the process that made it sees it.
//!
//! A monitor may have another root (a jail), another mount namespace or a name that is relative to its folder, and names
//! of sandboxes make paths longer than a socket address may be. So the socket is found in its owner's view and reached by
//! its descriptor. What answers there must be one of those that may have bound it.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::fs::FileType;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use serde::{Deserialize, Serialize};

use super::view::View;

/// A socket's name, and in whose view.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct SocketPath {
    /// The name as it was bound.
    pub path: PathBuf,
    /// Processes that may have bound it; the first whose view has it counts. Nobody else may serve it.
    pub owners: Vec<i32>,
}

impl fmt::Display for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

impl SocketPath {
    /// A socket that the agent itself sees under this name.
    pub fn own(path: impl Into<PathBuf>) -> Self {
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        Self {
            path: path.into(),
            owners: vec![own],
        }
    }

    /// Connects.
    ///
    /// # Errors
    /// What the last owner's view gave.
    pub fn connect_blocking(&self) -> io::Result<UnixStream> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for owner in &self.owners {
            match connect_in(*owner, &self.path, &self.owners) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Connects, for a caller on the async runtime. A unix socket accepts or refuses at once unless its queue is full.
    ///
    /// # Errors
    /// What the last owner's view gave.
    pub async fn connect(&self) -> io::Result<tokio::net::UnixStream> {
        let this = self.clone();
        let stream = tokio::task::spawn_blocking(move || this.connect_blocking());
        let stream = stream.await.map_err(io::Error::other)??;
        stream.set_nonblocking(true)?;
        tokio::net::UnixStream::from_std(stream)
    }
}

/// A listener whose queue is full, because it hangs, would keep a connection, and with it a thread, without a limit.
fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Connects to a name in a process's view.
fn connect_in(owner: i32, path: &Path, owners: &[i32]) -> io::Result<UnixStream> {
    let view = if path.is_absolute() {
        View::root_of(owner)?
    } else {
        View::folder_of(owner)?
    };
    let found = view.find(path)?;
    if !found.is(FileType::Socket) {
        return Err(io::Error::other("no socket"));
    }
    let stream = connect_at_once(&found.name())?;
    // The kernel notes who began to listen; a name can be given to anybody's socket.
    let peer = getsockopt(&stream, PeerCredentials)?.pid();
    if owners.contains(&peer) {
        Ok(stream)
    } else {
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "the socket there is served by process {peer}, which is neither the monitor nor its shim"
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_longer_than_an_address_is_reached() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a".repeat(60)).join("b".repeat(60));
        std::fs::create_dir_all(&folder).unwrap();
        let short = tempfile::tempdir().unwrap();
        let made = short.path().join("monitor.sock");
        let listener = std::os::unix::net::UnixListener::bind(&made).unwrap();
        std::fs::rename(&made, folder.join("monitor.sock")).unwrap();
        let socket = SocketPath::own(folder.join("monitor.sock"));
        assert!(socket.connect_blocking().is_ok());
        drop(listener);
        assert!(socket.connect_blocking().is_err());
    }

    #[test]
    fn a_view_that_lacks_the_socket_is_passed_over() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mut socket = SocketPath::own(path);
        socket.owners.insert(0, i32::MAX);
        assert!(socket.connect_blocking().is_ok());
    }

    #[test]
    fn a_socket_that_somebody_else_serves_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let error = connect_in(own, &path, &[1]).unwrap_err();
        assert!(
            error.to_string().contains(&format!("served by process {own}")),
            "{error}"
        );
    }

    #[test]
    fn a_file_is_no_socket() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(SocketPath::own(file.path()).connect_blocking().is_err());
    }
}
