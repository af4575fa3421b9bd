//! The side that gets a machine.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use lepton_api::types::HugePages;
use lepton_hostio::listener::{BindError, SocketFile};
use lepton_hostio::packet::{Packet, PacketListener, PacketSocket};
use lepton_snapshot::MAX_STATE;
use lepton_snapshot::codec::{self, CodecError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::drives::{HandedError, NewFiles};
use super::message::{Answer, GO, MAX_MESSAGE, MORE, Machine, Offer, PATIENCE, READY, VERSION};
use crate::config::saved::{Overrides, SavedConfigError};
use crate::config::{Configuration, Shape};
use crate::controller::{Mailbox, Message};
use crate::identity::{Entropy, Identity, IdentityError, MAX_PATIENCE, Telling};
use crate::kvm::KvmError;
use crate::machine::restore::RestoreMachineError;
use crate::machine::state::MachineState;
use crate::memory::base::{Base, BaseError};
use crate::memory::place::Place;
use crate::memory::{self, MemoryError, Origin, Ram};
use crate::reach::ReachError;

/// Why an offered machine is refused. This process is as before.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum AdoptError {
    #[error("it has a machine already, or one is being configured")]
    Taken,
    #[error("offer: {0}")]
    Offer(#[source] CodecError),
    #[error("offer: version {0}; this program has {VERSION}")]
    Version(u16),
    #[error("offer: it comes without the machine")]
    Empty,
    #[error("offer: a machine of {0} bytes is none")]
    Length(u64),
    #[error("machine: {0}")]
    Machine(#[source] CodecError),
    #[error("its memory has {saved} bytes, its configuration says {configured}")]
    MemorySize { saved: u64, configured: u64 },
    #[error("offer: {0} descriptors are more than a machine has")]
    Descriptors(u32),
    #[error("drive {id}: {source}")]
    Drive { id: String, source: HandedError },
    #[error("memory: {0}")]
    Base(#[from] BaseError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("huge_pages 2M: such a machine cannot be cloned")]
    HugePages,
    #[error(transparent)]
    Config(#[from] SavedConfigError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Restore(#[from] RestoreMachineError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Files(#[from] ReachError),
    #[error("host: {0}")]
    Host(#[from] io::Error),
}

/// Where machines are offered.
pub enum Source {
    /// To who connects.
    Listener(PacketListener),
    /// Over this connection, once.
    Connected(PacketSocket),
}

impl Source {
    /// A socket at `path`, and what removes it in the end.
    pub fn bind(path: &Path) -> Result<(Self, SocketFile), BindError> {
        let (listener, file) = PacketListener::bind(path)?;
        Ok((Source::Listener(listener), file))
    }

    /// An inherited descriptor of a connected socket.
    pub fn inherited(number: RawFd) -> io::Result<Self> {
        Ok(Source::Connected(PacketSocket::inherited(number)?))
    }
}

/// Most descriptors of a machine: 59 devices of 250 layers each, and its memory.
const MAX_DESCRIPTORS: u32 = 16 << 10;

const LISTENER: u32 = 0;
const LINK: u32 = 1;

/// Waits for offers, one connection after the other.
pub struct Adopter {
    listener: Option<PacketListener>,
    link: Option<PacketSocket>,
    mailbox: Mailbox,
}

impl Adopter {
    /// Offers from `source` go to `mailbox`.
    pub fn new(source: Source, mailbox: Mailbox) -> Self {
        let (listener, link) = match source {
            Source::Listener(listener) => (Some(listener), None),
            Source::Connected(link) => (None, Some(link)),
        };
        Adopter {
            listener,
            link,
            mailbox,
        }
    }

    /// Tells whoever has connected it that it can become a machine.
    pub fn say_ready(&self) {
        // Who is gone will be noticed.
        if let Some(link) = &self.link {
            drop(link.send(READY, &[]));
        }
    }

    fn watch(&self, ops: &mut EventOps) {
        let (fd, data) = match (&self.link, &self.listener) {
            (Some(link), _) => (link.as_raw_fd(), LINK),
            (None, Some(listener)) => (listener.as_raw_fd(), LISTENER),
            (None, None) => return,
        };
        if let Err(error) = ops.add(Events::with_data_raw(fd, data, EventSet::IN)) {
            log::error!("cannot watch for machines: {error}");
        }
    }

    fn step(&mut self, data: u32) {
        if data == LISTENER {
            let accepted = self.listener.as_ref().map(PacketListener::accept);
            match accepted {
                Some(Ok(link)) => self.link = link,
                Some(Err(error)) => log::warn!("a machine cannot be taken: {error}"),
                None => {}
            }
            return;
        }
        let Some(socket) = self.link.take() else {
            return;
        };
        match socket.receive(MAX_MESSAGE) {
            Ok(Some(offer)) => self.mailbox.send(Message::Offer(Adoption {
                socket,
                offer,
                patience: PATIENCE,
            })),
            Ok(None) => self.link = Some(socket),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => log::warn!("a machine cannot be taken: {error}"),
        }
    }
}

impl MutEventSubscriber for Adopter {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        // What is watched changes with each step; nobody else connects meanwhile.
        if let Err(error) = ops.remove(Events::empty_raw(events.fd())) {
            log::error!("cannot stop watching for machines: {error}");
        }
        self.step(events.data());
        self.watch(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.watch(ops);
    }
}

/// A machine that is offered, and who offers it.
pub struct Adoption {
    socket: PacketSocket,
    offer: Packet,
    /// How long the others may take.
    patience: Duration,
}

/// What is needed to restore the machine.
pub struct Adopted {
    /// Its devices.
    pub configuration: Configuration,
    /// The rest of it.
    pub state: MachineState,
    /// Its memory, which is not mapped yet.
    pub base: Base,
    /// Whether this host's processor is known to have what it needs.
    pub has_run_here: bool,
    /// Whether it is to run at once.
    pub resume: bool,
    /// Whether there are no other copies.
    pub alone: bool,
    /// What was made for it.
    pub new_files: NewFiles,
    /// What its guest is to be told before it is a copy.
    pub telling: Option<Telling>,
}

/// Maps a machine's memory: in `place`, if that is as large.
pub fn map(base: Base, shape: Shape, place: Option<Place>) -> Result<Ram, AdoptError> {
    let memory = match place.filter(|place| place.suits(shape.memory, shape.huge_pages)) {
        Some(place) => place.fill(&base)?,
        None => {
            let memory = memory::allocate(shape.memory, shape.huge_pages)?;
            base.map(&memory, None)?;
            memory
        }
    };
    let ram = Ram::new(memory, Origin::Base(base));
    ram.protect();
    Ok(ram.tracked(shape.track_dirty_pages))
}

impl Adoption {
    /// Takes what is offered apart, and opens what the machine needs of the host.
    pub fn take(&mut self, entropy: &Entropy) -> Result<Adopted, AdoptError> {
        let (offer, behind) =
            codec::decode_front::<Offer>(&self.offer.bytes).map_err(AdoptError::Offer)?;
        if offer.version != VERSION {
            return Err(AdoptError::Version(offer.version));
        }
        let mut files = std::mem::take(&mut self.offer.files);
        if offer.files > MAX_DESCRIPTORS {
            return Err(AdoptError::Descriptors(offer.files));
        }
        while files.len() < offer.files as usize {
            let more = self.next_word(PATIENCE)?;
            if more.bytes != MORE || more.files.is_empty() {
                return Err(AdoptError::Empty);
            }
            files.extend(more.files);
        }
        let mut files = files.into_iter();
        let in_file;
        let machine = match offer.machine {
            None => behind,
            Some(_) if !behind.is_empty() => {
                return Err(AdoptError::Offer(CodecError::Trailing(behind.len())));
            }
            Some(length) => {
                let file = File::from(files.next().ok_or(AdoptError::Empty)?);
                let room = usize::try_from(length)
                    .ok()
                    .filter(|room| *room <= MAX_STATE);
                let mut bytes = vec![0; room.ok_or(AdoptError::Length(length))?];
                file.read_exact_at(&mut bytes, 0)?;
                in_file = bytes;
                &in_file
            }
        };
        let Machine {
            mut state,
            memory,
            extents,
            memory_files,
        } = codec::decode(machine).map_err(AdoptError::Machine)?;
        let of_memory = files.by_ref().take(memory_files as usize).collect();
        let base = Base::received(memory, extents, of_memory)?;
        self.patience = Duration::from_millis(offer.patience_ms).min(MAX_PATIENCE * 2);
        let telling = match offer.identity.map(Identity::try_from).transpose()? {
            Some(identity) => Some(identity.put_into(&mut state, entropy)?),
            None => None,
        };
        let overrides = Overrides {
            track_dirty_pages: offer.track_dirty_pages,
            ..Overrides::from(offer.changes)
        };
        state.config.apply(&overrides)?;
        let mut new_files = NewFiles::default();
        let mut images = Vec::new();
        for drive in offer.drives {
            let id = drive.drive_id.clone();
            let image = drive.take(&mut files, &mut new_files);
            images.push(image.map_err(|source| AdoptError::Drive { id, source })?);
        }
        let configuration = state.config.build(&overrides, images)?;
        let shape = configuration.shape();
        if shape.huge_pages == HugePages::Hugetlbfs2M {
            return Err(AdoptError::HugePages);
        }
        let (saved, configured) = (base.bytes(), shape.memory.bytes());
        if saved != configured {
            return Err(AdoptError::MemorySize { saved, configured });
        }
        Ok(Adopted {
            configuration,
            state,
            base,
            has_run_here: offer.has_run_here,
            resume: offer.resume,
            alone: offer.alone,
            new_files,
            telling,
        })
    }

    /// An error once nobody waits any more for this copy, the only one.
    pub fn is_awaited(&self) -> io::Result<()> {
        match self.socket.receive(MAX_MESSAGE)? {
            None => Ok(()),
            Some(_) => Err(io::Error::other("an unknown word")),
        }
    }

    /// Says that the machine is here, and unless it is `alone` waits until it may run. An error means that there is to be
    /// no copy.
    pub fn ready(&self, id: &str, alone: bool) -> io::Result<()> {
        self.answer(&Answer::Ready {
            id: id.to_owned(),
            pid: std::process::id(),
        })?;
        if alone {
            return Ok(());
        }
        // The other side waits for all the other copies before.
        match self.next_word(self.patience * 2)? {
            packet if packet.bytes == GO => Ok(()),
            _ => Err(io::Error::other("an unknown word")),
        }
    }

    fn next_word(&self, patience: Duration) -> io::Result<Packet> {
        let left = Timespec::try_from(patience).map_err(io::Error::other)?;
        let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
        loop {
            if let Some(packet) = self.socket.receive(MAX_MESSAGE)? {
                return Ok(packet);
            }
            match poll(&mut polled, Some(&left)) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Says that the machine is refused.
    pub fn refuse(&self, reason: &AdoptError) {
        // Who offers it may be gone.
        drop(self.answer(&Answer::Refused(reason.to_string())));
    }

    fn answer(&self, answer: &Answer) -> io::Result<()> {
        let bytes = codec::encode(answer).map_err(io::Error::other)?;
        self.socket.send(&bytes, &[])
    }
}
