//! Taking all that the driver has made available.

use std::time::Instant;

use virtio_queue::QueueT;

use super::{Chain, QueueError, VirtQueue, linger};
use crate::virtio::device::{DeviceError, Progress};

/// What to do after one chain of [`VirtQueue::drain`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Go on with the next.
    Continue,
    /// Stop here: the backend cannot take more now. Another event will start the work again.
    Stop,
}

/// How [`VirtQueue::take`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// There is nothing available now.
    All,
    /// By [`Flow::Stop`].
    Stopped,
    /// By the bound on work.
    Budget,
}

/// A pass over the available chains.
#[derive(Debug)]
pub struct Pass {
    left: usize,
    linger: Option<linger::Pass>,
}

impl VirtQueue {
    /// Hands each available chain to `each`, at most `budget` of them, with kicks suppressed meanwhile, and signals
    /// what `each` completed.
    pub fn drain(
        &mut self,
        budget: usize,
        mut each: impl FnMut(&mut Self, Chain) -> Result<Flow, QueueError>,
    ) -> Result<Progress, DeviceError> {
        let mut pass = self.begin(budget);
        loop {
            match self.take(&mut pass, &mut each)? {
                Taken::Stopped => return Ok(Progress::Done),
                Taken::Budget => return Ok(Progress::Again),
                Taken::All if self.comes_back(&pass, true)? => {}
                Taken::All => return Ok(Progress::Done),
            }
        }
    }

    /// Begins a pass in which at most `budget` chains are taken.
    pub fn begin(&mut self, budget: usize) -> Pass {
        Pass {
            left: budget,
            linger: self
                .linger
                .as_mut()
                .map(|linger| linger.begin(Instant::now())),
        }
    }

    /// Hands each available chain to `each`, with kicks suppressed from now on, and signals what `each` completed. Once all
    /// are taken, [`VirtQueue::comes_back`] has to follow.
    pub fn take(
        &mut self,
        pass: &mut Pass,
        mut each: impl FnMut(&mut Self, Chain) -> Result<Flow, QueueError>,
    ) -> Result<Taken, DeviceError> {
        let mut all = || {
            self.disable_kicks()?;
            while let Some(chain) = self.pop()? {
                if each(self, chain)? == Flow::Stop {
                    return self.signal().map(|()| Taken::Stopped);
                }
                pass.left = pass.left.saturating_sub(1);
                if pass.left == 0 {
                    return self.signal().map(|()| Taken::Budget);
                }
            }
            self.signal().map(|()| Taken::All)
        };
        let result = all();
        result.map_err(|source| self.fail(source))
    }

    /// Whether there are more chains: after a moment's wait, if that is worth it and `may_wait`, or when the driver is asked
    /// to kick again.
    pub fn comes_back(&mut self, pass: &Pass, may_wait: bool) -> Result<bool, DeviceError> {
        let result = self.wait_or_rest(pass, may_wait);
        result.map_err(|source| self.fail(source))
    }

    fn wait_or_rest(&mut self, pass: &Pass, may_wait: bool) -> Result<bool, QueueError> {
        let next = self.queue.next_avail();
        if let (Some(linger), Some(pass), true) = (&mut self.linger, &pass.linger, may_wait)
            && linger.wait(pass, Instant::now, || {
                Ok::<_, QueueError>(self.rings.avail_index()? != next)
            })?
        {
            return Ok(true);
        }
        let more = self.enable_kicks()?;
        if let (Some(linger), false) = (&mut self.linger, more) {
            linger.end(Instant::now());
        }
        Ok(more)
    }
}
