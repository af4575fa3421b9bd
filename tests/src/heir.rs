//! A process that waits for a copy of a Linux guest, and the guest in it.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::api::Api;
use crate::linux::Linux;
use crate::vmm::Vmm;

/// A process that waits for a machine.
pub struct Heir {
    /// It.
    pub vmm: Vmm,
    adopt: PathBuf,
}

impl Heir {
    /// One that is ready.
    #[track_caller]
    #[allow(clippy::new_without_default)] // it starts a process
    pub fn new() -> Self {
        let builder = Vmm::builder();
        let adopt = builder.directory().join("adopt.sock");
        let vmm = builder
            .arguments(["--adopt".into(), adopt.clone().into_os_string()])
            .spawn();
        // Once the API has answered, all of it is there.
        vmm.api().state();
        Heir { vmm, adopt }
    }

    /// What a request to clone says of it.
    pub fn child(&self) -> Value {
        json!({
            "adopt_socket": self.adopt,
            "vsock_override": { "uds_path": self.vmm.path("v.sock") },
        })
    }

    /// Its guest.
    #[track_caller]
    pub fn linux(self) -> Linux {
        let api = self.vmm.api();
        Linux::running(self.vmm, api)
    }
}

/// Clones the machine behind an API, and returns the answer.
#[track_caller]
pub fn clone(api: &mut Api, children: &[Value]) -> Value {
    let request = json!({ "children": children }).to_string();
    let (status, reply) = api.request("PUT", "/clone", &request);
    assert_eq!(status, 200, "{reply}");
    serde_json::from_str(&reply).expect("a reply in JSON")
}

/// What no two guests may have in common: random bytes, boot id, machine id, host name, MAC address, IP address. By these
/// names.
pub const UNIQUE: [&str; 6] = [
    "random bytes",
    "boot ids",
    "machine ids",
    "host names",
    "MAC addresses",
    "IP addresses",
];

/// What [`UNIQUE`] names, of this guest.
#[track_caller]
pub fn unique_things(guest: &Linux) -> Vec<String> {
    // Mostly without a process of its own: each costs a copy, which is slow, many pages.
    let text = guest.sh(
        "hexdump -v -n 32 -e '32/1 \"%02x\" \"\\n\"' /dev/urandom
         kernel=/proc/sys/kernel
         for file in $kernel/random/boot_id /etc/machine-id $kernel/hostname /sys/class/net/eth0/address; do
             read -r line < $file; echo $line
         done
         ip -4 addr show eth0 | sed -n 's/.*inet \\([^ ]*\\).*/\\1/p'",
    );
    let things: Vec<String> = text.lines().map(str::to_owned).collect();
    assert_eq!(things.len(), UNIQUE.len(), "{things:?}");
    things
}
