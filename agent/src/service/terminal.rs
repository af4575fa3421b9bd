//! Pseudo-terminals for processes that ask for one.
#![allow(unsafe_code)] // `pre_exec`: a session and a controlling terminal can be made no other way.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::protocol::TerminalSize;

/// Both ends of a new pseudo-terminal. The process holds the far end alone, so that the near end
/// sees when the last of its holders is gone.
pub struct Terminal {
    pub near: OwnedFd,
    pub far: OwnedFd,
}

impl Terminal {
    pub fn open(size: Winsize) -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let near = openpt(flags)?;
        grantpt(&near)?;
        unlockpt(&near)?;
        let far = ioctl_tiocgptpeer(&near, flags)?;
        tcsetwinsize(&near, size)?;
        Ok(Self { near, far })
    }
}

/// The size in the kernel's form; sizes out of its range become the largest it has.
pub fn size(size: &TerminalSize) -> Winsize {
    let clamp = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    Winsize {
        ws_row: clamp(size.rows),
        ws_col: clamp(size.columns),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Makes `command` lead a session of its own whose terminal is its standard input.
pub fn lead_session(command: &mut Command) {
    let lead = || {
        rustix::process::setsid()?;
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed. `lead` makes two
    // system calls, directly (rustix's own, without libc), and allocates nothing: its error is a
    // bare error number.
    unsafe { command.pre_exec(lead) };
}
