//! The owner of the machine: takes one action at a time, asks the policy, acts, answers.

mod clone;
mod dispatch;
mod held;
mod mailbox;
mod phase;
pub mod policy;
mod ready;
mod snapshot;
mod telemetry;

pub use self::dispatch::{Controller, Next, Options};
pub use self::mailbox::{Inbox, Mailbox, Message, mailbox};
