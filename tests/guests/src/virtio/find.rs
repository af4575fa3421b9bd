//! Where the devices are: the command line's `virtio_mmio.device=`, or else ACPI's. `find=acpi` does without the former.

use super::mmio::{MAGIC, Mmio, register};
use crate::memory::Region;
use crate::{arguments, boot};

/// A kind of device (VIRTIO 1.3, 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Network.
    Net = 1,
    /// Block.
    Block = 2,
    /// Sockets.
    Vsock = 19,
}

/// As many as any machine has.
const MAX: usize = 64;

/// The device number `index` of a kind.
pub fn device(kind: Kind, index: usize) -> Option<Mmio> {
    devices()
        .into_iter()
        .flatten()
        .filter(|device| device.read(register::DEVICE_ID) == kind as u32)
        .nth(index)
}

/// All places with a device that this driver understands.
pub fn devices() -> [Option<Mmio>; MAX] {
    let mut found = [None; MAX];
    let mut count = 0;
    let mut add = |address: u64| {
        let device = Mmio::new(address);
        if count < MAX
            && device.read(register::MAGIC) == MAGIC
            && device.read(register::DEVICE_ID) != 0
        {
            let version = device.read(register::VERSION);
            assert_eq!(
                version, 2,
                "a device has only the legacy interface; QEMU: -global virtio-mmio.force-legacy=false"
            );
            found[count] = Some(device);
            count += 1;
        }
    };
    let mut told = false;
    let only_acpi = arguments::text("find") == Some("acpi");
    let words = arguments::words().filter(|_| !only_acpi);
    for value in words.filter_map(|word| word.strip_prefix("virtio_mmio.device=")) {
        // 4K@0xc0001000:5
        let address = value
            .split_once('@')
            .and_then(|(_, rest)| rest.split(':').next());
        if let Some(address) = address.and_then(arguments::parse_number) {
            add(address);
            told = true;
        }
    }
    if !told {
        in_acpi(&mut add);
    }
    found
}

/// Bytes of firmware.
fn firmware(address: u64, len: u64) -> Region {
    // SAFETY: the first 4 GiB are mapped, and this program's own part of it is no table.
    unsafe { Region::at(address, len) }
}

/// Whether `bytes` are at `offset`.
fn has(table: Region, offset: u64, bytes: &[u8]) -> bool {
    bytes
        .iter()
        .zip(offset..)
        .all(|(&byte, at)| at < table.len() && table.get::<u8>(at) == byte)
}

fn find_rsdp() -> Option<Region> {
    let area = || (0xe_0000..0x10_0000).step_by(16);
    boot::rsdp()
        .into_iter()
        .chain(area())
        .map(|address| firmware(address, 36))
        .find(|table| has(*table, 0, b"RSD PTR "))
}

/// The table at `address`, all of it.
fn table(address: u64) -> Region {
    let len: u32 = firmware(address, 36).get(4);
    firmware(address, u64::from(len))
}

/// Goes from the root pointer to the DSDT and finds the devices in its bytecode by their form: the hardware ID
/// LNRO0005, and a fixed range of memory soon after it.
fn in_acpi(add: &mut impl FnMut(u64)) {
    let Some(rsdp) = find_rsdp() else {
        return;
    };
    let (root, step) = match rsdp.get::<u8>(15) {
        0 => (table(u64::from(rsdp.get::<u32>(16))), 4),
        _ => (table(rsdp.get(24)), 8),
    };
    let mut at = 36;
    while at + step <= root.len() {
        let address = match step {
            4 => u64::from(root.get::<u32>(at)),
            _ => root.get(at),
        };
        at += step;
        let fadt = table(address);
        if !has(fadt, 0, b"FACP") {
            continue;
        }
        let dsdt = match fadt.len() >= 148 && fadt.get::<u64>(140) != 0 {
            true => fadt.get(140),
            false => u64::from(fadt.get::<u32>(40)),
        };
        in_bytecode(table(dsdt), add);
    }
}

fn in_bytecode(code: Region, add: &mut impl FnMut(u64)) {
    const ID: &[u8] = b"LNRO0005";
    /// Memory32Fixed, with the length of what follows (ACPI 6.5, 6.4.3.4).
    const MEMORY32: &[u8] = &[0x86, 9, 0];
    for at in 0..code.len() {
        if has(code, at, ID) {
            let near = at..at.saturating_add(128).min(code.len().saturating_sub(12));
            if let Some(range) = near.into_iter().find(|&at| has(code, at, MEMORY32)) {
                add(u64::from(code.get::<u32>(range + 4)));
            }
        }
    }
}
