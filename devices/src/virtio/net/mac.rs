//! MAC addresses.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

/// Bytes of a MAC address.
pub const MAC_LEN: usize = 6;

/// A MAC address, first byte first on the wire. Any six bytes are one.
pub type Mac = [u8; MAC_LEN];

/// A random address of one station, marked as locally administered (IEEE 802, 8.2).
pub(super) fn random() -> Mac {
    // Keys of the standard hasher come from the host's random source and differ each time.
    let random = RandomState::new().build_hasher().finish();
    let [a, b, c, d, e, f, _, _] = random.to_le_bytes();
    [a & !1 | 2, b, c, d, e, f]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_addresses_are_local_to_one_station_and_differ() {
        let macs: std::collections::HashSet<_> = (0..100).map(|_| random()).collect();
        assert_eq!(macs.len(), 100);
        assert!(macs.iter().all(|mac| mac[0] & 3 == 2));
    }
}
