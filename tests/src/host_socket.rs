//! A Unix socket of the host on which a guest's connection is awaited.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::PATIENCE;

/// A listening socket whose file goes with it.
pub struct HostSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl HostSocket {
    /// Listens where the vsock of `uds_path` leads guests that connect to the host's `port`.
    #[track_caller]
    pub fn of_vsock(uds_path: &Path, port: u32) -> Self {
        let mut path = uds_path.as_os_str().to_owned();
        path.push(format!("_{port}"));
        let path = PathBuf::from(path);
        let listener = UnixListener::bind(&path).expect("a socket can be bound");
        Self { listener, path }
    }

    /// The next connection.
    #[track_caller]
    pub fn accept(&self) -> UnixStream {
        let timeout = Timespec::try_from(PATIENCE).expect("a short time");
        let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&timeout)).expect("a socket can be awaited");
        assert!(ready > 0, "nobody connects to {}", self.path.display());
        let (stream, _) = self.listener.accept().expect("a connection");
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("a socket has timeouts");
        stream
    }
}

impl Drop for HostSocket {
    fn drop(&mut self) {
        // The directory may be gone already.
        drop(fs::remove_file(&self.path));
    }
}
