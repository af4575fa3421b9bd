//! Frames to the driver.

use super::transmit::libc_errno::{EBADFD, EIO};
use super::*;

const LARGE: u64 = MERGEABLE | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;

#[test]
fn frames_arrive_in_order_with_one_interrupt() {
    let mut bench = Bench::new(MERGEABLE);
    let offered: Vec<_> = (0..10).map(|_| bench.offer(&[1526])).collect();
    bench.driver.interrupts();
    let frames: Vec<_> = (0..10).map(|i| frame(14 + 150 * i, i)).collect();
    for bytes in &frames {
        bench.arrive(bytes);
    }
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.driver.interrupts(), 1);
    let used = bench.driver.queues[RX].used();
    assert_eq!(used.len(), 10);
    for (((head, len), (offered_head, buffers)), bytes) in
        used.into_iter().zip(offered).zip(&frames)
    {
        assert_eq!(head, offered_head);
        let expected = [&rx_header(1)[..], bytes].concat();
        assert_eq!(bench.received(&buffers, len), expected);
    }
    assert_eq!(bench.net.metrics().rx_packets_count.get(), 10);
}

#[test]
fn a_frame_spans_as_many_buffers_as_it_needs() {
    // Tiny ones too, down to the header alone.
    for size in [12, 13, 100, 1526, 4096] {
        let mut bench = Bench::with(MERGEABLE, 1024, Default::default(), Default::default());
        let bytes = frame(1500, size);
        let total = HEADER + bytes.len();
        let count = total.div_ceil(size);
        let buffers: Vec<_> = (0..count + 3)
            .flat_map(|_| bench.offer(&[size]).1)
            .collect();
        bench.arrive(&bytes);
        assert_eq!(bench.tap_event(), Progress::Done);
        let used = bench.driver.queues[RX].used();
        assert_eq!(used.len(), count);
        let lens: Vec<_> = used.iter().map(|u| u.1 as usize).collect();
        assert!(lens[..count - 1].iter().all(|&len| len == size));
        assert_eq!(lens.iter().sum::<usize>(), total);
        let expected = [&rx_header(count as u16)[..], &bytes].concat();
        assert_eq!(bench.received(&buffers, total as u32), expected);
    }
}

#[test]
fn the_largest_frame_arrives_in_ordinary_buffers() {
    let mut bench = Bench::new(LARGE);
    let buffers: Vec<_> = (0..100).flat_map(|_| bench.offer(&[1536]).1).collect();
    let bytes = frame(65_550, 3);
    bench.arrive_with(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0], &bytes);
    bench.arrive(&bytes[..200]);
    assert_eq!(bench.tap_event(), Progress::Done);
    let count = (HEADER + bytes.len()).div_ceil(1536);
    assert_eq!(bench.driver.queues[RX].used().len(), count + 1);
    let received = bench.received(&buffers, 65_562);
    assert_eq!(received[..10], [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
    assert_eq!(received[10..12], (count as u16).to_le_bytes());
    assert_eq!(received[12..], bytes);
}

#[test]
fn a_header_may_be_split_over_descriptors() {
    for features in [VERSION_1, MERGEABLE] {
        let mut bench = Bench::new(features);
        let (_, buffers) = bench.offer(&[1, 10, 3, 1, 2000]);
        let bytes = frame(1000, 1);
        bench.arrive(&bytes);
        assert_eq!(bench.tap_event(), Progress::Done);
        assert_eq!(bench.driver.queues[RX].used()[0].1, 1012);
        let expected = [&rx_header(1)[..], &bytes].concat();
        assert_eq!(bench.received(&buffers, 1012), expected);
    }
}

#[test]
fn without_mergeable_buffers_a_frame_must_fit_in_one() {
    let mut bench = Bench::new(VERSION_1);
    let buffers = bench.offer(&[1526]).1;
    bench.offer(&[1526]);
    bench.arrive(&frame(1515, 1));
    bench.arrive(&frame(9000, 2));
    let fits = frame(1514, 3);
    bench.arrive(&fits);
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.net.metrics().rx_fails.get(), 2);
    assert_eq!(bench.driver.queues[RX].used().len(), 1);
    let expected = [&rx_header(1)[..], &fits].concat();
    assert_eq!(bench.received(&buffers, 1526), expected);
}

/// CVE-2020-16843: with the ring and the network both full, nothing ever moved again.
#[test]
fn cve_2020_16843_a_flood_is_followed_by_recovery() {
    for features in [VERSION_1, MERGEABLE, LARGE] {
        let mut bench = Bench::with(features, 8, Default::default(), Default::default());
        let frames: Vec<_> = (0..500).map(|i| frame(60 + i, i)).collect();
        for bytes in &frames {
            bench.arrive(bytes);
        }
        let mut received = Vec::new();
        // The network tells of its frames once; from then on only the driver's kicks drive the device.
        assert_eq!(bench.tap_event(), Progress::Done);
        while received.len() < frames.len() {
            bench.driver.free_all();
            let offered: Vec<_> = (0..8).map(|_| bench.offer(&[1526])).collect();
            assert!(!bench.driver.queues[RX].kicks_suppressed());
            assert_eq!(bench.kick(RX), Progress::Done);
            let used = bench.driver.queues[RX].used();
            assert!(!used.is_empty(), "frozen after {} frames", received.len());
            for ((_, len), (_, buffers)) in used.into_iter().zip(offered) {
                received.push(bench.received(&buffers, len)[HEADER..].to_vec());
            }
        }
        assert!(received == frames);
        assert_eq!(bench.net.metrics().rx_fails.get(), 0);
        assert_eq!(bench.still_on_the_wire(), 0);
    }
}

#[test]
fn a_frame_waits_for_room_it_has_had_before() {
    let mut bench = Bench::new(LARGE);
    let start: Vec<_> = (0..4).map(|_| bench.offer(&[1000])).collect();
    assert_eq!(bench.kick(RX), Progress::Done);
    // Uses three of four.
    bench.arrive(&frame(2900, 1));
    // Needs four: waits with its start in the one that is left.
    let bytes = frame(3600, 2);
    bench.arrive(&bytes);
    let last = frame(60, 3);
    bench.arrive(&last);
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.driver.queues[RX].used().len(), 3);
    assert_eq!(bench.still_on_the_wire(), 1);
    let mut buffers = start[3].1.clone();
    for more in 1..4 {
        assert!(!bench.driver.queues[RX].kicks_suppressed());
        assert!(bench.driver.queues[RX].used().is_empty());
        buffers.extend(bench.offer(&[1000]).1);
        assert_eq!(bench.kick(RX), Progress::Done, "{more} more");
    }
    assert_eq!(bench.driver.queues[RX].used().len(), 4);
    let expected = [&rx_header(4)[..], &bytes].concat();
    assert_eq!(bench.received(&buffers, 3612), expected);
    let (_, buffers) = bench.offer(&[1000]);
    assert_eq!(bench.kick(RX), Progress::Done);
    let expected = [&rx_header(1)[..], &last].concat();
    assert_eq!(bench.received(&buffers, 72), expected);
    assert_eq!(bench.net.metrics().rx_fails.get(), 0);
}

#[test]
fn a_frame_that_no_ring_ever_had_room_for_is_dropped() {
    let mut bench = Bench::new(LARGE);
    let (_, buffers) = bench.offer(&[1000]);
    bench.arrive(&frame(60_000, 1));
    let small = frame(300, 2);
    bench.arrive(&small);
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.net.metrics().rx_fails.get(), 1);
    assert_eq!(bench.driver.queues[RX].used().len(), 1);
    let expected = [&rx_header(1)[..], &small].concat();
    assert_eq!(bench.received(&buffers, 312), expected);
}

#[test]
fn many_tiny_pieces_neither_hang_nor_cut_a_frame() {
    let mut bench = Bench::with(LARGE, 1024, Default::default(), Default::default());
    // The device has seen plenty of room once.
    let (_, first) = bench.offer(&[65_600]);
    bench.arrive(&frame(60_000, 1));
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.driver.queues[RX].used().len(), 1);
    drop(first);
    bench.driver.free_all();
    // More pieces than one read takes, and then just enough room.
    let chain: Vec<_> = (0..1200).map(|_| bench.driver.writable(1)).collect();
    let table = bench.driver.alloc(16 * 1200);
    bench.driver.queues[RX].offer_indirect(table, &chain);
    let (_, rest) = bench.offer(&[3000]);
    let bytes = frame(4000, 2);
    bench.arrive(&bytes);
    assert_eq!(bench.tap_event(), Progress::Done);
    let used = bench.driver.queues[RX].used();
    assert_eq!(used.iter().map(|u| u.1).collect::<Vec<_>>(), [1200, 2812]);
    assert_eq!(bench.received(&chain, 1200)[12..], bytes[..1188]);
    assert_eq!(bench.received(&rest, 2812), bytes[1188..]);
}

#[test]
fn a_driver_that_gives_less_room_than_before_freezes_nothing() {
    let mut bench = Bench::new(LARGE);
    bench.offer(&[65_600]);
    bench.arrive(&frame(60, 1));
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.driver.queues[RX].used().len(), 1);
    let (_, buffers) = bench.offer(&[100]);
    bench.arrive(&frame(60_000, 1));
    let small = frame(60, 2);
    bench.arrive(&small);
    for _ in 0..PATIENCE {
        assert_eq!(bench.tap_event(), Progress::Done);
        assert!(bench.driver.queues[RX].used().is_empty());
    }
    assert_eq!(bench.net.metrics().rx_fails.get(), 0);
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.driver.queues[RX].used().len(), 1);
    assert_eq!(bench.net.metrics().rx_fails.get(), 1);
    let expected = [&rx_header(1)[..], &small].concat();
    assert_eq!(bench.received(&buffers, 72), expected);
}

#[test]
fn the_rate_limiter_delays_and_loses_nothing() {
    let mut bench = Bench::with(MERGEABLE, 256, only(2), Default::default());
    let frames: Vec<_> = (0..5).map(|i| frame(700, i)).collect();
    let buffers: Vec<_> = (0..20).flat_map(|_| bench.offer(&[356]).1).collect();
    for bytes in &frames {
        bench.arrive(bytes);
    }
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.driver.queues[RX].used().len(), 4);
    // One frame is in the driver's memory, out of its sight; the rest is where it was.
    assert_eq!(bench.still_on_the_wire(), 2);
    for _ in 0..3 {
        assert_eq!(bench.tap_event(), Progress::Done);
        assert_eq!(bench.kick(RX), Progress::Done);
    }
    assert!(bench.driver.queues[RX].used().is_empty());
    assert_eq!(bench.still_on_the_wire(), 2);

    bench
        .net
        .update_rate_limiters(UNLIMITED, RateLimiterConfig::default());
    assert_eq!(bench.wait_for_timer(1), Progress::Done);
    assert_eq!(bench.driver.queues[RX].used().len(), 6);
    for (i, bytes) in frames.iter().enumerate() {
        let expected = [&rx_header(2)[..], bytes].concat();
        assert_eq!(bench.received(&buffers[2 * i..2 * i + 2], 712), expected);
    }
}

#[test]
fn a_tap_that_goes_away_may_come_back() {
    let mut bench = Bench::new(MERGEABLE);
    bench.offer(&[1526]);
    bench.wire.0.lock().unwrap().read_errors = [EIO, EBADFD].repeat(50).into();
    // Bounded, whatever the tap says.
    assert_eq!(bench.tap_event(), Progress::Done);
    let failed = bench.net.metrics().tap_read_fails.get();
    assert!((1..=10).contains(&failed));
    bench.wire.0.lock().unwrap().read_errors.truncate(1);
    bench.arrive(&frame(60, 1));
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.driver.queues[RX].used().len(), 1);
}

#[test]
fn the_driver_sees_no_offload_it_did_not_negotiate() {
    let mut bench = Bench::new(MERGEABLE);
    let (_, buffers) = bench.offer(&[1526]);
    // To be summed; to be segmented; summed already, of which this driver knows nothing.
    bench.arrive_with(&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], &frame(60, 1));
    bench.arrive_with(&[0, 1, 54, 0, 0xa8, 5, 0, 0, 0, 0, 0, 0], &frame(60, 2));
    let last = frame(60, 3);
    bench.arrive_with(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &last);
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.net.metrics().rx_fails.get(), 2);
    let expected = [&rx_header(1)[..], &last].concat();
    assert_eq!(bench.received(&buffers, 72), expected);
}

#[test]
fn work_is_bounded_in_frames_and_bytes() {
    let mut bench = Bench::with(LARGE, 1024, Default::default(), Default::default());
    let buffer = bench.driver.writable(65_600);
    for _ in 0..FRAMES_PER_TURN + 2 {
        bench.driver.queues[RX].offer(&[buffer]);
        bench.arrive(&frame(60, 1));
    }
    assert_eq!(bench.tap_event(), Progress::Again);
    assert_eq!(bench.driver.queues[RX].used().len(), FRAMES_PER_TURN);
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.driver.queues[RX].used().len(), 2);

    let turn = (BYTES_PER_TURN as usize).div_ceil(65_012);
    for _ in 0..turn + 1 {
        bench.driver.queues[RX].offer(&[buffer]);
        bench.arrive(&frame(65_000, 1));
    }
    assert_eq!(bench.tap_event(), Progress::Again);
    assert_eq!(bench.driver.queues[RX].used().len(), turn);
}

#[test]
fn a_buffer_without_room_for_a_header_breaks_the_device_until_a_reset() {
    for features in [VERSION_1, MERGEABLE] {
        let mut bench = Bench::new(features);
        let readable = bench.driver.readable(&[0; 100]);
        for sizes in [Some(11), None] {
            match sizes {
                Some(size) => drop(bench.offer(&[size])),
                None => drop(bench.driver.queues[RX].offer(&[readable])),
            }
            bench.arrive(&frame(60, 1));
            assert!(bench.net.process_source(0).is_err());
            bench.net.reset();
            bench.driver.reset();
            bench.activate(features);
            bench.offer(&[1526]);
            assert_eq!(bench.kick(RX), Progress::Done);
            assert_eq!(bench.driver.queues[RX].used().len(), 1);
        }
        assert_eq!(bench.net.metrics().event_fails.get(), 2);
    }
}

#[test]
fn the_same_buffer_twice_breaks_the_device() {
    let mut bench = Bench::new(MERGEABLE);
    let (head, _) = bench.offer(&[100]);
    bench.driver.queues[RX].publish(head);
    bench.arrive(&frame(1000, 1));
    assert!(bench.net.process_source(0).is_err());
}

#[test]
fn a_reset_forgets_buffers_and_the_frame_that_waits() {
    let mut bench = Bench::with(MERGEABLE, 256, only(1), Default::default());
    bench.offer(&[1526]);
    bench.offer(&[1526]);
    bench.arrive(&frame(60, 1));
    bench.arrive(&frame(60, 2));
    assert_eq!(bench.tap_event(), Progress::Done);
    bench.net.reset();
    bench.driver.reset();
    bench
        .net
        .update_rate_limiters(UNLIMITED, RateLimiterConfig::default());
    bench.activate(MERGEABLE);
    let (_, buffers) = bench.offer(&[1526]);
    let bytes = frame(60, 3);
    bench.arrive(&bytes);
    assert_eq!(bench.wait_for_timer(1), Progress::Done);
    assert_eq!(bench.driver.queues[RX].used().len(), 1);
    let expected = [&rx_header(1)[..], &bytes].concat();
    assert_eq!(bench.received(&buffers, 72), expected);
}

#[test]
fn quiesce_delivers_what_waits_and_gives_buffers_back() {
    let mut bench = Bench::with(LARGE, 256, only(1), Default::default());
    let buffers: Vec<_> = (0..8).flat_map(|_| bench.offer(&[1000]).1).collect();
    bench.arrive(&frame(60, 1));
    let second = frame(1500, 2);
    bench.arrive(&second);
    assert_eq!(bench.tap_event(), Progress::Done);
    assert_eq!(bench.driver.queues[RX].used().len(), 1);
    bench.net.quiesce().unwrap();
    assert_eq!(bench.driver.queues[RX].used().len(), 2);
    let expected = [&rx_header(2)[..], &second].concat();
    assert_eq!(bench.received(&buffers[1..], 1512), expected);
    bench.net.quiesce().unwrap();

    // As after a resume: the same buffers are found again, and only those not used yet.
    bench
        .net
        .update_rate_limiters(UNLIMITED, RateLimiterConfig::default());
    let third = frame(3000, 3);
    bench.arrive(&third);
    assert_eq!(bench.wait_for_timer(1), Progress::Done);
    assert_eq!(bench.driver.queues[RX].used().len(), 4);
    let expected = [&rx_header(4)[..], &third].concat();
    assert_eq!(bench.received(&buffers[3..], 3012), expected);
}
