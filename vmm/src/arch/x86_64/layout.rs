//! The guest's physical address space.
//!
//! ```text
//! 0x0000_0500  GDT                         0xc000_0000  hole: nothing but devices
//! 0x0000_6000  PVH start info, memory map  0xc000_1000  virtio-mmio pages, one per device
//! 0x0000_7000  zero page                   0xfec0_0000  I/O APIC
//! 0x0000_9000  boot page tables            0xfee0_0000  local APICs
//! 0x0002_0000  kernel command line         1_0000_0000  the rest of RAM
//! 0x0009_f000  EBDA: MP table
//! 0x000e_0000  RSDP and ACPI tables
//! 0x000f_f000  generation ID
//! 0x0010_0000  kernel
//! ```

/// Boot GDT, five entries of 8 bytes.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// Memory map handed over by the PVH protocol.
pub const PVH_MEMORY_MAP: u64 = 0x6100;
/// Module list of the PVH protocol.
pub const PVH_MODULES: u64 = 0x6040;
/// `boot_params`, the zero page of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer, growing down.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page map level 4 of the boot page tables; the two levels below follow page by page.
pub const BOOT_PML4: u64 = 0x9000;
/// Kernel command line, NUL-terminated.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes for the command line, with its NUL: `COMMAND_LINE_SIZE` of x86 Linux.
pub const COMMAND_LINE_SIZE: usize = 2048;
/// Extended BIOS data area: the MP table lies here, and RAM as the guest may use it ends.
pub const EBDA: u64 = 0x9_f000;
/// The MP table's floating pointer: in the last KiB of base memory, where a kernel searches (MP 1.4, 4).
pub const MP_POINTER: u64 = 0x9_fc00;
/// End of the EBDA.
pub const EBDA_END: u64 = 0xa_0000;
/// Root system description pointer; on the 16-byte grid that a kernel searches (ACPI 6.5, 5.2.5.1).
pub const RSDP: u64 = 0xe_0000;
/// End of the area for the RSDP and the ACPI tables.
pub const ACPI_END: u64 = GENERATION_ID;
/// The machine's generation ID, in a page that holds nothing else and that no kernel takes for free memory.
pub const GENERATION_ID: u64 = 0xf_f000;
/// Where RAM above the first MiB begins; nothing of a kernel may be loaded below it.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Beginning of the hole below 4 GiB.
pub const HOLE: u64 = 0xc000_0000;
/// End of the hole: RAM goes on here.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// The boot timer's register (`--boot-timer`), one byte.
pub const BOOT_TIMER: u64 = HOLE;
/// First virtio-mmio page.
pub const VIRTIO_MMIO: u64 = 0xc000_1000;
/// Local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that Intel's virtualization needs in guest space when a vCPU is in real mode.
pub const TSS: usize = 0xfffb_d000;

/// Interrupt of the keyboard controller.
pub const I8042_IRQ: u32 = 1;
/// Interrupt by which a guest is told that its generation ID has changed. On a PC the second serial port has it.
pub const GENERATION_IRQ: u32 = 3;
/// Interrupt of the first serial port.
pub const SERIAL_IRQ: u32 = 4;
/// First interrupt for a virtio device.
pub const VIRTIO_IRQ: u32 = 5;

/// RAM as (guest physical address, bytes), for `bytes` of it in all: one run below the hole, the rest above.
pub fn ram(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(HOLE);
    let mut regions = vec![(0, low)];
    if bytes > low {
        regions.push((HOLE_END, bytes - low));
    }
    regions
}

/// RAM that a kernel may use, as (address, bytes): [`ram`] without the areas in which tables lie.
pub fn usable_ram(bytes: u64) -> Vec<(u64, u64)> {
    let mut usable = vec![(0, EBDA)];
    for (start, len) in ram(bytes) {
        let end = start.saturating_add(len);
        let start = start.max(HIGH_MEMORY);
        if start < end {
            usable.push((start, end - start));
        }
    }
    usable
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sizes around all that could matter: tables, the hole, what is above it.
    fn sizes() -> impl Strategy<Value = u64> {
        let near = |at: u64| (0u64..64).prop_map(move |page| at + page * 4096);
        prop_oneof![
            near(HIGH_MEMORY),
            near(HOLE - 32 * 4096),
            near(HOLE_END - 32 * 4096),
            (1u64..1 << 20).prop_map(|mib| mib << 20),
        ]
    }

    /// The obvious map: byte `n` of memory is at `n` below the hole, and else as far above it.
    fn address_of(byte: u64) -> u64 {
        match byte < HOLE {
            true => byte,
            false => HOLE_END + (byte - HOLE),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// What a kernel is told is RAM is RAM, all of it but where tables lie, and each byte is told of once.
        #[test]
        fn what_is_usable_is_what_the_obvious_map_has(
            bytes in sizes(),
            probes in prop::collection::vec((any::<u64>(), 0usize..8, -2i64..3), 32),
        ) {
            let places = [0, EBDA, EBDA_END, HIGH_MEMORY, HOLE, HOLE_END, bytes, address_of(bytes)];
            let is_ram = |address: u64| match address < HOLE {
                true => address < bytes,
                false => address >= HOLE_END && address - HOLE_END + HOLE < bytes,
            };
            let (ram, usable) = (ram(bytes), usable_ram(bytes));
            for (any, place, offset) in probes {
                for address in [any % (2 * bytes + HOLE_END), places[place].saturating_add_signed(offset)] {
                    let times = |runs: &[(u64, u64)]| {
                        let has = |&&(start, len): &&(u64, u64)| start <= address && address - start < len;
                        runs.iter().filter(has).count()
                    };
                    prop_assert_eq!(times(&ram), usize::from(is_ram(address)));
                    let is_free = !(EBDA..HIGH_MEMORY).contains(&address);
                    prop_assert_eq!(times(&usable), usize::from(is_ram(address) && is_free), "{:#x}", address);
                }
            }
            prop_assert!(usable.is_sorted() && usable.len() <= 3);
        }

        #[test]
        fn ram_adds_up_and_leaves_the_hole(mib in 1u64..1 << 20) {
            let bytes = mib << 20;
            let regions = ram(bytes);
            prop_assert_eq!(regions.iter().map(|r| r.1).sum::<u64>(), bytes);
            for (start, len) in regions {
                let end = start + len;
                prop_assert!(len > 0 && (end <= HOLE || start >= HOLE_END));
            }
            for (start, len) in usable_ram(bytes) {
                let end = start + len;
                prop_assert!(end <= EBDA || start >= HIGH_MEMORY);
            }
        }
    }
}
