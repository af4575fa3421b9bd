//! One client: its bounded buffers, and what to wait for next.

use std::io::{self, ErrorKind, IoSlice, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use vmm_sys_util::epoll::EventSet;

use super::parse::{Head, MAX_HEAD, ParseError, parse_head};
use super::render::{self, Framing};
use crate::action::{Action, Fault, Reply};
use crate::route::route;

/// Once this many bytes of replies wait for a client to read them, it is served no further until it does.
const OUTPUT_HIGH_WATER: usize = 64 << 10;
/// How much of a refused client's input is read and thrown away, so that its writes do not fail before it reads the
/// reply.
const DISCARD_LIMIT: usize = 1 << 20;

/// Whether the server goes on with a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Keep,
    Drop,
}

pub(super) struct Connection {
    pub stream: UnixStream,
    /// What the epoll instance watches for.
    pub interest: EventSet,
    /// The client sends nothing more.
    at_end: bool,
    /// Set once no further request is served: how many more bytes of the client's input are thrown away.
    discard: Option<usize>,
    /// Received, not yet served.
    input: Vec<u8>,
    /// Length `input` needs before it is worth parsing again.
    needed: usize,
    /// Whether the request at the start of `input` was told to go on.
    continued: bool,
    /// Replies, of which `written` bytes are with the kernel.
    output: Vec<u8>,
    written: usize,
}

impl Connection {
    /// `stream` must be non-blocking.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            interest: EventSet::IN,
            at_end: false,
            discard: None,
            input: Vec::new(),
            needed: 0,
            continued: false,
            output: Vec::new(),
            written: 0,
        }
    }

    /// A client that gets this fault and nothing else.
    pub fn refused(stream: UnixStream, fault: Fault) -> Self {
        let mut connection = Self::new(stream);
        connection.close_with(fault);
        connection.interest = connection.wanted();
        connection
    }

    /// Does what `events` allow: one read, the requests that are then complete, and the writes the socket takes.
    pub fn turn(
        &mut self,
        events: EventSet,
        scratch: &mut [u8],
        max_payload: usize,
        handler: &mut impl FnMut(Action) -> Result<Reply, Fault>,
    ) -> Verdict {
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if gone && !events.contains(EventSet::IN) {
            return Verdict::Drop;
        }
        if events.contains(EventSet::IN) && self.receive(scratch) == Verdict::Drop {
            return Verdict::Drop;
        }
        loop {
            let held_back = self.serve(max_payload, handler);
            if self.send().is_err() {
                return Verdict::Drop;
            }
            if !held_back || self.unsent() > 0 {
                break;
            }
        }
        if self.unsent() == 0 {
            if self.at_end {
                return Verdict::Drop;
            }
            if self.discard.is_some() {
                // Tells a client that waits for the end of the reply; a failure shows at the next read.
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
        Verdict::Keep
    }

    /// What to watch for from now on. Hang-up and errors are always watched.
    pub fn wanted(&self) -> EventSet {
        let mut wanted = EventSet::empty();
        let reads = self.discard.is_some() || self.unsent() < OUTPUT_HIGH_WATER;
        if reads && !self.at_end {
            wanted |= EventSet::IN;
        }
        if self.unsent() > 0 {
            wanted |= EventSet::OUT;
        }
        wanted
    }

    fn unsent(&self) -> usize {
        self.output.len().saturating_sub(self.written)
    }

    fn receive(&mut self, scratch: &mut [u8]) -> Verdict {
        let received = match self.stream.read(scratch) {
            Ok(0) => {
                self.at_end = true;
                return Verdict::Keep;
            }
            Ok(length) => scratch.get(..length).unwrap_or_default(),
            Err(error) if is_transient(&error) => return Verdict::Keep,
            Err(_) => return Verdict::Drop,
        };
        match &mut self.discard {
            None => self.input.extend_from_slice(received),
            Some(left) => match left.checked_sub(received.len()) {
                Some(less) => *left = less,
                None => return Verdict::Drop,
            },
        }
        Verdict::Keep
    }

    /// Serves every complete request in `input`. Returns whether it stopped early because too much output waits.
    fn serve(
        &mut self,
        max_payload: usize,
        handler: &mut impl FnMut(Action) -> Result<Reply, Fault>,
    ) -> bool {
        let input = std::mem::take(&mut self.input);
        let mut rest = input.as_slice();
        let mut held_back = false;
        while self.discard.is_none() && !rest.is_empty() && rest.len() >= self.needed {
            if self.unsent() >= OUTPUT_HIGH_WATER {
                held_back = true;
                break;
            }
            match parse_head(rest, max_payload) {
                Ok(None) => {
                    self.needed = rest.len().saturating_add(1);
                }
                Ok(Some(head)) => match rest.split_at_checked(head.total) {
                    Some((request, after)) => {
                        self.needed = 0;
                        self.continued = false;
                        let body = request.get(head.length..).unwrap_or_default();
                        self.answer(&head, body, handler);
                        rest = after;
                    }
                    None => self.await_body(&head),
                },
                Err(error) => self.refuse(&error),
            }
        }
        if self.discard.is_some() {
            rest = &[];
        }
        self.keep(input.len() - rest.len(), input);
        held_back
    }

    /// Puts back what of `input` follows the first `served` bytes.
    fn keep(&mut self, served: usize, mut input: Vec<u8>) {
        input.drain(..served);
        // A connection that idles after a large request does not hold on to its memory.
        if input.is_empty() && input.capacity() > MAX_HEAD {
            input = Vec::new();
        }
        self.input = input;
    }

    fn answer(
        &mut self,
        head: &Head<'_>,
        body: &[u8],
        handler: &mut impl FnMut(Action) -> Result<Reply, Fault>,
    ) {
        log::info!("API request: {} {:?}", head.method, head.target);
        let mut deprecated = false;
        let outcome = route(head.method, head.target, body).and_then(|action| {
            if let Some(field) = action.deprecated_field() {
                log::warn!(
                    "{} {}: {field} field is deprecated.",
                    head.method,
                    head.target
                );
                deprecated = true;
            }
            handler(action)
        });
        if let Err(fault) = &outcome {
            log::error!("API fault {}: {:?}", fault.status, fault.message);
        }
        let framing = Framing {
            keep_alive: head.keep_alive,
            deprecated,
            head_only: head.method == "HEAD",
        };
        render::reply(&mut self.output, &outcome, framing);
        if !head.keep_alive {
            self.discard = Some(DISCARD_LIMIT);
        }
    }

    fn await_body(&mut self, head: &Head<'_>) {
        self.needed = head.total;
        if head.expects_continue && !self.continued {
            self.continued = true;
            self.output.extend_from_slice(render::CONTINUE);
        }
    }

    fn refuse(&mut self, error: &ParseError) {
        log::error!("API request refused: {error}");
        self.close_with(Fault::bad_request(error.to_string()));
    }

    fn close_with(&mut self, fault: Fault) {
        let framing = Framing {
            keep_alive: false,
            deprecated: false,
            head_only: false,
        };
        render::reply(&mut self.output, &Err(fault), framing);
        self.discard = Some(DISCARD_LIMIT);
    }

    /// Hands the kernel as much of the output as it takes.
    fn send(&mut self) -> io::Result<()> {
        while let Some(unsent) = self
            .output
            .get(self.written..)
            .filter(|left| !left.is_empty())
        {
            // sendmsg(2), which the event loop's thread needs in any case: a call less that a filter has to allow.
            let sent = rustix::net::sendmsg(
                &self.stream,
                &[IoSlice::new(unsent)],
                &mut SendAncillaryBuffer::default(),
                SendFlags::NOSIGNAL,
            );
            match sent {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(length) => self.written = self.written.saturating_add(length),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        self.written = 0;
        if self.output.capacity() > OUTPUT_HIGH_WATER {
            self.output = Vec::new();
        } else {
            self.output.clear();
        }
        Ok(())
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
