//! Signals: which end the process in order, which are faults, and the one that kicks vCPUs.
#![allow(unsafe_code)] // handlers and a signalfd

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, RawFd};
use std::panic;

use rustix::time::ClockId;
use syscalls::Sysno;
use vmm_sys_util::signal::{create_sigset, register_signal_handler};

use crate::clock::time_on;
use crate::exit::ExitCode;
use crate::{log, metrics, vcpu};

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

/// Ends the process when any thread panics, with a line that says where. Without this, abort() would raise a signal,
/// which the threads' filters do not allow, and the panic would look like a forbidden system call.
pub fn end_on_panic() {
    panic::set_hook(Box::new(|info| {
        eprintln!("lepton-vmm: {info}");
        // SAFETY: _exit takes no pointer and does not return.
        unsafe { libc::_exit(ExitCode::Failure as libc::c_int) }
    }));
}

/// A thread's name as the kernel has it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct ThreadName([u8; 16]);

impl ThreadName {
    const NONE: ThreadName = ThreadName([0; 16]);
}

thread_local! {
    /// Known before the thread's filter forbids to ask for it. Without a destructor, so safe to read in a handler.
    static THREAD: Cell<ThreadName> = const { Cell::new(ThreadName::NONE) };
}

/// Lets a forbidden system call of the calling thread be reported by the thread's name.
pub fn remember_thread() {
    THREAD.set(thread_name());
}

fn thread_name() -> ThreadName {
    let mut name = MaybeUninit::<[u8; 16]>::zeroed();
    // SAFETY: PR_GET_NAME writes at most 16 bytes with a NUL, and prctl is a plain system call.
    unsafe {
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
        ThreadName(name.assume_init())
    }
}

/// Says what happened by means that are safe in a handler, and ends the process.
extern "C" fn on_fatal(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    let mut line = Line::default();
    line.text(b"lepton-vmm: signal ");
    line.number(signal.unsigned_abs().into());
    line.text(b" in thread \"");
    line.thread_name();
    line.text(b"\"");
    if signal == libc::SIGSYS {
        let number = system_call(info);
        line.text(b": its seccomp filter forbids system call ");
        line.number(number.into());
        line.text(b" (");
        let name = Sysno::new(number as usize).map_or("no name", |call| call.name());
        line.text(name.as_bytes());
        line.text(b")");
    }
    line.text(b"\n");
    line.write_to(libc::STDERR_FILENO);
    line.write_to(log::descriptor());
    if let Some(metrics) = metrics::descriptor() {
        last_metrics(signal).write_to(metrics);
    }
    let code = FATAL.iter().find(|(s, _)| *s == signal);
    let code = code.map_or(ExitCode::Failure, |(_, code)| *code);
    // SAFETY: _exit is async-signal-safe.
    unsafe { libc::_exit(code as libc::c_int) }
}

/// A last line of metrics, which has nothing but what ended the process.
fn last_metrics(signal: libc::c_int) -> Line {
    let counter: &[u8] = match signal {
        libc::SIGSYS => b"\"seccomp\":{\"num_faults\"",
        libc::SIGBUS => b"\"signals\":{\"sigbus\"",
        libc::SIGILL => b"\"signals\":{\"sigill\"",
        libc::SIGSEGV => b"\"signals\":{\"sigsegv\"",
        libc::SIGXCPU => b"\"signals\":{\"sigxcpu\"",
        _ => b"\"signals\":{\"sigxfsz\"",
    };
    let now = time_on(ClockId::Realtime).as_millis();
    let mut line = Line::default();
    line.text(b"{\"utc_timestamp_ms\":");
    line.number(u64::try_from(now).unwrap_or(u64::MAX));
    line.text(b",");
    line.text(counter);
    line.text(b":1}}\n");
    line
}

/// `si_syscall` of a SIGSYS: the kernel puts it behind `si_call_addr`.
fn system_call(info: *mut libc::siginfo_t) -> u32 {
    const OFFSET: usize = 24;
    // SAFETY: the kernel hands a valid siginfo_t of 128 bytes to a SA_SIGINFO handler.
    unsafe { info.cast::<u8>().add(OFFSET).cast::<u32>().read_unaligned() }
}

/// A line put together without allocation.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line {
            bytes: [0; 256],
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

    /// Nobody is left to tell of a failure.
    fn write_to(&self, fd: RawFd) {
        // SAFETY: write is async-signal-safe, and `len` bytes are in bounds.
        unsafe { libc::write(fd, self.bytes.as_ptr().cast(), self.len) };
    }

    fn thread_name(&mut self) {
        let name = match THREAD.get() {
            // Not confined: everything may still be asked.
            ThreadName::NONE => thread_name(),
            name => name,
        }
        .0;
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
        assert_eq!(line.len, 256);
    }
}
