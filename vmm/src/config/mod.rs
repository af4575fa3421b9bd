//! What a machine is to be. Each part is parsed from its wire form into a type that cannot be wrong; files are opened
//! and sockets bound here, so that a bad path is an error of the request that names it.

pub mod cpu;
pub mod devices;
pub mod saved;

use std::path::{Path, PathBuf};

use lepton_api::config_file::FullVmConfig;
use lepton_api::types as wire;
use lepton_devices::rate_limiter::BucketConfig;

use self::cpu::CpuTemplate;
use self::devices::{DeviceConfigError, Devices, bucket};
use crate::arch::x86_64::cpuid::Topology;
use crate::loader::{self, Image};
use crate::memory::{MemoryError, MemorySize};

/// Most vCPUs of a machine.
pub const MAX_VCPUS: u8 = 32;

/// Kernel arguments if nothing is said: reboot by the keyboard controller (the way out of the guest), no module
/// loading, no serial console.
const DEFAULT_ARGUMENTS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// What cannot be configured, and why.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// vCPU count out of bounds.
    #[error("vcpu_count {0} is not between 1 and {MAX_VCPUS}")]
    Vcpus(u8),
    /// Threads come in pairs.
    #[error("vcpu_count {0} is odd, and smt is on")]
    OddThreads(u8),
    /// No static template.
    #[error(
        "cpu_template {0:?} is not offered: give the same changes as a custom template by PUT /cpu-config"
    )]
    CpuTemplate(wire::CpuTemplate),
    /// Pages that cannot be shared one by one.
    #[error("clonable: a machine with huge_pages 2M cannot be cloned")]
    ClonableHuge,
    /// Memory size.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel or initrd cannot be opened.
    #[error("{what} {reason}")]
    Image {
        /// Which field.
        what: &'static str,
        /// The path and what is wrong with it.
        reason: String,
    },
    /// Arguments that no kernel takes.
    #[error("boot_args: {0}")]
    Arguments(String),
    /// A CPU template that cannot be applied.
    #[error(transparent)]
    Cpu(#[from] cpu::CpuTemplateError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceConfigError),
    /// The console's output cannot be opened.
    #[error("serial_out_path {0}")]
    Serial(#[source] crate::log::SinkError),
    /// Nothing to boot.
    #[error("no boot source: PUT /boot-source first")]
    NoBootSource,
}

/// vCPUs and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// vCPUs.
    pub topology: Topology,
    /// Memory.
    pub memory: MemorySize,
    /// Its pages.
    pub huge_pages: wire::HugePages,
    /// Whether a record of written pages is kept.
    pub track_dirty_pages: bool,
    /// Whether memory is in a file that clones can have.
    pub clonable: bool,
}

impl TryFrom<&wire::MachineConfig> for Shape {
    type Error = ConfigError;

    fn try_from(config: &wire::MachineConfig) -> Result<Self, ConfigError> {
        let vcpus = config.vcpu_count;
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(ConfigError::Vcpus(vcpus));
        }
        if config.smt && vcpus > 1 && !vcpus.is_multiple_of(2) {
            return Err(ConfigError::OddThreads(vcpus));
        }
        match config.cpu_template {
            None | Some(wire::CpuTemplate::None) => {}
            Some(template) => return Err(ConfigError::CpuTemplate(template)),
        }
        if config.clonable && config.huge_pages == wire::HugePages::Hugetlbfs2M {
            return Err(ConfigError::ClonableHuge);
        }
        Ok(Shape {
            topology: Topology {
                vcpus,
                threads: if config.smt && vcpus > 1 { 2 } else { 1 },
            },
            memory: MemorySize::new(config.mem_size_mib, config.huge_pages)?,
            huge_pages: config.huge_pages,
            track_dirty_pages: config.track_dirty_pages,
            clonable: config.clonable,
        })
    }
}

/// What is booted, open.
pub struct BootSource {
    /// The kernel.
    pub kernel: Image,
    /// The initrd.
    pub initrd: Option<Image>,
    /// Kernel arguments.
    pub arguments: String,
    wire: wire::BootSource,
}

impl TryFrom<wire::BootSource> for BootSource {
    type Error = ConfigError;

    fn try_from(wire: wire::BootSource) -> Result<Self, ConfigError> {
        let open = |what, path: &str| {
            loader::open_image(Path::new(path))
                .map_err(|reason| ConfigError::Image { what, reason })
        };
        let arguments = wire
            .boot_args
            .clone()
            .unwrap_or_else(|| DEFAULT_ARGUMENTS.to_owned());
        loader::check_arguments(&arguments).map_err(ConfigError::Arguments)?;
        Ok(BootSource {
            kernel: open("kernel_image_path", &wire.kernel_image_path)?,
            initrd: match &wire.initrd_path {
                Some(path) => Some(open("initrd_path", path)?),
                None => None,
            },
            arguments,
            wire,
        })
    }
}

/// Where the console's output goes, and how much of it.
#[derive(Debug, Clone, Default)]
pub struct SerialSettings {
    /// `None`: standard output, and input from the standard input.
    pub path: Option<PathBuf>,
    /// Output beyond this is dropped.
    pub limit: Option<BucketConfig>,
}

/// Everything said of a machine so far.
pub struct Configuration {
    machine: wire::MachineConfig,
    shape: Shape,
    boot: Option<BootSource>,
    cpu: CpuTemplate,
    /// The console.
    pub serial: SerialSettings,
    /// Drives, interfaces, vsock.
    pub devices: Devices,
    /// Something of the machine was set. The console is none of it: a machine that is loaded needs one too.
    touched: bool,
}

impl Configuration {
    /// One vCPU, 128 MiB, nothing else.
    pub fn new() -> Result<Self, ConfigError> {
        let machine = wire::MachineConfig::default();
        Ok(Configuration {
            shape: Shape::try_from(&machine)?,
            machine,
            boot: None,
            cpu: CpuTemplate::default(),
            serial: SerialSettings::default(),
            devices: Devices::default(),
            touched: false,
        })
    }

    /// Says that a request has set something of the machine.
    pub fn touch(&mut self) {
        self.touched = true;
    }

    /// Whether a request has set something of the machine.
    pub fn is_touched(&self) -> bool {
        self.touched
    }

    /// PUT /boot-source. On error what was there before stays.
    pub fn set_boot_source(&mut self, boot: wire::BootSource) -> Result<(), ConfigError> {
        self.boot = Some(boot.try_into()?);
        Ok(())
    }

    /// PUT /machine-config. On error what was there before stays.
    pub fn set_machine(&mut self, machine: wire::MachineConfig) -> Result<(), ConfigError> {
        self.shape = Shape::try_from(&machine)?;
        self.machine = machine;
        Ok(())
    }

    /// PATCH /machine-config: what is not named stays.
    pub fn patch_machine(&mut self, patch: wire::MachineConfigPatch) -> Result<(), ConfigError> {
        let old = &self.machine;
        self.set_machine(wire::MachineConfig {
            vcpu_count: patch.vcpu_count.unwrap_or(old.vcpu_count),
            mem_size_mib: patch.mem_size_mib.unwrap_or(old.mem_size_mib),
            smt: patch.smt.unwrap_or(old.smt),
            cpu_template: patch.cpu_template.or(old.cpu_template),
            track_dirty_pages: patch.track_dirty_pages.unwrap_or(old.track_dirty_pages),
            huge_pages: patch.huge_pages.unwrap_or(old.huge_pages),
            clonable: patch.clonable.unwrap_or(old.clonable),
        })
    }

    /// PUT /cpu-config. On error what was there before stays.
    pub fn set_cpu(&mut self, cpu: wire::CpuConfig) -> Result<(), ConfigError> {
        self.cpu = cpu.try_into()?;
        Ok(())
    }

    /// PUT /serial. On error what was there before stays.
    pub fn set_serial(&mut self, serial: wire::Serial) -> Result<(), ConfigError> {
        if let Some(path) = &serial.serial_out_path {
            // Opened again when the machine starts; here it only has to be possible.
            crate::log::open_sink(path).map_err(ConfigError::Serial)?;
        }
        self.serial = SerialSettings {
            path: serial.serial_out_path,
            limit: serial.rate_limiter.as_ref().map(bucket),
        };
        Ok(())
    }

    /// GET /machine-config.
    pub fn machine(&self) -> &wire::MachineConfig {
        &self.machine
    }

    /// vCPUs and memory.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Whether there is something to boot.
    pub fn has_boot_source(&self) -> bool {
        self.boot.is_some()
    }

    /// What a cold boot takes from here: kernel, CPU template, devices.
    pub fn to_boot(&mut self) -> Result<(&mut BootSource, &CpuTemplate, &Devices), ConfigError> {
        let boot = self.boot.as_mut().ok_or(ConfigError::NoBootSource)?;
        Ok((boot, &self.cpu, &self.devices))
    }

    /// GET /vm/config.
    pub fn full(&self) -> FullVmConfig {
        FullVmConfig {
            boot_source: self
                .boot
                .as_ref()
                .map(|boot| boot.wire.clone())
                .unwrap_or_default(),
            drives: self.devices.drives().cloned().collect(),
            machine_config: self.machine.clone(),
            network_interfaces: self.devices.interfaces().cloned().collect(),
            vsock: self.devices.vsock().cloned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(vcpu_count: u8, mem_size_mib: u64, smt: bool) -> wire::MachineConfig {
        wire::MachineConfig {
            vcpu_count,
            mem_size_mib,
            smt,
            ..Default::default()
        }
    }

    #[test]
    fn impossible_shapes_are_refused_by_value_and_change_nothing() {
        let mut configuration = Configuration::new().unwrap();
        for (vcpus, mib, smt, value) in [
            (0, 128, false, "0"),
            (33, 128, false, "33"),
            (3, 128, true, "3"),
            (1, 0, false, "0"),
            (1, 1 << 63, false, "9223372036854775808"),
            (1, u64::MAX, false, "18446744073709551615"),
        ] {
            let error = configuration
                .set_machine(machine(vcpus, mib, smt))
                .unwrap_err();
            assert!(error.to_string().contains(value), "{error}");
        }
        assert_eq!(*configuration.machine(), wire::MachineConfig::default());
        configuration.set_machine(machine(1, 64, true)).unwrap();
        assert_eq!(configuration.shape().topology.threads, 1);
        configuration.set_machine(machine(4, 64, true)).unwrap();
        assert_eq!(configuration.shape().topology.threads, 2);
    }

    #[test]
    fn a_patch_leaves_what_it_does_not_name() {
        let mut configuration = Configuration::new().unwrap();
        configuration.set_machine(machine(4, 256, true)).unwrap();
        let patch = wire::MachineConfigPatch {
            vcpu_count: Some(2),
            ..Default::default()
        };
        configuration.patch_machine(patch).unwrap();
        assert_eq!(*configuration.machine(), machine(2, 256, true));
    }

    #[test]
    fn boot_files_are_opened_at_once() {
        let mut configuration = Configuration::new().unwrap();
        let source = |kernel: &str, initrd: Option<&str>| wire::BootSource {
            kernel_image_path: kernel.into(),
            initrd_path: initrd.map(Into::into),
            boot_args: None,
        };
        for (bad, name) in [
            (source("/no/kernel", None), "/no/kernel"),
            (source("/", None), "/ is a directory"),
            (source("/dev/null", None), "/dev/null is not a regular file"),
            (source("/proc/self/exe", Some("/no/initrd")), "/no/initrd"),
        ] {
            let error = configuration.set_boot_source(bad).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
        assert!(matches!(
            configuration.to_boot(),
            Err(ConfigError::NoBootSource)
        ));
        configuration
            .set_boot_source(source("/proc/self/exe", None))
            .unwrap();
        assert!(configuration.to_boot().is_ok());
    }
}
