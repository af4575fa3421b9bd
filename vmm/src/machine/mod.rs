//! A machine that has been started.
//!
//! ```text
//!  Configuration --build--> Paused --resume--> Running --stop--> Stopping --wait--> Paused --save--> MachineState
//!  MachineState and memory --restore--> Paused
//!                                                 |
//!                                                 +-- the guest or the user ends it: the process ends
//! ```
//!
//! Each transition consumes the state it leaves, so that what only a paused machine allows cannot be asked of a
//! running one.

mod assemble;
pub mod attach;
pub mod boot_timer;
pub mod build;
pub mod generation;
pub mod restore;
pub mod state;

use std::sync::Arc;

use lepton_devices::dirty::PAGE;
use lepton_devices::virtio::device::DeviceError;
use lepton_devices::virtio::transport::mmio::{SharedDevice, lock};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::events::{DevicesPaused, Waker};
use crate::kvm::{KvmError, Vm};
use crate::memory::Ram;
use crate::memory::freeze::OldMapping;
use crate::vcpu::bus::Bus;
use crate::vcpu::state::CpuidLeaf;
use crate::vcpu::{Gate, Order, VcpuMetrics, VcpuThread};

/// What running and paused machines have in common.
pub struct Machine {
    /// Dropped after the vCPUs, which use it.
    vcpus: Vec<VcpuThread>,
    /// What each was given.
    cpuid: Vec<Vec<CpuidLeaf>>,
    gate: Arc<Gate>,
    bus: Arc<Bus>,
    devices: Vec<SharedDevice>,
    devices_paused: Arc<DevicesPaused>,
    /// One per device: makes it catch up after a pause.
    wakers: Vec<Waker>,
    metrics: Arc<VcpuMetrics>,
    vm: Vm,
    ram: Ram,
}

impl Machine {
    /// Presses Ctrl-Alt-Del on the guest's keyboard. False: the guest does not read its keys.
    pub fn ctrl_alt_del(&self) -> bool {
        self.bus
            .i8042
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .ctrl_alt_del()
    }

    /// The machine's devices by address.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Has all devices look at all their queues and sources.
    pub fn wake_devices(&self) {
        self.wakers.iter().for_each(Waker::wake_for_everything);
    }

    /// What the vCPUs counted.
    pub fn vcpu_metrics(&self) -> &Arc<VcpuMetrics> {
        &self.metrics
    }
}

/// A machine whose vCPUs run.
pub struct Running(Machine);

/// A machine whose vCPUs were told to stand still.
pub struct Stopping(Machine);

/// A machine whose vCPUs stand still and whose devices touch nothing.
pub struct Paused(Machine);

impl Running {
    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.0
    }

    /// Its memory.
    pub fn ram(&self) -> &Ram {
        &self.0.ram
    }

    /// Lets go of memory's pages ahead of a clone ([`Ram::part`]).
    pub fn part_memory(&mut self) -> Vec<OldMapping> {
        self.0.ram.part()
    }

    /// Tells the vCPUs to stand still. They need a moment for it.
    pub fn stop(self) -> Stopping {
        let machine = self.0;
        machine.gate.order(Order::Wait);
        for vcpu in &machine.vcpus {
            vcpu.interrupt();
        }
        Stopping(machine)
    }

    /// Stops the vCPUs, then the devices, and waits for I/O in flight.
    pub fn pause(self) -> (Paused, Result<(), DeviceError>) {
        self.stop().wait()
    }
}

impl Stopping {
    /// Waits for the vCPUs, stops the devices, and waits for I/O in flight.
    pub fn wait(self) -> (Paused, Result<(), DeviceError>) {
        let machine = self.0;
        machine.gate.wait_until_still();
        machine.devices_paused.set(true);
        let mut result = Ok(());
        for device in &machine.devices {
            result = result.and(lock(device).quiesce());
        }
        (Paused(machine), result)
    }
}

impl Paused {
    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.0
    }

    /// Its memory, which stands still.
    pub fn ram(&self) -> &Ram {
        &self.0.ram
    }

    /// The record of the machine's memory, to be changed by a snapshot of it.
    pub fn ram_mut(&mut self) -> &mut Ram {
        &mut self.0.ram
    }

    /// Adds the pages that were written since the last call to [`Tracking::pending`]. Does nothing where no record is
    /// kept.
    ///
    /// [`Tracking::pending`]: crate::memory::Tracking::pending
    pub fn collect_dirty_pages(&mut self) -> Result<(), KvmError> {
        let Machine { vm, ram, .. } = &mut self.0;
        let Some(tracking) = &mut ram.tracking else {
            return Ok(());
        };
        let mut now = tracking.devices.take();
        let mut first = 0;
        for (slot, region) in (0..).zip(ram.memory.iter()) {
            // Regions are whole MiB: each begins with a word of its own.
            let log = vm.dirty_log(slot, region.len())?;
            for (word, bits) in now.iter_mut().skip(first).zip(log) {
                *word |= bits;
            }
            first += (region.len() / PAGE / 64) as usize;
        }
        tracking.pending.resize(now.len(), 0);
        for (word, bits) in tracking.pending.iter_mut().zip(now) {
            *word |= bits;
        }
        Ok(())
    }

    /// Lets devices and vCPUs go on.
    pub fn resume(self) -> Running {
        let mut machine = self.0;
        machine.devices_paused.set(false);
        machine.wakers.iter().for_each(Waker::wake);
        machine.gate.order(Order::Run);
        machine.vcpus.iter_mut().for_each(VcpuThread::start);
        Running(machine)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.gate.order(Order::Leave);
        for vcpu in &self.vcpus {
            vcpu.interrupt();
        }
        for vcpu in self.vcpus.drain(..) {
            vcpu.join();
        }
    }
}
