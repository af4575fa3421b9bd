//! The bare KVM program: what a machine costs before any VMM adds to it.
#![allow(unsafe_code)] // handing memory to KVM

use clap::ValueEnum;
use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::{Error, Kvm, VcpuExit};

/// Interrupt controllers a machine can have; each has its price, mostly at the end.
#[derive(Clone, Copy, ValueEnum)]
pub enum IrqChip {
    /// None.
    None,
    /// Local APICs only.
    Split,
    /// All of a PC's in the kernel.
    Full,
}

/// One page of guest memory, aligned as a slot must be.
#[repr(align(4096))]
struct Page([u8; 4096]);

/// Makes a machine, runs `out 0x64, al` in real mode, and returns.
pub fn run(irqchip: IrqChip) -> Result<(), Error> {
    let mut page = Box::new(Page([0; 4096]));
    page.0[..2].copy_from_slice(&[0xe6, 0x64]);
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0x1000,
        memory_size: 4096,
        userspace_addr: page.0.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the page lives until the end of this function, and the machine does not outlive it.
    unsafe { vm.set_user_memory_region(slot)? };
    match irqchip {
        IrqChip::None => {}
        IrqChip::Full => vm.create_irq_chip()?,
        IrqChip::Split => vm.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            args: [24, 0, 0, 0],
            ..Default::default()
        })?,
    }
    let mut vcpu = vm.create_vcpu(0)?;
    let mut special = vcpu.get_sregs()?;
    special.cs.base = 0;
    special.cs.selector = 0;
    vcpu.set_sregs(&special)?;
    let mut general = vcpu.get_regs()?;
    general.rip = 0x1000;
    general.rflags = 2;
    vcpu.set_regs(&general)?;
    match vcpu.run()? {
        VcpuExit::IoOut(0x64, _) => Ok(()),
        _ => Err(Error::new(5)),
    }
}
