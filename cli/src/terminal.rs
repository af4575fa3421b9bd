//! The person's terminal.

use std::io;
use std::sync::{Mutex, Once, PoisonError};

use lepton_agent::client::TerminalSize;
use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// How the terminal was before it was made raw.
static ORIGINAL: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal passes every byte on as it is, until this is dropped or we panic.
pub struct RawMode(());

impl RawMode {
    /// Makes the terminal at standard input raw.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn enter() -> io::Result<Self> {
        static ON_PANIC: Once = Once::new();
        ON_PANIC.call_once(|| {
            let report = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                report(info);
            }));
        });
        let original = tcgetattr(stdin())?;
        let mut raw = original.clone();
        raw.make_raw();
        *ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner) = Some(original);
        let mode = Self(());
        tcsetattr(stdin(), OptionalActions::Drain, &raw)?;
        Ok(mode)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let original = ORIGINAL
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let Some(original) = original {
        // Of no use to report: the terminal is gone.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &original);
    }
}

/// Whether a person sits at both ends.
pub fn is_interactive() -> bool {
    isatty(stdin()) && isatty(stdout())
}

/// The terminal's size, or the classic one if it does not know.
pub fn size() -> TerminalSize {
    match tcgetwinsize(stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => TerminalSize {
            rows: size.ws_row,
            columns: size.ws_col,
        },
        _ => TerminalSize {
            rows: 24,
            columns: 80,
        },
    }
}
