//! A vCPU's turns: in the guest while its machine runs, at the gate while it is paused.

use super::gate::{Gate, Order};

/// How a stay in the guest ended.
pub enum Left<S> {
    /// By an exit, which was handled.
    Handled,
    /// By a signal, or before it began.
    Interrupted,
    /// For good.
    Stopped(S),
}

/// A vCPU that nobody else has, until this is dropped.
pub trait Turn {
    /// How a machine stops by itself.
    type Stop;

    /// Lets it enter the guest.
    fn clear(&mut self);

    /// Lets it end what the last exit began, and no more.
    fn hold(&mut self);

    /// One stay in the guest and the handling of its exit.
    fn step(&mut self) -> Left<Self::Stop>;
}

/// Runs until told to leave (`None`) or the guest ends. `take` gives the vCPU for a turn.
pub fn run<T: Turn>(gate: &Gate, take: impl Fn() -> T) -> Option<T::Stop> {
    loop {
        if gate.pass() == Order::Leave {
            return None;
        }
        let mut turn = take();
        turn.clear();
        // An order given between the two lines above interrupts again, so it is seen below.
        while !gate.is_closed() {
            if let Left::Stopped(stop) = turn.step() {
                return Some(stop);
            }
        }
        // An access that led to an exit is over only when KVM_RUN is entered again (KVM API, 5): a read's value is in
        // its register only then, and the instruction pointer behind it. Without this a saved vCPU would do it twice.
        turn.hold();
        loop {
            match turn.step() {
                Left::Stopped(stop) => return Some(stop),
                Left::Interrupted => break,
                Left::Handled => {}
            }
        }
    }
}
