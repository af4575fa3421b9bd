//! HTTP/1.1 over a Unix socket, as much of it as the API needs: `Content-Length` bodies, keep-alive, pipelining and
//! `Expect: 100-continue` (RFC 9112 and RFC 9110).
//!
//! One thread serves every client. Nothing here blocks but the handler: a client that sends one byte a second, or
//! never reads its replies, costs its own bounded buffers and no one else's time.
//!
//! The parser of heads is `httparse`: hyper's own, fuzzed for years, without allocation or dependencies. hyper itself
//! would bring an asynchronous runtime, and the time from process start to the bound socket is measured in hundreds
//! of microseconds.
//!
//! System calls while serving, for whoever writes the thread's seccomp filter: accept4, close, epoll_ctl, epoll_wait,
//! fcntl(F_DUPFD_CLOEXEC), recvfrom, sendmsg, shutdown, and read of the eventfd that stops the loop; besides them
//! what the allocator, the log and the handler need.

mod connection;
mod parse;
mod render;
mod server;

pub use parse::{MAX_HEAD, MAX_HEADERS, ParseError, Request, parse_request};
pub use server::{DEFAULT_MAX_CONNECTIONS, DEFAULT_MAX_PAYLOAD, Server, StopHandle};

#[cfg(test)]
mod tests;
