//! Streams to and from the host.
//!
//! The byte at place `n` of each stream is `n + (n >> 8)`, if data is made and checked.

use guest::memory::Region;
use guest::statistics::Times;
use guest::time::{Deadline, pause, ticks, ticks_per_second};
use guest::virtio::vsock::{HOST, Header, STREAM, Vsock, operation};
use guest::{arguments, say};

use crate::report::{Bound, Run, refuse};

const MAX_CONNECTIONS: usize = 64;
/// Our room for what comes, for each connection.
const ROOM: u32 = 256 << 10;
const FIRST_PORT: u32 = 10_000;

fn byte(place: u64) -> u8 {
    place.wrapping_add(place >> 8) as u8
}

#[derive(Clone, Copy, Default)]
struct Connection {
    port: u32,
    peer_port: u32,
    open: bool,
    /// The peer sends no more.
    ended: bool,
    peer_room: u32,
    peer_taken: u32,
    sent: u64,
    received: u64,
    /// What the peer knows of `received`.
    told: u64,
}

impl Connection {
    /// Bytes that the peer has room for.
    fn credit(&self) -> u32 {
        let under_way = (self.sent as u32).wrapping_sub(self.peer_taken);
        self.peer_room.saturating_sub(under_way)
    }
}

struct Streams {
    vsock: Vsock,
    connections: [Connection; MAX_CONNECTIONS],
    count: usize,
    verify: bool,
    echo: bool,
    confirm: bool,
    errors: u64,
    bytes: u64,
    times: Times,
    since: [u64; 128],
    last: u64,
}

impl Streams {
    fn header(&self, index: usize, operation: u16, len: u32) -> Header {
        let connection = &self.connections[index];
        Header {
            src_cid: self.vsock.cid(),
            dst_cid: HOST,
            src_port: connection.port,
            dst_port: connection.peer_port,
            len,
            kind: STREAM,
            operation,
            flags: 0,
            buf_alloc: ROOM,
            fwd_cnt: connection.received as u32,
        }
    }

    fn control(&mut self, index: usize, operation: u16, flags: u32) {
        let place = loop {
            if let Some((place, _)) = self.vsock.place() {
                break place;
            }
            self.vsock.sent();
        };
        let header = Header {
            flags,
            ..self.header(index, operation, 0)
        };
        self.vsock.offer(place, &header);
        self.vsock.publish();
        self.connections[index].told = self.connections[index].received;
    }

    /// Sends up to `size` bytes on a connection, as many as it has credit for. False: none.
    fn send(&mut self, index: usize, size: u64) -> bool {
        let len = u64::from(self.connections[index].credit()).min(size);
        if len == 0 || !self.connections[index].open {
            return false;
        }
        let Some((place, data)) = self.vsock.place() else {
            return false;
        };
        let from = self.connections[index].sent;
        if self.verify {
            for at in 0..len {
                data.put(at, byte(from + at));
            }
        }
        self.vsock
            .offer(place, &self.header(index, operation::RW, len as u32));
        self.since[usize::from(place)] = ticks();
        let connection = &mut self.connections[index];
        connection.sent += len;
        connection.told = connection.received;
        true
    }

    /// Handles what came; true if something did.
    fn receive(&mut self) -> bool {
        let mut came = None;
        let (verify, count) = (self.verify, self.count);
        let connections = &mut self.connections;
        let (mut errors, mut bytes) = (0, 0);
        let mut back: Option<(usize, [u8; 4096], u64)> = None;
        let back_it_goes = self.echo || self.confirm;
        let some = self.vsock.receive(|_, header, data| {
            let found = connections[..count].iter().position(|connection| {
                let waits = connection.peer_port == 0 && header.operation == operation::REQUEST;
                connection.port == header.dst_port
                    && (connection.peer_port == header.src_port || waits)
            });
            let Some(index) = found else {
                errors += 1;
                return;
            };
            let connection = &mut connections[index];
            connection.peer_room = header.buf_alloc;
            connection.peer_taken = header.fwd_cnt;
            match header.operation {
                operation::REQUEST => {
                    connection.peer_port = header.src_port;
                    connection.open = true;
                }
                operation::RESPONSE => connection.open = true,
                operation::RST => {
                    connection.ended = true;
                    connection.open = false;
                }
                operation::SHUTDOWN => connection.ended |= header.flags & 2 != 0,
                operation::RW => {
                    if verify {
                        errors += differences(data, connection.received);
                    }
                    connection.received += data.len();
                    bytes += data.len();
                    if back_it_goes {
                        let mut copy = [0; 4096];
                        let len = data.len().min(4096);
                        data.copy_to(0, &mut copy[..len as usize]);
                        back = Some((index, copy, len));
                    }
                }
                _ => {}
            }
            came = Some((index, header.operation));
        });
        self.errors += errors;
        self.bytes += bytes;
        if let Some((index, what)) = came {
            match what {
                operation::REQUEST => self.control(index, operation::RESPONSE, 0),
                operation::CREDIT_REQUEST => self.control(index, operation::CREDIT_UPDATE, 0),
                operation::RW => {
                    let now = ticks();
                    self.times.add(now - self.last);
                    self.last = now;
                }
                _ => {}
            }
            let connection = &self.connections[index];
            if connection.received - connection.told > u64::from(ROOM / 2) {
                self.control(index, operation::CREDIT_UPDATE, 0);
            }
        }
        if let Some((index, copy, len)) = back {
            let came = &copy[..len as usize];
            match self.confirm {
                true => self.confirm(index, came),
                false => self.send_back(index, came),
            }
        }
        some
    }

    /// Answers a message of who it is, which is text.
    fn confirm(&mut self, index: usize, message: &[u8]) {
        say!("{}", core::str::from_utf8(message).unwrap_or("not text"));
        match message.ends_with(b"\nend\n") {
            true => self.send_back(index, b"ok\n"),
            false => self.send_back(index, b"failed it is cut\n"),
        }
    }

    fn send_back(&mut self, index: usize, bytes: &[u8]) {
        let Some((place, data)) = self.vsock.place() else {
            self.errors += 1;
            return;
        };
        data.copy_from(0, bytes);
        self.vsock.offer(
            place,
            &self.header(index, operation::RW, bytes.len() as u32),
        );
        self.vsock.publish();
        let connection = &mut self.connections[index];
        connection.sent += bytes.len() as u64;
        connection.told = connection.received;
    }

    /// Handles all that came.
    fn receive_all(&mut self) {
        let mut some = false;
        while self.receive() {
            some = true;
        }
        if some {
            self.vsock.give_back();
        }
    }

    /// Waits until `done` says so.
    fn wait(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let patience = Deadline::after(ticks_per_second().saturating_mul(20));
        while !done(self) {
            self.receive_all();
            while self.vsock.sent().is_some() {}
            if patience.is_over() {
                refuse(what);
            }
            pause();
        }
    }

    fn connections(&self) -> &[Connection] {
        &self.connections[..self.count]
    }
}

fn differences(data: Region, from: u64) -> u64 {
    let wrong = (0..data.len()).filter(|&at| data.get::<u8>(at) != byte(from + at));
    wrong.count() as u64
}

pub fn run(mode: &str) {
    let size = arguments::number("size", 4096);
    let count = arguments::number("connections", 1) as usize;
    if size == 0 || size > 64 << 10 || count == 0 || count > MAX_CONNECTIONS {
        refuse("size or connections is out of range");
    }
    let Some(vsock) = Vsock::start(size.max(4096)) else {
        refuse("there is no vsock");
    };
    let mut streams = Streams {
        vsock,
        connections: [Connection::default(); MAX_CONNECTIONS],
        count,
        verify: arguments::number("verify", 0) == 1,
        echo: mode == "vsock_echo",
        confirm: mode == "vsock_confirm",
        errors: 0,
        bytes: 0,
        times: Times::new(),
        since: [0; 128],
        last: 0,
    };
    open(&mut streams, mode);
    match mode {
        "vsock_tx" => transmit(&mut streams, mode, size),
        _ => receive(&mut streams, mode),
    }
}

/// Connects to the host's `port`, or with `listen=1` waits for the host to connect to ours, as often as asked.
fn open(streams: &mut Streams, mode: &str) {
    let port = arguments::number("port", 5000) as u32;
    let listen = arguments::number("listen", 0) == 1;
    for index in 0..streams.count {
        let connection = &mut streams.connections[index];
        if listen {
            connection.port = port;
        } else {
            connection.port = FIRST_PORT + index as u32;
            connection.peer_port = port;
            streams.control(index, operation::REQUEST, 0);
        }
    }
    if listen {
        say!("PROBE {{\"mode\":\"{mode}\",\"ready\":1}}");
    }
    streams.wait("the host does not connect", |streams| {
        streams
            .connections()
            .iter()
            .all(|connection| connection.open)
    });
}

fn transmit(streams: &mut Streams, mode: &str, size: u64) {
    let bound = Bound::from_arguments(1000);
    let (mut sent, mut done, mut next) = (0, 0, 0);
    let start = ticks();
    let mut last = start;
    streams.last = start;
    while done < sent || bound.allows(sent) {
        // A turn for each, until there is no room or nobody has credit.
        let mut tried = 0;
        while bound.allows(sent) && tried < streams.count {
            if streams.send(next, size) {
                sent += 1;
                tried = 0;
            } else {
                tried += 1;
            }
            next = (next + 1) % streams.count;
        }
        streams.vsock.publish();
        let now = ticks();
        while let Some(place) = streams.vsock.sent() {
            let since = core::mem::take(&mut streams.since[usize::from(place)]);
            if since != 0 {
                streams.times.add(now - since);
                last = now;
                done += 1;
            }
        }
        streams.receive_all();
        if streams
            .connections()
            .iter()
            .any(|connection| connection.ended)
        {
            refuse("the host ended a connection");
        }
        pause();
    }
    for index in 0..streams.count {
        streams.control(index, operation::SHUTDOWN, 3);
    }
    // The host's answer to that comes when it has taken all.
    streams.wait("the host does not take what it was sent", |streams| {
        streams
            .connections()
            .iter()
            .all(|connection| connection.ended)
    });
    let bytes = streams
        .connections()
        .iter()
        .map(|connection| connection.sent)
        .sum();
    let run = Run {
        mode,
        ticks: last - start,
        bytes,
        errors: streams.errors,
        times: &streams.times,
    };
    run.tell(format_args!(
        ",\"size\":{size},\"connections\":{}",
        streams.count
    ));
}

fn receive(streams: &mut Streams, mode: &str) {
    let start = ticks();
    streams.last = start;
    let bound = Bound::from_arguments(u64::MAX);
    while bound.allows(streams.times.count())
        && !streams
            .connections()
            .iter()
            .all(|connection| connection.ended)
    {
        streams.receive_all();
        while streams.vsock.sent().is_some() {}
        pause();
    }
    let run = Run {
        mode,
        ticks: streams.last - start,
        bytes: streams.bytes,
        errors: streams.errors,
        times: &streams.times,
    };
    run.tell(format_args!(",\"connections\":{}", streams.count));
}
