//! The host's end of a tap: whole frames sent to it and taken from it, past the host's own protocols.
#![allow(unsafe_code)] // A packet socket's address and options have no safe wrapper.

use std::io::{self, IoSlice};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, sendmmsg};

/// Frames handed over by one system call, at most.
const TOGETHER: usize = 64;

/// A packet socket on one interface.
pub struct Wire(OwnedFd);

impl Wire {
    /// One that sends, and takes the IPv4 frames that come from the interface.
    ///
    /// # Errors
    /// That of the host's kernel: it wants CAP_NET_RAW.
    pub fn on(interface: &str) -> io::Result<Self> {
        let protocol = (libc::ETH_P_IP as u16).to_be();
        // SAFETY: the call takes integers only.
        let socket = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                libc::c_int::from(protocol),
            )
        };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let wire = Self(unsafe { OwnedFd::from_raw_fd(socket) });
        // What the tap has no room for is then an error of the send, and no queue hides it.
        wire.set(libc::PACKET_QDISC_BYPASS)?;
        let index = rustix::net::netdevice::name_to_index(&wire.0, interface)?;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: protocol,
            sll_ifindex: index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the address is a whole sockaddr_ll of the length given, and lives during the call.
        let bound = unsafe {
            libc::bind(
                wire.0.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        match bound {
            0 => Ok(wire),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn set(&self, option: libc::c_int) -> io::Result<()> {
        let on: libc::c_int = 1;
        // SAFETY: the option reads one int, which lives during the call.
        let set = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                option,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        match set {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sends frames, in order, until the interface has no more room. Returns how many it took.
    ///
    /// # Errors
    /// That of the host's kernel, unless it is about room.
    pub fn send(&self, frames: &[Vec<u8>]) -> io::Result<usize> {
        let mut taken = 0;
        for some in frames.chunks(TOGETHER) {
            let slices: Vec<[IoSlice<'_>; 1]> =
                some.iter().map(|frame| [IoSlice::new(frame)]).collect();
            let mut nothing: Vec<SendAncillaryBuffer<'_, '_, '_>> =
                some.iter().map(|_| Default::default()).collect();
            let mut messages: Vec<MMsgHdr<'_>> = slices
                .iter()
                .zip(&mut nothing)
                .map(|(slice, nothing)| MMsgHdr::new(slice, nothing))
                .collect();
            match sendmmsg(&self.0, &mut messages, SendFlags::DONTWAIT) {
                Ok(count) => {
                    taken += count;
                    if count < some.len() {
                        return Ok(taken);
                    }
                }
                // A tap that is full, and one that nobody has open.
                Err(rustix::io::Errno::NOBUFS | rustix::io::Errno::AGAIN) => return Ok(taken),
                Err(rustix::io::Errno::NETDOWN) => return Ok(taken),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(taken)
    }

    /// Takes a frame. None: there is none now.
    ///
    /// # Errors
    /// That of the host's kernel.
    pub fn receive<'b>(&self, buffer: &'b mut [u8]) -> io::Result<Option<&'b [u8]>> {
        match rustix::io::read(&self.0, &mut *buffer) {
            Ok(len) => Ok(buffer.get(..len)),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
