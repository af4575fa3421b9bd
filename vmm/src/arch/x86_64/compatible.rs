//! Whether a machine that was saved elsewhere can run on this processor.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::vcpu::state::CpuidLeaf;

/// What this host lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Incompatible {
    /// Another maker's processor.
    #[error("the machine was saved on a processor of {saved:?}, this is one of {present:?}")]
    Vendor {
        /// As saved.
        saved: String,
        /// Here.
        present: String,
    },
    /// Features that the guest may use already.
    #[error(
        "this processor, or its KVM, lacks CPU features of the saved machine: CPUID leaf {leaf:#x}.{subleaf}, \
         {register} bits {bits:#x}"
    )]
    Features {
        /// CPUID leaf.
        leaf: u32,
        /// Subleaf.
        subleaf: u32,
        /// Register.
        register: &'static str,
        /// The bits that are missing.
        bits: u32,
    },
}

/// Leaf, subleaf, and for EAX, EBX, ECX and EDX the bits that stand for something a guest may use. Left out are bits
/// that this VMM or KVM gives every guest (hypervisor, x2APIC, deadline timer), that say how the guest set itself up
/// (OSXSAVE, OSPKE, APIC), and numbers.
const FEATURES: [(u32, u32, [u32; 4]); 11] = [
    (
        0x1,
        0,
        [
            0,
            0,
            !(1 << 31 | 1 << 27 | 1 << 24 | 1 << 21),
            !(1 << 28 | 1 << 9),
        ],
    ),
    (0x7, 0, [0, u32::MAX, !(1 << 4), u32::MAX]),
    (0x7, 1, [u32::MAX, u32::MAX, u32::MAX, u32::MAX]),
    // State components of XCR0, and what XSAVE can.
    (0xd, 0, [u32::MAX, 0, 0, u32::MAX]),
    (0xd, 1, [u32::MAX, 0, 0, 0]),
    (0x4000_0001, 0, [u32::MAX, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !(1 << 1), !(1 << 9)]),
    (0x8000_0007, 0, [0, 0, 0, 1 << 8]),
    (0x8000_0008, 0, [0, u32::MAX, 0, 0]),
    (0x8000_000a, 0, [0, 0, 0, u32::MAX]),
    (0x8000_0021, 0, [u32::MAX, 0, 0, 0]),
];

const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

fn leaf_of(leaves: &[CpuidLeaf], leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
    // The index means nothing in a leaf without subleaves.
    let is_it = |l: &&CpuidLeaf| {
        l.function == leaf && (l.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || l.index == subleaf)
    };
    let found = leaves.iter().find(is_it)?;
    Some([found.eax, found.ebx, found.ecx, found.edx])
}

/// Whether all features in `saved` are in `supported`, which is what KVM can give a guest here.
pub fn check(saved: &[CpuidLeaf], supported: &CpuId) -> Result<(), Incompatible> {
    let present: Vec<_> = supported
        .as_slice()
        .iter()
        .map(|entry: &kvm_cpuid_entry2| CpuidLeaf::from(entry))
        .collect();
    let vendor = |leaves: &[CpuidLeaf]| {
        let [_, b, c, d] = leaf_of(leaves, 0, 0).unwrap_or_default();
        let bytes: Vec<u8> = [b, d, c].into_iter().flat_map(u32::to_le_bytes).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (theirs, ours) = (vendor(saved), vendor(&present));
    if theirs != ours {
        return Err(Incompatible::Vendor {
            saved: theirs,
            present: ours,
        });
    }
    for (leaf, subleaf, masks) in FEATURES {
        let wanted = leaf_of(saved, leaf, subleaf).unwrap_or_default();
        let there = leaf_of(&present, leaf, subleaf).unwrap_or_default();
        let registers = wanted.into_iter().zip(there).zip(masks).zip(REGISTERS);
        for (((wanted, there), mask), register) in registers {
            let bits = wanted & !there & mask;
            if bits != 0 {
                return Err(Incompatible::Features {
                    leaf,
                    subleaf,
                    register,
                    bits,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf {
            function,
            index,
            flags: 0,
            eax,
            ebx,
            ecx,
            edx,
        }
    }

    #[test]
    fn a_missing_feature_is_named_and_a_surplus_is_none() {
        let host = [
            leaf(0, 0, [16, 1, 2, 3]),
            leaf(1, 0, [0, 0, 0b0110, 0b11]),
            leaf(7, 0, [0, 0b1000, 0, 0]),
        ];
        let supported = crate::vcpu::state::to_cpuid(&host).unwrap();
        assert_eq!(check(&host, &supported), Ok(()));
        let mut fewer = host;
        (fewer[1].ecx, fewer[2].ebx) = (0b0010, 0);
        assert_eq!(check(&fewer, &supported), Ok(()));
        // The hypervisor's own bits do not count.
        fewer[1].ecx |= 1 << 31 | 1 << 24;
        assert_eq!(check(&fewer, &supported), Ok(()));
        fewer[2].ebx = 0b1_1000;
        let error = check(&fewer, &supported).unwrap_err().to_string();
        assert!(error.contains("leaf 0x7.0, EBX bits 0x10"), "{error}");
        fewer[0].ebx = 9;
        let error = check(&fewer, &supported).unwrap_err();
        assert!(matches!(error, Incompatible::Vendor { .. }), "{error}");
    }
}
