//! A network interface: frames out, frames in, and frames back.
//!
//! A UDP payload begins with a 64-bit number: the sender's count, or [`END`] to end a run before its time.

use guest::memory::Region;
use guest::statistics::Times;
use guest::time::{Deadline, pause, ticks, ticks_per_second};
use guest::virtio::net::{
    Address, CSUM, Frame, HEADER, HOST_TSO4, MAX_FRAME, MAX_PLAIN_FRAME, Net, TCP_PAYLOAD,
    UDP_PAYLOAD, write_tcp, write_udp,
};
use guest::{arguments, say};

use crate::report::{Bound, Run, refuse};

const END: u64 = u64::MAX;

pub fn run(mode: &str) {
    let size = arguments::number("size", 1514);
    if !(UDP_PAYLOAD + 8..=MAX_FRAME).contains(&size) {
        refuse("size is not one of a frame");
    }
    let depth = arguments::number("qd", 128);
    let index = arguments::number("interface", 0) as usize;
    let room = size.max(MAX_PLAIN_FRAME);
    let Some(mut net) = Net::start(index, depth, room) else {
        refuse("there is no such interface");
    };
    match mode {
        "net_tx" => transmit(&mut net, mode, size),
        "net_rx" => receive(&mut net, mode),
        _ => echo(&mut net, mode),
    }
}

/// Answers ARP requests; what else came is handed to `each`.
fn next_frame(net: &mut Net, each: impl FnOnce(&mut Net, Frame, Region, u64)) -> bool {
    net.receive(|net, frame, len| match net.parse(frame) {
        Frame::ArpRequest(from) => net.send_arp(&from, true),
        what => each(net, what, frame, len),
    })
}

/// Whom to send to: the neighbour named by `peer`, found by ARP unless `peer_mac` is given.
fn find_peer(net: &mut Net) -> Address {
    let mut peer = Address {
        mac: [0xff; 6],
        ip: Address::ip_argument("peer", [172, 30, 1, 1]),
        port: arguments::number("peer_port", 5001) as u16,
    };
    if let Some(mac) = Address::mac_argument("peer_mac") {
        peer.mac = mac;
        return peer;
    }
    let mut found = None;
    for _ in 0..50 {
        net.send_arp(&peer, false);
        let wait = Deadline::after(ticks_per_second() / 10);
        while found.is_none() && !wait.is_over() {
            next_frame(net, |_, what, _, _| {
                if let Frame::ArpReply(from) = what
                    && from.ip == peer.ip
                {
                    found = Some(from.mac);
                }
            });
            net.give_back();
            while net.sent().is_some() {}
            pause();
        }
        if let Some(mac) = found {
            while net.under_way() > 0 {
                net.sent();
            }
            peer.mac = mac;
            return peer;
        }
    }
    refuse("the peer does not answer ARP")
}

fn transmit(net: &mut Net, mode: &str, size: u64) {
    let segmented = size > MAX_PLAIN_FRAME;
    if segmented && net.features() & (HOST_TSO4 | CSUM) != HOST_TSO4 | CSUM {
        refuse("the interface does not cut segments");
    }
    let peer = find_peer(net);
    let from = net.address;
    // All that stays the same is written once.
    let mut places = [0; 256];
    let mut count = 0;
    while let Some((place, buffer)) = net.place() {
        let buffer = buffer.part(0, HEADER + size);
        match segmented {
            true => write_tcp(buffer, &from, &peer),
            false => write_udp(buffer, &from, &peer),
        }
        places[count] = place;
        count += 1;
    }
    let payload = HEADER + if segmented { TCP_PAYLOAD } else { UDP_PAYLOAD };
    let mut times = Times::new();
    let mut since = [0; 256];
    let bound = Bound::from_arguments(1000);
    let mut sent = 0_u64;
    let start = ticks();
    let mut last = start;
    let mut under_way = 0;
    let send = |net: &mut Net, place: u16, number: u64| {
        if let Some(buffer) = net.buffer(place) {
            buffer.put(payload, number);
        }
        net.offer(place, HEADER + size);
    };
    for &place in &places[..count] {
        if bound.allows(sent) {
            since[usize::from(place)] = start;
            send(net, place, sent);
            sent += 1;
            under_way += 1;
        }
    }
    net.publish();
    while under_way > 0 {
        let now = ticks();
        while let Some(place) = net.sent() {
            times.add(now - since[usize::from(place)]);
            last = now;
            under_way -= 1;
            if bound.allows(sent) && net.place().is_some() {
                since[usize::from(place)] = now;
                send(net, place, sent);
                sent += 1;
                under_way += 1;
            }
        }
        net.publish();
        // Whatever the host sends meanwhile is not for us, and no answer may take a place.
        while net.receive(|_, _, _| ()) {}
        net.give_back();
        pause();
    }
    let run = Run {
        mode,
        ticks: last - start,
        bytes: times.count() * size,
        errors: 0,
        times: &times,
    };
    run.tell(format_args!(",\"size\":{size}"));
}

/// When a run ends that the host drives: by a frame that says so, or by a bound that counts from the first frame on.
struct Incoming {
    bound: Option<Bound>,
    times: Times,
    start: u64,
    last: u64,
    bytes: u64,
    next: u64,
    lost: u64,
    ended: bool,
}

impl Incoming {
    fn new() -> Self {
        Self {
            bound: None,
            times: Times::new(),
            start: 0,
            last: 0,
            bytes: 0,
            next: 0,
            lost: 0,
            ended: false,
        }
    }

    /// Counts a frame. False: it was the end.
    fn count(&mut self, frame: Region, len: u64) -> bool {
        let now = ticks();
        let number: u64 = if frame.len() >= UDP_PAYLOAD + 8 {
            frame.get(UDP_PAYLOAD)
        } else {
            self.next
        };
        if number == END {
            self.ended = true;
            return false;
        }
        if self.bound.is_none() {
            self.bound = Some(Bound::from_arguments(1000));
            (self.start, self.last) = (now, now);
        }
        self.times.add(now - self.last);
        self.last = now;
        self.bytes += len;
        self.lost += number.saturating_sub(self.next);
        self.next = self.next.max(number + 1);
        true
    }

    fn goes_on(&self) -> bool {
        let more = self
            .bound
            .as_ref()
            .is_none_or(|bound| bound.allows(self.times.count()));
        more && !self.ended
    }

    fn tell(&self, mode: &str) {
        let run = Run {
            mode,
            ticks: self.last - self.start,
            bytes: self.bytes,
            errors: 0,
            times: &self.times,
        };
        run.tell(format_args!(",\"lost\":{}", self.lost));
    }
}

fn ready(mode: &str) {
    say!("PROBE {{\"mode\":\"{mode}\",\"ready\":1}}");
}

fn receive(net: &mut Net, mode: &str) {
    let mut incoming = Incoming::new();
    ready(mode);
    while incoming.goes_on() {
        let mut some = false;
        while incoming.goes_on()
            && next_frame(net, |_, what, frame, len| {
                if let Frame::Udp(_) = what {
                    incoming.count(frame, len);
                }
            })
        {
            some = true;
        }
        if some {
            net.give_back();
        }
        while net.sent().is_some() {}
        pause();
    }
    incoming.tell(mode);
}

fn echo(net: &mut Net, mode: &str) {
    let mut incoming = Incoming::new();
    ready(mode);
    while incoming.goes_on() {
        while next_frame(net, |net, what, frame, len| {
            if let Frame::Udp(from) = what
                && incoming.count(frame, len)
                && let Some((place, buffer)) = net.place()
            {
                let len = len.min(frame.len());
                let buffer = buffer.part(0, (HEADER + len).min(buffer.len()));
                let payload = buffer.len() - HEADER - UDP_PAYLOAD;
                write_udp(buffer, &net.address, &from);
                let mut chunk = [0; 64];
                let mut done = 0;
                while done < payload {
                    let part = &mut chunk[..(payload - done).min(64) as usize];
                    frame.copy_to(UDP_PAYLOAD + done, part);
                    buffer.copy_from(HEADER + UDP_PAYLOAD + done, part);
                    done += part.len() as u64;
                }
                net.offer(place, buffer.len());
            }
        }) {}
        net.give_back();
        net.publish();
        while net.sent().is_some() {}
        pause();
    }
    // The last answers are still under way.
    let patience = Deadline::after(ticks_per_second());
    while net.under_way() > 0 && !patience.is_over() {
        net.sent();
    }
    incoming.tell(mode);
}
