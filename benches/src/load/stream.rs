//! Bytes over a connection, one way or the other.
//!
//! The connecting side says by its first byte which way they go. What it sends is counted by the other, whose count comes back:
//! bytes that lie in between do not count as sent. The end is a byte in the last chunk: not every VMM carries half a shutdown over
//! vsock.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

use super::SPAN;

/// Bytes of one read or write.
const CHUNK: usize = 64 << 10;
/// A connection on which nothing moves for so long is dead.
const PATIENCE: Duration = Duration::from_secs(20);

const SEND: u8 = b's';
const RECEIVE: u8 = b'r';
const QUIT: u8 = b'q';
/// The first byte of a chunk that is the last; others begin with another.
const LAST: u8 = 0;

/// Whom to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `tcp:IP:PORT`
    Tcp(SocketAddr),
    /// `unix:PATH`
    Unix(PathBuf),
    /// `vsock:CID:PORT`, see vsock(7).
    Vsock(u32, u32),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = match text.split_once(':') {
            Some(("tcp", address)) => address.parse().ok().map(Self::Tcp),
            Some(("unix", path)) if !path.is_empty() => Some(Self::Unix(path.into())),
            Some(("vsock", address)) => address
                .split_once(':')
                .and_then(|(cid, port)| Some(Self::Vsock(cid.parse().ok()?, port.parse().ok()?))),
            _ => None,
        };
        parsed.ok_or_else(|| {
            format!("{text:?}: addresses are tcp:IP:PORT, unix:PATH and vsock:CID:PORT")
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Vsock(cid, port) => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

impl Address {
    fn connect(&self) -> io::Result<File> {
        let socket = match self {
            Self::Tcp(address) => bounded(TcpStream::connect(address)?)?,
            Self::Unix(path) => OwnedFd::from(UnixStream::connect(path)?),
            Self::Vsock(cid, port) => {
                let flags = SockFlag::SOCK_CLOEXEC;
                let vsock = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
                connect(vsock.as_raw_fd(), &VsockAddr::new(*cid, *port))?;
                vsock
            }
        };
        Ok(File::from(socket))
    }
}

/// The other end of TCP may be gone without a word, as a guest is that was killed.
fn bounded(stream: TcpStream) -> io::Result<OwnedFd> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(OwnedFd::from(stream))
}

/// Bytes a second to the other side.
///
/// # Errors
/// If the connection is refused, or ends early.
pub fn send(to: &Address) -> io::Result<f64> {
    let mut stream = to.connect()?;
    stream.write_all(&[SEND])?;
    let (begin, mut chunk) = (Instant::now(), vec![0x5a; CHUNK]);
    while begin.elapsed() < SPAN {
        stream.write_all(&chunk)?;
    }
    chunk[0] = LAST;
    stream.write_all(&chunk)?;
    let mut count = [0; 8];
    stream.read_exact(&mut count)?;
    Ok(u64::from_le_bytes(count) as f64 / begin.elapsed().as_secs_f64())
}

/// Bytes a second from the other side.
///
/// # Errors
/// As [`send`].
pub fn receive(from: &Address) -> io::Result<f64> {
    let mut stream = from.connect()?;
    stream.write_all(&[RECEIVE])?;
    let (mut chunk, mut count) = (vec![0; CHUNK], 0u64);
    let begin = Instant::now();
    while begin.elapsed() < SPAN {
        match stream.read(&mut chunk)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => count = count.saturating_add(more as u64),
        }
    }
    Ok(count as f64 / begin.elapsed().as_secs_f64())
}

/// The other side: a thread that serves one connection after the other, until this is dropped.
pub struct Server {
    address: Address,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    /// On all of this machine's addresses; [`Server::port`] is its own.
    pub fn tcp() -> io::Result<Self> {
        let listener = TcpListener::bind("0.0.0.0:0")?;
        let port = listener.local_addr()?.port();
        let address = Address::Tcp(SocketAddr::from(([127, 0, 0, 1], port)));
        Ok(Self::start(address, move || bounded(listener.accept()?.0)))
    }

    /// On a Unix socket that is made at `path`.
    pub fn unix(path: PathBuf) -> io::Result<Self> {
        let listener = UnixListener::bind(&path)?;
        Ok(Self::start(Address::Unix(path), move || {
            Ok(OwnedFd::from(listener.accept()?.0))
        }))
    }

    fn start(address: Address, accept: impl Fn() -> io::Result<OwnedFd> + Send + 'static) -> Self {
        let serve = move || {
            while let Ok(stream) = accept() {
                // A connection that breaks is told by its other side.
                if matches!(answer(File::from(stream)), Ok(false)) {
                    return;
                }
            }
        };
        Self {
            address,
            thread: Some(thread::spawn(serve)),
        }
    }

    /// Where this machine reaches it.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Its TCP port, or 0.
    pub fn port(&self) -> u16 {
        match self.address {
            Address::Tcp(address) => address.port(),
            Address::Unix(_) | Address::Vsock(..) => 0,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let asked = self
            .address
            .connect()
            .and_then(|mut s| s.write_all(&[QUIT]));
        if let (Ok(()), Some(thread)) = (asked, self.thread.take()) {
            // A panic was shown already.
            let _ = thread.join();
        }
    }
}

/// Serves one connection. False: there is to be none after it.
fn answer(mut stream: File) -> io::Result<bool> {
    let mut way = [0];
    stream.read_exact(&mut way)?;
    let mut chunk = vec![0xa5; CHUNK];
    match way[0] {
        SEND => {
            let mut count = 0u64;
            while chunk[0] != LAST {
                stream.read_exact(&mut chunk)?;
                count = count.saturating_add(CHUNK as u64);
            }
            stream.write_all(&count.to_le_bytes())?;
        }
        RECEIVE => while stream.write(&chunk).is_ok_and(|count| count > 0) {},
        _ => return Ok(way[0] != QUIT),
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_both_ways() {
        let folder = tempfile::tempdir().unwrap();
        let tcp = Server::tcp().unwrap();
        let unix = Server::unix(folder.path().join("socket")).unwrap();
        assert_ne!(tcp.port(), 0);
        for server in [&tcp, &unix] {
            // One after the other, as the loads are.
            for work in [send, receive, send] {
                assert!(work(server.address()).unwrap() > 0.0);
            }
        }
    }

    #[test]
    fn a_server_that_is_gone_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::unix(folder.path().join("socket")).unwrap();
        let address = server.address().clone();
        drop(server);
        assert!(send(&address).is_err() && receive(&address).is_err());
    }

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in ["tcp:127.0.0.1:7", "unix:/a/b", "vsock:2:5000"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for wrong in [
            "",
            "unix:",
            "tcp:host:7",
            "vsock:2",
            "vsock:2:x",
            "udp:1.1.1.1:2",
        ] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }
}
