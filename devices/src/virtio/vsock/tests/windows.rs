//! How far the guest may be ahead of its hosts.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;

use super::driver::*;
use crate::virtio::vsock::muxer::{LARGE_BUFFER, SMALL_BUFFER};
use crate::virtio::vsock::packet::{Header, Op};

const PORT: u32 = 52;
const PACKET: usize = 16 << 10;

/// A connection as the guest's driver sees it.
struct Sender {
    port: u32,
    host: UnixStream,
    sent: u32,
    fwd_cnt: u32,
}

impl Sender {
    /// Bytes that the driver may send.
    fn credit(&self) -> u32 {
        LARGE_BUFFER - (self.sent - self.fwd_cnt)
    }

    /// Reads all there is.
    fn take(&mut self, got: &mut usize) {
        let mut bytes = [0; PACKET];
        loop {
            match self.host.read(&mut bytes) {
                Ok(len) => *got += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Each sends a packet, all in one pass of the device; then the hosts read. Returns the largest credit that was told.
fn pass(rig: &mut Rig, senders: &mut [Sender]) -> u32 {
    for sender in senders.iter_mut() {
        assert!(sender.credit() as usize >= PACKET, "no credit came back");
        rig.queue(&data_packet(sender.port, PORT, PACKET), &[1; PACKET]);
        sender.sent += PACKET as u32;
    }
    rig.run();
    let mut got = 0;
    senders.iter_mut().for_each(|one| one.take(&mut got));
    assert_eq!(got, PACKET * senders.len());
    let mut most = 0;
    for (
        Header {
            op,
            dst_port,
            fwd_cnt,
            buf_alloc,
            ..
        },
        _,
    ) in rig.inbox.drain(..)
    {
        assert_eq!((op, buf_alloc), (Some(Op::CreditUpdate), LARGE_BUFFER));
        let sender = senders.iter_mut().find(|one| one.port == dst_port).unwrap();
        // What was told is not taken back, and nothing is told that was not sent.
        assert!((sender.fwd_cnt..=sender.sent).contains(&fwd_cnt));
        sender.fwd_cnt = fwd_cnt;
        most = most.max(sender.credit());
    }
    most
}

#[test]
fn several_that_send_share_what_one_alone_has() {
    let mut rig = Rig::new();
    let listener = rig.serve(PORT);
    let connect = |port| Sender {
        port,
        host: rig.connect(port, &listener, PORT),
        sent: 0,
        fwd_cnt: 0,
    };
    let mut senders: Vec<Sender> = (1000..1004).map(connect).collect();
    let together = (0..40).map(|_| pass(&mut rig, &mut senders)).max();
    assert_eq!(together, Some(SMALL_BUFFER));
    let alone = (0..40).map(|_| pass(&mut rig, &mut senders[..1])).max();
    assert_eq!(alone, Some(LARGE_BUFFER));
}
