//! Ports, the interrupt controller, and addresses where nothing is.

use guest::port;
use guest::random::Random;
use guest::virtio::mmio::Mmio;

use crate::raw::Raw;
use crate::sandbox::Sandbox;

const IO_APIC: u64 = 0xfec0_0000;
const SELECT: u64 = 0;
const WINDOW: u64 = 0x10;
/// Delivery modes above 1 stop or reset this processor, as they should.
const DELIVERY_MODE: u32 = 0b110 << 8;

const I8042_COMMAND: u16 = 0x64;
const RESET: u8 = 0xfe;
const SLEEP_CONTROL: u16 = 0x600;
const COM1: u16 = 0x3f8;

/// One round of 16 accesses.
pub fn attack(_: &mut Raw, _: &Sandbox, random: &mut Random) -> u64 {
    for _ in 0..16 {
        match random.below(8) {
            0..4 => ports(random),
            4..6 => interrupts(random),
            _ => nothing(random),
        }
    }
    16
}

/// Makes the serial port fit for a verdict again.
pub fn restore() {
    for (register, value) in [(1, 0), (3, 3), (2, 0), (4, 8)] {
        port::write(COM1 + register, value);
    }
}

fn ports(random: &mut Random) {
    // The serial port's data register and its divisor are left alone: the verdict goes there.
    let port = match random.below(6) {
        0 => COM1 + 2 + random.below(6) as u16,
        1 => 0x60,
        2 => I8042_COMMAND,
        3 => SLEEP_CONTROL + random.below(2) as u16,
        _ => random.number() as u16,
    };
    let mut value = random.number() as u8;
    let is_line_control = port == COM1 + 3;
    if is_line_control {
        value &= 0x7f;
    }
    // What ends the machine, and what speaks for it, is not for now. Wider writes reach the ports behind as well.
    let ends =
        [I8042_COMMAND, SLEEP_CONTROL].contains(&port) && (value == RESET || value & 1 << 5 != 0);
    let speaks = (COM1..COM1 + 2).contains(&port);
    if ends || speaks {
        return;
    }
    let near_those = |port: u16| {
        // An access over the end of all ports is a fault of this program.
        let Some(last) = port.checked_add(3) else {
            return true;
        };
        let reach = port..=last;
        [I8042_COMMAND, SLEEP_CONTROL, COM1, COM1 + 1, COM1 + 3]
            .iter()
            .any(|p| reach.contains(p))
    };
    match random.below(4) {
        0 => drop(port::read(port)),
        1 if !near_those(port) => port::write16(port, random.number() as u16),
        2 if !near_those(port) => port::write32(port, random.number() as u32),
        _ => port::write(port, value),
    }
}

fn interrupts(random: &mut Random) {
    let controller = Mmio::new(IO_APIC);
    match random.below(4) {
        0 => drop(controller.read(random.below(0x100))),
        1 => controller.write8(random.below(0x20), random.number() as u8),
        _ => {
            controller.write(SELECT, random.below(0x100) as u32);
            controller.write(WINDOW, random.number() as u32 & !DELIVERY_MODE);
        }
    }
}

fn nothing(random: &mut Random) {
    let place =
        Mmio::new(0xc000_0000 + random.below(0x3ec0_0000 - 0x1000) / 0x1000 * 0x1000 + 0xff0);
    // Past the page of the last device that a machine can have.
    let place = if place.address() < 0xc010_0000 {
        Mmio::new(0xd000_0000)
    } else {
        place
    };
    match random.below(3) {
        0 => drop(place.read64(0)),
        1 => place.write8(1, 1),
        _ => place.write(0, random.number() as u32),
    }
}
