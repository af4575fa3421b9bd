//! Streams between the guest and a program on the host, by the Unix sockets that the VMMs have for them.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, poll};

use super::{Case, Context, Place, Reading, for_each_load, probe};
use crate::catalogue::{FigureKind, higher, lower};
use crate::guest::Guest;
use crate::interrupt;
use crate::machine::Machine;
use crate::pages::Pages;
use crate::process::{Failure, Running};
use crate::side::Side;

#[rustfmt::skip]
pub const FIGURES: &[FigureKind] = &[
    higher("vsock.send-1", "The guest streams to the host, one connection", "MiB/s"),
    lower("vsock.send-1-cpu", "The guest streams to the host, one connection: processor time of the VMM's first thread for each MiB", "us"),
    higher("vsock.send-32", "The guest streams to the host, 32 connections", "MiB/s"),
    lower("vsock.send-32-cpu", "The guest streams to the host, 32 connections: processor time of the VMM's first thread for each MiB", "us"),
    higher("vsock.receive-1", "The host streams to the guest, one connection", "MiB/s"),
    lower("vsock.receive-1-cpu", "The host streams to the guest, one connection: processor time of the VMM's first thread for each MiB", "us"),
    higher("vsock.receive-32", "The host streams to the guest, 32 connections", "MiB/s"),
    lower("vsock.receive-32-cpu", "The host streams to the guest, 32 connections: processor time of the VMM's first thread for each MiB", "us"),
];

/// Who sends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    Guest,
    Host,
}

struct Load {
    from: From,
    connections: usize,
    figures: &'static [&'static str; 2],
}

const fn load(from: From, connections: usize, figures: &'static [&'static str; 2]) -> Load {
    Load {
        from,
        connections,
        figures,
    }
}

#[rustfmt::skip]
const LOADS: [Load; 4] = [
    load(From::Guest, 1, &["vsock.send-1", "vsock.send-1-cpu"]),
    load(From::Guest, 32, &["vsock.send-32", "vsock.send-32-cpu"]),
    load(From::Host, 1, &["vsock.receive-1", "vsock.receive-1-cpu"]),
    load(From::Host, 32, &["vsock.receive-32", "vsock.receive-32-cpu"]),
];

/// The host's port that the guest connects to.
pub const PORT: u32 = 5000;
/// Bytes that the host moves by one system call.
const CHUNK: usize = 256 << 10;

/// One case for each load and VMM.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    for_each_load(context, &LOADS, |load| load.figures, run)
}

/// The socket of a machine's vsock.
pub fn socket(place: &Place) -> PathBuf {
    place.folder().join("v.sock")
}

/// Where all of these VMMs lead a guest that connects to [`PORT`] of the host.
pub fn listener(place: &Place) -> Result<UnixListener, Failure> {
    let path = place.folder().join(format!("v.sock_{PORT}"));
    Ok(UnixListener::bind(path)?)
}

fn run(context: &Context, side: &Side, load: &Load) -> Result<Vec<Reading>, Failure> {
    let place = Place::new(Guest::Reset, context.patience)?;
    let socket = socket(&place);
    let listener = listener(&place)?;
    // Packets as Linux makes them: up to 64 KiB to the host, a page each to the guest.
    let mode = match load.from {
        From::Guest => "probe.mode=vsock_tx probe.size=65536",
        From::Host => "probe.mode=vsock_rx probe.size=4096",
    };
    let arguments = format!(
        "{mode} probe.connections={} probe.port={PORT} probe.seconds=1",
        load.connections
    );
    let with = |machine: &mut Machine| {
        machine.vsock = Some(socket);
        Ok(())
    };
    let run = probe::run(context, side, &arguments, with, |running| {
        stream(running, &listener, load.from, load.connections)
    })?;
    let [rate, processor] = *load.figures;
    let mib = run.told.bytes as f64 / f64::from(1 << 20);
    Ok(vec![
        Reading {
            figure: rate,
            value: run.mib_per_second()?,
        },
        Reading {
            figure: processor,
            value: run.first_thread.as_secs_f64() * 1e6 / mib,
        },
    ])
}

/// Takes what a guest sends on 32 connections, to the end.
pub fn take_32(running: &Running, listener: &UnixListener) -> Result<(), Failure> {
    stream(running, listener, From::Guest, 32)
}

/// The host's part: takes or sends until the guest is done.
fn stream(
    running: &Running,
    listener: &UnixListener,
    from: From,
    connections: usize,
) -> Result<(), Failure> {
    let mut streams = Vec::new();
    while streams.len() < connections {
        running.readable(listener.as_fd(), "the guest's connection")?;
        let (stream, _) = listener.accept()?;
        stream.set_nonblocking(true)?;
        streams.push(stream);
    }
    let mut buffer = Pages::new(CHUNK);
    let event = match from {
        From::Guest => PollFlags::IN,
        From::Host => PollFlags::OUT,
    };
    while !streams.is_empty() {
        if interrupt::is_pending() {
            return Err(Failure::Interrupted);
        }
        let mut fds: Vec<PollFd<'_>> = streams
            .iter()
            .map(|stream| PollFd::new(stream, event))
            .collect();
        // A guest or VMM that hangs makes no progress: then its own end is waited for, as long as it may take.
        let limit = rustix::event::Timespec {
            tv_sec: 5,
            tv_nsec: 0,
        };
        if poll(&mut fds, Some(&limit)).map_err(std::io::Error::from)? == 0 {
            return Err(running.failure("timeout: nothing was streamed for five seconds"));
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ready = ready.into_iter();
        streams.retain_mut(|stream| {
            !ready.next().unwrap_or(false) || go_on(stream, from, buffer.bytes())
        });
    }
    Ok(())
}

/// Moves some bytes. False: the other end is gone.
fn go_on(stream: &mut UnixStream, from: From, buffer: &mut [u8]) -> bool {
    let moved = match from {
        From::Guest => stream.read(buffer),
        From::Host => stream.write(buffer),
    };
    match moved {
        Ok(count) => count > 0,
        Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_give_the_figures_of_the_list() {
        let given: Vec<&str> = LOADS.iter().flat_map(|load| *load.figures).collect();
        let listed: Vec<&str> = FIGURES.iter().map(|figure| figure.id).collect();
        assert_eq!(given, listed);
    }
}
