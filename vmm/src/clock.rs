//! The host's clocks.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Time on `clock`.
pub fn time_on(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    // Both parts are never negative on these clocks.
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
