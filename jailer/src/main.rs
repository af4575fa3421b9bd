//! `lepton-jailer`: starts lepton-vmm in a jail, by Firecracker's jailer's command line.
#![cfg_attr(not(test), no_main)] // see `process::start`

mod cgroup;
mod cli;
mod clock;
mod copy;
mod detach;
mod error;
mod folder;
mod jail;
mod keeper;
mod limits;
mod plan;
mod pool;
mod privileges;
mod process;
mod report;
mod root;
mod tree;
mod user;

use std::ffi::{c_char, c_int};
use std::os::fd::AsRawFd;
use std::process::exit;

use clap::Parser;
use clap::error::ErrorKind;
use dlmalloc::GlobalDlmalloc;
use lepton_hostio::arguments;

use cli::Cli;
use clock::Clock;
use detach::Session;
use error::JailError;
use plan::Plan;

/// musl's own heap asks the kernel for each few pages: forty times until a command line is read.
#[global_allocator]
static HEAP: GlobalDlmalloc = GlobalDlmalloc;

#[allow(unsafe_code)] // the symbol's name, and its arguments
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main(count: c_int, first: *const *const c_char) -> c_int {
    process::start();
    let clock = Clock::start();
    // SAFETY: they are `main`'s own.
    let arguments = unsafe { arguments::from_main(count, first) };
    let code = match Cli::try_parse_from(arguments) {
        Ok(cli) => run(cli, clock).unwrap_or_else(|error| {
            eprintln!("lepton-jailer: {error}");
            FAILURE
        }),
        Err(error) => {
            // Nothing is left to do if the message cannot be written.
            drop(error.print());
            match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => 0,
                _ => FAILURE,
            }
        }
    };
    exit(code.into())
}

/// The status of a jailer that has said what is wrong.
const FAILURE: u8 = 1;

/// Does what is asked for, and returns the status to end with.
fn run(cli: Cli, clock: Clock) -> Result<u8, JailError> {
    const FIRST_AFTER_STREAMS: i32 = 3;
    let handed = plan::inherited(cli.kvm_fd, &cli.tap_fd)?;
    let kept = handed.iter().map(|handed| handed.fd.as_raw_fd());
    process::close_all_but(FIRST_AFTER_STREAMS, kept).map_err(JailError::Inherited)?;
    if cli.pool.is_some() {
        return pool::run(cli, handed);
    }
    let session = match (cli.daemonize, cli.new_pid_ns) {
        (true, _) => Some(Session::New),
        (false, true) => Some(Session::Same),
        (false, false) => None,
    };
    let plan = Plan::open(cli, handed)?;
    match session {
        None => jail::start(plan, clock, &mut None),
        Some(session) => detach::elsewhere(session, clock.before_fork(), |clock, waiting| {
            jail::start(plan, clock, waiting)
        }),
    }
}
