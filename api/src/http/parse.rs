//! Bytes to requests: pure, no state between calls.

use httparse::Status;

/// Longest request line and headers together, in bytes.
pub const MAX_HEAD: usize = 8192;
/// Most headers of a request.
pub const MAX_HEADERS: usize = 64;

/// A whole request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Method, as sent.
    pub method: &'a str,
    /// Request target, as sent.
    pub target: &'a str,
    /// Body; empty when there is none.
    pub body: &'a [u8],
    /// Whether the connection may carry another request after the reply.
    pub keep_alive: bool,
}

/// Bytes that are no request this server takes. The connection cannot be used after it: where the next request would
/// begin is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Not HTTP/1.0 or HTTP/1.1.
    #[error("Invalid HTTP request: {0}.")]
    Syntax(httparse::Error),
    /// More than [`MAX_HEAD`] bytes before the empty line.
    #[error("Request line and headers are larger than the limit of {MAX_HEAD} bytes.")]
    HeadTooLarge,
    /// Not a decimal number.
    #[error("Invalid Content-Length: {0:?}.")]
    ContentLength(String),
    /// A second one. Two lengths are how requests are smuggled past a proxy.
    #[error("More than one Content-Length.")]
    SecondContentLength,
    /// Only `Content-Length` bodies are taken.
    #[error("Unsupported Transfer-Encoding: {0:?}. Send the body with a Content-Length.")]
    TransferEncoding(String),
    /// A body past the limit the server was given.
    #[error(
        "Request payload with size {size} is larger than the limit of {limit} allowed by server."
    )]
    PayloadTooLarge {
        /// Its `Content-Length`.
        size: u64,
        /// The limit.
        limit: usize,
    },
}

/// Everything before the body.
pub(super) struct Head<'a> {
    pub method: &'a str,
    pub target: &'a str,
    /// Length of request line and headers, in bytes.
    pub length: usize,
    /// Length of head and body, in bytes.
    pub total: usize,
    pub keep_alive: bool,
    /// The client waits for a `100 Continue` before it sends the body.
    pub expects_continue: bool,
}

/// Reads the request at the start of `bytes`: `None` if it is not all there yet, otherwise the request and its length
/// in bytes. `max_payload` bounds the body, in bytes.
pub fn parse_request(
    bytes: &[u8],
    max_payload: usize,
) -> Result<Option<(Request<'_>, usize)>, ParseError> {
    let Some(head) = parse_head(bytes, max_payload)? else {
        return Ok(None);
    };
    let request = bytes.get(head.length..head.total).map(|body| Request {
        method: head.method,
        target: head.target,
        body,
        keep_alive: head.keep_alive,
    });
    Ok(request.map(|request| (request, head.total)))
}

/// Reads the head at the start of `bytes`, or `None` if it is not all there yet.
pub(super) fn parse_head(bytes: &[u8], max_payload: usize) -> Result<Option<Head<'_>>, ParseError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let window = bytes.get(..MAX_HEAD).unwrap_or(bytes);
    let length = match request.parse(window).map_err(ParseError::Syntax)? {
        Status::Complete(length) => length,
        Status::Partial if window.len() == MAX_HEAD => return Err(ParseError::HeadTooLarge),
        Status::Partial => return Ok(None),
    };
    // A complete head has all three; were it not so, there is no request to serve.
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version)
    else {
        return Err(ParseError::Syntax(httparse::Error::Status));
    };
    let fields = Fields::read(request.headers, minor == 1)?;
    let body = match usize::try_from(fields.content_length.unwrap_or(0)) {
        Ok(body) if body <= max_payload => body,
        _ => {
            return Err(ParseError::PayloadTooLarge {
                size: fields.content_length.unwrap_or(0),
                limit: max_payload,
            });
        }
    };
    Ok(Some(Head {
        method,
        target,
        length,
        total: length.saturating_add(body),
        keep_alive: fields.keep_alive,
        expects_continue: fields.expects_continue && minor == 1,
    }))
}

/// What the headers say about framing.
struct Fields {
    content_length: Option<u64>,
    keep_alive: bool,
    expects_continue: bool,
}

impl Fields {
    /// `persistent` is whether a connection of this HTTP version stays open unless told otherwise.
    fn read(headers: &[httparse::Header<'_>], persistent: bool) -> Result<Self, ParseError> {
        let mut fields = Self {
            content_length: None,
            keep_alive: persistent,
            expects_continue: false,
        };
        let mut close = false;
        for header in headers {
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            if is("content-length") {
                let length = content_length(header.value)?;
                if fields.content_length.replace(length).is_some() {
                    return Err(ParseError::SecondContentLength);
                }
            } else if is("transfer-encoding") && !token_is(header.value, "identity") {
                return Err(ParseError::TransferEncoding(lossy(header.value)));
            } else if is("expect") {
                fields.expects_continue = token_is(header.value, "100-continue");
            } else if is("connection") {
                for token in header.value.split(|byte| *byte == b',') {
                    close |= token_is(token, "close");
                    fields.keep_alive |= token_is(token, "keep-alive");
                }
            }
        }
        fields.keep_alive &= !close;
        Ok(fields)
    }
}

fn token_is(value: &[u8], token: &str) -> bool {
    value.trim_ascii().eq_ignore_ascii_case(token.as_bytes())
}

fn lossy(value: &[u8]) -> String {
    String::from_utf8_lossy(value).into_owned()
}

fn content_length(value: &[u8]) -> Result<u64, ParseError> {
    let digits = value.trim_ascii();
    std::str::from_utf8(digits)
        .ok()
        // parse alone would take a sign.
        .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()))
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| ParseError::ContentLength(lossy(value)))
}
