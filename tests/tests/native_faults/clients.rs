//! Crowds.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use lepton_tests::{PATIENCE, Vmm};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Each of a thousand clients that are there at the same time is answered, and forgotten when it goes.
pub fn a_thousand_clients_at_once() {
    // One descriptor each here, and one in the VMM, which has its limits from us.
    let limit = getrlimit(Resource::Nofile);
    let more = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, more).expect("up to the hard limit anybody may go");
    let (vmm, mut api) = Vmm::with_api();
    let open_files = vmm.open_files();
    let mut clients: Vec<UnixStream> = (0..1000)
        .map(|_| UnixStream::connect(vmm.socket()).expect("the API listens"))
        .collect();
    for client in &mut clients {
        client.set_read_timeout(Some(PATIENCE)).expect("a socket");
        client
            .write_all(b"GET /version HTTP/1.1\r\n")
            .expect("a write");
    }
    // All are in the midst of a request. Another one comes and goes meanwhile.
    assert_eq!(api.state(), "Not started");
    for client in &mut clients {
        client.write_all(b"\r\n").expect("a write");
    }
    for client in &mut clients {
        let mut reply = [0; 12];
        client.read_exact(&mut reply).expect("a reply");
        assert_eq!(&reply, b"HTTP/1.1 200");
    }
    drop(clients);
    assert!(
        vmm.open_files_fall_to(open_files, &mut api),
        "connections are left open"
    );
    vmm.terminate();
}
