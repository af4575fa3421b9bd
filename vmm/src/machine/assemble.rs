//! The end of a cold boot and of a restore alike: the parts are there and become a machine.

use std::io;
use std::sync::{Arc, Mutex};

use lepton_devices::legacy::i8042::I8042;
use lepton_devices::legacy::ioapic::IoApic;
use lepton_devices::legacy::serial::{SerialPort, Wiring};
use lepton_devices::virtio::interrupt::IrqLine;
use lepton_devices::virtio::transport::mmio::SharedDevice;

use super::attach::Attached;
use super::boot_timer::BootTimer;
use super::build::{Built, Console, Surroundings};
use super::{Machine, Paused};
use crate::arch::x86_64::layout;
use crate::events::{DeviceEvents, DevicesPaused};
use crate::kvm::Vm;
use crate::memory::Ram;
use crate::vcpu::bus::Bus;
use crate::vcpu::state::Vcpu;
use crate::vcpu::{Gate, Standby, VcpuMetrics, VcpuShared};

/// Why the parts do not become a machine.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum AssembleError {
    #[error("vCPU {id}: thread: {source}")]
    Thread { id: u8, source: io::Error },
    #[error("host: {0}")]
    Host(#[from] io::Error),
}

/// The parts of a machine.
pub struct Parts {
    /// The machine in KVM.
    pub vm: Vm,
    /// Its memory.
    pub ram: Ram,
    /// Its vCPUs, set up.
    pub vcpus: Vec<Vcpu>,
    /// Its interrupt controller.
    pub ioapic: Arc<IoApic>,
    /// COM1.
    pub serial: SerialPort,
    /// Keyboard controller.
    pub i8042: I8042,
    /// Its devices.
    pub devices: Vec<SharedDevice>,
    /// Their places.
    pub attached: Vec<Attached>,
    /// Whether they are paused.
    pub devices_paused: Arc<DevicesPaused>,
}

/// How COM1 of a machine is wired.
pub fn serial_wiring(ioapic: &Arc<IoApic>, console: Console) -> Wiring {
    Wiring {
        line: line(ioapic, layout::SERIAL_IRQ),
        out: console.out,
        limit: console.limit,
        room: console.room,
    }
}

/// A line into the interrupt controller.
pub fn line(ioapic: &Arc<IoApic>, irq: u32) -> Arc<dyn IrqLine> {
    IoApic::line(ioapic, irq as usize).unwrap_or_else(|| Arc::new(NoLine))
}

/// A pin that is not connected.
struct NoLine;

impl IrqLine for NoLine {
    fn raise(&self) {}
}

/// Makes a paused machine, with a thread for each vCPU.
pub fn assemble(parts: Parts, around: Surroundings) -> Result<Built, AssembleError> {
    let Parts {
        vm,
        ram,
        vcpus,
        ioapic,
        serial,
        i8042,
        devices,
        attached,
        devices_paused,
    } = parts;
    let mut events = Vec::with_capacity(attached.len());
    let mut transports = Vec::with_capacity(attached.len());
    for device in attached {
        events.push(device.events);
        transports.push(Mutex::new(device.transport));
    }
    let wakers = events
        .iter()
        .map(DeviceEvents::waker)
        .collect::<Result<_, _>>()?;
    let bus = Arc::new(Bus {
        serial: Arc::new(Mutex::new(serial)),
        i8042: Arc::new(Mutex::new(i8042)),
        ioapic,
        virtio: transports,
        boot_timer: around.boot_timer.then(BootTimer::default),
    });
    let gate = Arc::new(Gate::new(vcpus.len()));
    let metrics = Arc::new(VcpuMetrics::default());
    let shared = VcpuShared {
        gate: gate.clone(),
        bus: bus.clone(),
        metrics: metrics.clone(),
        stopped: around.stopped,
    };
    let mut machine = Machine {
        vcpus: Vec::with_capacity(vcpus.len()),
        cpuid: Vec::with_capacity(vcpus.len()),
        gate,
        bus,
        devices,
        devices_paused,
        wakers,
        metrics,
        vm,
        ram,
    };
    let mut standby = around.standby;
    for (id, Vcpu { fd, cpuid }) in (0u8..).zip(vcpus) {
        let confine = around.confine_vcpu.clone();
        let thread = match standby.take() {
            Some(ready) => Ok(ready),
            None => Standby::start(id, move || confine()),
        };
        let thread = thread.map_err(|source| AssembleError::Thread { id, source })?;
        machine.vcpus.push(thread.of(fd, shared.clone()));
        machine.cpuid.push(cpuid);
    }
    Ok(Built {
        machine: Paused(machine),
        events,
    })
}
