//! The attacking guest: whatever it does, the VMM goes on, and nothing outside of the guest changes.
//!
//! `LEPTON_ATTACK_SECONDS` and `LEPTON_ATTACK_SEED` make it longer, or another one.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lepton_tests::metal::{Metal, pattern, results};
use lepton_tests::origin::Origin;
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::tap::Tap;
use lepton_tests::test;
use rustix::fs::{Advice, fadvise};
use serde_json::json;

fn main() -> ExitCode {
    suite::run(
        Order::OneByOne,
        &[Need::Kvm, Need::File("LEPTON_ADVERSARY")],
        [
            test!(drives_and_sockets_hold).of_every_origin(),
            test!(drives_with_io_uring_and_sockets_hold).of_every_origin(),
            test!(interfaces_hold).needs(Need::Root).of_every_origin(),
            test!(resets_under_load_hold).of_every_origin(),
        ],
    )
}

/// The pattern that the guest expects on a drive that it cannot write to.
const READ_ONLY_SEED: u64 = 7;
/// Most KiB that may ever be resident: what the guest touches of its memory, and the VMM, with room for what its
/// sockets may hold for slow hosts.
const MOST_RESIDENT: u64 = 64 << 10;
/// Most bytes of log in a second. Each of some dozens of causes may log two lines a second.
const MOST_LOG: u64 = 64 << 10;
/// More time than any machine takes for a burst and the checks after it.
const SLACK: Duration = Duration::from_secs(120);

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is not a number: {text}")),
        Err(_) => default,
    }
}

fn drives_and_sockets_hold() {
    attack("", "Sync", None, |_| ());
}

fn drives_with_io_uring_and_sockets_hold() {
    // So much memory that it ends where the hole for devices begins, and goes on behind it.
    attack("hole", "Async", None, |_| ());
}

fn resets_under_load_hold() {
    // What is in the host's cache is read at once: only without it there is something under way at a reset.
    attack("adversary.only=storm", "Async", None, |drive| {
        File::open(drive)
            .and_then(|file| Ok(fadvise(&file, 0, None, Advice::DontNeed)?))
            .expect("a cache can be emptied");
    });
}

fn interfaces_hold() {
    const MAC: &str = "06:00:ac:1e:01:02";
    let tap = Tap::new(Some("172.30.40.1/24"));
    tap.neighbour("172.30.40.2", MAC);
    // Somebody talks to the guest all the time.
    let over = Arc::new(AtomicBool::new(false));
    let talker = {
        let over = Arc::clone(&over);
        thread::spawn(move || {
            let socket = UdpSocket::bind("172.30.40.1:0").expect("the tap's address");
            let mut size = 1;
            while !over.load(Ordering::Relaxed) {
                // The tap may be down for a moment, or its queue full.
                drop(socket.send_to(&vec![0x5a; size], "172.30.40.2:5000"));
                size = size * 7 % 30_011;
                thread::sleep(Duration::from_micros(200));
            }
        })
    };
    attack("", "Sync", Some((tap.name(), MAC)), |_| ());
    over.store(true, Ordering::Relaxed);
    talker.join().expect("it sends");
}

/// Sends back what it gets.
fn echo(mut stream: UnixStream) {
    let mut bytes = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut bytes) {
        if stream.write_all(&bytes[..length]).is_err() {
            return;
        }
    }
}

/// Sends back what comes on each connection, until the program ends.
fn echo_all(path: &Path) {
    let listener = UnixListener::bind(path).expect("a socket can be bound");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A flood of connections is part of the attack: one that finds no thread is closed.
            let thread = thread::Builder::new().stack_size(64 << 10);
            drop(thread.spawn(move || echo(stream)));
        }
    });
}

/// Lets the guest attack, and checks from outside that nothing came of it. `meanwhile` is done to the scratch drive
/// again and again.
#[track_caller]
fn attack(
    arguments: &str,
    engine: &str,
    interface: Option<(&str, &str)>,
    meanwhile: impl Fn(&Path),
) {
    // A copy is attacked for half as long: what it does not have in common with a machine that booted is little.
    let default = match Origin::current() {
        Origin::Booted => 4,
        Origin::Restored | Origin::Cloned => 2,
    };
    let seconds = number("LEPTON_ATTACK_SECONDS", default);
    let seed = number("LEPTON_ATTACK_SEED", 1);
    let mut metal = Metal::new(
        "LEPTON_ADVERSARY",
        &format!(
            "adversary.seed={seed} adversary.seconds={seconds} adversary.port=5000 {arguments}"
        ),
    );
    let scratch = metal.drive("scratch", engine, &[0; 8 << 20]);
    let read_only = metal.drive("fixed", engine, &pattern(READ_ONLY_SEED, 1 << 20));
    // Beside the drives, where a path or a descriptor gone wrong would lead.
    let canary = metal.path("canary");
    fs::write(&canary, pattern(3, 1 << 16)).expect("a file can be written");
    let socket = metal.path("v.sock");
    let mut host_port = socket.clone().into_os_string();
    host_port.push("_5000");
    let host_port = Path::new(&host_port).to_path_buf();
    echo_all(&host_port);
    let metal = metal.with(|config| {
        let mib = if arguments.contains("hole") {
            3200
        } else {
            192
        };
        config["machine-config"]["mem_size_mib"] = json!(mib);
        config["drives"][1]["is_read_only"] = json!(true);
        config["vsock"] = json!({ "guest_cid": 3, "uds_path": socket });
        if let Some((tap, mac)) = interface {
            config["network-interfaces"] =
                json!([{ "iface_id": "n", "host_dev_name": tap, "guest_mac": mac }]);
        }
    });

    let started = Instant::now();
    let vmm = metal.start();
    let mut peak = 0;
    while !vmm.has_ended_within(Duration::from_millis(1)) {
        meanwhile(&scratch);
        peak = vmm.peak_memory().unwrap_or(0).max(peak);
        let limit = Duration::from_secs(seconds) + SLACK;
        assert!(
            started.elapsed() < limit,
            "the guest hangs:\n{}",
            vmm.stdout.text()
        );
    }
    let elapsed = started.elapsed();
    fs::remove_file(&host_port).expect("our socket");
    let ended = vmm.wait().expect_code(0);

    let text = ended.text();
    let results = results("ADVERSARY ", &text);
    let verdict = results
        .last()
        .unwrap_or_else(|| panic!("no verdict:\n{text}"));
    assert_eq!(verdict["verdict"], "held", "{verdict}");
    let cases = verdict["cases"].as_u64().expect("a number");
    assert!(cases > 0, "{verdict}");
    assert_eq!(ended.stderr, "");
    assert!(peak > 0 && peak < MOST_RESIDENT, "{peak} KiB were resident");
    let most = MOST_LOG * (elapsed.as_secs() + 2);
    assert!(text.len() as u64 <= most, "{} bytes of log", text.len());
    let is_still = |path: &Path, content: Vec<u8>| fs::read(path).expect("a file") == content;
    assert!(
        is_still(&read_only, pattern(READ_ONLY_SEED, 1 << 20)),
        "a read-only drive changed"
    );
    assert!(
        is_still(&canary, pattern(3, 1 << 16)),
        "a file that is no drive changed"
    );
    let size = fs::metadata(&scratch).expect("a file").len();
    assert_eq!(size, 8 << 20, "a drive changed its size");
    eprintln!(
        "{cases} attacks in {:.1} s ({:.2} million a minute), seed {seed}, {:?}, {engine} {arguments}: {}; {peak} KiB resident \
         at most, {} KiB of log",
        elapsed.as_secs_f64(),
        cases as f64 / elapsed.as_secs_f64() * 60e-6,
        Origin::current(),
        verdict["verdict"],
        text.len() >> 10
    );
}
