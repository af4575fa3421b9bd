//! How soon the scheduler lets a thread run that has something to do.
#![allow(unsafe_code)] // sched_getattr and sched_setattr, which no crate here has

use std::ptr;
use std::sync::OnceLock;

/// Nanoseconds (`sched_runtime` of sched_setattr(2) for SCHED_OTHER since Linux 6.12): less than the usual 0.7 to 3 ms, so
/// that who has it is let in before who has not, and enough for what is to be done then, such as to take in a machine: from who has
/// used up his slice a processor is taken as soon as somebody else wakes.
const SHORT_SLICE: u64 = 500_000;

/// Attributes of the thread that asked, but for its slice.
static ASKED: OnceLock<libc::sched_attr> = OnceLock::new();

/// Asks for short slices for the thread that calls, and for those that it starts: for threads that work for some
/// microseconds and sleep again while others wait for them. With slices of the usual length such a thread may wait, where
/// another runs when it wakes, for the next tick of the clock: 4 ms where there are 250 in a second. Nobody is given a
/// larger share by it. A Linux before 6.12 takes no notice; nothing is lost where it is refused, and threads that are scheduled by
/// another policy than the ordinary ones stay as they are.
pub fn ask_for_short_slices() {
    // For what is not to change, as niceness.
    let Some(attributes) = own() else {
        return;
    };
    let policy = attributes.sched_policy as i32;
    if [libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&policy) {
        set(&attributes, SHORT_SLICE);
        // Whoever asked first knows it.
        let _ = ASKED.set(attributes);
    }
}

/// Asks for slices of the usual length again, for a thread that works as long as it may: threads with slices of the same
/// length are not let in before each other. Its niceness is that of who asked. Nothing happens if nobody has.
pub fn ask_for_usual_slices() {
    if let Some(attributes) = ASKED.get() {
        set(attributes, 0);
    }
}

/// While this lives, the thread that made it runs as soon as it has something to do (SCHED_FIFO), but not those that it starts.
pub struct First {
    before: libc::sched_attr,
}

impl First {
    /// Lets the thread that calls go first. None where that is not allowed: it takes root's CAP_SYS_NICE, or RLIMIT_RTPRIO.
    pub fn go() -> Option<Self> {
        let before = own()?;
        let first = libc::sched_attr {
            sched_policy: libc::SCHED_FIFO as u32,
            sched_flags: libc::SCHED_FLAG_RESET_ON_FORK as u64,
            sched_nice: 0,
            sched_priority: 1,
            sched_runtime: 0,
            sched_deadline: 0,
            sched_period: 0,
            ..before
        };
        change(&first).then_some(First { before })
    }
}

impl Drop for First {
    fn drop(&mut self) {
        change(&self.before);
    }
}

/// Of the thread that calls.
fn own() -> Option<libc::sched_attr> {
    // SAFETY: a structure of numbers.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: 0 is the thread that calls, and the kernel writes no more than the size.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    (got == 0).then_some(attributes)
}

fn set(attributes: &libc::sched_attr, slice: u64) {
    change(&libc::sched_attr {
        sched_runtime: slice,
        ..*attributes
    });
}

/// Whether the kernel does it.
fn change(attributes: &libc::sched_attr) -> bool {
    // SAFETY: 0 is the thread that calls; the kernel has written the structure's size into it.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, ptr::from_ref(attributes), 0) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slice and niceness of the thread that calls.
    fn slice_and_niceness() -> (u64, i32) {
        let own = own().unwrap();
        (own.sched_runtime, own.sched_nice)
    }

    #[test]
    fn only_the_slice_changes_and_threads_have_it_until_they_ask_for_another() {
        let asked = std::thread::spawn(|| {
            // SAFETY: a number. A thread may always make way for others.
            unsafe { libc::nice(3) };
            let (usual, _) = slice_and_niceness();
            ask_for_usual_slices();
            assert_eq!(
                slice_and_niceness(),
                (usual, 3),
                "nobody has asked for others"
            );
            ask_for_short_slices();
            // Before 6.12 there are none.
            let short = if usual == 0 { 0 } else { SHORT_SLICE };
            assert_eq!(slice_and_niceness(), (short, 3));
            let started = std::thread::spawn(move || {
                assert_eq!(slice_and_niceness(), (short, 3));
                ask_for_usual_slices();
                assert_eq!(slice_and_niceness(), (usual, 3));
            });
            started.join().unwrap();
            assert_eq!(slice_and_niceness(), (short, 3));
        });
        asked.join().unwrap();
    }

    #[test]
    fn who_goes_first_does_so_alone_and_for_a_while() {
        let policy = || own().unwrap().sched_policy as i32;
        let asked = std::thread::spawn(move || {
            let Some(first) = First::go() else {
                eprintln!("SKIPPED: this user may not use SCHED_FIFO");
                return;
            };
            assert_eq!(policy(), libc::SCHED_FIFO);
            let started = std::thread::spawn(policy).join().unwrap();
            assert_eq!(started, libc::SCHED_OTHER);
            drop(first);
            assert_eq!(policy(), libc::SCHED_OTHER);
        });
        asked.join().unwrap();
    }
}
