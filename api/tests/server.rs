//! The server on a real socket, against clients that behave and clients that do not.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use lepton_api::{Action, Client, Fault, Reply, Server, StopHandle};

/// No reply may take longer; reached only when a test fails.
const PATIENCE: Duration = Duration::from_secs(30);
const LARGE: usize = 100_000;

fn handle(action: Action) -> Result<Reply, Fault> {
    match action {
        Action::GetInstanceInfo => Ok(Reply::Json(r#"{"id":"a"}"#.to_owned())),
        Action::GetVmConfig => Ok(Reply::Json(format!("[{}]", " ".repeat(LARGE - 2)))),
        Action::GetMetrics => Ok(Reply::Text {
            content_type: "application/openmetrics-text; version=1.0.0; charset=utf-8",
            body: "# EOF\n".to_owned(),
        }),
        Action::FlushMetrics => Err(Fault::bad_request("no \"target\"")),
        _ => Ok(Reply::NoContent),
    }
}

struct Running {
    // Before the folder, which it lies in.
    path: PathBuf,
    stop: StopHandle,
    thread: Option<JoinHandle<Server>>,
    _folder: tempfile::TempDir,
}

fn start() -> Running {
    start_with(|_| {})
}

fn start_with(configure: impl FnOnce(&mut Server)) -> Running {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let mut server = Server::from_listener(UnixListener::bind(&path).unwrap()).unwrap();
    configure(&mut server);
    let stop = server.stop_handle().unwrap();
    let thread = std::thread::spawn(move || {
        server.serve(handle).unwrap();
        server
    });
    Running {
        path,
        stop,
        thread: Some(thread),
        _folder: folder,
    }
}

impl Running {
    fn stream(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn client(&self) -> Client {
        Client::from_stream(self.stream())
    }

    /// Sends these bytes and reads until the server closes.
    fn exchange(&self, bytes: &[u8]) -> String {
        let mut stream = self.stream();
        stream.write_all(bytes).unwrap();
        read_to_end(&mut stream)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stop.stop().unwrap();
            // A failed test says why by itself.
            let _ = thread.join();
        }
    }
}

fn read_to_end(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn assert_serves(client: &mut Client) {
    assert_eq!(client.get("/").unwrap(), (200, r#"{"id":"a"}"#.to_owned()));
}

#[test]
fn one_client_many_requests() {
    let server = start();
    let mut client = server.client();
    assert_serves(&mut client);
    let vsock = r#"{"guest_cid": 3, "uds_path": "/v"}"#;
    assert_eq!(client.put("/vsock", vsock).unwrap(), (204, String::new()));
    assert_eq!(
        client
            .put("/actions", r#"{"action_type": "FlushMetrics"}"#)
            .unwrap(),
        (400, r#"{"fault_message":"no \"target\""}"#.to_owned())
    );
    assert_eq!(
        client.patch("/nothing", "{}").unwrap(),
        (
            400,
            r#"{"fault_message":"Invalid request method and/or path: PATCH /nothing."}"#.to_owned()
        )
    );
    assert_eq!(client.get("/metrics").unwrap(), (200, "# EOF\n".to_owned()));
    assert_eq!(client.get("/vm/config").unwrap().1.len(), LARGE);
    assert_eq!(
        client.patch("/vm", r#"{"state": "Paused"}"#).unwrap().0,
        204
    );
    assert_serves(&mut client);
}

#[test]
fn replies_as_they_stand_on_the_wire() {
    let server = start();
    let vsock = r#"{"vsock_id": "a", "guest_cid": 3, "uds_path": "/v"}"#;
    assert_eq!(
        server.exchange(
            format!(
                "PUT /vsock HTTP/1.1\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{vsock}",
                vsock.len()
            )
            .as_bytes()
        ),
        "HTTP/1.1 204 No Content\r\nServer: Lepton API\r\nConnection: close\r\nDeprecation: true\r\n\r\n"
    );
    assert_eq!(
        server.exchange(b"GET /metrics HTTP/1.0\r\n\r\n"),
        "HTTP/1.1 200 OK\r\nServer: Lepton API\r\nConnection: close\r\n\
         Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\nContent-Length: 6\r\n\r\n# EOF\n"
    );
    assert_eq!(
        server
            .exchange(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET / HTTP/1.0\r\n\r\n")
            .matches("200 OK")
            .count(),
        2
    );
    let head = server.exchange(b"HEAD / HTTP/1.0\r\n\r\n");
    assert!(
        head.starts_with("HTTP/1.1 400 ") && head.ends_with("\r\n\r\n"),
        "{head}"
    );
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let server = start();
    let mut stream = server.stream();
    stream
        .write_all(b"GET / HTTP/1.1\r\n\r\nGET /x HTTP/1.1\r\n\r\nPATCH /vm HTTP/1.1\r\nContent-Length: 19\r\n\r\n{\"state\": \"Paused\"}GET /vm/config HTTP/1.1\r\n\r\n")
        .unwrap();
    let mut client = Client::from_stream(stream);
    let statuses: Vec<_> = (0..4).map(|_| client.reply().unwrap().0).collect();
    assert_eq!(statuses, [200, 400, 204, 200]);
}

#[test]
fn a_slow_client_does_not_hold_up_others() {
    let server = start();
    let mut slow = server.stream();
    let mut other = server.client();
    for byte in b"PATCH /vm HTTP/1.1\r\nContent-Length: 19\r\n\r\n{\"state\": \"Paused\"}" {
        slow.write_all(&[*byte]).unwrap();
        assert_serves(&mut other);
    }
    assert_eq!(Client::from_stream(slow).reply().unwrap().0, 204);
}

#[test]
fn a_client_that_does_not_read_does_not_hold_up_others() {
    let server = start();
    let mut deaf = server.stream();
    deaf.set_nonblocking(true).unwrap();
    // Until neither the server nor the kernel takes any more.
    let mut sent = 0;
    let request = b"GET /vm/config HTTP/1.1\r\n\r\n";
    let mut other = server.client();
    let mut refusals = 0;
    while refusals < 3 {
        match deaf.write(&request[sent % request.len()..]) {
            Ok(length) => {
                sent += length;
                refusals = 0;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                refusals += 1;
                // Gives the server a turn.
                assert_serves(&mut other);
            }
        }
        assert!(sent < 64 << 20, "the server takes requests without end");
    }
    deaf.set_nonblocking(false).unwrap();
    let mut client = Client::from_stream(deaf);
    for _ in 0..sent / request.len() {
        assert_eq!(client.reply().unwrap().1.len(), LARGE);
    }
}

#[test]
fn two_hundred_clients() {
    let server = start();
    let mut clients: Vec<_> = (0..200).map(|_| server.client()).collect();
    for client in &mut clients {
        assert_serves(client);
    }
    // And all at once.
    std::thread::scope(|scope| {
        for client in &mut clients {
            scope.spawn(|| {
                for _ in 0..10 {
                    assert_serves(client);
                }
            });
        }
    });
}

#[test]
fn too_many_clients_are_told() {
    let server = start_with(|server| server.set_max_connections(2));
    let mut first = server.client();
    let mut second = server.client();
    assert_serves(&mut first);
    assert_serves(&mut second);
    let mut third = server.client();
    let (status, body) = third.get("/").unwrap();
    assert_eq!(status, 503);
    assert_eq!(
        body,
        r#"{"fault_message":"Too many open connections: the limit is 2."}"#
    );
    assert!(third.reply().is_err(), "the connection is closed");
    assert_serves(&mut first);
    drop(third);
    drop(second);
    assert_serves(&mut server.client());
}

#[test]
fn clients_that_leave_are_forgotten() {
    let server = start_with(|server| server.set_max_connections(1));
    for bytes in [
        "",
        "GE",
        "PUT /vsock HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc",
        "GET / HTTP/1.1\r\n\r\n",
    ] {
        server.stream().write_all(bytes.as_bytes()).unwrap();
        // There is one place, and it is free once the server has seen that the client before left. Each refusal takes
        // the server round its loop.
        let served = (0..100).any(|_| matches!(server.client().get("/"), Ok((200, _))));
        assert!(served, "{bytes:?}");
    }
}

#[test]
fn a_client_may_end_its_side_first() {
    let server = start();
    let mut stream = server.stream();
    stream
        .write_all(b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\nGET")
        .unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut stream).matches("200 OK").count(), 2);
}

#[test]
fn oversize_bodies_are_refused_by_their_length() {
    let server = start_with(|server| server.set_max_payload(250));
    let body = " ".repeat(251);
    // A client that sends all of it, and one that waits to be told to go on.
    for (extra, body) in [("", body.as_str()), ("Expect: 100-continue\r\n", "")] {
        let reply = server.exchange(
            format!("PUT /vsock HTTP/1.1\r\nContent-Length: 251\r\n{extra}\r\n{body}").as_bytes(),
        );
        assert!(reply.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{reply}");
        assert!(
            reply.ends_with(r#"{"fault_message":"Request payload with size 251 is larger than the limit of 250 allowed by server."}"#),
            "{reply}"
        );
    }
    let body = format!("{:250}", r#"{"guest_cid": 3, "uds_path": "/v"}"#);
    assert_eq!(server.client().put("/vsock", &body).unwrap().0, 204);
}

#[test]
fn a_refused_client_can_finish_sending() {
    let server = start();
    let mut stream = server.stream();
    let body = " ".repeat(900_000);
    stream
        .write_all(
            format!(
                "PUT /vsock HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        )
        .unwrap();
    assert!(read_to_end(&mut stream).contains("size 900000 is larger than the limit of 51200"));
}

#[test]
fn malformed_requests_close_only_their_connection() {
    let server = start();
    let mut other = server.client();
    for bytes in [
        "\0\0\0",
        "GET / HTTP/3.0\r\n\r\n",
        "PUT /vsock HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "PUT /vsock HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        &"A".repeat(9000),
    ] {
        let reply = server.exchange(bytes.as_bytes());
        assert!(
            reply.starts_with("HTTP/1.1 400 Bad Request\r\n"),
            "{bytes:?}: {reply}"
        );
        assert!(reply.contains("fault_message"), "{reply}");
        assert_serves(&mut other);
    }
}

#[test]
fn a_client_may_wait_to_be_told_to_send_the_body() {
    let server = start();
    let mut stream = server.stream();
    let body = r#"{"state": "Resumed"}"#;
    stream
        .write_all(
            format!(
                "PATCH /vm HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
                body.len()
            )
            .as_bytes(),
        )
        .unwrap();
    let mut interim = [0; 25];
    stream.read_exact(&mut interim).unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(&body.as_bytes()[..5]).unwrap();
    stream.write_all(&body.as_bytes()[5..]).unwrap();
    // Told once only: the next thing is the reply.
    let mut status = [0; 12];
    stream.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 204");
}

#[test]
fn serves_again_after_a_stop() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("given.sock");
    let mut server = Server::from_listener(UnixListener::bind(&path).unwrap()).unwrap();
    let stop = server.stop_handle().unwrap();
    for _ in 0..2 {
        // Connected before anyone serves: waits in the queue.
        let mut client = Client::connect(&path).unwrap();
        client.set_timeout(Some(PATIENCE)).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| server.serve(handle).unwrap());
            assert_serves(&mut client);
            stop.stop().unwrap();
            thread.join().unwrap();
        });
    }
    drop(server);
    assert!(path.exists(), "not this server's to remove");
}
