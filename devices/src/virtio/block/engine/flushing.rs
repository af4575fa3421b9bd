//! Flushes of overlays in the ring: data, bits, data again.

use std::io;

use super::super::backend::{Backend, Image};
use super::super::overlay::Bits;
use super::AsyncEngine;

/// What a flush of an overlay is called in the ring. Other names are heads of chains, which have 16 bits.
pub(super) const FLUSH: u64 = 1 << 16;

/// A flush of an overlay in the ring.
pub(super) struct Flushing {
    heads: Vec<u16>,
    bits: Bits,
    /// The bits are written: this is the second sync.
    is_last: bool,
}

impl AsyncEngine {
    /// Begins a flush for all chains that wait for one, unless one is under way.
    pub(super) fn begin_flush(&mut self, backend: &mut Backend) {
        let Image::Overlay(overlay) = &mut backend.image else {
            return;
        };
        if self.flushing.is_some() || self.next_flush.is_empty() {
            return;
        }
        let heads = std::mem::take(&mut self.next_flush);
        if overlay.is_unnamed() {
            return self.end_flush(&heads, Ok(()));
        }
        match overlay.begin_flush() {
            Ok(bits) => {
                self.flushing = Some(Flushing {
                    heads,
                    bits,
                    is_last: false,
                });
                self.sync(backend);
            }
            Err(error) => self.end_flush(&heads, Err(error)),
        }
    }

    fn sync(&mut self, backend: &mut Backend) {
        if let Err(error) = self.ring.sync(FLUSH) {
            self.go_on_flushing(backend, Err(io::Error::other(error)));
        }
    }

    /// A sync of a flush has ended.
    pub(super) fn go_on_flushing(&mut self, backend: &mut Backend, result: io::Result<()>) {
        let (Some(mut flushing), Image::Overlay(overlay)) =
            (self.flushing.take(), &mut backend.image)
        else {
            return;
        };
        let more = match result {
            Ok(()) if !flushing.is_last => overlay.write_bits(&flushing.bits),
            result => result.map(|()| false),
        };
        match more {
            Ok(true) => {
                flushing.is_last = true;
                self.flushing = Some(flushing);
                self.sync(backend);
            }
            over => {
                let result = overlay.end_flush(flushing.bits, over.map(drop));
                self.end_flush(&flushing.heads, result);
                self.begin_flush(backend);
            }
        }
    }

    fn end_flush(&mut self, heads: &[u16], result: io::Result<()>) {
        for head in heads {
            let place = self.pending.get_mut(usize::from(*head));
            if let Some(pending) = place.and_then(Option::take) {
                let outcome = match &result {
                    Ok(()) => Ok(0),
                    Err(error) => Err(same(error).into()),
                };
                self.ended
                    .push_back((pending.chain, pending.request, outcome));
            }
        }
    }
}

/// The error for each who has it.
fn same(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}
