//! Listening Unix sockets by which processes of the host reach this one, and their paths.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 1024;
const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);
/// How long to wait for others who take places in the same folder, and how often to look.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// Why there is no listening socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Something is at the path already. It may be another machine's socket, so it is left alone.
    #[error("{}: the path exists already", .0.display())]
    Exists(PathBuf),
    /// What is at the path may be left over from a process that is gone, but another one has locked the folder.
    #[error(
        "{}: the path exists already, and its folder is locked (flock) by another process",
        .0.display()
    )]
    Locked(PathBuf),
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
    /// Device and inode. The number is no other file's while the socket is open.
    identity: (u64, u64),
    /// The socket, which nobody takes for abandoned until its file is removed.
    _socket: OwnedFd,
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
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, FLAGS, None)
        .map_err(|error| failed(error.into()))?;
    // bind() gives the file the mode of the socket's own inode, less the umask.
    let socket = File::from(socket);
    socket
        .set_permissions(Permissions::from_mode(0o600))
        .map_err(failed)?;
    match rustix::net::bind(&socket, &address) {
        Ok(()) => {}
        Err(Errno::ADDRINUSE) => take_place(path, &socket, &address, kind)?,
        Err(error) => return Err(failed(error.into())),
    }
    let file = SocketFile {
        identity: identity(path).map_err(failed)?,
        path: path.to_owned(),
        _socket: socket.try_clone().map_err(failed)?.into(),
    };
    rustix::net::listen(&socket, BACKLOG).map_err(|error| failed(error.into()))?;
    Ok((OwnedFd::from(socket), file))
}

/// Binds `socket` to `path` in the place of one whose owner is gone.
///
/// Those who find the same socket do this one after the other, with a lock on the folder. Who had it first has a socket
/// there that is somebody's.
fn take_place(
    path: &Path,
    socket: &File,
    address: &SocketAddrUnix,
    kind: SocketType,
) -> Result<(), BindError> {
    let failed = |source: io::Error| BindError::Io {
        path: path.to_owned(),
        source,
    };
    let exists = || BindError::Exists(path.to_owned());
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder = File::open(folder).map_err(|_| exists())?;
    if !lock(&folder).map_err(failed)? {
        return Err(BindError::Locked(path.to_owned()));
    }
    // Held open, so that no other file has its number meanwhile.
    // Not by the standard library: with musl it takes O_PATH for a way of access, and leaves it out.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = match openat(CWD, path, flags, Mode::empty()) {
        Ok(found) => Some(File::from(found)),
        Err(Errno::NOENT) => None,
        Err(_) => return Err(exists()),
    };
    // Again: the kernel makes a file, then ties a socket to it, and lets nobody else make one meanwhile. Whoever made
    // `found` has it tied from here on.
    match (rustix::net::bind(socket, address), found) {
        (Ok(()), _) => Ok(()),
        (Err(Errno::ADDRINUSE), Some(found)) => {
            if !is_abandoned(path, &found, address, kind).map_err(failed)? {
                return Err(exists());
            }
            fs::remove_file(path).map_err(failed)?;
            match rustix::net::bind(socket, address) {
                Err(Errno::ADDRINUSE) => Err(exists()),
                done => done.map_err(|error| failed(error.into())),
            }
        }
        (Err(Errno::ADDRINUSE), None) => Err(exists()),
        (Err(error), _) => Err(failed(error.into())),
    }
}

/// Locks a folder, which others hold for microseconds. False: somebody has it for some reason of his own.
fn lock(folder: &File) -> io::Result<bool> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                // No event tells when it is free, and to wait without an end would be at the mercy of anybody.
                rustix::event::poll(&mut [], Some(&PAUSE))?;
            }
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether `found`, which was at `path` before, is a socket that no process has, and is still there.
fn is_abandoned(
    path: &Path,
    found: &File,
    address: &SocketAddrUnix,
    kind: SocketType,
) -> io::Result<bool> {
    let metadata = found.metadata()?;
    if !metadata.file_type().is_socket() {
        return Ok(false);
    }
    // A socket that has an owner but does not listen yet refuses connections of its own type, as one without an owner
    // does. To another type the kernel says that it is of another type, if it is anybody's.
    let other = match kind {
        SocketType::SEQPACKET => SocketType::STREAM,
        _ => SocketType::SEQPACKET,
    };
    for kind in [other, kind] {
        let probe = rustix::net::socket_with(AddressFamily::UNIX, kind, FLAGS, None)?;
        if rustix::net::connect(&probe, address) != Err(Errno::CONNREFUSED) {
            return Ok(false);
        }
    }
    Ok(identity(path).is_ok_and(|now| now == (metadata.dev(), metadata.ino())))
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
    fn a_socket_that_does_not_listen_yet_has_an_owner() {
        let dir = TempDir::new().unwrap();
        for kind in [SocketType::STREAM, SocketType::SEQPACKET, SocketType::DGRAM] {
            let path = dir.as_path().join(format!("{kind:?}"));
            let socket = rustix::net::socket(AddressFamily::UNIX, kind, None).unwrap();
            rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
            for wanted in [SocketType::STREAM, SocketType::SEQPACKET] {
                let refused = bind_type(&path, wanted);
                assert!(matches!(refused, Err(BindError::Exists(_))), "{kind:?}");
            }
            drop(socket);
            bind_type(&path, SocketType::STREAM).unwrap();
        }
    }

    #[test]
    fn a_socket_whose_listener_is_closed_is_not_abandoned_while_its_file_is_to_be_removed() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("v.sock");
        let (listener, file) = bind(&path).unwrap();
        drop(listener);
        assert!(matches!(bind(&path), Err(BindError::Exists(_))));
        drop(file);
        bind(&path).unwrap();
    }

    /// What each of eight threads gets that bind as many paths at the same moment.
    fn at_once(paths: &[PathBuf; 8]) -> Vec<(UnixListener, SocketFile)> {
        let start = std::sync::Barrier::new(paths.len());
        std::thread::scope(|scope| {
            let threads = paths.each_ref().map(|path| {
                scope.spawn(|| {
                    start.wait();
                    match bind(path) {
                        Ok(bound) => Some(bound),
                        Err(BindError::Exists(_)) => None,
                        Err(error) => panic!("{error}"),
                    }
                })
            });
            let bound = threads.map(|thread| thread.join().unwrap());
            bound.into_iter().flatten().collect()
        })
    }

    #[test]
    fn of_many_who_want_a_path_at_once_one_gets_it() {
        let dir = TempDir::new().unwrap();
        for round in 0..200 {
            let path = dir.as_path().join(round.to_string());
            // Half of the time there is the socket of a process that is gone, half of the time nothing.
            if round % 2 == 0 {
                drop(UnixListener::bind(&path).unwrap());
            }
            let bound = at_once(&std::array::from_fn(|_| path.clone()));
            assert_eq!(bound.len(), 1);
            UnixStream::connect(&path).unwrap();
            bound[0].0.accept().unwrap();
        }
    }

    #[test]
    fn all_who_find_sockets_without_owners_in_one_folder_get_theirs() {
        let dir = TempDir::new().unwrap();
        for round in 0..100 {
            let paths = std::array::from_fn(|n| dir.as_path().join(format!("{round}.{n}")));
            for path in &paths {
                drop(UnixListener::bind(path).unwrap());
            }
            assert_eq!(at_once(&paths).len(), paths.len());
        }
    }

    #[test]
    fn a_folder_that_somebody_has_locked_is_not_waited_for_without_end() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("v.sock");
        drop(UnixListener::bind(&path).unwrap());
        let folder = File::open(dir.as_path()).unwrap();
        rustix::fs::flock(&folder, FlockOperation::LockExclusive).unwrap();
        assert!(matches!(bind(&path), Err(BindError::Locked(_))));
        // Who finds nothing needs no lock.
        bind(&dir.as_path().join("w.sock")).unwrap();
        drop(folder);
        bind(&path).unwrap();
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
