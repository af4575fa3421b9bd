//! Devices by address: what answers when a vCPU reads or writes a port or a register.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lepton_devices::guest_warn;
use lepton_devices::legacy::i8042::{I8042, PortWrite};
use lepton_devices::legacy::ioapic::{self, IoApic};
use lepton_devices::legacy::serial::SerialPort;
use lepton_devices::virtio::transport::mmio::{MmioTransport, REGISTER_SPACE};

use super::Stop;
use crate::arch::x86_64::{acpi, layout};
use crate::machine::boot_timer::BootTimer;

const SERIAL: u16 = 0x3f8;
const SERIAL_END: u16 = SERIAL + 7;
const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;

/// All that a guest can reach by an address. Built once, before the first vCPU runs.
pub struct Bus {
    /// COM1.
    pub serial: Arc<Mutex<SerialPort>>,
    /// Keyboard controller.
    pub i8042: Arc<Mutex<I8042>>,
    /// I/O APIC.
    pub ioapic: Arc<IoApic>,
    /// virtio devices, page after page from [`layout::VIRTIO_MMIO`].
    pub virtio: Vec<Mutex<MmioTransport>>,
    /// Present with `--boot-timer`.
    pub boot_timer: Option<BootTimer>,
}

impl Bus {
    /// A guest's write to a port. Something comes back if it ends the machine.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<Stop> {
        match port {
            SERIAL..=SERIAL_END => {
                // A string instruction writes the same port again and again.
                let mut serial = lock(&self.serial);
                for byte in data {
                    serial.write((port - SERIAL) as u8, *byte);
                }
                None
            }
            I8042_DATA | I8042_COMMAND => {
                let mut i8042 = lock(&self.i8042);
                let reset = data
                    .iter()
                    .any(|b| i8042.write(port - I8042_DATA, *b) == PortWrite::Reset);
                reset.then_some(Stop::Reset)
            }
            acpi::SLEEP_CONTROL_PORT if data == [acpi::POWER_OFF] => Some(Stop::PowerOff),
            _ => None,
        }
    }

    /// A guest's read of a port. Nothing there reads as all ones, as on a PC.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL..=SERIAL_END => {
                let mut serial = lock(&self.serial);
                for byte in data {
                    *byte = serial.read((port - SERIAL) as u8);
                }
            }
            I8042_DATA | I8042_COMMAND => {
                let mut i8042 = lock(&self.i8042);
                for byte in data {
                    *byte = i8042.read(port - I8042_DATA);
                }
            }
            acpi::SLEEP_CONTROL_PORT | acpi::SLEEP_STATUS_PORT => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// A guest's write to a register.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        match self.find(address) {
            Some(Target::Virtio(transport, offset)) => lock(transport).write(offset, data),
            Some(Target::IoApic(offset)) => self.ioapic.write(offset, data),
            Some(Target::BootTimer(timer)) => timer.write(data),
            None => guest_warn!(
                "write of {} bytes at {address:#x}: nothing there",
                data.len()
            ),
        }
    }

    /// A guest's read of a register. Nothing there reads as all ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some(Target::Virtio(transport, offset)) => lock(transport).read(offset, data),
            Some(Target::IoApic(offset)) => self.ioapic.read(offset, data),
            Some(Target::BootTimer(_)) => data.fill(0),
            None => {
                guest_warn!(
                    "read of {} bytes at {address:#x}: nothing there",
                    data.len()
                );
                data.fill(0xff);
            }
        }
    }

    fn find(&self, address: u64) -> Option<Target<'_>> {
        if let Some(offset) = address.checked_sub(ioapic::BASE) {
            return (offset < ioapic::LENGTH).then_some(Target::IoApic(offset));
        }
        if address == layout::BOOT_TIMER {
            return self.boot_timer.as_ref().map(Target::BootTimer);
        }
        let offset = address.checked_sub(layout::VIRTIO_MMIO)?;
        let page = usize::try_from(offset / REGISTER_SPACE).ok()?;
        let transport = self.virtio.get(page)?;
        Some(Target::Virtio(transport, offset % REGISTER_SPACE))
    }
}

enum Target<'a> {
    Virtio(&'a Mutex<MmioTransport>, u64),
    IoApic(u64),
    BootTimer(&'a BootTimer),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
