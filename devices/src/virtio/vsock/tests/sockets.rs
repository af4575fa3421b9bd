//! Host sockets, both ways round.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::driver::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::vsock::connection::{REQUEST_TIMEOUT, SHUTDOWN_TIMEOUT};
use crate::virtio::vsock::handshake::{Line, MAX_WAITING};
use crate::virtio::vsock::muxer::{LARGE_BUFFER, LARGE_BUFFERS, SMALL_BUFFER};
use crate::virtio::vsock::packet::{Header, Op, ShutdownFlags};

/// All that can be read now; whether that is all there will be.
fn drain(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => (bytes, true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => (bytes, false),
        Err(error) => panic!("{error}"),
    }
}

/// A client's connection to `port`, accepted by the guest. Returns the host's port too.
fn accepted_client(rig: &mut Rig, port: u32) -> (UnixStream, u32) {
    let mut client = rig.client();
    writeln!(client, "CONNECT {port}").unwrap();
    rig.run();
    let (request, _) = rig.expect(Op::Request);
    assert_eq!(request.dst_port, port);
    rig.send(&packet(Op::Response, port, request.src_port), b"");
    let (answer, end) = drain(&mut client);
    assert_eq!(answer, format!("OK {}\n", request.src_port).as_bytes());
    assert!(!end);
    (client, request.src_port)
}

#[test]
fn a_client_reaches_the_guest() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    // A client need not wait for the answer.
    client.write_all(b"CONNECT 1234\nearly").unwrap();
    rig.run();
    let (request, _) = rig.expect(Op::Request);
    assert_eq!((request.src_cid, request.dst_port), (2, 1234));
    assert!((1 << 30..1 << 31).contains(&request.src_port));
    assert_eq!(request.buf_alloc, LARGE_BUFFER);
    assert!(rig.inbox.is_empty());
    rig.send(&packet(Op::Response, 1234, request.src_port), b"");
    assert_eq!(rig.expect(Op::Rw).1, b"early");
    rig.send(&data_packet(1234, request.src_port, 5), b"reply");
    let expected = format!("OK {}\nreply", request.src_port);
    assert_eq!(drain(&mut client), (expected.into_bytes(), false));
}

#[test]
fn a_client_that_is_refused_reads_an_end() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.write_all(b"connect 7\n").unwrap();
    rig.run();
    let (request, _) = rig.expect(Op::Request);
    rig.send(&packet(Op::Rst, 7, request.src_port), b"");
    assert_eq!(drain(&mut client), (vec![], true));
    assert_eq!(rig.device.muxer.connections(), 0);
}

#[test]
fn lines() {
    let connect = |port, len| Line::Connect { port, len };
    for (bytes, expected) in [
        (&b"CONNECT 52\n"[..], connect(52, 11)),
        (b"Connect  0052 \r\nrest", connect(52, 16)),
        (b"CONNECT 4294967294\n", connect(4294967294, 19)),
        (b"CONNECT 52", Line::Incomplete),
        (b"", Line::Incomplete),
        (b"CONNECT                52 xxxxx", Line::Incomplete),
        (b"CONNECT                       52", Line::Malformed),
        (b"CONNECT                       5\n", connect(5, 32)),
        (b"CONNECT                        5\n", Line::Malformed),
        (b"CONNECT 4294967295\n", Line::Malformed),
        (b"CONNECT 4294967296\n", Line::Malformed),
        (b"CONNECT +5\n", Line::Malformed),
        (b"CONNECT -1\n", Line::Malformed),
        (b"CONNECT 5 6\n", Line::Malformed),
        (b"CONNECT\n", Line::Malformed),
        (b"CONNECT52\n", Line::Malformed),
        (b"GET / HTTP/1.1\r\n", Line::Malformed),
        (b"CONNECT \xff\xfe\n", Line::Malformed),
        (b"\n", Line::Malformed),
        (b"\0\0\0\n", Line::Malformed),
    ] {
        assert_eq!(Line::parse(bytes), expected, "{:?}", bytes.escape_ascii());
    }
}

#[test]
fn clients_that_do_not_speak_the_protocol_are_closed() {
    let mut rig = Rig::new();
    for line in [&b"HELLO\n"[..], &[b'x'; 32], b"CONNECT 4294967295\n"] {
        let mut client = rig.client();
        client.write_all(line).unwrap();
        rig.run();
        let mut byte = [0];
        // Bytes of ours it did not read make this an error instead of an end.
        assert!(!matches!(client.read(&mut byte), Err(e) if e.kind() == ErrorKind::WouldBlock));
    }
    // One that dribbles is served all the same; one that leaves is forgotten.
    drop(rig.client());
    let mut slow = rig.client();
    for byte in b"CONNECT 9\n" {
        assert!(rig.inbox.is_empty());
        slow.write_all(&[*byte]).unwrap();
        rig.run();
    }
    assert_eq!(rig.expect(Op::Request).0.dst_port, 9);
}

#[test]
fn silent_clients_make_room_for_others() {
    let mut rig = Rig::new();
    let mut silent: Vec<_> = (0..MAX_WAITING)
        .map(|_| {
            let client = rig.client();
            rig.run();
            client
        })
        .collect();
    let mut late = rig.client();
    rig.run();
    assert_eq!(drain(&mut silent[0]), (vec![], true));
    assert_eq!(drain(&mut silent[1]), (vec![], false));
    for (client, port) in [(&mut late, 1), (&mut silent[1], 2)] {
        writeln!(client, "CONNECT {port}").unwrap();
        rig.run();
        assert_eq!(rig.expect(Op::Request).0.dst_port, port);
    }
}

#[test]
fn two_hundred_clients_at_once() {
    let mut rig = Rig::new();
    let mut clients: Vec<_> = (0..200).map(|_| rig.client()).collect();
    for (port, client) in clients.iter_mut().enumerate() {
        writeln!(client, "CONNECT {port}").unwrap();
    }
    rig.run();
    let mut requests: Vec<Header> = rig.inbox.drain(..).map(|p| p.0).collect();
    assert_eq!(requests.len(), 200);
    requests.sort_by_key(|r| r.dst_port);
    for (chunk, at) in requests.chunks(16).zip((0u32..).step_by(16)) {
        for (request, port) in chunk.iter().zip(at..) {
            assert_eq!((request.op, request.dst_port), (Some(Op::Request), port));
            rig.queue(&packet(Op::Response, port, request.src_port), b"");
        }
        rig.run();
    }
    let large = requests.iter().filter(|r| r.buf_alloc == LARGE_BUFFER);
    assert_eq!(large.count(), LARGE_BUFFERS);
    assert!(requests.iter().any(|r| r.buf_alloc == SMALL_BUFFER));
    for (port, client) in clients.iter_mut().enumerate() {
        writeln!(client, "I am {port}").unwrap();
    }
    rig.run();
    let mut said: Vec<_> = rig.inbox.drain(..).map(|(h, d)| (h.dst_port, d)).collect();
    said.sort();
    for ((port, line), number) in said.into_iter().zip(0..200) {
        assert_eq!(
            (port, line),
            (number, format!("I am {number}\n").into_bytes())
        );
    }
    for (client, request) in clients.iter_mut().zip(&requests) {
        assert_eq!(
            drain(client).0,
            format!("OK {}\n", request.src_port).into_bytes()
        );
    }
    drop(clients);
    rig.run();
    for (header, _) in std::mem::take(&mut rig.inbox) {
        assert_eq!((header.op, header.flags), (Some(Op::Shutdown), 3));
        rig.send(&packet(Op::Rst, header.dst_port, header.src_port), b"");
    }
    assert_eq!(rig.device.muxer.connections(), 0);
    assert_eq!(rig.device.metrics().conns_removed.get(), 200);
}

#[test]
fn the_guest_reaches_a_server() {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    let mut server = rig.connect(1000, &listener, 52);
    rig.send(&data_packet(1000, 52, 4), b"ping");
    assert_eq!(drain(&mut server), (b"ping".to_vec(), false));
    server.write_all(b"pong").unwrap();
    rig.run();
    assert_eq!(rig.expect(Op::Rw).1, b"pong");
    // Both halves, one after the other.
    server.shutdown(Shutdown::Write).unwrap();
    rig.run();
    let (shutdown, _) = rig.expect(Op::Shutdown);
    assert_eq!(
        ShutdownFlags::parse(shutdown.flags),
        ShutdownFlags {
            receive: false,
            send: true
        }
    );
    rig.send(&data_packet(1000, 52, 4), b"last");
    let mut end = packet(Op::Shutdown, 1000, 52);
    end.flags = 3;
    rig.send(&end, b"");
    assert_eq!(drain(&mut server), (b"last".to_vec(), true));
    rig.expect(Op::Rst);
    assert_eq!(rig.device.muxer.connections(), 0);
}

#[test]
fn a_server_that_is_not_there_refuses() {
    let mut rig = Rig::new();
    rig.send(&packet(Op::Request, 1000, 52), b"");
    let (rst, _) = rig.expect(Op::Rst);
    assert_eq!((rst.src_cid, rst.src_port, rst.dst_port), (2, 52, 1000));
    // Not listening any more.
    drop(rig.serve(53));
    rig.send(&packet(Op::Request, 1000, 53), b"");
    rig.expect(Op::Rst);
    // Not a socket.
    std::fs::write(rig.dir.as_path().join("v.sock_54"), "").unwrap();
    rig.send(&packet(Op::Request, 1000, 54), b"");
    rig.expect(Op::Rst);
    assert_eq!(rig.device.muxer.connections(), 0);
}

#[test]
fn a_slow_reader_on_the_host_loses_nothing() {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    let mut server = rig.connect(1000, &listener, 52);
    let chunk = |i: u8| vec![i; 32 << 10];
    // More than the socket takes, within credit.
    let mut sent = 0;
    for i in 0..8 {
        rig.send(&data_packet(1000, 52, 32 << 10), &chunk(i));
        sent += 32 << 10;
    }
    let mut credit = LARGE_BUFFER;
    let mut got = Vec::new();
    for i in 8..200u8 {
        if sent + (32 << 10) > credit {
            got.extend(drain(&mut server).0);
            rig.run();
        }
        if let Some((header, _)) = rig.inbox.pop_back() {
            assert_eq!(header.op, Some(Op::CreditUpdate));
            credit = header.buf_alloc + header.fwd_cnt;
        }
        assert!(sent + (32 << 10) <= credit, "no credit came back");
        rig.send(&data_packet(1000, 52, 32 << 10), &chunk(i));
        sent += 32 << 10;
    }
    // The guest leaves: what it sent still arrives.
    let mut end = packet(Op::Shutdown, 1000, 52);
    end.flags = 3;
    rig.send(&end, b"");
    assert_eq!(rig.inbox.pop_back().unwrap().0.op, Some(Op::Rst));
    loop {
        let (bytes, end) = drain(&mut server);
        got.extend(bytes);
        if end {
            break;
        }
        rig.run();
    }
    let expected: Vec<u8> = (0..200).flat_map(chunk).collect();
    assert!(got == expected);
    assert_eq!(rig.device.muxer.connections(), 0);
    assert_eq!(rig.device.metrics().tx_bytes_count.get(), got.len() as u64);
}

#[test]
fn without_receive_buffers_everything_waits_and_nothing_freezes() {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    let mut streams: Vec<_> = (0..4)
        .map(|i| rig.connect(1000 + i, &listener, 52))
        .collect();
    assert!(rig.driver.queues[RX].kicks_suppressed());
    rig.refill = false;
    // The buffers that are there, and then more.
    let payload = vec![5; 100_000];
    for stream in &mut streams {
        stream.write_all(&payload).unwrap();
    }
    rig.run();
    rig.run();
    assert_eq!(rig.inbox.len(), RX_BUFFERS);
    // Kicks of the receive queue are wanted now.
    assert!(!rig.driver.queues[RX].kicks_suppressed());
    let mut got = [0; 4];
    loop {
        for (header, data) in std::mem::take(&mut rig.inbox) {
            assert_eq!(header.op, Some(Op::Rw));
            got[header.dst_port as usize - 1000] += data.len();
        }
        if got.iter().sum::<usize>() == 4 * payload.len() {
            break;
        }
        rig.offer_rx(3);
        let _ = rig.device.process_queue(RX).unwrap();
        rig.collect();
        assert!(!rig.inbox.is_empty());
    }
    assert_eq!(got, [payload.len(); 4]);
    rig.offer_rx(1);
    let _ = rig.device.process_queue(RX).unwrap();
    assert!(rig.driver.queues[RX].kicks_suppressed());
}

#[test]
fn connections_take_turns() {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    let mut streams: Vec<_> = (0..3)
        .map(|i| rig.connect(1000 + i, &listener, 52))
        .collect();
    rig.refill = false;
    streams[0].write_all(&[1; 200_000]).unwrap();
    rig.run();
    for stream in &mut streams[1..] {
        stream.write_all(b"me too").unwrap();
    }
    rig.inbox.clear();
    rig.offer_rx(40);
    rig.run();
    let ports: Vec<_> = rig.inbox.iter().map(|p| p.0.dst_port).collect();
    assert!(ports.contains(&1001) && ports.contains(&1002), "{ports:?}");
}

#[test]
fn a_host_that_leaves_is_told_and_a_silent_guest_is_left() {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    drop(rig.connect(1000, &listener, 52));
    rig.run();
    let (shutdown, _) = rig.expect(Op::Shutdown);
    assert_eq!(shutdown.flags, 3);
    rig.device.muxer.expire(Instant::now() + SHUTDOWN_TIMEOUT);
    rig.run();
    rig.expect(Op::Rst);
    assert_eq!(rig.device.metrics().conns_killed.get(), 1);
    // What the guest sends now finds nobody.
    rig.send(&data_packet(1000, 52, 1), b"x");
    rig.expect(Op::Rst);
}

/// Waits, for so many milliseconds, as the event loop does. Returns how many descriptors have something to do.
pub fn edges(rig: &Rig) -> impl Fn(i32) -> usize + use<> {
    let epoll = Epoll::new().unwrap();
    let source = rig.device.sources()[0];
    let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
    epoll.ctl(ControlOperation::Add, source, event).unwrap();
    move |timeout| {
        let mut events = [EpollEvent::default(); 4];
        epoll.wait(timeout, &mut events).unwrap()
    }
}

#[test]
fn the_one_descriptor_tells_of_everything() {
    let mut rig = Rig::new();
    let wait = edges(&rig);
    while wait(0) > 0 {
        rig.run();
    }
    let mut client = rig.client();
    assert_eq!(wait(5_000), 1);
    rig.run();
    while wait(0) > 0 {
        rig.run();
    }
    writeln!(client, "CONNECT 5").unwrap();
    assert_eq!(wait(5_000), 1);
    rig.run();
    rig.expect(Op::Request);
    // The guest does not answer: the timer goes off, in its time.
    let start = Instant::now();
    while rig.device.muxer.connections() > 0 {
        assert!(wait(10_000) > 0);
        rig.run();
    }
    assert!(start.elapsed() > REQUEST_TIMEOUT - Duration::from_millis(100));
    rig.expect(Op::Rst);
    assert_eq!(drain(&mut client), (vec![], true));
}

#[test]
fn a_reset_ends_all_and_the_device_works_again() {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    let mut server = rig.connect(1000, &listener, 52);
    let (mut client, _) = accepted_client(&mut rig, 8);
    let mut silent = rig.client();
    rig.run();
    rig.device.reset();
    for stream in [&mut server, &mut client, &mut silent] {
        assert_eq!(drain(stream), (vec![], true));
    }
    assert_eq!(rig.device.muxer.connections(), 0);
    // A client that comes while there is no driver waits for it.
    let mut early = rig.client();
    early.write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(
        rig.device.process_source(0).unwrap(),
        crate::virtio::device::Progress::Done
    );
    rig.activate();
    assert_eq!(rig.expect(Op::Request).0.dst_port, 9);
    accepted_client(&mut rig, 8);
}

#[test]
fn a_transport_reset_is_told_once_there_is_a_buffer() {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    let mut server = rig.connect(1000, &listener, 52);
    rig.device.transport_reset().unwrap();
    assert_eq!(drain(&mut server), (vec![], true));
    let tiny = rig.driver.writable(3);
    let buffer = rig.driver.writable(8);
    let spare = rig.driver.writable(8);
    let heads = [tiny, buffer, spare].map(|b| rig.driver.queues[EVENT].offer(&[b]));
    let _ = rig.device.process_queue(EVENT).unwrap();
    assert_eq!(
        rig.driver.queues[EVENT].used(),
        [(heads[0], 0), (heads[1], 4)]
    );
    assert_eq!(rig.driver.bytes(buffer)[..4], [0; 4]);
    let _ = rig.device.process_queue(EVENT).unwrap();
    assert_eq!(rig.driver.queues[EVENT].used(), []);
    rig.device.transport_reset().unwrap();
    assert_eq!(rig.driver.queues[EVENT].used(), [(heads[2], 4)]);
    // Until the guest has read it, nobody reaches it.
    let mut early = rig.client();
    early.write_all(b"CONNECT 9\n").unwrap();
    rig.run();
    let _ = rig.device.process_queue(EVENT).unwrap();
    rig.run();
    assert!(rig.inbox.is_empty(), "{:?}", rig.inbox);
    rig.driver.queues[EVENT].offer(&[spare]);
    let _ = rig.device.process_queue(EVENT).unwrap();
    rig.run();
    assert_eq!(rig.expect(Op::Request).0.dst_port, 9);
    accepted_client(&mut rig, 8);
}

#[test]
fn a_guest_that_does_not_read_events_is_reached_in_the_end() {
    let mut rig = Rig::new();
    let wait = edges(&rig);
    rig.device.reset_patience = Duration::from_millis(200);
    rig.device.transport_reset().unwrap();
    let mut early = rig.client();
    early.write_all(b"CONNECT 9\n").unwrap();
    let start = Instant::now();
    rig.run();
    while rig.inbox.is_empty() {
        assert!(wait(10_000) > 0);
        rig.run();
    }
    assert!(start.elapsed() >= Duration::from_millis(200));
    assert_eq!(rig.expect(Op::Request).0.dst_port, 9);
}

#[test]
fn configuration_space_is_the_cid() {
    let mut rig = Rig::new();
    let mut all = [0xff; 12];
    rig.device.read_config(0, &mut all);
    assert_eq!(all, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut high = [0xff; 4];
    rig.device.read_config(u64::MAX - 1, &mut high);
    assert_eq!(high, [0; 4]);
    rig.device.write_config(0, &[9; 8]);
    rig.device.read_config(0, &mut high);
    assert_eq!(high, [3, 0, 0, 0]);
}
