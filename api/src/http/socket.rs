//! The socket in the file system.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Something exists at the path, a socket or not.
    #[error("Failed to open the API socket at: {path}. Check that it is not already used.", path = .0.display())]
    InUse(PathBuf),
    /// Any other failure.
    #[error("Failed to open the API socket at: {path}: {source}", path = .path.display())]
    Io {
        /// The path asked for.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The path of a bound socket. Dropping it removes the file, unless another file has taken its place since.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn identity(path: &Path) -> io::Result<(u64, u64)> {
        fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if Self::identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // Nobody is left to tell of a failure.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds a non-blocking socket that only its owner may connect to.
pub(super) fn bind(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => BindError::InUse(path.to_owned()),
        _ => BindError::Io {
            path: path.to_owned(),
            source,
        },
    };
    let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(|error| failed(error.into()))?;
    rustix::net::bind(&socket, &address).map_err(|error| failed(error.into()))?;
    let file = SocketFile {
        identity: SocketFile::identity(path).map_err(failed)?,
        path: path.to_owned(),
    };
    // Between bind and listen nobody can connect, so nobody gets in while the mode is still what the umask made it.
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
    rustix::net::listen(&socket, BACKLOG).map_err(|error| failed(error.into()))?;
    Ok((UnixListener::from(socket), file))
}
