//! What the guest sends, on its way to the host.

use std::io;

use vm_memory::VolatileSlice;

use super::super::VsockMetrics;
use super::super::packet::ShutdownFlags;
use super::super::stream::HostStream;
use super::{Connection, DRAIN_TIMEOUT, Phase, Turn};

impl<S: HostStream> Connection<S> {
    /// Takes data from the guest.
    pub(super) fn on_data(&mut self, len: u32, data: &[VolatileSlice], turn: &mut Turn<'_>) {
        let now = turn.now;
        if self.guest.send || self.receive.receive(len).is_err() {
            self.abort(now);
            return;
        }
        if !self.host.receive && self.store(data, turn).is_err() {
            turn.metrics.tx_write_fails.inc();
            self.host_gave_up(
                ShutdownFlags {
                    receive: true,
                    send: false,
                },
                now,
            );
        }
        if self.host.receive {
            // Nobody will read it. The credit is given back, so that the guest gets to see the SHUTDOWN.
            self.receive.forward(self.receive.held());
        }
        self.look_for_credit(turn);
    }

    /// Has the guest told of new credit, if that is worth a packet.
    fn look_for_credit(&mut self, turn: &Turn<'_>) {
        self.receive.set_window(turn.window);
        self.due.credit_update |= self.receive.update_due();
    }

    /// Writes `data` to the host, and keeps what it does not take.
    fn store(&mut self, data: &[VolatileSlice], turn: &mut Turn<'_>) -> io::Result<()> {
        let mut skip = 0;
        if self.backlog.is_empty() {
            skip = match self.stream.write_from(data) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            };
            self.forwarded(skip, turn.metrics);
        }
        for slice in data {
            let here = skip.min(slice.len());
            skip -= here;
            if here < slice.len() {
                let rest = slice.offset(here).map_err(io::Error::other)?;
                self.backlog.push(&rest, turn.spare)?;
            }
        }
        Ok(())
    }

    /// Writes what was kept, as far as the host takes it.
    pub(super) fn flush(&mut self, turn: &mut Turn<'_>) {
        let now = turn.now;
        while let Some(first) = self.backlog.first() {
            match self.stream.write_from(&[first]) {
                Ok(written) if written > 0 => {
                    self.backlog.consume(written, turn.spare);
                    self.forwarded(written, turn.metrics);
                    if self.phase == Phase::Draining {
                        self.deadline = Some(now + DRAIN_TIMEOUT);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Ok(_) | Err(_) => {
                    turn.metrics.tx_flush_fails.inc();
                    self.host_gave_up(
                        ShutdownFlags {
                            receive: true,
                            send: false,
                        },
                        now,
                    );
                    return;
                }
            }
        }
        self.look_for_credit(turn);
        self.settle(now);
    }

    fn forwarded(&mut self, len: usize, metrics: &VsockMetrics) {
        // At most `buf_alloc` bytes are ever held.
        self.receive.forward(u32::try_from(len).unwrap_or(u32::MAX));
        metrics.tx_bytes_count.add(len as u64);
    }
}
