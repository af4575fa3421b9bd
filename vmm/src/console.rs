//! The guest's serial console on this side: output to a file or the standard output, input from the standard input.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use lepton_devices::legacy::serial::SerialPort;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use vmm_sys_util::eventfd::EventFd;

/// Opens what the console's output goes to.
pub fn output(path: Option<&Path>) -> io::Result<Box<dyn Write + Send>> {
    match path {
        Some(path) => {
            let file = crate::log::open_sink(path).map_err(io::Error::other)?;
            Ok(Box::new(file))
        }
        None => Ok(Box::new(io::stdout())),
    }
}

/// The terminal on the standard input in raw mode, for as long as this lives.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Switches the terminal, if there is one.
    pub fn enter() -> Option<Self> {
        if !io::stdin().is_terminal() {
            return None;
        }
        let before = tcgetattr(io::stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).ok()?;
        Some(RawTerminal { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone; then there is nothing to put back.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

const INPUT: u32 = 0;
const ROOM: u32 = 1;

/// Types what comes on the standard input on the guest's console.
pub struct ConsoleInput {
    serial: Arc<Mutex<SerialPort>>,
    stdin: io::Stdin,
    room: EventFd,
    /// The guest's buffer is full: input waits in the host's.
    waiting: bool,
}

impl ConsoleInput {
    /// `room` is what the port fires when its buffer has been read.
    pub fn new(serial: Arc<Mutex<SerialPort>>, room: EventFd) -> Self {
        ConsoleInput {
            serial,
            stdin: io::stdin(),
            room,
            waiting: false,
        }
    }

    fn input(&self) -> Events {
        Events::with_data_raw(self.stdin.as_raw_fd(), INPUT, EventSet::IN)
    }

    /// Moves one bufferful. False: there will never be more.
    fn transfer(&mut self, ops: &mut EventOps) -> bool {
        let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = [0; 64];
        let room = serial.room().min(buffer.len());
        if room == 0 {
            self.waiting = true;
            let silent = Events::with_data_raw(self.stdin.as_raw_fd(), INPUT, EventSet::empty());
            return ops.modify(silent).is_ok();
        }
        // Standard input is read unbuffered, through its descriptor: what is read here must not be more than fits.
        match rustix::io::read(&self.stdin, &mut buffer[..room]) {
            Ok(0) => false,
            Ok(length) => {
                // It fits: nothing else types on this console.
                drop(serial.input(&buffer[..length]));
                true
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => true,
            Err(_) => false,
        }
    }
}

impl MutEventSubscriber for ConsoleInput {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let goes_on = match events.data() {
            ROOM => {
                drop(self.room.read());
                if !std::mem::take(&mut self.waiting) {
                    return;
                }
                ops.modify(self.input()).is_ok()
            }
            _ => self.transfer(ops),
        };
        if !goes_on {
            drop(ops.remove(self.input()));
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        // A standard input that cannot be watched (a file, /dev/null) has nothing to say.
        if ops.add(self.input()).is_ok() {
            let room = Events::with_data_raw(self.room.as_raw_fd(), ROOM, EventSet::IN);
            if let Err(error) = ops.add(room) {
                log::error!("cannot watch the console's buffer: {error}");
            }
        }
    }
}
