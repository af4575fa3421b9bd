//! From the VMM's vsock socket to a connection with the agent.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The longest answer of the VMM accepted, in bytes: `OK 4294967295` and a newline.
const MAX_ANSWER: usize = 14;

/// How long the VMM and the guest's kernel may take to connect.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no connection with the agent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot connect to {path:?}: {source}")]
    Socket { path: PathBuf, source: io::Error },
    #[error(
        "{path:?} closed or broke the connection to port {port}: nothing listens there in the guest \
         ({source})"
    )]
    Refused {
        path: PathBuf,
        port: u32,
        source: io::Error,
    },
    #[error("{path:?} answered {answer:?} where \"OK <port>\" was expected: not a VMM's vsock?")]
    Answer { path: PathBuf, answer: String },
    #[error("cannot set up the RPC connection: {0}")]
    Setup(String),
}

/// Connects to `port` in the guest through the VMM's vsock socket at `uds_path`, by the protocol
/// of Firecracker's vsock: `CONNECT <port>\n` is answered by `OK <host port>\n`.
///
/// # Errors
/// See [`ConnectError`].
pub fn connect_vsock(uds_path: &Path, port: u32) -> Result<UnixStream, ConnectError> {
    let path = || uds_path.to_owned();
    let stream = UnixStream::connect(uds_path).map_err(|source| ConnectError::Socket {
        path: path(),
        source,
    })?;
    let answer = handshake(&stream, port).map_err(|source| ConnectError::Refused {
        path: path(),
        port,
        source,
    })?;
    // Only a whole line is an answer: digits that were cut off would pass for another port.
    let local_port = answer
        .strip_prefix(b"OK ")
        .and_then(|rest| rest.strip_suffix(b"\n"))
        .unwrap_or_default();
    if local_port.is_empty() || !local_port.iter().all(u8::is_ascii_digit) {
        return Err(ConnectError::Answer {
            path: path(),
            answer: String::from_utf8_lossy(&answer).into_owned(),
        });
    }
    Ok(stream)
}

/// The answer's first line with its newline, or as much of it as is allowed.
fn handshake(mut stream: &UnixStream, port: u32) -> io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    // One byte at a time: what follows the line belongs to the agent's own conversation.
    let mut line = Vec::with_capacity(MAX_ANSWER);
    let mut byte = [0];
    while line.len() < MAX_ANSWER && byte != *b"\n" {
        stream.read_exact(&mut byte)?;
        line.extend(byte);
    }
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A VMM that reads the request and answers `answer`.
    fn with_vmm(answer: &'static [u8]) -> (Result<UnixStream, ConnectError>, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let vmm = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; b"CONNECT 1024\n".len()];
            stream.read_exact(&mut request).unwrap();
            stream.write_all(answer).unwrap();
            request
        });
        let result = connect_vsock(&path, 1024);
        (result, vmm.join().unwrap())
    }

    #[test]
    fn the_agents_first_bytes_are_left_in_the_stream() {
        let (stream, request) = with_vmm(b"OK 1073741824\nhello");
        assert_eq!(request, b"CONNECT 1024\n");
        let mut rest = String::new();
        stream.unwrap().read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn a_closed_connection_is_a_refusal() {
        let (stream, _) = with_vmm(b"");
        assert!(matches!(
            stream,
            Err(ConnectError::Refused { port: 1024, .. })
        ));
    }

    #[test]
    fn other_answers_are_refused() {
        for answer in [
            &b"OK \n"[..],
            b"OK 1x\n",
            b"NO 1\n",
            b"\n",
            b"OK 11111111111111111111111111111111",
        ] {
            let (stream, _) = with_vmm(answer);
            assert!(
                matches!(stream, Err(ConnectError::Answer { .. })),
                "{answer:?}"
            );
        }
    }

    #[test]
    fn a_missing_socket_is_named() {
        let error = connect_vsock(Path::new("/nonexistent/v.sock"), 1).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/v.sock"));
    }
}
