//! What a host's client says first: `CONNECT <port>\n`, in at most 32 bytes.
//!
//! The word may be in any case, as other implementations of this protocol have it. What follows the line belongs to
//! the connection already, so the socket is looked at before it is read.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, recv};

/// Longest line taken, with its newline.
pub const MAX_LINE: usize = 32;
/// Most clients that have not sent their line yet. The oldest makes room for one more: a client that means it sends
/// its line at once, and a person who types it gets all the time there is.
pub const MAX_WAITING: usize = 256;

/// What is known of a client's line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// Not all of it is there.
    Incomplete,
    /// It asks for the guest's `port` and is `len` bytes long with its newline.
    Connect {
        /// The guest's port.
        port: u32,
        /// Bytes of the line.
        len: usize,
    },
    /// It is not a line of this protocol, and never will be.
    Malformed,
}

impl Line {
    /// Looks at the first bytes a client sent. Port 2^32 - 1 means "any" and is not one to connect to.
    pub fn parse(bytes: &[u8]) -> Line {
        let Some(newline) = bytes.iter().take(MAX_LINE).position(|&b| b == b'\n') else {
            return if bytes.len() < MAX_LINE {
                Line::Incomplete
            } else {
                Line::Malformed
            };
        };
        let line = bytes.get(..newline).unwrap_or_default();
        let mut words = line
            .split(u8::is_ascii_whitespace)
            .filter(|w| !w.is_empty());
        let (Some(command), Some(port), None) = (words.next(), words.next(), words.next()) else {
            return Line::Malformed;
        };
        let digits = port.iter().all(u8::is_ascii_digit);
        let port = std::str::from_utf8(port)
            .ok()
            .and_then(|p| p.parse::<u32>().ok());
        match port {
            Some(port)
                if digits && port != u32::MAX && command.eq_ignore_ascii_case(b"connect") =>
            {
                Line::Connect {
                    port,
                    len: newline + 1,
                }
            }
            _ => Line::Malformed,
        }
    }
}

/// Looks for a client's line, and takes it off the socket if it is whole. An end of file before it is an error.
pub fn take_line(stream: &UnixStream) -> io::Result<Line> {
    let mut bytes = [0; MAX_LINE];
    let seen = match recv(stream, &mut bytes, RecvFlags::PEEK) {
        Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok((_, seen)) => seen,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(Line::Incomplete),
        Err(error) => return Err(error.into()),
    };
    let line = Line::parse(bytes.get(..seen).unwrap_or_default());
    if let Line::Connect { len, .. } = line {
        // The bytes are there, so all of them are taken.
        recv(
            stream,
            bytes.get_mut(..len).unwrap_or_default(),
            RecvFlags::empty(),
        )?;
    }
    Ok(line)
}

/// Clients whose line has not come yet, by age.
#[derive(Debug, Default)]
pub struct Waiting {
    streams: BTreeMap<u32, UnixStream>,
    next: u32,
}

impl Waiting {
    /// The number the next client will get.
    pub fn next_id(&self) -> u32 {
        self.next
    }

    /// Keeps a client under [`Waiting::next_id`].
    pub fn push(&mut self, stream: UnixStream) {
        if self.streams.len() >= MAX_WAITING {
            self.streams.pop_first();
        }
        self.streams.insert(self.next, stream);
        // 2^32 - 1 is not a number to watch a client by.
        self.next = self.next.wrapping_add(1) % u32::MAX;
    }

    /// Looks for the line of client `id`. The client is gone from here when there is something to say.
    pub fn take(&mut self, id: u32) -> Option<(UnixStream, io::Result<Line>)> {
        let line = take_line(self.streams.get(&id)?);
        if matches!(line, Ok(Line::Incomplete)) {
            return None;
        }
        Some((self.streams.remove(&id)?, line))
    }

    /// Closes all.
    pub fn clear(&mut self) {
        self.streams.clear();
    }
}
