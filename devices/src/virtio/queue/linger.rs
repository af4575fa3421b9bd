//! Whether to look for the next chain a moment longer, instead of having the driver kick.
//!
//! A kick costs the guest an exit, and wakes a thread that has just gone to sleep. A driver that comes back within
//! [`WINDOW`] is worth waiting for; one that did not, though it had before, is not waited for in the next passes, of
//! which there are more each time. So a guest that kicks now and then, or one on the processor that would be waiting,
//! costs next to nothing.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

/// The longest wait.
const WINDOW: Duration = Duration::from_micros(32);
/// The longest that a pass with such waits takes, as other devices wait meanwhile, in windows.
const WINDOWS: u32 = 2;
/// Passes without a wait after waits that were in vain, at most.
const MOST_SKIPPED: u8 = 127;
/// Looks between two looks at the clock.
const LOOKS: u32 = 32;

/// How it went so far.
#[derive(Debug)]
pub(super) struct Linger {
    window: Duration,
    /// When the last pass ended.
    ended: Option<Instant>,
    /// Passes that are to be skipped.
    skip: u8,
    /// How many were the last time.
    skipped: u8,
}

/// A pass over a queue.
#[derive(Debug)]
pub(super) struct Pass {
    began: Instant,
    waits: bool,
}

impl Default for Linger {
    fn default() -> Self {
        Linger::waiting(WINDOW)
    }
}

impl Linger {
    /// One that waits for up to `window`.
    pub(super) fn waiting(window: Duration) -> Self {
        Linger {
            window,
            ended: None,
            skip: 0,
            skipped: 0,
        }
    }

    /// A pass begins `now`, because there are chains, or may be.
    pub(super) fn begin(&mut self, now: Instant) -> Pass {
        let began = now;
        let soon = self
            .ended
            .is_some_and(|ended| began.saturating_duration_since(ended) < self.window);
        let waits = soon && self.skip == 0;
        if soon {
            self.skip = self.skip.saturating_sub(1);
        }
        Pass { began, waits }
    }

    /// Waits until `has_come`, or not. Whether it has.
    pub(super) fn wait<E>(
        &mut self,
        pass: &Pass,
        clock: impl Fn() -> Instant,
        has_come: impl Fn() -> Result<bool, E>,
    ) -> Result<bool, E> {
        if !pass.waits {
            return Ok(false);
        }
        let since = clock();
        if since.saturating_duration_since(pass.began) >= WINDOWS * self.window {
            return Ok(false);
        }
        loop {
            for _ in 0..LOOKS {
                if has_come()? {
                    self.skipped = 0;
                    return Ok(true);
                }
                spin_loop();
            }
            if clock().saturating_duration_since(since) >= self.window {
                self.skipped = (self.skipped * 2 + 1).min(MOST_SKIPPED);
                self.skip = self.skipped;
                return Ok(false);
            }
        }
    }

    /// The pass is over `now`, and the driver will kick.
    pub(super) fn end(&mut self, now: Instant) {
        self.ended = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;

    use super::*;

    /// A driver that makes chains available a while after each pass, and the clock that it lives by.
    struct Driver {
        now: Cell<Instant>,
        linger: Linger,
    }

    impl Driver {
        fn new() -> Self {
            let now = Cell::new(Instant::now());
            let linger = Linger::default();
            Driver { now, linger }
        }

        fn pass_on(&self, time: Duration) {
            self.now.set(self.now.get() + time);
        }

        /// A pass that a kick begins, in which the next chain would come after `later`: whether it was waited for, and
        /// how long.
        fn kicked(&mut self, later: Duration) -> (bool, Duration) {
            let began = self.now.get();
            let pass = self.linger.begin(began);
            let came = self.linger.wait(
                &pass,
                || {
                    self.now.set(self.now.get() + Duration::from_micros(1));
                    self.now.get()
                },
                || Ok::<_, Infallible>(self.now.get() >= began + later),
            );
            let Ok(came) = came;
            self.linger.end(self.now.get());
            (came, self.now.get() - began)
        }
    }

    const SOON: Duration = Duration::from_micros(10);
    const NEVER: Duration = Duration::from_secs(1);

    #[test]
    fn a_driver_that_comes_back_soon_is_waited_for() {
        let mut driver = Driver::new();
        assert_eq!(driver.kicked(SOON), (false, Duration::ZERO));
        driver.pass_on(SOON);
        let (came, took) = driver.kicked(SOON);
        assert!(came && took >= SOON && took < WINDOW, "{took:?}");
        driver.pass_on(WINDOW);
        assert_eq!(driver.kicked(SOON), (false, Duration::ZERO));
    }

    #[test]
    fn waiting_in_vain_becomes_rare() {
        let mut driver = Driver::new();
        driver.kicked(NEVER);
        let mut waits = Vec::new();
        for kick in 0..1000 {
            driver.pass_on(SOON);
            let (came, took) = driver.kicked(NEVER);
            assert!(!came);
            if !took.is_zero() {
                assert!(took <= WINDOW + Duration::from_micros(1), "{took:?}");
                waits.push(kick);
            }
        }
        assert_eq!(waits.get(..4), Some([0, 2, 6, 14].as_slice()));
        assert!(waits.len() < 16, "{waits:?}");
        // One that was not in vain makes it usual again.
        while !driver.kicked(SOON).0 {}
        assert!(driver.kicked(SOON).0);
    }

    #[test]
    fn other_devices_do_not_wait_for_long() {
        let mut driver = Driver::new();
        driver.kicked(NEVER);
        let pass = driver.linger.begin(driver.now.get());
        assert!(pass.waits);
        driver.pass_on(WINDOWS * WINDOW);
        let clock = || driver.now.get();
        let came = driver
            .linger
            .wait(&pass, clock, || Ok::<_, Infallible>(true));
        assert_eq!(came, Ok(false));
    }
}
