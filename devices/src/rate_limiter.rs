//! Limits on bytes and operations per time, as the API's `rate_limiter` objects describe them.
//!
//! [`TokenBucket`] is arithmetic only: time is passed in. [`RateLimiter`] joins two buckets with a timer that says
//! when a refused operation may be tried again.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use crate::virtio::state::RestoreError;

/// Shortest time the timer is armed for. With a high rate one wake-up then serves many operations; no token is lost
/// by it, because the shortest refill time is 1 ms.
const MIN_WAIT: Duration = Duration::from_micros(500);

/// A token bucket as configured. With a `size` or `refill_time_ms` of 0 it limits nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BucketConfig {
    /// Tokens in the full bucket: bytes or operations.
    pub size: u64,
    /// Tokens on top of `size` that are there once and do not come back.
    pub one_time_burst: u64,
    /// Milliseconds from empty to full.
    pub refill_time_ms: u64,
}

/// A bucket as saved: see [`TokenBucket`] for the units.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketState {
    /// Tokens of the full bucket.
    pub size: u64,
    /// Nanoseconds from empty to full.
    pub refill_ns: u64,
    /// One-time tokens that are left.
    pub burst: u64,
    /// One-time tokens that there were.
    pub initial_burst: u64,
    /// Units that it lacks to be full.
    pub missing: u128,
}

/// A limiter as saved.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RateLimiterState {
    /// Limit on bytes.
    pub bandwidth: Option<BucketState>,
    /// Limit on operations.
    pub ops: Option<BucketState>,
}

/// Limits of one direction of one device. The default limits nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RateLimiterConfig {
    /// Limit on bytes.
    pub bandwidth: Option<BucketConfig>,
    /// Limit on operations.
    pub ops: Option<BucketConfig>,
}

/// A token bucket in exact integer arithmetic.
///
/// The unit is 1/`refill_ns` of a token, of which `size` come back every nanosecond. So nothing is ever rounded, and
/// the full bucket, `size * refill_ns` units, fits 128 bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBucket {
    size: u64,
    refill_ns: u64,
    /// One-time tokens that are left, and how many there were.
    burst: u64,
    initial_burst: u64,
    /// Units that the bucket lacks to be full. More than the whole bucket after a request larger than it.
    missing: u128,
    /// Nanoseconds at which `missing` was true.
    updated_ns: u64,
}

impl TokenBucket {
    /// A full bucket at `now_ns` nanoseconds since some fixed moment. None: it limits nothing.
    pub fn new(config: BucketConfig, now_ns: u64) -> Option<Self> {
        if config.size == 0 || config.refill_time_ms == 0 {
            return None;
        }
        Some(TokenBucket {
            size: config.size,
            // Past 584 years the difference cannot be seen.
            refill_ns: config.refill_time_ms.saturating_mul(1_000_000),
            burst: config.one_time_burst,
            initial_burst: config.one_time_burst,
            missing: 0,
            updated_ns: now_ns,
        })
    }

    /// Adds what came back since the last call. A clock that goes backwards adds nothing.
    pub fn refill(&mut self, now_ns: u64) {
        let elapsed = now_ns.saturating_sub(self.updated_ns);
        self.updated_ns = self.updated_ns.max(now_ns);
        self.missing = self.missing.saturating_sub(units(elapsed, self.size));
    }

    /// Nanoseconds until `tokens` can be taken; 0: now.
    ///
    /// A request larger than the bucket can be taken when the bucket is full, and then keeps it empty for as long as
    /// its tokens take to come back.
    pub fn wait_ns(&self, tokens: u64) -> u64 {
        let from_bucket = tokens.saturating_sub(self.burst);
        if from_bucket == 0 {
            return 0;
        }
        let cost = units(from_bucket, self.refill_ns);
        let allowed_missing = self.capacity().saturating_sub(cost);
        let excess = self.missing.saturating_sub(allowed_missing);
        u64::try_from(excess.div_ceil(u128::from(self.size))).unwrap_or(u64::MAX)
    }

    /// Takes `tokens`, the one-time ones first. Call it only when [`TokenBucket::wait_ns`] is 0.
    pub fn take(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        let cost = units(tokens - from_burst, self.refill_ns);
        self.missing = self.missing.saturating_add(cost);
    }

    /// Puts `tokens` back that were taken for nothing: into the bucket as far as they fit, the rest to the burst.
    pub fn give_back(&mut self, tokens: u64) {
        let units = units(tokens, self.refill_ns);
        let surplus = units.saturating_sub(self.missing) / u128::from(self.refill_ns);
        self.missing = self.missing.saturating_sub(units);
        let surplus = u64::try_from(surplus).unwrap_or(u64::MAX);
        self.burst = self.burst.saturating_add(surplus).min(self.initial_burst);
    }

    /// The bucket at `now_ns`, to be saved.
    fn save(&self, now_ns: u64) -> BucketState {
        let mut now = self.clone();
        now.refill(now_ns);
        let TokenBucket {
            size,
            refill_ns,
            burst,
            initial_burst,
            missing,
            updated_ns: _,
        } = now;
        BucketState {
            size,
            refill_ns,
            burst,
            initial_burst,
            missing,
        }
    }

    fn load(state: &BucketState, now_ns: u64) -> Result<Self, RestoreError> {
        let BucketState {
            size,
            refill_ns,
            burst,
            initial_burst,
            missing,
        } = *state;
        let invalid = |what, value| Err(RestoreError::Value { what, value });
        if size == 0 || refill_ns == 0 {
            return invalid("rate limiter of size or refill time", 0);
        }
        if burst > initial_burst {
            return invalid("rate limiter burst", burst);
        }
        Ok(TokenBucket {
            size,
            refill_ns,
            burst,
            initial_burst,
            missing,
            updated_ns: now_ns,
        })
    }

    fn capacity(&self) -> u128 {
        units(self.size, self.refill_ns)
    }
}

/// The product of two 64-bit numbers always fits 128 bits.
fn units(a: u64, b: u64) -> u128 {
    u128::from(a) * u128::from(b)
}

/// A limit on operations and their bytes, with a descriptor that becomes readable when a refused one may be retried.
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
    start: Instant,
    /// There also for an unlimited limiter: its descriptor is watched from the start, and an update may limit later.
    timer: TimerFd,
    /// When the timer expires, in nanoseconds since `start`.
    due_ns: u64,
    blocked: bool,
}

impl RateLimiter {
    /// A limiter with full buckets. The error is the host's, when it has no timer to give.
    pub fn new(config: RateLimiterConfig) -> io::Result<Self> {
        Ok(RateLimiter {
            bandwidth: config.bandwidth.and_then(|b| TokenBucket::new(b, 0)),
            ops: config.ops.and_then(|b| TokenBucket::new(b, 0)),
            start: Instant::now(),
            timer: TimerFd::new().map_err(io::Error::from)?,
            due_ns: 0,
            blocked: false,
        })
    }

    /// Asks for one operation of `bytes`. On refusal (false) nothing is taken, and the timer is armed for when the
    /// operation can succeed. See [`TokenBucket::wait_ns`] for a request larger than the bucket.
    pub fn try_take(&mut self, bytes: u64) -> bool {
        if self.bandwidth.is_none() && self.ops.is_none() {
            return true;
        }
        let now = self.now_ns();
        let wait = wait(&mut self.bandwidth, bytes, now).max(wait(&mut self.ops, 1, now));
        self.blocked = wait > 0;
        if self.blocked {
            self.arm(Duration::from_nanos(wait).max(MIN_WAIT));
            return false;
        }
        if let Some(bucket) = &mut self.bandwidth {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.take(1);
        }
        true
    }

    /// The operation of `bytes` that was granted last did not happen.
    pub fn give_back(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bandwidth {
            bucket.give_back(bytes);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.give_back(1);
        }
    }

    /// Whether the last operation was refused and its time has not come yet.
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// To be called when the timer's descriptor was readable. True: the refused operation may be tried again.
    /// Harmless at any other time.
    pub fn on_timer(&mut self) -> bool {
        // Before its time: the event is a stale one.
        if !self.blocked || self.now_ns() < self.due_ns {
            return false;
        }
        self.blocked = false;
        true
    }

    /// The timer's descriptor, the same for the limiter's whole life.
    pub fn timer_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Replaces each bucket that is given by a full one; a bucket of size 0 removes the limit. A refused operation
    /// may be tried again at once.
    pub fn update(&mut self, bandwidth: Option<BucketConfig>, ops: Option<BucketConfig>) {
        let now = self.now_ns();
        if let Some(config) = bandwidth {
            self.bandwidth = TokenBucket::new(config, now);
        }
        if let Some(config) = ops {
            self.ops = TokenBucket::new(config, now);
        }
        if self.blocked {
            self.arm(Duration::from_nanos(1));
        }
    }

    /// Its buckets now, to be saved.
    pub fn save(&self) -> RateLimiterState {
        let RateLimiter {
            bandwidth,
            ops,
            start: _,
            timer: _,
            due_ns: _,
            // What was refused is tried again after a load.
            blocked: _,
        } = self;
        let now = self.now_ns();
        let bucket = |bucket: &Option<TokenBucket>| bucket.as_ref().map(|b| b.save(now));
        RateLimiterState {
            bandwidth: bucket(bandwidth),
            ops: bucket(ops),
        }
    }

    /// Takes what [`RateLimiter::save`] gave, in place of its own buckets. No time has passed in between.
    pub fn load(&mut self, state: &RateLimiterState) -> Result<(), RestoreError> {
        let RateLimiterState { bandwidth, ops } = state;
        let now = self.now_ns();
        let bucket = |saved: &Option<BucketState>| match saved {
            Some(saved) => TokenBucket::load(saved, now).map(Some),
            None => Ok(None),
        };
        (self.bandwidth, self.ops) = (bucket(bandwidth)?, bucket(ops)?);
        self.blocked = false;
        Ok(())
    }

    /// Arming also clears an expiry that nobody read.
    fn arm(&mut self, delay: Duration) {
        // The kernel's seconds are signed; a wait of centuries may as well be cut to one.
        let delay = delay.min(Duration::from_secs(100 * 365 * 86_400));
        let delay_ns = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        // Read before the kernel reads its clock: the timer does not expire before this.
        self.due_ns = self.now_ns().saturating_add(delay_ns);
        if let Err(error) = self.timer.reset(delay, None) {
            // Cannot happen with a valid descriptor and time. Better unlimited than stuck for good.
            log::error!("rate limiter: cannot arm its timer: {error}; limits are lifted");
            self.bandwidth = None;
            self.ops = None;
        }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

fn wait(bucket: &mut Option<TokenBucket>, tokens: u64, now_ns: u64) -> u64 {
    bucket.as_mut().map_or(0, |bucket| {
        bucket.refill(now_ns);
        bucket.wait_ns(tokens)
    })
}

#[cfg(test)]
mod tests;
