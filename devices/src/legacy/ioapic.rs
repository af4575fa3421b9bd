//! An I/O APIC (Intel 82093AA) that turns edges on its pins into messages to the local APICs.
//!
//! The local APICs are the kernel's; with this one kept here, the machine needs neither interrupt routes nor irqfds,
//! whose making and tearing down each waits for a grace period of the host kernel. All lines are edge triggered: a
//! guest that asks for a level trigger gets edges, and the firmware tables say so.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::virtio::interrupt::IrqLine;
use crate::virtio::state::RestoreError;

/// Most pins, and so interrupt numbers, a machine has. More than the chip's 24; the version register tells the guest
/// how many there are. A kernel reads and writes the registers of every pin at its start, each a trip to this
/// process, so a machine gets no more than its devices need.
pub const MAX_PINS: usize = 64;
/// Guest physical address of the registers, where every PC has them.
pub const BASE: u64 = 0xfec0_0000;
/// Bytes of register space.
pub const LENGTH: u64 = 0x1000;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const ID: u32 = 0x00;
const VERSION: u32 = 0x01;
const ARBITRATION: u32 = 0x02;
const FIRST_ENTRY: u32 = 0x10;
const CHIP_VERSION: u32 = 0x11;

const ID_BITS: u32 = 0x0f00_0000;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR are read-only.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;

/// Where messages to the local APICs go (Intel SDM 3A, 11.11).
pub trait MsiSink: Send + Sync {
    /// Sends one message.
    fn send(&self, address: u64, data: u32);
}

/// A pin as saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinState {
    /// Redirection entry.
    pub entry: u64,
    /// An edge waits for the unmasking.
    pub pending: bool,
}

/// The chip as saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// The register that the window shows.
    pub select: u32,
    /// ID register.
    pub id: u32,
    /// One per pin.
    pub pins: Vec<PinState>,
}

#[derive(Clone, Copy)]
struct Pin {
    entry: u64,
    /// An edge came while the pin was masked.
    pending: bool,
}

struct Registers {
    select: u32,
    id: u32,
    pins: Vec<Pin>,
}

/// The chip. Shared by the vCPUs, which set it up, and by every device that raises a line.
pub struct IoApic {
    registers: Mutex<Registers>,
    sink: Box<dyn MsiSink>,
}

impl IoApic {
    /// A chip with `pins` pins, 1 to [`MAX_PINS`], in its reset state: every pin masked.
    pub fn new(sink: Box<dyn MsiSink>, pins: usize) -> Self {
        let masked = Pin {
            entry: MASKED,
            pending: false,
        };
        IoApic {
            registers: Mutex::new(Registers {
                select: 0,
                id: 0,
                pins: vec![masked; pins.clamp(1, MAX_PINS)],
            }),
            sink,
        }
    }

    /// The line into pin `pin` of `chip`; `None` if there is no such pin.
    pub fn line(chip: &Arc<IoApic>, pin: usize) -> Option<Arc<dyn IrqLine>> {
        (pin < chip.lock().pins.len()).then(|| {
            Arc::new(Line {
                chip: chip.clone(),
                pin,
            }) as Arc<dyn IrqLine>
        })
    }

    /// An edge on pin `pin`.
    pub fn raise(&self, pin: usize) {
        let mut registers = self.lock();
        let Some(state) = registers.pins.get_mut(pin) else {
            return;
        };
        if state.entry & MASKED != 0 {
            state.pending = true;
            return;
        }
        let entry = state.entry;
        drop(registers);
        self.deliver(entry);
    }

    /// A read of the register page. The registers are 32 bits wide; other widths read their low bytes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => self.lock().select,
            WINDOW => self.lock().window(),
            _ => 0,
        };
        for (byte, from) in data
            .iter_mut()
            .zip(value.to_le_bytes().into_iter().chain(std::iter::repeat(0)))
        {
            *byte = from;
        }
    }

    /// A write to the register page.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (byte, from) in bytes.iter_mut().zip(data) {
            *byte = *from;
        }
        let value = u32::from_le_bytes(bytes);
        let mut registers = self.lock();
        match offset {
            SELECT => registers.select = value & 0xff,
            WINDOW => {
                let fire = registers.set_window(value);
                drop(registers);
                if let Some(entry) = fire {
                    self.deliver(entry);
                }
            }
            _ => {}
        }
    }

    /// The chip now, to be saved.
    pub fn save(&self) -> IoApicState {
        let registers = self.lock();
        let Registers { select, id, pins } = &*registers;
        let pins = pins
            .iter()
            .map(|&Pin { entry, pending }| PinState { entry, pending });
        IoApicState {
            select: *select,
            id: *id,
            pins: pins.collect(),
        }
    }

    /// Takes what [`IoApic::save`] of a chip with as many pins gave.
    pub fn load(&self, state: &IoApicState) -> Result<(), RestoreError> {
        let IoApicState { select, id, pins } = state;
        let mut registers = self.lock();
        let invalid = |what, value| Err(RestoreError::Value { what, value });
        if pins.len() != registers.pins.len() {
            return invalid("number of I/O APIC pins", pins.len() as u64);
        }
        if *select > 0xff {
            return invalid("I/O APIC register", u64::from(*select));
        }
        if id & !ID_BITS != 0 {
            return invalid("I/O APIC ID", u64::from(*id));
        }
        if let Some(pin) = pins.iter().find(|pin| pin.entry & READ_ONLY != 0) {
            return invalid("I/O APIC redirection entry", pin.entry);
        }
        let pins = pins
            .iter()
            .map(|&PinState { entry, pending }| Pin { entry, pending });
        *registers = Registers {
            select: *select,
            id: *id,
            pins: pins.collect(),
        };
        Ok(())
    }

    /// Puts a redirection entry on the wire (Intel SDM 3A, 11.11.1 and 11.11.2).
    fn deliver(&self, entry: u64) {
        let destination = entry >> 56 & 0xff;
        let logical = entry >> 11 & 1;
        let address = 0xfee0_0000 | destination << 12 | logical << 2;
        let vector_and_mode = (entry & 0x7ff) as u32;
        self.sink.send(address, vector_and_mode);
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    /// The pin that the select register names, and whether the upper half of its entry is meant.
    fn selected(&self) -> Option<(usize, bool)> {
        let offset = self.select.checked_sub(FIRST_ENTRY)?;
        let pin = usize::try_from(offset / 2).ok()?;
        (pin < self.pins.len()).then_some((pin, offset % 2 == 1))
    }

    fn window(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => self.id,
            // At most MAX_PINS, and at least one.
            VERSION => CHIP_VERSION | (self.pins.len() as u32 - 1) << 16,
            _ => match self.selected() {
                Some((pin, true)) => (self.pins[pin].entry >> 32) as u32,
                Some((pin, false)) => self.pins[pin].entry as u32,
                None => 0,
            },
        }
    }

    /// Writes the selected register. An entry comes back if it is to be delivered at once: an edge had come while
    /// the pin was masked, and this write unmasks it.
    fn set_window(&mut self, value: u32) -> Option<u64> {
        if self.select == ID {
            self.id = value & ID_BITS;
            return None;
        }
        let (pin, upper) = self.selected()?;
        let pin = &mut self.pins[pin];
        let value = u64::from(value);
        pin.entry = if upper {
            (pin.entry & 0xffff_ffff) | value << 32
        } else {
            (pin.entry & !0xffff_ffff) | (value & !READ_ONLY)
        };
        let fire = pin.pending && pin.entry & MASKED == 0;
        if fire {
            pin.pending = false;
        }
        fire.then_some(pin.entry)
    }
}

struct Line {
    chip: Arc<IoApic>,
    pin: usize,
}

impl IrqLine for Line {
    fn raise(&self) {
        self.chip.raise(self.pin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Sent = Arc<Mutex<Vec<(u64, u32)>>>;

    struct Recorder(Sent);

    impl MsiSink for Recorder {
        fn send(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    fn chip() -> (Arc<IoApic>, Sent) {
        let sent = Sent::default();
        (
            Arc::new(IoApic::new(Box::new(Recorder(sent.clone())), 24)),
            sent,
        )
    }

    fn set(chip: &IoApic, register: u32, value: u32) {
        chip.write(SELECT, &register.to_le_bytes());
        chip.write(WINDOW, &value.to_le_bytes());
    }

    fn get(chip: &IoApic, register: u32) -> u32 {
        chip.write(SELECT, &register.to_le_bytes());
        let mut value = [0; 4];
        chip.read(WINDOW, &mut value);
        u32::from_le_bytes(value)
    }

    #[test]
    fn an_edge_becomes_a_message() {
        let (chip, sent) = chip();
        set(&chip, 0x10 + 2 * 5 + 1, 3 << 24);
        set(&chip, 0x10 + 2 * 5, 0x800 | 0x31);
        IoApic::line(&chip, 5).unwrap().raise();
        assert_eq!(*sent.lock().unwrap(), [(0xfee0_3004, 0x831 & 0x7ff)]);
    }

    #[test]
    fn a_masked_edge_waits_for_the_unmask_and_comes_once() {
        let (chip, sent) = chip();
        let line = IoApic::line(&chip, 9).unwrap();
        line.raise();
        line.raise();
        assert!(sent.lock().unwrap().is_empty());
        set(&chip, 0x10 + 18, 0x42);
        set(&chip, 0x10 + 18, 0x42);
        assert_eq!(*sent.lock().unwrap(), [(0xfee0_0000, 0x42)]);
    }

    #[test]
    fn registers_read_back_and_out_of_range_is_harmless() {
        let (chip, _) = chip();
        assert_eq!(get(&chip, VERSION), 0x0017_0011);
        set(&chip, ID, 0xffff_ffff);
        assert_eq!(get(&chip, ID), 0x0f00_0000);
        set(&chip, 0x10, 0xffff_ffff);
        assert_eq!(u64::from(get(&chip, 0x10)) & READ_ONLY, 0);
        for register in 0..=0xff {
            set(&chip, register, 0xa5a5_a5a5);
            get(&chip, register);
        }
        let mut wide = [0xff; 8];
        chip.read(0x20, &mut wide);
        assert_eq!(wide, [0; 8]);
        assert!(IoApic::line(&chip, 24).is_none());
    }
}
