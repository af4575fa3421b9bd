//! What the two processes say to each other.

use std::time::Duration;

use lepton_api::types::{CloneChild, DriveOverlay, DriveOverride};
use serde::{Deserialize, Serialize};

use super::drives::HandedDrive;
use crate::config::saved::{Overrides, SavedOverlay};
use crate::identity::Wanted;
use crate::machine::state::MachineState;
use crate::memory::base::Extent;

/// Version of all of this. Both sides have the same.
pub const VERSION: u16 = 6;
/// Most bytes of a message.
pub const MAX_MESSAGE: usize = 64 << 10;
/// How long one side waits for the other.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes of a machine that go with the offer itself. A file for them would cost each side more than the copy.
pub const MAX_BEHIND: usize = 16 << 10;
/// Comes with further descriptors.
pub const MORE: &[u8] = b"more";
/// What a process says that was started with a connection, once it can become a machine.
pub const READY: &[u8] = b"ready";
/// The last word.
pub const GO: &[u8] = b"go";

/// A machine is offered. The [`Machine`] lies behind it in the message, or if it is larger than [`MAX_BEHIND`] in the first
/// descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// [`VERSION`].
    pub version: u16,
    /// Bytes of the machine in the first descriptor; none where it lies behind the offer.
    pub machine: Option<u64>,
    /// What is different in the copy.
    pub changes: Changes,
    /// Whether it is to run at once.
    pub resume: bool,
    /// Whether a record of written pages is kept, as the machine does.
    pub track_dirty_pages: bool,
    /// Whether the machine has run on this host: then its processor has what the machine needs.
    pub has_run_here: bool,
    /// Whether there are no other copies to wait for: then there is no last word either.
    pub alone: bool,
    /// Drives that are open already. Their descriptors come behind those of memory.
    pub drives: Vec<HandedDrive>,
    /// Descriptors in all. What one message has no room for comes with others, [`MORE`].
    pub files: u32,
    /// Who the copy is, if it is to be another machine.
    pub identity: Option<Wanted>,
    /// Milliseconds that any of the copies may take.
    pub patience_ms: u64,
}

/// What is different in a copy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// Interface and tap.
    pub taps: Vec<(String, String)>,
    /// Drive and image, and its overlay if that is another one.
    pub images: Vec<(String, String, Option<SavedOverlay>)>,
    /// Socket of the vsock.
    pub socket: Option<String>,
}

impl From<&CloneChild> for Changes {
    fn from(child: &CloneChild) -> Self {
        let taps = child.network_overrides.iter();
        let images = child.drive_overrides.iter();
        Changes {
            taps: taps
                .map(|tap| (tap.iface_id.clone(), tap.host_dev_name.clone()))
                .collect(),
            images: images
                .map(|image| {
                    let overlay = image.overlay.as_ref().map(SavedOverlay::from);
                    (image.drive_id.clone(), image.path_on_host.clone(), overlay)
                })
                .collect(),
            socket: child.vsock_override.as_ref().map(|o| o.uds_path.clone()),
        }
    }
}

impl From<Changes> for Overrides {
    fn from(changes: Changes) -> Self {
        let Changes {
            taps,
            images,
            socket,
        } = changes;
        let images = images.into_iter();
        Overrides {
            taps,
            images: images
                .map(|(drive_id, path_on_host, overlay)| DriveOverride {
                    drive_id,
                    path_on_host,
                    overlay: overlay.as_ref().map(DriveOverlay::from),
                })
                .collect(),
            socket,
            ..Default::default()
        }
    }
}

/// The machine that is offered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// All but its memory.
    pub state: MachineState,
    /// Bytes of memory.
    pub memory: u64,
    /// Where memory is: in the descriptors behind the first.
    pub extents: Vec<Extent>,
    /// How many those are.
    pub memory_files: u32,
}

/// What is said to an offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The machine is here and stands still.
    Ready {
        /// The id of the process.
        id: String,
        /// Its process id.
        pid: u32,
    },
    /// It is not, for this reason.
    Refused(String),
}
