//! The MultiProcessor table (Intel MultiProcessor Specification 1.4): processors and interrupts for a kernel without
//! ACPI.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use lepton_devices::Memory;
use lepton_devices::legacy::ioapic;

const CPU_FEATURES: u32 = 0x201; // FPU and on-chip APIC.
const CPU_STEPPING: u32 = 0x600;
const APIC_VERSION: u8 = 0x14;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
const EDGE_ACTIVE_HIGH: u16 = 0x5; // polarity 01: active high, trigger 01: edge.
const INT: u8 = 0;
const EXT_INT: u8 = 3;
const NMI: u8 = 1;

/// Room for the table.
const CAPACITY: u64 = layout::MP_POINTER - layout::EBDA;

/// The configuration table's bytes for `vcpus` processors and an I/O APIC of `pins` pins.
fn table(vcpus: u8, pins: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for apic_id in 0..vcpus {
        let flags = ENABLED | if apic_id == 0 { BOOT_PROCESSOR } else { 0 };
        let mut entry = vec![0, apic_id, APIC_VERSION, flags];
        entry.extend(CPU_STEPPING.to_le_bytes());
        entry.extend(CPU_FEATURES.to_le_bytes());
        entry.extend([0; 8]);
        add(&entry);
    }
    add(b"\x01\x00ISA   ");
    let mut io_apic = vec![2, io_apic_id, 0x11, ENABLED];
    io_apic.extend((ioapic::BASE as u32).to_le_bytes());
    add(&io_apic);
    let interrupt = |entry: u8, kind: u8, flags: u16, source: u8, apic: u8, pin: u8| {
        let [low, high] = flags.to_le_bytes();
        [entry, kind, low, high, 0, source, apic, pin]
    };
    for pin in 0..pins {
        add(&interrupt(3, INT, EDGE_ACTIVE_HIGH, pin, io_apic_id, pin));
    }
    add(&interrupt(4, EXT_INT, 0, 0, 0, 0));
    add(&interrupt(4, NMI, 0, 0, 0xff, 1));

    // Section 4.2: the configuration table's header, 44 bytes.
    let length = 44 + entries.len() as u16;
    let mut config = Vec::from(*b"PCMP");
    config.extend(length.to_le_bytes());
    config.extend([4, 0]); // specification 1.4; checksum, below
    config.extend(b"LEPTON  MICROVM     ");
    config.extend([0; 6]); // no OEM table
    config.extend(count.to_le_bytes());
    config.extend(layout::LOCAL_APIC.to_le_bytes());
    config.extend([0; 4]); // no extended table
    config.extend(entries);
    config[7] = checksum(&config);

    config
}

/// The floating pointer's bytes (section 4.1), for a table at `at`.
fn pointer(at: u64) -> Vec<u8> {
    let mut floating = Vec::from(*b"_MP_");
    floating.extend((at as u32).to_le_bytes());
    floating.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    floating[10] = checksum(&floating);
    floating
}

/// The byte that makes all bytes add up to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b))
}

/// Writes the table and the pointer to it into the EBDA.
pub fn write(memory: &Memory, vcpus: u8, pins: u8) -> Result<(), GuestMemoryError> {
    let bytes = table(vcpus, pins);
    debug_assert!(bytes.len() as u64 <= CAPACITY);
    memory.write_slice(&bytes, GuestAddress(layout::EBDA))?;
    memory.write_slice(&pointer(layout::EBDA), GuestAddress(layout::MP_POINTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_lengths_and_room() {
        let sum = |b: &[u8]| b.iter().fold(0u8, |s, b| s.wrapping_add(*b));
        assert_eq!(sum(&pointer(layout::EBDA)), 0);
        for (vcpus, pins) in [(1, 5), (2, 24), (32, ioapic::MAX_PINS as u8)] {
            let bytes = table(vcpus, pins);
            assert_eq!(sum(&bytes), 0);
            let length = u16::from_le_bytes([bytes[4], bytes[5]]);
            assert_eq!(usize::from(length), bytes.len());
            let count = u16::from_le_bytes([bytes[34], bytes[35]]);
            assert_eq!(
                usize::from(count),
                usize::from(vcpus) + 2 + usize::from(pins) + 2
            );
            assert!(bytes.len() as u64 <= CAPACITY, "{} bytes", bytes.len());
        }
    }
}
