//! A guest that does what it should not.

use std::io::{Read, Write};

use proptest::prelude::*;

use super::driver::*;
use crate::virtio::device::{DeviceError, Progress, VirtioDevice};
use crate::virtio::queue::QueueError;
use crate::virtio::testing::RawDescriptor;
use crate::virtio::vsock::muxer::MAX_CONNECTIONS;
use crate::virtio::vsock::packet::{Header, Op};

#[test]
fn packets_of_others_are_dropped_or_refused() {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    let good = packet(Op::Request, 1000, 52);
    rig.send(&Header { src_cid: 4, ..good }, b"");
    assert!(rig.inbox.is_empty());
    for bad in [
        Header { dst_cid: 9, ..good },
        Header { kind: 2, ..good },
        Header { kind: 0, ..good },
        Header { op: None, ..good },
        Header {
            src_port: u32::MAX,
            ..good
        },
        Header {
            dst_port: u32::MAX,
            ..good
        },
        // It cannot have forwarded anything yet.
        Header { fwd_cnt: 1, ..good },
        packet(Op::Response, 1000, 52),
        packet(Op::Shutdown, 1000, 52),
        packet(Op::CreditUpdate, 1000, 52),
        packet(Op::CreditRequest, 1000, 52),
        packet(Op::Rw, 1000, 52),
    ] {
        rig.send(&bad, b"");
        let (rst, _) = rig.expect(Op::Rst);
        assert_eq!((rst.src_cid, rst.kind), (bad.dst_cid, bad.kind));
        assert_eq!((rst.src_port, rst.dst_port), (bad.dst_port, bad.src_port));
        rig.send(
            &Header {
                op: Some(Op::Rst),
                ..bad
            },
            b"",
        );
        assert!(rig.inbox.is_empty(), "an RST was answered");
    }
    assert_eq!(rig.device.muxer.connections(), 0);
    rig.connect(1000, &listener, 52);
}

/// CVE-2019-18960: a packet's length was believed, whatever its descriptors had.
#[test]
fn cve_2019_18960_a_length_that_lies_ends_the_connection() {
    for len in [1, 5, 1 << 16, u32::MAX] {
        let mut rig = Rig::new();
        let listener = rig.serve(52);
        let _server = rig.connect(1000, &listener, 52);
        let lie = Header {
            len: len + u32::from(len < u32::MAX),
            ..packet(Op::Rw, 1000, 52)
        };
        rig.send(&lie, b"x");
        rig.expect(Op::Rst);
        assert_eq!(rig.device.muxer.connections(), 0);
        rig.send(&lie, b"x");
        rig.expect(Op::Rst);
    }
}

#[test]
fn a_second_request_for_a_connection_ends_it() {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    let _server = rig.connect(1000, &listener, 52);
    rig.send(&packet(Op::Request, 1000, 52), b"");
    rig.expect(Op::Rst);
    assert_eq!(rig.device.muxer.connections(), 0);
    rig.connect(1000, &listener, 52);
}

#[test]
fn a_flood_of_requests_is_bounded() {
    let mut rig = Rig::new();
    let _listener = rig.serve(52);
    let mut refused = 0;
    for port in 0..MAX_CONNECTIONS as u32 + 100 {
        rig.send(&packet(Op::Request, port, 52), b"");
        match rig.inbox.pop_front().unwrap().0.op {
            Some(Op::Rst) => refused += 1,
            Some(Op::Response) => assert_eq!(refused, 0),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(refused, 100);
    assert_eq!(rig.device.muxer.connections(), MAX_CONNECTIONS);
    // Clients of the host are refused as well, until there is room.
    let mut client = rig.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    rig.run();
    assert!(rig.inbox.is_empty());
    rig.send(&packet(Op::Rst, 0, 52), b"");
    let mut client = rig.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    rig.run();
    rig.expect(Op::Request);
}

#[test]
fn refusals_that_are_not_taken_stop_the_guest_not_the_host() {
    let mut rig = Rig::new();
    rig.refill = false;
    let mut refused = 0;
    // No buffers to take the refusals, beyond those offered at the start.
    for round in 0..100 {
        while rig.free_tx() > 0 {
            rig.queue(&packet(Op::Request, refused, 52), b"");
            refused += 1;
        }
        rig.run();
        if rig.free_tx() == 0 {
            break;
        }
        assert!(round < 99, "the guest was never stopped");
    }
    assert!(refused < 500);
    assert!(rig.driver.queues[TX].kicks_suppressed());
    rig.refill = true;
    // A kick of the receive queue alone sets all in motion again.
    rig.offer_rx(RX_BUFFERS);
    // There is room again: the transmit queue goes on without a kick of its own.
    assert_eq!(rig.device.process_queue(RX).unwrap(), Progress::Again);
    rig.collect();
    rig.offer_rx(RX_BUFFERS);
    while rig.device.process_queue(RX).unwrap() == Progress::Again || rig.collect() {
        rig.offer_rx(RX_BUFFERS);
    }
    assert_eq!(rig.inbox.len(), refused as usize);
    assert_eq!(rig.free_tx(), 32);
    let mut ports: Vec<_> = rig.inbox.iter().map(|p| p.0.dst_port).collect();
    ports.dedup();
    assert_eq!(ports.len(), refused as usize);
}

#[test]
fn work_of_one_call_is_bounded() {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    let _server = rig.connect(1000, &listener, 52);
    // One descriptor for each packet, all of the same bytes.
    let bytes = packet(Op::CreditUpdate, 1000, 52).to_bytes();
    let buffer = rig.driver.readable(&bytes);
    for _ in 0..200 {
        rig.driver.queues[TX].offer(&[buffer]);
    }
    assert_eq!(rig.device.process_queue(TX).unwrap(), Progress::Again);
    let first = rig.driver.queues[TX].used().len();
    assert!(0 < first && first < 200);
    rig.run();
}

#[test]
fn churn_without_receive_buffers_leaves_nothing_behind() {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    rig.refill = false;
    for _ in 0..1000 {
        rig.send(&packet(Op::Request, 1000, 52), b"");
        rig.send(&packet(Op::Rst, 1000, 52), b"");
        drop(listener.accept().unwrap());
    }
    // The receive buffers took the first answers; all others died with their connections.
    assert!(!rig.device.muxer.has_rx());
    assert_eq!(rig.device.muxer.connections(), 0);
}

/// Breaks the device with what `spoil` does, and has it work again after a reset.
fn broken(spoil: impl FnOnce(&mut Rig), check: impl FnOnce(DeviceError)) {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    let _server = rig.connect(1000, &listener, 52);
    spoil(&mut rig);
    check(rig.try_run().unwrap_err());
    rig.device.reset();
    rig.refill = true;
    rig.activate();
    rig.connect(1000, &listener, 52);
}

#[test]
fn a_malformed_transmit_ring_needs_a_reset() {
    let outside = RawDescriptor {
        addr: 1 << 40,
        len: 44,
        flags: 0,
        next: 0,
    };
    broken(
        |rig| {
            rig.driver.queues[TX].write_descriptor(9, outside);
            rig.driver.queues[TX].publish(9);
        },
        |error| {
            assert!(matches!(
                error,
                DeviceError::Queue {
                    index: TX,
                    source: QueueError::OutsideMemory { head: 9, .. }
                }
            ));
        },
    );
    broken(
        |rig| rig.driver.queues[TX].set_avail_idx(5000),
        |error| assert!(matches!(error, DeviceError::Queue { index: TX, .. })),
    );
    let looped = RawDescriptor {
        addr: 0,
        len: 1,
        flags: 1,
        next: 9,
    };
    broken(
        |rig| {
            rig.driver.queues[TX].write_descriptor(9, looped);
            rig.driver.queues[TX].publish(9);
        },
        |error| {
            assert!(matches!(
                error,
                DeviceError::Queue {
                    index: TX,
                    source: QueueError::Malformed { head: 9 }
                }
            ));
        },
    );
}

#[test]
fn a_receive_buffer_without_room_needs_a_reset() {
    for len in [1, 43, 44] {
        broken(
            |rig| {
                rig.refill = false;
                // Use up the good ones.
                for port in 0..RX_BUFFERS as u32 {
                    rig.send(&packet(Op::Rw, 5000 + port, 1), b"");
                }
                let small = rig.driver.writable(len);
                rig.driver.queues[RX].offer(&[small]);
                rig.queue(&packet(Op::Rw, 1, 1), b"");
            },
            |error| {
                assert!(matches!(
                    error,
                    DeviceError::Queue {
                        index: RX,
                        source: QueueError::Malformed { .. }
                    }
                ));
            },
        );
    }
}

#[test]
fn a_chain_too_short_for_a_header_is_passed_over() {
    let mut rig = Rig::new();
    let listener = rig.serve(52);
    let short = rig.driver.readable(&[0; 20]);
    let wrong_way = rig.driver.writable(44);
    let heads = [short, wrong_way].map(|b| rig.driver.queues[TX].offer(&[b]));
    let _ = rig.device.process_queue(TX).unwrap();
    let used: Vec<_> = rig.driver.queues[TX].used();
    assert_eq!(used, heads.map(|head| (head, 0)));
    rig.connect(1000, &listener, 52);
}

/// Headers near what is valid, so that connections come and go.
fn any_header() -> impl Strategy<Value = (Header, usize)> {
    let number = || prop_oneof![4 => 0u32..20_000, 1 => any::<u32>()];
    (
        (
            prop_oneof![9 => Just(GUEST_CID), 1 => any::<u64>()],
            prop_oneof![9 => Just(2), 1 => any::<u64>()],
        ),
        (
            0u32..3,
            prop_oneof![4 => Just(52u32), 1 => any::<u32>(), 1 => (1u32 << 30)..(1 << 30) + 4],
        ),
        prop_oneof![9 => Just(1u16), 1 => any::<u16>()],
        prop_oneof![1 => Just(None), 20 => (0usize..7).prop_map(Some)],
        (0u32..5, number(), prop_oneof![4 => Just(0), 1 => number()]),
        (0usize..20_000, any::<bool>()),
    )
        .prop_map(
            |(cids, ports, kind, op, (flags, buf_alloc, fwd_cnt), (len, lie))| {
                use Op::*;
                let ops = [
                    Request,
                    Response,
                    Rst,
                    Shutdown,
                    Rw,
                    CreditUpdate,
                    CreditRequest,
                ];
                let header = Header {
                    src_cid: cids.0,
                    dst_cid: cids.1,
                    src_port: ports.0,
                    dst_port: ports.1,
                    len: (len + usize::from(lie)) as u32,
                    kind,
                    op: op.map(|index| ops[index]),
                    flags,
                    buf_alloc,
                    fwd_cnt,
                };
                (header, len)
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]
    #[test]
    fn no_packet_breaks_the_device(
        packets in proptest::collection::vec((any_header(), 0u8..8), 1..200),
    ) {
        let mut rig = Rig::new();
        let listener = rig.serve(52);
        let mut hosts = Vec::new();
        let data = vec![7; 20_000];
        for ((header, len), host) in packets {
            rig.send(&header, &data[..len]);
            // Hosts come, write, read, stay silent and leave.
            match (host, hosts.pop()) {
                (0, _) => {
                    let mut client = rig.client();
                    client.write_all(b"CONNECT 1\n").unwrap();
                    hosts.insert(0, client);
                }
                (1, Some(mut stream)) => {
                    let _ = stream.write(&data);
                    hosts.insert(0, stream);
                }
                (2, Some(mut stream)) => {
                    let _ = stream.read(&mut [0; 30_000]);
                    hosts.insert(0, stream);
                }
                (3, _) => {}
                (_, stream) => hosts.extend(stream),
            }
            while let Ok((stream, _)) = listener.accept() {
                stream.set_nonblocking(true).unwrap();
                hosts.push(stream);
            }
            rig.run();
        }
        prop_assert!(rig.device.muxer.connections() <= 200);
        rig.device.reset();
        rig.activate();
        while listener.accept().is_ok() {}
        rig.connect(1000, &listener, 52);
    }
}
