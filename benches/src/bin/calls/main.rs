//! The system calls of a device under load, in one thread that does nothing else: no machine, no queue, no notification.
//!
//! What a VMM adds to this is its own; what this lacks, no VMM that makes the same calls can have. `lepton-calls LINE DEVICE
//! ENGINE`, where LINE is the probe guest's command line: a load is written down once.
#![allow(unsafe_code)] // handing buffers to io_uring

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types::Fixed};
use lepton_benches::pages::Pages;
use lepton_hostio::tap::{Offloads, Tap, VNET_HEADER_LEN};
use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::VolatileSlice;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// How long a load lasts that nobody else ends.
const TIME: Duration = Duration::from_secs(1);
/// The number of the frame after which no more come.
const END: u64 = u64::MAX;
/// Bytes of Ethernet, IPv4 and UDP before a frame's number.
const UDP: usize = 42;

/// The words of the probe guest's command line.
struct Words<'a>(&'a str);

impl<'a> Words<'a> {
    fn text(&self, name: &str) -> Option<&'a str> {
        self.0
            .split(' ')
            .filter_map(|word| word.strip_prefix("probe.")?.split_once('='))
            .find_map(|(found, value)| (found == name).then_some(value))
    }

    fn number<N: FromStr>(&self, name: &str, default: N) -> Outcome<N> {
        match self.text(name) {
            Some(text) => text
                .parse()
                .map_err(|_| format!("probe.{name}={text} is no number").into()),
            None => Ok(default),
        }
    }
}

/// What was done, and since when.
struct Tally {
    since: Instant,
    ops: u64,
    bytes: u64,
}

impl Tally {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            ops: 0,
            bytes: 0,
        }
    }

    fn add(&mut self, bytes: usize) {
        self.ops += 1;
        self.bytes += bytes as u64;
    }

    /// Whether there is time left. The clock is asked every 16 operations, as it is not what is measured.
    fn goes_on(&self) -> bool {
        !self.ops.is_multiple_of(16) || self.since.elapsed() < TIME
    }

    /// Says it as the probe guest does.
    fn say(&self, khz: u64) {
        let ticks = self.since.elapsed().as_nanos() * u128::from(khz) / 1_000_000;
        let (ops, bytes) = (self.ops, self.bytes);
        println!(
            "PROBE {{\"ops\":{ops},\"bytes\":{bytes},\"errors\":0,\"ticks\":{ticks},\"p50\":0}}"
        );
    }
}

/// Makes the calls of the load that `line` names, on `device`: a drive's image, a tap, a vsock's Unix socket.
fn run(line: &str, device: &str, engine: &str) -> Outcome<()> {
    let words = Words(line);
    let size: usize = words.number("size", 4096)?;
    let mode = words.text("mode").unwrap_or_default();
    let tally = match mode {
        "blk_read" | "blk_write" | "blk_flush" => drive(&words, mode, size, device, engine)?,
        "net_tx" => send_frames(device, size)?,
        "net_rx" => take_frames(device, false)?,
        "net_echo" => take_frames(device, true)?,
        "vsock_tx" | "vsock_rx" => stream(&words, mode == "vsock_tx", size, device)?,
        _ => return Err(format!("there are no calls of {mode:?}").into()),
    };
    tally.say(words.number("tsc_khz", 1_000_000)?);
    Ok(())
}

/// Where in the image the next request is.
struct Places {
    count: u64,
    next: u64,
    random: Option<fastrand::Rng>,
    size: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        let place = match &mut self.random {
            Some(random) => random.u64(0..self.count),
            None => {
                self.next = (self.next + 1) % self.count;
                self.next
            }
        };
        place * self.size
    }
}

fn drive(words: &Words<'_>, mode: &str, size: usize, path: &str, engine: &str) -> Outcome<Tally> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut places = Places {
        count: (file.metadata()?.len() / size as u64).max(1),
        next: 0,
        random: (words.text("pattern") == Some("random")).then(|| fastrand::Rng::with_seed(1)),
        size: size as u64,
    };
    if engine == "async" {
        return ring(
            &file,
            &mut places,
            mode == "blk_write",
            words.number("qd", 1)?,
            size,
        );
    }
    let mut buffer = Pages::new(size);
    let buffer = buffer.bytes();
    let mut tally = Tally::new();
    while tally.goes_on() {
        let place = places.next();
        match mode {
            "blk_read" => file.read_exact_at(buffer, place)?,
            _ => file.write_all_at(buffer, place)?,
        }
        if mode == "blk_flush" {
            file.sync_data()?;
        }
        tally.add(size);
    }
    Ok(tally)
}

/// The same by io_uring, `depth` requests at a time, with a registered file and registered buffers.
fn ring(file: &File, places: &mut Places, write: bool, depth: u32, size: usize) -> Outcome<Tally> {
    // The buffers outlive the ring, which is dropped first.
    let mut buffers: Vec<Pages> = (0..depth).map(|_| Pages::new(size)).collect();
    let pointers: Vec<*mut u8> = buffers
        .iter_mut()
        .map(|buffer| buffer.bytes().as_mut_ptr())
        .collect();
    let mut ring = IoUring::new(depth.next_power_of_two())?;
    ring.submitter().register_files(&[file.as_raw_fd()])?;
    let slices: Vec<libc::iovec> = pointers
        .iter()
        .map(|pointer| libc::iovec {
            iov_base: pointer.cast(),
            iov_len: size,
        })
        .collect();
    // SAFETY: each buffer is as long as it says, is not moved, and lives until the ring is gone.
    unsafe { ring.submitter().register_buffers(&slices)? };
    let mut tally = Tally::new();
    let mut free: Vec<usize> = (0..pointers.len()).collect();
    let mut is_over = false;
    while !is_over || free.len() < pointers.len() {
        while let Some(index) = free.pop_if(|_| !is_over) {
            let pointer = pointers.get(index).copied().unwrap_or_default();
            let (number, length) = (u16::try_from(index)?, u32::try_from(size)?);
            let entry = match write {
                false => opcode::ReadFixed::new(Fixed(0), pointer, length, number)
                    .offset(places.next())
                    .build(),
                true => opcode::WriteFixed::new(Fixed(0), pointer, length, number)
                    .offset(places.next())
                    .build(),
            };
            // SAFETY: the buffer of this number is free, and lives until the ring is gone.
            unsafe { ring.submission().push(&entry.user_data(index as u64))? };
        }
        ring.submit_and_wait(1)?;
        for done in ring.completion() {
            if usize::try_from(done.result()) != Ok(size) {
                return Err(format!("a request ended with {}", done.result()).into());
            }
            free.push(usize::try_from(done.user_data())?);
            tally.add(size);
            is_over |= !tally.goes_on();
        }
    }
    Ok(tally)
}

/// What an adapter writes before a frame that is to be cut into segments (VIRTIO 1.3, section 5.1.6): checksum missing,
/// TCP over IPv4, 54 bytes of headers, 1448 of payload, the sum from 34 on at 16.
const CUT: [u8; VNET_HEADER_LEN] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];

/// A frame for nobody's station, so that the host's kernel drops it.
fn frame(size: usize) -> Vec<u8> {
    let is_cut = size > 1514;
    let ip = (size - 14) as u16;
    let [high, low] = ip.to_be_bytes();
    let protocol = if is_cut { 6 } else { 17 };
    #[rustfmt::skip]
    let headers = [
        2, 0, 0, 0, 0, 0x99, 2, 0, 0, 0, 0, 2, 0x08, 0,
        0x45, 0, high, low, 0, 0, 0, 0, 64, protocol, 0, 0, 172, 30, 1, 2, 172, 30, 1, 1,
        0x13, 0x88, 0x13, 0x89,
    ];
    let mut frame = vec![0; size];
    frame.splice(..headers.len(), headers);
    if is_cut && let Some(offset) = frame.get_mut(46) {
        // TCP's header has five words.
        *offset = 0x50;
    }
    frame
}

fn send_frames(tap: &str, size: usize) -> Outcome<Tally> {
    let mut tap = Tap::open(tap)?;
    let mut frame = frame(size.max(UDP + 8));
    let header = if size > 1514 {
        CUT
    } else {
        [0; VNET_HEADER_LEN]
    };
    let length = frame.len();
    let mut tally = Tally::new();
    while tally.goes_on() {
        tap.write_frame(&header, &[VolatileSlice::from(frame.as_mut_slice())])?;
        tally.add(length);
    }
    Ok(tally)
}

/// Takes frames until the last one, and sends each back if asked to.
fn take_frames(tap: &str, back: bool) -> Outcome<Tally> {
    let mut tap = Tap::open(tap)?;
    tap.set_offloads(Offloads::ALL)?;
    println!("PROBE {{\"ready\":1}}");
    let mut buffer = vec![0; VNET_HEADER_LEN + 65_535];
    let mut tally = None;
    loop {
        let length = match tap.read_frame(&[], &mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(&tap, PollFlags::IN)], None)?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let Some(frame) = buffer.get_mut(VNET_HEADER_LEN..length) else {
            continue;
        };
        let number = frame
            .get(UDP..UDP + 8)
            .and_then(|bytes| bytes.try_into().ok());
        match (frame.get(12..14), number.map(u64::from_le_bytes)) {
            (Some([8, 0]), Some(END)) => return Ok(tally.unwrap_or_else(Tally::new)),
            (Some([8, 0]), Some(_)) => {}
            // The host's own, as IPv6 neighbours'.
            _ => continue,
        }
        let length = frame.len();
        if back {
            tap.write_frame(&[0; VNET_HEADER_LEN], &[VolatileSlice::from(frame)])?;
        }
        tally.get_or_insert_with(Tally::new).add(length);
    }
}

/// Streams over as many connections to the socket behind the vsock at `path` where the port's listener is.
fn stream(words: &Words<'_>, sends: bool, size: usize, path: &str) -> Outcome<Tally> {
    let port: u32 = words.number("port", 5000)?;
    let mut streams = Vec::new();
    for _ in 0..words.number("connections", 1)? {
        let stream = UnixStream::connect(format!("{path}_{port}"))?;
        stream.set_nonblocking(true)?;
        streams.push(stream);
    }
    // As much at once as the guest's packets have, or as the other end writes.
    let mut buffer = Pages::new(size.max(1 << 16));
    let buffer = buffer.bytes();
    let ready_for = if sends { PollFlags::OUT } else { PollFlags::IN };
    let mut tally = Tally::new();
    loop {
        let mut is_idle = true;
        for stream in &mut streams {
            let moved = match sends {
                true => stream.write(buffer),
                false => stream.read(buffer),
            };
            match moved {
                Ok(count) => {
                    tally.add(count);
                    is_idle = false;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if !tally.goes_on() {
                return Ok(tally);
            }
        }
        if is_idle {
            let mut fds: Vec<PollFd<'_>> = streams
                .iter()
                .map(|stream| PollFd::new(stream, ready_for))
                .collect();
            poll(&mut fds, None)?;
        }
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [line, device, engine] = words.as_slice() else {
        eprintln!("usage: lepton-calls LINE IMAGE|TAP|SOCKET sync|async");
        return ExitCode::FAILURE;
    };
    match run(line, device, engine) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lepton-calls: {error}");
            ExitCode::FAILURE
        }
    }
}
