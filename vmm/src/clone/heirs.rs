//! Who gets copies of a machine: processes that wait, each at a socket of its own, or all in a pool.

use std::collections::BTreeSet;
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

/// The processes that a request names, and which are asked. Dropped, they wait for another machine.
pub struct Heirs {
    copies: Vec<Differences>,
    place: Place,
    /// Whether the copies are to run at once.
    pub resume: bool,
    /// How long any of them may take.
    pub patience: Duration,
}

/// Where they are.
enum Place {
    /// Each at the other end of one of these.
    Sockets(Vec<PacketSocket>),
    /// In a pool, which will give them.
    Pool(Asked),
}

impl Heirs {
    /// Connects to all that `request` names. Nothing of this waits for them.
    pub fn ask(request: &CloneMachine) -> Result<Self, CloneError> {
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
        let place = match &request.pool {
            None => Place::Sockets(connect(children)?),
            Some(_) if children.iter().any(|child| child.adopt_socket.is_some()) => {
                return Err(CloneError::Both);
            }
            Some(pool) => Place::Pool(Asked::new(pool, children.len(), patience)?),
        };
        Ok(Heirs {
            copies,
            place,
            resume: request.resume_children,
            patience: patience + of_guests,
        })
    }

    /// How many they are.
    pub fn count(&self) -> usize {
        self.copies.len()
    }

    /// Whether there is one only, and it is there: to give it the machine takes little.
    pub fn is_one_at_hand(&self) -> bool {
        let at_hand = match &self.place {
            Place::Sockets(_) => true,
            Place::Pool(asked) => asked.has_answered(),
        };
        self.count() == 1 && at_hand
    }

    /// Waits until a pool has given all, which takes a while if it has to start some: not for the event loop.
    pub fn gather(self) -> Result<(Vec<Heir>, Option<Taken>), CloneError> {
        let (sockets, taken) = match self.place {
            Place::Sockets(sockets) => (sockets, None),
            Place::Pool(asked) => {
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

fn connect(children: &[CloneChild]) -> Result<Vec<PacketSocket>, CloneError> {
    let mut seen = BTreeSet::new();
    let mut sockets = Vec::with_capacity(children.len());
    for child in children {
        let path = child.adopt_socket.as_ref().ok_or(CloneError::Neither)?;
        if !seen.insert(path) {
            return Err(CloneError::Twice(path.clone()));
        }
        let socket = PacketSocket::connect(path).map_err(|source| CloneError::Connect {
            path: path.clone(),
            source,
        })?;
        sockets.push(socket);
    }
    Ok(sockets)
}
