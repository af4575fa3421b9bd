use proptest::prelude::*;

use super::*;

fn bucket(size: u64, one_time_burst: u64, refill_time_ms: u64) -> TokenBucket {
    let config = BucketConfig {
        size,
        one_time_burst,
        refill_time_ms,
    };
    TokenBucket::new(config, 0).unwrap()
}

fn take(bucket: &mut TokenBucket, tokens: u64) -> bool {
    let granted = bucket.wait_ns(tokens) == 0;
    if granted {
        bucket.take(tokens);
    }
    granted
}

#[test]
fn zero_size_or_time_limits_nothing() {
    for (size, refill_time_ms) in [(0, 1), (1, 0), (0, 0)] {
        let config = BucketConfig {
            size,
            one_time_burst: 5,
            refill_time_ms,
        };
        assert_eq!(TokenBucket::new(config, 0), None);
    }
}

#[test]
fn burst_first_then_bucket_then_wait() {
    let mut b = bucket(10, 5, 1);
    assert!(take(&mut b, 4));
    assert!(take(&mut b, 11));
    assert!(!take(&mut b, 1));
    assert_eq!(b.wait_ns(1), 100_000);
    assert_eq!(b.wait_ns(10), 1_000_000);
    b.refill(99_999);
    assert!(!take(&mut b, 1));
    b.refill(100_000);
    assert!(take(&mut b, 1));
    // The burst does not come back.
    b.refill(1_000_000_000);
    assert!(take(&mut b, 10));
    assert!(!take(&mut b, 1));
}

#[test]
fn larger_than_the_bucket_passes_when_full_and_is_paid_for() {
    let mut b = bucket(10, 0, 1);
    assert!(take(&mut b, 1));
    assert!(!take(&mut b, 30));
    b.refill(100_000);
    assert!(take(&mut b, 30));
    assert_eq!(b.wait_ns(1), 2_100_000);
}

#[test]
fn given_back_is_there_again() {
    let mut b = bucket(10, 5, 1);
    assert!(take(&mut b, 15));
    b.give_back(15);
    assert!(take(&mut b, 15));
    assert!(!take(&mut b, 1));
    // Never more than there was at first.
    b.give_back(u64::MAX);
    assert!(take(&mut b, 15));
    assert!(!take(&mut b, 1));
}

#[test]
fn update_limits_and_unlimits() {
    let ops = |size| {
        Some(BucketConfig {
            size,
            one_time_burst: 0,
            refill_time_ms: u64::MAX,
        })
    };
    let mut limiter = RateLimiter::new(RateLimiterConfig::default()).unwrap();
    assert!((0..1000).all(|_| limiter.try_take(u64::MAX)));
    limiter.update(None, ops(2));
    assert_eq!((0..10).filter(|_| limiter.try_take(0)).count(), 2);
    assert!(limiter.is_blocked());
    assert!(!limiter.on_timer(), "the timer has not expired");
    limiter.update(ops(0), None);
    assert!(!limiter.try_take(0), "None leaves the bucket as it is");
    limiter.update(None, ops(0));
    wait_readable(&limiter);
    assert!(limiter.on_timer());
    assert!(!limiter.is_blocked());
    assert!(limiter.try_take(u64::MAX));
}

#[test]
fn the_timer_tells_when_to_retry() {
    let config = RateLimiterConfig {
        bandwidth: Some(BucketConfig {
            size: 1000,
            one_time_burst: 0,
            refill_time_ms: 2,
        }),
        ops: None,
    };
    let mut limiter = RateLimiter::new(config).unwrap();
    for _ in 0..3 {
        while limiter.try_take(1000) {}
        assert!(limiter.is_blocked());
        wait_readable(&limiter);
        assert!(limiter.on_timer());
        assert!(!limiter.on_timer(), "one expiry counts once");
        assert!(limiter.try_take(1000));
    }
}

fn wait_readable(limiter: &RateLimiter) {
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
    let epoll = Epoll::new().unwrap();
    epoll
        .ctl(
            ControlOperation::Add,
            limiter.timer_fd(),
            EpollEvent::new(EventSet::IN, 0),
        )
        .unwrap();
    let mut events = [EpollEvent::default()];
    assert_eq!(epoll.wait(10_000, &mut events).unwrap(), 1);
}

/// The obvious bucket: every nanosecond is a step of its own.
struct Model {
    size: i128,
    refill_ns: i128,
    burst: i128,
    level: i128,
}

impl Model {
    fn step(&mut self, ns: u64) {
        for _ in 0..ns {
            self.level = (self.level + self.size).min(self.size * self.refill_ns);
        }
    }

    fn take(&mut self, tokens: u64) -> bool {
        let from_bucket = (i128::from(tokens) - self.burst).max(0);
        let full = self.level == self.size * self.refill_ns;
        if from_bucket > 0 && from_bucket * self.refill_ns > self.level && !full {
            return false;
        }
        self.burst -= i128::from(tokens) - from_bucket;
        self.level -= from_bucket * self.refill_ns;
        true
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn agrees_with_the_model(
        size in 1u64..2000,
        burst in 0u64..50,
        ops in prop::collection::vec((0u64..30_000, 0u64..2500), 1..40),
    ) {
        let mut b = bucket(size, burst, 1);
        let mut model = Model {
            size: size.into(),
            refill_ns: 1_000_000,
            burst: burst.into(),
            level: i128::from(size) * 1_000_000,
        };
        let mut now = 0;
        for (ns, tokens) in ops {
            now += ns;
            b.refill(now);
            model.step(ns);
            prop_assert_eq!(take(&mut b, tokens), model.take(tokens));
        }
    }
}

proptest! {
    /// Any numbers at all: no overflow, and the wait is exact: one nanosecond less is too early.
    #[test]
    fn the_wait_is_exact_for_any_numbers(
        size: u64, burst: u64, refill_time_ms: u64,
        ops in prop::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 1..20),
    ) {
        let config = BucketConfig { size, one_time_burst: burst, refill_time_ms };
        let Some(mut b) = TokenBucket::new(config, 0) else { return Ok(()) };
        let mut now = 0u64;
        for (ns, tokens, back) in ops {
            now = now.saturating_add(ns >> (ns % 64));
            b.refill(now);
            let wait = b.wait_ns(tokens);
            if wait == 0 {
                b.take(tokens);
                if back {
                    b.give_back(tokens);
                }
            } else if let Some(then) = now.checked_add(wait) {
                let mut early = b.clone();
                early.refill(then - 1);
                prop_assert_ne!(early.wait_ns(tokens), 0);
                let mut later = b.clone();
                later.refill(then);
                prop_assert_eq!(later.wait_ns(tokens), 0);
            }
        }
    }

    /// What a bucket grants in any time is its burst, its size and what came back, but for one request larger than it.
    #[test]
    fn grants_no_more_than_its_rate(
        size in 1u64..1_000_000, burst in 0u64..1_000_000, refill_time_ms in 1u64..1000,
        ops in prop::collection::vec((0u64..10_000_000, 0u64..2_000_000), 1..50),
    ) {
        let mut b = bucket(size, burst, refill_time_ms);
        let (mut now, mut granted, mut largest) = (0u64, 0u128, 0u128);
        for (ns, tokens) in ops {
            now += ns;
            b.refill(now);
            if take(&mut b, tokens) {
                granted += u128::from(tokens);
                largest = largest.max(u128::from(tokens));
            }
        }
        let back = u128::from(size) * u128::from(now) / (u128::from(refill_time_ms) * 1_000_000);
        let overdraft = largest.saturating_sub(u128::from(size));
        prop_assert!(granted <= u128::from(burst) + u128::from(size) + back + 1 + overdraft);
    }
}

#[test]
fn the_descriptor_never_changes() {
    let mut limiter = RateLimiter::new(RateLimiterConfig::default()).unwrap();
    let fd = limiter.timer_fd();
    limiter.update(
        Some(BucketConfig {
            size: 1,
            one_time_burst: 0,
            refill_time_ms: 1,
        }),
        None,
    );
    limiter.try_take(1);
    limiter.try_take(1);
    assert_eq!(fd, limiter.timer_fd());
}
