//! A vCPU's registers at its first instruction.

use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::loader::Entry;
use lepton_devices::Memory;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const PRESENT_WRITABLE: u64 = 0b11;
const HUGE: u64 = 1 << 7;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Selectors that the Linux boot protocol demands: `__BOOT_CS` 0x10, `__BOOT_DS` 0x18.
const CODE: u16 = 2;
const DATA: u16 = 3;
const TASK: u16 = 4;

/// Why a vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct RegisterError {
    what: &'static str,
    source: kvm_ioctls::Error,
}

fn step<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, RegisterError> {
    result.map_err(|source| RegisterError { what, source })
}

/// A flat segment: base 0, limit 4 GiB.
fn segment(index: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

fn task_segment() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        type_: 11,
        s: 0,
        db: 0,
        g: 0,
        ..segment(TASK, 0, false)
    }
}

/// The descriptor of `segment` as it lies in a GDT (Intel SDM 3A, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 {
        u64::from(segment.limit >> 12)
    } else {
        u64::from(segment.limit)
    };
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff) | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

fn segments(entry: &Entry) -> [kvm_segment; 3] {
    let long = matches!(entry, Entry::Linux64 { .. });
    [
        segment(CODE, 11, long),
        segment(DATA, 3, false),
        task_segment(),
    ]
}

/// Writes the GDT, and the page tables if the kernel starts in long mode: the first GiB, mapped one to one.
pub fn write_tables(memory: &Memory, entry: &Entry) -> Result<(), GuestMemoryError> {
    let mut gdt = vec![0u64; 2];
    gdt.extend(segments(entry).iter().map(descriptor));
    let gdt: Vec<u8> = gdt.into_iter().flat_map(u64::to_le_bytes).collect();
    memory.write_slice(&gdt, GuestAddress(layout::GDT))?;
    if let Entry::Linux64 { .. } = entry {
        let (pml4, pdpt, directory) = (
            layout::BOOT_PML4,
            layout::BOOT_PML4 + 0x1000,
            layout::BOOT_PML4 + 0x2000,
        );
        memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt))?;
        let pages: Vec<u8> = (0..512u64)
            .flat_map(|i| (i << 21 | PRESENT_WRITABLE | HUGE).to_le_bytes())
            .collect();
        memory.write_slice(&pages, GuestAddress(directory))?;
    }
    Ok(())
}

/// Sets the boot processor's registers for `entry`. The others wait for the guest to start them.
pub fn set_boot_registers(vcpu: &VcpuFd, entry: &Entry) -> Result<(), RegisterError> {
    let mut special = step("KVM_GET_SREGS", vcpu.get_sregs())?;
    set_special(&mut special, entry);
    step("KVM_SET_SREGS", vcpu.set_sregs(&special))?;
    let mut general = kvm_regs {
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match *entry {
        // Linux boot protocol, 64-bit: RSI is the zero page.
        Entry::Linux64 { rip, .. } => {
            general.rip = rip;
            general.rsi = layout::ZERO_PAGE;
            general.rsp = layout::BOOT_STACK;
            general.rbp = layout::BOOT_STACK;
        }
        // PVH: EBX is the start info.
        Entry::Pvh { rip } => {
            general.rip = rip;
            general.rbx = layout::PVH_START_INFO;
        }
    }
    step("KVM_SET_REGS", vcpu.set_regs(&general))
}

fn set_special(special: &mut kvm_sregs, entry: &Entry) {
    let [code, data, task] = segments(entry);
    special.cs = code;
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.tr = task;
    special.gdt = kvm_dtable {
        base: layout::GDT,
        limit: 5 * 8 - 1,
        ..Default::default()
    };
    special.idt = kvm_dtable::default();
    special.cr0 = CR0_PE | CR0_ET;
    if let Entry::Linux64 { .. } = entry {
        special.cr0 |= CR0_PG;
        special.cr3 = layout::BOOT_PML4;
        special.cr4 = CR4_PAE;
        special.efer = EFER_LME | EFER_LMA;
    }
}

/// Sets what firmware sets in every processor's model-specific registers.
pub fn set_msrs(vcpu: &VcpuFd, extra: &[(u32, u64)]) -> Result<(), RegisterError> {
    let entries: Vec<_> = [
        (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ]
    .iter()
    .chain(extra)
    .map(|&(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    })
    .collect();
    let wanted = entries.len();
    let invalid = || RegisterError {
        what: "KVM_SET_MSRS",
        source: kvm_ioctls::Error::new(libc::EINVAL),
    };
    let msrs = Msrs::from_entries(&entries).map_err(|_| invalid())?;
    if step("KVM_SET_MSRS", vcpu.set_msrs(&msrs))? == wanted {
        Ok(())
    } else {
        Err(invalid())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_match_the_manual() {
        let long = Entry::Linux64 {
            rip: 0,
            header: None,
        };
        let [code, data, task] = segments(&long);
        assert_eq!(descriptor(&code), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task), 0x0000_8b00_0000_0067);
        let [code, ..] = segments(&Entry::Pvh { rip: 0 });
        assert_eq!(descriptor(&code), 0x00cf_9b00_0000_ffff);
    }
}
