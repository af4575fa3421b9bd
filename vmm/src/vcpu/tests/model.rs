//! Pausing, run by loom in every order that two threads can have: `gate.rs` and `turns.rs` as they are shipped, on loom's
//! locks and atomics, with a vCPU that does what KVM and Linux promise of KVM_RUN and of signals.
#![allow(unsafe_code)] // loom's cell

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicBool;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

mod sync {
    pub(super) use loom::sync::atomic::{AtomicBool, Ordering};
    pub(super) use loom::sync::{Condvar, Mutex, MutexGuard};
    pub(super) use std::sync::PoisonError;
}
#[allow(clippy::duplicate_mod)] // once more, with other locks
#[path = "../gate.rs"]
mod gate;
#[allow(clippy::duplicate_mod)]
#[path = "../turns.rs"]
mod turns;

use gate::{Gate, Order};
use sync::Ordering;
use turns::{Left, Turn};

/// The thread, as Linux sees it.
#[derive(Default)]
struct Task {
    /// It is in KVM_RUN.
    inside: bool,
    /// A signal has come while it was.
    signalled: bool,
}

/// A vCPU and its thread.
struct Vcpu {
    /// `kvm_run.immediate_exit`.
    immediate_exit: AtomicBool,
    task: Mutex<Task>,
    woken: Condvar,
    /// What the guest changes as long as it runs. Loom fails if anybody looks at it meanwhile.
    guest: UnsafeCell<u32>,
    /// Exits of the guest's own.
    exits: u32,
    /// What it does then.
    then: Then,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Computes,
    PowersOff,
}

impl Vcpu {
    fn new(exits: u32, then: Then) -> Self {
        Self {
            immediate_exit: AtomicBool::new(false),
            task: Mutex::default(),
            woken: Condvar::new(),
            guest: UnsafeCell::new(0),
            exits,
            then,
        }
    }

    /// What `Kick::interrupt` does: the flag, then the signal. Outside of KVM_RUN that runs a handler, and is over.
    fn interrupt(&self, sets_flag: bool) {
        if sets_flag {
            self.immediate_exit.swap(true, Ordering::SeqCst);
        }
        let mut task = self.task.lock().unwrap();
        if task.inside {
            task.signalled = true;
            self.woken.notify_one();
        }
    }

    /// What the guest has done. For a time when it does not run.
    fn done(&self) -> u32 {
        // SAFETY: nobody writes meanwhile, or loom ends the test.
        self.guest.with(|done| unsafe { *done })
    }
}

impl Turn for &Vcpu {
    type Stop = ();

    fn clear(&mut self) {
        self.immediate_exit.swap(false, Ordering::SeqCst);
    }

    fn hold(&mut self) {
        self.immediate_exit.swap(true, Ordering::SeqCst);
    }

    /// KVM_RUN.
    fn step(&mut self) -> Left<()> {
        self.task.lock().unwrap().inside = true;
        let mut left = Left::Interrupted;
        if !self.immediate_exit.load(Ordering::SeqCst) {
            // SAFETY: nobody else looks meanwhile, or loom ends the test.
            let done = self.guest.with_mut(|done| unsafe {
                *done += 1;
                *done
            });
            if done <= self.exits {
                left = Left::Handled;
            } else if self.then == Then::PowersOff {
                left = Left::Stopped(());
            } else {
                // Nothing but a signal gets it out.
                let mut task = self.task.lock().unwrap();
                while !task.signalled {
                    task = self.woken.wait(task).unwrap();
                }
            }
        }
        *self.task.lock().unwrap() = Task::default();
        left
    }
}

/// A machine that is started, paused, looked at, and let go: as `machine::Running` and `Paused` do it.
fn pause(vcpus: usize, exits: u32, then: Then, sets_flag: bool) {
    let gate = Arc::new(Gate::new(vcpus));
    let vcpus: Vec<_> = (0..vcpus)
        .map(|_| Arc::new(Vcpu::new(exits, then)))
        .collect();
    let start = |vcpu: &Arc<Vcpu>| {
        let (gate, vcpu) = (gate.clone(), vcpu.clone());
        thread::spawn(move || {
            let stop = turns::run(&gate, || &*vcpu);
            assert!(stop.is_none() || then == Then::PowersOff);
            gate.left();
        })
    };
    let threads: Vec<_> = vcpus.iter().map(start).collect();
    gate.order(Order::Run);
    gate.order(Order::Wait);
    vcpus.iter().for_each(|vcpu| vcpu.interrupt(sets_flag));
    gate.wait_until_still();
    let before: Vec<_> = vcpus.iter().map(|vcpu| vcpu.done()).collect();
    let after: Vec<_> = vcpus.iter().map(|vcpu| vcpu.done()).collect();
    assert_eq!(before, after, "the guest ran while it was paused");
    gate.order(Order::Leave);
    vcpus.iter().for_each(|vcpu| vcpu.interrupt(sets_flag));
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
}

/// `switches`: as often as a thread may lose the processor where it need not; `None`, as often as it likes.
fn in_every_order(switches: Option<usize>, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = switches;
    builder.check(model);
}

#[test]
fn a_pause_is_never_missed() {
    in_every_order(None, || pause(1, 0, Then::Computes, true));
}

#[test]
fn a_pause_is_never_missed_between_exits() {
    in_every_order(Some(4), || pause(1, 2, Then::Computes, true));
}

#[test]
fn a_pause_waits_for_all_vcpus() {
    in_every_order(Some(2), || pause(2, 0, Then::Computes, true));
}

#[test]
fn a_vcpu_that_ends_meanwhile_is_not_waited_for() {
    in_every_order(Some(4), || pause(1, 1, Then::PowersOff, true));
}

/// The model can fail: without the flag, a signal that comes right before KVM_RUN is lost, and everybody waits for ever.
#[test]
fn a_signal_alone_is_missed() {
    const INSIDE: &str = "LEPTON_TEST_A_SIGNAL_ALONE";
    if std::env::var_os(INSIDE).is_some() {
        return in_every_order(None, || pause(1, 0, Then::Computes, false));
    }
    // Loom ends its process when it has found that.
    let thread = std::thread::current();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", thread.name().unwrap()])
        .env(INSIDE, "1")
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("deadlock"),
        "{said}"
    );
}
