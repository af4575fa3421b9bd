//! The device on a real tap, against the host's own network stack, in a network namespace of its own.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;

use lepton_hostio::tap::Tap;

use super::*;

const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// How long to wait for what never comes.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(10);
const INSIDE: &str = "LEPTON_TEST_NETNS";

/// Runs the test `name` again in a namespace with a tap `lepton0`. True: this is that run. False: it is done.
fn in_namespace(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    // Without the test's own name in it, so that the probe and the run need the same.
    let setup = "set -e
        ip link set lo up
        ip tuntap add dev lepton0 mode tap
        ip link set lepton0 address 02:00:00:00:00:01
        ip address add 10.77.0.1/24 dev lepton0
        sysctl -qw net.ipv6.conf.lepton0.disable_ipv6=1 || true
        ip link set lepton0 up
        ip neighbour add 10.77.0.2 lladdr 02:00:00:00:00:09 dev lepton0 nud permanent";
    let run = |script: String| {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", &script]);
        command.env(INSIDE, "1").output()
    };
    match run(setup.to_owned()) {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let reason = String::from_utf8_lossy(&output.stderr);
            println!("SKIPPED: {name}: no tap in a network namespace here: {reason}");
            return false;
        }
        Err(error) => {
            println!("SKIPPED: {name}: cannot run unshare: {error}");
            return false;
        }
    }
    let exe = std::env::current_exe().unwrap();
    let test = format!("virtio::net::tests::native::{name}");
    let script = format!(
        "{setup}\nexec '{}' --exact {test} --nocapture",
        exe.display()
    );
    let output = run(script).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

/// Waits until the host sends through the tap: some time after it was opened the kernel gives it a queue, and what
/// is sent before is lost.
fn wait_for_link() {
    let start = std::time::Instant::now();
    loop {
        let mut command = Command::new("ip");
        let output = command.args(["-o", "link", "show", "lepton0"]).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        if text.contains("LOWER_UP") && text.contains("state UP") && !text.contains("qdisc noop") {
            return;
        }
        assert!(start.elapsed() < LIMIT, "the tap does not come up: {text}");
    }
}

/// A device on the tap, its driver, and events as an event loop would see them.
struct Native {
    net: Net<Tap>,
    driver: TestDriver,
    epoll: Epoll,
    offered: VecDeque<Buffer>,
    inbox: VecDeque<Vec<u8>>,
}

impl Native {
    fn new(features: u64) -> Self {
        let net = Net::new(NetConfig {
            tap: Tap::open("lepton0").unwrap(),
            mac: Some(MAC),
            mtu: None,
            queue_size: 256,
            rx_rate_limiter: Default::default(),
            tx_rate_limiter: Default::default(),
        })
        .unwrap();
        assert_eq!(features & !(net.features() | VERSION_1), 0);
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        epoll
            .ctl(ControlOperation::Add, net.sources()[0], event)
            .unwrap();
        let mut native = Native {
            net,
            driver: TestDriver::new(&[256, 256]),
            epoll,
            offered: VecDeque::new(),
            inbox: VecDeque::new(),
        };
        wait_for_link();
        let resources = native.driver.resources(features);
        native.net.activate(resources).unwrap();
        for _ in 0..100 {
            let buffer = native.driver.writable(2048);
            native.offer(buffer);
        }
        native.kick(RX);
        native
    }

    fn offer(&mut self, buffer: Buffer) {
        self.driver.queues[RX].offer(&[buffer]);
        self.offered.push_back(buffer);
    }

    fn kick(&mut self, queue: usize) {
        while self.net.process_queue(queue).unwrap() == Progress::Again {}
    }

    fn send(&mut self, bytes: &[u8]) {
        let buffer = self.driver.readable(bytes);
        self.driver.queues[TX].offer(&[buffer]);
        self.kick(TX);
        assert_eq!(self.driver.queues[TX].used().len(), 1);
    }

    /// The next frame with its header that `wanted` takes; those before it are forgotten.
    fn receive(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        loop {
            while let Some(bytes) = self.inbox.pop_front() {
                if wanted(&bytes[HEADER..]) {
                    return bytes;
                }
            }
            let mut used = self.driver.queues[RX].used().into_iter();
            while let Some((_, len)) = used.next() {
                let mut bytes = self.part(len);
                let count = u16::from_le_bytes([bytes[10], bytes[11]]);
                for _ in 1..count {
                    let (_, len) = used.next().expect("part of a frame is missing");
                    bytes.extend(self.part(len));
                }
                self.inbox.push_back(bytes);
            }
            if self.inbox.is_empty() {
                let mut events = [EpollEvent::default()];
                let count = self.epoll.wait(10_000, &mut events).unwrap();
                assert_eq!(count, 1, "no frame in 10 s");
                while self.net.process_source(0).unwrap() == Progress::Again {}
            }
        }
    }

    fn part(&mut self, len: u32) -> Vec<u8> {
        let buffer = self.offered.pop_front().unwrap();
        let mut bytes = self.driver.bytes(buffer);
        bytes.truncate(len as usize);
        self.offer(buffer);
        bytes
    }
}

fn checksum(words: &[u8], mut sum: u32) -> u16 {
    for pair in words.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// An Ethernet frame with an IPv4 packet from the guest, 10.77.0.2, to the host, 10.77.0.1.
fn packet(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let len = (20 + payload.len()) as u16;
    let mut ip = vec![
        0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 77, 0, 2, 10, 77, 0, 1,
    ];
    ip[2..4].copy_from_slice(&len.to_be_bytes());
    let sum = checksum(&ip, 0);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    [&HOST_MAC[..], &MAC, &[8, 0], &ip, payload].concat()
}

fn is_udp(frame: &[u8]) -> bool {
    frame.len() > 34 && frame[12..14] == [8, 0] && frame[23] == 17
}

#[test]
fn datagrams_both_ways() {
    if !in_namespace("datagrams_both_ways") {
        return;
    }
    for features in [VERSION_1, MERGEABLE] {
        let mut native = Native::new(features);
        let socket = UdpSocket::bind("10.77.0.1:4000").unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        for size in [1, 100, 1472] {
            let payload = frame(size.max(12), size);
            let payload = &payload[..size];
            // Without a UDP checksum, as IPv4 allows.
            let length = (8 + size as u16).to_be_bytes();
            let header = [0x13, 0x88, 0x0f, 0xa0, length[0], length[1], 0, 0];
            native.send(&with_header(&packet(17, &[&header, payload].concat())));
            let mut buffer = [0; 2000];
            let (len, from) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!(from.to_string(), "10.77.0.2:5000");
            assert_eq!(&buffer[..len], payload);

            socket.send_to(payload, "10.77.0.2:5000").unwrap();
            let bytes = native.receive(is_udp);
            assert_eq!(bytes[..HEADER], rx_header(1));
            assert_eq!(bytes[HEADER..HEADER + 6], MAC);
            assert_eq!(&bytes[HEADER + 42..], payload);
        }
    }
}

#[test]
fn a_tap_that_is_down_drops_frames_and_comes_back() {
    if !in_namespace("a_tap_that_is_down_drops_frames_and_comes_back") {
        return;
    }
    let link = |state: &str| {
        let mut command = Command::new("ip");
        command.args(["link", "set", "lepton0", state]);
        assert!(command.status().unwrap().success());
    };
    let mut native = Native::new(MERGEABLE);
    let datagram = with_header(&packet(17, &[0x13, 0x88, 0x0f, 0xa0, 0, 9, 0, 0, 42]));
    link("down");
    native.send(&datagram);
    assert_eq!(native.net.metrics().tap_write_fails.get(), 1);
    native.kick(RX);
    link("up");
    wait_for_link();
    let mut command = Command::new("ip");
    command.args([
        "neighbour",
        "replace",
        "10.77.0.2",
        "lladdr",
        "02:00:00:00:00:09",
    ]);
    command.args(["dev", "lepton0", "nud", "permanent"]);
    assert!(command.status().unwrap().success());
    let socket = UdpSocket::bind("10.77.0.1:4000").unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    native.send(&datagram);
    let mut buffer = [0; 10];
    assert_eq!(socket.recv(&mut buffer).unwrap(), 1);
    assert_eq!(buffer[0], 42);
    socket.send_to(&[43], "10.77.0.2:5000").unwrap();
    assert_eq!(native.receive(is_udp)[HEADER + 42..], [43]);

    // The interface goes for good: nothing but failures, and none of them ends the device.
    let mut command = Command::new("ip");
    assert!(
        command
            .args(["link", "delete", "lepton0"])
            .status()
            .unwrap()
            .success()
    );
    native.send(&datagram);
    assert_eq!(native.net.metrics().tap_write_fails.get(), 2);
    assert_eq!(native.net.process_source(0).unwrap(), Progress::Done);
    assert_ne!(native.net.metrics().tap_read_fails.get(), 0);
}

/// One TCP connection by hand: the host sends its data in unsegmented frames, and takes some.
#[test]
fn large_segments_both_ways() {
    if !in_namespace("large_segments_both_ways") {
        return;
    }
    let offloads = [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
    ];
    let features = offloads.iter().fold(MERGEABLE, |all, bit| all | 1 << bit);
    let mut native = Native::new(features);
    let listener = TcpListener::bind("10.77.0.1:4000").unwrap();
    let mut peer = Peer {
        native: &mut native,
        sequence: 1000,
        acknowledged: 0,
    };
    peer.send(SYN, &[]);
    let reply = peer.receive(|flags, _| flags & SYN != 0).1;
    assert!(reply.is_empty());
    peer.acknowledged += 1;
    peer.sequence += 1;
    peer.send(ACK, &[]);
    let (mut stream, _): (TcpStream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();

    // To the host: 30000 bytes in one frame, to be cut by the host.
    let data = frame(30_000, 7);
    peer.send(ACK, &data);
    let mut got = vec![0; data.len()];
    stream.read_exact(&mut got).unwrap();
    assert!(got == data);
    peer.sequence += data.len() as u32;

    // From the host: more than the first frames can carry, some larger than the MTU.
    let data = frame(200_000, 8);
    let (mut got, mut largest) = (Vec::new(), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| stream.write_all(&data).unwrap());
        while got.len() < data.len() {
            let (header, part) = peer.receive(|_, len| len > 0);
            if part.len() > 1460 {
                assert_eq!(header[..2], [1, 1], "to be summed, TCP over IPv4");
            }
            largest = largest.max(part.len());
            peer.acknowledged = peer.acknowledged.wrapping_add(part.len() as u32);
            got.extend(part);
            peer.send(ACK, &[]);
        }
    });
    assert!(got == data);
    assert!(largest > 1460, "no frame was larger than the MTU");
    let metrics = native.net.metrics();
    assert_eq!(
        metrics.rx_fails.get() + metrics.tx_malformed_frames.get(),
        0
    );
}

const SYN: u8 = 2;
const ACK: u8 = 16;

/// The guest's end of a TCP connection from port 5000 to 4000.
struct Peer<'a> {
    native: &'a mut Native,
    sequence: u32,
    acknowledged: u32,
}

impl Peer<'_> {
    fn send(&mut self, flags: u8, data: &[u8]) {
        let mut segment = vec![0x13, 0x88, 0x0f, 0xa0];
        segment.extend(self.sequence.to_be_bytes());
        segment.extend(self.acknowledged.to_be_bytes());
        segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        segment.extend(data);
        // What a driver leaves for the device: the sum of the pseudo header alone.
        let len = segment.len() as u32;
        let pseudo = !checksum(&[10, 77, 0, 2, 10, 77, 0, 1], 6 + len);
        segment[16..18].copy_from_slice(&pseudo.to_be_bytes());
        let mut header = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        if data.len() > 1460 {
            header[1..6].copy_from_slice(&[1, 54, 0, 0xb4, 5]);
        }
        self.native
            .send(&[&header[..], &packet(6, &segment)].concat());
    }

    /// The header and the data of the next segment, in order, that is wanted by its flags and its data's length.
    fn receive(&mut self, wanted: impl Fn(u8, usize) -> bool) -> ([u8; HEADER], Vec<u8>) {
        let expected = self.acknowledged;
        let data = |frame: &[u8]| {
            let ip_len = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
            let start = 34 + usize::from(frame[46] >> 4) * 4;
            frame[start..14 + ip_len].to_vec()
        };
        let bytes = self.native.receive(|frame| {
            let is_tcp = frame.len() >= 54 && frame[12..14] == [8, 0] && frame[23] == 6;
            is_tcp && wanted(frame[47], data(frame).len()) && {
                let sequence = u32::from_be_bytes([frame[38], frame[39], frame[40], frame[41]]);
                expected == 0 || sequence == expected
            }
        });
        let (header, frame) = bytes.split_at(HEADER);
        if expected == 0 {
            self.acknowledged = u32::from_be_bytes([frame[38], frame[39], frame[40], frame[41]]);
        }
        (header.try_into().unwrap(), data(frame))
    }
}
