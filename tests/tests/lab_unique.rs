//! Copies of a machine, as many as `LEPTON_UNIQUE_CLONES` says: nothing that must differ is the same in two of them.
//! `cargo xtask verify-unique` runs it with many.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};

use lepton_tests::heir::{Heir, UNIQUE, clone, unique_things};
use lepton_tests::linux::{self, Linux};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::tap::Tap;
use lepton_tests::test;
use serde_json::{Value, json};

/// Copies that live at the same time.
const BATCH: usize = 4;
/// Copies unless another number is asked for.
const FEW: usize = 4;

fn main() -> ExitCode {
    suite::run(
        Order::OneByOne,
        &linux::NEEDS,
        [test!(no_two_copies_have_anything_in_common)
            .needs(Need::Root)
            .needs(Need::Program("ip"))
            .needs(Need::Program("python3"))],
    )
}

/// Answers each connection with the port and the sequence number with which the other side began, on four ports, which it
/// prints. The host's kernel keeps the packet that has them (TCP_SAVE_SYN, TCP_SAVED_SYN of tcp(7)).
const SERVER: &str = r#"
import select, socket, struct
servers = [socket.create_server(("", 0)) for _ in range(4)]
for server in servers:
    server.setsockopt(socket.IPPROTO_TCP, 27, 1)
print(*(server.getsockname()[1] for server in servers), flush=True)
while True:
    for server in select.select(servers, [], [])[0]:
        connection, _ = server.accept()
        packet = connection.getsockopt(socket.IPPROTO_TCP, 28, 256)
        port, _, number = struct.unpack_from("!HHI", packet, (packet[0] & 15) * 4)
        connection.sendall(b"%d %d\n" % (port, number))
        connection.close()
"#;

/// A host to which the guests connect.
struct Server {
    process: Child,
    /// In one line.
    ports: String,
    /// It has the address.
    _tap: Tap,
}

impl Server {
    const ADDRESS: &str = "172.31.254.1";

    #[track_caller]
    fn new() -> Self {
        let tap = Tap::new(Some(&format!("{}/32", Self::ADDRESS)));
        let mut process = Command::new("python3")
            .args(["-c", SERVER])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 starts");
        let mut ports = String::new();
        let said = process.stdout.take().expect("a pipe");
        let read = BufReader::new(said).read_line(&mut ports);
        read.expect("the server says its ports");
        Server {
            process,
            ports,
            _tap: tap,
        }
    }

    /// The ports and the sequence numbers with which a guest's next connections begin, one to each port: of a single one both
    /// would repeat by chance.
    #[track_caller]
    fn beginnings(&self, guest: &Linux) -> [String; 2] {
        let text = guest.sh(&format!(
            "for port in {}; do nc -w 30 {} $port </dev/null || exit; done",
            self.ports.trim(),
            Self::ADDRESS
        ));
        let lines = text.lines().map(|line| line.split_once(' '));
        let all: Vec<_> = lines.map(|pair| pair.expect("two numbers")).collect();
        assert_eq!(all.len(), 4, "{text}");
        let (ports, numbers): (Vec<&str>, Vec<&str>) = all.into_iter().unzip();
        [ports.join(" "), numbers.join(" ")]
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It does not end by itself.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// What no two guests may have in common besides [`UNIQUE`].
const CONNECTIONS: [&str; 2] = ["TCP initial ports", "TCP initial sequence numbers"];

#[track_caller]
fn all_things(guest: &Linux, server: &Server) -> Vec<String> {
    let mut things = unique_things(guest);
    things.extend(server.beginnings(guest));
    things
}

/// The address of copy number `number`.
fn address(number: usize) -> String {
    let [.., high, low] = number.to_be_bytes();
    format!("172.31.{high}.{low}")
}

/// The request for copy number `number`, with an address and a name of its own; the kernel and the VMM choose the rest.
fn child(heir: &Heir, number: usize, tap: &Tap) -> Value {
    let [.., high, low] = number.to_be_bytes();
    let address = address(number);
    tap.route(&address);
    let mut child = heir.child();
    child["network_overrides"] = json!([{ "iface_id": "eth0", "host_dev_name": tap.name() }]);
    child["identity"] = json!({
        "hostname": format!("copy-{number}"), "timeout_ms": 50_000,
        "interfaces": [{
            "iface_id": "eth0", "guest_mac": format!("06:00:ac:1f:{high:02x}:{low:02x}"),
            "address": format!("{address}/16"),
        }],
    });
    child
}

/// Does the same with each of a few, on a thread each.
fn at_once<T: Send, R: Send>(
    all: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads = all.into_iter().map(|one| scope.spawn(move || work(one)));
        let threads: Vec<_> = threads.collect();
        let results = threads.into_iter().map(|thread| thread.join());
        results.map(|result| result.expect("it succeeds")).collect()
    })
}

fn no_two_copies_have_anything_in_common() {
    let asked = std::env::var("LEPTON_UNIQUE_CLONES").ok();
    let copies = asked.map_or(FEW, |number| number.parse().expect("a number"));
    let server = Server::new();
    let taps: Vec<Tap> = (0..=BATCH).map(|_| Tap::new(None)).collect();
    let mut guest = Linux::boot(
        "quiet ip=172.31.255.1:::255.255.0.0::eth0:off",
        |_, config| {
            config["machine-config"]["clonable"] = true.into();
            config["network-interfaces"] = json!([{
                "iface_id": "eth0", "host_dev_name": taps[BATCH].name(), "guest_mac": "06:00:ac:1f:ff:ff",
            }]);
        },
    );
    taps[BATCH].route("172.31.255.1");
    guest.sh("echo 0123456789abcdef0123456789abcdef > /etc/machine-id");
    // Its kernel has drawn all its secrets by then, and the copies have the same.
    let mut seen = vec![all_things(&guest, &server)];
    let numbers: Vec<usize> = (1..=copies).collect();
    for batch in numbers.chunks(BATCH) {
        let heirs = at_once(batch, |_| Heir::new());
        let children: Vec<Value> = (batch.iter().zip(&heirs).zip(&taps))
            .map(|((number, heir), tap)| child(heir, *number, tap))
            .collect();
        clone(&mut guest.api, &children);
        seen.extend(at_once(heirs, |heir| all_things(&heir.linux(), &server)));
        println!("{} of {copies} copies", seen.len() - 1);
    }
    let mut repeats = BTreeMap::new();
    for (kind, name) in UNIQUE.iter().chain(&CONNECTIONS).enumerate() {
        let mut all: Vec<&String> = seen.iter().map(|things| &things[kind]).collect();
        all.sort();
        all.dedup();
        repeats.insert(name, seen.len() - all.len());
    }
    for (name, count) in &repeats {
        println!(
            "verify-unique: {count} repeated {name} among {} machines",
            seen.len()
        );
    }
    assert!(repeats.values().all(|count| *count == 0), "{repeats:?}");
}
