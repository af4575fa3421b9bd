//! What the VMM is told about the time that its start has taken.

use rustix::time::{ClockId, clock_gettime};

/// Microseconds on `clock`.
fn microseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0) / 1000;
    seconds.saturating_mul(1_000_000).saturating_add(rest)
}

/// When the jailer started, and what it has used.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    start: u64,
    used_before: u64,
}

impl Clock {
    /// The jailer starts now.
    pub fn start() -> Self {
        Self {
            start: microseconds(ClockId::Monotonic),
            used_before: 0,
        }
    }

    /// For a child that is made now, whose CPU clock starts at 0.
    pub fn before_fork(self) -> Self {
        Self {
            used_before: self
                .used_before
                .saturating_add(microseconds(ClockId::ProcessCPUTime)),
            ..self
        }
    }

    /// For the VMM that is about to run: the wall clock at the start, this process's CPU clock now, and all CPU time used
    /// until now.
    pub fn now(self) -> (u64, u64, u64) {
        let own = microseconds(ClockId::ProcessCPUTime);
        (self.start, own, self.used_before.saturating_add(own))
    }
}
