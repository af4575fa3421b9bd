//! Unix sockets that keep messages apart (SOCK_SEQPACKET), with descriptors that go along with a message.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::inherited;
use crate::listener::{self, BindError, SocketFile};

/// Most descriptors that go with one message: the kernel's SCM_MAX_FD.
pub const MAX_FILES: usize = 253;

/// One message.
#[derive(Debug)]
pub struct Packet {
    /// What it says. Never empty.
    pub bytes: Vec<u8>,
    /// What came along.
    pub files: Vec<OwnedFd>,
}

/// One end of a connection. Nothing ever waits for the other end.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Connects to the socket at `path`, which listens.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::connect(&socket, &address)?;
        Ok(PacketSocket(socket))
    }

    /// Two ends of one connection.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let kind = SocketType::SEQPACKET;
        let (one, two) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?;
        Ok((PacketSocket(one), PacketSocket(two)))
    }

    /// The connected socket that this process was started with as descriptor `number`.
    pub fn inherited(number: RawFd) -> io::Result<Self> {
        let socket = inherited::duplicate(number)?;
        if rustix::net::sockopt::socket_type(&socket)? != SocketType::SEQPACKET {
            return Err(io::Error::other("not a socket of type SOCK_SEQPACKET"));
        }
        rustix::net::getpeername(&socket)?;
        let flags = rustix::fs::fcntl_getfl(&socket)?;
        rustix::fs::fcntl_setfl(&socket, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(PacketSocket(socket))
    }

    /// A connected socket that another process has handed over. Nothing waits on it either.
    pub fn received(socket: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&socket)?;
        rustix::fs::fcntl_setfl(&socket, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(PacketSocket(socket))
    }

    /// Sends one message, whole or not at all. `bytes` is not empty, and `files` are no more than [`MAX_FILES`].
    pub fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::Error::other(format!(
                "{} descriptors are too many for one message",
                files.len()
            )));
        }
        let bytes = [IoSlice::new(bytes)];
        rustix::net::sendmsg(&self.0, &bytes, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The next message, of no more than `most` bytes, if there is one; [`io::ErrorKind::UnexpectedEof`] once the other
    /// end is closed. A longer one is an error, and gone.
    pub fn receive(&self, most: usize) -> io::Result<Option<Packet>> {
        let Some(length) = self.length_of_next()? else {
            return Ok(None);
        };
        // Room for the most that there may be would be cleared for each message, page by page.
        let mut bytes = vec![0; length.min(most)];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &self.0,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        let message = match received {
            Ok(message) => message,
            Err(error) if error == rustix::io::Errno::AGAIN => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut files = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                files.extend(rights);
            }
        }
        if message
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::Error::other(format!(
                "a message of more than {most} bytes, or with more descriptors than there is room for"
            )));
        }
        if message.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.truncate(message.bytes);
        Ok(Some(Packet { bytes, files }))
    }

    /// How long the next message is, if there is one; 0 once the other end is closed.
    fn length_of_next(&self) -> io::Result<Option<usize>> {
        let look =
            || match rustix::net::recv(&self.0, &mut [0; 0], RecvFlags::PEEK | RecvFlags::TRUNC) {
                Ok((_, length)) => Ok(Some(length)),
                Err(rustix::io::Errno::AGAIN) => Ok(None),
                Err(error) => Err(error.into()),
            };
        match look()? {
            // The kernel looks for a message first and for the end after that: where the other end sends its last one and
            // closes in between, there is an end and yet a message. Nothing comes after an end, so a second look is true.
            Some(0) => look(),
            length => Ok(length),
        }
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl From<PacketSocket> for OwnedFd {
    fn from(socket: PacketSocket) -> Self {
        socket.0
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A listening socket.
#[derive(Debug)]
pub struct PacketListener(OwnedFd);

impl PacketListener {
    /// Makes a socket at `path`, which must not exist. As with [`listener::bind`] only this user may connect.
    pub fn bind(path: &Path) -> Result<(Self, SocketFile), BindError> {
        let (socket, file) = listener::bind_type(path, SocketType::SEQPACKET)?;
        Ok((PacketListener(socket), file))
    }

    /// The next connection, if there is one.
    pub fn accept(&self) -> io::Result<Option<PacketSocket>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.0, flags) {
            Ok(socket) => Ok(Some(PacketSocket(socket))),
            Err(error) if error == rustix::io::Errno::AGAIN => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for PacketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for PacketListener {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn messages_stay_apart_and_carry_descriptors() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("p.sock");
        assert!(PacketSocket::connect(&path).is_err());
        let (listener, _file) = PacketListener::bind(&path).unwrap();
        assert!(listener.accept().unwrap().is_none());
        let client = PacketSocket::connect(&path).unwrap();
        let server = listener.accept().unwrap().unwrap();
        assert!(server.receive(16).unwrap().is_none());
        let null = File::open("/dev/null").unwrap();
        client.send(b"one", &[null.as_fd(), null.as_fd()]).unwrap();
        client.send(b"two", &[]).unwrap();
        let one = server.receive(16).unwrap().unwrap();
        assert_eq!((one.bytes.as_slice(), one.files.len()), (&b"one"[..], 2));
        let two = server.receive(16).unwrap().unwrap();
        assert_eq!((two.bytes.as_slice(), two.files.len()), (&b"two"[..], 0));
        drop(client);
        let end = server.receive(16).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
        assert!(server.send(b"x", &[]).is_err());
    }

    #[test]
    fn the_last_message_is_had_whenever_the_other_end_closes() {
        for _ in 0..300 {
            let pairs = (0..100).map(|_| PacketSocket::pair().unwrap());
            let (senders, receivers): (Vec<_>, Vec<_>) = pairs.unzip();
            let looked_at = AtomicUsize::new(0);
            let had = std::thread::scope(|scope| {
                scope.spawn(|| {
                    for (number, sender) in senders.into_iter().enumerate() {
                        // The other thread looks again and again already.
                        while looked_at.load(Ordering::Relaxed) <= number {
                            std::thread::yield_now();
                        }
                        sender.send(b"last", &[]).unwrap();
                    }
                });
                let next = |receiver: PacketSocket| {
                    looked_at.fetch_add(1, Ordering::Relaxed);
                    loop {
                        if let Some(had) = receiver.receive(16).transpose() {
                            break had;
                        }
                        std::thread::yield_now();
                    }
                };
                receivers.into_iter().map(next).collect::<Vec<_>>()
            });
            for message in had {
                assert_eq!(message.unwrap().bytes, b"last");
            }
        }
    }

    #[test]
    fn what_is_too_much_is_refused() {
        let (one, two) = PacketSocket::pair().unwrap();
        one.send(&[7; 17], &[]).unwrap();
        one.send(&[7; 16], &[]).unwrap();
        assert!(two.receive(16).is_err());
        assert_eq!(two.receive(16).unwrap().unwrap().bytes.len(), 16);
        let null = File::open("/dev/null").unwrap();
        let many = [null.as_fd(); MAX_FILES + 1];
        assert!(one.send(b"x", &many).is_err());
        one.send(b"x", &many[1..]).unwrap();
        assert_eq!(two.receive(16).unwrap().unwrap().files.len(), MAX_FILES);
    }

    #[test]
    fn only_a_connected_socket_is_inherited() {
        let (one, _two) = PacketSocket::pair().unwrap();
        assert!(PacketSocket::inherited(one.as_raw_fd()).is_ok());
        let null = File::open("/dev/null").unwrap();
        assert!(PacketSocket::inherited(null.as_raw_fd()).is_err());
        let dir = TempDir::new().unwrap();
        let (listener, _file) = PacketListener::bind(&dir.as_path().join("p")).unwrap();
        assert!(PacketSocket::inherited(listener.as_raw_fd()).is_err());
    }
}
