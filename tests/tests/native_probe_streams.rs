//! The measuring guest on the network and on vsock, with the host as the other end.

use std::fs;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::Instant;

use lepton_tests::host_socket::HostSocket;
use lepton_tests::metal::{Metal, results};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::tap::Tap;
use lepton_tests::{PATIENCE, Vmm, test};
use serde_json::{Value, json};

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[Need::Kvm, Need::File("LEPTON_PROBE")],
        [
            test!(frames_that_it_sends_arrive)
                .needs(Need::Root)
                .of_every_origin(),
            test!(segments_that_it_sends_are_cut)
                .needs(Need::Root)
                .of_every_origin(),
            test!(frames_that_it_is_sent_are_counted)
                .needs(Need::Root)
                .of_every_origin(),
            test!(frames_come_back).needs(Need::Root).of_every_origin(),
            test!(what_it_streams_arrives).of_every_origin(),
            test!(what_slow_hosts_left_is_given_back),
            test!(what_it_is_streamed_it_checks).of_every_origin(),
            test!(the_host_connects_and_streams_come_back).of_every_origin(),
        ],
    )
}

/// The one result of a run that ended well.
#[track_caller]
fn result(vmm: Vmm) -> Value {
    let ended = vmm.wait().expect_code(0);
    let mut results = results("PROBE ", &ended.text());
    results.retain(|result| result["ready"].is_null());
    assert_eq!(results.len(), 1, "{}", ended.text());
    assert_eq!(results[0]["errors"], 0, "{results:?}");
    results.remove(0)
}

/// The guest's hardware address.
const MAC: &str = "06:00:ac:1e:01:02";

/// A tap with an address of its own, and a guest beside it.
struct Network {
    tap: Tap,
    host: String,
    guest: String,
}

impl Network {
    fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(50);
        let net = format!("172.30.{}", NEXT.fetch_add(1, Ordering::Relaxed));
        Self {
            tap: Tap::new(Some(&format!("{net}.1/24"))),
            host: format!("{net}.1"),
            guest: format!("{net}.2"),
        }
    }

    #[track_caller]
    fn start(&self, arguments: &str) -> Vmm {
        let arguments = format!(
            "{arguments} probe.ip={} probe.peer={}",
            self.guest, self.host
        );
        let metal = Metal::new("LEPTON_PROBE", &arguments);
        metal.with(|config| self.configure(config)).start()
    }

    fn configure(&self, config: &mut Value) {
        config["network-interfaces"] = json!([{
            "iface_id": "n", "host_dev_name": self.tap.name(), "guest_mac": MAC,
        }]);
    }

    fn socket(&self, port: u16) -> UdpSocket {
        let socket = UdpSocket::bind((self.host.as_str(), port)).expect("an address of the tap");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        socket
    }

    fn counter(&self, name: &str) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/{name}", self.tap.name());
        let text = fs::read_to_string(path).expect("a tap has counters");
        text.trim().parse().expect("a number")
    }
}

fn frames_that_it_sends_arrive() {
    const COUNT: u64 = 100;
    for plain in ["", "probe.offload=0 probe.event_idx=0"] {
        let network = Network::new();
        let socket = network.socket(5001);
        let vmm = network.start(&format!(
            "probe.mode=net_tx probe.size=200 probe.count={COUNT} {plain}"
        ));
        let mut payload = [0; 2000];
        for number in 0..COUNT {
            let (length, from) = socket.recv_from(&mut payload).expect("a frame");
            assert_eq!(from.to_string(), format!("{}:5000", network.guest));
            assert_eq!(length, 200 - 42);
            assert_eq!(payload[..8], number.to_le_bytes());
        }
        let result = result(vmm);
        assert_eq!(
            (&result["ops"], &result["bytes"]),
            (&json!(COUNT), &json!(COUNT * 200))
        );
    }
}

fn segments_that_it_sends_are_cut() {
    // To some other station: the host's TCP has nothing to say to that.
    let network = Network::new();
    let before = network.counter("rx_bytes");
    let vmm = network.start(
        "probe.mode=net_tx probe.size=65000 probe.count=50 probe.peer_mac=02:00:00:00:00:99",
    );
    let result = result(vmm);
    assert_eq!(result["ops"], 50);
    let bytes = network.counter("rx_bytes") - before;
    assert!(bytes >= 50 * 65000 - 50 * 14, "{bytes} bytes came");
    assert_eq!(network.counter("rx_dropped"), 0);
}

fn frames_that_it_is_sent_are_counted() {
    const COUNT: u64 = 200;
    let network = Network::new();
    let socket = network.socket(5001);
    // While it asks who that is, the host keeps only the last few frames.
    network.tap.neighbour(&network.guest, MAC);
    let vmm = network.start("probe.mode=net_rx probe.count=1000000");
    vmm.stdout.wait_for("\"ready\":1");
    network.tap.wait_until_up();
    let to = format!("{}:5000", network.guest);
    for number in (0..COUNT).chain([u64::MAX]) {
        let mut payload = [0; 1000];
        payload[..8].copy_from_slice(&number.to_le_bytes());
        socket.send_to(&payload, &to).expect("the tap takes it");
    }
    let result = result(vmm);
    let told = (&result["ops"], &result["bytes"], &result["lost"]);
    assert_eq!(told, (&json!(COUNT), &json!(COUNT * 1042), &json!(0)));
}

fn frames_come_back() {
    let network = Network::new();
    let socket = network.socket(5001);
    let vmm = network.start("probe.mode=net_echo probe.count=50");
    vmm.stdout.wait_for("\"ready\":1");
    network.tap.wait_until_up();
    let to = format!("{}:5000", network.guest);
    for number in 0..50_u64 {
        let mut payload: Vec<u8> = (0..20 + number * 29).map(|byte| byte as u8).collect();
        payload[..8].copy_from_slice(&number.to_le_bytes());
        socket.send_to(&payload, &to).expect("the tap takes it");
        let mut answer = [0; 2000];
        let length = socket.recv(&mut answer).expect("an answer");
        assert!(
            answer[..length] == payload,
            "frame {number} came back changed"
        );
    }
    assert_eq!(result(vmm)["ops"], 50);
}

/// What a stream carries.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|at| at.wrapping_add(at >> 8) as u8)
        .collect()
}

fn with_vsock(arguments: &str) -> Metal {
    let metal = Metal::new("LEPTON_PROBE", arguments);
    let path = metal.path("v.sock");
    metal.with(|config| config["vsock"] = json!({ "guest_cid": 3, "uds_path": path }))
}

fn what_it_streams_arrives() {
    for (connections, size, count) in [(1, 65536, 64), (32, 4096, 640), (64, 100, 64)] {
        let metal = with_vsock(&format!(
            "probe.mode=vsock_tx probe.verify=1 probe.connections={connections} probe.size={size} probe.count={count}"
        ));
        let listener = HostSocket::of_vsock(&metal.path("v.sock"), 5000);
        let vmm = metal.start();
        let readers: Vec<_> = (0..connections)
            .map(|_| {
                let mut stream = listener.accept();
                thread::spawn(move || {
                    let mut bytes = Vec::new();
                    stream.read_to_end(&mut bytes).expect("a whole stream");
                    assert!(
                        bytes == pattern(bytes.len()),
                        "{} bytes came changed",
                        bytes.len()
                    );
                    bytes.len() as u64
                })
            })
            .collect();
        let read = readers
            .into_iter()
            .map(|reader| reader.join().expect("no change"));
        let read: u64 = read.sum();
        drop(listener);
        let result = result(vmm);
        assert_eq!(
            (&result["ops"], &result["bytes"]),
            (&json!(count), &json!(read))
        );
        assert!(read > 0);
    }
}

/// KiB of a VMM's memory that are resident, but for its guest's.
fn resident_beyond_guest(vmm: &Vmm) -> u64 {
    const GUEST_KIB: u64 = 128 << 10;
    let maps = fs::read_to_string(format!("/proc/{}/smaps", vmm.pid())).expect("the VMM runs");
    let values = |name: &str| {
        let lines = maps.lines().filter_map(|line| line.strip_prefix(name));
        let kib = |rest: &str| rest.trim().trim_end_matches(" kB").parse::<u64>();
        lines
            .map(|rest| kib(rest).expect("a number"))
            .collect::<Vec<_>>()
    };
    let all = values("Size:").into_iter().zip(values("Rss:"));
    all.filter(|(size, _)| *size < GUEST_KIB)
        .map(|(_, rss)| rss)
        .sum()
}

fn what_slow_hosts_left_is_given_back() {
    const CONNECTIONS: usize = 32;
    // What the host takes without anybody reading, and what the VMM holds for it, is less than half of this.
    let metal = with_vsock(&format!(
        "probe.mode=vsock_tx,idle probe.connections={CONNECTIONS} probe.size=4096 probe.count=10000"
    ));
    let listener = HostSocket::of_vsock(&metal.path("v.sock"), 5000);
    let vmm = metal.start();
    let mut streams: Vec<_> = (0..CONNECTIONS).map(|_| listener.accept()).collect();
    let before = resident_beyond_guest(&vmm);
    let deadline = Instant::now() + PATIENCE;
    while resident_beyond_guest(&vmm) < before + 1024 {
        assert!(Instant::now() < deadline, "the VMM holds nothing");
        thread::yield_now();
    }
    thread::scope(|scope| {
        for stream in &mut streams {
            scope.spawn(move || {
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).expect("a whole stream");
            });
        }
    });
    drop(listener);
    drop(streams);
    vmm.stdout.wait_for("\"mode\":\"idle\"");
    while resident_beyond_guest(&vmm) > before + 256 {
        let after = resident_beyond_guest(&vmm);
        assert!(Instant::now() < deadline, "{after} KiB, before {before}");
        thread::yield_now();
    }
    vmm.terminate();
}

fn what_it_is_streamed_it_checks() {
    const LENGTH: usize = 1 << 20;
    for connections in [1, 16] {
        let metal = with_vsock(&format!(
            "probe.mode=vsock_rx probe.verify=1 probe.connections={connections}"
        ));
        let listener = HostSocket::of_vsock(&metal.path("v.sock"), 5000);
        let vmm = metal.start();
        let streams: Vec<_> = (0..connections).map(|_| listener.accept()).collect();
        let writers: Vec<_> = streams
            .into_iter()
            .map(|mut stream| {
                thread::spawn(move || stream.write_all(&pattern(LENGTH)).expect("the guest reads"))
            })
            .collect();
        for writer in writers {
            writer.join().expect("all is written");
        }
        drop(listener);
        let result = result(vmm);
        assert_eq!(result["bytes"], LENGTH * connections);
    }
}

fn the_host_connects_and_streams_come_back() {
    let metal = with_vsock("probe.mode=vsock_echo probe.listen=1 probe.connections=3");
    let path = metal.path("v.sock");
    let vmm = metal.start();
    vmm.stdout.wait_for("\"ready\":1");
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = UnixStream::connect(&path).expect("the VMM listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream.write_all(b"CONNECT 5000\n").expect("the VMM reads");
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("an answer");
            answer.push(byte[0]);
        }
        assert!(
            answer.starts_with(b"OK "),
            "{}",
            String::from_utf8_lossy(&answer)
        );
        streams.push(stream);
    }
    for round in 1..20 {
        for stream in &mut streams {
            let sent = pattern(round * 150);
            stream.write_all(&sent).expect("the guest reads");
            let mut back = vec![0; sent.len()];
            stream.read_exact(&mut back).expect("the guest answers");
            assert!(back == sent, "round {round} came back changed");
        }
    }
    drop(streams);
    let expected: usize = (1..20).map(|round| round * 150 * 3).sum();
    assert_eq!(result(vmm)["bytes"], expected);
}
