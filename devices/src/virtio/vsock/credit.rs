//! Flow control by credit (VIRTIO 1.3, 5.10.6.3), both ways, as arithmetic only.
//!
//! Each side tells with every packet how large its receive buffer is (`buf_alloc`) and how many bytes it has taken out
//! of it so far (`fwd_cnt`). All counters wrap at 2^32; differences between them do not.

use std::num::Wrapping;

/// Most bytes ever in flight to the guest on one connection. Far more than any driver's buffer; it keeps counter
/// differences below 2^31, so that "behind" and "ahead" can be told apart.
const MAX_IN_FLIGHT: u32 = 1 << 30;

/// The guest broke the rules of flow control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CreditError {
    /// The guest claims to have taken out of its buffer what was never sent.
    #[error("guest forwarded {ahead} bytes more than it was sent")]
    Unsent {
        /// Bytes too many.
        ahead: u32,
    },
    /// The guest sent more than it had credit for.
    #[error("guest sent {len} bytes with a credit of {credit}")]
    Overrun {
        /// Bytes sent.
        len: u32,
        /// Bytes allowed.
        credit: u32,
    },
}

/// What we may send to the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SendCredit {
    sent: Wrapping<u32>,
    peer_buf_alloc: u32,
    peer_fwd_cnt: Wrapping<u32>,
}

impl SendCredit {
    /// Takes in what a packet from the guest says.
    pub fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) -> Result<(), CreditError> {
        let fwd_cnt = Wrapping(fwd_cnt);
        let ahead = (fwd_cnt - self.sent).0;
        if (1..1 << 31).contains(&ahead) {
            return Err(CreditError::Unsent { ahead });
        }
        let news = (fwd_cnt - self.peer_fwd_cnt).0;
        // A driver with two threads may queue an older state behind a newer one: keep the newer.
        if news < 1 << 31 {
            self.peer_fwd_cnt = fwd_cnt;
            self.peer_buf_alloc = buf_alloc;
        }
        Ok(())
    }

    /// Bytes we may send now.
    pub fn available(&self) -> u32 {
        let in_flight = (self.sent - self.peer_fwd_cnt).0;
        // The guest may shrink its buffer below what is in flight.
        self.peer_buf_alloc
            .min(MAX_IN_FLIGHT)
            .saturating_sub(in_flight)
    }

    /// `len` bytes, at most [`SendCredit::available`], were sent.
    pub fn sent(&mut self, len: u32) {
        debug_assert!(len <= self.available());
        self.sent += len;
    }
}

/// What the guest may send to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceiveCredit {
    buf_alloc: u32,
    /// Bytes of the buffer that the guest is to use, see [`ReceiveCredit::set_window`].
    window: u32,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest knows it.
    told: Wrapping<u32>,
}

impl ReceiveCredit {
    /// A buffer of `buf_alloc` bytes, empty.
    pub fn new(buf_alloc: u32) -> Self {
        ReceiveCredit {
            buf_alloc,
            window: buf_alloc,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
        }
    }

    /// Takes note of `len` bytes from the guest.
    pub fn receive(&mut self, len: u32) -> Result<(), CreditError> {
        let credit = self.buf_alloc.saturating_sub(self.held());
        if len > credit {
            return Err(CreditError::Overrun { len, credit });
        }
        self.received += len;
        Ok(())
    }

    /// Bytes received that have not left the buffer.
    pub fn held(&self) -> u32 {
        (self.received - self.forwarded).0
    }

    /// `len` bytes of those received have left the buffer.
    pub fn forward(&mut self, len: u32) {
        debug_assert!(len <= self.held());
        self.forwarded += len;
    }

    /// Lets the guest use no more than `window` bytes of the buffer from now on, or more again, up to the whole of it: the
    /// rest is not told as forwarded. What the guest knows already it may use, so a smaller window comes bit by bit.
    pub fn set_window(&mut self, window: u32) {
        self.window = window.min(self.buf_alloc);
    }

    /// What the guest is to know as forwarded.
    fn tellable(&self) -> Wrapping<u32> {
        let kept_back = self.buf_alloc - self.window;
        let tellable = self.forwarded - Wrapping(kept_back);
        // What was told is not taken back.
        match (tellable - self.told).0 < 1 << 31 {
            true => tellable,
            false => self.told,
        }
    }

    /// Whether to tell the guest of new credit now: it thinks that less than half of the window is free, and so much more
    /// is that it need not send in small pieces. What it has sent leaves the buffer in the end, so this comes.
    pub fn update_due(&self) -> bool {
        let thought_used = (self.received - self.told).0;
        let thought_free = self.buf_alloc.saturating_sub(thought_used);
        let news = (self.tellable() - self.told).0;
        thought_free < self.window.div_ceil(2) && news >= self.window / 4
    }

    /// `buf_alloc` and `fwd_cnt` for a packet to the guest, which thereby knows them.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.tellable();
        (self.buf_alloc, self.told.0)
    }
}
