//! Touching memory: what the host has to do when it is touched first, and after that.

use guest::memory::{self, Region};
use guest::statistics::Times;
use guest::time::ticks;
use guest::{arguments, boot, copied, say};

use crate::report::{Run, refuse};

pub fn run() {
    let stride = arguments::number("stride", 4096);
    if stride < 8 {
        refuse("stride is less than 8");
    }
    let available: u64 = memory::everything_left().map(Region::len).sum();
    let wanted = match arguments::number("mib", 0) {
        0 => available,
        mib => mib.saturating_mul(1 << 20),
    };
    if wanted > available {
        say!("PROBE {{\"available\":{available}}}");
        refuse("the machine has not as much memory");
    }
    pass("touch_write", wanted, stride, |region, offset| {
        region.put(offset, region.address() + offset);
        0
    });
    copied::wait();
    pass("touch_read", wanted, stride, |region, offset| {
        u64::from(region.get::<u64>(offset) != region.address() + offset)
    });
}

/// Touches memory, says so, and writes the first part of it again and again for ever. Without such a part the processor
/// stops.
pub fn churn() {
    let available: u64 = memory::everything_left().map(Region::len).sum();
    let wanted = match arguments::number("mib", 0) {
        0 => available,
        mib => mib.saturating_mul(1 << 20),
    };
    let again = arguments::number("kib", 0).saturating_mul(1 << 10);
    if wanted > available || again > wanted {
        refuse("the machine has not as much memory");
    }
    write(wanted, 1);
    say!("PROBE {{\"mode\":\"churn\",\"bytes\":{wanted}}}");
    if again == 0 {
        boot::halt();
    }
    let mut round = 2;
    loop {
        write(again, round);
        round += 1;
    }
}

/// A word in each page of the first `bytes` bytes.
fn write(bytes: u64, value: u64) {
    let mut left = bytes;
    for region in memory::everything_left() {
        let region = region.part(0, region.len().min(left));
        left -= region.len();
        let mut offset = 0;
        while offset + 8 <= region.len() {
            region.put(offset, value);
            offset += 4096;
        }
    }
}

fn pass(mode: &str, wanted: u64, stride: u64, mut touch: impl FnMut(Region, u64) -> u64) {
    let mut times = Times::new();
    let (mut errors, mut left) = (0, wanted);
    let start = ticks();
    let mut before = start;
    for region in memory::everything_left() {
        let region = region.part(0, region.len().min(left));
        left -= region.len();
        let mut offset = 0;
        while offset + 8 <= region.len() {
            errors += touch(region, offset);
            let now = ticks();
            times.add(now - before);
            before = now;
            offset += stride;
        }
    }
    let run = Run {
        mode,
        ticks: before - start,
        bytes: wanted,
        errors,
        times: &times,
    };
    run.tell(format_args!(",\"stride\":{stride}"));
}
