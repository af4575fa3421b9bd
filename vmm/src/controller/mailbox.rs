//! How other threads reach the controller: a queue of messages and a descriptor that wakes the event loop.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use lepton_api::{Action, Fault, Reply};
use vmm_sys_util::eventfd::EventFd;

use crate::clone::Adoption;
use crate::exit::ExitCode;
use crate::identity::IdentityError;
use crate::vcpu::Stop;

/// What the controller is told.
pub enum Message {
    /// A client's request.
    Request {
        /// What to do.
        action: Action,
        /// Where the answer goes.
        reply: SyncSender<Result<Reply, Fault>>,
    },
    /// A machine is offered to this process.
    Offer(Adoption),
    /// There was nothing to do for a while since the process waits for a machine.
    NothingYet,
    /// The machine's guest has taken on who it is, or has not.
    Identified(Result<(), IdentityError>),
    /// The machine stopped by itself.
    Stopped(Stop),
    /// The process is to end.
    End(ExitCode),
    /// It is time to write metrics.
    MetricsDue,
}

/// The sending side.
#[derive(Clone)]
pub struct Mailbox {
    sender: Sender<Message>,
    wake: Arc<EventFd>,
}

/// The receiving side.
pub struct Inbox {
    receiver: Receiver<Message>,
    wake: Arc<EventFd>,
}

/// A new mailbox.
pub fn mailbox() -> io::Result<(Mailbox, Inbox)> {
    let (sender, receiver) = channel();
    let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
    let inbox = Inbox {
        receiver,
        wake: wake.clone(),
    };
    Ok((Mailbox { sender, wake }, inbox))
}

impl Mailbox {
    /// Leaves a message.
    pub fn send(&self, message: Message) {
        // The controller is gone only when the process is ending.
        if self.sender.send(message).is_ok() {
            drop(self.wake.write(1));
        }
    }

    /// Leaves a request and waits for the answer.
    pub fn request(&self, action: Action) -> Result<Reply, Fault> {
        let (reply, answer) = sync_channel(1);
        self.send(Message::Request { action, reply });
        answer.recv().unwrap_or_else(|_| {
            Err(Fault {
                status: 500,
                message: "the VMM is ending".into(),
            })
        })
    }
}

impl Inbox {
    /// The next message, if there is one.
    pub fn next(&self) -> Option<Message> {
        self.receiver.try_recv().ok()
    }

    /// What makes the event loop return when a message comes.
    pub fn waker(&self) -> Box<dyn MutEventSubscriber + Send> {
        Box::new(Wake(self.wake.clone()))
    }
}

struct Wake(Arc<EventFd>);

impl MutEventSubscriber for Wake {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        // Watched for edges: the event loop's return is all that is needed.
    }

    fn init(&mut self, ops: &mut EventOps) {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::with_data_raw(self.0.as_raw_fd(), 0, edge)) {
            log::error!("cannot watch the mailbox: {error}");
        }
    }
}
