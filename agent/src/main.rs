//! `lepton-agent`: the guest's PID 1.
//!
//! The way up, in order: take the signals, make the root writable and mount what programs expect
//! ([`mounts`]), name the host and bring up its network ([`network`]), listen, tell the host
//! ([`announce`]), serve. The way down, when the host, a program or Ctrl-Alt-Del asks for it:
//! [`shutdown`]. In between the main thread reaps every child that ends, ours or orphaned.
//!
//! Nothing is printed when the kernel's command line says `quiet`, but for what went wrong: each
//! byte on a serial console costs an exit from the guest. What goes wrong on the way up is
//! reported, and the way continued: a guest that can still be looked into is worth more.

mod announce;
mod identity;
mod kernel_command_line;
mod mounts;
mod netlink;
mod network;
mod shutdown;
mod signals;

use std::ffi::OsStr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use lepton_agent::service::{Admission, Service, StartTimes, Table, uptime_us};
use nix::sys::signal::Signal;

use kernel_command_line::Parameters;
use signals::Signals;

fn main() -> ExitCode {
    let start_us = uptime_us();
    if std::process::id() == 1 {
        be_init(start_us)
    } else {
        be_program(start_us)
    }
}

/// What the program does when a person starts it. Linked to the names by which people shut a
/// machine down, it asks PID 1 to do so.
fn be_program(start_us: u64) -> ExitCode {
    let name = std::env::args_os().next().map(PathBuf::from);
    if let Some("reboot" | "halt" | "poweroff") = name
        .as_deref()
        .and_then(Path::file_name)
        .and_then(OsStr::to_str)
    {
        let asked = nix::sys::signal::kill(nix::unistd::Pid::from_raw(1), Signal::SIGTERM);
        report("cannot ask PID 1 to shut down", asked);
        return asked.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["--version"] => {
            println!("lepton-agent {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        // For tests: the same service as an ordinary process.
        ["--listen-unix", listen] => serve_unix(listen, None, start_us),
        ["--listen-unix", listen, "--ready-unix", ready] => {
            serve_unix(listen, Some(ready), start_us)
        }
        _ => Err(
            "this is a guest's init: boot a kernel with init=/sbin/init, or ask for --version"
                .into(),
        ),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("lepton-agent: {e}");
            ExitCode::FAILURE
        }
    }
}

type Failure = Box<dyn std::error::Error>;

/// Reports what went wrong on the way up or down.
fn report(what: &str, result: Result<(), impl std::fmt::Display>) {
    if let Err(e) = result {
        eprintln!("lepton-agent: {what}: {e}");
    }
}

/// The life of PID 1. It never returns: the kernel panics when PID 1 exits.
fn be_init(start_us: u64) -> ! {
    let signals = Signals::take();
    // From here on Ctrl-Alt-Del is SIGINT to us, not a reset of the machine.
    report(
        "ctrl-alt-del",
        rustix::system::reboot(rustix::system::RebootCommand::CadOff),
    );
    mounts::writable_root();
    mounts::mount_all();
    let parameters = Parameters::read();
    network::set_up(&parameters);

    let table = Arc::new(Table::default());
    // Held to the end: dropping the server would end it.
    let server = serve_vsock(&table, start_us, parameters.quiet);
    report("serving the host", server.as_ref().map(|_| ()));
    match &signals {
        Ok(signals) => signals::reap_until_shutdown(signals, &table),
        Err(e) => report("signals", Err::<(), _>(e)),
    }
    shutdown::run(signals.as_ref().ok(), &table)
}

fn serve_vsock(table: &Arc<Table>, start_us: u64, quiet: bool) -> Result<ttrpc::Server, Failure> {
    let listener = announce::listen_vsock()?;
    // A host that has heard of us may make copies of us at once.
    let identity = identity::listen_vsock();
    let times = StartTimes {
        start_us,
        ready_us: uptime_us(),
    };
    // The socket listens: the host may connect from now on, while the threads are still starting.
    announce::tell_host(times);
    report("identity", identity.and_then(identity::serve));
    if !quiet {
        eprintln!("lepton-agent: ready {} us after the kernel", times.ready_us);
    }
    Ok(Service::new(Arc::clone(table), times, request_shutdown)
        .serve(listener, Admission::HostOnly)?)
}

/// Wakes the main thread up for a shutdown.
fn request_shutdown() {
    // Cannot fail: the signal is a valid one, and we may signal ourselves.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), Signal::SIGTERM);
}

/// Serves on a Unix socket until SIGTERM or SIGINT, and adopts orphans as PID 1 would.
fn serve_unix(listen: &str, ready: Option<&str>, start_us: u64) -> Result<(), Failure> {
    let signals = Signals::take()?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let listener = UnixListener::bind(listen)?;
    listener.set_nonblocking(true)?;
    let times = StartTimes {
        start_us,
        ready_us: uptime_us(),
    };
    let table = Arc::new(Table::default());
    let server = Service::new(Arc::clone(&table), times, request_shutdown)
        .serve(listener.into(), Admission::Anyone)?;
    if let Some(ready) = ready {
        announce::send_line(UnixStream::connect(ready)?, times)?;
    }
    signals::reap_until_shutdown(&signals, &table);
    drop(server);
    Ok(())
}
