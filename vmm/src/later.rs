//! What is to be done once, a while from now, by the event loop.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::timerfd::TimerFd;

type What = Box<dyn FnOnce() + Send>;

/// Something to be done. Dropped before, it is not done.
pub struct Later(Option<(TimerFd, What)>);

impl Later {
    /// Has `what` done when `time` has passed, or soon after, once it is in the event loop.
    pub fn after(time: Duration, what: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let mut timer = TimerFd::new()?;
        timer.reset(time, None)?;
        Ok(Later(Some((timer, Box::new(what)))))
    }
}

impl MutEventSubscriber for Later {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(error) = ops.remove(events) {
            log::error!("cannot forget a timer: {error}");
        }
        if let Some((_, what)) = self.0.take() {
            what();
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let Some((timer, _)) = &self.0 else {
            return;
        };
        let fired = Events::with_data_raw(timer.as_raw_fd(), 0, EventSet::IN);
        if let Err(error) = ops.add(fired) {
            log::error!("cannot watch a timer: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventManager, SubscriberOps};
    use std::sync::mpsc::{TryRecvError, channel};

    #[test]
    fn it_is_done_once_and_not_before_its_time() {
        let (done, told) = channel();
        let (never, untold) = channel();
        let soon = Later::after(Duration::from_nanos(1), move || done.send(()).unwrap());
        let far = Later::after(Duration::from_secs(3600), move || never.send(()).unwrap());
        let mut events = EventManager::<Later>::new().unwrap();
        events.add_subscriber(soon.unwrap());
        events.add_subscriber(far.unwrap());
        assert_eq!(told.try_recv(), Err(TryRecvError::Empty));
        events.run().unwrap();
        assert_eq!(told.try_recv(), Ok(()));
        assert_eq!(events.run_with_timeout(0).unwrap(), 0, "it fires once");
        assert_eq!(untold.try_recv(), Err(TryRecvError::Empty));
        drop(events);
        assert_eq!(untold.try_recv(), Err(TryRecvError::Disconnected));
    }
}
