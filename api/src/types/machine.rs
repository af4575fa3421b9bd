//! What is booted, and on how much of a machine.

use serde::{Deserialize, Serialize};

/// Body of `PUT /boot-source`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// Path of the kernel image on the host.
    pub kernel_image_path: String,
    /// Path of the initial RAM disk on the host.
    pub initrd_path: Option<String>,
    /// Kernel command line. The VMM's own default when absent.
    pub boot_args: Option<String>,
}

/// Body of `PUT /machine-config` and reply of `GET /machine-config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, valid from 1 to 32.
    pub vcpu_count: u8,
    /// Guest memory in MiB. Any 64-bit number is accepted here: bound it before doing arithmetic on it.
    pub mem_size_mib: u64,
    /// Present vCPUs as hardware threads of the same core, in pairs.
    #[serde(default)]
    pub smt: bool,
    /// Deprecated named CPU template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Keep a record of written pages, for differential snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Page size behind guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Keep memory so that it need not be copied when the machine is first cloned. An addition.
    #[serde(default, skip_serializing_if = "is_not")]
    pub clonable: bool,
}

fn is_not(flag: &bool) -> bool {
    !flag
}

impl Default for MachineConfig {
    /// The machine before any `PUT`: one vCPU, 128 MiB.
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            clonable: false,
        }
    }
}

/// Body of `PATCH /machine-config`: what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigPatch {
    /// See [`MachineConfig::vcpu_count`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u8>,
    /// See [`MachineConfig::mem_size_mib`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u64>,
    /// See [`MachineConfig::smt`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    /// See [`MachineConfig::cpu_template`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// See [`MachineConfig::track_dirty_pages`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// See [`MachineConfig::huge_pages`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
    /// See [`MachineConfig::clonable`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clonable: Option<bool>,
}

/// Page size behind guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Ordinary 4 KiB pages.
    #[default]
    None,
    /// Ordinary pages that the host kernel may merge into huge ones.
    Transparent,
    /// hugetlbfs pages of 2 MiB.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// The deprecated named CPU templates of x86-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuTemplate {
    /// Intel, as an EC2 C3.
    C3,
    /// Intel, as an EC2 T2.
    T2,
    /// Intel, T2 with the means to move between Skylake and Cascade Lake.
    T2S,
    /// Intel, T2 on Cascade Lake and later.
    T2CL,
    /// AMD, close to a T2.
    T2A,
    /// No template.
    None,
}
