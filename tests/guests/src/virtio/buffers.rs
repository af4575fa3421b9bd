//! The buffers of a device that sends and receives, whatever it is that it sends.

use super::queue::{Descriptor, Queue, WRITE};
use crate::memory::Region;

/// Most buffers in one direction, and so the longest queue that will do.
const MAX_BUFFERS: usize = 256;

/// A queue whose every descriptor is a buffer for the device to write to.
pub struct Receiver {
    queue: Queue,
    buffers: [Option<Region>; MAX_BUFFERS],
}

impl Receiver {
    /// Offers a buffer of `size` bytes for each descriptor of `queue`; [`Receiver::publish`] lets the device see them.
    pub fn new(queue: Queue, size: u64) -> Self {
        let mut receiver = Self {
            queue,
            buffers: [None; MAX_BUFFERS],
        };
        for place in 0..receiver.queue.size() {
            receiver.buffers[usize::from(place)] = Some(Region::take(size, 64));
            receiver.offer(place);
        }
        receiver
    }

    fn buffer(&self, place: u16) -> Region {
        let Some(buffer) = self.buffers.get(usize::from(place)).copied().flatten() else {
            panic!("the device used a buffer that it did not have");
        };
        buffer
    }

    /// The next buffer that the device wrote to: its place, all of it, and how many bytes it says it wrote.
    pub fn pop(&mut self) -> Option<(u16, Region, u32)> {
        let (place, len) = self.queue.pop()?;
        Some((place, self.buffer(place), len))
    }

    /// Offers the buffer at `place` again.
    pub fn offer(&mut self, place: u16) {
        Descriptor::of(self.buffer(place), WRITE).store(self.queue.table(), place);
        self.queue.offer(place);
    }

    /// Lets the device see what was offered.
    pub fn publish(&mut self) {
        self.queue.publish();
    }
}

/// Buffers to send from, each free or under way.
pub struct Places {
    buffers: [Option<Region>; MAX_BUFFERS],
    /// As a stack.
    free: [u16; MAX_BUFFERS],
    free_count: usize,
}

impl Places {
    /// `count` free places, at most 256, of `size` bytes each.
    pub fn new(count: u16, size: u64) -> Self {
        let mut places = Self {
            buffers: [None; MAX_BUFFERS],
            free: [0; MAX_BUFFERS],
            free_count: 0,
        };
        for place in 0..count {
            places.buffers[usize::from(place)] = Some(Region::take(size, 64));
            places.give(place);
        }
        places
    }

    /// A free place, and its buffer. None: all are under way.
    pub fn take(&mut self) -> Option<(u16, Region)> {
        self.free_count = self.free_count.checked_sub(1)?;
        let place = self.free[self.free_count];
        Some((place, self.buffer(place)?))
    }

    /// The buffer of a place.
    pub fn buffer(&self, place: u16) -> Option<Region> {
        self.buffers.get(usize::from(place)).copied().flatten()
    }

    /// Frees a place.
    pub fn give(&mut self, place: u16) {
        self.free[self.free_count] = place;
        self.free_count += 1;
    }

    /// How many places are under way.
    pub fn under_way(&self) -> usize {
        self.buffers.iter().flatten().count() - self.free_count
    }
}
