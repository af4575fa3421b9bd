//! Who a copy of a machine is. An addition.

use serde::{Deserialize, Serialize};

use super::MacAddr;

/// What makes a copy of a machine another one. Its guest is held until it has taken all of it on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Host name; absent: it keeps the one it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// 32 hexadecimal digits; absent: random ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// Addresses of its interfaces.
    #[serde(default)]
    pub interfaces: Vec<IdentityInterface>,
    /// Milliseconds that its guest may take.
    #[serde(default = "default_timeout")]
    pub timeout_ms: u64,
}

fn default_timeout() -> u64 {
    5000
}

/// Addresses of an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityInterface {
    /// The interface.
    pub iface_id: String,
    /// MAC address; absent: it keeps the one it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<MacAddr>,
    /// IP address and prefix length, as in `10.0.0.7/24`; absent: it keeps those it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// IP address of the router; with `address` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
}
