//! Who gets copies of a machine: processes that wait, each at a socket of its own, or all in a pool.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lepton_api::types::{CloneChild, CloneMachine};
use lepton_hostio::packet::PacketSocket;

use super::drives::Wants;
use super::hand_over::CloneError;
use super::message::Changes;
use super::pool::{Asked, Taken};
use crate::identity::{Identity, MAX_PATIENCE, Wanted};

/// Most copies in one request.
pub const MAX_CHILDREN: usize = 1000;

/// What is different in a copy.
pub struct Differences {
    /// The process that becomes it, for messages.
    pub child: String,
    /// Devices that are others.
    pub changes: Changes,
    /// Drives' files.
    pub wants: Wants,
    /// Who it is.
    pub identity: Option<Wanted>,
}

/// A process that waits for a machine, and its copy.
pub struct Heir {
    /// The process.
    pub socket: PacketSocket,
    /// Its copy.
    pub copy: Differences,
}

/// The processes that a request names. They know nothing of it yet.
pub struct Named {
    copies: Vec<Differences>,
    at: At,
    resume: bool,
    /// How long a pool may take.
    of_pool: Duration,
    /// How long any of them may take.
    patience: Duration,
}

/// Where they are.
enum At {
    /// Each at one of these sockets.
    Sockets(Vec<PathBuf>),
    /// In the pool at this one.
    Pool(PathBuf),
}

impl Named {
    /// Those of `request`.
    pub fn of(request: &CloneMachine) -> Result<Self, CloneError> {
        let children = &request.children;
        if children.is_empty() || children.len() > MAX_CHILDREN {
            return Err(CloneError::Count(children.len()));
        }
        let patience = Duration::from_millis(request.timeout_ms);
        if patience.is_zero() || patience > MAX_PATIENCE {
            return Err(CloneError::Patience(request.timeout_ms));
        }
        let mut of_guests = Duration::ZERO;
        let mut copies = Vec::with_capacity(children.len());
        for (index, child) in children.iter().enumerate() {
            let copy = differences(index, child);
            if let Some(identity) = copy.identity.clone() {
                let identity = Identity::try_from(identity);
                let identity = identity.map_err(|source| CloneError::Identity {
                    child: copy.child.clone(),
                    source,
                })?;
                of_guests = of_guests.max(identity.patience);
            }
            copies.push(copy);
        }
        let at = match &request.pool {
            None => At::Sockets(sockets(children)?),
            Some(_) if children.iter().any(|child| child.adopt_socket.is_some()) => {
                return Err(CloneError::Both);
            }
            Some(pool) => At::Pool(pool.clone()),
        };
        Ok(Named {
            copies,
            at,
            resume: request.resume_children,
            of_pool: patience,
            patience: patience + of_guests,
        })
    }

    /// Whether there are so many to connect to that it takes a while.
    pub fn are_scattered(&self) -> bool {
        matches!(&self.at, At::Sockets(paths) if paths.len() > 1)
    }

    /// Connects to all of them. Nothing of this waits for them.
    pub fn connect(&self) -> Result<Links, CloneError> {
        Ok(match &self.at {
            At::Sockets(paths) => {
                let links = paths.iter().map(|path| connect(path));
                Links::Direct(links.collect::<Result<_, _>>()?)
            }
            At::Pool(path) => Links::Pool(Asked::new(path, self.copies.len(), self.of_pool)?),
        })
    }

    /// They, and the connections to them.
    pub fn with(self, links: Links) -> Heirs {
        Heirs {
            copies: self.copies,
            links,
            resume: self.resume,
            patience: self.patience,
        }
    }
}

/// Connections to those that a request names.
pub enum Links {
    /// To each one.
    Direct(Vec<PacketSocket>),
    /// To a pool, which will give them.
    Pool(Asked),
}

/// Those who get copies, and which are asked. Dropped, they wait for another machine.
pub struct Heirs {
    copies: Vec<Differences>,
    links: Links,
    /// Whether the copies are to run at once.
    pub resume: bool,
    /// How long any of them may take.
    pub patience: Duration,
}

impl Heirs {
    /// How many they are.
    pub fn count(&self) -> usize {
        self.copies.len()
    }

    /// Whether there is one only, and it is there: to give it the machine takes little.
    pub fn is_one_at_hand(&self) -> bool {
        let at_hand = match &self.links {
            Links::Direct(_) => true,
            Links::Pool(asked) => asked.has_answered(),
        };
        self.count() == 1 && at_hand
    }

    /// Waits until a pool has given all, which takes a while if it has to start some: not for the event loop.
    pub fn gather(self) -> Result<(Vec<Heir>, Option<Taken>), CloneError> {
        let (sockets, taken) = match self.links {
            Links::Direct(sockets) => (sockets, None),
            Links::Pool(asked) => {
                let (sockets, taken) = asked.wait()?;
                (sockets, Some(taken))
            }
        };
        let heirs = sockets.into_iter().zip(self.copies);
        let heirs = heirs.map(|(socket, copy)| Heir { socket, copy });
        Ok((heirs.collect(), taken))
    }
}

fn differences(index: usize, child: &CloneChild) -> Differences {
    Differences {
        child: match &child.adopt_socket {
            Some(path) => path.display().to_string(),
            None => format!("children[{index}]"),
        },
        changes: Changes::from(child),
        wants: Wants::from(child),
        identity: child.identity.as_ref().map(Wanted::from),
    }
}

fn sockets(children: &[CloneChild]) -> Result<Vec<PathBuf>, CloneError> {
    let mut seen = BTreeSet::new();
    let mut paths = Vec::with_capacity(children.len());
    for child in children {
        let path = child.adopt_socket.as_ref().ok_or(CloneError::Neither)?;
        if !seen.insert(path) {
            return Err(CloneError::Twice(path.clone()));
        }
        paths.push(path.clone());
    }
    Ok(paths)
}

fn connect(path: &Path) -> Result<PacketSocket, CloneError> {
    PacketSocket::connect(path).map_err(|source| CloneError::Connect {
        path: path.to_owned(),
        source,
    })
}
