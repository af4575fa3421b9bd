//! A small blocking client, for this project's own tools and tests.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use httparse::Status;

/// Largest reply taken, in bytes.
const MAX_REPLY: usize = 16 << 20;
const MAX_HEADERS: usize = 64;

/// Why a request got no reply.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection failed.
    #[error("API connection: {0}")]
    Io(#[from] io::Error),
    /// The server closed the connection before the reply was whole.
    #[error("the server closed the connection before its reply was complete")]
    Closed,
    /// The reply is not HTTP.
    #[error("the reply is no HTTP: {0}")]
    Syntax(#[from] httparse::Error),
    /// The reply announces no usable length.
    #[error("the reply has an invalid Content-Length: {0:?}")]
    ContentLength(String),
    /// The reply is larger than this client takes.
    #[error("the reply is larger than {MAX_REPLY} bytes")]
    TooLarge,
    /// The body is not UTF-8.
    #[error("the reply's body is no UTF-8 text")]
    NotText,
}

/// A connection to an API socket, used for one request after another.
pub struct Client {
    stream: UnixStream,
    /// Received, not yet returned.
    input: Vec<u8>,
}

impl Client {
    /// Connects to the socket at `path`.
    pub fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        UnixStream::connect(path).map(Self::from_stream)
    }

    /// Speaks over a stream that is connected already.
    pub fn from_stream(stream: UnixStream) -> Self {
        Self {
            stream,
            input: Vec::new(),
        }
    }

    /// Bounds how long each read and write may take. `None` waits for ever, as a new client does.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)?;
        self.stream.set_write_timeout(timeout)
    }

    /// Sends a GET request. Returns the status and the body.
    pub fn get(&mut self, path: &str) -> Result<(u16, String), ClientError> {
        self.request("GET", path, "")
    }

    /// Sends a PUT request. Returns the status and the body.
    pub fn put(&mut self, path: &str, json: &str) -> Result<(u16, String), ClientError> {
        self.request("PUT", path, json)
    }

    /// Sends a PATCH request. Returns the status and the body.
    pub fn patch(&mut self, path: &str, json: &str) -> Result<(u16, String), ClientError> {
        self.request("PATCH", path, json)
    }

    /// Sends a request, with a body unless it is empty. Returns the status and the body.
    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        body: &str,
    ) -> Result<(u16, String), ClientError> {
        self.send(method, path, body)?;
        self.reply()
    }

    /// Sends a request, with a body unless it is empty. Its reply is to be waited for: [`Client::reply`].
    pub fn send(&mut self, method: &str, path: &str, body: &str) -> io::Result<()> {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
        if !body.is_empty() {
            request.push_str("Content-Type: application/json\r\n");
            request.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        request.push_str("\r\n");
        request.push_str(body);
        self.stream.write_all(request.as_bytes())
    }

    /// Waits for the next reply, passing over interim ones. Returns the status and the body.
    pub fn reply(&mut self) -> Result<(u16, String), ClientError> {
        let mut chunk = [0; 4096];
        loop {
            if let Some((status, start, end)) = parse_reply(&self.input)? {
                let body = self.input.get(start..end).map(<[u8]>::to_vec);
                if let Some(body) = body {
                    self.input.drain(..end);
                    if status >= 200 {
                        let body = String::from_utf8(body).map_err(|_| ClientError::NotText)?;
                        return Ok((status, body));
                    }
                    continue;
                }
            }
            if self.input.len() > MAX_REPLY {
                return Err(ClientError::TooLarge);
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ClientError::Closed),
                Ok(length) => self
                    .input
                    .extend_from_slice(chunk.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Status of the reply at the start of `input` and where its body lies, once its head is complete.
fn parse_reply(input: &[u8]) -> Result<Option<(u16, usize, usize)>, ClientError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut reply = httparse::Response::new(&mut headers);
    let Status::Complete(start) = reply.parse(input)? else {
        return Ok(None);
    };
    let mut length = 0;
    for header in reply.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let text = String::from_utf8_lossy(header.value);
            length = text
                .trim()
                .parse()
                .map_err(|_| ClientError::ContentLength(text.into_owned()))?;
        }
    }
    if length > MAX_REPLY {
        return Err(ClientError::TooLarge);
    }
    Ok(Some((
        reply.code.unwrap_or_default(),
        start,
        start.saturating_add(length),
    )))
}
