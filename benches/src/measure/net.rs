//! An interface under load: frames that the guest sends, that it is sent, and that it sends back.
//!
//! What the guest sends is for no station: the host's kernel takes it from the tap and drops it. What it is sent comes
//! from a packet socket, which sees when the tap has no room and then waits: no frame is lost on the way.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{Case, Context, Reading, for_each_load, probe};
use crate::catalogue::{FigureKind, higher, lower};
use crate::interrupt;
use crate::process::{Failure, Running};
use crate::side::Side;
use crate::wire::Wire;

#[rustfmt::skip]
pub const FIGURES: &[FigureKind] = &[
    higher("net.send-64", "The guest sends frames of 64 bytes", "frames/s"),
    lower("net.send-64-cpu", "The guest sends frames of 64 bytes: processor time of the VMM's first thread for each", "us"),
    higher("net.send-1514", "The guest sends frames of 1514 bytes", "frames/s"),
    lower("net.send-1514-cpu", "The guest sends frames of 1514 bytes: processor time of the VMM's first thread for each", "us"),
    higher("net.send-64k", "The guest sends TCP segments of 64,000 bytes", "MiB/s"),
    lower("net.send-64k-cpu", "The guest sends TCP segments of 64,000 bytes: processor time of the VMM's first thread for each", "us"),
    higher("net.receive-64", "The guest is sent frames of 64 bytes", "frames/s"),
    lower("net.receive-64-cpu", "The guest is sent frames of 64 bytes: processor time of the VMM's first thread for each", "us"),
    higher("net.receive-1514", "The guest is sent frames of 1514 bytes", "frames/s"),
    lower("net.receive-1514-cpu", "The guest is sent frames of 1514 bytes: processor time of the VMM's first thread for each", "us"),
    higher("net.receive-64k", "The guest is sent frames of 64,000 bytes", "MiB/s"),
    lower("net.receive-64k-cpu", "The guest is sent frames of 64,000 bytes: processor time of the VMM's first thread for each", "us"),
    higher("net.echo-1", "Frames of 64 bytes there and back, one at a time", "1/s"),
    lower("net.echo-1-cpu", "Frames of 64 bytes there and back, one at a time: processor time of the VMM's first thread for each", "us"),
    higher("net.echo-32", "Frames of 64 bytes there and back, 32 at a time", "1/s"),
    lower("net.echo-32-cpu", "Frames of 64 bytes there and back, 32 at a time: processor time of the VMM's first thread for each", "us"),
];

/// A load.
struct Load {
    arguments: &'static str,
    /// What a second and what an operation give.
    figures: &'static [&'static str; 2],
    host: Host,
    in_mib: bool,
}

/// What the host does meanwhile.
#[derive(Clone, Copy)]
enum Host {
    /// Nothing: its kernel drops what comes.
    Drops,
    /// Sends frames of so many bytes, as many as the tap takes.
    Floods(usize),
    /// Keeps so many frames under way.
    Plays(u64),
}

const SEND_64: &str = "probe.mode=net_tx probe.size=64 probe.seconds=1";
const SEND_1514: &str = "probe.mode=net_tx probe.size=1514 probe.seconds=1";
const SEND_64K: &str = "probe.mode=net_tx probe.size=64000 probe.seconds=1";
// The host says when it is over.
const RECEIVE: &str = "probe.mode=net_rx probe.count=1000000000";
const ECHO: &str = "probe.mode=net_echo probe.count=1000000000";

const fn load(
    arguments: &'static str,
    figures: &'static [&'static str; 2],
    host: Host,
    in_mib: bool,
) -> Load {
    Load {
        arguments,
        figures,
        host,
        in_mib,
    }
}

#[rustfmt::skip]
const LOADS: [Load; 8] = [
    load(SEND_64, &["net.send-64", "net.send-64-cpu"], Host::Drops, false),
    load(SEND_1514, &["net.send-1514", "net.send-1514-cpu"], Host::Drops, false),
    load(SEND_64K, &["net.send-64k", "net.send-64k-cpu"], Host::Drops, true),
    load(RECEIVE, &["net.receive-64", "net.receive-64-cpu"], Host::Floods(64), false),
    load(RECEIVE, &["net.receive-1514", "net.receive-1514-cpu"], Host::Floods(1514), false),
    load(RECEIVE, &["net.receive-64k", "net.receive-64k-cpu"], Host::Floods(64_000), true),
    load(ECHO, &["net.echo-1", "net.echo-1-cpu"], Host::Plays(1), false),
    load(ECHO, &["net.echo-32", "net.echo-32-cpu"], Host::Plays(32), false),
];

/// How long the host floods or plays.
const TIME: Duration = Duration::from_secs(1);
/// Frames that are made ready together.
const BATCH: usize = 64;
/// How long the host waits for room: a small part of the time in which a full tap (500 frames) is read empty.
const PAUSE: Duration = Duration::from_micros(100);
/// How long a full tap may stay full.
const PATIENCE: Duration = Duration::from_secs(5);

/// Nobody's hardware address, so that the host's kernel drops what is sent there.
const NOBODY: &str = "02:00:00:00:00:99";

/// One case for each load and VMM.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    for_each_load(context, &LOADS, |load| load.figures, run)
}

fn run(context: &Context, side: &Side, load: &Load) -> Result<Vec<Reading>, Failure> {
    let names = context.taps(1)?;
    let tap = names.first().map(String::as_str).unwrap_or_default();
    let arguments = format!("{} probe.peer_mac={NOBODY}", load.arguments);
    let before = frames_from_guest(tap)?;
    let run = probe::run(
        context,
        side,
        &arguments,
        |machine| {
            machine.taps.push(tap.to_owned());
            Ok(())
        },
        |running| match load.host {
            Host::Drops => Ok(()),
            Host::Floods(size) => {
                running.says(READY, "the guest's readiness")?;
                flood(&wire(tap)?, running, size)
            }
            Host::Plays(depth) => {
                running.says(READY, "the guest's readiness")?;
                play(&wire(tap)?, running, depth)
            }
        },
    )?;
    let came = frames_from_guest(tap)?.saturating_sub(before);
    if matches!(load.host, Host::Drops) && came < run.told.ops {
        let reason = format!("of {} frames {came} came to the tap", run.told.ops);
        return Err(Failure::because(reason));
    }
    if run.told.lost > 0 {
        let reason = format!("{} frames were lost", run.told.lost);
        return Err(Failure::because(reason));
    }
    let [rate, processor] = *load.figures;
    let value = match load.in_mib {
        true => run.mib_per_second()?,
        false => run.rate()?,
    };
    Ok(vec![
        Reading {
            figure: rate,
            value,
        },
        Reading {
            figure: processor,
            value: run.first_thread_per_operation(),
        },
    ])
}

fn wire(tap: &str) -> Result<Wire, Failure> {
    Wire::on(tap).map_err(|error| Failure::NotOffered(format!("a packet socket on {tap}: {error}")))
}

/// What the guest says when frames may come.
const READY: &[u8] = b"\"ready\":1";

/// Frames that the tap has had from its VMM.
fn frames_from_guest(tap: &str) -> Result<u64, Failure> {
    let path = format!("/sys/class/net/{tap}/statistics/rx_packets");
    let text = std::fs::read_to_string(&path)
        .map_err(|error| Failure::because(format!("{path}: {error}")))?;
    let count = text.trim().parse();
    count.map_err(|error| Failure::because(format!("{path}: {error}")))
}

/// Bytes before the payload of an unfragmented UDP datagram: Ethernet, IPv4, UDP.
const HEADERS: usize = 14 + 20 + 8;
/// The first eight bytes of a payload are its number; this one ends the run.
const END: u64 = u64::MAX;

/// A UDP datagram to the guest's port 5000 in a frame of `size` bytes. The guest checks no sums.
fn frame(size: usize) -> Vec<u8> {
    let mut frame = vec![0; size];
    let length = |from: usize| (size.saturating_sub(from) as u16).to_be_bytes();
    let (ip, udp) = (length(14), length(34));
    #[rustfmt::skip]
    let headers: [u8; HEADERS] = [
        2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x08, 0x00,
        0x45, 0, ip[0], ip[1], 0, 0, 0, 0, 64, 17, 0, 0, 172, 30, 1, 1, 172, 30, 1, 2,
        0x13, 0x89, 0x13, 0x88, udp[0], udp[1], 0, 0,
    ];
    frame.splice(..HEADERS, headers);
    frame
}

fn set_number(frame: &mut [u8], number: u64) {
    if let Some(place) = frame.get_mut(HEADERS..HEADERS + 8) {
        place.copy_from_slice(&number.to_le_bytes());
    }
}

fn number(frame: &[u8]) -> Option<u64> {
    let bytes = frame.get(HEADERS..HEADERS + 8)?;
    bytes.try_into().ok().map(u64::from_le_bytes)
}

/// Sends all of `frames`, waiting for room.
fn send_all(wire: &Wire, running: &Running, frames: &[Vec<u8>]) -> Result<(), Failure> {
    let mut rest = frames;
    let deadline = Instant::now() + PATIENCE;
    while !rest.is_empty() {
        let taken = wire.send(rest)?;
        rest = rest.get(taken..).unwrap_or_default();
        if !rest.is_empty() {
            interrupt::sleep(PAUSE)?;
        }
        if Instant::now() > deadline {
            return Err(running.failure("timeout: nobody takes frames from the tap"));
        }
    }
    Ok(())
}

fn flood(wire: &Wire, running: &Running, size: usize) -> Result<(), Failure> {
    let mut frames = vec![frame(size); BATCH];
    let mut next = 0;
    let deadline = Instant::now() + TIME;
    while Instant::now() < deadline {
        for frame in &mut frames {
            set_number(frame, next);
            next += 1;
        }
        send_all(wire, running, &frames)?;
    }
    end(wire, running)
}

fn end(wire: &Wire, running: &Running) -> Result<(), Failure> {
    let mut last = frame(64);
    set_number(&mut last, END);
    send_all(wire, running, &[last])
}

/// Waits for a guest that sends frames back, and sends it frames for a second, 32 at a time.
pub fn play_32(tap: &str, running: &mut Running) -> Result<(), Failure> {
    running.says(READY, "the guest's readiness")?;
    play(&wire(tap)?, running, 32)
}

fn play(wire: &Wire, running: &Running, depth: u64) -> Result<(), Failure> {
    let mut frames = Vec::new();
    for number in 0..depth {
        let mut one = frame(64);
        set_number(&mut one, number);
        frames.push(one);
    }
    send_all(wire, running, &frames)?;
    let mut buffer = vec![0; 2048];
    let mut next = depth;
    let mut back = 0;
    let deadline = Instant::now() + TIME;
    while back < next {
        running.readable(wire.as_fd(), "a frame that comes back")?;
        let mut answers = Vec::new();
        while let Some(came) = wire.receive(&mut buffer)? {
            if number(came) != Some(back) {
                let reason = format!("another frame came back than number {back}");
                return Err(running.failure(reason));
            }
            back += 1;
            if Instant::now() < deadline {
                let mut one = frame(64);
                set_number(&mut one, next);
                next += 1;
                answers.push(one);
            }
        }
        send_all(wire, running, &answers)?;
    }
    end(wire, running)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_has_its_lengths_and_its_number() {
        let mut frame = frame(1514);
        set_number(&mut frame, 7);
        assert_eq!((frame.len(), number(&frame)), (1514, Some(7)));
        assert_eq!(frame[16..18], 1500_u16.to_be_bytes());
        assert_eq!(frame[38..40], 1480_u16.to_be_bytes());
        assert_eq!(frame[36..38], 5000_u16.to_be_bytes());
    }

    #[test]
    fn loads_give_the_figures_of_the_list() {
        let given: Vec<&str> = LOADS.iter().flat_map(|load| *load.figures).collect();
        let listed: Vec<&str> = FIGURES.iter().map(|figure| figure.id).collect();
        assert_eq!(given, listed);
    }
}
