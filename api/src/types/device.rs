//! Drives, network interfaces, vsock, the serial console, and the rate limiters they share.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::string_on_the_wire;

/// A token bucket: `size` tokens that refill evenly over `refill_time`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens the bucket holds: bytes or operations. 0 switches the limit off.
    pub size: u64,
    /// Extra tokens at the start, never refilled.
    pub one_time_burst: Option<u64>,
    /// Time in milliseconds to refill an empty bucket. 0 switches the limit off.
    pub refill_time: u64,
}

/// Two independent limits on the I/O of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bytes.
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    pub ops: Option<TokenBucket>,
}

/// Body of `PUT /drives/{drive_id}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Name of the drive, the same as in the URL.
    pub drive_id: String,
    /// Partition that holds the root file system, for a root device.
    pub partuuid: Option<String>,
    /// Boot from this drive.
    pub is_root_device: bool,
    /// Whether the guest may ask for its writes to be made durable.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Refuse writes. Required for a drive backed by a file.
    pub is_read_only: Option<bool>,
    /// File or block device behind the drive.
    pub path_on_host: Option<String>,
    /// Limits on its I/O.
    pub rate_limiter: Option<RateLimiter>,
    /// How I/O is done on the host.
    pub io_engine: Option<IoEngine>,
    /// Socket of a vhost-user backend. Known on the wire so that it can be refused by name.
    pub socket: Option<String>,
    /// Where writes go; the file behind the drive is then only read. An addition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<DriveOverlay>,
}

/// What a machine has of its own over an image that it shares with others. An addition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverlay {
    /// This machine's overlay file, which is made if it is not there. Required; absent only in what is told of a copy
    /// whose file has no name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Frozen overlays between it and the image, the lowest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<String>,
}

/// Whether flush requests are offered to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// No flush: a host crash may lose what the guest believes written.
    #[default]
    Unsafe,
    /// Flush is offered and reaches the host's storage.
    Writeback,
}

/// How block I/O is done on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// One blocking call per request.
    #[default]
    Sync,
    /// io_uring.
    Async,
}

/// Body of `PATCH /drives/{drive_id}`: what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    /// Name of the drive, the same as in the URL.
    pub drive_id: String,
    /// New file behind the drive.
    pub path_on_host: Option<String>,
    /// New limits.
    pub rate_limiter: Option<RateLimiter>,
}

/// Body of `PUT /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Name of the interface, the same as in the URL.
    pub iface_id: String,
    /// Name of the tap device on the host.
    pub host_dev_name: String,
    /// MAC address offered to the guest.
    pub guest_mac: Option<MacAddr>,
    /// MTU offered to the guest, valid from 68 to 65535 (VIRTIO 1.3, 5.1.4).
    pub mtu: Option<u16>,
    /// Limits on what the guest receives.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits on what the guest sends.
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Body of `PATCH /network-interfaces/{iface_id}`: what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfacePatch {
    /// Name of the interface, the same as in the URL.
    pub iface_id: String,
    /// New limits on what the guest receives.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// New limits on what the guest sends.
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Body of `PUT /vsock`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// Deprecated and without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// Context id of the guest, at least 3 (VIRTIO 1.3, 5.10.4).
    pub guest_cid: u32,
    /// Unix socket on the host that stands for the guest.
    pub uds_path: String,
}

/// Body of `PUT /serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// File or named pipe that receives what the guest writes to its serial port.
    pub serial_out_path: Option<PathBuf>,
    /// Limit on it, in bytes. What exceeds it is dropped.
    pub rate_limiter: Option<TokenBucket>,
}

/// An Ethernet address, on the wire six pairs of hexadecimal digits with colons between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

/// A text that is no MAC address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The provided MAC address is invalid: {0:?}")]
pub struct MacAddrError(String);

impl FromStr for MacAddr {
    type Err = MacAddrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || MacAddrError(text.to_owned());
        let mut octets = [0; 6];
        let mut pairs = text.split(':');
        for octet in &mut octets {
            let pair = pairs.next().ok_or_else(invalid)?;
            // from_str_radix alone would take a sign.
            if pair.len() != 2 || !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(invalid());
            }
            *octet = u8::from_str_radix(pair, 16).map_err(|_| invalid())?;
        }
        match pairs.next() {
            None => Ok(Self(octets)),
            Some(_) => Err(invalid()),
        }
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

string_on_the_wire!(MacAddr);
