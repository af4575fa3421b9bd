//! Requests to the kernel about interfaces, addresses and routes: rtnetlink(7).
//!
//! The messages are netlink-packet-route's, which only writes and reads them. rtnetlink above it needs an asynchronous
//! runtime.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// Bytes of answers taken at once: what the kernel sends at most.
const ROOM: usize = 32 << 10;

/// A connection to the kernel.
pub struct Route(OwnedFd);

impl Route {
    pub fn open() -> io::Result<Self> {
        Ok(Self(socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?))
    }

    /// Changes something; `flags` say how.
    pub fn change(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.request(message, flags | NLM_F_ACK).map(drop)
    }

    /// All that there is of something.
    pub fn all(&self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.request(message, NLM_F_DUMP)
    }

    fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.0.as_raw_fd(), &bytes, &kernel, MsgFlags::empty())?;
        let mut answers = Vec::new();
        let mut room = vec![0; ROOM];
        loop {
            let length = recv(self.0.as_raw_fd(), &mut room, MsgFlags::empty())?;
            let mut rest = room.get(..length).unwrap_or_default();
            while !rest.is_empty() {
                let answer = NetlinkMessage::deserialize(rest).map_err(io::Error::other)?;
                let (header, payload) = answer.into_parts();
                match payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Error(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    _ => {}
                }
                // Each message begins at a multiple of four bytes.
                let taken = (header.length as usize).next_multiple_of(4).max(16);
                rest = rest.get(taken..).unwrap_or_default();
            }
        }
    }
}
