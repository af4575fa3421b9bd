//! Custom CPU templates: bits of CPUID leaves and MSRs forced to a value.

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use lepton_api::types::{Bitmap32, Bitmap64, CpuConfig, CpuidRegister, KvmCapability};

use crate::kvm::Hypervisor;

/// Most changes of each kind; more than there are leaves on any processor.
const MAX_MODIFIERS: usize = 256;

/// A template that cannot be applied on this host.
#[derive(Debug, thiserror::Error)]
pub enum CpuTemplateError {
    /// Too many changes.
    #[error("{what}: {count} are more than {MAX_MODIFIERS}")]
    TooMany {
        /// Which list.
        what: &'static str,
        /// Its length.
        count: usize,
    },
    /// KVM lacks a capability that the template asks for.
    #[error("kvm_capabilities: this host's KVM lacks capability {0}")]
    Missing(u32),
    /// KVM offers no such leaf.
    #[error("cpuid_modifiers: this host's KVM has no leaf {leaf:#x}, subleaf {subleaf:#x}")]
    Leaf {
        /// CPUID leaf.
        leaf: u32,
        /// Its subleaf.
        subleaf: u32,
    },
    /// KVM itself cannot be asked.
    #[error(transparent)]
    Kvm(#[from] crate::kvm::KvmError),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Leaf {
    leaf: u32,
    subleaf: u32,
    registers: Vec<(CpuidRegister, Bitmap32)>,
}

/// A template whose leaves and capabilities this host has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuTemplate {
    leaves: Vec<Leaf>,
    msrs: Vec<(u32, Bitmap64)>,
}

fn bounded(what: &'static str, count: usize) -> Result<(), CpuTemplateError> {
    if count > MAX_MODIFIERS {
        return Err(CpuTemplateError::TooMany { what, count });
    }
    Ok(())
}

impl TryFrom<CpuConfig> for CpuTemplate {
    type Error = CpuTemplateError;

    fn try_from(config: CpuConfig) -> Result<Self, CpuTemplateError> {
        let CpuConfig {
            kvm_capabilities,
            cpuid_modifiers,
            msr_modifiers,
        } = config;
        bounded("kvm_capabilities", kvm_capabilities.len())?;
        bounded("cpuid_modifiers", cpuid_modifiers.len())?;
        bounded("msr_modifiers", msr_modifiers.len())?;
        if kvm_capabilities.is_empty() && cpuid_modifiers.is_empty() {
            let msrs = msr_modifiers.iter().map(|m| (m.addr, m.bitmap)).collect();
            return Ok(CpuTemplate {
                leaves: Vec::new(),
                msrs,
            });
        }
        let hypervisor = Hypervisor::open()?;
        for capability in kvm_capabilities {
            if let KvmCapability::Add(number) = capability
                && !hypervisor.has_capability(number)
            {
                return Err(CpuTemplateError::Missing(number));
            }
        }
        let supported = hypervisor.supported_cpuid()?;
        let mut leaves = Vec::with_capacity(cpuid_modifiers.len());
        for modifier in cpuid_modifiers {
            let (leaf, subleaf) = (modifier.leaf, modifier.subleaf);
            if !supported
                .as_slice()
                .iter()
                .any(|e| (e.function, e.index) == (leaf, subleaf))
            {
                return Err(CpuTemplateError::Leaf { leaf, subleaf });
            }
            leaves.push(Leaf {
                leaf,
                subleaf,
                registers: modifier
                    .modifiers
                    .iter()
                    .map(|m| (m.register, m.bitmap))
                    .collect(),
            });
        }
        Ok(CpuTemplate {
            leaves,
            msrs: msr_modifiers.iter().map(|m| (m.addr, m.bitmap)).collect(),
        })
    }
}

impl CpuTemplate {
    /// Changes `cpuid` as the template says.
    pub fn apply(&self, cpuid: &mut CpuId) {
        for wanted in &self.leaves {
            let entry = cpuid
                .as_mut_slice()
                .iter_mut()
                .find(|e| (e.function, e.index) == (wanted.leaf, wanted.subleaf));
            if let Some(entry) = entry {
                for (register, bitmap) in &wanted.registers {
                    let value = register_of(entry, *register);
                    *value = bitmap.apply(*value);
                }
            }
        }
    }

    /// The MSRs to set on `vcpu`: its own values with the template's bits.
    pub fn msrs(&self, vcpu: &VcpuFd) -> Vec<(u32, u64)> {
        self.msrs
            .iter()
            .map(|(index, bitmap)| (*index, bitmap.apply(read_msr(vcpu, *index))))
            .collect()
    }
}

fn register_of(entry: &mut kvm_cpuid_entry2, register: CpuidRegister) -> &mut u32 {
    match register {
        CpuidRegister::Eax => &mut entry.eax,
        CpuidRegister::Ebx => &mut entry.ebx,
        CpuidRegister::Ecx => &mut entry.ecx,
        CpuidRegister::Edx => &mut entry.edx,
    }
}

/// An MSR's value now; 0 if it cannot be read, and then setting it will fail by name.
fn read_msr(vcpu: &VcpuFd, index: u32) -> u64 {
    let entry = kvm_msr_entry {
        index,
        ..Default::default()
    };
    let Ok(mut msrs) = Msrs::from_entries(&[entry]) else {
        return 0;
    };
    match vcpu.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice().first().map_or(0, |e| e.data),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_forced_and_the_rest_stays() {
        let template = CpuTemplate {
            leaves: vec![Leaf {
                leaf: 1,
                subleaf: 0,
                registers: vec![(
                    CpuidRegister::Ecx,
                    Bitmap32 {
                        mask: 0b11,
                        value: 0b01,
                    },
                )],
            }],
            msrs: Vec::new(),
        };
        let entry = kvm_cpuid_entry2 {
            function: 1,
            ecx: 0b1110,
            ..Default::default()
        };
        let mut cpuid = CpuId::from_entries(&[entry]).unwrap();
        template.apply(&mut cpuid);
        assert_eq!(cpuid.as_slice()[0].ecx, 0b1101);
    }

    #[test]
    fn too_many_changes_are_refused() {
        let config = CpuConfig {
            kvm_capabilities: vec![KvmCapability::Add(1); MAX_MODIFIERS + 1],
            ..Default::default()
        };
        assert!(matches!(
            CpuTemplate::try_from(config),
            Err(CpuTemplateError::TooMany { count: 257, .. })
        ));
    }
}
