//! The generation of a machine: random bytes in its memory that are others whenever a machine begins, be it by a boot, from
//! a snapshot or as a copy, and an interrupt for a guest that goes on. A kernel that looks at them (Linux does, where it has
//! ACPI) draws no random number twice, also without an agent.

use lepton_devices::legacy::ioapic::IoApic;
use vm_memory::{GuestAddress, GuestMemoryError};

use crate::arch::x86_64::layout;
use crate::memory::Ram;

/// A generation ID: bytes without an order.
#[derive(Clone, Copy)]
pub struct Generation(pub [u8; 16]);

impl Generation {
    /// Puts it where the ACPI tables say it is. Nobody has touched that memory yet.
    pub fn write(self, ram: &Ram) -> Result<(), GuestMemoryError> {
        ram.put(GuestAddress(layout::GENERATION_ID), &self.0)
    }

    /// Tells a guest that goes on. One that does not listen now is told when it unmasks the interrupt.
    pub fn tell(ioapic: &IoApic) {
        ioapic.raise(layout::GENERATION_IRQ as usize);
    }
}
