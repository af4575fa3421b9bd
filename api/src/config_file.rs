//! The file of `--config-file`: a whole machine in one JSON document, and the same document as `GET /vm/config` gives
//! it. What `GET /vm/config` answers can be used as a configuration file.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::de::value::MapAccessDeserializer;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::action::Action;
use crate::json::{self, JsonError};
use crate::route::why_not_offered;
use crate::types::{
    BootSource, CpuConfig, Drive, Logger, MachineConfig, MetricsTarget, NetworkInterface, Serial,
    Vsock,
};

/// Largest configuration file or CPU template file read, in bytes.
pub const MAX_FILE: u64 = 4 << 20;

/// Why a configuration file cannot be used. The texts name the file and the key at fault.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// A file cannot be read.
    #[error("Cannot read {path}: {source}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The document does not have the form of a configuration.
    #[error("Invalid JSON in the configuration: {0}")]
    Invalid(#[from] JsonError),
    /// The file that `cpu-config` names does not have the form of a CPU template.
    #[error("Invalid JSON in the cpu-config file {path}: {source}", path = .path.display())]
    InvalidCpuConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: JsonError,
    },
    /// Two devices have one id. By single requests the second would replace the first; in one document it is a mistake.
    #[error("{key}: {id:?} is the id of two of them")]
    DuplicateId {
        /// The key.
        key: &'static str,
        /// The id.
        id: String,
    },
    /// The document asks for something that this VMM does not have.
    #[error("{key}: This VMM offers no {why}.")]
    NotOffered {
        /// The key.
        key: &'static str,
        /// What it would configure, and why it is not there.
        why: &'static str,
    },
}

/// Reads a configuration file. The result has one action for each part, in the order in which they are to be carried
/// out; starting the machine is not one of them.
pub fn load(path: &Path) -> Result<Vec<Action>, ConfigFileError> {
    let read = |path: &Path| {
        read_bounded(path).map_err(|source| ConfigFileError::Read {
            path: path.to_owned(),
            source,
        })
    };
    parse(&read(path)?, read)
}

/// Reads a configuration document. `read` gives the content of the file that `cpu-config` may name. The result is as
/// [`load`] describes.
pub fn parse(
    document: &[u8],
    read: impl FnOnce(&Path) -> Result<Vec<u8>, ConfigFileError>,
) -> Result<Vec<Action>, ConfigFileError> {
    let file: ConfigFile = json::parse(document)?;
    file.refuse_what_is_not_offered()?;
    let ConfigFile {
        boot_source,
        drives,
        machine_config,
        cpu_config,
        vsock,
        logger,
        metrics,
        network_interfaces,
        serial,
        balloon: _,
        entropy: _,
        memory_hotplug: _,
        mmds_config: _,
        pmem: _,
    } = file;
    refuse_duplicates("drives", drives.iter().map(|drive| &drive.drive_id))?;
    refuse_duplicates(
        "network-interfaces",
        network_interfaces
            .iter()
            .map(|interface| &interface.iface_id),
    )?;
    // The log first, so that what follows is in it. The machine's size before what depends on it.
    let mut actions = Vec::new();
    actions.extend(logger.map(Action::PutLogger));
    actions.extend(metrics.map(Action::PutMetrics));
    actions.extend(machine_config.map(Action::PutMachineConfig));
    match cpu_config {
        None => {}
        Some(CpuConfigOrPath::Config(config)) => actions.push(Action::PutCpuConfig(config)),
        Some(CpuConfigOrPath::Path(path)) => {
            let config = json::parse(&read(&path)?)
                .map_err(|source| ConfigFileError::InvalidCpuConfig { path, source })?;
            actions.push(Action::PutCpuConfig(config));
        }
    }
    actions.push(Action::PutBootSource(boot_source));
    actions.extend(drives.into_iter().map(Action::PutDrive));
    actions.extend(
        network_interfaces
            .into_iter()
            .map(Action::PutNetworkInterface),
    );
    actions.extend(vsock.map(Action::PutVsock));
    actions.extend(serial.map(Action::PutSerial));
    Ok(actions)
}

fn refuse_duplicates<'a>(
    key: &'static str,
    ids: impl Iterator<Item = &'a String>,
) -> Result<(), ConfigFileError> {
    let mut seen = BTreeSet::new();
    for id in ids {
        if !seen.insert(id) {
            let id = id.clone();
            return Err(ConfigFileError::DuplicateId { key, id });
        }
    }
    Ok(())
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    // Opened without blocking: a named pipe must be refused, not waited for.
    let file = File::options()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(path)?;
    if file.metadata()?.file_type().is_fifo() {
        return Err(io::Error::other("a named pipe cannot be a configuration"));
    }
    file.take(MAX_FILE.saturating_add(1))
        .read_to_end(&mut content)?;
    if content.len() as u64 > MAX_FILE {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("larger than the limit of {MAX_FILE} bytes"),
        ));
    }
    Ok(content)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ConfigFile {
    boot_source: BootSource,
    #[serde(default)]
    drives: Vec<Drive>,
    machine_config: Option<MachineConfig>,
    cpu_config: Option<CpuConfigOrPath>,
    vsock: Option<Vsock>,
    logger: Option<Logger>,
    metrics: Option<MetricsTarget>,
    #[serde(default)]
    network_interfaces: Vec<NetworkInterface>,
    serial: Option<Serial>,
    // Known so that they can be refused by name; null and an empty list ask for nothing.
    balloon: Option<Asked>,
    entropy: Option<Asked>,
    memory_hotplug: Option<Asked>,
    mmds_config: Option<Asked>,
    pmem: Option<Asked>,
}

impl ConfigFile {
    fn refuse_what_is_not_offered(&self) -> Result<(), ConfigFileError> {
        for (key, part, value) in [
            ("balloon", "balloon", &self.balloon),
            ("entropy", "entropy", &self.entropy),
            ("memory-hotplug", "hotplug", &self.memory_hotplug),
            ("mmds-config", "mmds", &self.mmds_config),
            ("pmem", "pmem", &self.pmem),
        ] {
            if value.as_ref().is_some_and(|asked| asked.0) {
                let why = why_not_offered(part).unwrap_or(part);
                return Err(ConfigFileError::NotOffered { key, why });
            }
        }
        Ok(())
    }
}

/// A value of any form; true unless it is an empty list.
struct Asked(bool);

impl<'de> Deserialize<'de> for Asked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AskedVisitor;
        impl<'de> Visitor<'de> for AskedVisitor {
            type Value = Asked;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object or a list")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Asked, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Asked(true))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Asked, A::Error> {
                let mut asked = false;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    asked = true;
                }
                Ok(Asked(asked))
            }
        }
        deserializer.deserialize_any(AskedVisitor)
    }
}

enum CpuConfigOrPath {
    Config(CpuConfig),
    Path(PathBuf),
}

impl<'de> Deserialize<'de> for CpuConfigOrPath {
    // By hand, because serde's untagged enums forget which field was at fault.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CpuConfigVisitor;
        impl<'de> Visitor<'de> for CpuConfigVisitor {
            type Value = CpuConfigOrPath;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a CPU template or the path of a file that holds one")
            }

            fn visit_str<E>(self, path: &str) -> Result<CpuConfigOrPath, E> {
                Ok(CpuConfigOrPath::Path(path.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CpuConfigOrPath, A::Error> {
                CpuConfig::deserialize(MapAccessDeserializer::new(map)).map(CpuConfigOrPath::Config)
            }
        }
        deserializer.deserialize_any(CpuConfigVisitor)
    }
}

/// Reply of `GET /vm/config`.
///
/// It has a key for each device of the specification, as clients expect; those that this VMM does not have are null or
/// empty. The log, the metrics, the CPU template and the serial console are never reported, as the specification has
/// it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", into = "FullVmConfigOnTheWire")]
pub struct FullVmConfig {
    /// What is booted; empty before it is set and after a restore.
    pub boot_source: BootSource,
    /// All drives, the root device first.
    pub drives: Vec<Drive>,
    /// The machine's size.
    pub machine_config: MachineConfig,
    /// All network interfaces.
    pub network_interfaces: Vec<NetworkInterface>,
    /// The vsock device.
    pub vsock: Option<Vsock>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct FullVmConfigOnTheWire {
    balloon: (),
    drives: Vec<Drive>,
    boot_source: BootSource,
    cpu_config: (),
    logger: (),
    machine_config: MachineConfig,
    metrics: (),
    mmds_config: (),
    network_interfaces: Vec<NetworkInterface>,
    vsock: Option<Vsock>,
    entropy: (),
    pmem: [(); 0],
    memory_hotplug: (),
}

impl From<FullVmConfig> for FullVmConfigOnTheWire {
    fn from(config: FullVmConfig) -> Self {
        let FullVmConfig {
            boot_source,
            drives,
            machine_config,
            network_interfaces,
            vsock,
        } = config;
        Self {
            balloon: (),
            drives,
            boot_source,
            cpu_config: (),
            logger: (),
            machine_config,
            metrics: (),
            mmds_config: (),
            network_interfaces,
            vsock,
            entropy: (),
            pmem: [],
            memory_hotplug: (),
        }
    }
}

#[cfg(test)]
mod tests;
