//! Small pages for a guest while it boots.
//!
//! A boot touches a little in many places. Where the host backs memory with transparent huge pages by itself (`always`),
//! it would clear 2 MiB for each of these places and keep them, used or not. So there are none until the boot is over;
//! then the host's policy counts again, also for what the guest has touched by then (khugepaged).

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::thread::{disable_transparent_huge_pages, transparent_huge_pages_are_disabled};
use vmm_sys_util::timerfd::TimerFd;

/// When a boot is over. Stripped guests take a tenth of it, and no more than speed depends on it.
const BOOT: Duration = Duration::from_secs(2);

/// While it lives, and at most for [`BOOT`] once it is in the event loop, this process gets no transparent huge pages.
pub struct SmallPages {
    timer: TimerFd,
}

impl SmallPages {
    /// Begins, unless somebody has decided for this process already.
    pub fn begin() -> io::Result<Option<Self>> {
        if transparent_huge_pages_are_disabled()? {
            return Ok(None);
        }
        let mut timer = TimerFd::new()?;
        timer.reset(BOOT, None)?;
        disable_transparent_huge_pages(true)?;
        Ok(Some(SmallPages { timer }))
    }

    fn end(&mut self) {
        if let Err(error) = disable_transparent_huge_pages(false) {
            log::warn!("no transparent huge pages for this guest: {error}");
        }
    }
}

impl Drop for SmallPages {
    fn drop(&mut self) {
        self.end();
    }
}

impl MutEventSubscriber for SmallPages {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.end();
        if let Err(error) = ops.remove(events) {
            log::error!("cannot forget the end of the boot: {error}");
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let fired = Events::with_data_raw(self.timer.as_raw_fd(), 0, EventSet::IN);
        if let Err(error) = ops.add(fired) {
            log::error!("cannot watch for the end of the boot: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventManager, SubscriberOps};

    #[test]
    fn huge_pages_come_back() {
        // One test: the setting is the process's.
        let given_up = SmallPages::begin().unwrap().unwrap();
        assert!(transparent_huge_pages_are_disabled().unwrap());
        assert!(SmallPages::begin().unwrap().is_none(), "somebody decided");
        drop(given_up);
        assert!(!transparent_huge_pages_are_disabled().unwrap());

        let mut small = SmallPages::begin().unwrap().unwrap();
        small.timer.reset(Duration::from_nanos(1), None).unwrap();
        let mut events = EventManager::<SmallPages>::new().unwrap();
        events.add_subscriber(small);
        assert!(transparent_huge_pages_are_disabled().unwrap());
        events.run().unwrap();
        assert!(!transparent_huge_pages_are_disabled().unwrap());
        assert_eq!(events.run_with_timeout(0).unwrap(), 0, "it fires once");
    }
}
