//! Listening Unix sockets by which processes of the host reach this one, and their paths.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Why there is no listening socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Something is at the path already. It may be another machine's socket, so it is left alone.
    #[error("{}: the path exists already", .0.display())]
    Exists(PathBuf),
    /// Longer than the 107 bytes of a Unix socket's address, empty, or with a NUL in it.
    #[error("{:?}: not a path a Unix socket can have (1 to 107 bytes)", .0)]
    Path(PathBuf),
    /// The kernel refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
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
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // A path that cannot be removed stays: there is nobody left to tell.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Makes a non-blocking listening socket at `path`, which must not exist.
///
/// Its mode is 0600: only processes of the same user, and root, may connect. The mode holds from the socket's first
/// moment and does not depend on the umask. Open it to others with chmod, or by the folder it is in.
pub fn bind(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    let (socket, file) = bind_type(path, SocketType::STREAM)?;
    Ok((UnixListener::from(socket), file))
}

/// As [`bind`], for a socket of any type that has connections.
pub(crate) fn bind_type(path: &Path, kind: SocketType) -> Result<(OwnedFd, SocketFile), BindError> {
    let failed = |source: io::Error| BindError::Io {
        path: path.to_owned(),
        source,
    };
    // The kernel would take an empty path to mean any name that nobody can find.
    if path.as_os_str().is_empty() {
        return Err(BindError::Path(path.to_owned()));
    }
    let address = SocketAddrUnix::new(path).map_err(|_| BindError::Path(path.to_owned()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)
        .map_err(|error| failed(error.into()))?;
    // bind() gives the file the mode of the socket's own inode, less the umask.
    let socket = File::from(socket);
    socket
        .set_permissions(Permissions::from_mode(0o600))
        .map_err(failed)?;
    match rustix::net::bind(&socket, &address) {
        Ok(()) => {}
        Err(Errno::ADDRINUSE) => return Err(BindError::Exists(path.to_owned())),
        Err(error) => return Err(failed(error.into())),
    }
    let file = SocketFile {
        identity: identity(path).map_err(failed)?,
        path: path.to_owned(),
    };
    rustix::net::listen(&socket, BACKLOG).map_err(|error| failed(error.into()))?;
    Ok((OwnedFd::from(socket), file))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn private_exclusive_and_cleaned_up() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("v.sock");
        let (listener, file) = bind(&path).unwrap();
        assert_eq!(file.path(), path);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(
            listener.accept().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        let client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(client);

        let again = bind(&path).unwrap_err();
        assert!(matches!(&again, BindError::Exists(p) if *p == path));
        assert!(again.to_string().contains("v.sock"));
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_is_another_file_by_now_is_left() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("v.sock");
        let bound = bind(&path).unwrap();
        fs::rename(&path, dir.as_path().join("moved")).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(bound);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn impossible_paths_are_named() {
        let long = Path::new("/tmp").join("x".repeat(200));
        assert!(matches!(bind(&long), Err(BindError::Path(p)) if p == long));
        assert!(matches!(bind(Path::new("")), Err(BindError::Path(_))));
        let error = bind(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"));
    }
}
