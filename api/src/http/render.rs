//! Replies to bytes.

use crate::action::{Fault, Reply};

/// What the framing of a reply depends on besides the reply.
#[derive(Clone, Copy)]
pub(super) struct Framing {
    /// Whether the connection stays open.
    pub keep_alive: bool,
    /// Whether the request used a deprecated field.
    pub deprecated: bool,
    /// Whether the body is announced but left out, as the method HEAD asks.
    pub head_only: bool,
}

pub(super) const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Appends a reply to `output`.
pub(super) fn reply(output: &mut Vec<u8>, outcome: &Result<Reply, Fault>, framing: Framing) {
    const JSON: &str = "application/json";
    let fault_body;
    let (status, content) = match outcome {
        Ok(Reply::NoContent) => (204, None),
        Ok(Reply::Json(body)) => (200, Some((JSON, body))),
        Ok(Reply::Text { content_type, body }) => (200, Some((*content_type, body))),
        Err(fault) => {
            fault_body = fault.to_json();
            (fault.status, Some((JSON, &fault_body)))
        }
    };
    let connection = if framing.keep_alive {
        "keep-alive"
    } else {
        "close"
    };
    let mut text = format!(
        "HTTP/1.1 {status} {}\r\nServer: Lepton API\r\nConnection: {connection}\r\n",
        reason(status)
    );
    if framing.deprecated {
        text.push_str("Deprecation: true\r\n");
    }
    if let Some((content_type, body)) = content {
        text.push_str(&format!(
            "Content-Type: {content_type}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        ));
        if !framing.head_only {
            text.push_str(body);
        }
    } else {
        text.push_str("\r\n");
    }
    output.extend_from_slice(text.as_bytes());
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "",
    }
}
