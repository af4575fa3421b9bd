//! Tap devices of the host, made with `ip`, removed when dropped.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::process::Failure;

/// A tap device that is up.
pub struct Tap(String);

impl Tap {
    /// Makes one.
    pub fn new() -> Result<Self, Failure> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // At most 15 characters (IFNAMSIZ).
        let name = format!("lb{}n{number}", std::process::id());
        ip(&["tuntap", "add", "dev", &name, "mode", "tap", "vnet_hdr"])?;
        let tap = Self(name);
        // Room for frames that on a real network would be cut.
        ip(&["link", "set", "dev", tap.name(), "mtu", "65521", "up"])?;
        Ok(tap)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if ip(&["link", "del", "dev", &self.0]).is_err() {
            eprintln!("the tap device {} is left: ip link del {}", self.0, self.0);
        }
    }
}

/// Gives the host's end of a tap `address`, with the length of its network, unless it has it.
pub fn set_address(tap: &str, address: &str) -> Result<(), Failure> {
    ip(&["address", "replace", address, "dev", tap])
}

/// No tap is no fault of a VMM's: the host does not offer it.
fn ip(arguments: &[&str]) -> Result<(), Failure> {
    let line = format!("ip {}", arguments.join(" "));
    let output = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Failure::NotOffered(format!("{line}: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Failure::NotOffered(format!("{line}: {reason}")))
}
