//! A process without file descriptors left. Alone in its program, because the limit is the process's.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};

use lepton_api::{Client, Fault, Reply, Server};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

#[test]
fn a_client_is_told_and_the_next_is_served_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let mut server = Server::from_listener(UnixListener::bind(&path).unwrap()).unwrap();
    let stop = server.stop_handle().unwrap();
    let thread = std::thread::spawn(move || {
        server.serve(|_| Ok::<_, Fault>(Reply::NoContent)).unwrap();
    });
    let mut first = Client::connect(&path).unwrap();
    assert_eq!(first.get("/").unwrap().0, 204);

    // The descriptor of the client to come, then none for the server.
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let limit = getrlimit(Resource::Nofile);
    let lower = Rlimit {
        current: Some(64),
        ..limit
    };
    setrlimit(Resource::Nofile, lower).unwrap();
    let fillers: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();

    rustix::net::connect(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    let mut refused = UnixStream::from(socket);
    let mut reply = String::new();
    refused.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 503 "), "{reply}");
    assert!(reply.contains("out of file descriptors"), "{reply}");
    assert_eq!(
        first.get("/").unwrap().0,
        204,
        "clients that are in stay in"
    );

    drop(fillers);
    assert_eq!(Client::connect(&path).unwrap().get("/").unwrap().0, 204);
    stop.stop().unwrap();
    thread.join().unwrap();
}
