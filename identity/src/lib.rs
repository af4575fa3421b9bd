//! What the VMM tells the guest of a copied machine: who it is from now on, and what makes it different from all others.
//!
//! The VMM connects to the guest's vsock port [`PORT`] and sends one [`Identity`] as lines of text, the last of which is
//! `end`. Who listens there, in our guest the agent, takes it on and answers with one line, [`Answer`]. Until then the VMM
//! lets the machine talk to nobody else.
//!
//! ```text
//! lepton-identity 1
//! seed 6f1d...                                    64 random bytes
//! time 1795333766123456789                        the host's clock, nanoseconds since 1970
//! machine-id 0af1...                              16 bytes
//! hostname web-7
//! interface 06:00:ac:1e:4d:02 mac=06:00:ac:1e:4d:07 address=10.0.0.7/24 gateway=10.0.0.1
//! end
//! ```
//!
//! Text, because two programs of which neither needs the other's libraries read and write it. Lines that a newer VMM adds
//! are an error: an identity is taken on whole, or not at all.

mod answer;
mod line;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

pub use answer::{Answer, MAX_ANSWER};
pub use line::{Hex, Mac, ParseError};

/// The vsock port of the guest on which it is told.
pub const PORT: u32 = 1026;
/// Most bytes of a message.
pub const MAX_MESSAGE: usize = 16 << 10;
/// Most interfaces of a machine that can be told of.
pub const MAX_INTERFACES: usize = 64;
/// Most bytes of a host name: what Linux takes.
pub const MAX_HOSTNAME: usize = 64;

const FIRST: &str = "lepton-identity 1";
const LAST: &str = "end";

/// Who a machine is from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Random bytes, for this machine alone.
    pub seed: Hex<64>,
    /// The host's clock when this was sent, in nanoseconds since 1970.
    pub time: u64,
    /// What becomes `/etc/machine-id`.
    pub machine_id: Hex<16>,
    /// Its name; the old one if there is none.
    pub hostname: Option<Hostname>,
    /// Interfaces that change.
    pub interfaces: Vec<Interface>,
}

/// An interface that changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// The address that it had.
    pub was: Mac,
    /// The address that it gets.
    pub mac: Option<Mac>,
    /// The IP address that it gets instead of all others of that family.
    pub address: Option<Network>,
    /// Where everything else is reached.
    pub gateway: Option<IpAddr>,
}

/// A host name: letters, digits, `-` and `.`, at most [`MAX_HOSTNAME`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hostname(String);

impl Hostname {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Hostname {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        match (1..=MAX_HOSTNAME).contains(&text.len()) && text.chars().all(plain) {
            true => Ok(Hostname(text.to_owned())),
            false => Err(ParseError::of("host name", text)),
        }
    }
}

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// The address.
    pub address: IpAddr,
    /// Bits of it that are the network's.
    pub prefix: u8,
}

impl FromStr for Network {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let failed = || ParseError::of("address with a prefix length", text);
        let (address, prefix) = text.split_once('/').ok_or_else(failed)?;
        let address: IpAddr = address.parse().map_err(|_| failed())?;
        let prefix = prefix.parse().map_err(|_| failed())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let is_host = !address.is_unspecified() && !address.is_multicast();
        match prefix <= most && is_host {
            true => Ok(Network { address, prefix }),
            false => Err(failed()),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Identity {
            seed,
            time,
            machine_id,
            hostname,
            interfaces,
        } = self;
        writeln!(
            f,
            "{FIRST}\nseed {seed}\ntime {time}\nmachine-id {machine_id}"
        )?;
        if let Some(name) = hostname {
            writeln!(f, "hostname {}", name.as_str())?;
        }
        for interface in interfaces {
            writeln!(f, "{interface}")?;
        }
        writeln!(f, "{LAST}")
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Interface {
            was,
            mac,
            address,
            gateway,
        } = self;
        write!(f, "interface {was}")?;
        if let Some(mac) = mac {
            write!(f, " mac={mac}")?;
        }
        if let Some(address) = address {
            write!(f, " address={address}")?;
        }
        if let Some(gateway) = gateway {
            write!(f, " gateway={gateway}")?;
        }
        Ok(())
    }
}

impl Identity {
    /// Whether all of a message is in `text`.
    pub fn is_whole(text: &[u8]) -> bool {
        text.ends_with(b"\nend\n")
    }
}

impl FromStr for Identity {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text.len() > MAX_MESSAGE {
            return Err(ParseError::Long);
        }
        let mut lines = text.strip_suffix('\n').ok_or(ParseError::Cut)?.split('\n');
        let first = lines.next().unwrap_or_default();
        if first != FIRST {
            return Err(ParseError::of("message of this version", first));
        }
        let mut fields = Fields::default();
        for line in lines.by_ref() {
            if line == LAST {
                break;
            }
            fields.take(line)?;
        }
        match lines.next() {
            None if text.ends_with("\nend\n") => fields.whole(),
            _ => Err(ParseError::Cut),
        }
    }
}

/// What was read so far.
#[derive(Default)]
struct Fields {
    seed: Option<Hex<64>>,
    time: Option<u64>,
    machine_id: Option<Hex<16>>,
    hostname: Option<Hostname>,
    interfaces: Vec<Interface>,
}

impl Fields {
    fn take(&mut self, line: &str) -> Result<(), ParseError> {
        let (key, value) = line.split_once(' ').unwrap_or((line, ""));
        match key {
            "seed" => line::once(&mut self.seed, key, value),
            "time" => line::once(&mut self.time, key, value),
            "machine-id" => line::once(&mut self.machine_id, key, value),
            "hostname" => line::once(&mut self.hostname, key, value),
            "interface" if self.interfaces.len() < MAX_INTERFACES => {
                self.interfaces.push(value.parse()?);
                Ok(())
            }
            _ => Err(ParseError::of("line", line)),
        }
    }

    fn whole(self) -> Result<Identity, ParseError> {
        let Fields {
            seed,
            time,
            machine_id,
            hostname,
            interfaces,
        } = self;
        Ok(Identity {
            seed: seed.ok_or(ParseError::Missing("seed"))?,
            time: time.ok_or(ParseError::Missing("time"))?,
            machine_id: machine_id.ok_or(ParseError::Missing("machine-id"))?,
            hostname,
            interfaces,
        })
    }
}

impl FromStr for Interface {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut words = text.split(' ');
        let (mut mac, mut address, mut gateway) = (None, None, None);
        let was = words.next().unwrap_or_default().parse()?;
        for word in words {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "mac" => line::once(&mut mac, key, value)?,
                "address" => line::once(&mut address, key, value)?,
                "gateway" => line::once(&mut gateway, key, value)?,
                _ => return Err(ParseError::of("part of an interface", word)),
            }
        }
        Interface {
            was,
            mac,
            address,
            gateway,
        }
        .checked()
    }
}

impl Interface {
    /// The interface, if its gateway can be reached by its address.
    pub fn checked(self) -> Result<Self, ParseError> {
        match (self.address, self.gateway) {
            (_, None) => Ok(self),
            (Some(network), Some(gateway)) if network.address.is_ipv4() == gateway.is_ipv4() => {
                Ok(self)
            }
            (_, Some(gateway)) => Err(ParseError::of(
                "gateway of the address",
                &gateway.to_string(),
            )),
        }
    }
}

#[cfg(test)]
mod tests;
