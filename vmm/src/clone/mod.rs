//! Copies of a machine that runs, each in a process that was started before.
//!
//! ```text
//!  the machine's process                              a process started with --adopt
//!  pause; while the vCPUs come out of the guest
//!  connect, or ask a pool ------------------------->  accept
//!  save, freeze memory
//!  Offer, descriptors     ------------------------->  check, open devices, map memory, restore
//!  go on
//!                         <-------------------------  Ready, or Refused (and waits for another)
//!  all are ready: go      ------------------------->  the machine runs
//!  else: close            ------------------------->  end
//! ```
//!
//! Nothing waits for another process but a thread of its own. Many are connected to before the pause, and get their offers from
//! that thread. One copy alone need not wait for the last word.
//!
//! One message each, over a socket of type SOCK_SEQPACKET; only the offer may have others behind it, with the descriptors
//! that one message has no room for. With the offer go descriptors: of the state, encoded as in a snapshot, of the files
//! that memory is in (see [`crate::memory::base`]), and of drives' images (see [`drives`]). A VMM in a jail can neither fork nor start
//! programs, so it is others who start the processes; in return each is in a jail of its own, and may have its own user.
//! Neither side believes the other: what comes is bounded and checked, and nobody waits for ever.

mod adopt;
mod drives;
mod hand_over;
mod heirs;
pub mod message;
mod pool;
mod template;

pub use adopt::{AdoptError, Adopter, Adoption, Source, map};
pub use drives::{NewFiles, wanted as wanted_drives};
pub use hand_over::{CloneError, Finished, HandOver, Offered, Pause};
pub use heirs::Named;
pub use template::{Template, TemplateError};
