//! The side that has the machine.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use lepton_api::types::{Cloned, ClonedChild};
use lepton_hostio::packet::MAX_FILES;
use lepton_snapshot::codec::{self, CodecError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::drives::Drives;
use super::heirs::{Heir, Heirs, MAX_CHILDREN};
use super::message::{Answer, GO, MAX_BEHIND, MAX_MESSAGE, MORE, Machine, Offer, VERSION};
use super::pool::Taken;
use crate::config::devices::DeviceConfigError;
use crate::config::devices::sharing::SharedDrive;
use crate::identity::{IdentityError, MAX_PATIENCE};
use crate::kvm::KvmError;
use crate::machine::state::{MachineState, SaveError};
use crate::memory::base;
use crate::memory::freeze::{FreezeError, Frozen, OldMapping};
use crate::reach::{self, ReachError};

/// Most bytes of a reason that another process gives.
const MAX_REASON: usize = 1000;

/// Why there are no copies. The machine goes on as before.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CloneError {
    #[error("{0} children are not between 1 and {MAX_CHILDREN}")]
    Count(usize),
    #[error("timeout_ms {0} is not between 1 and {most}", most = MAX_PATIENCE.as_millis())]
    Patience(u64),
    #[error("adopt_socket: each child needs one, or pool names where they come from")]
    Neither,
    #[error("adopt_socket: the children come from the pool")]
    Both,
    #[error("pool {}: {source}", path.display())]
    Pool { path: PathBuf, source: io::Error },
    #[error("adopt_socket {} stands there twice", .0.display())]
    Twice(PathBuf),
    #[error("adopt_socket {}: {source}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error(
        "drive {0} can be written to: give each child an image of its own, with the same content, by drive_overrides, or \
         the machine an overlay for it, before it starts"
    )]
    Writable(String),
    #[error("overlays: there is no drive {0} with an overlay that can be written to")]
    NoOverlay(String),
    #[error("overlays: drive {0} is elsewhere by drive_overrides, which name its overlay too")]
    Elsewhere(String),
    #[error(transparent)]
    Drive(#[from] DeviceConfigError),
    #[error(
        "drive {drive}: what a child writes cannot have a file: {source}; overlays names one that the child makes"
    )]
    NoRoom { drive: String, source: io::Error },
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("it cannot stand still: {0}")]
    Pause(#[source] lepton_devices::virtio::device::DeviceError),
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    #[error("child {child}: {source}")]
    Identity {
        child: String,
        source: IdentityError,
    },
    #[error(transparent)]
    Encode(#[from] CodecError),
    #[error(transparent)]
    Files(#[from] ReachError),
    #[error("host: {0}")]
    Host(#[from] io::Error),
    #[error("child {child}: {source}")]
    Child { child: String, source: io::Error },
    #[error("child {child}: {reason}")]
    Refused { child: String, reason: String },
    #[error("child {child}: no answer within {patience:?}")]
    Silent { child: String, patience: Duration },
}

/// A machine on its way to those who get a copy. The machine itself goes on. Dropped, there are no copies.
pub struct HandOver {
    /// Who gets it.
    pub heirs: Heirs,
    /// All but its memory and its drives.
    pub state: MachineState,
    /// Its memory.
    pub memory: Frozen,
    /// Its drives.
    pub drives: Vec<SharedDrive>,
    /// Whether it has run on this host.
    pub has_run_here: bool,
    /// Whether it keeps a record of written pages.
    pub track_dirty_pages: bool,
}

/// How a machine stood still.
#[derive(Debug, Clone, Copy)]
pub struct Pause {
    /// For how long.
    pub length: Duration,
    /// When that ended.
    pub end: Instant,
}

impl Pause {
    /// From `start` until now.
    pub fn since(start: Instant) -> Self {
        let end = Instant::now();
        let length = end - start;
        Pause { length, end }
    }

    /// That of a machine that does not run.
    pub fn none() -> Self {
        Pause::since(Instant::now())
    }
}

/// What came of it.
pub struct Finished {
    /// The copies, or why there are none.
    pub result: Result<Cloned, CloneError>,
    /// To be dropped when there is time.
    pub leftovers: Vec<OldMapping>,
}

impl HandOver {
    /// Gives all of them the machine.
    pub fn offer(self) -> Offered {
        let HandOver {
            heirs,
            state,
            memory:
                Frozen {
                    base,
                    copied,
                    leftovers,
                },
            drives,
            has_run_here,
            track_dirty_pages,
        } = self;
        let machine = Machine {
            state,
            memory: base.bytes(),
            extents: base.extents().to_vec(),
            memory_files: base.files().len() as u32,
        };
        let terms = Terms {
            resume: heirs.resume,
            alone: heirs.count() == 1,
            has_run_here,
            track_dirty_pages,
            patience: heirs.patience,
        };
        Offered {
            given: give(heirs, &machine, &base, drives, terms),
            copied,
            leftovers,
        }
    }
}

/// A machine that its heirs have before them. Dropped, there are no copies: that closes their sockets, and who has the machine
/// already ends.
pub struct Offered {
    given: Result<Given, CloneError>,
    copied: u64,
    leftovers: Vec<OldMapping>,
}

struct Given {
    heirs: Vec<Heir>,
    taken: Option<Taken>,
    terms: Terms,
}

impl Offered {
    /// Waits until all of them have it, and lets them run, or none. Takes a while, and gives up the files of this thread: for
    /// a thread of its own. `told` tells of the machine's pause, which has ended then.
    pub fn finish(self, told: &Receiver<Pause>) -> Finished {
        let copied_bytes = self.copied;
        let given = self.given.and_then(|given| given.finish(told));
        let result = given.map(|(children, pause)| Cloned {
            pause_us: microseconds(pause.length),
            copied_bytes,
            children,
        });
        Finished {
            result,
            leftovers: self.leftovers,
        }
    }
}

impl Given {
    fn finish(self, told: &Receiver<Pause>) -> Result<(Vec<ClonedChild>, Pause), CloneError> {
        let Given {
            heirs,
            taken,
            terms,
        } = self;
        // What comes now comes from others.
        reach::give_up_files()?;
        let pause = told.recv().map_err(io::Error::other)?;
        let children = collect(&heirs, terms.patience, pause.end)?;
        if !terms.alone {
            for heir in &heirs {
                // One that has ended since it was ready has ended as a machine may end.
                if let Err(error) = heir.socket.send(GO, &[]) {
                    log::warn!("clone {}: {error}", heir.copy.child);
                }
            }
        }
        if let Some(taken) = taken {
            taken.keep();
        }
        Ok((children, pause))
    }
}

fn give(
    heirs: Heirs,
    machine: &Machine,
    memory: &base::Base,
    drives: Vec<SharedDrive>,
    terms: Terms,
) -> Result<Given, CloneError> {
    let (heirs, taken) = heirs.gather()?;
    offer(&heirs, machine, memory, &Drives::new(drives)?, &terms)?;
    Ok(Given {
        heirs,
        taken,
        terms,
    })
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// What is the same for all copies.
struct Terms {
    resume: bool,
    alone: bool,
    has_run_here: bool,
    track_dirty_pages: bool,
    patience: Duration,
}

fn offer(
    heirs: &[Heir],
    machine: &Machine,
    memory: &base::Base,
    drives: &Drives,
    terms: &Terms,
) -> Result<(), CloneError> {
    let bytes = codec::encode(machine)?;
    let (behind, file) = match bytes.len() {
        0..=MAX_BEHIND => (bytes.as_slice(), None),
        length => {
            let file = base::new_file(length as u64)?;
            file.write_all_at(&bytes, 0)?;
            base::seal(&file)?;
            (&[][..], Some(file))
        }
    };
    let of_memory = memory.files().iter().map(|file| file.as_fd());
    let common: Vec<_> = file.iter().map(AsFd::as_fd).chain(of_memory).collect();
    for heir in heirs {
        let parcel = drives.parcel(&heir.copy.wants)?;
        let mut files = common.clone();
        files.extend(parcel.files());
        let offer = Offer {
            version: VERSION,
            machine: file.is_some().then_some(bytes.len() as u64),
            changes: heir.copy.changes.clone(),
            resume: terms.resume,
            track_dirty_pages: terms.track_dirty_pages,
            alone: terms.alone,
            has_run_here: terms.has_run_here,
            drives: parcel.drives.clone(),
            files: files.len() as u32,
            identity: heir.copy.identity.clone(),
            patience_ms: u64::try_from(terms.patience.as_millis()).unwrap_or(u64::MAX),
        };
        let (first, rest) = files.split_at(files.len().min(MAX_FILES));
        let mut message = codec::encode(&offer)?;
        message.extend_from_slice(behind);
        let mut sent = heir.socket.send(&message, first);
        for more in rest.chunks(MAX_FILES) {
            sent = sent.and_then(|()| heir.socket.send(MORE, more));
        }
        sent.map_err(|source| heir.failed(source))?;
    }
    Ok(())
}

/// Waits until all are ready, and no longer than `patience`.
fn collect(
    heirs: &[Heir],
    patience: Duration,
    since: Instant,
) -> Result<Vec<ClonedChild>, CloneError> {
    let deadline = Instant::now() + patience;
    let mut ready: Vec<Option<ClonedChild>> = vec![None; heirs.len()];
    loop {
        let waiting: Vec<usize> = (0..heirs.len()).filter(|i| ready[*i].is_none()).collect();
        let Some(first) = waiting.first() else {
            return Ok(ready.into_iter().flatten().collect());
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let silent = || CloneError::Silent {
            child: heirs[*first].copy.child.clone(),
            patience,
        };
        if left.is_zero() {
            return Err(silent());
        }
        let sockets = waiting.iter().map(|index| &heirs[*index].socket);
        let mut polled: Vec<_> = sockets
            .map(|socket| PollFd::new(socket, PollFlags::IN))
            .collect();
        let left = Timespec::try_from(left).map_err(|_| silent())?;
        match poll(&mut polled, Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(CloneError::Host(error.into())),
        }
        let changed: Vec<bool> = polled.iter().map(|p| !p.revents().is_empty()).collect();
        for (index, changed) in waiting.into_iter().zip(changed) {
            if changed && let Some((id, pid)) = heirs[index].answer()? {
                let ready_us = microseconds(since.elapsed());
                ready[index] = Some(ClonedChild { id, pid, ready_us });
            }
        }
    }
}

impl Heir {
    fn failed(&self, source: io::Error) -> CloneError {
        CloneError::Child {
            child: self.copy.child.clone(),
            source,
        }
    }

    fn refused(&self, reason: &str) -> CloneError {
        let clean = |character: char| match character.is_control() {
            true => ' ',
            false => character,
        };
        CloneError::Refused {
            child: self.copy.child.clone(),
            reason: reason.chars().take(MAX_REASON).map(clean).collect(),
        }
    }

    /// The id and process id of one that is ready, if it has said something.
    fn answer(&self) -> Result<Option<(String, u32)>, CloneError> {
        let packet = match self.socket.receive(MAX_MESSAGE) {
            Ok(Some(packet)) => packet,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(self.refused("it ended, or has a machine already"));
            }
            Err(error) => return Err(self.failed(error)),
        };
        match codec::decode(&packet.bytes) {
            Ok(Answer::Ready { id, pid }) if crate::cli::parse_id(&id).is_ok() => {
                Ok(Some((id, pid)))
            }
            Ok(Answer::Ready { .. }) => Err(self.refused("its id is none")),
            Ok(Answer::Refused(reason)) => Err(self.refused(&reason)),
            Err(error) => Err(self.refused(&error.to_string())),
        }
    }
}
