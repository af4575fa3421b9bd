//! From a saved state and its memory to a paused machine. Free of files: where the memory comes from, and that it is
//! the one that belongs to the state, is the caller's affair.

use std::sync::Arc;

use lepton_devices::legacy::i8042::I8042;
use lepton_devices::legacy::ioapic::IoApic;
use lepton_devices::legacy::serial::SerialPort;
use lepton_devices::virtio::state::RestoreError;
use lepton_devices::virtio::transport::mmio::SharedDevice;
use vm_memory::GuestMemoryError;

use super::assemble::{self, AssembleError, Parts};
use super::attach::{AttachError, Slots};
use super::build::{Built, Console, Surroundings};
use super::generation::Generation;
use super::state::MachineState;
use crate::arch::x86_64::compatible::{self, Incompatible};
use crate::arch::x86_64::layout;
use crate::arch::x86_64::paging::Fetch;
use crate::events::DevicesPaused;
use crate::kvm::{Hypervisor, KvmError};
use crate::memory::Ram;
use crate::vcpu::state::{VcpuStateError, restore as restore_vcpu};

/// Why a saved machine cannot be restored.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum RestoreMachineError {
    #[error(transparent)]
    Incompatible(#[from] Incompatible),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    #[error("vCPU {id}: {source}")]
    Vcpu { id: u8, source: VcpuStateError },
    #[error("{what}: {source}")]
    Legacy {
        what: &'static str,
        source: RestoreError,
    },
    #[error("pager: {0}")]
    Pager(std::io::Error),
    #[error("generation ID: {0}")]
    Generation(#[from] GuestMemoryError),
    #[error("the state has {saved} {what}, its configuration {configured}")]
    Count {
        what: &'static str,
        saved: usize,
        configured: usize,
    },
}

/// What a machine is restored from.
pub struct Restoration<'a> {
    /// Its state.
    pub state: &'a MachineState,
    /// vCPUs as configured.
    pub vcpus: u8,
    /// Its memory, as it was when the state was taken.
    pub ram: Ram,
    /// Its devices, made and inactive, in the order of their slots.
    pub devices: Vec<(String, SharedDevice)>,
    /// COM1.
    pub console: Console,
    /// Whether the guest's clock is to catch up on the time since.
    pub clock_catches_up: bool,
    /// Its generation: not the one that was saved.
    pub generation: Generation,
}

/// Whether this host's processor has what a machine needs that may have run on another.
pub fn check_processor(
    hypervisor: &Hypervisor,
    state: &MachineState,
) -> Result<(), RestoreMachineError> {
    let supported = hypervisor.supported_cpuid()?;
    for vcpu in &state.vcpus {
        compatible::check(&vcpu.cpuid, supported)?;
    }
    log::debug!("processor is compatible");
    Ok(())
}

/// Restores a machine, whose processor was checked if need be. Nothing of it runs or is reachable yet if this fails.
pub fn restore(
    hypervisor: &Hypervisor,
    restoration: Restoration<'_>,
    around: Surroundings,
) -> Result<Built, RestoreMachineError> {
    let Restoration {
        state,
        vcpus,
        mut ram,
        devices,
        console,
        clock_catches_up,
        generation,
    } = restoration;
    check_counts(state, vcpus, devices.len())?;
    // Before anything touches memory.
    generation.write(&ram)?;
    let boot = state.vcpus.first();
    let fetch = boot.and_then(|vcpu| Fetch::next(&vcpu.regs, &vcpu.sregs));
    ram.serve(fetch).map_err(RestoreMachineError::Pager)?;
    let vm = hypervisor.create_vm(&ram.memory, ram.tracking.is_some())?;
    let legacy = |what| move |source| RestoreMachineError::Legacy { what, source };
    let pins = layout::VIRTIO_IRQ as usize + devices.len();
    let ioapic = Arc::new(IoApic::new(vm.msi_sink(), pins));
    ioapic.load(&state.ioapic).map_err(legacy("I/O APIC"))?;
    let devices_paused = Arc::new(DevicesPaused::default());
    devices_paused.set(true);
    let slots = Slots {
        vm: &vm,
        memory: &ram.memory,
        ioapic: &ioapic,
        paused: &devices_paused,
        dirty: ram.dirty(),
    };
    let mut attached = Vec::with_capacity(devices.len());
    for (index, ((id, device), saved)) in devices.iter().zip(&state.devices).enumerate() {
        attached.push(slots.attach_restored(index, id, device.clone(), saved)?);
    }
    log::debug!("{} devices attached", attached.len());
    let restorable = hypervisor.restorable();
    let mut made = Vec::with_capacity(state.vcpus.len());
    for (id, saved) in (0u8..).zip(&state.vcpus) {
        let vcpu = restore_vcpu(vm.create_vcpu(id)?, saved, &restorable);
        made.push(vcpu.map_err(|source| RestoreMachineError::Vcpu { id, source })?);
    }
    log::debug!("{} vCPUs restored", made.len());
    // After the vCPUs: their time stamp counters are what the clock counts by.
    vm.set_clock(&state.clock, clock_catches_up)?;
    let wiring = assemble::serial_wiring(&ioapic, console);
    let serial = SerialPort::restored(&state.serial, wiring).map_err(legacy("serial port"))?;
    let mut i8042 = I8042::new(assemble::line(&ioapic, layout::I8042_IRQ));
    i8042.load(&state.i8042).map_err(legacy("i8042"))?;
    // Only now: the local APICs that take these interrupts are set up.
    for device in &attached {
        device.interrupt.replay();
    }
    Generation::tell(&ioapic);
    let parts = Parts {
        vm,
        ram,
        vcpus: made,
        ioapic,
        serial,
        i8042,
        devices: devices.into_iter().map(|(_, device)| device).collect(),
        attached,
        devices_paused,
    };
    Ok(assemble::assemble(parts, around)?)
}

fn check_counts(
    state: &MachineState,
    vcpus: u8,
    devices: usize,
) -> Result<(), RestoreMachineError> {
    for (what, saved, configured) in [
        ("vCPUs", state.vcpus.len(), usize::from(vcpus)),
        ("devices", state.devices.len(), devices),
    ] {
        if saved != configured {
            return Err(RestoreMachineError::Count {
                what,
                saved,
                configured,
            });
        }
    }
    Ok(())
}
