//! The time stamp counter, the only clock.

use core::arch::x86_64::{_mm_pause, _rdtsc};

use crate::arguments;

/// Ticks since some moment.
pub fn ticks() -> u64 {
    // SAFETY: every processor that runs this has the counter, and nothing forbids it in ring 3.
    unsafe { _rdtsc() }
}

/// Ticks in a second, as the command line says (`tsc_khz`); 2 GHz unless it says.
pub fn ticks_per_second() -> u64 {
    arguments::number("tsc_khz", 2_000_000).saturating_mul(1000)
}

/// Lets the other half of a processor work.
pub fn pause() {
    _mm_pause();
}

/// A moment to come.
#[derive(Clone, Copy)]
pub struct Deadline(u64);

impl Deadline {
    /// In that many ticks.
    pub fn after(length: u64) -> Self {
        Self(ticks().saturating_add(length))
    }

    /// Whether it has come.
    pub fn is_over(self) -> bool {
        ticks() >= self.0
    }
}
