//! The agent in the guest: its protocol, the service behind it, and a client for the host.
//!
//! The program `lepton-agent` is the guest's PID 1 (see `main.rs`). It serves the protocol of
//! `proto/agent.proto` on vsock port [`AGENT_PORT`], and says that it is up by one line
//! ([`ready::Ready`]) sent to the host's vsock port [`READY_PORT`].
//!
//! # Why ttrpc
//! The RPC library is `ttrpc`, in its synchronous mode, which Kata Containers' agent made for the
//! same place: a framing of ten bytes and protobuf, blocking threads, vsock, no asynchronous
//! runtime, two threads at start and the rest when a host connects. Its synchronous mode has no
//! streams, so standard input and output are blocking `WriteStdin` and `Read` calls, many of which
//! may be under way at once; that they block is the flow control. Left aside: `tarpc` and the
//! gRPC libraries (an asynchronous runtime in PID 1, a slower start, a larger image), `capnp-rpc`
//! (the same, and a code generator in C++ on the build machine), and a framing of our own.
//! All code is generated in Rust by `build.rs`; no `protoc` is needed. The host's side of the framing is ours
//! (`client/calls.rs` says why).
//!
//! # Who trusts whom
//! The guest trusts its host; the host does not trust its guest. So [`client`] bounds all that a
//! guest sends: messages (4 MiB), the ready line, texts that reach a person's terminal.
//! In the guest only the host may connect: connections from the guest's own processes are refused.

pub mod client;
pub mod protocol;
pub mod ready;
pub mod service;

/// The vsock port on which the agent in the guest listens.
pub const AGENT_PORT: u32 = 1024;

/// The vsock port of the host to which the agent sends its [`ready::Ready`] line. With a VMM that
/// has Firecracker's vsock, whoever waits for it listens on the Unix socket `<uds_path>_1025`.
pub const READY_PORT: u32 = 1025;

/// The version of the protocol. A client refuses an agent with another.
pub const PROTOCOL_VERSION: u32 = 1;
