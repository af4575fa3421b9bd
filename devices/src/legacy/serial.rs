//! COM1: a 16550A (vm-superio) whose output goes to a writer and whose input is pushed in.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{Error, SerialEvents};
use vm_superio::{Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

use super::LineTrigger;
use crate::rate_limiter::{BucketConfig, TokenBucket};
use crate::virtio::interrupt::IrqLine;
use crate::virtio::state::RestoreError;

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

/// The port as saved: the registers of a 16550A, and what the guest has not read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SerialPortState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub input: Vec<u8>,
}

/// Where a port's bytes go, and what tells that it takes more.
pub struct Wiring {
    /// Its interrupt.
    pub line: Arc<dyn IrqLine>,
    /// Its output.
    pub out: Box<dyn Write + Send>,
    /// Output beyond this is dropped.
    pub limit: Option<BucketConfig>,
    /// Fires whenever the guest has emptied the receive buffer.
    pub room: Option<EventFd>,
}

impl Wiring {
    fn connect(
        self,
        metrics: &Arc<SerialMetrics>,
    ) -> (LineTrigger, RoomEvent, Box<dyn Write + Send>) {
        let Wiring {
            line,
            out,
            limit,
            room,
        } = self;
        let out = match limit.and_then(|limit| TokenBucket::new(limit, 0)) {
            Some(bucket) => Box::new(LimitedOutput {
                out,
                bucket,
                started: Instant::now(),
                metrics: metrics.clone(),
            }),
            None => out,
        };
        (LineTrigger(line), RoomEvent(room), out)
    }
}

/// The port.
pub struct SerialPort {
    chip: Serial<LineTrigger, RoomEvent, Box<dyn Write + Send>>,
    metrics: Arc<SerialMetrics>,
}

impl SerialPort {
    /// A port in its reset state.
    pub fn new(wiring: Wiring) -> Self {
        let metrics = Arc::<SerialMetrics>::default();
        let (line, room, out) = wiring.connect(&metrics);
        SerialPort {
            chip: Serial::with_events(line, room, out),
            metrics,
        }
    }

    /// A port as [`SerialPort::save`] gave it. Its output's limit begins anew.
    pub fn restored(state: &SerialPortState, wiring: Wiring) -> Result<Self, RestoreError> {
        let SerialPortState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            input,
        } = state;
        let state = SerialState {
            baud_divisor_low: *baud_divisor_low,
            baud_divisor_high: *baud_divisor_high,
            interrupt_enable: *interrupt_enable,
            interrupt_identification: *interrupt_identification,
            line_control: *line_control,
            line_status: *line_status,
            modem_control: *modem_control,
            modem_status: *modem_status,
            scratch: *scratch,
            in_buffer: input.clone(),
        };
        let metrics = Arc::<SerialMetrics>::default();
        let (line, room, out) = wiring.connect(&metrics);
        let chip =
            Serial::from_state(&state, line, room, out).map_err(|_| RestoreError::Value {
                what: "number of serial input bytes",
                value: input.len() as u64,
            })?;
        Ok(SerialPort { chip, metrics })
    }

    /// The port now, to be saved.
    pub fn save(&self) -> SerialPortState {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.chip.state();
        SerialPortState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            input: in_buffer,
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
        let mut port = SerialPort::new(Wiring {
            line: edges.clone(),
            out: Box::new(sink.clone()),
            limit: None,
            room: Some(room.try_clone().unwrap()),
        });
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
        let mut port = SerialPort::new(Wiring {
            line,
            out: Box::new(sink.clone()),
            limit: Some(limit),
            room: None,
        });
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
        let mut port = SerialPort::new(Wiring {
            line: Arc::new(Edges::default()),
            out: Box::new(Broken),
            limit: None,
            room: None,
        });
        port.write(0, b'x');
        assert_eq!(port.metrics().error_count.get(), 1);
    }
}
