//! Keeps what the lab's command writes.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// A sink that keeps what is written; its clones share it.
#[derive(Clone, Default)]
pub struct Captured {
    bytes: Arc<Mutex<Vec<u8>>>,
    /// Whether it is written to stdout, too.
    shown: bool,
}

impl Captured {
    /// Also shows it as it comes.
    pub fn shown() -> Self {
        Self {
            shown: true,
            ..Self::default()
        }
    }

    /// What was written so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap_or_else(PoisonError::into_inner))
            .into_owned()
    }
}

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.shown {
            io::stdout().write_all(bytes)?;
        }
        self.bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.shown {
            io::stdout().flush()?;
        }
        Ok(())
    }
}
