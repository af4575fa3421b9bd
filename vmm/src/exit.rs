//! How the process ends, as its exit status says.

use crate::vcpu::Stop;

/// Exit statuses. 148 to 157 are Firecracker's; those of a guest that ended follow them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest reset itself, which is how a guest without a way to power off ends.
    Success = 0,
    /// Something failed; the log says what.
    Failure = 1,
    /// A thread made a system call that its filter forbids.
    BadSyscall = 148,
    /// Bus error.
    Sigbus = 149,
    /// Segmentation fault.
    Sigsegv = 150,
    /// A file grew past its limit.
    Sigxfsz = 151,
    /// The configuration file cannot be used.
    BadConfiguration = 152,
    /// The command line cannot be used.
    BadArguments = 153,
    /// The CPU time limit was reached.
    Sigxcpu = 154,
    /// The terminal is gone.
    Sighup = 156,
    /// Illegal instruction.
    Sigill = 157,
    /// The guest powered off.
    GuestPowerOff = 160,
    /// The guest had a triple fault.
    GuestTripleFault = 161,
    /// SIGINT (128 + 2).
    Sigint = 130,
    /// SIGTERM (128 + 15).
    Sigterm = 143,
}

impl From<&Stop> for ExitCode {
    fn from(stop: &Stop) -> Self {
        match stop {
            Stop::Reset => ExitCode::Success,
            Stop::PowerOff => ExitCode::GuestPowerOff,
            Stop::TripleFault => ExitCode::GuestTripleFault,
            Stop::Failed(_) => ExitCode::Failure,
        }
    }
}
