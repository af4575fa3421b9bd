//! Listening Unix sockets by which processes of the host reach this one, and their paths.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
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

/// Makes a non-blocking listening socket at `path`, where there must be nothing but a socket whose owner is gone: a
/// process that was killed leaves it, and nobody else would remove it.
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
    let bind = || match rustix::net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => Err(BindError::Exists(path.to_owned())),
        other => other.map_err(|error| failed(error.into())),
    };
    // Kept until the new socket listens and so is not abandoned itself.
    let mut turn = None;
    if let Err(error) = bind() {
        turn = abandoned(path, &address, kind);
        if !matches!(error, BindError::Exists(_)) || turn.is_none() {
            return Err(error);
        }
        fs::remove_file(path).map_err(failed)?;
        bind()?;
    }
    let file = SocketFile {
        identity: identity(path).map_err(failed)?,
        path: path.to_owned(),
    };
    rustix::net::listen(&socket, BACKLOG).map_err(|error| failed(error.into()))?;
    drop(turn);
    Ok((OwnedFd::from(socket), file))
}

/// Whether `path` is a socket on which nobody listens, and nobody else is about to take its place: then the folder it is
/// in, with a lock on it. Of two processes that find the same socket, only one may remove it.
fn abandoned(path: &Path, address: &SocketAddrUnix, kind: SocketType) -> Option<File> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder = File::open(folder).ok()?;
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).ok()?;
    let is_socket = fs::symlink_metadata(path).ok()?.file_type().is_socket();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).ok()?;
    // One that is in use takes the connection, or has too many, or is of another type.
    let is_refused = rustix::net::connect(&probe, address) == Err(Errno::CONNREFUSED);
    (is_socket && is_refused).then_some(folder)
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
    fn the_place_of_a_socket_whose_owner_is_gone_is_taken() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("v.sock");
        // As it stays behind when a process is killed: the descriptor is closed, the file is there.
        drop(UnixListener::bind(&path).unwrap());
        let (listener, _file) = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        // Sockets of other types that are in use stay, too.
        for kind in [SocketType::DGRAM, SocketType::SEQPACKET] {
            let other = dir.as_path().join(format!("{kind:?}"));
            let socket = rustix::net::socket(AddressFamily::UNIX, kind, None).unwrap();
            rustix::net::bind(&socket, &SocketAddrUnix::new(&other).unwrap()).unwrap();
            if kind == SocketType::SEQPACKET {
                rustix::net::listen(&socket, 1).unwrap();
            }
            assert!(
                matches!(bind(&other), Err(BindError::Exists(_))),
                "{kind:?}"
            );
        }
    }

    #[test]
    fn of_many_who_find_a_socket_without_an_owner_one_gets_it() {
        let dir = TempDir::new().unwrap();
        for round in 0..50 {
            let path = dir.as_path().join(round.to_string());
            drop(UnixListener::bind(&path).unwrap());
            let start = std::sync::Barrier::new(4);
            let bound = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            start.wait();
                            bind(&path).ok()
                        })
                    })
                    .collect();
                let bound = threads.into_iter().map(|thread| thread.join().unwrap());
                bound.flatten().collect::<Vec<_>>()
            });
            assert_eq!(bound.len(), 1);
            UnixStream::connect(&path).unwrap();
            bound[0].0.accept().unwrap();
        }
    }

    #[test]
    fn links_and_files_are_no_sockets_without_an_owner() {
        let dir = TempDir::new().unwrap();
        let [gone, link, file] = ["gone", "link", "file"].map(|name| dir.as_path().join(name));
        drop(UnixListener::bind(&gone).unwrap());
        std::os::unix::fs::symlink(&gone, &link).unwrap();
        fs::write(&file, "mine").unwrap();
        for path in [&link, &file] {
            assert!(matches!(bind(path), Err(BindError::Exists(_))));
        }
        assert_eq!(fs::read(&file).unwrap(), b"mine");
        assert!(gone.exists());
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
