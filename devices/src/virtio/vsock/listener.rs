//! The socket that host clients connect to.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Why the listening socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Something is at the path already. It may be another machine's socket, so it is left alone.
    #[error("vsock socket {}: the path exists already", .0.display())]
    Exists(PathBuf),
    /// Longer than the 107 bytes of a Unix socket's address, or with a NUL in it.
    #[error("vsock socket {:?}: not a path a Unix socket can have (1 to 107 bytes)", .0)]
    Path(PathBuf),
    /// The kernel refused.
    #[error("vsock socket {}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Makes a non-blocking listening socket at `path`, which must not exist.
///
/// Its mode is 0600: only processes of the same user, and root, may connect. The mode holds from the socket's first
/// moment and does not depend on the umask. Open it to others with chmod, or by the folder it is in.
pub fn bind_listener(path: &Path) -> Result<UnixListener, BindError> {
    let io = |source: io::Error| BindError::Io {
        path: path.to_owned(),
        source,
    };
    // The kernel would take an empty path to mean any name that nobody can find.
    if path.as_os_str().is_empty() {
        return Err(BindError::Path(path.to_owned()));
    }
    let address = SocketAddrUnix::new(path).map_err(|_| BindError::Path(path.to_owned()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| io(e.into()))?;
    // bind() gives the file the mode of the socket's own inode, less the umask.
    let socket = File::from(socket);
    socket
        .set_permissions(Permissions::from_mode(0o600))
        .map_err(io)?;
    match bind(&socket, &address) {
        Ok(()) => {}
        Err(rustix::io::Errno::ADDRINUSE) => return Err(BindError::Exists(path.to_owned())),
        Err(error) => return Err(io(error.into())),
    }
    listen(&socket, BACKLOG).map_err(|e| io(e.into()))?;
    Ok(UnixListener::from(OwnedFd::from(socket)))
}

/// Removes a socket's path when dropped, if it is still the same file.
#[derive(Debug)]
pub struct SocketGuard {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketGuard {
    /// Guards the socket that is at `path` now.
    pub fn new(path: &Path) -> io::Result<Self> {
        Ok(SocketGuard {
            path: path.to_owned(),
            identity: identity(path)?,
        })
    }
}

impl Drop for SocketGuard {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // A path that cannot be removed stays: there is nobody left to tell.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
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
        let listener = bind_listener(&path).unwrap();
        let guard = SocketGuard::new(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(
            listener.accept().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        let client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(client);

        let again = bind_listener(&path).unwrap_err();
        assert!(matches!(&again, BindError::Exists(p) if *p == path));
        assert!(again.to_string().contains("v.sock"));
        drop(guard);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_is_another_file_by_now_is_left() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("v.sock");
        let listener = bind_listener(&path).unwrap();
        let guard = SocketGuard::new(&path).unwrap();
        fs::rename(&path, dir.as_path().join("moved")).unwrap();
        fs::write(&path, "mine").unwrap();
        drop((guard, listener));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn impossible_paths_are_named() {
        let long = Path::new("/tmp").join("x".repeat(200));
        assert!(matches!(bind_listener(&long), Err(BindError::Path(p)) if p == long));
        let missing = Path::new("/nowhere/at/all");
        let error = bind_listener(missing).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"));
    }
}
