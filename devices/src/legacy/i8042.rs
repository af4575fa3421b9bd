//! The keyboard controller, as far as a headless machine needs it: the reset line (vm-superio) and a keyboard with
//! one gesture, Ctrl-Alt-Del.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use vm_superio::{I8042Device, Trigger};

use crate::virtio::interrupt::IrqLine;
use crate::virtio::state::RestoreError;

counters! {
    /// What the guest did with the keyboard controller.
    pub struct I8042Metrics {
        /// Reads.
        read_count,
        /// Writes.
        write_count,
        /// Resets asked for.
        reset_count,
        /// Key presses that found no room.
        error_count,
    }
}

const DATA: u16 = 0;
const COMMAND: u16 = 4;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_KEYLOCK_OPEN: u8 = 1 << 4;

const CONFIG_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const CONFIG_SYSTEM: u8 = 1 << 2;

const READ_CONFIG: u8 = 0x20;
const WRITE_CONFIG: u8 = 0x60;
const SELF_TEST: u8 = 0xaa;
const SELF_TEST_PASSED: u8 = 0x55;
const KEYBOARD_TEST: u8 = 0xab;
const READ_OUTPUT: u8 = 0xd0;
const WRITE_OUTPUT: u8 = 0xd1;
const KEYBOARD_ACK: u8 = 0xfa;

/// Presses and releases in scan code set 2, as Linux's translated set makes of them: left Ctrl, left Alt, Delete.
const CTRL_ALT_DEL: [u8; 4] = [0x14, 0x11, 0xe0, 0x71];
const CAPACITY: usize = 16;

/// What a write led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum PortWrite {
    /// Nothing to do.
    Done,
    /// The guest pulled the reset line.
    Reset,
}

/// The controller as saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// Command byte.
    pub config: u8,
    /// Output port.
    pub output_port: u8,
    /// The command that waits for its argument.
    pub awaiting: Option<u8>,
    /// Bytes that the guest has not read.
    pub output: Vec<u8>,
}

#[derive(Clone, Default)]
struct ResetLine(Arc<AtomicBool>);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::SeqCst);
        Ok(())
    }
}

/// The controller with its keyboard.
pub struct I8042 {
    reset: I8042Device<ResetLine>,
    reset_line: ResetLine,
    interrupt: Arc<dyn IrqLine>,
    config: u8,
    output_port: u8,
    /// The command whose argument the next write to the data port is.
    awaiting: Option<u8>,
    output: VecDeque<u8>,
    metrics: Arc<I8042Metrics>,
}

impl I8042 {
    /// A controller whose keyboard interrupts by `interrupt`.
    pub fn new(interrupt: Arc<dyn IrqLine>) -> Self {
        let reset_line = ResetLine::default();
        I8042 {
            reset: I8042Device::new(reset_line.clone()),
            reset_line,
            interrupt,
            config: CONFIG_KEYBOARD_INTERRUPT | CONFIG_SYSTEM,
            output_port: 0,
            awaiting: None,
            output: VecDeque::with_capacity(CAPACITY),
            metrics: Arc::default(),
        }
    }

    /// Counters.
    pub fn metrics(&self) -> Arc<I8042Metrics> {
        self.metrics.clone()
    }

    /// The controller now, to be saved.
    pub fn save(&self) -> I8042State {
        let I8042 {
            // A reset ends the machine: none is pending.
            reset: _,
            reset_line: _,
            interrupt: _,
            config,
            output_port,
            awaiting,
            output,
            // Counted by each process for itself.
            metrics: _,
        } = self;
        I8042State {
            config: *config,
            output_port: *output_port,
            awaiting: *awaiting,
            output: output.iter().copied().collect(),
        }
    }

    /// Takes what [`I8042::save`] gave.
    pub fn load(&mut self, state: &I8042State) -> Result<(), RestoreError> {
        let I8042State {
            config,
            output_port,
            awaiting,
            output,
        } = state;
        if output.len() > CAPACITY {
            return Err(RestoreError::Value {
                what: "number of keyboard bytes",
                value: output.len() as u64,
            });
        }
        if let Some(command) = awaiting.filter(|c| ![WRITE_CONFIG, WRITE_OUTPUT].contains(c)) {
            return Err(RestoreError::Value {
                what: "keyboard command",
                value: u64::from(command),
            });
        }
        (self.config, self.output_port, self.awaiting) = (*config, *output_port, *awaiting);
        self.output = VecDeque::with_capacity(CAPACITY);
        self.output.extend(output);
        Ok(())
    }

    /// Presses Ctrl-Alt-Del. False: the guest has not read earlier keys, and nothing was pressed.
    pub fn ctrl_alt_del(&mut self) -> bool {
        if self.output.len() + CTRL_ALT_DEL.len() > CAPACITY {
            self.metrics.error_count.inc();
            return false;
        }
        self.output.extend(CTRL_ALT_DEL);
        self.signal();
        true
    }

    /// The guest's read at `offset` from port 0x60.
    pub fn read(&mut self, offset: u16) -> u8 {
        self.metrics.read_count.inc();
        match offset {
            DATA => {
                let byte = self.output.pop_front().unwrap_or(0);
                // The line is an edge: what is left needs another one.
                self.signal();
                byte
            }
            COMMAND => {
                let full = if self.output.is_empty() {
                    0
                } else {
                    STATUS_OUTPUT_FULL
                };
                full | STATUS_SYSTEM | STATUS_KEYLOCK_OPEN
            }
            _ => 0xff,
        }
    }

    /// The guest's write at `offset` from port 0x60.
    pub fn write(&mut self, offset: u16, value: u8) -> PortWrite {
        self.metrics.write_count.inc();
        match offset {
            COMMAND => self.command(value),
            DATA => {
                self.data(value);
                PortWrite::Done
            }
            _ => PortWrite::Done,
        }
    }

    fn command(&mut self, value: u8) -> PortWrite {
        match self.reset.write(COMMAND as u8, value) {
            Ok(()) => {}
            Err(never) => match never {},
        }
        if self.reset_line.0.swap(false, Ordering::SeqCst) {
            self.metrics.reset_count.inc();
            return PortWrite::Reset;
        }
        self.awaiting = None;
        match value {
            READ_CONFIG => self.answer(self.config),
            READ_OUTPUT => self.answer(self.output_port),
            SELF_TEST => self.answer(SELF_TEST_PASSED),
            KEYBOARD_TEST => self.answer(0),
            WRITE_CONFIG | WRITE_OUTPUT => self.awaiting = Some(value),
            _ => {}
        }
        PortWrite::Done
    }

    fn data(&mut self, value: u8) {
        match self.awaiting.take() {
            Some(WRITE_CONFIG) => self.config = value,
            Some(_) => self.output_port = value,
            // To the keyboard itself: whatever it is told, it agrees.
            None => {
                self.answer(KEYBOARD_ACK);
                self.signal();
            }
        }
    }

    /// The controller's own answer takes the place of unread keys.
    fn answer(&mut self, byte: u8) {
        self.output.clear();
        self.output.push_back(byte);
    }

    fn signal(&self) {
        if !self.output.is_empty() && self.config & CONFIG_KEYBOARD_INTERRUPT != 0 {
            self.interrupt.raise();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct Edges(AtomicUsize);

    impl IrqLine for Edges {
        fn raise(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn reset_is_told_once_per_command() {
        let mut chip = I8042::new(Arc::new(Edges::default()));
        assert_eq!(chip.write(COMMAND, 0xfe), PortWrite::Reset);
        assert_eq!(chip.write(COMMAND, READ_CONFIG), PortWrite::Done);
        assert_eq!(chip.write(DATA, 0xfe), PortWrite::Done);
    }

    #[test]
    fn ctrl_alt_del_arrives_with_an_edge_per_byte() {
        let edges = Arc::new(Edges::default());
        let mut chip = I8042::new(edges.clone());
        assert!(chip.ctrl_alt_del());
        let mut keys = Vec::new();
        while chip.read(COMMAND) & STATUS_OUTPUT_FULL != 0 {
            keys.push(chip.read(DATA));
        }
        assert_eq!(keys, CTRL_ALT_DEL);
        assert_eq!(edges.0.load(Ordering::SeqCst), 4);
        for _ in 0..CAPACITY / CTRL_ALT_DEL.len() {
            assert!(chip.ctrl_alt_del());
        }
        assert!(!chip.ctrl_alt_del(), "no room");
    }

    #[test]
    fn configuration_reads_back_and_silences_the_keyboard() {
        let edges = Arc::new(Edges::default());
        let mut chip = I8042::new(edges.clone());
        let _ = chip.write(COMMAND, WRITE_CONFIG);
        let _ = chip.write(DATA, 0x74);
        let _ = chip.write(COMMAND, READ_CONFIG);
        assert_eq!(chip.read(DATA), 0x74);
        assert!(chip.ctrl_alt_del());
        assert_eq!(edges.0.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn any_bytes_leave_it_bounded() {
        let mut chip = I8042::new(Arc::new(Edges::default()));
        for i in 0..20_000u32 {
            let value = (i.wrapping_mul(2_654_435_761) >> 13) as u8;
            let _ = chip.write(if i % 3 == 0 { DATA } else { COMMAND }, value);
            assert!(chip.output.len() <= CAPACITY);
        }
    }
}
