//! Where vCPUs wait while a machine is paused, and how one knows that all of them do.

// The standard library's, or those of the model that runs this file.
use super::sync::{AtomicBool, Condvar, Mutex, MutexGuard, Ordering, PoisonError};

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
        let mut state = self.lock();
        state.order = order;
        // Under the lock: a vCPU that has passed on this order, and still found the gate closed, would come back at once.
        self.closed.store(order != Order::Run, Ordering::SeqCst);
        drop(state);
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
