//! The requests that make a machine of the arguments, in the API's order.

use std::path::Path;

use serde_json::{Value, json};

use crate::arguments::{Network, Run};

/// What every guest of ours is told. `reboot=k` and `panic=-1` make both ends of a guest a reset
/// by the keyboard controller, which the VMM takes for its end.
const BOOT_ARGUMENTS: &str =
    "console=ttyS0 reboot=k panic=-1 root=/dev/vda ro rootfstype=erofs init=/sbin/init";

/// The guest's address on its vsock. Any above 2 does: each VMM has a vsock of its own.
const GUEST_CID: u32 = 3;

/// Paths and bodies of the requests before the machine is started.
pub fn requests(arguments: &Run, vsock: &Path) -> Vec<(&'static str, Value)> {
    let mut requests = vec![
        (
            "/boot-source",
            json!({
                "kernel_image_path": arguments.kernel,
                "boot_args": boot_arguments(arguments),
            }),
        ),
        (
            "/drives/rootfs",
            json!({
                "drive_id": "rootfs",
                "path_on_host": arguments.image,
                "is_root_device": true,
                "is_read_only": true,
            }),
        ),
        (
            "/machine-config",
            // A machine of its own for one command is to be there soon, not to be small: huge pages are few faults.
            json!({
                "vcpu_count": arguments.vcpus,
                "mem_size_mib": arguments.memory,
                "huge_pages": "Transparent",
            }),
        ),
        (
            "/vsock",
            json!({ "guest_cid": GUEST_CID, "uds_path": vsock }),
        ),
    ];
    if let Some(tap) = &arguments.network.tap {
        requests.push((
            "/network-interfaces/eth0",
            json!({ "iface_id": "eth0", "host_dev_name": tap }),
        ));
    }
    requests
}

/// The request that starts the machine.
pub fn instance_start() -> Value {
    json!({ "action_type": "InstanceStart" })
}

fn boot_arguments(arguments: &Run) -> String {
    let mut line = BOOT_ARGUMENTS.to_owned();
    // Every character on the serial line costs the guest an exit.
    if !arguments.console {
        line.push_str(" quiet");
    }
    if let Some(ip) = ip_parameter(&arguments.network) {
        line.push(' ');
        line.push_str(&ip);
    }
    if !arguments.boot_args.is_empty() {
        line.push(' ');
        line.push_str(&arguments.boot_args);
    }
    line
}

/// `ip=CLIENT:SERVER:GATEWAY:NETMASK:HOSTNAME:DEVICE:AUTOCONF:DNS`, the kernel's
/// Documentation/admin-guide/nfs/nfsroot.rst.
fn ip_parameter(network: &Network) -> Option<String> {
    let cidr = network.ip?;
    let text = |address: Option<std::net::Ipv4Addr>| {
        address
            .map(|address| address.to_string())
            .unwrap_or_default()
    };
    Some(format!(
        "ip={}::{}:{}::eth0:off:{}",
        cidr.address,
        text(network.gateway),
        cidr.netmask(),
        text(network.dns)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_ip_parameter() {
        let mut network = Network {
            tap: Some("tap0".into()),
            ip: Some("172.16.0.2/30".parse().unwrap()),
            gateway: None,
            dns: None,
        };
        assert_eq!(
            ip_parameter(&network).unwrap(),
            "ip=172.16.0.2:::255.255.255.252::eth0:off:"
        );
        network.gateway = Some([172, 16, 0, 1].into());
        network.dns = Some([9, 9, 9, 9].into());
        assert_eq!(
            ip_parameter(&network).unwrap(),
            "ip=172.16.0.2::172.16.0.1:255.255.255.252::eth0:off:9.9.9.9"
        );
    }
}
