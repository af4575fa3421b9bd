//! The saved form of a vCPU, and the order in which KVM gives and takes it.
#![allow(unsafe_code)] // XSAVE areas whose size KVM decides

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// Bytes of XSAVE state that every KVM gives (`struct kvm_xsave`).
const XSAVE: usize = 4096;
/// More bytes than any processor's XSAVE state has.
const MAX_XSAVE: usize = 64 << 10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// One leaf of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CpuidLeaf {
    pub function: u32,
    pub index: u32,
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl From<&kvm_cpuid_entry2> for CpuidLeaf {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        CpuidLeaf {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        }
    }
}

/// A vCPU between two instructions. The structures of the kernel's interface are saved as they are: the interface is
/// for ever, and each has room for what is to come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// CPUID as the guest sees it.
    pub cpuid: Vec<CpuidLeaf>,
    /// Frequency of its time stamp counter, if KVM tells.
    pub tsc_khz: Option<u32>,
    /// Whether it runs, halts, or waits to be started.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, a pending interrupt.
    pub sregs: kvm_sregs,
    /// FPU and vector registers, as XSAVE stores them.
    pub xsave: Vec<u8>,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers: number and value.
    pub msrs: Vec<(u32, u64)>,
    /// Pending exceptions, NMIs and SMIs.
    pub events: kvm_vcpu_events,
}

/// Why a vCPU's state cannot be had, or not be set.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// A call failed.
    #[error("{call}: {source}")]
    Call {
        /// The ioctl.
        call: &'static str,
        /// KVM's reason.
        source: kvm_ioctls::Error,
    },
    /// KVM does not take a register's value.
    #[error("KVM refuses the value {value:#x} of MSR {index:#x}")]
    Msr {
        /// The register.
        index: u32,
        /// As saved.
        value: u64,
    },
    /// A list longer than KVM's own.
    #[error("{what}: {length} are too many")]
    TooMany {
        /// Which list.
        what: &'static str,
        /// Its length.
        length: usize,
    },
    /// More vector registers than this host has.
    #[error("XSAVE state of {saved} bytes; this host has {present}")]
    Xsave {
        /// As saved.
        saved: usize,
        /// Here.
        present: usize,
    },
}

type Result<T> = std::result::Result<T, VcpuStateError>;

fn call<T>(call: &'static str, result: std::result::Result<T, kvm_ioctls::Error>) -> Result<T> {
    result.map_err(|source| VcpuStateError::Call { call, source })
}

/// A vCPU that was only made.
pub struct Fresh {
    /// The vCPU.
    pub fd: VcpuFd,
    /// What it has, if that was looked up, but for its MSRs.
    pub has: Option<Box<VcpuState>>,
}

/// A vCPU that was set up, and the CPUID that KVM was given for it.
pub struct Vcpu {
    /// The vCPU.
    pub fd: VcpuFd,
    /// Its CPUID.
    pub cpuid: Vec<CpuidLeaf>,
}

/// What KVM can save of a vCPU on this host.
#[derive(Debug, Clone)]
pub struct Saveable {
    /// MSRs that KVM lists.
    pub msrs: Vec<u32>,
    /// Bytes of XSAVE state; 0 if KVM does not say.
    pub xsave: usize,
}

/// Saves a vCPU. None of the machine's vCPUs may run, and this one's last exit must be over: see `run` in
/// [`super`]. `cpuid` is what KVM was given: some KVMs tell more than that when asked.
///
/// The order: KVM_GET_MP_STATE first, because it lets the local APIC take pending INITs and start-ups, which changes
/// registers. KVM_GET_LAPIC before the MSRs, because it brings the APIC up to date with what was posted to it.
/// KVM_GET_VCPU_EVENTS last: the calls before may still move an interrupt that is on its way.
pub fn save(vcpu: &VcpuFd, cpuid: &[CpuidLeaf], saveable: &Saveable) -> Result<VcpuState> {
    let mp_state = call("KVM_GET_MP_STATE", vcpu.get_mp_state())?;
    Ok(VcpuState {
        cpuid: cpuid.to_vec(),
        // KVM without control over the counter does not tell: then guest and host tick alike.
        tsc_khz: vcpu.get_tsc_khz().ok(),
        mp_state,
        regs: call("KVM_GET_REGS", vcpu.get_regs())?,
        sregs: call("KVM_GET_SREGS", vcpu.get_sregs())?,
        xsave: save_xsave(vcpu, saveable.xsave)?,
        xcrs: call("KVM_GET_XCRS", vcpu.get_xcrs())?,
        debug: call("KVM_GET_DEBUGREGS", vcpu.get_debug_regs())?,
        lapic: call("KVM_GET_LAPIC", vcpu.get_lapic())?,
        msrs: save_msrs(vcpu, &saveable.msrs)?,
        events: call("KVM_GET_VCPU_EVENTS", vcpu.get_vcpu_events())?,
    })
}

/// Sets a vCPU that has not been in a guest yet.
///
/// The order: CPUID first, because KVM checks what follows against it. KVM_SET_SREGS before the local APIC, because
/// it has the APIC's mode. The APIC before the MSRs, because the deadline timer is armed only in an APIC that is set
/// up. The counter's frequency before its value. KVM_SET_REGS, which drops pending exceptions, before
/// KVM_SET_VCPU_EVENTS.
///
/// What it has already, as far as that is known, is not set again: on a host that is itself a guest each call is 10 us.
pub fn restore(fresh: Fresh, state: &VcpuState, saveable: &Saveable) -> Result<Vcpu> {
    let VcpuState {
        cpuid,
        tsc_khz,
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debug,
        lapic,
        msrs,
        events,
    } = state;
    let Fresh { fd: vcpu, has } = fresh;
    // Other leaves may mean other registers.
    let has = has.filter(|has| has.cpuid == *cpuid);
    let lacks = |is_same: fn(&VcpuState, &VcpuState) -> bool| match &has {
        Some(has) => !is_same(has, state),
        None => true,
    };
    if has.is_none() {
        call("KVM_SET_CPUID2", vcpu.set_cpuid2(&to_cpuid(cpuid)?))?;
    }
    if let Some(khz) = tsc_khz
        && lacks(|a, b| a.tsc_khz == b.tsc_khz)
    {
        set_tsc_khz(&vcpu, *khz)?;
    }
    if lacks(|a, b| a.mp_state == b.mp_state) {
        call("KVM_SET_MP_STATE", vcpu.set_mp_state(*mp_state))?;
    }
    call("KVM_SET_REGS", vcpu.set_regs(regs))?;
    call("KVM_SET_SREGS", vcpu.set_sregs(sregs))?;
    if lacks(|a, b| a.xsave == b.xsave) {
        restore_xsave(&vcpu, xsave, saveable.xsave)?;
    }
    if lacks(|a, b| a.xcrs == b.xcrs) {
        call("KVM_SET_XCRS", vcpu.set_xcrs(xcrs))?;
    }
    if lacks(|a, b| a.debug == b.debug) {
        call("KVM_SET_DEBUGREGS", vcpu.set_debug_regs(debug))?;
    }
    call("KVM_SET_LAPIC", vcpu.set_lapic(lapic))?;
    restore_msrs(&vcpu, msrs)?;
    call("KVM_SET_VCPU_EVENTS", vcpu.set_vcpu_events(events))?;
    if has_clock(msrs) {
        // It stood still: its watchdogs are not to bark. It may not be there yet for all the registers say.
        let _ = vcpu.kvmclock_ctrl();
    }
    Ok(Vcpu {
        fd: vcpu,
        cpuid: cpuid.clone(),
    })
}

/// Whether a guest with these registers has a kvm-clock (Linux, Documentation/virt/kvm/x86/msr.rst).
fn has_clock(msrs: &[(u32, u64)]) -> bool {
    const MSR_KVM_SYSTEM_TIME: [u32; 2] = [0x12, 0x4b56_4d01];
    const ENABLED: u64 = 1;
    let mut registers = msrs.iter();
    registers.any(|(index, value)| MSR_KVM_SYSTEM_TIME.contains(index) && value & ENABLED != 0)
}

/// CPUID as KVM takes it.
pub fn to_cpuid(leaves: &[CpuidLeaf]) -> Result<CpuId> {
    let entries: Vec<_> = leaves
        .iter()
        .map(|leaf| kvm_cpuid_entry2 {
            function: leaf.function,
            index: leaf.index,
            flags: leaf.flags,
            eax: leaf.eax,
            ebx: leaf.ebx,
            ecx: leaf.ecx,
            edx: leaf.edx,
            ..Default::default()
        })
        .collect();
    let too_many = |_| VcpuStateError::TooMany {
        what: "CPUID leaves",
        length: leaves.len(),
    };
    if leaves.len() > KVM_MAX_CPUID_ENTRIES {
        return Err(too_many(()));
    }
    CpuId::from_entries(&entries).map_err(|_| too_many(()))
}

/// Only where it differs: a host without control over the counter refuses any call.
fn set_tsc_khz(vcpu: &VcpuFd, khz: u32) -> Result<()> {
    match vcpu.get_tsc_khz() {
        Ok(present) if present == khz => Ok(()),
        _ => call("KVM_SET_TSC_KHZ", vcpu.set_tsc_khz(khz)),
    }
}

fn save_xsave(vcpu: &VcpuFd, size: usize) -> Result<Vec<u8>> {
    if size <= XSAVE {
        let xsave = call("KVM_GET_XSAVE", vcpu.get_xsave())?;
        return Ok(xsave.region.iter().flat_map(|w| w.to_le_bytes()).collect());
    }
    let mut xsave = xsave_area(size)?;
    // SAFETY: the area has the size that KVM asked for by KVM_CAP_XSAVE2, and nothing in this process enables more
    // vector state by arch_prctl.
    call("KVM_GET_XSAVE2", unsafe { vcpu.get_xsave2(&mut xsave) })?;
    let base = xsave.as_fam_struct_ref().xsave.region;
    let words = base.iter().chain(xsave.as_slice());
    Ok(words.flat_map(|word| word.to_le_bytes()).collect())
}

fn xsave_area(size: usize) -> Result<Xsave> {
    let too_many = VcpuStateError::TooMany {
        what: "bytes of XSAVE state",
        length: size,
    };
    if size > MAX_XSAVE {
        return Err(too_many);
    }
    Xsave::new(size.saturating_sub(XSAVE).div_ceil(4)).map_err(|_| too_many)
}

fn restore_xsave(vcpu: &VcpuFd, saved: &[u8], size: usize) -> Result<()> {
    let present = size.max(XSAVE);
    // A smaller area is as good: what it lacks is in its initial state.
    if saved.len() > present || saved.len() < XSAVE {
        return Err(VcpuStateError::Xsave {
            saved: saved.len(),
            present,
        });
    }
    let mut xsave = xsave_area(present)?;
    let mut words = saved
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| u32::from_le_bytes(*b));
    // SAFETY: only words inside the structure are written; its length field stays as it is.
    for (to, from) in unsafe { &mut xsave.as_mut_fam_struct().xsave.region }
        .iter_mut()
        .zip(&mut words)
    {
        *to = from;
    }
    for (to, from) in xsave.as_mut_slice().iter_mut().zip(words) {
        *to = from;
    }
    // SAFETY: the area has at least the size that KVM reads: `present` covers what KVM_CAP_XSAVE2 says.
    call("KVM_SET_XSAVE", unsafe { vcpu.set_xsave2(&xsave) })
}

fn entries(list: impl Iterator<Item = (u32, u64)>) -> Result<Msrs> {
    let entries: Vec<_> = list
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| VcpuStateError::TooMany {
        what: "MSRs",
        length: entries.len(),
    })
}

/// Reads all that can be read: KVM lists some that this processor, or this guest, does not have.
fn save_msrs(vcpu: &VcpuFd, list: &[u32]) -> Result<Vec<(u32, u64)>> {
    let mut saved = Vec::with_capacity(list.len());
    let mut rest = list;
    while !rest.is_empty() {
        let mut msrs = entries(rest.iter().map(|index| (*index, 0)))?;
        let read = call("KVM_GET_MSRS", vcpu.get_msrs(&mut msrs))?;
        let good = msrs.as_slice().iter().take(read);
        saved.extend(good.map(|msr| (msr.index, msr.data)));
        // KVM stopped at the first that it does not read.
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    // The deadline last: it counts by the time stamp counter, which another register sets.
    saved.sort_by_key(|(index, _)| *index == MSR_TSC_DEADLINE);
    Ok(saved)
}

/// Sets all; one that KVM refuses must have its value already.
fn restore_msrs(vcpu: &VcpuFd, saved: &[(u32, u64)]) -> Result<()> {
    let mut rest = saved;
    while !rest.is_empty() {
        let set = call(
            "KVM_SET_MSRS",
            vcpu.set_msrs(&entries(rest.iter().copied())?),
        )?;
        let Some(&(index, value)) = rest.get(set) else {
            return Ok(());
        };
        let mut present = entries([(index, 0)].into_iter())?;
        let read = call("KVM_GET_MSRS", vcpu.get_msrs(&mut present))?;
        let is_so = read == 1 && present.as_slice().iter().all(|msr| msr.data == value);
        if !is_so {
            return Err(VcpuStateError::Msr { index, value });
        }
        rest = rest.get(set + 1..).unwrap_or_default();
    }
    Ok(())
}
