//! Becoming another guest: a copy of this one, or what was loaded again, is told who it is before it may talk to anybody.
//!
//! The VMM connects to vsock port [`lepton_identity::PORT`], says who we are, and reads one answer. It holds our interfaces
//! and all other connections until then; when it closes this one, it does so no longer.

mod addresses;
mod files;
mod random;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use lepton_identity::{Answer, Identity, MAX_MESSAGE};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, getpeername, listen, socket,
};
use rustix::net::{SocketFlags, accept_with};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::announce::{ANY_CID, HOST_CID};
use crate::report;

/// The clock stays as it is if it is no more wrong than this: the message itself takes some time.
const CLOCK_IS_RIGHT: Duration = Duration::from_millis(500);

/// Where the VMM connects to.
pub fn listen_vsock() -> io::Result<OwnedFd> {
    let listener = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let address = VsockAddr::new(ANY_CID, lepton_identity::PORT);
    bind(listener.as_raw_fd(), &address)?;
    listen(&listener, Backlog::new(1)?)?;
    Ok(listener)
}

/// Serves one connection after the other, on a thread of its own.
pub fn serve(listener: OwnedFd) -> io::Result<()> {
    std::thread::Builder::new()
        .name("identity".into())
        .spawn(move || {
            loop {
                match accept_with(&listener, SocketFlags::CLOEXEC) {
                    // A copy loses the connection that it had: that is no error of the listener.
                    Ok(connection) => report("identity", converse(connection)),
                    Err(error) => {
                        report("identity", Err::<(), _>(error));
                        // Out of descriptors, perhaps, and not for ever.
                        std::thread::sleep(Duration::from_secs(1));
                    }
                }
            }
        })?;
    Ok(())
}

fn converse(connection: OwnedFd) -> io::Result<()> {
    let peer: VsockAddr = getpeername(connection.as_raw_fd())?;
    if peer.cid() != HOST_CID {
        return Err(io::Error::other(format!(
            "CID {} is not the host",
            peer.cid()
        )));
    }
    let mut connection = File::from(connection);
    let result = read(&mut connection).and_then(|identity| become_it(&identity).map(|()| identity));
    let answer = match &result {
        Ok(_) => Answer::Done,
        Err(error) => Answer::Failed(error.to_string()),
    };
    connection.write_all(answer.to_string().as_bytes())?;
    let identity = result?;
    // Until the VMM is satisfied. How it says so does not matter.
    let _ = connection.read(&mut [0; 1]);
    addresses::announce(&identity.interfaces)
}

fn read(connection: &mut File) -> io::Result<Identity> {
    let mut message = Vec::new();
    let mut part = [0; 4096];
    while !Identity::is_whole(&message) && message.len() <= MAX_MESSAGE {
        let length = connection.read(&mut part)?;
        if length == 0 {
            break;
        }
        message.extend_from_slice(part.get(..length).unwrap_or_default());
    }
    let text = String::from_utf8(message).map_err(io::Error::other)?;
    text.parse().map_err(io::Error::other)
}

/// Takes all of it on. Random numbers come first: what else is made here is made of them.
fn become_it(identity: &Identity) -> io::Result<()> {
    let Identity {
        seed,
        time,
        machine_id,
        hostname,
        interfaces,
    } = identity;
    let what =
        |what: &'static str| move |error: io::Error| io::Error::other(format!("{what}: {error}"));
    random::reseed(&seed.0).map_err(what("random numbers"))?;
    set_clock(Duration::from_nanos(*time)).map_err(what("clock"))?;
    files::set_boot_id().map_err(what("boot id"))?;
    files::set_machine_id(machine_id).map_err(what("machine id"))?;
    if let Some(name) = hostname {
        files::set_hostname(name).map_err(what("host name"))?;
    }
    addresses::set(interfaces).map_err(what("interfaces"))
}

fn set_clock(time: Duration) -> io::Result<()> {
    let now = clock_gettime(ClockId::Realtime);
    let now = Duration::try_from(now).unwrap_or_default();
    if now.abs_diff(time) > CLOCK_IS_RIGHT {
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        clock_settime(ClockId::Realtime, time)?;
    }
    Ok(())
}
