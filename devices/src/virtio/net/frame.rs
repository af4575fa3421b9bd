//! The header in front of every frame (VIRTIO 1.3, 5.1.6), as the driver wrote it: checked against the frame and
//! what was negotiated before the host's kernel sees it.

use lepton_hostio::tap::{Offloads, VNET_HEADER_LEN};
use virtio_bindings::bindings::virtio_net::*;

/// Bytes of the header.
pub const HEADER_LEN: u64 = VNET_HEADER_LEN as u64;
/// Offset of the header's `num_buffers`.
pub const NUM_BUFFERS_OFFSET: u64 = 10;
/// Bytes of an Ethernet header without a VLAN tag. No frame is shorter.
pub const ETHERNET_LEN: u64 = 14;
/// Most bytes of a frame: an IP packet of the largest size behind an Ethernet header with a VLAN tag.
pub const MAX_FRAME_LEN: u64 = 65_535 + ETHERNET_LEN + 4;

/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: u16 = 16;
/// Offset of the checksum in a UDP header.
const UDP_CHECKSUM: u16 = 6;
/// Fewest payload bytes per segment: the smallest a TCP can agree on (MSS 48 less 40 of options). Smaller ones only
/// make the host work.
const MIN_GSO_SIZE: u16 = 8;
/// A value the kernel gives a meaning of its own (GSO_BY_FRAGS).
const GSO_BY_FRAGS: u16 = 0xffff;

/// Why a frame from the driver is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// There is no room for an Ethernet header, or more than any packet needs.
    #[error("a frame of {0} bytes")]
    Length(u64),
    /// The checksum's place is outside the frame or in its Ethernet header.
    #[error("checksum at {start}+{offset} of a frame of {len} bytes")]
    Checksum {
        /// Where the summed part starts.
        start: u16,
        /// Where in it the sum is.
        offset: u16,
        /// Bytes of the frame.
        len: u64,
    },
    /// The driver asks for work that was not negotiated, or that does not exist.
    #[error("flags {flags:#x} with GSO type {gso_type:#x} were not negotiated")]
    NotNegotiated {
        /// The header's flags.
        flags: u8,
        /// The header's GSO type.
        gso_type: u8,
    },
    /// A frame to be segmented without its checksum or with an impossible segment size.
    #[error(
        "GSO type {gso_type:#x} with flags {flags:#x}, segments of {size}, checksum offset {offset}"
    )]
    Segmentation {
        /// The header's GSO type.
        gso_type: u8,
        /// The header's flags.
        flags: u8,
        /// Payload bytes per segment.
        size: u16,
        /// Where the checksum is in the transport header.
        offset: u16,
    },
}

/// Offloads for frames from the driver among `features`; an offload without CSUM, which it requires (VIRTIO 1.3,
/// 5.1.3.1), does not count.
pub fn from_driver(features: u64) -> Offloads {
    among(
        features,
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_HOST_UFO,
        ],
    )
}

/// Offloads for frames to the driver among `features`; an offload without GUEST_CSUM does not count.
pub fn to_driver(features: u64) -> Offloads {
    among(
        features,
        [
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_GUEST_UFO,
        ],
    )
}

fn among(features: u64, [csum, tso4, tso6, ecn, ufo]: [u32; 5]) -> Offloads {
    let has = |bit: u32| features & (1 << bit) != 0;
    let csum = has(csum);
    let (tso4, tso6) = (csum && has(tso4), csum && has(tso6));
    Offloads {
        csum,
        tso4,
        tso6,
        ecn: (tso4 || tso6) && has(ecn),
        ufo: csum && has(ufo),
    }
}

/// Whether `negotiated` allows a header with these flags and GSO type. Unknown flags are ignored.
pub fn is_negotiated(flags: u8, gso_type: u8, negotiated: Offloads) -> bool {
    let needs_csum = u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    let has_ecn = u32::from(gso_type) & VIRTIO_NET_HDR_GSO_ECN != 0;
    let gso_ok = match u32::from(gso_type) & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_NONE => !has_ecn,
        VIRTIO_NET_HDR_GSO_TCPV4 => negotiated.tso4,
        VIRTIO_NET_HDR_GSO_TCPV6 => negotiated.tso6,
        VIRTIO_NET_HDR_GSO_UDP => negotiated.ufo && !has_ecn,
        _ => false,
    };
    gso_ok && (negotiated.csum || !needs_csum) && (negotiated.ecn || !has_ecn)
}

/// Checks the header of a frame of `len` bytes (header not counted) from a driver that may use `negotiated`.
///
/// Returns the header for the host: what the device must ignore (VIRTIO 1.3, 5.1.6.2.2) is cleared, and `hdr_len`,
/// a mere hint, is cut to the frame.
pub fn check(
    header: &[u8; VNET_HEADER_LEN],
    len: u64,
    negotiated: Offloads,
) -> Result<[u8; VNET_HEADER_LEN], FrameError> {
    let [flags, gso_type, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = *header;
    let hdr_len = u16::from_le_bytes([h0, h1]);
    let gso_size = u16::from_le_bytes([s0, s1]);
    let start = u16::from_le_bytes([c0, c1]);
    let offset = u16::from_le_bytes([o0, o1]);

    if !(ETHERNET_LEN..=MAX_FRAME_LEN).contains(&len) {
        return Err(FrameError::Length(len));
    }
    if !is_negotiated(flags, gso_type, negotiated) {
        return Err(FrameError::NotNegotiated { flags, gso_type });
    }
    let mut checked = [0; VNET_HEADER_LEN];
    let needs_csum = u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    if needs_csum {
        let end = u64::from(start) + u64::from(offset) + 2;
        if u64::from(start) < ETHERNET_LEN || end > len {
            return Err(FrameError::Checksum { start, offset, len });
        }
        checked[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        checked[6..8].copy_from_slice(&start.to_le_bytes());
        checked[8..10].copy_from_slice(&offset.to_le_bytes());
    }
    let checksum = match u32::from(gso_type) & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_NONE => return Ok(checked),
        VIRTIO_NET_HDR_GSO_UDP => UDP_CHECKSUM,
        _ => TCP_CHECKSUM,
    };
    if !needs_csum || offset != checksum || !(MIN_GSO_SIZE..GSO_BY_FRAGS).contains(&gso_size) {
        return Err(FrameError::Segmentation {
            gso_type,
            flags,
            size: gso_size,
            offset,
        });
    }
    let hdr_len = hdr_len.min(u16::try_from(len).unwrap_or(u16::MAX));
    checked[1] = gso_type;
    checked[2..4].copy_from_slice(&hdr_len.to_le_bytes());
    checked[4..6].copy_from_slice(&gso_size.to_le_bytes());
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(flags: u8, gso: u8, hdr_len: u16, size: u16, start: u16, offset: u16) -> [u8; 12] {
        let mut header = [0; 12];
        header[0] = flags;
        header[1] = gso;
        for (at, value) in [(2, hdr_len), (4, size), (6, start), (8, offset)] {
            header[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        header
    }

    const NONE: Offloads = Offloads {
        csum: false,
        tso4: false,
        tso6: false,
        ecn: false,
        ufo: false,
    };

    #[test]
    fn a_plain_frame_has_an_empty_header() {
        // Unknown flags, DATA_VALID and num_buffers are not for the host.
        let mut dirty = header(0xfe, 0, 9999, 9999, 9999, 9999);
        dirty[10] = 7;
        assert_eq!(check(&dirty, 60, NONE), Ok([0; 12]));
    }

    #[test]
    fn lengths_have_bounds() {
        let plain = [0; 12];
        for len in [0, 13, MAX_FRAME_LEN + 1, u64::MAX] {
            assert_eq!(check(&plain, len, NONE), Err(FrameError::Length(len)));
        }
        for len in [14, MAX_FRAME_LEN] {
            assert_eq!(check(&plain, len, NONE), Ok([0; 12]));
        }
    }

    #[test]
    fn a_checksum_must_lie_in_the_frame() {
        let at = |start, offset| check(&header(1, 0, 0, 0, start, offset), 60, Offloads::ALL);
        assert_eq!(at(34, 16), Ok(header(1, 0, 0, 0, 34, 16)));
        assert_eq!(at(34, 24), Ok(header(1, 0, 0, 0, 34, 24)));
        for (start, offset) in [(34, 25), (0, 16), (13, 16), (60, 0), (65535, 65535)] {
            assert!(matches!(
                at(start, offset),
                Err(FrameError::Checksum { .. })
            ));
        }
    }

    #[test]
    fn only_what_was_negotiated_is_taken() {
        let tcp4 = header(1, 1, 54, 1448, 34, 16);
        let tcp4_ecn = header(1, 0x81, 54, 1448, 34, 16);
        let tcp6 = header(1, 4, 74, 1428, 54, 16);
        let udp = header(1, 3, 42, 1480, 34, 6);
        for good in [tcp4, tcp4_ecn, tcp6, udp] {
            assert_eq!(check(&good, 9000, Offloads::ALL), Ok(good));
        }
        let without = |f: fn(&mut Offloads)| {
            let mut offloads = Offloads::ALL;
            f(&mut offloads);
            offloads
        };
        for (header, negotiated) in [
            (tcp4, without(|o| o.tso4 = false)),
            (tcp6, without(|o| o.tso6 = false)),
            (tcp4_ecn, without(|o| o.ecn = false)),
            (udp, without(|o| o.ufo = false)),
            (tcp4, NONE),
            (self::header(1, 0, 0, 0, 34, 16), NONE),
            // ECN without TCP, UDP_L4 and types that do not exist.
            (self::header(0, 0x80, 0, 0, 0, 0), Offloads::ALL),
            (self::header(1, 0x83, 42, 1480, 34, 6), Offloads::ALL),
            (self::header(1, 5, 42, 1480, 34, 6), Offloads::ALL),
            (self::header(1, 2, 42, 1480, 34, 6), Offloads::ALL),
            (self::header(1, 0x7f, 42, 1480, 34, 6), Offloads::ALL),
        ] {
            let (flags, gso_type) = (header[0], header[1]);
            assert_eq!(
                check(&header, 9000, negotiated),
                Err(FrameError::NotNegotiated { flags, gso_type })
            );
        }
    }

    #[test]
    fn impossible_segmentation_is_refused() {
        for bad in [
            header(0, 1, 54, 1448, 34, 16),
            header(1, 1, 54, 0, 34, 16),
            header(1, 1, 54, 7, 34, 16),
            header(1, 1, 54, 0xffff, 34, 16),
            header(1, 1, 54, 1448, 34, 6),
            header(1, 3, 42, 1480, 34, 16),
        ] {
            assert!(matches!(
                check(&bad, 9000, Offloads::ALL),
                Err(FrameError::Segmentation { .. })
            ));
        }
    }

    #[test]
    fn a_lying_header_length_is_cut() {
        let lying = header(1, 1, 9001, 1448, 34, 16);
        assert_eq!(
            check(&lying, 9000, Offloads::ALL),
            Ok(header(1, 1, 9000, 1448, 34, 16))
        );
    }

    #[test]
    fn an_offload_needs_what_it_depends_on() {
        let all_but_csum = (1 << VIRTIO_NET_F_HOST_TSO4)
            | (1 << VIRTIO_NET_F_HOST_TSO6)
            | (1 << VIRTIO_NET_F_HOST_ECN)
            | (1 << VIRTIO_NET_F_HOST_UFO);
        assert_eq!(from_driver(all_but_csum), NONE);
        assert_eq!(
            from_driver(all_but_csum | 1 << VIRTIO_NET_F_CSUM),
            Offloads::ALL
        );
        assert_eq!(to_driver(all_but_csum | 1 << VIRTIO_NET_F_CSUM), NONE);
        let ecn = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_ECN;
        assert!(!to_driver(ecn).ecn);
        assert!(to_driver(ecn | 1 << VIRTIO_NET_F_GUEST_TSO6).ecn);
    }

    proptest! {
        /// Whatever the driver writes: a header that passes satisfies the kernel's own rules.
        #[test]
        fn what_passes_is_sane(bytes: [u8; 12], len in 0u64..70_000, bits in 0u8..32) {
            let features = (0..5).fold(0u64, |f, i| {
                let bit = [0, 11, 12, 13, 14][i];
                if bits & (1 << i) != 0 { f | 1 << bit } else { f }
            });
            let negotiated = from_driver(features);
            if let Ok(out) = check(&bytes, len, negotiated) {
                let word = |at: usize| u64::from(u16::from_le_bytes([out[at], out[at + 1]]));
                prop_assert!((14..=MAX_FRAME_LEN).contains(&len));
                prop_assert!(out[0] & !1 == 0);
                prop_assert!(word(2) <= len);
                if out[0] == 1 {
                    prop_assert!(negotiated.csum);
                    prop_assert!(word(6) + word(8) + 2 <= len);
                } else {
                    prop_assert_eq!(out, [0; 12]);
                }
                if out[1] != 0 {
                    prop_assert!(word(4) > 0 && word(4) < 0xffff);
                }
                // Checking again changes nothing.
                prop_assert_eq!(check(&out, len, negotiated), Ok(out));
            }
        }
    }
}
