//! How a device gets its place in a machine: a page of registers, an interrupt, kicks. The same for every device.

use std::sync::Arc;

use lepton_devices::Memory;
use lepton_devices::dirty::DirtyPages;
use lepton_devices::legacy::ioapic::{self, IoApic};
use lepton_devices::virtio::interrupt::Interrupt;
use lepton_devices::virtio::state::RestoreError;
use lepton_devices::virtio::transport::mmio::{MmioTransport, REGISTER_SPACE, SharedDevice, lock};
use vmm_sys_util::eventfd::EventFd;

use super::state::SavedDevice;
use crate::arch::x86_64::acpi::MmioDevice;
use crate::arch::x86_64::layout;
use crate::events::{DeviceEvents, DevicesPaused};
use crate::kvm::{KvmError, Vm};

/// Most devices a machine has: as many as there are interrupts for them.
pub const MAX_DEVICES: usize = ioapic::MAX_PINS - layout::VIRTIO_IRQ as usize;

/// Why a device found no place.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// All interrupts are taken.
    #[error("device {0} is one too many: a machine has room for {MAX_DEVICES}")]
    TooMany(String),
    /// KVM refused a kick.
    #[error("device {id}: {source}")]
    Kvm {
        /// The device.
        id: String,
        /// KVM's reason.
        source: KvmError,
    },
    /// Its saved state is refused.
    #[error("device {id}: {source}")]
    Restore {
        /// The device.
        id: String,
        /// What is wrong with the state.
        source: RestoreError,
    },
    /// The host is out of descriptors.
    #[error("device {id}: {source}")]
    Host {
        /// The device.
        id: String,
        /// The host's reason.
        source: std::io::Error,
    },
}

/// What a machine offers to its devices.
pub struct Slots<'a> {
    /// The machine in KVM.
    pub vm: &'a Vm,
    /// Its memory.
    pub memory: &'a Arc<Memory>,
    /// Its interrupt controller.
    pub ioapic: &'a Arc<IoApic>,
    /// Whether its devices are paused.
    pub paused: &'a Arc<DevicesPaused>,
    /// Where what they write is noted.
    pub dirty: Option<Arc<DirtyPages>>,
}

/// A device with its place.
pub struct Attached {
    /// Where the guest finds it.
    pub place: MmioDevice,
    /// Its registers, for the bus.
    pub transport: MmioTransport,
    /// Its events, for the event loop.
    pub events: DeviceEvents,
    /// Its way to the driver.
    pub interrupt: Arc<Interrupt>,
}

impl Slots<'_> {
    /// Where the guest finds the device in slot `index`.
    fn place(index: usize) -> Option<MmioDevice> {
        (index < MAX_DEVICES).then(|| MmioDevice {
            address: layout::VIRTIO_MMIO + index as u64 * REGISTER_SPACE,
            irq: layout::VIRTIO_IRQ + index as u32,
        })
    }

    /// Puts `device` into slot `index`.
    pub fn attach(
        &self,
        index: usize,
        id: &str,
        device: SharedDevice,
    ) -> Result<Attached, AttachError> {
        let too_many = || AttachError::TooMany(id.to_owned());
        let host = |source| AttachError::Host {
            id: id.to_owned(),
            source,
        };
        let place = Self::place(index).ok_or_else(too_many)?;
        let line = IoApic::line(self.ioapic, place.irq as usize).ok_or_else(too_many)?;
        let interrupt = Arc::new(Interrupt::new(line));
        let queues = lock(&device).queue_sizes().len();
        let mut kicks = Vec::with_capacity(queues);
        for queue in 0..queues {
            let kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host)?;
            self.vm
                .register_kick(place.address, queue as u32, &kick)
                .map_err(|source| AttachError::Kvm {
                    id: id.to_owned(),
                    source,
                })?;
            kicks.push(kick);
        }
        let watched = kicks
            .iter()
            .map(EventFd::try_clone)
            .collect::<Result<_, _>>()
            .map_err(host)?;
        let events = DeviceEvents::new(
            id.to_owned(),
            device.clone(),
            interrupt.clone(),
            watched,
            self.paused.clone(),
        )
        .map_err(host)?;
        let memory = self.memory.clone();
        let mut transport = MmioTransport::new(device, memory, interrupt.clone(), kicks);
        transport.track(self.dirty.clone());
        Ok(Attached {
            place,
            transport,
            events,
            interrupt,
        })
    }

    /// Puts `device` into slot `index` in the state that was saved. It looks at everything when it is woken.
    pub fn attach_restored(
        &self,
        index: usize,
        id: &str,
        device: SharedDevice,
        saved: &SavedDevice,
    ) -> Result<Attached, AttachError> {
        let restore = |source| AttachError::Restore {
            id: id.to_owned(),
            source,
        };
        // Before its registers are made: they offer what the device offers.
        lock(&device).load(&saved.device).map_err(restore)?;
        let mut attached = self.attach(index, id, device)?;
        let loaded = attached.transport.load(&saved.transport);
        loaded.map_err(restore)?;
        attached.events.expect_everything();
        Ok(attached)
    }
}
