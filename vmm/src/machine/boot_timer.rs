//! `--boot-timer`: a register by which a guest says that it has booted, and the log says how long that took.

use std::time::Duration;

use rustix::time::ClockId;

use crate::clock::time_on;

/// What the guest writes.
const BOOTED: u8 = 123;

/// Counts from InstanceStart.
pub struct BootTimer {
    wall: Duration,
    cpu: Duration,
}

impl Default for BootTimer {
    fn default() -> Self {
        BootTimer {
            wall: time_on(ClockId::Monotonic),
            cpu: time_on(ClockId::ProcessCPUTime),
        }
    }
}

impl BootTimer {
    /// A guest's write.
    pub fn write(&self, data: &[u8]) {
        if data == [BOOTED] {
            let wall = time_on(ClockId::Monotonic).saturating_sub(self.wall);
            let cpu = time_on(ClockId::ProcessCPUTime).saturating_sub(self.cpu);
            log::info!(
                "Guest-boot-time = {:>6} us {} ms, {:>6} CPU us {} CPU ms",
                wall.as_micros(),
                wall.as_millis(),
                cpu.as_micros(),
                cpu.as_millis()
            );
        }
    }
}
