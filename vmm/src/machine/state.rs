//! The saved form of a machine: all but its memory. Taken from a paused machine, free of files: the same value serves
//! a snapshot on disk and a clone.

use std::sync::PoisonError;

use lepton_devices::legacy::i8042::I8042State;
use lepton_devices::legacy::ioapic::IoApicState;
use lepton_devices::legacy::serial::SerialPortState;
use lepton_devices::virtio::state::{DeviceState, TransportState};
use lepton_devices::virtio::transport::mmio::lock;
use serde::{Deserialize, Serialize};

use super::{Machine, Paused};
use crate::config::saved::SavedConfig;
use crate::kvm::{ClockState, KvmError};
use crate::vcpu::bus::Bus;
use crate::vcpu::state::{Saveable, VcpuState, VcpuStateError, save};

/// Everything about a machine but what is in its memory, its images and its taps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// What it is built from.
    pub config: SavedConfig,
    /// Its kvm-clock.
    pub clock: ClockState,
    /// Its vCPUs, by number.
    pub vcpus: Vec<VcpuState>,
    /// I/O APIC.
    pub ioapic: IoApicState,
    /// COM1.
    pub serial: SerialPortState,
    /// Keyboard controller.
    pub i8042: I8042State,
    /// virtio devices, in the order of their slots.
    pub devices: Vec<SavedDevice>,
}

/// A virtio device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDevice {
    /// Its registers and queues.
    pub transport: TransportState,
    /// The rest of it.
    pub device: DeviceState,
}

/// Why a machine's state cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// KVM's part.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A vCPU.
    #[error("vCPU {id}: {source}")]
    Vcpu {
        /// Its number.
        id: usize,
        /// What failed.
        source: VcpuStateError,
    },
}

impl Paused {
    /// The machine's state; `config` is what it was built from, `saveable` what KVM can save here. Nothing of the machine changes.
    pub fn save(
        &self,
        saveable: &Saveable,
        config: SavedConfig,
    ) -> Result<MachineState, SaveError> {
        let Machine {
            vcpus,
            cpuid,
            // All vCPUs are behind it.
            gate: _,
            bus,
            devices,
            devices_paused: _,
            // They fire after a load anyway.
            wakers: _,
            // Counted by each process for itself.
            metrics: _,
            vm,
            // Saved apart.
            ram: _,
        } = &self.0;
        let Bus {
            serial,
            i8042,
            ioapic,
            virtio,
            // For cold boots only.
            boot_timer: _,
        } = bus.as_ref();
        let vcpus = vcpus.iter().zip(cpuid).enumerate();
        let vcpus = vcpus.map(|(id, (vcpu, cpuid))| {
            save(&vcpu.vcpu(), cpuid, saveable).map_err(|source| SaveError::Vcpu { id, source })
        });
        let devices = devices.iter().zip(virtio).map(|(device, transport)| {
            let transport = transport.lock().unwrap_or_else(PoisonError::into_inner);
            SavedDevice {
                transport: transport.save(),
                device: lock(device).save(),
            }
        });
        Ok(MachineState {
            config,
            clock: vm.clock()?,
            vcpus: vcpus.collect::<Result<_, _>>()?,
            ioapic: ioapic.save(),
            serial: serial.lock().unwrap_or_else(PoisonError::into_inner).save(),
            i8042: i8042.lock().unwrap_or_else(PoisonError::into_inner).save(),
            devices: devices.collect(),
        })
    }
}
