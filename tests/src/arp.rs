//! What machines tell their neighbours on the host's networks (ARP, RFC 826).

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, Protocol, RawProtocol, RecvFlags, SocketFlags, SocketType, recv, socket_with,
};

use crate::PATIENCE;

/// ETH_P_ARP, as it is on the wire.
const ARP: u16 = 0x0806_u16.to_be();
/// Of an Ethernet frame, and of ARP for IPv4 in it.
const HEADER: usize = 14;
const LENGTH: usize = HEADER + 28;

/// Hears all that is said on all interfaces, from its making on.
pub struct Ear {
    socket: OwnedFd,
    /// MAC address and IPv4 address of those who announced themselves.
    heard: BTreeSet<(String, String)>,
}

impl Ear {
    /// Needs root.
    #[track_caller]
    pub fn new() -> Self {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let protocol = RawProtocol::new(ARP.into()).map(Protocol::from_raw);
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, protocol);
        Self {
            socket: socket.expect("a packet socket"),
            heard: BTreeSet::new(),
        }
    }

    /// Waits until the machine `mac` has announced, asked by nobody, that it has `address`.
    #[track_caller]
    pub fn wait_for(&mut self, mac: &str, address: &str) {
        let wanted = (mac.to_owned(), address.to_owned());
        let deadline = Instant::now() + PATIENCE;
        while !self.heard.contains(&wanted) {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).expect("a short time");
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            let ready = poll(&mut fds, Some(&timeout)).expect("a socket can be awaited");
            assert!(ready > 0, "no {wanted:?} among {:?}", self.heard);
            let mut frame = [0; 128];
            if let Ok((_, length)) = recv(&self.socket, &mut frame, RecvFlags::empty()) {
                let frame = frame.get(..length).unwrap_or_default();
                self.heard.extend(announcement(frame));
            }
        }
    }
}

impl Default for Ear {
    fn default() -> Self {
        Self::new()
    }
}

/// Who asks for its own address tells it to all others (RFC 5227, 3).
fn announcement(frame: &[u8]) -> Option<(String, String)> {
    let body = frame.get(HEADER..LENGTH)?;
    let (mac, sender, wanted) = (body.get(8..14)?, body.get(14..18)?, body.get(24..28)?);
    let of = |bytes: &[u8], separator: &str, write: fn(&u8) -> String| {
        bytes.iter().map(write).collect::<Vec<_>>().join(separator)
    };
    (sender == wanted).then(|| {
        (
            of(mac, ":", |byte| format!("{byte:02x}")),
            of(sender, ".", u8::to_string),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_told_from_a_question() {
        let mut frame = vec![0xff; 6];
        frame.extend([6, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend([6, 0, 0, 0, 0, 1, 10, 0, 0, 7, 0, 0, 0, 0, 0, 0]);
        let own = [frame.as_slice(), &[10, 0, 0, 7]].concat();
        let found = ("06:00:00:00:00:01".to_owned(), "10.0.0.7".to_owned());
        assert_eq!(announcement(&own), Some(found));
        assert_eq!(
            announcement(&[frame.as_slice(), &[10, 0, 0, 1]].concat()),
            None
        );
        assert_eq!(announcement(&frame), None);
    }
}
