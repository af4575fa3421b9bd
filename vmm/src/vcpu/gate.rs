//! Where vCPUs wait while a machine is paused, and how one knows that all of them do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What a vCPU is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Run the guest.
    Run,
    /// Wait.
    Wait,
    /// End the thread.
    Leave,
}

struct State {
    order: Order,
    /// vCPU threads that neither wait nor have ended.
    running: usize,
}

/// A gate that all vCPUs of a machine pass.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// `order != Run`, readable without the lock on the way back into the guest.
    closed: AtomicBool,
}

impl Gate {
    /// A closed gate for `vcpus` threads that are about to be started.
    pub fn new(vcpus: usize) -> Self {
        Gate {
            state: Mutex::new(State {
                order: Order::Wait,
                running: vcpus,
            }),
            changed: Condvar::new(),
            closed: AtomicBool::new(true),
        }
    }

    /// Gives an order to all vCPUs. Those in the guest must be interrupted to see it.
    pub fn order(&self, order: Order) {
        self.lock().order = order;
        self.closed.store(order != Order::Run, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Whether vCPUs are to come back to [`Gate::pass`].
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Called by a vCPU: waits while the order is to wait.
    pub fn pass(&self) -> Order {
        let mut state = self.lock();
        if state.order == Order::Wait {
            state.running = state.running.saturating_sub(1);
            self.changed.notify_all();
            while state.order == Order::Wait {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.running += 1;
        }
        state.order
    }

    /// Called by a vCPU thread at its end.
    pub fn left(&self) {
        let mut state = self.lock();
        state.running = state.running.saturating_sub(1);
        self.changed.notify_all();
    }

    /// Waits until no vCPU runs.
    pub fn wait_until_still(&self) {
        let mut state = self.lock();
        while state.running > 0 {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn nobody_moves_while_closed_and_everybody_leaves() {
        let gate = Arc::new(Gate::new(4));
        let passed = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (gate, passed) = (gate.clone(), passed.clone());
                std::thread::spawn(move || {
                    while gate.pass() == Order::Run {
                        passed.fetch_add(1, Ordering::SeqCst);
                    }
                    gate.left();
                })
            })
            .collect();
        gate.wait_until_still();
        assert_eq!(passed.load(Ordering::SeqCst), 0);
        for _ in 0..100 {
            gate.order(Order::Run);
            let before = passed.load(Ordering::SeqCst);
            while passed.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
            gate.order(Order::Wait);
            gate.wait_until_still();
            let still = passed.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(passed.load(Ordering::SeqCst), still);
        }
        gate.order(Order::Leave);
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
