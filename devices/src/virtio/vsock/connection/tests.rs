mod fake_stream;

use super::*;
use fake_stream::FakeStream;

const KEY: ConnectionKey = ConnectionKey {
    guest_port: 1000,
    host_port: 52,
};
const BUF: u32 = 1000;

/// A connection and its guest.
struct Rig {
    connection: Connection<FakeStream>,
    metrics: VsockMetrics,
    spare: Spare,
    now: Instant,
    fwd_cnt: u32,
    buf_alloc: u32,
}

impl Rig {
    fn cid() -> Cid {
        Cid::try_from(3).unwrap()
    }

    fn packet(&self, op: Option<Op>, flags: u32, len: u32) -> Header {
        Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: KEY.guest_port,
            dst_port: KEY.host_port,
            len,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    fn with(make: impl FnOnce(&Self, Instant, FakeStream) -> Connection<FakeStream>) -> Self {
        let now = Instant::now();
        let stream = || FakeStream {
            room: 1 << 20,
            ..FakeStream::default()
        };
        let mut rig = Rig {
            connection: Connection::from_host(KEY, Self::cid(), stream(), BUF, now),
            metrics: VsockMetrics::default(),
            spare: Spare::default(),
            now,
            fwd_cnt: 0,
            buf_alloc: 100,
        };
        rig.connection = make(&rig, now, stream());
        rig
    }

    /// A connection that a client asked for, with its REQUEST sent.
    fn connecting() -> Self {
        let mut rig = Self::with(|_, now, s| Connection::from_host(KEY, Self::cid(), s, BUF, now));
        assert_eq!(rig.control(), Op::Request);
        rig
    }

    /// A connection that the guest asked for, with its RESPONSE sent.
    fn open() -> Self {
        let mut rig = Self::with(|rig, _, s| {
            Connection::from_guest(&rig.packet(Some(Op::Request), 0, 0), Self::cid(), s, BUF)
                .unwrap()
        });
        assert_eq!(rig.control(), Op::Response);
        assert_eq!(rig.read(1), b"");
        assert_eq!(rig.connection.next(), Next::Nothing);
        rig
    }

    fn control(&mut self) -> Op {
        assert_eq!(self.connection.next(), Next::Control);
        self.connection.control().unwrap().op.unwrap()
    }

    fn read(&mut self, max: u32) -> Vec<u8> {
        let Next::Data(credit) = self.connection.next() else {
            panic!("{:?}", self.connection.next());
        };
        let mut bytes = vec![0; credit.min(max) as usize];
        let slices = [VolatileSlice::from(bytes.as_mut_slice())];
        let len = self.connection.read(&slices, self.now, &self.metrics);
        bytes.truncate(len as usize);
        bytes
    }

    fn send(&mut self, op: Op, flags: u32, data: &[u8]) {
        let header = self.packet(Some(op), flags, data.len() as u32);
        self.send_raw(&header, data);
    }

    fn turn(&mut self) -> (&mut Connection<FakeStream>, Turn<'_>) {
        let turn = Turn {
            now: self.now,
            metrics: &self.metrics,
            spare: &mut self.spare,
            window: BUF,
        };
        (&mut self.connection, turn)
    }

    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        let mut data = data.to_vec();
        let slices = [VolatileSlice::from(data.as_mut_slice())];
        let (connection, mut turn) = self.turn();
        connection.on_packet(header, &slices, &mut turn);
    }

    fn host(&mut self, readable: bool, writable: bool, hung_up: bool) {
        let ready = Readiness {
            readable,
            writable,
            hung_up,
        };
        let (connection, mut turn) = self.turn();
        connection.on_host(ready, &mut turn);
    }

    fn stream(&mut self) -> &mut FakeStream {
        &mut self.connection.stream
    }

    /// The connection is gone for the guest, who was told so if `told`.
    fn assert_over(&mut self, told: bool) {
        assert!(self.connection.is_over_for_guest());
        assert_eq!(
            self.connection.take_rst().map(|h| h.op),
            told.then_some(Some(Op::Rst))
        );
        assert_eq!(self.connection.take_rst(), None);
        assert_eq!(self.connection.next(), Next::Nothing);
    }
}

const RCV: u32 = 1;
const SEND: u32 = 2;

#[test]
fn a_client_gets_its_answer_before_any_data() {
    let mut rig = Rig::connecting();
    assert_eq!(rig.connection.next(), Next::Nothing);
    assert!(rig.connection.deadline().is_some());
    rig.send(Op::Response, 0, b"");
    rig.send(Op::Rw, 0, b"hello");
    assert_eq!(rig.stream().output, b"OK 52\nhello");
    assert_eq!(rig.connection.deadline(), None);
    rig.stream().input.extend(b"abc");
    assert_eq!(rig.read(2), b"ab");
    assert_eq!(rig.read(2), b"c");
    assert_eq!(rig.read(2), b"");
    assert_eq!(rig.connection.next(), Next::Nothing);
}

#[test]
fn a_client_is_let_go_when_the_guest_refuses_or_is_silent() {
    let mut rig = Rig::connecting();
    rig.send(Op::Rst, 0, b"");
    assert!(rig.connection.is_closed());
    rig.assert_over(false);

    let mut rig = Rig::connecting();
    rig.connection.expire(
        rig.now + REQUEST_TIMEOUT - Duration::from_nanos(1),
        &rig.metrics,
    );
    assert!(!rig.connection.is_closed());
    rig.connection
        .expire(rig.now + REQUEST_TIMEOUT, &rig.metrics);
    assert!(rig.connection.is_closed());
    assert_eq!(rig.metrics.conns_killed.get(), 1);
    rig.assert_over(true);
}

#[test]
fn a_client_that_leaves_before_the_answer_ends_it() {
    let mut rig = Rig::connecting();
    rig.host(true, false, true);
    assert!(rig.connection.is_closed());
    rig.assert_over(true);
    let mut rig = Rig::connecting();
    rig.stream().broken = true;
    rig.send(Op::Response, 0, b"");
    assert!(rig.connection.is_closed());
    rig.assert_over(true);
}

#[test]
fn packets_out_of_place_end_it() {
    for op in [
        Op::Request,
        Op::Rw,
        Op::Shutdown,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        let mut rig = Rig::connecting();
        rig.send(op, 0, b"");
        assert!(rig.connection.is_closed(), "{op:?}");
        rig.assert_over(true);
    }
    for op in [Some(Op::Request), Some(Op::Response), None] {
        let mut rig = Rig::open();
        let header = rig.packet(op, 0, 0);
        rig.send_raw(&header, b"");
        assert!(rig.connection.is_closed(), "{op:?}");
        rig.assert_over(true);
    }
}

#[test]
fn the_guest_is_not_sent_more_than_it_has_room_for() {
    let mut rig = Rig::open();
    rig.stream().input.extend([1; 250]);
    rig.host(true, false, false);
    assert_eq!(rig.read(60).len(), 60);
    assert_eq!(rig.read(60).len(), 40);
    assert_eq!(rig.control(), Op::CreditRequest);
    assert_eq!(rig.connection.next(), Next::Nothing);
    // No news: it is not asked again.
    rig.send(Op::CreditUpdate, 0, b"");
    assert_eq!(rig.connection.next(), Next::Nothing);
    rig.fwd_cnt = 30;
    rig.send(Op::CreditUpdate, 0, b"");
    // News of the other direction says nothing about this one.
    rig.host(false, true, false);
    assert_eq!(rig.read(1000).len(), 30);
    assert_eq!(rig.control(), Op::CreditRequest);
    // A smaller buffer than what is in flight is no credit.
    (rig.buf_alloc, rig.fwd_cnt) = (10, 50);
    rig.send(Op::CreditUpdate, 0, b"");
    assert_eq!(rig.connection.next(), Next::Nothing);
    (rig.buf_alloc, rig.fwd_cnt) = (u32::MAX, 130);
    rig.send(Op::CreditUpdate, 0, b"");
    assert_eq!(rig.read(1000).len(), 120);
}

#[test]
fn a_lie_about_credit_ends_it() {
    let mut rig = Rig::open();
    rig.stream().input.extend([1; 10]);
    rig.host(true, false, false);
    rig.read(10);
    rig.fwd_cnt = 11;
    rig.send(Op::CreditUpdate, 0, b"");
    rig.assert_over(true);

    let mut rig = Rig::open();
    rig.stream().room = 0;
    rig.send(Op::Rw, 0, &[1; BUF as usize]);
    assert!(!rig.connection.is_over_for_guest());
    rig.send(Op::Rw, 0, &[1]);
    rig.assert_over(true);
}

#[test]
fn credit_is_given_back_late_but_in_time() {
    let mut rig = Rig::open();
    rig.send(Op::Rw, 0, &[1; 500]);
    assert_eq!(rig.connection.next(), Next::Nothing);
    rig.send(Op::Rw, 0, &[1; 1]);
    assert_eq!(rig.connection.next(), Next::Control);
    let update = rig.connection.control().unwrap();
    assert_eq!(update.op, Some(Op::CreditUpdate));
    assert_eq!((update.buf_alloc, update.fwd_cnt), (BUF, 501));
    // What the host does not read is not given back, until it does.
    rig.stream().room = 0;
    rig.send(Op::Rw, 0, &[2; 900]);
    assert_eq!(rig.connection.next(), Next::Nothing);
    assert!(rig.connection.wants_writable());
    rig.send(Op::CreditRequest, 0, b"");
    assert_eq!(rig.connection.control().unwrap().fwd_cnt, 501);
    rig.stream().room = 300;
    rig.host(false, true, false);
    let update = rig.connection.control().unwrap();
    assert_eq!((update.op, update.fwd_cnt), (Some(Op::CreditUpdate), 801));
    rig.stream().room = 10_000;
    rig.host(false, true, false);
    assert!(!rig.connection.wants_writable());
    assert_eq!(rig.stream().output.len(), 1401);
}

#[test]
fn data_carries_the_credit_update() {
    let mut rig = Rig::open();
    rig.send(Op::CreditRequest, 0, b"");
    rig.stream().input.extend(b"x");
    rig.host(true, false, false);
    assert_eq!(rig.read(5), b"x");
    rig.connection.data_header(1);
    assert_eq!(rig.read(5), b"");
    assert_eq!(rig.connection.next(), Next::Nothing);
}

#[test]
fn the_guest_sends_no_more_but_receives() {
    let mut rig = Rig::open();
    rig.stream().room = 3;
    rig.send(Op::Rw, 0, b"abcdef");
    rig.send(Op::Shutdown, SEND, b"");
    assert_eq!(rig.stream().shutdowns, []);
    rig.stream().room = 100;
    rig.host(false, true, false);
    assert_eq!(rig.stream().output, b"abcdef");
    assert_eq!(rig.stream().shutdowns, [Shutdown::Write]);
    rig.stream().input.extend(b"reply");
    rig.host(true, false, false);
    assert_eq!(rig.read(100), b"reply");
    // It said that it would not.
    rig.send(Op::Rw, 0, b"!");
    rig.assert_over(true);
}

#[test]
fn the_guest_receives_no_more_but_sends() {
    let mut rig = Rig::open();
    rig.send(Op::Shutdown, RCV, b"");
    assert_eq!(rig.stream().shutdowns, [Shutdown::Read]);
    rig.stream().input.extend(b"lost");
    rig.host(true, false, false);
    assert_eq!(rig.connection.next(), Next::Nothing);
    rig.send(Op::Rw, 0, b"kept");
    assert_eq!(rig.stream().output, b"kept");
    // The second half may come later.
    rig.send(Op::Shutdown, SEND, b"");
    assert!(rig.connection.is_closed());
    rig.assert_over(true);
}

#[test]
fn what_was_sent_before_the_end_reaches_a_slow_host() {
    for end in [Op::Shutdown, Op::Rst] {
        let mut rig = Rig::open();
        rig.stream().room = 2;
        rig.send(Op::Rw, 0, b"abcdef");
        rig.send(end, RCV | SEND, b"");
        rig.assert_over(end == Op::Shutdown);
        assert!(!rig.connection.is_closed());
        // What the guest sent before it saw the RST.
        rig.send(Op::Rw, 0, b"late");
        rig.stream().room = 2;
        rig.now += DRAIN_TIMEOUT / 2;
        rig.host(false, true, false);
        assert!(!rig.connection.is_closed());
        // Progress gives new time.
        rig.connection
            .expire(rig.now + DRAIN_TIMEOUT / 2, &rig.metrics);
        assert!(!rig.connection.is_closed());
        rig.stream().room = 100;
        rig.host(false, true, false);
        assert_eq!(rig.stream().output, b"abcdef");
        assert!(rig.connection.is_closed());
        rig.assert_over(false);
    }
}

#[test]
fn a_host_that_never_reads_the_rest_is_left() {
    let mut rig = Rig::open();
    rig.stream().room = 0;
    rig.send(Op::Rw, 0, b"abcdef");
    rig.send(Op::Shutdown, RCV | SEND, b"");
    rig.connection.expire(rig.now + DRAIN_TIMEOUT, &rig.metrics);
    assert!(rig.connection.is_closed());
    let mut rig = Rig::open();
    rig.stream().room = 0;
    rig.send(Op::Rw, 0, b"abcdef");
    rig.send(Op::Shutdown, RCV | SEND, b"");
    rig.host(true, false, true);
    assert!(rig.connection.is_closed());
}

#[test]
fn the_host_sends_no_more_but_receives() {
    let mut rig = Rig::open();
    rig.stream().input.extend(b"last");
    rig.stream().ended = true;
    rig.host(true, false, false);
    assert_eq!(rig.read(100), b"last");
    assert_eq!(rig.read(100), b"");
    assert_eq!(rig.connection.next(), Next::Control);
    let shutdown = rig.connection.control().unwrap();
    assert_eq!((shutdown.op, shutdown.flags), (Some(Op::Shutdown), SEND));
    assert_eq!(rig.connection.next(), Next::Nothing);
    assert_eq!(rig.connection.deadline(), None);
    rig.send(Op::Rw, 0, b"answer");
    assert_eq!(rig.stream().output, b"answer");
    rig.send(Op::Shutdown, RCV | SEND, b"");
    assert!(rig.connection.is_closed());
    rig.assert_over(true);
}

#[test]
fn the_host_leaves() {
    let mut rig = Rig::open();
    rig.stream().input.extend([1; 120]);
    rig.stream().ended = true;
    rig.host(true, false, true);
    // What it sent comes first, as far as the guest has room.
    assert_eq!(rig.read(200).len(), 100);
    assert_eq!(rig.control(), Op::CreditRequest);
    assert_eq!(rig.connection.control().unwrap().flags, RCV);
    assert_eq!(rig.connection.deadline(), None);
    // Nobody reads this, but it does not block the guest.
    rig.send(Op::Rw, 0, &[1; 700]);
    assert_eq!(rig.control(), Op::CreditUpdate);
    rig.fwd_cnt = 100;
    rig.send(Op::Rw, 0, &[1; 700]);
    assert_eq!(rig.read(200).len(), 20);
    assert_eq!(rig.read(200).len(), 0);
    let shutdown = rig.connection.control().unwrap();
    assert_eq!(
        (shutdown.op, shutdown.flags),
        (Some(Op::Shutdown), RCV | SEND)
    );
    assert_eq!(rig.connection.deadline(), Some(rig.now + SHUTDOWN_TIMEOUT));
    rig.connection
        .expire(rig.now + SHUTDOWN_TIMEOUT, &rig.metrics);
    assert!(rig.connection.is_closed());
    rig.assert_over(true);
}

#[test]
fn the_host_leaves_a_guest_that_does_not_receive() {
    let mut rig = Rig::open();
    rig.send(Op::Shutdown, RCV, b"");
    rig.host(true, false, true);
    assert_eq!(rig.connection.control().unwrap().flags, RCV | SEND);
    assert!(rig.connection.deadline().is_some());
    rig.send(Op::Rst, 0, b"");
    assert!(rig.connection.is_closed());
    rig.assert_over(false);
}

#[test]
fn a_broken_host_is_told_to_the_guest() {
    let mut rig = Rig::open();
    rig.stream().broken = true;
    rig.send(Op::Rw, 0, b"x");
    assert_eq!(rig.metrics.tx_write_fails.get(), 1);
    assert_eq!(rig.connection.control().unwrap().flags, RCV);
    rig.host(true, false, false);
    assert_eq!(rig.read(10), b"");
    assert_eq!(rig.metrics.rx_read_fails.get(), 1);
    assert_eq!(rig.connection.control().unwrap().flags, RCV | SEND);
    assert!(rig.connection.deadline().is_some());
}

#[test]
fn a_flush_that_fails_drops_the_rest() {
    let mut rig = Rig::open();
    rig.stream().room = 0;
    rig.send(Op::Rw, 0, &[1; 900]);
    rig.stream().broken = true;
    rig.host(false, true, false);
    assert!(!rig.connection.wants_writable());
    assert_eq!(rig.metrics.tx_flush_fails.get(), 1);
    let shutdown = rig.connection.control().unwrap();
    // All credit is back.
    assert_eq!((shutdown.flags, shutdown.fwd_cnt), (RCV, 900));
}

#[test]
fn scattered_data_is_cut_anywhere() {
    for room in 0..=9 {
        let mut rig = Rig::open();
        rig.stream().room = room;
        let mut parts = [b"ab".to_vec(), b"c".to_vec(), b"defghi".to_vec()];
        let slices: Vec<_> = parts
            .iter_mut()
            .map(|part| VolatileSlice::from(part.as_mut_slice()))
            .collect();
        let header = rig.packet(Some(Op::Rw), 0, 9);
        let (connection, mut turn) = rig.turn();
        connection.on_packet(&header, &slices, &mut turn);
        assert_eq!(rig.connection.wants_writable(), room < 9);
        rig.stream().room = 100;
        rig.host(false, true, false);
        assert_eq!(rig.stream().output, b"abcdefghi");
    }
}
