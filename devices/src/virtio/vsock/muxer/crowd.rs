//! On how many connections the guest sends at the same time.
//!
//! One that sends alone needs a large window, as its driver waits for credit otherwise. Several have enough on their way with
//! small ones, and more would be slower: a guest that always has something to send keeps this thread from sleeping, and
//! a host that shares a processor with it is then let in for each packet instead of for all of them.

use super::{LARGE_BUFFER, SMALL_BUFFER};

/// A pass over the transmit queue, by its number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Pass(u64);

/// The connections on which the guest has sent something lately.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    pass: Pass,
    /// In this pass.
    now: u32,
    /// In passes before it: the most of them, less one for each pass since.
    lately: u32,
}

impl Crowd {
    /// Packets that come together follow.
    pub(super) fn begin_pass(&mut self) {
        self.lately = self.lately.saturating_sub(1).max(self.now);
        self.now = 0;
        self.pass.0 = self.pass.0.wrapping_add(1);
    }

    /// The guest sends on a connection, on which it did before in pass `sent`.
    pub(super) fn note(&mut self, sent: &mut Option<Pass>) {
        if sent.replace(self.pass) != Some(self.pass) {
            self.now = self.now.saturating_add(1);
        }
    }

    /// Bytes that the guest may have on its way on each: a share of a [`LARGE_BUFFER`], but no less than a [`SMALL_BUFFER`].
    pub(super) fn window(&self) -> u32 {
        let size = self.now.max(self.lately).max(1);
        (LARGE_BUFFER / size).max(SMALL_BUFFER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_send_at_the_same_time_share_a_large_window() {
        let mut crowd = Crowd::default();
        assert_eq!(crowd.window(), LARGE_BUFFER);
        let mut sent = [None; 9];
        crowd.begin_pass();
        for (size, one) in (1..).zip(&mut sent) {
            // However often it sends.
            for _ in 0..3 {
                crowd.note(one);
            }
            assert_eq!(crowd.window(), (LARGE_BUFFER / size).max(SMALL_BUFFER));
        }
        // Nine, then one alone: one less with each pass.
        let [alone, ..] = &mut sent;
        for size in (1..=9).rev() {
            crowd.begin_pass();
            crowd.note(alone);
            assert_eq!(crowd.window(), (LARGE_BUFFER / size).max(SMALL_BUFFER));
        }
    }
}
