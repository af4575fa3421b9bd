//! `--boot-timer`: a register by which a guest says that it has booted, and the log says how long that took.

use std::time::Instant;

/// What the guest writes.
const BOOTED: u8 = 123;

/// Counts from InstanceStart.
pub struct BootTimer {
    started: Instant,
    cpu_started: Instant,
}

impl BootTimer {
    /// A timer that starts now.
    pub fn new() -> Self {
        let now = Instant::now();
        BootTimer {
            started: now,
            cpu_started: now,
        }
    }

    /// A guest's write.
    pub fn write(&self, data: &[u8]) {
        if data == [BOOTED] {
            let wall = self.started.elapsed();
            let cpu = self.cpu_started.elapsed();
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
