//! CPUID as the guest sees it: what KVM supports, with the topology of this machine and without what it has not.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Shape of the virtual package: one socket, `vcpus / threads` cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// vCPUs, 1 to 32.
    pub vcpus: u8,
    /// Threads per core, 1 or 2.
    pub threads: u8,
}

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const LEAF1_EBX_CLFLUSH: u32 = 8 << 8;
const EXT1_ECX_TOPOLOGY: u32 = 1 << 22;
const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;

impl Topology {
    /// Bits of an APIC id that tell threads of a core apart.
    fn thread_bits(self) -> u32 {
        u32::from(self.threads).next_power_of_two().trailing_zeros()
    }

    /// Bits of an APIC id that tell vCPUs of the package apart.
    fn package_bits(self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }

    fn cores(self) -> u32 {
        u32::from(self.vcpus.div_ceil(self.threads.max(1)))
    }
}

/// The CPUID of vCPU `id`, from what KVM supports. `tsc_deadline`: KVM emulates the local APIC's deadline timer.
pub fn for_vcpu(supported: &CpuId, topology: Topology, id: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    let mut has_b = false;
    for entry in cpuid.as_mut_slice() {
        has_b |= entry.function == 0xb;
        adjust(entry, topology, u32::from(id), tsc_deadline);
    }
    // A host without leaf 0xb has nothing to adjust; a guest then counts by leaf 1 and 0x8000_0008.
    debug_assert!(has_b || supported.as_slice().len() < 256);
    cpuid
}

fn adjust(entry: &mut kvm_cpuid_entry2, topology: Topology, id: u32, tsc_deadline: bool) {
    let vcpus = u32::from(topology.vcpus);
    match entry.function {
        0x1 => {
            let logical = vcpus.next_power_of_two();
            entry.ebx = (entry.ebx & 0xff) | LEAF1_EBX_CLFLUSH | logical << 16 | id << 24;
            entry.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC;
            // Without a timer of the PC's a guest must have this one; KVM emulates it but does not list it here
            // before Linux 6.9.
            set(&mut entry.ecx, LEAF1_ECX_TSC_DEADLINE, tsc_deadline);
            set(&mut entry.edx, LEAF1_EDX_HTT, vcpus > 1);
        }
        // Deterministic cache parameters: Intel's and AMD's. EAX bits 14-25: sharers minus 1; on Intel bits 26-31:
        // cores minus 1.
        0x4 | 0x8000_001d => {
            let level = entry.eax >> 5 & 7;
            let sharers = if level >= 3 {
                vcpus
            } else {
                u32::from(topology.threads)
            };
            entry.eax = (entry.eax & 0x3fff) | (sharers - 1) << 14;
            if entry.function == 0x4 {
                entry.eax |= (topology.cores().next_power_of_two() - 1) << 26;
            }
        }
        // No MONITOR, no performance counters: neither is emulated for the guest.
        0x5 | 0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0xb | 0x1f => topology_leaf(entry, topology, id),
        0x8000_0001 => {
            set(&mut entry.ecx, EXT1_ECX_CMP_LEGACY, vcpus > 1);
            entry.ecx |= EXT1_ECX_TOPOLOGY & entry.ecx;
        }
        // ECX: threads minus 1, and the bits of the APIC id that number them.
        0x8000_0008 => entry.ecx = (vcpus - 1) | topology.package_bits() << 12,
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id >> topology.thread_bits() | (u32::from(topology.threads) - 1) << 8;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Extended topology (Intel SDM 2A, CPUID 0BH): threads, then the package, then nothing.
fn topology_leaf(entry: &mut kvm_cpuid_entry2, topology: Topology, id: u32) {
    entry.flags |= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    let (shift, count, kind) = match entry.index {
        0 => (topology.thread_bits(), u32::from(topology.threads), 1),
        1 => (topology.package_bits(), u32::from(topology.vcpus), 2),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = count;
    entry.ecx = entry.index | kind << 8;
    entry.edx = id;
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let entry = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        };
        CpuId::from_entries(&[
            entry(1, 0),
            entry(4, 0),
            entry(0xb, 0),
            entry(0xb, 1),
            entry(0xb, 2),
            entry(0x8000_0008, 0),
            entry(0x8000_001e, 0),
        ])
        .unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|e| (e.function, e.index) == (function, index))
            .unwrap()
    }

    #[test]
    fn every_vcpu_has_its_own_id_and_the_same_shape() {
        for (vcpus, threads) in [(1, 1), (2, 1), (2, 2), (6, 2), (32, 1), (31, 1)] {
            let topology = Topology { vcpus, threads };
            for id in 0..vcpus {
                let cpuid = for_vcpu(&supported(), topology, id, true);
                let one = leaf(&cpuid, 1, 0);
                assert_eq!(one.ebx >> 24, u32::from(id));
                assert!(one.ebx >> 16 & 0xff >= u32::from(vcpus));
                assert_ne!(one.ecx & LEAF1_ECX_HYPERVISOR, 0);
                assert_eq!(one.edx & LEAF1_EDX_HTT != 0, vcpus > 1);
                let package = leaf(&cpuid, 0xb, 1);
                assert_eq!(package.edx, u32::from(id));
                assert_eq!(u32::from(id) >> package.eax, 0, "one package holds all");
                assert_eq!(leaf(&cpuid, 0xb, 0).ebx, u32::from(threads));
                assert_eq!(leaf(&cpuid, 0xb, 2).ebx, 0);
                assert_eq!(
                    leaf(&cpuid, 0x8000_0008, 0).ecx & 0xff,
                    u32::from(vcpus) - 1
                );
            }
        }
    }
}
