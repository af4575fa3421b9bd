//! The bare KVM program: what a machine costs before any VMM adds to it.
//!
//! It makes a machine of the given memory with one vCPU, runs one instruction and ends. When that instruction has left
//! the guest, it writes the marker byte that the benchmarks' guests write too, then the time since KVM_CREATE_VM.
//!
//! With a kernel and a command line, it runs the probe guest instead.
#![allow(unsafe_code)] // handing memory to KVM

mod probe;

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit};
use lepton_benches::guest::MARKER;
use lepton_benches::side::IrqChip;
use vm_memory::mmap::MmapRegion;

const PORT: u16 = 0x64;
/// Where the code lies: the first page is left alone.
const ENTRY: usize = 0x1000;

/// `IRQCHIP MIB`, read without a parser: this program is to cost nothing but its machine.
fn arguments() -> Option<(IrqChip, usize)> {
    let mut words = std::env::args().skip(1);
    let irqchip = IrqChip::from_str(&words.next()?, false).ok()?;
    let mib: usize = words.next()?.parse().ok()?;
    Some((irqchip, mib.checked_mul(1 << 20).filter(|size| *size > 0)?))
}

fn run(irqchip: IrqChip, size: usize) -> Result<Duration, Box<dyn std::error::Error>> {
    let kvm = Kvm::new()?;
    let started = Instant::now();
    let vm = kvm.create_vm()?;
    let memory = MmapRegion::<()>::new(size)?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: size as u64,
        userspace_addr: memory.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the region is `size` bytes long and lives until the end of this function, after the machine.
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
    // out 0x64, al
    let code = [0xe6, PORT as u8];
    // SAFETY: ENTRY and the code lie within the region, which nobody else uses yet.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), memory.as_ptr().add(ENTRY), code.len()) };
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut special = vcpu.get_sregs()?;
    special.cs.base = 0;
    special.cs.selector = 0;
    vcpu.set_sregs(&special)?;
    let mut general = vcpu.get_regs()?;
    general.rip = ENTRY as u64;
    general.rflags = 2;
    vcpu.set_regs(&general)?;
    match vcpu.run()? {
        VcpuExit::IoOut(PORT, _) => Ok(started.elapsed()),
        other => Err(format!("an unexpected exit: {other:?}").into()),
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    if let [_, word, kernel, line] = words.as_slice()
        && word == "probe"
    {
        return match probe::run(kernel, line) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("lepton-floor: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let Some((irqchip, size)) = arguments() else {
        eprintln!(
            "usage: lepton-floor none|split|full MIB, or lepton-floor probe KERNEL ARGUMENTS"
        );
        return ExitCode::FAILURE;
    };
    let written = run(irqchip, size).and_then(|took| {
        let mut out = std::io::stdout().lock();
        out.write_all(&[MARKER])?;
        Ok(writeln!(out, "{}", took.as_nanos())?)
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lepton-floor: {error}");
            ExitCode::FAILURE
        }
    }
}
