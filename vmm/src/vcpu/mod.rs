//! The thread of a vCPU: run, handle the exit, run again.

pub mod bus;
mod gate;
mod kick;
pub mod state;
mod turns;

#[cfg(test)]
mod tests;

/// What `gate` is made of. The model in `tests` has something else here.
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering};
    pub(super) use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
}

use std::io;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};
use lepton_devices::counters;
use lepton_devices::guest_warn;

use self::bus::Bus;
pub use self::gate::{Gate, Order};

use self::kick::Kick;
pub use self::kick::signal_number as kick_signal;
use self::turns::{Left, Turn};

counters! {
    /// What vCPUs did, in all.
    pub struct VcpuMetrics {
        /// Port reads.
        exit_io_in,
        /// Port writes.
        exit_io_out,
        /// Reads of device registers.
        exit_mmio_read,
        /// Writes of device registers.
        exit_mmio_write,
        /// Exits that could not be handled.
        failures,
    }
}

/// Why a machine stopped by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// The guest asked for a reset (i8042 or the ACPI reset register).
    Reset,
    /// The guest powered off (ACPI sleep control register).
    PowerOff,
    /// A vCPU had a triple fault.
    TripleFault,
    /// KVM cannot go on, for this reason.
    Failed(String),
}

/// A vCPU's thread, seen from outside.
pub struct VcpuThread {
    kick: Kick,
    /// Locked by the thread but while it waits at its gate.
    fd: Arc<Mutex<VcpuFd>>,
    /// What the thread waits for, until the machine runs for the first time.
    seat: Option<(SyncSender<Errand>, Seat)>,
    thread: Option<JoinHandle<()>>,
}

/// A thread that is confined, and waits for the vCPU that it is to run. Dropped, it ends.
pub struct Standby {
    thread: JoinHandle<()>,
    errands: SyncSender<Errand>,
}

enum Errand {
    /// Into the vCPU and out again, before the guest's first instruction.
    Enter(VcpuFd, SyncSender<VcpuFd>),
    Sit(Seat),
}

struct Seat {
    fd: Arc<Mutex<VcpuFd>>,
    shared: VcpuShared,
    kick: Kick,
}

impl Standby {
    /// Starts the thread of vCPU `id`. `setup` runs on it before anything else and is where its seccomp filter goes.
    pub fn start(
        id: u8,
        setup: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (errands, given) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu {id}"))
            .stack_size(256 << 10)
            .spawn(move || {
                let ready = setup();
                let Seat { fd, shared, kick } = loop {
                    match given.recv() {
                        // Who waits for it may have ended.
                        Ok(Errand::Enter(fd, back)) => drop(back.send(entered(fd))),
                        Ok(Errand::Sit(seat)) => break seat,
                        Err(_) => return,
                    }
                };
                let stop = match ready {
                    Ok(()) => turns::run(&shared.gate, || InTurn {
                        fd: lock(&fd),
                        shared: &shared,
                        kick: &kick,
                    }),
                    Err(error) => Some(Stop::Failed(format!("vCPU {id}: {error}"))),
                };
                if let Some(stop) = stop {
                    (shared.stopped)(stop);
                }
                shared.gate.left();
            })?;
        Ok(Standby { thread, errands })
    }

    /// Has it enter `fd` and leave it before the guest's first instruction: what the kernel does for a thread's, and a machine's,
    /// first KVM_RUN is done then. None if the thread has ended.
    pub fn enter(&self, fd: VcpuFd) -> Option<VcpuFd> {
        let (back, entered) = sync_channel(1);
        self.errands.send(Errand::Enter(fd, back)).ok()?;
        entered.recv().ok()
    }

    /// The thread of this vCPU. It is not woken before [`VcpuThread::start`].
    pub fn of(self, mut fd: VcpuFd, shared: VcpuShared) -> VcpuThread {
        let Standby { thread, errands } = self;
        let kick = Kick::new(&mut fd);
        let fd = Arc::new(Mutex::new(fd));
        let seat = Seat {
            fd: fd.clone(),
            shared,
            kick: kick.clone(),
        };
        VcpuThread {
            kick,
            fd,
            seat: Some((errands, seat)),
            thread: Some(thread),
        }
    }
}

impl VcpuThread {
    /// Gives the thread its vCPU, if it does not have it yet. To be called once the gate is open: a thread that would wait there
    /// again is woken twice, and the second time the processor that it had may have gone to sleep.
    pub fn start(&mut self) {
        if let Some((errands, seat)) = self.seat.take() {
            // It has not ended, for it waits for this.
            drop(errands.send(Errand::Sit(seat)));
        }
    }

    /// Makes the vCPU leave the guest and look at its gate.
    pub fn interrupt(&self) {
        if let Some(thread) = &self.thread {
            self.kick.interrupt(thread);
        }
    }

    /// Waits for the thread's end.
    pub fn join(mut self) {
        // One that has none ends when there will be none.
        self.seat = None;
        if let Some(thread) = self.thread.take() {
            // A panic has ended the process already.
            drop(thread.join());
        }
    }

    /// The vCPU itself. Waits while it runs: pause the machine first.
    pub fn vcpu(&self) -> MutexGuard<'_, VcpuFd> {
        lock(&self.fd)
    }
}

/// What every vCPU of a machine shares.
#[derive(Clone)]
pub struct VcpuShared {
    /// Where vCPUs wait while the machine is paused.
    pub gate: Arc<Gate>,
    /// Devices by address.
    pub bus: Arc<Bus>,
    /// Counters.
    pub metrics: Arc<VcpuMetrics>,
    /// Told once when the machine stops by itself.
    pub stopped: Arc<dyn Fn(Stop) + Send + Sync>,
}

impl VcpuShared {
    /// A `stopped` that sends to a channel.
    pub fn report_to(sender: Sender<Stop>) -> Arc<dyn Fn(Stop) + Send + Sync> {
        Arc::new(move |stop| drop(sender.send(stop)))
    }
}

/// The same after a KVM_RUN that does not get to the guest (KVM API, `immediate_exit`).
fn entered(mut fd: VcpuFd) -> VcpuFd {
    fd.set_kvm_immediate_exit(1);
    // EINTR, which is as good as anything else here.
    let _ = fd.run();
    fd.set_kvm_immediate_exit(0);
    fd
}

/// The vCPU, locked for a turn.
struct InTurn<'v> {
    fd: MutexGuard<'v, VcpuFd>,
    shared: &'v VcpuShared,
    kick: &'v Kick,
}

impl Turn for InTurn<'_> {
    type Stop = Stop;

    fn clear(&mut self) {
        self.kick.clear();
    }

    fn hold(&mut self) {
        self.kick.hold();
    }

    fn step(&mut self) -> Left<Stop> {
        step(&mut self.fd, self.shared)
    }
}

fn lock(fd: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    fd.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One stay in the guest and the handling of its exit.
fn step(fd: &mut VcpuFd, shared: &VcpuShared) -> Left<Stop> {
    let metrics = &shared.metrics;
    let stop = match fd.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            metrics.exit_io_out.inc();
            shared.bus.port_write(port, data)
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            metrics.exit_mmio_write.inc();
            shared.bus.mmio_write(address, data);
            None
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            metrics.exit_mmio_read.inc();
            shared.bus.mmio_read(address, data);
            None
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            metrics.exit_io_in.inc();
            shared.bus.port_read(port, data);
            None
        }
        Ok(VcpuExit::Intr) => return Left::Interrupted,
        Ok(VcpuExit::Hlt) => None,
        Ok(VcpuExit::Shutdown) => Some(Stop::TripleFault),
        Ok(VcpuExit::SystemEvent(kind, _)) => Some(system_event(kind)),
        Ok(VcpuExit::FailEntry(reason, cpu)) => Some(fail(
            metrics,
            format!("the processor refused to enter the guest: reason {reason:#x} on CPU {cpu}"),
        )),
        Ok(VcpuExit::InternalError) => {
            let reason = internal_error(fd);
            Some(fail(metrics, reason))
        }
        Ok(exit) => {
            guest_warn!("vCPU exit ignored: {exit:?}");
            None
        }
        Err(error) if error.errno() == libc::EINTR => return Left::Interrupted,
        // A vCPU that waits to be started.
        Err(error) if error.errno() == libc::EAGAIN => return Left::Interrupted,
        Err(error) => Some(fail(metrics, format!("KVM_RUN: {error}"))),
    };
    match stop {
        Some(stop) => Left::Stopped(stop),
        None => Left::Handled,
    }
}

fn fail(metrics: &VcpuMetrics, reason: String) -> Stop {
    metrics.failures.inc();
    Stop::Failed(reason)
}

fn system_event(kind: u32) -> Stop {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => Stop::PowerOff,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => Stop::Reset,
        kvm_bindings::KVM_SYSTEM_EVENT_CRASH => Stop::Failed("the guest crashed".into()),
        other => Stop::Failed(format!("unknown system event {other}")),
    }
}

/// Describes KVM_EXIT_INTERNAL_ERROR: where the guest was, and that emulation may be what failed.
fn internal_error(fd: &mut VcpuFd) -> String {
    let at = match fd.get_regs() {
        Ok(regs) => format!("at {:#x}", regs.rip),
        Err(error) => format!("at an unknown place ({error})"),
    };
    let hint = if crate::kvm::is_hardware_virtualized() {
        ""
    } else {
        "; this host's processor has no usable SVM or VMX, so KVM emulates the guest kernel and lacks instructions"
    };
    format!("KVM cannot go on with the guest {at}{hint}")
}
