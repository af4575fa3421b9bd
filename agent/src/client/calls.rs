//! Calls over a connection, by ttrpc's protocol.
//!
//! The crate's own client is not used: a call that is made just when the peer has ended its half waits for ever, and its
//! threads use the socket by a number that may be another connection's once the client was dropped.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use protobuf::{EnumOrUnknown, Message};
use ttrpc::Code;
use ttrpc::proto::{
    MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_RESPONSE, MessageHeader, Request,
    Response,
};

use super::{CallError, ConnectError, printable};

/// The service's full name in `proto/agent.proto`.
const SERVICE: &str = "lepton.agent.v1.Agent";

/// A connection on which calls can be made, from several threads at once. Clones share it; it ends with the last.
#[derive(Clone)]
pub struct Calls(Arc<Connection>);

struct Connection {
    stream: UnixStream,
    /// To the thread that writes: who calls must not be held up by a peer that does not read.
    frames: Sender<Vec<u8>>,
    state: Arc<Mutex<State>>,
}

/// One lock for both: a call is either known when the connection ends, or finds that it has.
struct State {
    /// Of the next call. A client's are odd.
    next_stream: u32,
    /// Who waits for an answer, by stream.
    waiting: HashMap<u32, Sender<Vec<u8>>>,
    /// Why there will be no more answers.
    end: Option<String>,
}

impl Calls {
    /// On `stream`, whose other end is the agent's.
    pub fn over(stream: UnixStream) -> Result<Self, ConnectError> {
        let state = Arc::new(Mutex::new(State {
            next_stream: 1,
            waiting: HashMap::new(),
            end: None,
        }));
        let (frames, to_write) = mpsc::channel();
        // First, so that its end, the connection's, ends the threads if one of them cannot be made.
        let connection = Connection {
            stream,
            frames,
            state,
        };
        connection
            .start(to_write)
            .map_err(|error| ConnectError::Setup(error.to_string()))?;
        Ok(Self(Arc::new(connection)))
    }

    /// Calls `method`, and waits for the answer: until the connection's end, or for `patience`.
    pub fn call<A: Message>(
        &self,
        method: &str,
        patience: Option<Duration>,
        request: &impl Message,
    ) -> Result<A, CallError> {
        let body = encoded(method, request)?;
        let length = u32::try_from(body.len())
            .ok()
            .filter(|_| body.len() <= MESSAGE_LENGTH_MAX)
            .ok_or_else(|| {
                CallError::Refused(format!("a request of {} bytes is too long", body.len()))
            })?;
        let (sender, answer) = mpsc::channel();
        let stream = {
            let mut state = self.0.state();
            if let Some(reason) = &state.end {
                return Err(CallError::Connection(reason.clone()));
            }
            let stream = state.next_stream;
            state.next_stream = stream.wrapping_add(2);
            state.waiting.insert(stream, sender);
            stream
        };
        let mut frame = Vec::from(MessageHeader::new_request(stream, length));
        frame.extend(body);
        // The thread ends after the connection, of whose end `answer` tells.
        let _ = self.0.frames.send(frame);
        let body = match patience {
            None => answer.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(patience) => answer.recv_timeout(patience),
        };
        let body = body.map_err(|error| {
            let mut state = self.0.state();
            state.waiting.remove(&stream);
            CallError::Connection(match error {
                RecvTimeoutError::Timeout => format!("no answer to {method} for {patience:?}"),
                RecvTimeoutError::Disconnected => state.end.clone().unwrap_or_default(),
            })
        })?;
        decoded(&body)
    }
}

impl Connection {
    fn start(&self, frames: Receiver<Vec<u8>>) -> io::Result<()> {
        let mut stream = self.stream.try_clone()?;
        thread::Builder::new()
            .name("agent-write".to_owned())
            .spawn(move || {
                if frames.iter().any(|frame| stream.write_all(&frame).is_err()) {
                    // What follows would be no frame: the connection ends for the reader, too.
                    let _ = stream.shutdown(Shutdown::Both);
                }
            })?;
        let stream = self.stream.try_clone()?;
        let state = Arc::clone(&self.state);
        thread::Builder::new()
            .name("agent-read".to_owned())
            .spawn(move || {
                let reason = answer_all(&stream, &state);
                let mut state = locked(&state);
                state.end = Some(reason);
                state.waiting.clear();
                let _ = stream.shutdown(Shutdown::Both);
            })?;
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Both threads see it and end, which closes the socket.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Nothing is done with the lock that could panic.
fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn encoded(method: &str, request: &impl Message) -> Result<Vec<u8>, CallError> {
    let unwritable = |_| CallError::Refused("a request that cannot be encoded".to_owned());
    let request = Request {
        service: SERVICE.to_owned(),
        method: method.to_owned(),
        payload: request.write_to_bytes().map_err(unwritable)?,
        ..Default::default()
    };
    request.write_to_bytes().map_err(unwritable)
}

fn decoded<A: Message>(body: &[u8]) -> Result<A, CallError> {
    let malformed = |_| CallError::Malformed("bytes that are no message");
    let response = Response::parse_from_bytes(body).map_err(malformed)?;
    if let Some(status) = response.status.as_ref()
        && status.code != EnumOrUnknown::new(Code::OK)
    {
        return Err(CallError::Refused(printable(&status.message)));
    }
    A::parse_from_bytes(&response.payload).map_err(malformed)
}

/// Hands out answers until the connection ends, and says why it did.
fn answer_all(mut stream: &UnixStream, state: &Mutex<State>) -> String {
    loop {
        match read_answer(&mut stream) {
            Ok((number, body)) => {
                // An answer that nobody waits for comes too late.
                if let Some(waiting) = locked(state).waiting.remove(&number) {
                    let _ = waiting.send(body);
                }
            }
            Err(error) => return error.to_string(),
        }
    }
}

/// The next frame's stream and body. Anything but an answer is an error.
fn read_answer(stream: &mut impl Read) -> io::Result<(u32, Vec<u8>)> {
    let invalid = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason);
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    stream.read_exact(&mut header)?;
    let header = MessageHeader::from(header);
    let length = header.length as usize;
    if length > MESSAGE_LENGTH_MAX {
        return Err(invalid("a message that is too long"));
    }
    if header.type_ != MESSAGE_TYPE_RESPONSE {
        return Err(invalid("a message that is no answer"));
    }
    // What has come is kept, not what was announced.
    let mut body = Vec::new();
    stream.take(header.length.into()).read_to_end(&mut body)?;
    match body.len() == length {
        true => Ok((header.stream_id, body)),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: u32, stream: u32, kind: u8, body: &[u8]) -> Vec<u8> {
        let mut frame = Vec::from(MessageHeader {
            length,
            stream_id: stream,
            type_: kind,
            flags: 0,
        });
        frame.extend(body);
        frame
    }

    #[test]
    fn answers_are_told_from_all_else() {
        let good = frame(2, 3, MESSAGE_TYPE_RESPONSE, b"ab");
        assert_eq!(read_answer(&mut &good[..]).unwrap(), (3, b"ab".to_vec()));
        let too_long = MESSAGE_LENGTH_MAX as u32 + 1;
        for (bytes, kind) in [
            (
                frame(too_long, 3, MESSAGE_TYPE_RESPONSE, b""),
                io::ErrorKind::InvalidData,
            ),
            (frame(2, 3, 1, b"ab"), io::ErrorKind::InvalidData),
            (good[..11].to_vec(), io::ErrorKind::UnexpectedEof),
            (good[..9].to_vec(), io::ErrorKind::UnexpectedEof),
        ] {
            assert_eq!(read_answer(&mut &bytes[..]).unwrap_err().kind(), kind);
        }
    }
}
