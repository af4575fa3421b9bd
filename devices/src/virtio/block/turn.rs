//! Taking requests from the queue, and giving them back.

use std::io;
use std::sync::Arc;

use super::backend::{Backend, Failure, Outcome};
use super::engine::AsyncEngine;
use super::metrics::BlockMetrics;
use super::request::{self, Refusal, Request, Rules, status};
use crate::Memory;
use crate::rate_limiter::RateLimiter;
use crate::virtio::device::DeviceError;
use crate::virtio::queue::{Chain, Flow, QueueError, VirtQueue};

/// How requests are done.
pub(super) enum Engine {
    Sync,
    Async(Box<AsyncEngine>),
}

/// Puts what the engine has finished in the used ring.
pub(super) fn give_back(
    queue: &mut VirtQueue,
    memory: &Memory,
    engine: &mut AsyncEngine,
    backend: &mut Backend,
    metrics: &BlockMetrics,
) -> Result<(), DeviceError> {
    let mut all = || {
        while let Some((chain, request, outcome)) = engine.reap(backend, memory)? {
            let answer = answer(&request, outcome, metrics);
            finish(queue, memory, &chain, answer)?;
        }
        queue.signal()
    };
    let result = all();
    result.map_err(|source| queue.fail(source))
}

/// Starts what the engine has queued and gives the driver what it has finished.
pub(super) fn end_completed(
    queue: &mut VirtQueue,
    memory: &Memory,
    engine: &mut AsyncEngine,
    backend: &mut Backend,
    metrics: &BlockMetrics,
) -> Result<(), DeviceError> {
    loop {
        engine.submit().map_err(engine_failed)?;
        give_back(queue, memory, engine, backend, metrics)?;
        if !engine.watch() {
            return Ok(());
        }
    }
}

pub(super) fn engine_failed(error: io::Error) -> DeviceError {
    DeviceError::Fatal(format!("io_uring: {error}"))
}

/// One turn at the queue: what [`Turn::take`] needs to handle a chain.
pub(super) struct Turn<'a> {
    pub memory: &'a Arc<Memory>,
    pub rules: &'a Rules,
    pub backend: &'a mut Backend,
    pub engine: &'a mut Engine,
    pub limiter: &'a mut RateLimiter,
    pub metrics: &'a BlockMetrics,
    pub bytes_left: u64,
    pub taken: usize,
}

impl Turn<'_> {
    /// The same for all that was taken up to here. Whether the engine has nothing left to do.
    pub(super) fn end_completed(&mut self, queue: &mut VirtQueue) -> Result<bool, DeviceError> {
        match &mut self.engine {
            Engine::Sync => Ok(true),
            Engine::Async(engine) => {
                end_completed(queue, self.memory, engine, self.backend, self.metrics)?;
                Ok(engine.is_idle())
            }
        }
    }

    /// Handles one chain: takes it, or puts it back and stops.
    pub(super) fn take(&mut self, queue: &mut VirtQueue, chain: Chain) -> Result<Flow, QueueError> {
        self.taken += 1;
        let request = match request::parse(&chain, self.memory, self.rules)? {
            Ok(request) => request,
            Err(refusal) => {
                let answer = refused(refusal, self.metrics);
                finish(queue, self.memory, &chain, answer)?;
                return Ok(Flow::Continue);
            }
        };
        if !self.limiter.try_take(request.cost()) {
            self.metrics.rate_limiter_throttled_events.inc();
            queue.undo_pop(chain);
            return Ok(Flow::Stop);
        }
        self.start(queue, chain, request)?;
        self.bytes_left = self.bytes_left.saturating_sub(request.cost());
        if self.bytes_left == 0 {
            return Ok(Flow::Stop);
        }
        Ok(Flow::Continue)
    }

    fn start(
        &mut self,
        queue: &mut VirtQueue,
        chain: Chain,
        request: Request,
    ) -> Result<(), QueueError> {
        let (chain, outcome) = match self.engine {
            Engine::Sync => {
                let outcome = self.backend.execute(&request, &chain, self.memory)?;
                (chain, outcome)
            }
            Engine::Async(engine) => {
                match engine.start(self.backend, request, chain, self.memory)? {
                    Some(over) => over,
                    None => return Ok(()),
                }
            }
        };
        let answer = answer(&request, outcome, self.metrics);
        finish(queue, self.memory, &chain, answer)
    }
}

/// What the driver is told.
struct Answer {
    status: u8,
    /// Bytes in the writable part before the status.
    written: u64,
}

fn refused(refusal: Refusal, metrics: &BlockMetrics) -> Answer {
    metrics.invalid_reqs_count.inc();
    guest_warn!("virtio-blk: request refused: {refusal}");
    Answer {
        status: refusal.status(),
        written: 0,
    }
}

fn answer(request: &Request, outcome: Outcome, metrics: &BlockMetrics) -> Answer {
    match outcome {
        Ok(written) => {
            match *request {
                Request::Read { len, .. } => {
                    metrics.read_count.inc();
                    metrics.read_bytes.add(len);
                }
                Request::Write { len, .. } => {
                    metrics.write_count.inc();
                    metrics.write_bytes.add(len);
                }
                Request::Flush => metrics.flush_count.inc(),
                Request::Discard { .. } | Request::WriteZeroes { .. } | Request::GetId => {}
            }
            Answer {
                status: status::OK,
                written,
            }
        }
        Err(failure) => {
            metrics.execute_fails.inc();
            guest_warn!("virtio-blk: {request:?} failed: {failure}");
            Answer {
                status: match failure {
                    Failure::Unsupported => status::UNSUPPORTED,
                    Failure::Io(_) | Failure::Short { .. } => status::IO_ERROR,
                },
                written: 0,
            }
        }
    }
}

/// Writes the status to the last writable byte and gives the chain back. A parsed chain has that byte.
fn finish(
    queue: &mut VirtQueue,
    memory: &Memory,
    chain: &Chain,
    answer: Answer,
) -> Result<(), QueueError> {
    let last = chain.writable.len().saturating_sub(1);
    chain.writable.write_at(memory, last, &[answer.status])?;
    let used = u32::try_from(answer.written.saturating_add(1)).unwrap_or(u32::MAX);
    queue.complete_soon(&[(chain.head(), used)])
}
