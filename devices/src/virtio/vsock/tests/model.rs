//! Random interleavings of both sides, against a model of what a guest's driver must see.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use proptest::prelude::*;

use super::driver::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::vsock::packet::{Header, Op, ShutdownFlags};

const CONNECTIONS: usize = 3;
const SERVER_PORT: u32 = 52;
const LISTENING_PORT: u32 = 9;

#[derive(Debug, Clone)]
enum Step {
    /// The guest's program writes.
    GuestSends(usize),
    /// The guest's program reads; the driver tells the device, or not.
    GuestReads(usize, bool),
    GuestShutsSend,
    HostSends(usize),
    HostReads(usize),
    HostShutsSend,
    /// The driver offers receive buffers.
    Offer(usize),
    /// The driver offers receive buffers and forgets to kick until later.
    OfferSilently(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1usize..70_000).prop_map(Step::GuestSends),
        4 => (1usize..70_000, any::<bool>()).prop_map(|(n, told)| Step::GuestReads(n, told)),
        1 => Just(Step::GuestShutsSend),
        4 => (1usize..70_000).prop_map(Step::HostSends),
        4 => (1usize..300_000).prop_map(Step::HostReads),
        1 => Just(Step::HostShutsSend),
        4 => (1usize..20).prop_map(Step::Offer),
        1 => (1usize..20).prop_map(Step::OfferSilently),
    ]
}

/// The byte at `position` of a stream: wrong order, loss or a mix-up of streams shows.
fn byte(stream: usize, position: usize) -> u8 {
    (position.wrapping_mul(31) ^ (position >> 8) ^ (stream * 97)) as u8
}

fn bytes(stream: usize, from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| byte(stream, at)).collect()
}

/// One connection, as guest and host see it.
struct Both {
    number: usize,
    guest_port: u32,
    host_port: u32,
    host: UnixStream,
    buf_alloc: u32,
    /// Received by the driver, not yet read by the program.
    held: VecDeque<u8>,
    fwd_cnt: usize,
    told_fwd_cnt: usize,
    guest_sent: usize,
    guest_got: usize,
    host_sent: usize,
    host_got: usize,
    device_buf_alloc: usize,
    device_fwd_cnt: usize,
    guest_shut: bool,
    host_shut: bool,
    /// The device told that the host sends no more.
    guest_sees_end: bool,
    rst: bool,
}

impl Both {
    fn header(&mut self, op: Op, len: usize) -> Header {
        self.told_fwd_cnt = self.fwd_cnt;
        Header {
            len: len as u32,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt as u32,
            ..packet(op, self.guest_port, self.host_port)
        }
    }

    fn credit(&self) -> usize {
        self.device_buf_alloc - (self.guest_sent - self.device_fwd_cnt)
    }

    fn take(&mut self, rig: &mut Rig, header: &Header, data: &[u8]) {
        self.device_buf_alloc = header.buf_alloc as usize;
        let fwd_cnt = header.fwd_cnt as usize;
        assert!((self.device_fwd_cnt..=self.guest_sent).contains(&fwd_cnt));
        self.device_fwd_cnt = fwd_cnt;
        match header.op.unwrap() {
            Op::Rw => {
                assert!(!data.is_empty() && !self.guest_sees_end);
                assert_eq!(data, bytes(2 * self.number, self.guest_got, data.len()));
                self.guest_got += data.len();
                self.held.extend(data);
                let in_flight = self.guest_got - self.told_fwd_cnt;
                assert!(
                    in_flight <= self.buf_alloc as usize,
                    "the guest's credit was overrun"
                );
            }
            Op::Shutdown => {
                let flags = ShutdownFlags::parse(header.flags);
                self.guest_sees_end |= flags.send;
                assert!(self.host_shut && self.guest_got == self.host_sent);
                assert!(!flags.receive || self.guest_shut);
            }
            Op::CreditRequest => {
                let update = self.header(Op::CreditUpdate, 0);
                rig.send(&update, b"");
            }
            Op::CreditUpdate => {}
            Op::Rst => {
                assert!(!self.rst);
                self.rst = true;
            }
            other => panic!("{other:?}"),
        }
    }

    fn guest_sends(&mut self, rig: &mut Rig, len: usize) {
        let len = len.min(self.credit()).min(64 << 10);
        if len > 0 && !self.guest_shut {
            let data = bytes(2 * self.number + 1, self.guest_sent, len);
            self.guest_sent += len;
            let header = self.header(Op::Rw, len);
            rig.send(&header, &data);
        }
    }

    fn guest_reads(&mut self, rig: &mut Rig, len: usize, told: bool) {
        let len = len.min(self.held.len());
        self.held.drain(..len);
        self.fwd_cnt += len;
        if told {
            let header = self.header(Op::CreditUpdate, 0);
            rig.send(&header, b"");
        }
    }

    fn shut(&mut self, rig: &mut Rig, flags: ShutdownFlags) {
        self.guest_shut = true;
        let header = Header {
            flags: flags.bits(),
            ..self.header(Op::Shutdown, 0)
        };
        rig.send(&header, b"");
    }

    fn host_sends(&mut self, len: usize) {
        if self.host_shut {
            return;
        }
        let data = bytes(2 * self.number, self.host_sent, len);
        match self.host.write(&data) {
            Ok(len) => self.host_sent += len,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    /// Whether the host sees an end.
    fn host_reads(&mut self, len: usize) -> bool {
        let mut buffer = vec![0; len];
        match self.host.read(&mut buffer) {
            Ok(0) => return true,
            Ok(len) => {
                let expected = bytes(2 * self.number + 1, self.host_got, len);
                assert!(buffer[..len] == expected);
                self.host_got += len;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        false
    }

    fn host_shuts(&mut self) {
        if !self.host_shut {
            self.host.shutdown(Shutdown::Write).unwrap();
            self.host_shut = true;
        }
    }
}

/// Lets the device work and hands what came to its connections.
fn settle(rig: &mut Rig, all: &mut [Both]) {
    rig.run();
    while let Some((header, data)) = rig.inbox.pop_front() {
        let both = all
            .iter_mut()
            .find(|b| (b.guest_port, b.host_port) == (header.dst_port, header.src_port))
            .unwrap();
        both.take(rig, &header, &data);
    }
}

fn open(rig: &mut Rig, listener: &UnixListener, number: usize, buf_alloc: u32) -> Both {
    let guest_port;
    let host_port;
    let host;
    let told: Header;
    if number.is_multiple_of(2) {
        (guest_port, host_port) = (1000 + number as u32, SERVER_PORT);
        let request = Header {
            buf_alloc,
            ..packet(Op::Request, guest_port, host_port)
        };
        rig.send(&request, b"");
        told = rig.expect(Op::Response).0;
        host = listener.accept().unwrap().0;
        host.set_nonblocking(true).unwrap();
    } else {
        let mut client = rig.client();
        writeln!(client, "CONNECT {LISTENING_PORT}").unwrap();
        rig.run();
        told = rig.expect(Op::Request).0;
        (guest_port, host_port) = (LISTENING_PORT, told.src_port);
        let response = Header {
            buf_alloc,
            ..packet(Op::Response, guest_port, host_port)
        };
        rig.send(&response, b"");
        let expected = format!("OK {host_port}\n");
        let mut answer = vec![0; expected.len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, expected.as_bytes());
        host = client;
    }
    Both {
        number,
        guest_port,
        host_port,
        host,
        buf_alloc,
        held: VecDeque::new(),
        fwd_cnt: 0,
        told_fwd_cnt: 0,
        guest_sent: 0,
        guest_got: 0,
        host_sent: 0,
        host_got: 0,
        device_buf_alloc: told.buf_alloc as usize,
        device_fwd_cnt: 0,
        guest_shut: false,
        host_shut: false,
        guest_sees_end: false,
        rst: false,
    }
}

/// How a connection ends once all bytes have arrived.
fn finish(rig: &mut Rig, all: &mut [Both], host_first: bool) {
    rig.refill = true;
    for round in 0.. {
        assert!(round < 10_000, "bytes do not arrive");
        settle(rig, all);
        for both in all.iter_mut() {
            both.guest_reads(rig, usize::MAX, true);
            both.host_reads(1 << 20);
        }
        let arrived = |b: &Both| b.guest_got == b.host_sent && b.host_got == b.guest_sent;
        if all.iter().all(arrived) {
            break;
        }
    }
    for both in all.iter_mut() {
        if host_first {
            both.host_shuts();
        }
    }
    settle(rig, all);
    for at in 0..all.len() {
        let both = &mut all[at];
        assert!(!both.rst);
        assert_eq!(both.guest_sees_end, both.host_shut);
        both.shut(rig, ShutdownFlags::BOTH);
        assert!(both.host_reads(1), "the host sees no end");
        settle(rig, all);
        assert!(all[at].rst);
    }
    assert_eq!(rig.device.muxer.connections(), 0);
    assert!(!rig.device.muxer.has_rx());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 96,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]
    #[test]
    fn every_byte_arrives_once_and_in_order(
        buf_allocs in proptest::array::uniform3(prop_oneof![500u32..10_000, 60_000u32..400_000]),
        steps in proptest::collection::vec((0..CONNECTIONS, step()), 1..120),
        host_first: bool,
    ) {
        let mut rig = Rig::new();
        let listener = rig.serve(SERVER_PORT);
        let mut all: Vec<Both> = buf_allocs
            .into_iter()
            .enumerate()
            .map(|(number, buf_alloc)| open(&mut rig, &listener, number, buf_alloc))
            .collect();
        rig.refill = false;
        for (at, step) in steps {
            let both = &mut all[at];
            match step {
                Step::GuestSends(len) => both.guest_sends(&mut rig, len),
                Step::GuestReads(len, told) => both.guest_reads(&mut rig, len, told),
                Step::GuestShutsSend => {
                    both.shut(&mut rig, ShutdownFlags { receive: false, send: true });
                }
                Step::HostSends(len) => both.host_sends(len),
                Step::HostReads(len) => drop(both.host_reads(len)),
                Step::HostShutsSend => both.host_shuts(),
                Step::Offer(count) => rig.offer_rx(count),
                Step::OfferSilently(count) => {
                    rig.offer_rx(count);
                    let _ = rig.device.process_source(0).unwrap();
                    rig.collect();
                    continue;
                }
            }
            settle(&mut rig, &mut all);
        }
        finish(&mut rig, &mut all, host_first);
    }
}
