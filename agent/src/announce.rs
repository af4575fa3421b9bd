//! The vsock sockets: where the host connects, and how it learns that it may.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use lepton_agent::ready::Ready;
use lepton_agent::service::StartTimes;
use lepton_agent::{AGENT_PORT, PROTOCOL_VERSION, READY_PORT};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket,
};

/// `VMADDR_CID_ANY` and `VMADDR_CID_HOST` of <linux/vm_sockets.h>.
pub const ANY_CID: u32 = u32::MAX;
pub const HOST_CID: u32 = 2;

/// A socket on which the host can reach us.
pub fn listen_vsock() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(ANY_CID, AGENT_PORT))?;
    listen(&listener, Backlog::new(64)?)?;
    Ok(listener)
}

/// Tells the host that we are up. A host that does not listen does not want to know.
pub fn tell_host(times: StartTimes) {
    let tell = || -> io::Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let host = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
        connect(host.as_raw_fd(), &VsockAddr::new(HOST_CID, READY_PORT))?;
        send_line(std::fs::File::from(host), times)
    };
    let _ = tell();
}

/// Sends the ready line.
pub fn send_line(mut to: impl Write, times: StartTimes) -> io::Result<()> {
    let ready = Ready {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: PROTOCOL_VERSION,
        start_us: times.start_us,
        ready_us: times.ready_us,
    };
    to.write_all(format!("{ready}\n").as_bytes())
}
