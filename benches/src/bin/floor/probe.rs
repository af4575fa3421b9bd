//! The probe guest in nothing but a loop around KVM_RUN: what an exit costs before any VMM looks at it.

use std::error::Error;
use std::fs::File;
use std::io::Write;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit};
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{Cmdline, KernelLoader, load_cmdline};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const MEMORY: usize = 128 << 20;
const START_INFO: GuestAddress = GuestAddress(0x6000);
const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// A register page that says no more than that it is a virtio device.
const DEVICE: u64 = 0xd000_0000;
const SERIAL: u16 = 0x3f8;
const RESET: u16 = 0x64;

/// Runs the probe in the file `kernel` with these arguments until it resets, its serial port on the standard output.
pub fn run(kernel: &str, arguments: &str) -> Result<(), Box<dyn Error>> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])?;
    let loaded = Elf::load(&memory, None, &mut File::open(kernel)?, None)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err("the guest has no PVH entry".into());
    };
    let mut line = Cmdline::new(4096)?;
    line.insert_str(arguments)?;
    line.insert_str(format!("virtio_mmio.device=4K@{DEVICE:#x}:5"))?;
    load_cmdline(&memory, COMMAND_LINE, &line)?;
    let map = [hvm_memmap_table_entry {
        addr: 0,
        size: MEMORY as u64,
        type_: 1,
        ..Default::default()
    }];
    let info = hvm_start_info {
        magic: 0x336e_c578,
        version: 1,
        cmdline_paddr: COMMAND_LINE.raw_value(),
        memmap_paddr: MEMORY_MAP.raw_value(),
        memmap_entries: 1,
        ..Default::default()
    };
    let mut parameters = BootParams::new::<hvm_start_info>(&info, START_INFO);
    parameters.set_sections::<hvm_memmap_table_entry>(&map, MEMORY_MAP);
    PvhBootConfigurator::write_bootparams::<GuestMemoryMmap>(&parameters, &memory)?;

    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the memory lives until the end of this function, after the machine.
        unsafe { vm.set_user_memory_region(region)? };
    }
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        args: [24, 0, 0, 0],
        ..Default::default()
    })?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    // Protected mode without paging, flat segments (Xen's PVH boot ABI).
    let mut special = vcpu.get_sregs()?;
    let data = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    special.cs = kvm_segment {
        selector: 0x8,
        type_: 11,
        ..data
    };
    for segment in [&mut special.ds, &mut special.es, &mut special.ss] {
        *segment = data;
    }
    special.cr0 = 1;
    special.cr4 = 0;
    special.efer = 0;
    vcpu.set_sregs(&special)?;
    let mut general = vcpu.get_regs()?;
    general.rip = entry.raw_value();
    general.rbx = START_INFO.raw_value();
    general.rflags = 2;
    vcpu.set_regs(&general)?;

    let mut console = Vec::new();
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(SERIAL, bytes) => console.extend_from_slice(bytes),
            VcpuExit::IoOut(RESET, _) => break,
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
            VcpuExit::IoIn(_, bytes) => bytes.fill(0),
            VcpuExit::MmioRead(address, bytes) => {
                // Magic, version, device type (VIRTIO 1.3, 4.2.2).
                let value: u32 = match address.wrapping_sub(DEVICE) {
                    0 => 0x7472_6976,
                    4 | 8 => 2,
                    _ => 0,
                };
                bytes.fill(0);
                let length = bytes.len().min(4);
                bytes[..length].copy_from_slice(&value.to_le_bytes()[..length]);
            }
            other => return Err(format!("an unexpected exit: {other:?}").into()),
        }
    }
    std::io::stdout().write_all(&console)?;
    Ok(())
}
