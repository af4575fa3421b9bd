//! MAC addresses.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::str::FromStr;

/// Bytes of a MAC address.
pub const MAC_LEN: usize = 6;

/// A MAC address. Any six bytes are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddr([u8; MAC_LEN]);

/// A text is not six two-digit hexadecimal numbers with colons between them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address of the form aa:bb:cc:dd:ee:ff")]
pub struct MacError(String);

impl MacAddr {
    /// The address of these bytes, first byte first on the wire.
    pub const fn new(bytes: [u8; MAC_LEN]) -> Self {
        MacAddr(bytes)
    }

    /// The bytes, first byte first on the wire.
    pub const fn bytes(self) -> [u8; MAC_LEN] {
        self.0
    }

    /// A random address of one station, marked as locally administered (IEEE 802, 8.2).
    pub fn random() -> Self {
        // Keys of the standard hasher come from the host's random source and differ each time.
        let random = RandomState::new().build_hasher().finish();
        let [a, b, c, d, e, f, _, _] = random.to_le_bytes();
        MacAddr([a & !1 | 2, b, c, d, e, f])
    }
}

impl FromStr for MacAddr {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        parse(text).ok_or_else(|| MacError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<MacAddr> {
    let mut bytes = [0; MAC_LEN];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next()?;
        // `from_str_radix` alone would take a sign.
        if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(MacAddr(bytes))
}

impl From<[u8; MAC_LEN]> for MacAddr {
    fn from(octets: [u8; MAC_LEN]) -> Self {
        MacAddr(octets)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_the_strict_form_is_an_address() {
        let mac: MacAddr = "06:00:ac:10:FF:02".parse().unwrap();
        assert_eq!(mac.bytes(), [6, 0, 0xac, 0x10, 0xff, 2]);
        assert_eq!(mac.to_string(), "06:00:ac:10:ff:02");
        for text in [
            "",
            ":",
            "06:00:ac:10:ff",
            "06:00:ac:10:ff:02:03",
            "06:00:ac:10:ff:",
            "06:00:ac:10:ff:2",
            "06:00:ac:10:ff:002",
            "06:00:ac:10:ff:+2",
            "06:00:ac:10:ff:g2",
            "06-00-ac-10-ff-02",
            " 06:00:ac:10:ff:02",
            "06:00:ac:10:ff:0\u{661}",
        ] {
            assert_eq!(text.parse::<MacAddr>(), Err(MacError(text.to_owned())));
        }
    }

    #[test]
    fn random_addresses_are_local_to_one_station_and_differ() {
        let macs: std::collections::HashSet<_> = (0..100).map(|_| MacAddr::random()).collect();
        assert_eq!(macs.len(), 100);
        assert!(macs.iter().all(|mac| mac.bytes()[0] & 3 == 2));
    }

    proptest! {
        #[test]
        fn text_and_back(bytes: [u8; 6]) {
            let mac = MacAddr::new(bytes);
            prop_assert_eq!(mac.to_string().parse::<MacAddr>().unwrap(), mac);
        }

        #[test]
        fn no_text_panics(text in ".{0,24}") {
            let _ = text.parse::<MacAddr>();
        }
    }
}
