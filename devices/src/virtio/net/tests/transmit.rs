//! Frames from the driver.

use super::*;
use crate::virtio::testing::{HOLE_END, HOLE_START};
use vm_memory::GuestAddress;

const CSUM_TSO4: u64 = VERSION_1 | 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4;

#[test]
fn frames_go_out_in_order_with_one_interrupt() {
    let mut bench = Bench::new(VERSION_1);
    let frames: Vec<_> = (0..20).map(|i| frame(14 + 75 * i, i)).collect();
    let heads: Vec<_> = frames.iter().map(|f| bench.send(&with_header(f))).collect();
    assert_eq!(bench.kick(TX), Progress::Done);
    let expected: Vec<_> = frames.iter().map(|f| with_header(f)).collect();
    assert_eq!(bench.sent(), expected);
    let used: Vec<_> = heads.into_iter().map(|head| (head, 0)).collect();
    assert_eq!(bench.driver.queues[TX].used(), used);
    assert_eq!(bench.driver.interrupts(), 1);
    let metrics = bench.net.metrics();
    assert_eq!(metrics.tx_packets_count.get(), 20);
    assert_eq!(metrics.tx_bytes_count.get(), 20 * 14 + 75 * 190);
    assert_eq!(metrics.tx_spoofed_mac_count.get(), 0);
}

#[test]
fn a_frame_may_be_cut_anywhere() {
    let bytes = with_header(&frame(300, 5));
    let mut bench = Bench::new(VERSION_1);
    for cut in 1..bytes.len() {
        bench.driver.free_all();
        let first = bench.driver.readable(&bytes[..cut]);
        let second = bench.driver.readable(&bytes[cut..]);
        bench.driver.queues[TX].offer(&[first, second]);
        assert_eq!(bench.kick(TX), Progress::Done);
        assert_eq!(bench.sent(), std::slice::from_ref(&bytes));
        assert_eq!(bench.driver.queues[TX].used().len(), 1);
    }
}

#[test]
fn a_frame_may_lie_in_several_memory_regions() {
    let bytes = with_header(&frame(4000, 6));
    let mut bench = Bench::new(VERSION_1);
    let mut buffers = Vec::new();
    for (addr, part) in [
        (HOLE_START - 1000, &bytes[..1000]),
        (HOLE_END, &bytes[1000..]),
    ] {
        let addr = GuestAddress(addr);
        bench.driver.memory.write_slice(part, addr).unwrap();
        buffers.push(Buffer {
            addr,
            len: part.len() as u32,
            writable: false,
        });
    }
    bench.driver.queues[TX].offer(&buffers);
    assert_eq!(bench.kick(TX), Progress::Done);
    assert_eq!(bench.sent(), [bytes]);
}

#[test]
fn what_is_no_frame_is_dropped_and_counted() {
    let mut bench = Bench::new(CSUM_TSO4);
    let good = with_header(&frame(60, 1));
    let mut bad_header = good.clone();
    bad_header[1] = 4;
    let mut bad_checksum = good.clone();
    bad_checksum[0] = 1;
    bad_checksum[6] = 59;
    let mut dropped = 0;
    for bytes in [
        &good[..1],
        &good[..HEADER],
        &good[..HEADER + 13],
        &bad_header,
        &bad_checksum,
        &vec![0; HEADER + 65_554],
    ] {
        bench.send(bytes);
        bench.send(&good);
        assert_eq!(bench.kick(TX), Progress::Done);
        dropped += 1;
        assert_eq!(bench.net.metrics().tx_malformed_frames.get(), dropped);
        assert_eq!(bench.sent(), std::slice::from_ref(&good));
        assert_eq!(bench.driver.queues[TX].used().len(), 2);
        bench.driver.free_all();
    }
}

#[test]
fn writable_buffers_are_no_frame() {
    let mut bench = Bench::new(VERSION_1);
    let readable = bench.driver.readable(&with_header(&frame(60, 1)));
    let writable = bench.driver.writable(100);
    bench.driver.queues[TX].offer(&[readable, writable]);
    bench.driver.queues[TX].offer(&[writable]);
    assert_eq!(bench.kick(TX), Progress::Done);
    assert_eq!(bench.net.metrics().tx_malformed_frames.get(), 2);
    assert_eq!(bench.driver.queues[TX].used().len(), 2);
    assert!(bench.sent().is_empty());
}

#[test]
fn more_pieces_than_the_host_takes_are_dropped() {
    let mut bench = Bench::new(VERSION_1);
    let byte = bench.driver.readable(&with_header(&frame(14, 1)));
    let piece = bench.driver.readable(&[7; 20]);
    let table = bench.driver.alloc(16 * 1100);
    for (pieces, malformed) in [(1022, 0), (1099, 1)] {
        let mut buffers = vec![byte];
        buffers.extend(vec![piece; pieces]);
        bench.driver.queues[TX].offer_indirect(table, &buffers);
        assert_eq!(bench.kick(TX), Progress::Done);
        let metrics = bench.net.metrics();
        assert_eq!(metrics.tx_malformed_frames.get(), malformed);
        assert_eq!(metrics.tx_packets_count.get(), 1);
        assert_eq!(bench.driver.queues[TX].used().len(), 1);
    }
}

#[test]
fn the_host_gets_a_copy_of_the_header_without_what_it_must_not_see() {
    let mut bench = Bench::new(CSUM_TSO4);
    let mut bytes = with_header(&frame(3000, 1));
    bytes[..HEADER].copy_from_slice(&[0xff, 1, 0xff, 0xff, 0xa8, 5, 34, 0, 16, 0, 9, 9]);
    bench.send(&bytes);
    assert_eq!(bench.kick(TX), Progress::Done);
    let sent = bench.sent().remove(0);
    assert_eq!(
        sent[..HEADER],
        [1, 1, 0xb8, 0x0b, 0xa8, 5, 34, 0, 16, 0, 0, 0]
    );
    assert_eq!(sent[HEADER..], bytes[HEADER..]);
}

#[test]
fn an_unwilling_host_costs_frames_and_nothing_else() {
    let mut bench = Bench::new(VERSION_1);
    let bytes = with_header(&frame(60, 1));
    let errors = [
        libc_errno::EAGAIN,
        libc_errno::ENOBUFS,
        libc_errno::EIO,
        libc_errno::EBADFD,
    ];
    for (count, errno) in errors.into_iter().enumerate() {
        bench.wire.0.lock().unwrap().write_error = Some(errno);
        bench.send(&bytes);
        assert_eq!(bench.kick(TX), Progress::Done);
        assert_eq!(bench.driver.queues[TX].used().len(), 1);
        assert_eq!(bench.net.metrics().tap_write_fails.get(), count as u64 + 1);
    }
    bench.wire.0.lock().unwrap().write_error = None;
    bench.send(&bytes);
    assert_eq!(bench.kick(TX), Progress::Done);
    assert_eq!(bench.sent(), [bytes]);
}

/// Linux's numbers, as the host gives them.
pub(super) mod libc_errno {
    pub const EIO: i32 = 5;
    pub const EAGAIN: i32 = 11;
    pub const EBADFD: i32 = 77;
    pub const ENOBUFS: i32 = 105;
}

#[test]
fn a_foreign_source_address_is_counted() {
    let mut bench = Bench::new(VERSION_1);
    let mut bytes = with_header(&frame(60, 1));
    bytes[HEADER + 11] ^= 1;
    bench.send(&bytes);
    assert_eq!(bench.kick(TX), Progress::Done);
    assert_eq!(bench.sent(), [bytes]);
    assert_eq!(bench.net.metrics().tx_spoofed_mac_count.get(), 1);
}

#[test]
fn work_is_bounded_in_frames_and_bytes() {
    let mut bench = Bench::with(VERSION_1, 1024, Default::default(), Default::default());
    let small = bench.driver.readable(&with_header(&frame(60, 1)));
    for _ in 0..FRAMES_PER_TURN + 1 {
        bench.driver.queues[TX].offer(&[small]);
    }
    assert_eq!(bench.kick(TX), Progress::Again);
    assert_eq!(bench.sent().len(), FRAMES_PER_TURN);
    assert_eq!(bench.kick(TX), Progress::Done);
    assert_eq!(bench.sent().len(), 1);

    let large = bench.driver.readable(&with_header(&frame(65_000, 1)));
    let turn = (BYTES_PER_TURN as usize).div_ceil(65_000);
    for _ in 0..turn + 1 {
        bench.driver.queues[TX].offer(&[large]);
    }
    assert_eq!(bench.kick(TX), Progress::Again);
    assert_eq!(bench.sent().len(), turn);
    assert_eq!(bench.kick(TX), Progress::Done);
    assert_eq!(bench.sent().len(), 1);
}

#[test]
fn the_rate_limiter_delays_and_loses_nothing() {
    let mut bench = Bench::with(VERSION_1, 256, Default::default(), only(2));
    let frames: Vec<_> = (0..5).map(|i| with_header(&frame(60, i))).collect();
    for bytes in &frames {
        bench.send(bytes);
    }
    assert_eq!(bench.kick(TX), Progress::Done);
    assert_eq!(bench.sent(), frames[..2]);
    assert_eq!(bench.driver.queues[TX].used().len(), 2);
    // More kicks and stale timer events change nothing.
    assert_eq!(bench.kick(TX), Progress::Done);
    assert_eq!(bench.net.process_source(2).unwrap(), Progress::Done);
    assert!(bench.sent().is_empty());
    assert_eq!(bench.net.metrics().tx_rate_limiter_throttled.get(), 1);

    bench
        .net
        .update_rate_limiters(RateLimiterConfig::default(), UNLIMITED);
    assert_eq!(bench.wait_for_timer(2), Progress::Done);
    assert_eq!(bench.sent(), frames[2..]);
    assert_eq!(bench.driver.queues[TX].used().len(), 3);
}

/// A limit that is lifted when more waits than one turn does: the turns after it are for the same event.
#[test]
fn all_that_waited_is_sent_when_a_limit_is_lifted() {
    let mut bench = Bench::with(VERSION_1, 256, Default::default(), only(1));
    let large = bench.driver.readable(&with_header(&frame(65_000, 1)));
    let turn = (BYTES_PER_TURN as usize).div_ceil(65_000);
    for _ in 0..1 + 2 * turn {
        bench.driver.queues[TX].offer(&[large]);
    }
    assert_eq!(bench.kick(TX), Progress::Done);
    assert_eq!(bench.sent().len(), 1);
    bench
        .net
        .update_rate_limiters(RateLimiterConfig::default(), UNLIMITED);
    assert_eq!(bench.wait_for_timer(2), Progress::Again);
    assert_eq!(bench.net.process_source(2).unwrap(), Progress::Again);
    assert_eq!(bench.net.process_source(2).unwrap(), Progress::Done);
    assert_eq!(bench.sent().len(), 2 * turn);
}

#[test]
fn refused_frames_take_no_tokens() {
    let mut bench = Bench::with(VERSION_1, 256, Default::default(), only(1));
    bench.send(&[0; 5]);
    let good = with_header(&frame(60, 1));
    bench.send(&good);
    assert_eq!(bench.kick(TX), Progress::Done);
    assert_eq!(bench.sent(), [good]);
}

#[test]
fn a_broken_ring_ends_the_work_until_a_reset() {
    let mut bench = Bench::new(VERSION_1);
    let good = with_header(&frame(60, 1));
    // A head past the end of the queue, and an available index that jumped.
    for round in 0..2 {
        match round {
            0 => bench.driver.queues[TX].publish(256),
            _ => bench.driver.queues[TX].set_avail_idx(300),
        }
        assert!(bench.net.process_queue(TX).is_err());
        assert_eq!(bench.net.metrics().tx_fails.get(), round + 1);
        bench.net.reset();
        bench.driver.reset();
        bench.activate(VERSION_1);
        bench.send(&good);
        assert_eq!(bench.kick(TX), Progress::Done);
        assert_eq!(bench.sent(), std::slice::from_ref(&good));
    }
}

#[test]
fn a_guest_that_is_held_neither_sends_nor_receives() {
    let mut bench = Bench::new(VERSION_1);
    let (_, buffers) = bench.offer(&[2000]);
    bench.net.hold(true);
    let dropped = bench.send(&with_header(&frame(100, 1)));
    bench.arrive(&frame(200, 2));
    assert_eq!(bench.kick(TX), Progress::Done);
    assert_eq!(bench.tap_event(), Progress::Done);
    // What it sends is taken, so that nothing of it waits for the end of the hold.
    assert_eq!(bench.driver.queues[TX].used(), [(dropped, 0)]);
    assert_eq!(bench.driver.queues[RX].used(), []);
    bench.send(&with_header(&frame(100, 3)));
    bench.net.hold(false);
    assert_eq!(bench.kick(TX), Progress::Done);
    assert!(bench.sent().is_empty());
    // What came for it has waited.
    assert_eq!(bench.tap_event(), Progress::Done);
    let used = bench.driver.queues[RX].used();
    assert_eq!(used.len(), 1);
    assert_eq!(bench.received(&buffers, used[0].1)[HEADER..], frame(200, 2));
    bench.send(&with_header(&frame(100, 4)));
    assert_eq!(bench.kick(TX), Progress::Done);
    assert_eq!(bench.sent(), [with_header(&frame(100, 4))]);
}
