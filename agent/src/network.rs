//! The host's name, the loopback interface and the resolver. Addresses and routes are the kernel's
//! work, by its parameter `ip=` (Documentation/admin-guide/nfs/nfsroot.rst).

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use crate::kernel_command_line::Parameters;
use crate::report;

/// Sets all of it up, reporting what fails.
pub fn set_up(parameters: &Parameters) {
    let name = host_name(parameters);
    report(
        "host name",
        name.map_or(Ok(()), |name| rustix::system::sethostname(name.as_bytes())),
    );
    // With ip= the kernel has brought the loopback interface up as well; without, it is down.
    report("loopback interface", bring_up_loopback());
    if parameters.ip {
        report("/etc/resolv.conf", write_resolver());
    }
}

/// The name to take; none if `ip=` gave one already.
fn host_name(parameters: &Parameters) -> Option<String> {
    if let Some(name) = &parameters.hostname {
        return Some(name.clone());
    }
    let current = rustix::system::uname();
    if !matches!(current.nodename().to_bytes(), b"" | b"(none)") {
        return None;
    }
    let file = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    Some(match file.trim() {
        "" => "lepton".to_owned(),
        name => name.to_owned(),
    })
}

/// The loopback interface's index in the first network namespace.
const LOOPBACK_INDEX: i32 = 1;

/// One RTM_NEWLINK request that sets IFF_UP, with an acknowledgement: rtnetlink(7).
fn bring_up_loopback() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLMSG_ERROR: u16 = 2;
    const NLM_F_REQUEST_ACK: u16 = 1 | 4;
    const IFF_UP: u32 = 1;

    let mut message = Vec::with_capacity(32);
    // struct nlmsghdr: length, type, flags, sequence number, port.
    message.extend(32u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    message.extend([0; 8]);
    // struct ifinfomsg: family and padding and type, index, flags, which flags to change.
    message.extend([0; 4]);
    message.extend(LOOPBACK_INDEX.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());

    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &message, &kernel, MsgFlags::empty())?;
    // struct nlmsgerr after the header: a negated error number, 0 for success.
    let mut answer = [0; 64];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let field = |from: usize, size: usize| answer[..length].get(from..from + size);
    let kind = field(4, 2).and_then(|bytes| bytes.try_into().ok());
    let error = field(16, 4).and_then(|bytes| bytes.try_into().ok());
    match (kind.map(u16::from_ne_bytes), error.map(i32::from_ne_bytes)) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(error)) => {
            Err(io::Error::from_raw_os_error(error.saturating_neg()))
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Hands the name servers of `ip=` to the programs.
fn write_resolver() -> io::Result<()> {
    let resolver = resolver(&std::fs::read_to_string("/proc/net/pnp")?);
    if resolver.is_empty() {
        return Ok(());
    }
    std::fs::write("/etc/resolv.conf", resolver)
}

/// The lines of `/proc/net/pnp` that a resolver understands. The kernel writes that file in
/// resolv.conf's form, but with comments and fields of its own.
fn resolver(pnp: &str) -> String {
    pnp.lines()
        .filter(|line| match line.split_once(' ') {
            Some(("nameserver", address)) => address
                .parse()
                .is_ok_and(|address: IpAddr| !address.is_unspecified()),
            Some(("domain", name)) => !name.is_empty(),
            _ => false,
        })
        .map(|line| format!("{line}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resolver_gets_servers_and_domain_alone() {
        let pnp = "#MANUAL\ndomain lab.test\nnameserver 10.0.0.1\nnameserver 0.0.0.0\n\
                   nameserver junk\nbootserver 10.0.0.2\n";
        assert_eq!(resolver(pnp), "domain lab.test\nnameserver 10.0.0.1\n");
        assert_eq!(resolver("#MANUAL\n"), "");
    }
}
