//! Tap devices of the host, made with `ip`.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::PATIENCE;

/// A tap device that goes with this value.
pub struct Tap {
    name: String,
}

impl Tap {
    /// Makes a tap device that is up, with an address such as `172.30.1.1/24` if one is given.
    #[track_caller]
    pub fn new(address: Option<&str>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // At most 15 characters (IFNAMSIZ).
        let name = format!("lt{}n{number}", std::process::id());
        ip(&["tuntap", "add", "dev", &name, "mode", "tap", "vnet_hdr"]);
        let tap = Self { name };
        if let Some(address) = address {
            ip(&["addr", "add", address, "dev", tap.name()]);
        }
        ip(&["link", "set", "dev", tap.name(), "up"]);
        tap
    }

    /// Lets the host reach `address`, one that is in no network of the tap's, by the tap.
    #[track_caller]
    pub fn route(&self, address: &str) {
        ip(&["route", "replace", address, "dev", self.name()]);
    }

    /// Tells the host who has `address` behind the tap, so that it need not ask.
    #[track_caller]
    pub fn neighbour(&self, address: &str, mac: &str) {
        ip(&[
            "neigh",
            "replace",
            address,
            "lladdr",
            mac,
            "dev",
            self.name(),
        ]);
    }

    /// Waits until the host sends what is for the tap. It does so a little after somebody has opened the tap: until then
    /// the host's kernel drops frames without a word. `ip` asks under the lock under which that changes.
    #[track_caller]
    pub fn wait_until_up(&self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let shown = Command::new("ip")
                .args(["-oneline", "link", "show", "dev", &self.name])
                .output()
                .expect("ip starts");
            if String::from_utf8_lossy(&shown.stdout).contains(" state UP ") {
                return;
            }
            assert!(Instant::now() < deadline, "{} does not come up", self.name);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Takes it down, or up again.
    #[track_caller]
    pub fn set_up(&self, is_up: bool) {
        let state = if is_up { "up" } else { "down" };
        ip(&["link", "set", "dev", self.name(), state]);
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let removed = Command::new("ip")
            .args(["link", "del", "dev", &self.name])
            .status();
        if !removed.is_ok_and(|status| status.success()) {
            eprintln!("the tap device {} is left", self.name);
        }
    }
}

#[track_caller]
fn ip(arguments: &[&str]) {
    let status = Command::new("ip")
        .args(arguments)
        .status()
        .expect("ip starts");
    assert!(status.success(), "ip {}", arguments.join(" "));
}
