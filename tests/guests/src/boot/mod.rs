//! The way into ring 3, what the boot protocols tell, and the ways out.
//!
//! Both protocols lead to [`prepare`]: PVH (Xen's `hvm_start_info`) and Linux's 64-bit one (the zero page).

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::ops::Range;
use core::str;

use crate::memory::{self, Region};
use crate::{port, say, time};

global_asm!(include_str!("entry.s"));

// What the linker and the entry know. Only their addresses mean something.
unsafe extern "C" {
    static image_end: u8;
    static idt: u8;
    static fault_stubs: u8;
    static ring0_halt: u8;
    static page_pointers: u8;
}

const PVH: u64 = 1;
const START_INFO_MAGIC: u32 = 0x336e_c578;
const USABLE: u32 = 1;
const COMMAND_LINE_SIZE: usize = 4096;
const MAX_RANGES: usize = 16;

/// What the boot protocol told, copied before anything is written to the memory it lay in.
struct Told {
    command_line: [u8; COMMAND_LINE_SIZE],
    command_line_len: usize,
    map: [Range<u64>; MAX_RANGES],
    map_len: usize,
    rsdp: u64,
}

struct Shared(UnsafeCell<Told>);

// SAFETY: one processor runs this. `prepare` writes, and ends before anybody reads.
unsafe impl Sync for Shared {}

static TOLD: Shared = Shared(UnsafeCell::new(Told {
    command_line: [0; COMMAND_LINE_SIZE],
    command_line_len: 0,
    map: [const { 0..0 }; MAX_RANGES],
    map_len: 0,
    rsdp: 0,
}));

fn told() -> &'static Told {
    // SAFETY: `prepare` has ended.
    unsafe { &*TOLD.0.get() }
}

/// The kernel command line.
pub fn command_line() -> &'static str {
    str::from_utf8(&told().command_line[..told().command_line_len]).unwrap_or("")
}

/// Memory that may be used, as the boot protocol tells.
pub fn memory_map() -> &'static [Range<u64>] {
    &told().map[..told().map_len]
}

/// Address of the ACPI tables' root pointer, if the boot protocol told it.
pub fn rsdp() -> Option<u64> {
    Some(told().rsdp).filter(|&address| address != 0)
}

/// Reads what the boot protocol left, takes the memory behind the program and makes the interrupt table.
pub fn prepare(protocol: u64, info: u64) {
    make_interrupt_table();
    // SAFETY: nobody else looks at it yet.
    let told = unsafe { &mut *TOLD.0.get() };
    // SAFETY: the protocols promise these structures, and they lie outside of this program.
    let (info, line, map, entries, step) = unsafe {
        let info = Region::at(info, 4096);
        if protocol == PVH {
            assert_eq!(info.get::<u32>(0), START_INFO_MAGIC, "the start info");
            let entries = u64::from(info.get::<u32>(48));
            let map = Region::at(info.get(40), entries * 24);
            told.rsdp = info.get(32);
            (info, info.get::<u64>(24), map, entries, 24)
        } else {
            let entries = u64::from(info.get::<u8>(0x1e8));
            told.rsdp = info.get(0x70);
            let line = u64::from(info.get::<u32>(0x228));
            (info, line, info.part(0x2d0, entries * 20), entries, 20)
        }
    };
    let _ = info;
    // SAFETY: as above.
    let line = unsafe { Region::at(line, COMMAND_LINE_SIZE as u64) };
    line.copy_to(0, &mut told.command_line);
    let nul = told.command_line.iter().position(|&byte| byte == 0);
    told.command_line_len = nul.unwrap_or(COMMAND_LINE_SIZE);
    for index in 0..entries {
        let entry = map.part(index * step, step);
        let (start, len, kind): (u64, u64, u32) = (entry.get(0), entry.get(8), entry.get(16));
        if kind == USABLE && told.map_len < MAX_RANGES {
            told.map[told.map_len] = start..start.saturating_add(len);
            told.map_len += 1;
        }
    }
    let end_of_image = &raw const image_end as u64;
    let home = told.map[..told.map_len]
        .iter()
        .find(|range| range.contains(&end_of_image));
    match home {
        Some(range) => memory::give(end_of_image, range.end.min(1 << 32)),
        None => panic!("the memory map does not have the place that this program was loaded to"),
    }
}

fn make_interrupt_table() {
    for vector in 0..32 {
        set_gate(vector, &raw const fault_stubs as u64 + vector * 16);
    }
}

/// Lets exception `vector` lead to `handler`, in ring 0.
fn set_gate(vector: u64, handler: u64) {
    const GATE: u64 = 0x8e00;
    const RING0_CODE: u64 = 0x10;
    // SAFETY: the entry reserves a page for the table.
    let table = unsafe { Region::at(&raw const idt as u64, 4096) };
    let low = handler & 0xffff | RING0_CODE << 16 | GATE << 32 | (handler >> 16 & 0xffff) << 48;
    table.put(vector * 16, low);
    table.put(vector * 16 + 8, handler >> 32);
}

const INVALID_OPCODE: u64 = 6;

/// Maps the memory from `start` to `end`, which lie above 4 GiB, one to one.
pub(crate) fn map(start: u64, end: u64) {
    const GIB: u64 = 1 << 30;
    const TABLE: u64 = 0x27;
    const PAGE_2M: u64 = 0xe7;
    // SAFETY: the entry reserves a page for the table.
    let pointers = unsafe { Region::at(&raw const page_pointers as u64, 4096) };
    for gib in start / GIB..end.div_ceil(GIB) {
        assert!(gib < 512, "memory above 512 GiB is not mapped");
        if pointers.get::<u64>(gib * 8) != 0 {
            continue;
        }
        let directory = Region::take(4096, 4096);
        for page in 0..512 {
            directory.put(page * 8, (gib * GIB + (page << 21)) | PAGE_2M);
        }
        pointers.put(gib * 8, directory.address() | TABLE);
    }
}

/// Resets the machine: by the keyboard controller, or where there is none by a triple fault.
pub fn reset() -> ! {
    port::write(0x64, 0xfe);
    // A machine may take a moment to stop its processors, and none takes as long as this.
    let deadline = time::Deadline::after(1 << 29);
    while !deadline.is_over() {
        time::pause();
    }
    // SAFETY: nothing follows: without the table, the exception cannot be delivered.
    unsafe {
        Region::at(&raw const idt as u64, 4096).fill(0);
        asm!("ud2", options(noreturn))
    }
}

/// Stops the processor for good.
pub fn halt() -> ! {
    // Ring 0 is reached by an exception: not every KVM delivers software interrupts from ring 3.
    set_gate(INVALID_OPCODE, &raw const ring0_halt as u64);
    // SAFETY: the gate leads to `ring0_halt`, which does not come back.
    unsafe { asm!("ud2", options(noreturn)) }
}

/// Where the entry leads after an exception.
#[unsafe(no_mangle)]
extern "C" fn fault_ring3(vector: u64, code: u64, at: u64, address: u64) -> ! {
    say!("FAULT {vector} at {at:#x}, code {code:#x}, address {address:#x}");
    reset()
}
