//! Signals: which end the process in order, which are faults, and the one that kicks vCPUs.
#![allow(unsafe_code)] // handlers and a signalfd

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::FromRawFd;

use vmm_sys_util::signal::{create_sigset, register_signal_handler};

use crate::exit::ExitCode;
use crate::vcpu;

/// Faults and limits that end the process at once.
const FATAL: [(libc::c_int, ExitCode); 6] = [
    (libc::SIGBUS, ExitCode::Sigbus),
    (libc::SIGSEGV, ExitCode::Sigsegv),
    (libc::SIGXFSZ, ExitCode::Sigxfsz),
    (libc::SIGXCPU, ExitCode::Sigxcpu),
    (libc::SIGILL, ExitCode::Sigill),
    (libc::SIGSYS, ExitCode::BadSyscall),
];

/// Signals that end the process in order: sockets are removed, metrics written.
const ORDERLY: [(libc::c_int, ExitCode); 3] = [
    (libc::SIGINT, ExitCode::Sigint),
    (libc::SIGTERM, ExitCode::Sigterm),
    (libc::SIGHUP, ExitCode::Sighup),
];

/// Installs the handlers. To be called before any thread is started.
pub fn install() -> io::Result<()> {
    for (signal, _) in FATAL {
        register_signal_handler(signal, on_fatal).map_err(io::Error::from)?;
    }
    register_signal_handler(vcpu::kick_signal(), on_kick).map_err(io::Error::from)
}

/// Orderly ends arrive here from now on. To be called before any thread is started, so that all of them leave these
/// signals alone.
pub fn orderly_ends() -> io::Result<OrderlyEnds> {
    let set = create_sigset(&ORDERLY.map(|(signal, _)| signal)).map_err(io::Error::from)?;
    // SAFETY: `set` is initialized and outlives both calls.
    let fd = unsafe {
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is a new descriptor that nothing else owns.
    Ok(OrderlyEnds(unsafe { File::from_raw_fd(fd) }))
}

/// A descriptor that is readable when the process is asked to end.
pub struct OrderlyEnds(pub File);

impl OrderlyEnds {
    /// The exit status asked for, if any is.
    pub fn take(&mut self) -> Option<ExitCode> {
        const LENGTH: usize = size_of::<libc::signalfd_siginfo>();
        let mut info = [0u8; LENGTH];
        self.0.read_exact(&mut info).ok()?;
        // signalfd(2): the signal's number is the first 32 bits.
        let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        let code = ORDERLY.iter().find(|(s, _)| *s as u32 == number);
        Some(code.map_or(ExitCode::Failure, |(_, code)| *code))
    }
}

/// Leaves KVM_RUN by its mere arrival.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Says what happened by means that are safe in a handler, and ends the process.
extern "C" fn on_fatal(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    let mut line = Line::default();
    line.text(b"lepton-vmm: signal ");
    line.number(signal as u64);
    if signal == libc::SIGSYS {
        line.text(b": forbidden system call ");
        line.number(u64::from(system_call(info)));
        line.text(b" in thread \"");
        line.thread_name();
        line.text(b"\"");
    }
    line.text(b"\n");
    let code = FATAL.iter().find(|(s, _)| *s == signal);
    let code = code.map_or(ExitCode::Failure, |(_, code)| *code);
    // SAFETY: write and _exit are async-signal-safe; the buffer is on this stack.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(code as libc::c_int)
    }
}

/// `si_syscall` of a SIGSYS: the kernel puts it behind `si_call_addr`.
fn system_call(info: *mut libc::siginfo_t) -> u32 {
    const OFFSET: usize = 24;
    // SAFETY: the kernel hands a valid siginfo_t of 128 bytes to a SA_SIGINFO handler.
    unsafe { info.cast::<u8>().add(OFFSET).cast::<u32>().read_unaligned() }
}

/// A line put together without allocation.
struct Line {
    bytes: [u8; 128],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line {
            bytes: [0; 128],
            len: 0,
        }
    }
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = *byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, number: u64) {
        let mut divisor = 1;
        while number / divisor >= 10 {
            divisor *= 10;
        }
        while divisor > 0 {
            self.text(&[b'0' + (number / divisor % 10) as u8]);
            divisor /= 10;
        }
    }

    fn thread_name(&mut self) {
        let mut name = MaybeUninit::<[u8; 16]>::zeroed();
        // SAFETY: PR_GET_NAME writes at most 16 bytes with a NUL, and prctl is a plain system call.
        let name = unsafe {
            libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
            name.assume_init()
        };
        let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        self.text(&name[..end]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_put_together_and_never_overflows() {
        let mut line = Line::default();
        line.text(b"n ");
        for number in [0, 7, 10, 1_234_567_890, u64::MAX] {
            line.number(number);
            line.text(b" ");
        }
        assert_eq!(
            &line.bytes[..line.len],
            b"n 0 7 10 1234567890 18446744073709551615 "
        );
        line.text(&[b'x'; 500]);
        assert_eq!(line.len, 128);
    }
}
