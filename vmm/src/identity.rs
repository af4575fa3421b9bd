//! Who a copy of a machine is: asked for by a request, put into the saved machine before it is restored, and told to its
//! guest, which is held until it confirms (see [`lepton_identity`]).
//!
//! Held, the guest's vCPUs and drives run, as it could not take anything on otherwise. What it sends by its interfaces is
//! dropped, and what comes for them waits; by vsock nobody reaches it but this question, and it reaches nobody.

use std::net::IpAddr;
use std::time::Duration;

use lepton_api::types as wire;
use lepton_devices::virtio::state::DeviceState;
use lepton_devices::virtio::vsock::{Exchange, ExchangeError};
use lepton_identity::{self as told, Answer, Hex, Hostname, Mac, Network, ParseError};
use rustix::time::ClockId;
use serde::{Deserialize, Serialize};

use crate::clock::time_on;
use crate::controller::{Mailbox, Message};
use crate::machine::generation::Generation;
use crate::machine::state::MachineState;

/// Longest time that a guest may be given.
pub const MAX_PATIENCE: Duration = Duration::from_secs(600);

/// Random bytes of this process, drawn before it was confined: for the one machine that it will have.
#[derive(Clone)]
pub struct Entropy {
    /// For the guest's random generator.
    pub seed: [u8; 64],
    /// For its machine id.
    pub machine_id: [u8; 16],
    /// Its generation.
    pub generation: Generation,
}

/// Why a machine does not get the identity that it is to have.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum IdentityError {
    #[error("identity: {what}: {source}")]
    Field {
        what: &'static str,
        source: ParseError,
    },
    #[error("identity: timeout_ms {0} is not between 1 and {most}", most = MAX_PATIENCE.as_millis())]
    Patience(u64),
    #[error("identity: {0} interfaces are more than {most}", most = told::MAX_INTERFACES)]
    Many(usize),
    #[error("identity: the machine has no interface {0}")]
    Interface(String),
    #[error("identity: the machine has no vsock, by which its guest would be told")]
    NoVsock,
    #[error("identity: {0}")]
    Exchange(#[from] ExchangeError),
    #[error("identity: the guest's answer: {0}")]
    Answer(#[source] ParseError),
    #[error("identity: the guest: {0}")]
    Guest(String),
}

/// As it goes from one process to another: as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Wanted {
    pub hostname: Option<String>,
    pub machine_id: Option<String>,
    pub interfaces: Vec<WantedInterface>,
    pub timeout_ms: u64,
}

/// Addresses of an interface, as they were asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct WantedInterface {
    pub iface_id: String,
    pub mac: Option<[u8; 6]>,
    pub address: Option<String>,
    pub gateway: Option<String>,
}

impl From<&wire::Identity> for Wanted {
    fn from(wire: &wire::Identity) -> Self {
        let wire::Identity {
            hostname,
            machine_id,
            interfaces,
            timeout_ms,
        } = wire.clone();
        let interface = |interface| {
            let wire::IdentityInterface {
                iface_id,
                guest_mac,
                address,
                gateway,
            } = interface;
            WantedInterface {
                iface_id,
                mac: guest_mac.map(|mac| mac.0),
                address,
                gateway,
            }
        };
        Wanted {
            hostname,
            machine_id,
            interfaces: interfaces.into_iter().map(interface).collect(),
            timeout_ms,
        }
    }
}

/// An identity that a machine can have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    hostname: Option<Hostname>,
    machine_id: Option<Hex<16>>,
    interfaces: Vec<(String, Addresses)>,
    /// How long the guest may take.
    pub patience: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Addresses {
    mac: Option<Mac>,
    address: Option<Network>,
    gateway: Option<IpAddr>,
}

fn field<T>(what: &'static str, parsed: Result<T, ParseError>) -> Result<T, IdentityError> {
    parsed.map_err(|source| IdentityError::Field { what, source })
}

impl TryFrom<Wanted> for Identity {
    type Error = IdentityError;

    fn try_from(wanted: Wanted) -> Result<Self, IdentityError> {
        let Wanted {
            hostname,
            machine_id,
            interfaces,
            timeout_ms,
        } = wanted;
        let patience = Duration::from_millis(timeout_ms);
        if patience.is_zero() || patience > MAX_PATIENCE {
            return Err(IdentityError::Patience(timeout_ms));
        }
        if interfaces.len() > told::MAX_INTERFACES {
            return Err(IdentityError::Many(interfaces.len()));
        }
        let hostname = hostname.map(|name| name.parse()).transpose();
        let machine_id = machine_id.map(|id| id.parse()).transpose();
        let interfaces = interfaces.into_iter().map(|interface| {
            let id = interface.iface_id.clone();
            Addresses::try_from(interface).map(|addresses| (id, addresses))
        });
        Ok(Identity {
            hostname: field("hostname", hostname)?,
            machine_id: field("machine_id", machine_id)?,
            interfaces: interfaces.collect::<Result<_, IdentityError>>()?,
            patience,
        })
    }
}

impl TryFrom<WantedInterface> for Addresses {
    type Error = IdentityError;

    fn try_from(wanted: WantedInterface) -> Result<Self, IdentityError> {
        let WantedInterface {
            iface_id: _,
            mac,
            address,
            gateway,
        } = wanted;
        let address = address.map(|address| address.parse()).transpose();
        let gateway = gateway.map(|text| {
            let word = |_| ParseError::Word {
                what: "IP address",
                text: text.chars().take(40).collect(),
            };
            text.parse::<IpAddr>().map_err(word)
        });
        // Its old address does not matter here.
        let interface = told::Interface {
            was: Mac([0; 6]),
            mac: mac.map(Mac),
            address: field("address", address)?,
            gateway: field("gateway", gateway.transpose())?,
        };
        let interface = field("gateway", interface.checked())?;
        Ok(Addresses {
            mac: interface.mac,
            address: interface.address,
            gateway: interface.gateway,
        })
    }
}

impl Identity {
    /// Puts what the devices have of it into the machine, and returns what its guest is to be told.
    pub fn put_into(
        self,
        state: &mut MachineState,
        entropy: &Entropy,
    ) -> Result<Telling, IdentityError> {
        if state.config.vsock.is_none() {
            return Err(IdentityError::NoVsock);
        }
        let mut interfaces = Vec::with_capacity(self.interfaces.len());
        for (id, addresses) in self.interfaces {
            let Addresses {
                mac,
                address,
                gateway,
            } = addresses;
            let mut saved = state.config.interfaces.iter_mut().enumerate();
            let found = saved.find(|(_, saved)| saved.iface_id == id);
            // The devices stand in the order of the configuration.
            let mut nets = state
                .devices
                .iter_mut()
                .filter_map(|d| match &mut d.device {
                    DeviceState::Net(net) => Some(net),
                    _ => None,
                });
            let found = found.and_then(|(index, saved)| Some((saved, nets.nth(index)?)));
            let (saved, net) = found.ok_or(IdentityError::Interface(id))?;
            let was = Mac(net.mac);
            if let Some(mac) = mac {
                net.mac = mac.0;
                saved.guest_mac = Some(mac.0);
            }
            interfaces.push(told::Interface {
                was,
                mac,
                address,
                gateway,
            });
        }
        Ok(Telling {
            identity: told::Identity {
                seed: Hex(entropy.seed),
                time: 0,
                machine_id: self.machine_id.unwrap_or(Hex(entropy.machine_id)),
                hostname: self.hostname,
                interfaces,
            },
            patience: self.patience,
        })
    }
}

/// What the guest of a machine is to be told.
pub struct Telling {
    identity: told::Identity,
    patience: Duration,
}

impl Telling {
    /// The question to the guest. What came of it goes to `mailbox`.
    pub fn exchange(self, mailbox: Mailbox) -> Exchange {
        let Telling {
            mut identity,
            patience,
        } = self;
        Exchange {
            port: told::PORT,
            patience,
            question: Box::new(move || {
                // The year 2554 is far away.
                identity.time = time_on(ClockId::Realtime).as_nanos() as u64;
                identity.to_string().into_bytes()
            }),
            answered: Box::new(move |answer| mailbox.send(Message::Identified(read(answer)))),
        }
    }
}

fn read(answer: Result<Vec<u8>, ExchangeError>) -> Result<(), IdentityError> {
    let line = answer?;
    let line = String::from_utf8_lossy(&line);
    match line.parse().map_err(IdentityError::Answer)? {
        Answer::Done => Ok(()),
        Answer::Failed(reason) => Err(IdentityError::Guest(reason)),
    }
}
