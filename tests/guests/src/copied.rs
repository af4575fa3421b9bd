//! A guest that waits, in the midst of its life, until it goes on as a copy of itself: for tests of machines that were saved and
//! loaded, or cloned.

use core::cell::Cell;

use crate::memory::Region;
use crate::{arguments, say, time};

/// Where a VMM may put its tables.
const FIRMWARE: (u64, u64) = (0xe_0000, 0x2_0000);
/// `Name (ADDR, Package (2) { DWord, 0 })`: of the generation ID (Microsoft's Virtual Machine Generation ID, 2012).
const ADDRESS: &[u8] = b"ADDR\x12\x08\x02\x0c";

struct Done(Cell<bool>);

// SAFETY: one processor runs this.
unsafe impl Sync for Done {}

static DONE: Done = Done(Cell::new(false));

/// With the argument `copied=1`, says `WAITS` and goes on when the machine is another. The first call counts.
pub fn wait() {
    if DONE.0.replace(true) || arguments::number("copied", 0) == 0 {
        return;
    }
    let id = generation();
    let now = || (id.get::<u64>(0), id.get::<u64>(8));
    let before = now();
    say!("WAITS");
    while now() == before {
        time::pause();
    }
}

/// The generation ID.
fn generation() -> Region {
    // SAFETY: the first 4 GiB are mapped, and this program's own part of it is no table.
    let tables = unsafe { Region::at(FIRMWARE.0, FIRMWARE.1) };
    let end = tables.len() - ADDRESS.len() as u64 - 4;
    let is_it =
        |at: &u64| (ADDRESS.iter().zip(*at..)).all(|(&byte, at)| tables.get::<u8>(at) == byte);
    match (0..end).find(is_it) {
        // SAFETY: as above.
        Some(at) => unsafe { Region::at(u64::from(tables.get::<u32>(at + 8)), 16) },
        None => panic!("the machine has no generation ID"),
    }
}
