//! The configuration as it is saved with a machine: what the machine is built from again, before its state is put in.
//! It goes the same way as a request does: parsed, checked, opened.

use lepton_api::types as wire;
use lepton_devices::virtio::block::Image;
use serde::{Deserialize, Serialize};

use super::{ConfigError, Configuration};

/// vCPUs, memory and devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedConfig {
    /// vCPUs and memory.
    pub machine: SavedMachine,
    /// Drives, the root device first.
    pub drives: Vec<SavedDrive>,
    /// Interfaces.
    pub interfaces: Vec<SavedInterface>,
    /// Socket device.
    pub vsock: Option<SavedVsock>,
}

/// vCPUs and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SavedMachine {
    pub vcpu_count: u8,
    pub mem_size_mib: u64,
    pub smt: bool,
    pub huge_pages: SavedHugePages,
}

/// Pages behind memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum SavedHugePages {
    None,
    Transparent,
    Hugetlbfs2M,
}

/// A drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SavedDrive {
    pub drive_id: String,
    pub partuuid: Option<String>,
    pub is_root_device: bool,
    pub is_writeback: bool,
    pub is_read_only: bool,
    pub path_on_host: String,
    pub is_async: bool,
    pub limiter: SavedLimiter,
    pub overlay: Option<SavedOverlay>,
}

/// The overlay of a drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SavedOverlay {
    /// Empty if it has no name.
    pub path: String,
    pub layers: Vec<String>,
}

impl From<&wire::DriveOverlay> for SavedOverlay {
    fn from(wire: &wire::DriveOverlay) -> Self {
        let wire::DriveOverlay { path, layers } = wire.clone();
        SavedOverlay {
            path: path.unwrap_or_default(),
            layers,
        }
    }
}

impl From<&SavedOverlay> for wire::DriveOverlay {
    fn from(saved: &SavedOverlay) -> Self {
        let SavedOverlay { path, layers } = saved.clone();
        wire::DriveOverlay {
            path: Some(path).filter(|path| !path.is_empty()),
            layers,
        }
    }
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SavedInterface {
    pub iface_id: String,
    pub host_dev_name: String,
    pub guest_mac: Option<[u8; 6]>,
    pub mtu: Option<u16>,
    pub rx_limiter: SavedLimiter,
    pub tx_limiter: SavedLimiter,
}

/// The socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SavedVsock {
    pub guest_cid: u32,
    pub uds_path: String,
}

/// A rate limiter as configured: size, one-time burst and refill time of each bucket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SavedLimiter {
    pub bandwidth: Option<(u64, Option<u64>, u64)>,
    pub ops: Option<(u64, Option<u64>, u64)>,
}

impl From<Option<wire::RateLimiter>> for SavedLimiter {
    fn from(limiter: Option<wire::RateLimiter>) -> Self {
        let bucket = |b: wire::TokenBucket| (b.size, b.one_time_burst, b.refill_time);
        let wire::RateLimiter { bandwidth, ops } = limiter.unwrap_or_default();
        SavedLimiter {
            bandwidth: bandwidth.map(bucket),
            ops: ops.map(bucket),
        }
    }
}

impl From<&SavedLimiter> for Option<wire::RateLimiter> {
    fn from(saved: &SavedLimiter) -> Self {
        let bucket = |(size, one_time_burst, refill_time)| wire::TokenBucket {
            size,
            one_time_burst,
            refill_time,
        };
        let SavedLimiter { bandwidth, ops } = saved;
        (bandwidth.is_some() || ops.is_some()).then(|| wire::RateLimiter {
            bandwidth: bandwidth.map(bucket),
            ops: ops.map(bucket),
        })
    }
}

fn drive(wire: &wire::Drive) -> SavedDrive {
    let wire::Drive {
        drive_id,
        partuuid,
        is_root_device,
        cache_type,
        is_read_only,
        path_on_host,
        rate_limiter,
        io_engine,
        // Never accepted.
        socket: _,
        overlay,
    } = wire.clone();
    SavedDrive {
        drive_id,
        partuuid,
        is_root_device,
        is_writeback: cache_type == wire::CacheType::Writeback,
        is_read_only: is_read_only.unwrap_or(false),
        path_on_host: path_on_host.unwrap_or_default(),
        is_async: io_engine == Some(wire::IoEngine::Async),
        limiter: rate_limiter.into(),
        overlay: overlay.as_ref().map(SavedOverlay::from),
    }
}

fn interface(wire: &wire::NetworkInterface) -> SavedInterface {
    let wire::NetworkInterface {
        iface_id,
        host_dev_name,
        guest_mac,
        mtu,
        rx_rate_limiter,
        tx_rate_limiter,
    } = wire.clone();
    SavedInterface {
        iface_id,
        host_dev_name,
        guest_mac: guest_mac.map(|mac| mac.0),
        mtu,
        rx_limiter: rx_rate_limiter.into(),
        tx_limiter: tx_rate_limiter.into(),
    }
}

impl From<&Configuration> for SavedConfig {
    fn from(configuration: &Configuration) -> Self {
        let wire::MachineConfig {
            vcpu_count,
            mem_size_mib,
            smt,
            // Never accepted but as None; CPUID is saved with each vCPU.
            cpu_template: _,
            // Asked for anew with each load.
            track_dirty_pages: _,
            // A machine that is loaded has its memory from elsewhere.
            clonable: _,
            huge_pages,
        } = configuration.machine().clone();
        let devices = &configuration.devices;
        SavedConfig {
            machine: SavedMachine {
                vcpu_count,
                mem_size_mib,
                smt,
                huge_pages: match huge_pages {
                    wire::HugePages::None => SavedHugePages::None,
                    wire::HugePages::Transparent => SavedHugePages::Transparent,
                    wire::HugePages::Hugetlbfs2M => SavedHugePages::Hugetlbfs2M,
                },
            },
            drives: devices.drives().map(drive).collect(),
            interfaces: devices.interfaces().map(interface).collect(),
            vsock: devices.vsock().map(|vsock| SavedVsock {
                guest_cid: vsock.guest_cid,
                uds_path: vsock.uds_path.clone(),
            }),
        }
    }
}

/// A drive's image that another process has opened.
pub struct HandedImage {
    /// The drive.
    pub drive_id: String,
    /// What is behind it.
    pub image: Image,
    /// Where its own overlay is, if that has a name.
    pub path: Option<String>,
}

/// Devices that are somewhere else than when the machine was saved, and what the load says of memory.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// Interface and tap.
    pub taps: Vec<(String, String)>,
    /// Drives and images.
    pub images: Vec<wire::DriveOverride>,
    /// Socket of the vsock.
    pub socket: Option<String>,
    /// Pages behind memory.
    pub huge_pages: wire::LoadHugePages,
    /// Keep a record of written pages.
    pub track_dirty_pages: bool,
}

/// Why a saved configuration cannot be built here.
#[derive(Debug, thiserror::Error)]
pub enum SavedConfigError {
    /// An override of something that is not there.
    #[error("{what}: the snapshot has no {kind} {id}")]
    Unknown {
        /// Field of the request.
        what: &'static str,
        /// Kind of device.
        kind: &'static str,
        /// The name given.
        id: String,
    },
    /// Two devices of one name.
    #[error("the snapshot has two devices called {0}")]
    Duplicate(String),
    /// What is configured cannot be had.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl SavedConfig {
    /// The same without devices.
    #[must_use]
    pub fn without_devices(&self) -> Self {
        SavedConfig {
            machine: self.machine.clone(),
            drives: Vec::new(),
            interfaces: Vec::new(),
            vsock: None,
        }
    }

    /// Changes where devices are.
    pub fn apply(&mut self, overrides: &Overrides) -> Result<(), SavedConfigError> {
        let unknown = |what, kind, id: &str| SavedConfigError::Unknown {
            what,
            kind,
            id: id.to_owned(),
        };
        for (id, tap) in &overrides.taps {
            let interface = self.interfaces.iter_mut().find(|i| i.iface_id == *id);
            interface
                .ok_or_else(|| unknown("network_overrides", "interface", id))?
                .host_dev_name
                .clone_from(tap);
        }
        for image in &overrides.images {
            let wire::DriveOverride {
                drive_id,
                path_on_host,
                overlay,
            } = image;
            let drive = self.drives.iter_mut().find(|d| d.drive_id == *drive_id);
            let drive = drive.ok_or_else(|| unknown("drive_overrides", "drive", drive_id))?;
            drive.path_on_host.clone_from(path_on_host);
            if let Some(overlay) = overlay {
                drive.overlay = Some(overlay.into());
            }
        }
        if let Some(path) = &overrides.socket {
            let vsock = self.vsock.as_mut();
            vsock
                .ok_or_else(|| unknown("vsock_override", "device", "vsock"))?
                .uds_path
                .clone_from(path);
        }
        Ok(())
    }

    /// Opens images and taps and binds the socket, as the requests did by which the machine was configured. Images that
    /// were `handed` are open.
    pub fn build(
        &self,
        overrides: &Overrides,
        mut handed: Vec<HandedImage>,
    ) -> Result<Configuration, SavedConfigError> {
        let mut configuration = Configuration::new()?;
        let SavedMachine {
            vcpu_count,
            mem_size_mib,
            smt,
            huge_pages,
        } = self.machine.clone();
        let saved = match huge_pages {
            SavedHugePages::None => wire::HugePages::None,
            SavedHugePages::Transparent => wire::HugePages::Transparent,
            SavedHugePages::Hugetlbfs2M => wire::HugePages::Hugetlbfs2M,
        };
        configuration.set_machine(wire::MachineConfig {
            vcpu_count,
            mem_size_mib,
            smt,
            cpu_template: None,
            track_dirty_pages: overrides.track_dirty_pages,
            huge_pages: overrides.huge_pages.resolve(saved),
            clonable: false,
        })?;
        let names = self.drives.iter().map(|d| &d.drive_id);
        refuse_twins(names)?;
        refuse_twins(self.interfaces.iter().map(|i| &i.iface_id))?;
        let devices = &mut configuration.devices;
        for drive in &self.drives {
            let mut wire = wire::Drive::from(drive);
            let is_it = |handed: &HandedImage| handed.drive_id == drive.drive_id;
            let put = match handed.iter().position(is_it) {
                None => devices.put_drive(wire),
                Some(index) => {
                    let HandedImage { image, path, .. } = handed.swap_remove(index);
                    if let (Some(overlay), false) = (&mut wire.overlay, drive.is_read_only) {
                        overlay.path = path;
                    }
                    devices.put_handed_drive(wire, image)
                }
            };
            put.map_err(ConfigError::from)?;
        }
        for interface in &self.interfaces {
            devices
                .put_interface(interface.into())
                .map_err(ConfigError::from)?;
        }
        if let Some(SavedVsock {
            guest_cid,
            uds_path,
        }) = self.vsock.clone()
        {
            devices
                .put_vsock(wire::Vsock {
                    vsock_id: None,
                    guest_cid,
                    uds_path,
                })
                .map_err(ConfigError::from)?;
        }
        Ok(configuration)
    }
}

/// By single requests the second would take the first one's place.
fn refuse_twins<'a>(names: impl Iterator<Item = &'a String>) -> Result<(), SavedConfigError> {
    let mut seen = std::collections::BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(SavedConfigError::Duplicate(name.clone()));
        }
    }
    Ok(())
}

impl From<&SavedDrive> for wire::Drive {
    fn from(saved: &SavedDrive) -> Self {
        let SavedDrive {
            drive_id,
            partuuid,
            is_root_device,
            is_writeback,
            is_read_only,
            path_on_host,
            is_async,
            limiter,
            overlay,
        } = saved;
        wire::Drive {
            drive_id: drive_id.clone(),
            partuuid: partuuid.clone(),
            is_root_device: *is_root_device,
            cache_type: match is_writeback {
                true => wire::CacheType::Writeback,
                false => wire::CacheType::Unsafe,
            },
            is_read_only: Some(*is_read_only),
            path_on_host: Some(path_on_host.clone()),
            rate_limiter: limiter.into(),
            io_engine: Some(match is_async {
                true => wire::IoEngine::Async,
                false => wire::IoEngine::Sync,
            }),
            socket: None,
            overlay: overlay.as_ref().map(wire::DriveOverlay::from),
        }
    }
}

impl From<&SavedInterface> for wire::NetworkInterface {
    fn from(saved: &SavedInterface) -> Self {
        let SavedInterface {
            iface_id,
            host_dev_name,
            guest_mac,
            mtu,
            rx_limiter,
            tx_limiter,
        } = saved;
        wire::NetworkInterface {
            iface_id: iface_id.clone(),
            host_dev_name: host_dev_name.clone(),
            guest_mac: guest_mac.map(wire::MacAddr),
            mtu: *mtu,
            rx_rate_limiter: rx_limiter.into(),
            tx_rate_limiter: tx_limiter.into(),
        }
    }
}
