//! MAC and IP addresses of this guest's interfaces.

use std::fs;
use std::io;
use std::net::IpAddr;

use lepton_identity::{Interface, Mac, Network};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use rustix::io::Errno;

use crate::netlink::Route;

/// Gives each interface the addresses that it is to have.
pub fn set(interfaces: &[Interface]) -> io::Result<()> {
    if interfaces.is_empty() {
        return Ok(());
    }
    let kernel = Route::open()?;
    // All are found before any changes: one may get the address that another one had.
    let found = interfaces.iter().map(|i| Ok((find(i.was)?.0, i)));
    let found: Vec<(u32, &Interface)> = found.collect::<io::Result<_>>()?;
    for (index, interface) in found {
        let Interface {
            was: _,
            mac,
            address,
            gateway,
        } = *interface;
        if let Some(mac) = mac {
            set_mac(&kernel, index, mac)?;
        }
        if let Some(network) = address {
            set_address(&kernel, index, network)?;
        }
        if let Some(gateway) = gateway {
            set_gateway(&kernel, index, gateway)?;
        }
    }
    Ok(())
}

/// Tells the neighbours of each interface. The kernel does when it is asked to and a MAC address is set, to the same even.
pub fn announce(interfaces: &[Interface]) -> io::Result<()> {
    for interface in interfaces.iter().filter(|i| i.address.is_some()) {
        let mac = interface.mac.unwrap_or(interface.was);
        let (index, name) = find(mac)?;
        fs::write(format!("/proc/sys/net/ipv4/conf/{name}/arp_notify"), "1")?;
        set_mac(&Route::open()?, index, mac)?;
    }
    Ok(())
}

/// Number and name of the interface that has this MAC address.
fn find(mac: Mac) -> io::Result<(u32, String)> {
    let wanted = mac.to_string();
    for entry in fs::read_dir("/sys/class/net")? {
        let path = entry?.path();
        let text = |name| fs::read_to_string(path.join(name)).unwrap_or_default();
        if text("address").trim() == wanted {
            let index = text("ifindex").trim().parse().map_err(io::Error::other)?;
            let name = path.file_name().unwrap_or_default();
            return Ok((index, name.to_string_lossy().into_owned()));
        }
    }
    Err(io::Error::other(format!("none has the address {wanted}")))
}

fn set_mac(kernel: &Route, index: u32, mac: Mac) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![LinkAttribute::Address(mac.0.to_vec())];
    kernel.change(RouteNetlinkMessage::SetLink(link), 0)
}

fn family_of(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

const GONE: i32 = Errno::ADDRNOTAVAIL.raw_os_error();

/// Puts one address in the place of all others of its family, but those of the link alone.
fn set_address(kernel: &Route, index: u32, network: Network) -> io::Result<()> {
    let family = family_of(network.address);
    let mut all = AddressMessage::default();
    all.header.family = family;
    for message in kernel.all(RouteNetlinkMessage::GetAddress(all))? {
        let RouteNetlinkMessage::NewAddress(old) = message else {
            continue;
        };
        let header = &old.header;
        // The kernel may tell of all interfaces.
        let is_ours = header.index == index && header.family == family;
        if is_ours && header.scope != AddressScope::Link {
            match kernel.change(RouteNetlinkMessage::DelAddress(old), 0) {
                // It went together with another one of its network.
                Err(error) if error.raw_os_error() == Some(GONE) => {}
                result => result?,
            }
        }
    }
    let mut new = AddressMessage::default();
    new.header.family = family;
    new.header.prefix_len = network.prefix;
    new.header.index = index;
    new.attributes = vec![
        AddressAttribute::Local(network.address),
        AddressAttribute::Address(network.address),
    ];
    kernel.change(
        RouteNetlinkMessage::NewAddress(new),
        NLM_F_CREATE | NLM_F_REPLACE,
    )
}

/// Everything else is reached by `gateway`. The old way there went with the old address.
fn set_gateway(kernel: &Route, index: u32, gateway: IpAddr) -> io::Result<()> {
    let mut route = RouteMessage::default();
    route.header.address_family = family_of(gateway);
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = RouteProtocol::Boot;
    route.header.scope = RouteScope::Universe;
    route.header.kind = RouteType::Unicast;
    let address = match gateway {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    };
    route.attributes = vec![RouteAttribute::Gateway(address), RouteAttribute::Oif(index)];
    kernel.change(
        RouteNetlinkMessage::NewRoute(route),
        NLM_F_CREATE | NLM_F_REPLACE,
    )
}
