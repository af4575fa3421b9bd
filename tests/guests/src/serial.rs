//! The first serial port, written to.

use core::fmt::{self, Write};

use crate::port;

const COM1: u16 = 0x3f8;

/// COM1. It is never waited for: a virtual one takes all there is.
pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            port::write(COM1, byte);
        }
        Ok(())
    }
}

/// Writes a line to the serial port.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => {{
        use core::fmt::Write;
        // The serial port takes everything.
        let _ = writeln!($crate::serial::Serial, $($argument)*);
    }};
}
