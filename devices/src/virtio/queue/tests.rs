use super::*;
use crate::virtio::testing::TestDriver;

/// Bytes in front of the first element of the available ring.
const AVAIL_HEADER: u64 = 4;

/// A driver and its queue of 8, with or without event index.
fn pair(event_idx: bool) -> (TestDriver, VirtQueue) {
    let driver = TestDriver::new(&[8]);
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
