//! The host's name, the loopback interface and the resolver. Addresses and routes are the kernel's
//! work, by its parameter `ip=` (Documentation/admin-guide/nfs/nfsroot.rst).

use std::io;
use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};

use crate::kernel_command_line::Parameters;
use crate::netlink::Route;
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
const LOOPBACK_INDEX: u32 = 1;

/// Sets IFF_UP.
fn bring_up_loopback() -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = LOOPBACK_INDEX;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    Route::open()?.change(RouteNetlinkMessage::SetLink(link), 0)
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
