//! Programs of the guest and of the host that talk over vsock, beside packets that make no sense. The model is a list of
//! connections with four counters each: what one side has sent, and what the other has got.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use arbitrary::{Arbitrary, Unstructured};
use lepton_devices::virtio::device::{Progress, VirtioDevice};
use lepton_devices::virtio::testing::{Buffer, TestDriver};
use lepton_devices::virtio::vsock::packet::{Header, Op, ShutdownFlags, TYPE_STREAM};
use lepton_devices::virtio::vsock::{HOST_CID, Vsock};
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::host::{GUEST_CID, SERVER_PORT, Sockets, vsock};

const RX: usize = 0;
const TX: usize = 1;
const RX_BUFFERS: usize = 64;
const RX_DATA: usize = 4096;
const TX_DATA: usize = 64 << 10;
const HEADER: usize = 44;
/// Where a program of the guest listens.
const LISTENING_PORT: u32 = 9;
const MAX_CONNECTIONS: usize = 4;
const MAX_STEPS: usize = 200;
/// Below the device's own deadlines. A run that a busy machine made longer says less.
const PROMPT: Duration = Duration::from_secs(1);

#[derive(Arbitrary, Debug)]
enum Step {
    GuestOpens {
        port: u8,
        buf_alloc: u32,
    },
    HostOpens {
        buf_alloc: u32,
    },
    GuestSends(u8, u16),
    GuestReads(u8, u16, bool),
    GuestShuts(u8, bool, bool),
    GuestResets(u8),
    HostSends(u8, u16),
    HostReads(u8, u16),
    HostShuts(u8),
    HostCloses(u8),
    Offer(u8),
    /// A packet for a connection, or for none, with all fields as they come.
    Nonsense {
        which: Option<u8>,
        op: u8,
        kind: u16,
        len: u16,
        data: u16,
        flags: u32,
        buf_alloc: u32,
        fwd_cnt: u32,
        ports: (u8, u8),
    },
}

/// The byte at `position` of a stream: loss, a wrong order or a mix-up shows.
fn bytes(stream: u32, from: usize, len: usize) -> Vec<u8> {
    let byte = |at: usize| (at.wrapping_mul(31) ^ (at >> 8) ^ (stream as usize * 97)) as u8;
    (from..from + len).map(byte).collect()
}

struct Connection {
    number: u32,
    guest_port: u32,
    host_port: u32,
    host: Option<UnixStream>,
    buf_alloc: u32,
    /// Received and not yet read by the guest's program.
    held: usize,
    read: usize,
    /// What the device knows of `read`.
    told: usize,
    guest_sent: usize,
    guest_got: usize,
    host_sent: usize,
    host_got: usize,
    device_room: usize,
    device_taken: usize,
    guest_shut: ShutdownFlags,
    host_shut: bool,
    is_over: bool,
}

impl Connection {
    fn header(&mut self, op: Op, len: usize) -> Header {
        self.told = self.read;
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            len: len as u32,
            kind: TYPE_STREAM,
            op: Some(op),
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.read as u32,
        }
    }

    /// Whether nobody gave up anything.
    fn is_open(&self) -> bool {
        !self.is_over
            && self.host.is_some()
            && !self.host_shut
            && self.guest_shut == ShutdownFlags::default()
    }

    fn take(&mut self, header: &Header, data: &[u8], is_prompt: bool) -> Option<Header> {
        assert!(!self.is_over, "{header:?} for a connection that is over");
        let op = header.op.expect("an operation");
        if op == Op::Rst {
            self.is_over = true;
            let given_up = self.guest_shut != ShutdownFlags::default() || self.host.is_none();
            assert!(given_up || !is_prompt, "a connection in use was reset");
            return None;
        }
        let taken = header.fwd_cnt as usize;
        assert!(self.device_taken <= taken && taken <= self.guest_sent);
        self.device_taken = taken;
        self.device_room = header.buf_alloc as usize;
        match op {
            Op::Rw => {
                assert!(!data.is_empty() && !self.guest_shut.receive);
                assert!(self.guest_got + data.len() <= self.host_sent);
                let wanted = bytes(2 * self.number, self.guest_got, data.len());
                assert!(data == wanted, "other bytes than the host sent");
                self.guest_got += data.len();
                self.held += data.len();
                let in_flight = self.guest_got - self.told;
                assert!(
                    in_flight <= self.buf_alloc as usize,
                    "more than the guest's credit"
                );
            }
            Op::Shutdown => assert!(self.host_shut || self.host.is_none()),
            Op::CreditRequest => return Some(self.header(Op::CreditUpdate, 0)),
            Op::CreditUpdate => {}
            Op::Request | Op::Response | Op::Rst => panic!("{header:?}"),
        }
        None
    }
}

struct Talk {
    device: Vsock,
    driver: TestDriver,
    sockets: Sockets,
    free_rx: Vec<[Buffer; 2]>,
    used_rx: HashMap<u16, [Buffer; 2]>,
    tx: GuestAddress,
    inbox: VecDeque<(Header, Vec<u8>)>,
    all: Vec<Connection>,
    made: u32,
    started: Instant,
}

impl Talk {
    fn new() -> Self {
        let (mut device, sockets) = vsock();
        let mut driver = TestDriver::new(&[256; 3]);
        let free_rx = (0..RX_BUFFERS)
            .map(|_| [driver.writable(HEADER), driver.writable(RX_DATA)])
            .collect();
        let tx = driver.alloc(HEADER + TX_DATA);
        let activated = device.activate(driver.resources(1 << 32));
        activated.expect("a good driver");
        Talk {
            device,
            driver,
            sockets,
            free_rx,
            used_rx: HashMap::new(),
            tx,
            inbox: VecDeque::new(),
            all: Vec::new(),
            made: 0,
            started: Instant::now(),
        }
    }

    fn offer(&mut self, count: usize) {
        for _ in 0..count.min(self.free_rx.len()) {
            if let Some(buffers) = self.free_rx.pop() {
                let head = self.driver.queues[RX].offer(&buffers);
                self.used_rx.insert(head, buffers);
            }
        }
    }

    /// Lets the device work until it has nothing more to do, and takes what it sent.
    fn run(&mut self) {
        for turn in 0.. {
            assert!(turn < 1000, "the device works for ever");
            let mut more = false;
            let device = &mut self.device;
            for result in [
                device.process_source(0),
                device.process_queue(TX),
                device.process_queue(RX),
            ] {
                more |= result.expect("well-formed rings") == Progress::Again;
            }
            self.collect();
            if !more {
                return;
            }
        }
    }

    fn collect(&mut self) {
        drop(self.driver.queues[TX].used());
        for (head, written) in self.driver.queues[RX].used() {
            let buffers = self.used_rx.remove(&head).expect("an offered buffer");
            let mut bytes: Vec<u8> = buffers.iter().flat_map(|b| self.driver.bytes(*b)).collect();
            bytes.truncate(written as usize);
            let (header, data) = bytes.split_first_chunk::<HEADER>().expect("a whole header");
            let header = Header::parse(header);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
            assert_eq!(header.len as usize, data.len());
            self.inbox.push_back((header, data.to_vec()));
            self.free_rx.push(buffers);
        }
    }

    /// Hands what came to the connections it is for.
    fn settle(&mut self) {
        let is_prompt = self.started.elapsed() < PROMPT;
        loop {
            self.run();
            let mut answers = Vec::new();
            while let Some((header, data)) = self.inbox.pop_front() {
                let key = (header.dst_port, header.src_port);
                let is_its = |c: &&mut Connection| (c.guest_port, c.host_port) == key;
                // Nonsense has answers, too; there is no connection for them here.
                if let Some(connection) = self.all.iter_mut().find(is_its) {
                    answers.extend(connection.take(&header, &data, is_prompt));
                }
            }
            self.all.retain(|connection| !connection.is_over);
            if answers.is_empty() {
                return;
            }
            answers.iter().for_each(|answer| self.send(answer, &[]));
        }
    }

    /// Puts a packet in the queue and lets the device take it.
    fn send(&mut self, header: &Header, data: &[u8]) {
        let memory = self.driver.memory.clone();
        memory
            .write_slice(&header.to_bytes(), self.tx)
            .expect("a buffer");
        let at = GuestAddress(self.tx.0 + HEADER as u64);
        memory.write_slice(data, at).expect("a buffer");
        let part = |addr, len: usize| Buffer {
            addr,
            len: len as u32,
            writable: false,
        };
        let mut chain = vec![part(self.tx, HEADER)];
        if !data.is_empty() {
            chain.push(part(at, data.len()));
        }
        self.driver.queues[TX].offer(&chain);
        // While the guest takes no answers its packets wait, and there is one buffer for them.
        for _ in 0..100 {
            self.run();
            if self.driver.queues[TX].free_descriptors() == 256 {
                return;
            }
            self.offer(RX_BUFFERS);
        }
        panic!("the device does not take packets any more");
    }

    fn insert(&mut self, key: (u32, u32), host: UnixStream, buf_alloc: u32, first: &Header) {
        self.made += 1;
        self.all.push(Connection {
            number: self.made,
            guest_port: key.0,
            host_port: key.1,
            host: Some(host),
            buf_alloc,
            held: 0,
            read: 0,
            told: 0,
            guest_sent: 0,
            guest_got: 0,
            host_sent: 0,
            host_got: 0,
            device_room: first.buf_alloc as usize,
            device_taken: 0,
            guest_shut: ShutdownFlags::default(),
            host_shut: false,
            is_over: false,
        });
    }

    /// Everything that was under way has arrived, and there is room for what comes.
    fn clear(&mut self) {
        for _ in 0..100 {
            self.offer(RX_BUFFERS);
            self.settle();
            if self.free_rx.is_empty() || self.used_rx.len() >= 8 {
                break;
            }
        }
        self.offer(RX_BUFFERS);
    }

    /// The packet with this operation for this port of the guest, if it came; the others go where they belong.
    fn expect(&mut self, op: Op, guest_port: u32) -> Option<Header> {
        self.run();
        let at = self.inbox.iter().position(|(header, _)| {
            let key = (header.dst_port, header.src_port);
            let known = |c: &Connection| (c.guest_port, c.host_port) == key;
            header.op == Some(op) && header.dst_port == guest_port && !self.all.iter().any(known)
        });
        let found = at.and_then(|at| self.inbox.remove(at));
        found.map(|(header, _)| header)
    }

    fn guest_opens(&mut self, port: u32, buf_alloc: u32) {
        if self
            .all
            .iter()
            .any(|c| (c.guest_port, c.host_port) == (port, SERVER_PORT))
        {
            return;
        }
        self.clear();
        let request = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: port,
            dst_port: SERVER_PORT,
            len: 0,
            kind: TYPE_STREAM,
            op: Some(Op::Request),
            flags: 0,
            buf_alloc,
            fwd_cnt: 0,
        };
        self.send(&request, &[]);
        let Some(response) = self.expect(Op::Response, port) else {
            // Nonsense has made a connection of these ports; now it is reset.
            return self.settle();
        };
        let (host, _) = self.sockets.server.accept().expect("a connection");
        host.set_nonblocking(true).expect("a flag");
        self.insert((port, SERVER_PORT), host, buf_alloc, &response);
        self.settle();
    }

    fn host_opens(&mut self, buf_alloc: u32) {
        self.clear();
        let mut host = UnixStream::connect(&self.sockets.path).expect("a connection");
        host.set_nonblocking(true).expect("a flag");
        writeln!(host, "CONNECT {LISTENING_PORT}").expect("a short line");
        let request = self.expect(Op::Request, LISTENING_PORT).expect("a REQUEST");
        let key = (LISTENING_PORT, request.src_port);
        self.insert(key, host, buf_alloc, &request);
        if let Some(connection) = self.all.last_mut() {
            let response = connection.header(Op::Response, 0);
            self.send(&response, &[]);
        }
        let Some(Connection {
            host: Some(host), ..
        }) = self.all.last_mut()
        else {
            return self.settle();
        };
        let wanted = format!("OK {}\n", request.src_port);
        let mut answer = vec![0; wanted.len()];
        let is_answered = host.read_exact(&mut answer).is_ok() && answer == wanted.as_bytes();
        assert!(
            is_answered || self.started.elapsed() >= PROMPT,
            "{wanted:?} did not come"
        );
        self.settle();
    }

    fn nonsense(&mut self, header: &Header, data: usize) {
        // What it is for is not believed any more.
        let key = header.key();
        self.all
            .retain(|c| (c.guest_port, c.host_port) != (key.guest_port, key.host_port));
        let mut header = *header;
        header.len = header.len.min(TX_DATA as u32);
        self.send(&header, &vec![7; data.min(TX_DATA)]);
        // It may even have been understood.
        while self.sockets.server.accept().is_ok() {}
        self.settle();
    }

    fn step(&mut self, step: &Step) {
        let count = self.all.len().max(1);
        let chosen = |which: u8| usize::from(which) % count;
        match *step {
            Step::GuestOpens { port, buf_alloc } if self.all.len() < MAX_CONNECTIONS => {
                self.guest_opens(1000 + u32::from(port % 8), credit(buf_alloc));
            }
            Step::HostOpens { buf_alloc } if self.all.len() < MAX_CONNECTIONS => {
                self.host_opens(credit(buf_alloc));
            }
            Step::GuestOpens { .. } | Step::HostOpens { .. } => {}
            Step::Offer(count) => self.offer(count.into()),
            Step::Nonsense {
                which,
                op,
                kind,
                len,
                data,
                flags,
                buf_alloc,
                fwd_cnt,
                ports,
            } => {
                let known = which.and_then(|which| self.all.get(chosen(which)));
                let (guest, host) = known.map_or(
                    (1000 + u32::from(ports.0), 50 + u32::from(ports.1 % 4)),
                    |c| (c.guest_port, c.host_port),
                );
                let mut bytes = [0; HEADER];
                bytes[30] = op % 9;
                let parsed = Header::parse(&bytes);
                let header = Header {
                    src_cid: GUEST_CID,
                    dst_cid: HOST_CID,
                    src_port: guest,
                    dst_port: host,
                    len: len.into(),
                    kind: if kind % 4 == 0 { kind } else { TYPE_STREAM },
                    op: parsed.op,
                    flags,
                    buf_alloc,
                    fwd_cnt,
                };
                self.nonsense(&header, data.into());
            }
            Step::GuestSends(which, _)
            | Step::GuestReads(which, _, _)
            | Step::GuestShuts(which, _, _)
            | Step::GuestResets(which)
            | Step::HostSends(which, _)
            | Step::HostReads(which, _)
            | Step::HostShuts(which)
            | Step::HostCloses(which) => {
                if let Some(connection) = self.all.get_mut(chosen(which))
                    && let Some((header, data)) = on(connection, step)
                {
                    self.send(&header, &data);
                }
            }
        }
        self.settle();
    }

    /// What was sent on connections that are still open arrives.
    fn finish(&mut self) {
        for round in 0.. {
            self.offer(RX_BUFFERS);
            self.settle();
            let all = 0..self.all.len();
            for at in all {
                for step in [
                    Step::GuestReads(0, u16::MAX, true),
                    Step::HostReads(0, u16::MAX),
                ] {
                    let Some(connection) = self.all.get_mut(at) else {
                        continue;
                    };
                    if let Some((header, data)) = on(connection, &step) {
                        self.send(&header, &data);
                    }
                }
            }
            let arrived = |c: &Connection| {
                !c.is_open() || (c.guest_got == c.host_sent && c.host_got == c.guest_sent)
            };
            if self.all.iter().all(arrived) {
                return;
            }
            assert!(round < 5000, "bytes do not arrive");
        }
    }
}

/// Buffers of a few bytes and of half a megabyte.
fn credit(raw: u32) -> u32 {
    500 + raw % (1 << (9 + raw % 10))
}

/// A step on one connection; what the guest sends for it.
fn on(connection: &mut Connection, step: &Step) -> Option<(Header, Vec<u8>)> {
    match *step {
        Step::GuestSends(_, len) => {
            let in_flight = connection.guest_sent - connection.device_taken;
            let credit = connection.device_room.saturating_sub(in_flight);
            let len = usize::from(len).min(credit);
            if len == 0 || connection.guest_shut.send {
                return None;
            }
            let data = bytes(2 * connection.number + 1, connection.guest_sent, len);
            connection.guest_sent += len;
            Some((connection.header(Op::Rw, len), data))
        }
        Step::GuestReads(_, len, is_told) => {
            let len = usize::from(len).min(connection.held);
            connection.held -= len;
            connection.read += len;
            is_told.then(|| (connection.header(Op::CreditUpdate, 0), Vec::new()))
        }
        Step::GuestShuts(_, receive, send) => {
            let flags = connection.guest_shut.or(ShutdownFlags { receive, send });
            connection.guest_shut = flags;
            let header = Header {
                flags: flags.bits(),
                ..connection.header(Op::Shutdown, 0)
            };
            Some((header, Vec::new()))
        }
        Step::GuestResets(_) => {
            let header = connection.header(Op::Rst, 0);
            connection.is_over = true;
            Some((header, Vec::new()))
        }
        _ => {
            host(connection, step);
            None
        }
    }
}

fn host(connection: &mut Connection, step: &Step) {
    let number = connection.number;
    let Some(host) = &mut connection.host else {
        return;
    };
    match *step {
        Step::HostSends(_, len) if !connection.host_shut => {
            let data = bytes(2 * number, connection.host_sent, len.into());
            // A full socket, or one whose other side is gone, takes nothing.
            connection.host_sent += host.write(&data).unwrap_or(0);
        }
        Step::HostReads(_, len) => {
            let mut buffer = vec![0; len.into()];
            let len = host.read(&mut buffer).unwrap_or(0);
            let wanted = bytes(2 * number + 1, connection.host_got, len);
            assert!(buffer[..len] == wanted, "other bytes than the guest sent");
            connection.host_got += len;
        }
        Step::HostShuts(_) => {
            // It may be gone.
            let _ = host.shutdown(Shutdown::Write);
            connection.host_shut = true;
        }
        Step::HostCloses(_) => connection.host = None,
        _ => {}
    }
}

/// Steps of both sides.
pub fn vsock_model(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut talk = Talk::new();
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut input) else {
            break;
        };
        talk.step(&step);
    }
    talk.finish();
}
