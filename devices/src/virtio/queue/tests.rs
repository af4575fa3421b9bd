use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;
use virtio_queue::QueueOwnedT;
use vm_memory::{Address, Bytes};

use super::*;
use crate::virtio::device::Progress;
use crate::virtio::testing::{RawDescriptor, TestDriver};

/// Bytes in front of the first element of the available ring.
const AVAIL_HEADER: u64 = 4;

/// A driver and its queue of 8, with or without event index.
fn pair(event_idx: bool) -> (TestDriver, VirtQueue) {
    pair_of(8, event_idx)
}

fn pair_of(size: u16, event_idx: bool) -> (TestDriver, VirtQueue) {
    let driver = TestDriver::new(&[size]);
    let mut queue = driver.queues[0].device_side();
    queue.set_event_idx(event_idx);
    let (memory, interrupt) = (driver.memory.clone(), driver.interrupt.clone());
    let queue = VirtQueue::new(queue, 0, memory, interrupt).unwrap();
    (driver, queue)
}

/// Makes one chain available and takes it.
fn pass(driver: &mut TestDriver, queue: &mut VirtQueue) -> u16 {
    driver.free_all();
    let buffer = driver.writable(16);
    let head = driver.queues[0].offer(&[buffer]);
    assert_eq!(queue.pop().unwrap().unwrap().head(), head);
    head
}

#[test]
fn chains_are_used_together_and_across_the_rings_end() {
    let (mut driver, mut queue) = pair(false);
    for round in 0..10u32 {
        let used: Vec<_> = (0..3u32)
            .map(|i| (pass(&mut driver, &mut queue), round * 3 + i))
            .collect();
        assert!(driver.queues[0].used().is_empty());
        queue.complete_together(&used).unwrap();
        assert_eq!(driver.queues[0].used(), used);
    }
    queue.complete_together(&[]).unwrap();
    assert!(driver.queues[0].used().is_empty());
    assert_eq!(queue.position().next_used, 30);
}

#[test]
fn what_is_completed_soon_is_seen_with_the_sixteenth_or_the_signal() {
    let (mut driver, mut queue) = pair_of(32, false);
    let soon = |driver: &mut TestDriver, queue: &mut VirtQueue| {
        let head = pass(driver, queue);
        queue.complete_soon(&[(head, 1)]).unwrap();
        driver.queues[0].used().len()
    };
    for _ in 0..15 {
        assert_eq!(soon(&mut driver, &mut queue), 0);
    }
    assert_eq!(soon(&mut driver, &mut queue), 16);
    assert_eq!(driver.interrupts(), 0);
    assert_eq!(soon(&mut driver, &mut queue), 0);
    queue.signal().unwrap();
    assert_eq!(driver.queues[0].used().len(), 1);
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn what_is_completed_later_is_seen_with_what_follows_or_the_signal() {
    let (mut driver, mut queue) = pair_of(32, false);
    for _ in 0..20 {
        let head = pass(&mut driver, &mut queue);
        queue.complete_later(head, 1).unwrap();
        assert!(driver.queues[0].used().is_empty());
    }
    let head = pass(&mut driver, &mut queue);
    queue.complete(head, 1).unwrap();
    assert_eq!(driver.queues[0].used().len(), 21);
    let head = pass(&mut driver, &mut queue);
    queue.complete_later(head, 7).unwrap();
    assert_eq!(driver.interrupts(), 0);
    queue.signal().unwrap();
    assert_eq!(driver.queues[0].used(), [(head, 7)]);
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn a_driver_that_comes_back_is_served_in_the_same_pass() {
    let (mut driver, mut queue) = pair(false);
    // As long as the other thread takes.
    queue.linger = Some(Linger::waiting(Duration::from_secs(10)));
    let buffers = [(); 3].map(|()| driver.writable(16));
    let drain = |queue: &mut VirtQueue| {
        let mut taken = 0;
        let progress = queue.drain(2, |queue, chain| {
            taken += 1;
            queue.complete_soon(&[(chain.head(), 0)])?;
            Ok(Flow::Continue)
        });
        (taken, progress.unwrap())
    };
    // One pass tells nothing of when the next begins.
    driver.queues[0].offer(&buffers[..1]);
    assert_eq!(drain(&mut queue), (1, Progress::Done));
    assert!(!driver.queues[0].kicks_suppressed());
    assert_eq!(driver.queues[0].used().len(), 1);

    driver.queues[0].offer(&buffers[1..2]);
    let ring = &mut driver.queues[0];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while ring.used().is_empty() {
                std::thread::yield_now();
            }
            assert!(ring.kicks_suppressed());
            ring.offer(&buffers[2..]);
        });
        assert_eq!(drain(&mut queue), (2, Progress::Again));
    });
    assert_eq!(driver.interrupts(), 3);
}

#[test]
fn a_signal_says_something_new_once() {
    let (mut driver, mut queue) = pair(false);
    queue.signal().unwrap();
    assert_eq!(driver.interrupts(), 0);
    let head = pass(&mut driver, &mut queue);
    queue.complete(head, 0).unwrap();
    queue.signal().unwrap();
    queue.signal().unwrap();
    assert_eq!(driver.interrupts(), 1);
    driver.queues[0].used();

    driver.queues[0].set_no_interrupt(true);
    let head = pass(&mut driver, &mut queue);
    queue.complete(head, 0).unwrap();
    queue.signal().unwrap();
    assert_eq!(driver.interrupts(), 0);
}

#[test]
fn with_event_index_the_driver_says_when() {
    let (mut driver, mut queue) = pair(true);
    let used_event = GuestAddress(queue.queue.avail_ring() + AVAIL_HEADER + 2 * 8);
    // Each line: the used index the driver waits to pass, what is completed, whether that interrupts.
    let mut index = 0u16;
    for (event, count, interrupts) in [
        (0, 1, 1),
        (1, 1, 1),
        (1, 1, 0),
        (5, 2, 0),
        (5, 1, 1),
        (7, 4, 1),
        (9, 1, 0),
    ] {
        driver.memory.write_obj(event, used_event).unwrap();
        let used: Vec<_> = (0..count)
            .map(|_| (pass(&mut driver, &mut queue), 0))
            .collect();
        queue.complete_together(&used).unwrap();
        queue.signal().unwrap();
        index += count;
        assert_eq!(driver.interrupts(), interrupts, "{event} at {index}");
        driver.queues[0].used();
    }
    // The index wraps.
    driver.memory.write_obj(u16::MAX, used_event).unwrap();
    while index != u16::MAX {
        let head = pass(&mut driver, &mut queue);
        queue.complete(head, 0).unwrap();
        queue.signal().unwrap();
        driver.queues[0].used();
        index += 1;
    }
    assert_eq!(driver.interrupts(), 0);
    let used = [0; 2].map(|_| (pass(&mut driver, &mut queue), 0));
    queue.complete_together(&used).unwrap();
    queue.signal().unwrap();
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(queue.position().next_used, 1);
}

#[test]
fn a_chain_of_more_descriptors_than_any_driver_needs_is_malformed() {
    for (length, is_good) in [(2048, true), (2049, false), (65_535, false)] {
        let (mut driver, mut queue) = pair(false);
        let table = driver.alloc(length * 16);
        let buffers = vec![driver.readable(b"x"); length];
        driver.queues[0].offer_indirect(table, &buffers);
        match (queue.pop(), is_good) {
            (Ok(Some(chain)), true) => assert_eq!(chain.readable.len(), length as u64),
            (Err(QueueError::Malformed { .. }), false) => {}
            (other, _) => panic!("{length} descriptors: {other:?}"),
        }
    }
}

/// Where the generated descriptors of direct and indirect tables point: memory, its ends, its hole, and both tables.
fn places() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0x50_0000u64..0x50_1000,
        1 => Just((16u64 << 20) - 8),
        1 => Just(20u64 << 20),
        1 => Just((32u64 << 20) - 8),
        1 => Just(u64::MAX - 3),
    ]
}

/// A descriptor with any flags; if indirect, mostly one that leads to `table`.
fn descriptor(table: u64) -> impl Strategy<Value = RawDescriptor> {
    let len = prop_oneof![6 => 0u32..64, 1 => Just(u32::MAX), 1 => Just(1 << 31)];
    let flags = prop_oneof![8 => 0u16..4, 1 => 4u16..8];
    let entries = prop_oneof![4 => 0u32..5, 1 => Just(1u32 << 16)];
    (places(), len, flags, 0u16..10, entries, any::<bool>()).prop_map(
        move |(addr, len, flags, next, entries, is_good)| match flags & 4 != 0 && is_good {
            true => RawDescriptor {
                addr: table,
                len: entries * 16,
                flags,
                next,
            },
            false => RawDescriptor {
                addr,
                len,
                flags,
                next,
            },
        },
    )
}

/// What the crate's own iterator makes of the chain, with the checks of [`VirtQueue`]. `None`: it is not good.
fn as_the_crate_sees_it(queue: &mut Queue, memory: &Memory) -> Option<(Segments, Segments)> {
    let (mut readable, mut writable) = (Segments::default(), Segments::default());
    let mut ended = false;
    for descriptor in queue.iter(memory).unwrap().next().unwrap() {
        let (addr, len) = (descriptor.addr(), descriptor.len());
        if len > 0 && !is_in_memory(memory, addr, len) {
            return None;
        }
        match descriptor.is_write_only() {
            true => writable.push(addr, len),
            false if writable.is_empty() => readable.push(addr, len),
            false => return None,
        }
        ended = !descriptor.has_next();
    }
    ended.then_some((readable, writable))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever the driver writes: the same chains are good, with the same buffers, as by the virtio-queue crate.
    #[test]
    fn chains_are_those_that_the_crate_finds(
        direct in prop::collection::vec(descriptor(0x60_0000), 8),
        indirect in prop::collection::vec(descriptor(0x60_0000), 4),
        shift in 0u64..2,
        head in 0u16..9,
    ) {
        let (mut driver, mut queue) = pair(false);
        for (index, mut descriptor) in direct.into_iter().enumerate() {
            // A table need not be aligned.
            if descriptor.addr == 0x60_0000 {
                descriptor.addr += shift;
            }
            driver.queues[0].write_descriptor(index as u16, descriptor);
        }
        let mut at = GuestAddress(0x60_0000 + shift);
        for raw in indirect {
            let fields = (raw.addr, u64::from(raw.len) | u64::from(raw.flags) << 32 | u64::from(raw.next) << 48);
            driver.memory.write_obj(fields.0.to_le(), at).unwrap();
            driver.memory.write_obj(fields.1.to_le(), at.unchecked_add(8)).unwrap();
            at = at.unchecked_add(16);
        }
        driver.queues[0].publish(head);
        let expected = as_the_crate_sees_it(&mut driver.queues[0].device_side(), &driver.memory);
        let found = queue.pop().ok().flatten();
        prop_assert_eq!(found.map(|chain| (chain.readable, chain.writable)), expected);
    }
}

/// What may happen to a queue of 8.
#[derive(Debug, Clone)]
enum Step {
    Publish(u16),
    Pop,
    /// The n-th of those in flight is done.
    Complete(usize),
    /// The last one popped is put back, if it is still in flight.
    Undo,
    Redescribe(u16, RawDescriptor),
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0u16..9).prop_map(Step::Publish),
        6 => Just(Step::Pop),
        4 => (0usize..8).prop_map(Step::Complete),
        1 => Just(Step::Undo),
        3 => (0u16..8, descriptor(0x60_0000)).prop_map(|(at, descriptor)| Step::Redescribe(at, descriptor)),
    ]
}

/// One byte of a buffer, and whether the device may write it.
type Byte = (u64, bool);

/// The obvious walk: byte for byte, with a list for memory. `None`: the chain is not good.
fn obvious_walk(
    direct: &[RawDescriptor],
    indirect: &[RawDescriptor],
    head: u16,
) -> Option<Vec<Byte>> {
    let is_memory = |at: u64| at < 16 << 20 || (24 << 20..40 << 20).contains(&at);
    let (mut table, mut next, mut is_nested) = (direct, head, false);
    let mut bytes: Vec<Byte> = Vec::new();
    // No chain of a good driver has more.
    for _ in 0..100 {
        let descriptor = *table.get(usize::from(next))?;
        if descriptor.flags & 4 != 0 {
            let entries = descriptor.len / 16;
            let is_whole = descriptor.len % 16 == 0 && entries < 1 << 16;
            if is_nested || !is_whole {
                return None;
            }
            // Elsewhere there is nothing: zeroes, which are an empty readable buffer without a next one.
            let is_ours = descriptor.addr == 0x60_0000;
            let all_there = (0..u64::from(descriptor.len))
                .step_by(8)
                .all(|at| descriptor.addr.checked_add(at + 7).is_some_and(is_memory));
            if entries == 0 || !all_there {
                return None;
            }
            table = match is_ours {
                true => &indirect[..indirect.len().min(entries as usize)],
                false => &[RawDescriptor {
                    addr: 0,
                    len: 0,
                    flags: 0,
                    next: 0,
                }],
            };
            (next, is_nested) = (0, true);
            continue;
        }
        let is_writable = descriptor.flags & 2 != 0;
        let any_writable = bytes.iter().any(|(_, is_writable)| *is_writable);
        // Lengths are small, or so large that they are in no memory.
        if descriptor.len > 1 << 20 {
            return None;
        }
        for at in 0..u64::from(descriptor.len) {
            let place = descriptor
                .addr
                .checked_add(at)
                .filter(|at| is_memory(*at))?;
            bytes.push((place, is_writable));
        }
        if !is_writable && any_writable {
            return None;
        }
        if descriptor.flags & 1 == 0 {
            return Some(bytes);
        }
        next = descriptor.next;
    }
    None
}

fn bytes_of(chain: &Chain) -> Vec<Byte> {
    let of = |segments: &Segments, is_writable: bool| {
        let each = segments
            .iter()
            .flat_map(|segment| segment.addr.0..segment.addr.0 + u64::from(segment.len));
        each.map(|at| (at, is_writable)).collect::<Vec<_>>()
    };
    [of(&chain.readable, false), of(&chain.writable, true)].concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// A queue is a list of heads and a set of those in flight, whatever the driver does to it.
    #[test]
    fn a_queue_is_a_list_and_a_set(
        direct in prop::collection::vec(descriptor(0x60_0000), 8),
        indirect in prop::collection::vec(descriptor(0x60_0000), 4),
        steps in prop::collection::vec(steps(), 1..60),
    ) {
        let (mut driver, mut queue) = pair(false);
        let mut direct = direct;
        for (index, descriptor) in direct.iter().enumerate() {
            driver.queues[0].write_descriptor(index as u16, *descriptor);
        }
        for (index, raw) in indirect.iter().enumerate() {
            let at = GuestAddress(0x60_0000 + 16 * index as u64);
            let rest = u64::from(raw.len) | u64::from(raw.flags) << 32 | u64::from(raw.next) << 48;
            driver.memory.write_obj(raw.addr.to_le(), at).unwrap();
            driver.memory.write_obj(rest.to_le(), at.unchecked_add(8)).unwrap();
        }
        let (mut offered, mut in_flight) = (VecDeque::new(), Vec::new());
        let mut used = Vec::new();
        let mut last: Option<Chain> = None;
        for step in steps {
            match step {
                // More than the queue has room for is another test's affair.
                Step::Publish(head) if offered.len() < 8 => {
                    driver.queues[0].publish(head);
                    offered.push_back(head);
                }
                Step::Pop => {
                    let found = queue.pop();
                    let Some(head) = offered.pop_front() else {
                        prop_assert!(matches!(found, Ok(None)));
                        continue;
                    };
                    let bytes = obvious_walk(&direct, &indirect, head);
                    let expected = bytes.filter(|_| !in_flight.contains(&head));
                    let is_good = expected.is_some();
                    prop_assert_eq!(found.as_ref().ok().and_then(Option::as_ref).map(bytes_of), expected);
                    // After an error a device does nothing more before it is reset.
                    if !is_good {
                        return Ok(());
                    }
                    in_flight.push(head);
                    last = found.ok().flatten();
                }
                Step::Complete(which) if !in_flight.is_empty() => {
                    let head = in_flight.remove(which % in_flight.len());
                    queue.complete(head, 7).unwrap();
                    used.push((head, 7));
                    last = last.filter(|chain| chain.head() != head);
                }
                // In a full ring the place of what was taken has been filled anew.
                Step::Undo if offered.len() < 8 => {
                    if let Some(chain) = last.take() {
                        in_flight.retain(|head| *head != chain.head());
                        offered.push_front(chain.head());
                        queue.undo_pop(chain);
                    }
                }
                Step::Redescribe(at, descriptor) => {
                    driver.queues[0].write_descriptor(at, descriptor);
                    direct[usize::from(at)] = descriptor;
                }
                Step::Publish(_) | Step::Complete(_) | Step::Undo => {}
            }
            prop_assert_eq!(driver.queues[0].used(), std::mem::take(&mut used));
        }
    }
}

#[test]
fn chains_taken_back_come_again_and_more_than_the_size_is_an_error() {
    let (mut driver, mut queue) = pair(false);
    let heads: Vec<u16> = (0..3)
        .map(|_| {
            let buffer = driver.writable(16);
            driver.queues[0].offer(&[buffer])
        })
        .collect();
    for _ in 0..2 {
        let chains: Vec<Chain> = (0..3).map(|_| queue.pop().unwrap().unwrap()).collect();
        assert_eq!(chains.iter().map(Chain::head).collect::<Vec<_>>(), heads);
        assert!(queue.pop().unwrap().is_none());
        for chain in chains.into_iter().rev() {
            queue.undo_pop(chain);
        }
    }
    for _ in 0..3 {
        queue.pop().unwrap().unwrap();
    }
    driver.queues[0].set_avail_idx(12);
    assert!(matches!(queue.pop(), Err(QueueError::Ring(_))));
}
