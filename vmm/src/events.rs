//! From an event to the device that it is for: kicks by the driver and events of backends, one subscriber a device.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber};
use lepton_devices::guest_warn;
use lepton_devices::virtio::device::{DeviceError, Progress, VirtioDevice};
use lepton_devices::virtio::interrupt::Interrupt;
use lepton_devices::virtio::transport::mmio::{SharedDevice, lock};
use vmm_sys_util::eventfd::EventFd;

/// The event loop of the process.
pub type Loop = EventManager<Box<dyn MutEventSubscriber + Send>>;

/// Events taken from the kernel at a time; what does not fit comes with the next turn.
const EVENTS: usize = 32;

/// An event loop without descriptors.
pub fn new_loop() -> Result<Loop, event_manager::Error> {
    Loop::new_with_capacity(EVENTS)
}

/// Every descriptor is watched for edges: an eventfd need never be read, and one that stays readable does not spin.
const EDGE: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

/// Whether devices may touch guest memory. Shared by a machine and its devices' subscribers.
#[derive(Default)]
pub struct DevicesPaused(AtomicBool);

impl DevicesPaused {
    /// Sets it. Devices catch up on what they missed once woken (see [`DeviceEvents::waker`]).
    pub fn set(&self, paused: bool) {
        self.0.store(paused, Ordering::SeqCst);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Queue(usize),
    Source(usize),
}

/// Hands one device its events.
pub struct DeviceEvents {
    id: String,
    device: SharedDevice,
    interrupt: Arc<Interrupt>,
    paused: Arc<DevicesPaused>,
    kicks: Vec<EventFd>,
    sources: Vec<RawFd>,
    /// Work that reached its bound and is to go on after the other devices had their turn.
    unfinished: Vec<Work>,
    again: EventFd,
    /// Something happened while the machine was paused, or may have.
    missed: Arc<AtomicBool>,
}

/// Makes a device go on.
pub struct Waker {
    again: EventFd,
    missed: Arc<AtomicBool>,
}

impl Waker {
    /// With what it did not finish, or did not see.
    pub fn wake(&self) {
        // A full counter is a pending event all the same.
        drop(self.again.write(1));
    }

    /// With all its queues and sources.
    pub fn wake_for_everything(&self) {
        self.missed.store(true, Ordering::SeqCst);
        self.wake();
    }
}

impl DeviceEvents {
    /// A subscriber for `device`, whose queue `i` is kicked by `kicks[i]`.
    pub fn new(
        id: String,
        device: SharedDevice,
        interrupt: Arc<Interrupt>,
        kicks: Vec<EventFd>,
        paused: Arc<DevicesPaused>,
    ) -> std::io::Result<Self> {
        let sources = lock(&device).sources();
        Ok(DeviceEvents {
            id,
            device,
            interrupt,
            paused,
            kicks,
            sources,
            unfinished: Vec::new(),
            again: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            missed: Arc::default(),
        })
    }

    /// What makes it go on after a pause.
    pub fn waker(&self) -> std::io::Result<Waker> {
        Ok(Waker {
            again: self.again.try_clone()?,
            missed: self.missed.clone(),
        })
    }

    /// Lets the next waking look at everything: the device was restored, and what had come before is not known.
    pub fn expect_everything(&self) {
        self.missed.store(true, Ordering::SeqCst);
    }

    fn everything(&self) -> Vec<Work> {
        let queues = (0..self.kicks.len()).map(Work::Queue);
        let sources = (0..self.sources.len()).map(Work::Source);
        queues.chain(sources).collect()
    }

    fn work_for(&mut self, token: usize) -> Vec<Work> {
        let (queues, sources) = (self.kicks.len(), self.sources.len());
        if token < queues {
            vec![Work::Queue(token)]
        } else if token < queues + sources {
            vec![Work::Source(token - queues)]
        } else if self.missed.swap(false, Ordering::SeqCst) {
            self.unfinished.clear();
            self.everything()
        } else {
            std::mem::take(&mut self.unfinished)
        }
    }

    fn run(&mut self, work: Work) {
        if self.interrupt.is_broken() {
            return;
        }
        let mut device = lock(&self.device);
        match perform(&mut *device, work) {
            Ok(Progress::Done) => {}
            Ok(Progress::Again) => {
                if !self.unfinished.contains(&work) {
                    self.unfinished.push(work);
                }
                // A full counter is a pending event all the same.
                drop(self.again.write(1));
            }
            Err(error) => {
                // Before a reset can come in between: what went wrong is not the business of the driver after that.
                self.interrupt.needs_reset();
                drop(device);
                guest_warn!("device {}: {error}; it needs a reset", self.id);
            }
        }
    }
}

fn perform(device: &mut dyn VirtioDevice, work: Work) -> Result<Progress, DeviceError> {
    match work {
        Work::Queue(index) => device.process_queue(index),
        Work::Source(index) => device.process_source(index),
    }
}

impl MutEventSubscriber for DeviceEvents {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        if self.paused.0.load(Ordering::SeqCst) {
            self.expect_everything();
            return;
        }
        let Ok(token) = usize::try_from(events.data()) else {
            return;
        };
        for work in self.work_for(token) {
            self.run(work);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let fds = self
            .kicks
            .iter()
            .map(EventFd::as_raw_fd)
            .chain(self.sources.iter().copied())
            .chain([self.again.as_raw_fd()]);
        for (token, fd) in fds.enumerate() {
            if let Err(error) = ops.add(Events::with_data_raw(fd, token as u32, EDGE)) {
                log::error!("device {}: cannot watch descriptor {fd}: {error}", self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests;
