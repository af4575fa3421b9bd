//! A guest that is held: nobody talks to it but the VMM, which asks it something.

use std::time::Instant;

use super::super::connection::Connection;
use super::super::exchange::{Exchange, HostEnd, OwnEnd};
use super::super::packet::ConnectionKey;
use super::{Alarm, Muxer};

impl Muxer {
    /// Lets the guest talk to nobody, or to anybody again. Clients that come meanwhile wait; what the guest asks for is
    /// refused.
    pub fn hold(&mut self, held: bool, now: Instant) {
        self.held = held;
        if !held {
            self.accepting = true;
            if let Some(key) = self.asked.take() {
                self.end(key, now);
            }
        }
    }

    /// Asks the guest something, as soon as it can be reached, held or not.
    pub fn ask(&mut self, exchange: Exchange, now: Instant) {
        self.deadlines
            .insert((now + exchange.patience, Alarm::Exchange));
        self.question = Some(exchange);
        self.arm_timer(now);
    }

    pub(super) fn begin_exchange(&mut self, exchange: Exchange, now: Instant) {
        let key = self.free_key(exchange.port);
        // The exchange's own deadline ends it before.
        let deadline = now + exchange.patience;
        let end = HostEnd::Own(exchange.into());
        let connection = Connection::from_host(key, self.cid, end, self.buf_alloc(), now);
        self.asked = Some(key);
        self.insert(key, connection.answered_by(deadline));
    }

    pub(super) fn time_out_exchange(&mut self, now: Instant) {
        if let Some(exchange) = self.question.take() {
            OwnEnd::from(exchange).time_out();
        }
        let Some(key) = self.asked else {
            return;
        };
        if let Some(slot) = self.connections.get_mut(&key)
            && let HostEnd::Own(end) = slot.connection.stream_mut()
            && end.time_out()
        {
            self.end(key, now);
        }
    }

    fn end(&mut self, key: ConnectionKey, now: Instant) {
        if let Some(slot) = self.connections.get_mut(&key) {
            slot.connection.abort(now);
            self.sync(key);
        }
    }
}
