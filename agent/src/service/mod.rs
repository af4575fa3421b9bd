//! The agent's side of the protocol, over any listening socket.

mod process;
pub mod request;
mod table;
mod terminal;
pub mod user;

use std::collections::HashMap;
use std::os::fd::{IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::sys::socket::{VsockAddr, getpeername};
use ttrpc::{
    AcceptHook, Code, ConnectionDataExt, HookError, HookOutput, Server, TtrpcContext, get_status,
};

use crate::protocol::{self as proto, Agent, exec_response, wait_response::Status as ProtoStatus};
use process::{ExitStatus, MAX_READ, Process};
pub use table::{Children, Table};

/// The host's address on every vsock (VIRTIO 1.3, 5.10.4).
const HOST_CID: u32 = 2;

/// Who may connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Only the host, by its vsock address: the listener is an `AF_VSOCK` socket.
    HostOnly,
    /// Everybody who can reach the listener, as with a Unix socket that has permissions of its own.
    Anyone,
}

/// Microseconds from the start of the kernel to two points in the agent's own start.
#[derive(Debug, Clone, Copy, Default)]
pub struct StartTimes {
    /// `main` was entered.
    pub start_us: u64,
    /// Connections could be made.
    pub ready_us: u64,
}

/// The service: what a host asks for, done to the processes of `table`.
pub struct Service {
    table: Arc<Table>,
    times: StartTimes,
    shutdown: Box<dyn Fn() + Send + Sync>,
}

impl Service {
    /// A service over `table`. `shutdown` is called when the host asks for a shutdown; it must
    /// return at once, so that the answer still reaches the host.
    pub fn new(
        table: Arc<Table>,
        times: StartTimes,
        shutdown: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self {
            table,
            times,
            shutdown: Box::new(shutdown),
        }
    }

    /// Serves connections to `listener`, a listening stream socket in non-blocking mode, in
    /// threads of their own until the returned server is shut down.
    ///
    /// # Errors
    /// When a thread or a pipe cannot be made.
    pub fn serve(self, listener: OwnedFd, admission: Admission) -> ttrpc::Result<Server> {
        // ttrpc borrows the descriptor for the life of the server, which is that of the program.
        let mut server = Server::new()
            .add_listener(listener.into_raw_fd())?
            .set_accept_hook(Gate {
                admission,
                connections: AtomicU64::new(0),
            })
            .register_service(proto::create_agent(Arc::new(self)));
        server.start()?;
        Ok(server)
    }

    fn process(&self, id: u64) -> ttrpc::Result<Arc<Process>> {
        self.table
            .get(id)
            .ok_or_else(|| refuse(Code::NOT_FOUND, format!("no process {id}")))
    }
}

/// Lets connections in, and gives each a mark by which its processes are known.
#[derive(Debug)]
struct Gate {
    admission: Admission,
    connections: AtomicU64,
}

/// The mark of a connection.
struct Connection {
    number: u64,
    /// A thread waits for the connection's end already.
    watched: AtomicBool,
}

/// The key of [`Connection`] in ttrpc's per-connection data.
const CONNECTION: &str = "connection";

impl AcceptHook for Gate {
    fn on_accept(&self, fd: RawFd) -> Result<HookOutput, HookError> {
        if self.admission == Admission::HostOnly {
            let peer: VsockAddr = getpeername(fd).map_err(|e| HookError::Io(e.into()))?;
            if peer.cid() != HOST_CID {
                return Err(HookError::Rejected(format!("CID {}", peer.cid())));
            }
        }
        let connection = Arc::new(Connection {
            number: self.connections.fetch_add(1, Ordering::Relaxed),
            watched: AtomicBool::new(false),
        });
        Ok(HookOutput {
            data: HashMap::from([(CONNECTION.to_owned(), Box::new(connection) as _)]),
            payload_transform: None,
        })
    }
}

fn refuse(code: Code, message: impl ToString) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, message))
}

fn internal(error: impl std::fmt::Display) -> ttrpc::Error {
    refuse(Code::INTERNAL, error.to_string())
}

fn connection(ctx: &TtrpcContext) -> ttrpc::Result<&Arc<Connection>> {
    ctx.conn_ctx
        .data
        .get_typed::<Arc<Connection>>(CONNECTION)
        .ok_or_else(|| internal("the connection has no mark"))
}

impl Service {
    /// Sees to it that the connection's processes end with it.
    fn watch(&self, ctx: &TtrpcContext, connection: &Arc<Connection>) -> ttrpc::Result<()> {
        if connection.watched.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let (gone, table, number) = (
            ctx.cancel_rx.clone(),
            Arc::clone(&self.table),
            connection.number,
        );
        std::thread::Builder::new()
            .name("connection-end".into())
            .spawn(move || {
                // Nothing is ever sent: ttrpc drops the other end when the connection ends.
                let _ = gone.recv();
                table.kill_owned_by(number);
            })
            .map_err(|e| {
                connection.watched.store(false, Ordering::Relaxed);
                refuse(Code::RESOURCE_EXHAUSTED, e)
            })?;
        Ok(())
    }
}

impl Agent for Service {
    fn get_info(
        &self,
        _ctx: &TtrpcContext,
        _request: proto::GetInfoRequest,
    ) -> ttrpc::Result<proto::GetInfoResponse> {
        let uname = rustix::system::uname();
        Ok(proto::GetInfoResponse {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            protocol_version: crate::PROTOCOL_VERSION,
            kernel_release: uname.release().to_string_lossy().into_owned(),
            hostname: uname.nodename().to_string_lossy().into_owned(),
            uptime_us: uptime_us(),
            start_us: self.times.start_us,
            ready_us: self.times.ready_us,
            ..Default::default()
        })
    }

    fn exec(
        &self,
        ctx: &TtrpcContext,
        request: proto::ExecRequest,
    ) -> ttrpc::Result<proto::ExecResponse> {
        let connection = connection(ctx)?;
        self.watch(ctx, connection)?;
        let outcome = match request::Exec::parse(request)
            .and_then(|exec| self.table.spawn(exec, connection.number))
        {
            Ok(id) => exec_response::Outcome::Process(id),
            Err(error) => exec_response::Outcome::Failure(error.into()),
        };
        // The connection may have ended, and its processes with it, before this one was known.
        if let Err(e) = ctx.cancel_rx.try_recv()
            && e.is_disconnected()
        {
            self.table.kill_owned_by(connection.number);
        }
        Ok(proto::ExecResponse {
            outcome: Some(outcome),
            ..Default::default()
        })
    }

    fn write_stdin(
        &self,
        _ctx: &TtrpcContext,
        request: proto::WriteStdinRequest,
    ) -> ttrpc::Result<proto::WriteStdinResponse> {
        let closed = !self
            .process(request.process)?
            .write_stdin(&request.data)
            .map_err(internal)?;
        Ok(proto::WriteStdinResponse {
            closed,
            ..Default::default()
        })
    }

    fn close_stdin(
        &self,
        _ctx: &TtrpcContext,
        request: proto::CloseStdinRequest,
    ) -> ttrpc::Result<proto::CloseStdinResponse> {
        self.process(request.process)?
            .close_stdin()
            .map_err(internal)?;
        Ok(proto::CloseStdinResponse::default())
    }

    fn read(
        &self,
        _ctx: &TtrpcContext,
        request: proto::ReadRequest,
    ) -> ttrpc::Result<proto::ReadResponse> {
        let process = self.process(request.process)?;
        let output = match request.stream.enum_value_or_default() {
            proto::OutputStream::OUTPUT_STREAM_STDOUT => process.stdout(),
            proto::OutputStream::OUTPUT_STREAM_STDERR => process.stderr(),
            proto::OutputStream::OUTPUT_STREAM_UNSPECIFIED => {
                return Err(refuse(Code::INVALID_ARGUMENT, "no such output stream"));
            }
        };
        let limit = match request.max_bytes {
            0 => MAX_READ,
            asked => usize::try_from(asked).unwrap_or(MAX_READ).min(MAX_READ),
        };
        let data = process.read(output, limit).map_err(internal)?;
        if data.is_empty() {
            self.table.forget_if_finished(request.process);
        }
        Ok(proto::ReadResponse {
            data,
            ..Default::default()
        })
    }

    fn resize(
        &self,
        _ctx: &TtrpcContext,
        request: proto::ResizeRequest,
    ) -> ttrpc::Result<proto::ResizeResponse> {
        let process = self.process(request.process)?;
        if !process
            .resize(terminal::size(&request.size))
            .map_err(internal)?
        {
            return Err(refuse(
                Code::FAILED_PRECONDITION,
                format!("process {} has no terminal", request.process),
            ));
        }
        Ok(proto::ResizeResponse::default())
    }

    fn signal(
        &self,
        _ctx: &TtrpcContext,
        request: proto::SignalRequest,
    ) -> ttrpc::Result<proto::SignalResponse> {
        let process = self.process(request.process)?;
        let signal = i32::try_from(request.signal)
            .ok()
            .and_then(|number| number.try_into().ok())
            .ok_or_else(|| {
                refuse(
                    Code::INVALID_ARGUMENT,
                    format!("no signal {}", request.signal),
                )
            })?;
        let running = self.table.signal(&process, signal).map_err(internal)?;
        Ok(proto::SignalResponse {
            ended: !running,
            ..Default::default()
        })
    }

    fn wait(
        &self,
        _ctx: &TtrpcContext,
        request: proto::WaitRequest,
    ) -> ttrpc::Result<proto::WaitResponse> {
        let process = self.process(request.process)?;
        let status = match process.wait().map_err(internal)? {
            ExitStatus::Exited(code) => ProtoStatus::ExitCode(code),
            ExitStatus::Killed(signal) => ProtoStatus::Signal(signal),
        };
        self.table.forget_if_finished(request.process);
        Ok(proto::WaitResponse {
            status: Some(status),
            ..Default::default()
        })
    }

    fn shutdown(
        &self,
        _ctx: &TtrpcContext,
        _request: proto::ShutdownRequest,
    ) -> ttrpc::Result<proto::ShutdownResponse> {
        (self.shutdown)();
        Ok(proto::ShutdownResponse::default())
    }
}

/// Microseconds since the kernel started.
pub fn uptime_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanoseconds) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds
        .saturating_mul(1_000_000)
        .saturating_add(nanoseconds / 1000)
}
