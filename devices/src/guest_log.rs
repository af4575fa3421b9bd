//! Log lines that a guest can cause, bounded so that a guest cannot fill the host's disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Lines a call site may log in one period.
const BURST: u64 = 10;
/// Length of a period in milliseconds.
const PERIOD_MS: u64 = 5_000;

/// Allows [`BURST`] lines per period and counts the rest.
#[derive(Debug, Default)]
pub struct LogLimit {
    /// Upper 44 bits: the period's number; lower 20 bits: lines asked for in it, saturating.
    state: AtomicU64,
}

/// What to do with a line.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum Verdict {
    /// Log it.
    Log,
    /// Log it, and say that more of the like will be dropped for a while.
    LogLast,
    /// Drop it.
    Drop,
}

impl LogLimit {
    /// A limit with nothing used yet.
    pub const fn new() -> Self {
        LogLimit {
            state: AtomicU64::new(0),
        }
    }

    /// Asks for one line at `now_ms` milliseconds since some fixed moment.
    pub fn ask_at(&self, now_ms: u64) -> Verdict {
        let period = now_ms / PERIOD_MS + 1;
        let mut count = 0;
        // The closure always returns a value, so the update cannot fail.
        let _ = self
            .state
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
                count = if old >> 20 == period {
                    (old & 0xf_ffff).saturating_add(1).min(0xf_ffff)
                } else {
                    1
                };
                Some((period << 20) | count)
            });
        match count {
            n if n < BURST => Verdict::Log,
            BURST => Verdict::LogLast,
            _ => Verdict::Drop,
        }
    }

    /// Asks for one line now.
    pub fn ask(&self) -> Verdict {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        let elapsed = START.get_or_init(Instant::now).elapsed().as_millis();
        self.ask_at(u64::try_from(elapsed).unwrap_or(u64::MAX >> 21))
    }
}

/// Like [`log::warn!`] for what a guest can cause: each call site logs at most ten lines in five seconds.
#[macro_export]
macro_rules! guest_warn {
    ($($arg:tt)+) => {{
        static LIMIT: $crate::guest_log::LogLimit = $crate::guest_log::LogLimit::new();
        match LIMIT.ask() {
            $crate::guest_log::Verdict::Log => ::log::warn!($($arg)+),
            $crate::guest_log::Verdict::LogLast => {
                ::log::warn!($($arg)+);
                ::log::warn!("more lines like the last are dropped for up to 5 s");
            }
            $crate::guest_log::Verdict::Drop => {}
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_silence_then_a_new_period() {
        let limit = LogLimit::new();
        let count = |ms| {
            (0..1000)
                .filter(|_| limit.ask_at(ms) != Verdict::Drop)
                .count() as u64
        };
        assert_eq!(count(0), BURST);
        assert_eq!(count(PERIOD_MS - 1), 0);
        assert_eq!(count(PERIOD_MS), BURST);
    }
}
