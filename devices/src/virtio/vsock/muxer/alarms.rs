//! What happens when its time has come.

use std::time::{Duration, Instant};

use super::{Alarm, Muxer};

impl Muxer {
    /// Does what its time has come for, and nothing else.
    pub fn tick(&mut self, now: Instant) {
        self.armed = self.armed.filter(|armed| *armed > now);
        self.expire(now);
        self.arm_timer(now);
    }

    /// Has the device look at its sockets again at `when`.
    pub fn wake_at(&mut self, when: Instant, now: Instant) {
        self.deadlines.insert((when, Alarm::Accept));
        self.arm_timer(now);
    }

    /// Ends what did not happen by `now`.
    pub fn expire(&mut self, now: Instant) {
        while let Some(&(deadline, alarm)) = self.deadlines.first() {
            if deadline > now {
                break;
            }
            self.deadlines.pop_first();
            match alarm {
                Alarm::Accept => self.accepting = true,
                Alarm::Exchange => self.time_out_exchange(now),
                Alarm::Connection(key) => {
                    if let Some(slot) = self.connections.get_mut(&key) {
                        slot.deadline = None;
                        slot.connection.expire(now, &self.metrics);
                        self.sync(key);
                    }
                }
            }
        }
    }

    pub(super) fn arm_timer(&mut self, now: Instant) {
        let Some(&(first, _)) = self.deadlines.first() else {
            return;
        };
        // A timer that goes off early does no harm, and is not worth a system call.
        if self.armed.is_some_and(|armed| armed <= first) {
            return;
        }
        // 0 would disarm it.
        let wait = first
            .saturating_duration_since(now)
            .max(Duration::from_micros(1));
        match self.timer.reset(wait, None) {
            Ok(()) => self.armed = Some(first),
            Err(error) => {
                self.metrics.muxer_event_fails.inc();
                guest_warn!("vsock: timer: {error}");
            }
        }
    }
}
