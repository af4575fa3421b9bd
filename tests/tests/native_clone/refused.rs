//! Clones that there are not to be.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use lepton_hostio::packet::{PacketListener, PacketSocket};
use lepton_tests::counting::let_run;
use lepton_tests::{PATIENCE, Vmm};
use rustix::process::Signal;
use serde_json::json;

use crate::family::{Heir, clone, parent, request};

pub fn all_children_or_none() {
    let (_vmm, mut api) = parent(128, true);
    let mut good = Heir::called("good");
    let mut taken = Heir::called("taken");
    clone(&mut api, &request(&[taken.child()]));
    let_run(&mut taken.api);
    // Who has a machine refuses, and the other's machine, which was ready, ends before it ran.
    let both = request(&[good.child(), taken.child()]);
    let message = api.refused("PUT", "/clone", &both.to_string());
    assert!(message.contains("has a machine already"), "{message}");
    assert!(
        message.contains(taken.socket.to_str().expect("a path")),
        "{message}"
    );
    let ended = good.vmm.wait();
    assert_eq!(ended.status.code(), Some(1));
    assert_eq!(ended.stdout, b"");
    let_run(&mut taken.api);
    let_run(&mut api);

    // One that is not there is noticed before anybody else is asked.
    good = Heir::called("good");
    let nobody = json!({ "adopt_socket": "/no/such/socket" });
    let message = api.refused(
        "PUT",
        "/clone",
        &request(&[good.child(), nobody]).to_string(),
    );
    assert!(message.contains("/no/such/socket"), "{message}");
    assert_eq!(good.api.state(), "Not started");
    clone(&mut api, &request(&[good.child()]));
    let_run(&mut good.api);
    let_run(&mut api);
}

pub fn what_cannot_be_cloned_is_named() {
    let heir = Heir::called("copy");
    let body = request(&[heir.child()]).to_string();
    let (vmm, mut api) = Vmm::quiet();
    let message = api.refused("PUT", "/clone", &body);
    assert!(message.contains("before starting"), "{message}");
    let huge =
        json!({ "vcpu_count": 1, "mem_size_mib": 128, "huge_pages": "2M", "clonable": true });
    let message = api.refused("PUT", "/machine-config", &huge.to_string());
    assert!(message.contains("clonable"), "{message}");
    drop(vmm);

    let (vmm, mut api) = parent(128, false);
    for (children, reason) in [
        (vec![], "0 children"),
        (vec![heir.child(), heir.child()], "twice"),
        (
            vec![json!({ "adopt_socket": vmm.socket() })],
            "adopt_socket",
        ),
    ] {
        let message = api.refused("PUT", "/clone", &request(&children).to_string());
        assert!(message.contains(reason), "{message}");
    }
    // Who is no VMM, and says nothing, or something else.
    let path = vmm.path("nobody.sock");
    let (listener, _file) = PacketListener::bind(path.as_ref()).expect("a socket");
    let body = request(&[json!({ "adopt_socket": path })]).to_string();
    let asked = std::thread::scope(|scope| {
        let asked = scope.spawn(|| api.refused("PUT", "/clone", &body));
        let link = next(&listener);
        link.send(b"\x09nonsense", &[]).expect("somebody listens");
        asked.join().expect("an answer")
    });
    assert!(asked.contains("nobody.sock"), "{asked}");
    drop(UnixListener::bind(vmm.path("stream.sock")).expect("a socket"));
    let other = request(&[json!({ "adopt_socket": vmm.path("stream.sock") })]).to_string();
    let message = api.refused("PUT", "/clone", &other);
    assert!(message.contains("stream.sock"), "{message}");
    let_run(&mut api);
}

/// Nobody answers, and the machine's own life goes on meanwhile: its event loop takes a signal.
pub fn who_is_silent_holds_nobody_up() {
    let (vmm, mut api) = parent(128, true);
    let path = vmm.path("silent.sock");
    let (listener, _file) = PacketListener::bind(path.as_ref()).expect("a socket");
    let child = json!({ "children": [{ "adopt_socket": path }] });
    let pool = json!({ "children": [{}], "pool": path });
    for (mut body, reason) in [(child, "no answer within 1ms"), (pool, "timed out")] {
        body["timeout_ms"] = 1.into();
        let message = api.refused("PUT", "/clone", &body.to_string());
        assert!(message.contains(reason), "{message}");
        drop(next(&listener));
        body["timeout_ms"] = 0.into();
        let message = api.refused("PUT", "/clone", &body.to_string());
        assert!(message.contains("timeout_ms 0"), "{message}");
        body["timeout_ms"] = 600_001.into();
        let message = api.refused("PUT", "/clone", &body.to_string());
        assert!(message.contains("timeout_ms 600001"), "{message}");
    }
    let_run(&mut api);
    let body = json!({ "children": [{}], "pool": path, "timeout_ms": 600_000 }).to_string();
    let message = std::thread::scope(|scope| {
        let asked = scope.spawn(|| api.refused("PUT", "/clone", &body));
        let link = next(&listener);
        vmm.signal(Signal::TERM);
        let deadline = Instant::now() + PATIENCE;
        let log = || std::fs::read_to_string(vmm.path("log")).expect("a log");
        while !log().contains("ending on a signal") {
            assert!(Instant::now() < deadline, "{}", log());
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(link);
        asked.join().expect("an answer")
    });
    assert!(message.contains("silent.sock"), "{message}");
}

/// A copy that is the only one waits for no word, and still does not run once nobody waits for it.
pub fn who_is_given_up_does_not_run() {
    let (vmm, mut api) = parent(128, true);
    let heir = Heir::expecting("copy", 128);
    let path = vmm.path("between.sock");
    let (listener, _file) = PacketListener::bind(path.as_ref()).expect("a socket");
    let body = request(&[json!({ "adopt_socket": path })]).to_string();
    let asked = std::thread::scope(|scope| {
        let asked = scope.spawn(|| api.refused("PUT", "/clone", &body));
        let link = next(&listener);
        let offer = loop {
            if let Some(offer) = link.receive(64 << 10).expect("an offer") {
                break offer;
            }
        };
        // It takes the offer once it is all that there is.
        heir.vmm.signal(Signal::STOP);
        let onward = PacketSocket::connect(&heir.socket).expect("somebody listens");
        let files: Vec<_> = offer.files.iter().map(AsFd::as_fd).collect();
        onward.send(&offer.bytes, &files).expect("somebody listens");
        drop(onward);
        heir.vmm.signal(Signal::CONT);
        asked.join().expect("an answer")
    });
    assert!(asked.contains("between.sock"), "{asked}");
    let log = heir.vmm.path("log");
    let ended = heir.vmm.wait();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    assert_eq!(ended.stdout, b"");
    // Noticed before it ran: afterwards it is the answer that cannot be sent.
    let log = std::fs::read_to_string(log).expect("a log");
    let reason = io::Error::from(io::ErrorKind::UnexpectedEof);
    let said = format!("there is to be no copy of the machine: {reason}");
    assert!(log.contains(&said), "{log}");
    let_run(&mut api);
}

/// The next that connects.
fn next(listener: &PacketListener) -> PacketSocket {
    loop {
        if let Some(link) = listener.accept().expect("a connection") {
            return link;
        }
    }
}

pub fn bytes_of_anybody_are_refused() {
    let mut heir = Heir::called("copy");
    let null = std::fs::File::open("/dev/null").expect("/dev/null");
    let before = heir.vmm.open_files();
    let mut words: Vec<Vec<u8>> = vec![b"go".to_vec(), vec![0xff; 60_000], vec![1], vec![0; 9]];
    // An offer as it should be but for its length, and one of another version.
    words.push(vec![1, 0xff, 0xff, 0x03, 0, 0, 0, 0, 1]);
    words.push(vec![2, 0, 0, 0, 0, 0, 0]);
    words.push(vec![1, 4, 0, 0, 0, 1, 1]);
    for word in words {
        for files in [&[][..], &[std::os::fd::AsFd::as_fd(&null)]] {
            let link = PacketSocket::connect(&heir.socket).expect("it listens");
            link.send(&word, files).expect("it listens");
            // It says why, or nothing at all, and closes.
            loop {
                match link.receive(1 << 16) {
                    Ok(_) => {}
                    Err(error) => {
                        break assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
                    }
                }
            }
        }
    }
    // Too much for a message, and nothing at all.
    let link = PacketSocket::connect(&heir.socket).expect("it listens");
    link.send(&vec![1; 100_000], &[]).expect("it listens");
    drop(PacketSocket::connect(&heir.socket).expect("it listens"));
    assert_eq!(heir.api.state(), "Not started");
    assert!(heir.vmm.open_files_fall_to(before, &mut heir.api));
    let (_vmm, mut api) = parent(128, true);
    clone(&mut api, &request(&[heir.child()]));
    let_run(&mut heir.api);
}
