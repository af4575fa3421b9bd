//! COM1: a 16550A (vm-superio) whose output goes to a writer and whose input is pushed in.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use vm_superio::Serial;
use vm_superio::serial::{Error, SerialEvents};
use vmm_sys_util::eventfd::EventFd;

use super::LineTrigger;
use crate::rate_limiter::{BucketConfig, TokenBucket};
use crate::virtio::interrupt::IrqLine;

counters! {
    /// What went over the console.
    pub struct SerialMetrics {
        /// Bytes that the guest read.
        read_count,
        /// Bytes that the guest wrote.
        write_count,
        /// Bytes lost because the writer failed.
        error_count,
        /// Bytes dropped by the rate limiter.
        rate_limiter_dropped_bytes,
    }
}

/// Tells the input side that the guest emptied the receive buffer.
struct RoomEvent(Option<EventFd>);

impl SerialEvents for RoomEvent {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        if let Some(event) = &self.0 {
            // A full counter is a pending event all the same.
            drop(event.write(1));
        }
    }
}

/// Output that drops what exceeds a rate. The guest must not be held up by its console, so nothing waits.
struct LimitedOutput {
    out: Box<dyn Write + Send>,
    bucket: TokenBucket,
    started: Instant,
    metrics: Arc<SerialMetrics>,
}

impl Write for LimitedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let now = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let length = bytes.len() as u64;
        self.bucket.refill(now);
        if self.bucket.wait_ns(length) > 0 {
            self.metrics.rate_limiter_dropped_bytes.add(length);
            return Ok(bytes.len());
        }
        self.bucket.take(length);
        self.out.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The port.
pub struct SerialPort {
    chip: Serial<LineTrigger, RoomEvent, Box<dyn Write + Send>>,
    metrics: Arc<SerialMetrics>,
}

impl SerialPort {
    /// A port that interrupts by `line` and writes to `out`. `room` fires whenever the guest has emptied the receive
    /// buffer. Output beyond `limit` bytes is dropped.
    pub fn new(
        line: Arc<dyn IrqLine>,
        out: Box<dyn Write + Send>,
        limit: Option<BucketConfig>,
        room: Option<EventFd>,
    ) -> Self {
        let metrics = Arc::<SerialMetrics>::default();
        let out = match limit.and_then(|limit| TokenBucket::new(limit, 0)) {
            Some(bucket) => Box::new(LimitedOutput {
                out,
                bucket,
                started: Instant::now(),
                metrics: metrics.clone(),
            }),
            None => out,
        };
        SerialPort {
            chip: Serial::with_events(LineTrigger(line), RoomEvent(room), out),
            metrics,
        }
    }

    /// Counters.
    pub fn metrics(&self) -> Arc<SerialMetrics> {
        self.metrics.clone()
    }

    /// The guest's write to register `offset`, 0 to 7.
    pub fn write(&mut self, offset: u8, value: u8) {
        if offset == 0 {
            self.metrics.write_count.inc();
        }
        if self.chip.write(offset, value).is_err() {
            // The console's reader is gone. The guest goes on; what it says is lost.
            self.metrics.error_count.inc();
        }
    }

    /// The guest's read of register `offset`, 0 to 7.
    pub fn read(&mut self, offset: u8) -> u8 {
        if offset == 0 {
            self.metrics.read_count.inc();
        }
        self.chip.read(offset)
    }

    /// Bytes that [`SerialPort::input`] would take now.
    pub fn room(&self) -> usize {
        self.chip.fifo_capacity()
    }

    /// Types `bytes` on the console; as many as were taken comes back.
    pub fn input(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.chip.enqueue_raw_bytes(bytes) {
            Ok(taken) => Ok(taken),
            Err(Error::FullFifo) => Ok(0),
            Err(Error::IOError(error)) => Err(error),
            Err(Error::Trigger(never)) => match never {},
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Edges(AtomicUsize);

    impl IrqLine for Edges {
        fn raise(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(buf);
            Ok(buf.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_input_and_room() {
        let (edges, sink) = (Arc::new(Edges::default()), Sink::default());
        let room = EventFd::new(libc_nonblock()).unwrap();
        let mut port = SerialPort::new(
            edges.clone(),
            Box::new(sink.clone()),
            None,
            Some(room.try_clone().unwrap()),
        );
        for byte in b"hi" {
            port.write(0, *byte);
        }
        assert_eq!(*sink.0.lock().unwrap(), b"hi");
        port.write(1, 1); // receive interrupts on
        let all = vec![b'x'; 100];
        let taken = port.input(&all).unwrap();
        assert_eq!((taken, port.room()), (64, 0));
        assert_eq!(port.input(&all).unwrap(), 0);
        assert!(edges.0.load(Ordering::SeqCst) > 0);
        for _ in 0..taken {
            assert_eq!(port.read(0), b'x');
        }
        assert_eq!(room.read().unwrap(), 1);
        assert_eq!(port.room(), 64);
    }

    fn libc_nonblock() -> i32 {
        vmm_sys_util::eventfd::EFD_NONBLOCK
    }

    #[test]
    fn output_beyond_the_limit_is_dropped_and_counted() {
        let sink = Sink::default();
        let limit = BucketConfig {
            size: 10,
            one_time_burst: 5,
            refill_time_ms: 3_600_000,
        };
        let line = Arc::new(Edges::default());
        let mut port = SerialPort::new(line, Box::new(sink.clone()), Some(limit), None);
        for byte in 0..40 {
            port.write(0, byte);
        }
        assert_eq!(*sink.0.lock().unwrap(), (0..15).collect::<Vec<_>>());
        assert_eq!(port.metrics().rate_limiter_dropped_bytes.get(), 25);
    }

    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_is_gone_is_counted_and_no_more() {
        let mut port = SerialPort::new(Arc::new(Edges::default()), Box::new(Broken), None, None);
        port.write(0, b'x');
        assert_eq!(port.metrics().error_count.get(), 1);
    }
}
