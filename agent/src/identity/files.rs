//! What files say of this guest: machine id, boot id, host name.

use std::fs;
use std::io;

use lepton_identity::{Hex, Hostname};
use rustix::mount::mount_bind;
use rustix::rand::{GetRandomFlags, getrandom};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// What lies over it.
const NEW_BOOT_ID: &str = "/run/lepton-boot-id";

/// machine-id(5).
pub fn set_machine_id(id: &Hex<16>) -> io::Result<()> {
    fs::write("/etc/machine-id", format!("{id}\n"))
}

/// sethostname(2), and hostname(5).
pub fn set_hostname(name: &Hostname) -> io::Result<()> {
    rustix::system::sethostname(name.as_str().as_bytes())?;
    fs::write("/etc/hostname", format!("{}\n", name.as_str()))
}

/// The kernel draws its boot id once and lets nobody change it. So another file is mounted over it, as for containers.
pub fn set_boot_id() -> io::Result<()> {
    let mut bytes = [0; 16];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    let is_mounted = fs::exists(NEW_BOOT_ID)?;
    // The mount shows the file itself, so a new content of it as well.
    fs::write(NEW_BOOT_ID, uuid(bytes))?;
    if !is_mounted {
        mount_bind(NEW_BOOT_ID, BOOT_ID)?;
    }
    Ok(())
}

/// A random UUID (RFC 9562, 5.4) and a newline.
fn uuid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits = Hex(bytes).to_string();
    let mut text = String::with_capacity(37);
    for (index, digit) in digits.chars().enumerate() {
        if matches!(index, 8 | 12 | 16 | 20) {
            text.push('-');
        }
        text.push(digit);
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_has_its_version_and_its_dashes() {
        assert_eq!(uuid([0; 16]), "00000000-0000-4000-8000-000000000000\n");
        assert_eq!(uuid([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff\n");
    }
}
