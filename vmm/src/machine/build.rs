//! The cold boot: from a configuration to a paused machine at its first instruction.

use std::io::{self, Write};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;

use kvm_bindings::CpuId;
use lepton_devices::Memory;
use lepton_devices::legacy::i8042::I8042;
use lepton_devices::legacy::ioapic::IoApic;
use lepton_devices::legacy::serial::SerialPort;
use lepton_devices::rate_limiter::BucketConfig;
use lepton_devices::virtio::transport::mmio::SharedDevice;
use vmm_sys_util::eventfd::EventFd;

use super::Paused;
use super::assemble::{self, AssembleError, Parts};
use super::attach::{AttachError, Attached, Slots};
use super::generation::Generation;
use crate::arch::x86_64::acpi::{self, AcpiError, MmioDevice};
use crate::arch::x86_64::cpuid::{self, Topology};
use crate::arch::x86_64::registers::{self, RegisterError};
use crate::arch::x86_64::{layout, mptable};
use crate::config::cpu::CpuTemplate;
use crate::config::{BootSource, Shape};
use crate::events::{DeviceEvents, DevicesPaused};
use crate::kvm::{Hypervisor, KvmError, Vm};
use crate::loader::{self, BootInfo, Entry, Image, LoadError, Placed};
use crate::memory::{self, MemoryError, Origin, Ram};
use crate::reach::{self, ReachError};
use crate::vcpu::state::{CpuidLeaf, Vcpu};
use crate::vcpu::{Standby, Stop};

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum BuildError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    #[error("vCPU {id}: {source}")]
    Registers { id: u8, source: RegisterError },
    #[error("vCPU {id}: KVM_SET_CPUID2: {source}")]
    Cpuid { id: u8, source: kvm_ioctls::Error },
    #[error("boot tables: {0}")]
    Tables(#[from] vm_memory::GuestMemoryError),
    #[error("loader thread: {0}")]
    Loader(io::Error),
    #[error(transparent)]
    Files(#[from] ReachError),
    #[error(transparent)]
    Assemble(#[from] AssembleError),
}

/// Where the console's bytes go, and what tells that it can take more input.
pub struct Console {
    /// Output.
    pub out: Box<dyn Write + Send>,
    /// Output beyond this is dropped.
    pub limit: Option<BucketConfig>,
    /// Fires when the guest has read all input.
    pub room: Option<EventFd>,
}

/// What surrounds a machine: who is told of its end, how its threads are confined.
pub struct Surroundings {
    /// Told once when the machine stops by itself.
    pub stopped: Arc<dyn Fn(Stop) + Send + Sync>,
    /// Runs first on each vCPU thread.
    pub confine_vcpu: Arc<dyn Fn() -> io::Result<()> + Send + Sync>,
    /// The thread of the first vCPU, if it was started ahead.
    pub standby: Option<Standby>,
    /// `--boot-timer`.
    pub boot_timer: bool,
}

/// A machine at its first instruction, and the subscribers that its devices need in the event loop.
pub struct Built {
    /// The machine.
    pub machine: Paused,
    /// One per device.
    pub events: Vec<DeviceEvents>,
}

/// Everything a cold boot needs.
pub struct Blueprint<'a> {
    /// vCPUs and memory.
    pub shape: Shape,
    /// Changes to CPUID and MSRs.
    pub cpu: &'a CpuTemplate,
    /// Kernel, initrd, command line.
    pub boot: &'a mut BootSource,
    /// What the devices add to the command line.
    pub device_arguments: String,
    /// Devices by name, in the order of their slots.
    pub devices: Vec<(String, SharedDevice)>,
    /// COM1.
    pub console: Console,
    /// Its generation.
    pub generation: Generation,
}

/// Builds a machine. Nothing of it runs or is reachable yet if this fails.
pub fn build(
    hypervisor: &Hypervisor,
    blueprint: Blueprint<'_>,
    around: Surroundings,
) -> Result<Built, BuildError> {
    let Blueprint {
        shape,
        cpu,
        boot,
        device_arguments,
        devices,
        console,
        generation,
    } = blueprint;
    let (memory, origin) = match shape.clonable {
        true => {
            let (memory, file) = memory::allocate_shared(shape.memory, shape.huge_pages)?;
            (memory, Origin::Shared(file))
        }
        false => {
            let memory = memory::allocate(shape.memory, shape.huge_pages)?;
            (memory, Origin::Zeroes)
        }
    };
    let ram = Ram::new(memory.clone(), origin).tracked(shape.track_dirty_pages);
    log::debug!("memory mapped");
    hypervisor.begin_to_ask_for_cpuid(|| true);
    let (vm, loaded) = create_and_load(hypervisor, &memory, shape, boot)?;
    let pins = layout::VIRTIO_IRQ as usize + devices.len();
    let ioapic = Arc::new(IoApic::new(vm.msi_sink(), pins));
    let devices_paused = Arc::new(DevicesPaused::default());
    let slots = Slots {
        vm: &vm,
        memory: &memory,
        ioapic: &ioapic,
        paused: &devices_paused,
        dirty: ram.dirty(),
    };
    let attached = attach_all(&slots, &devices)?;
    let places: Vec<_> = attached.iter().map(|a| a.place).collect();
    log::debug!("{} devices attached", places.len());
    let entry = write_tables(&memory, shape, boot, loaded, &device_arguments, &places)?;
    generation.write(&ram)?;
    log::debug!("boot tables written");
    let vcpus = create_vcpus(hypervisor, &vm, shape, cpu, &entry)?;
    log::debug!("{} vCPUs made", vcpus.len());

    let wiring = assemble::serial_wiring(&ioapic, console);
    let parts = Parts {
        vm,
        ram,
        vcpus,
        serial: SerialPort::new(wiring),
        i8042: I8042::new(assemble::line(&ioapic, layout::I8042_IRQ)),
        ioapic,
        devices: devices.into_iter().map(|(_, device)| device).collect(),
        attached,
        devices_paused,
    };
    Ok(assemble::assemble(parts, around)?)
}

fn attach_all(
    slots: &Slots<'_>,
    devices: &[(String, SharedDevice)],
) -> Result<Vec<Attached>, AttachError> {
    devices
        .iter()
        .enumerate()
        .map(|(index, (id, device))| slots.attach(index, id, device.clone()))
        .collect()
}

/// Images this large take longer to load than a thread takes to come and go.
const WORTH_A_THREAD: u64 = 1 << 20;

/// Kernel and initrd in guest memory.
struct Loaded {
    entry: Entry,
    initrd: Option<Placed>,
}

/// Makes the virtual machine and loads what it boots, at the same time: KVM_CREATE_VM waits for the host kernel, ten
/// milliseconds on one with cgroups and no `favordynmods`, and the other reads files.
fn create_and_load(
    hypervisor: &Hypervisor,
    memory: &Memory,
    shape: Shape,
    boot: &mut BootSource,
) -> Result<(Vm, Loaded), BuildError> {
    let create = || hypervisor.create_vm(memory, shape.track_dirty_pages);
    let images = [Some(&boot.kernel), boot.initrd.as_ref()];
    let bytes = images.into_iter().flatten().map(Image::bytes);
    if bytes.fold(0, u64::saturating_add) < WORTH_A_THREAD {
        let vm = create()?;
        return Ok((vm, load(memory, boot)?));
    }
    thread::scope(|scope| {
        let loader = thread::Builder::new()
            .name("loader".into())
            .spawn_scoped(scope, || {
                reach::give_up_files()?;
                Ok(load(memory, boot)?)
            })
            .map_err(BuildError::Loader)?;
        let vm = create();
        log::debug!("virtual machine made");
        // With panic = "abort" there is no thread that panicked and can still be joined.
        let loaded: Result<_, BuildError> =
            loader.join().unwrap_or_else(|panic| resume_unwind(panic));
        Ok((vm?, loaded?))
    })
}

fn load(memory: &Memory, boot: &mut BootSource) -> Result<Loaded, LoadError> {
    let entry = loader::load_kernel(memory, &mut boot.kernel)?;
    let initrd = match &mut boot.initrd {
        Some(image) => Some(loader::load_initrd(memory, image)?),
        None => None,
    };
    log::debug!("kernel loaded");
    Ok(Loaded { entry, initrd })
}

/// Puts all that the kernel is told into memory.
fn write_tables(
    memory: &Memory,
    shape: Shape,
    boot: &BootSource,
    loaded: Loaded,
    device_arguments: &str,
    places: &[MmioDevice],
) -> Result<Entry, BuildError> {
    let Loaded { entry, initrd } = loaded;
    // As many as there are lines; attaching has bounded the devices.
    let pins = layout::VIRTIO_IRQ as u8 + places.len() as u8;
    mptable::write(memory, shape.topology.vcpus, pins)?;
    let rsdp = acpi::write(memory, shape.topology.vcpus, places)?;
    let command_line = command_line(&boot.arguments, device_arguments, places);
    let info = BootInfo {
        ram: shape.memory.bytes(),
        command_line: &command_line,
        initrd,
        rsdp,
    };
    loader::write_boot_info(memory, &entry, &info)?;
    registers::write_tables(memory, &entry)?;
    Ok(entry)
}

/// The user's arguments, then the root device, then the devices for a kernel without ACPI. What the user puts behind
/// `--` is for init and stays last.
fn command_line(user: &str, device_arguments: &str, places: &[MmioDevice]) -> String {
    let (kernel, init) = match user.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => (user, None),
    };
    let mut line = kernel.trim().to_owned();
    if !device_arguments.is_empty() {
        line.push_str(device_arguments);
    }
    for place in places {
        line.push_str(&format!(
            " virtio_mmio.device=4K@{:#x}:{}",
            place.address, place.irq
        ));
    }
    if let Some(init) = init {
        line.push_str(" -- ");
        line.push_str(init.trim());
    }
    line.trim_start().to_owned()
}

fn create_vcpus(
    hypervisor: &Hypervisor,
    vm: &Vm,
    shape: Shape,
    cpu: &CpuTemplate,
    entry: &Entry,
) -> Result<Vec<Vcpu>, BuildError> {
    let supported = hypervisor.supported_cpuid()?;
    let tsc_deadline = hypervisor.has_tsc_deadline();
    (0..shape.topology.vcpus)
        .map(|id| {
            let fd = vm.create_vcpu(id)?.fd;
            let leaves = cpuid_of(supported, shape.topology, id, tsc_deadline, cpu);
            fd.set_cpuid2(&leaves)
                .map_err(|source| BuildError::Cpuid { id, source })?;
            let failed = |source| BuildError::Registers { id, source };
            registers::set_msrs(&fd, &cpu.msrs(&fd)).map_err(failed)?;
            if id == 0 {
                registers::set_boot_registers(&fd, entry).map_err(failed)?;
            }
            Ok(Vcpu {
                fd,
                cpuid: leaves.as_slice().iter().map(CpuidLeaf::from).collect(),
            })
        })
        .collect()
}

fn cpuid_of(
    supported: &CpuId,
    topology: Topology,
    id: u8,
    tsc_deadline: bool,
    cpu: &CpuTemplate,
) -> CpuId {
    let mut leaves = cpuid::for_vcpu(supported, topology, id, tsc_deadline);
    cpu.apply(&mut leaves);
    leaves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_keeps_inits_arguments_last() {
        let place = MmioDevice {
            address: layout::VIRTIO_MMIO,
            irq: 5,
        };
        assert_eq!(
            command_line("quiet -- a b", " root=/dev/vda ro", &[place]),
            "quiet root=/dev/vda ro virtio_mmio.device=4K@0xc0001000:5 -- a b"
        );
        assert_eq!(command_line("", "", &[]), "");
        assert_eq!(command_line(" quiet ", "", &[]), "quiet");
    }
}
