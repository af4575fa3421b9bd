//! The one list of all devices: drives, network interfaces, vsock.
//!
//! A device is made when it is configured, so that what is wrong with its file, tap or socket is the answer to the
//! request that named it. It is not attached to a machine before that is built.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lepton_api::types as wire;
use lepton_devices::metrics::MetricGroup;
use lepton_devices::rate_limiter::{BucketConfig, RateLimiterConfig};
use lepton_devices::virtio::block::overlay::OverlayError;
use lepton_devices::virtio::block::{Block, BlockError, Image};
use lepton_devices::virtio::net::{Net, NetError};
use lepton_devices::virtio::transport::mmio::SharedDevice;
use lepton_devices::virtio::vsock::{self, Cid, Exchange, Vsock, VsockConfig};
use lepton_hostio::file::{DiskOpenError, open_disk};
use lepton_hostio::listener::{self, BindError, SocketFile};
use lepton_hostio::tap::TapError;

use self::open::{make_drive, make_interface, open_drive};
use crate::reach::Reach;

mod open;
pub mod sharing;

const MAX_ID: usize = 64;
const QUEUE_SIZE: u16 = 256;

/// Why a device cannot be what is asked for.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum DeviceConfigError {
    #[error("{what} {id:?} is not 1 to {MAX_ID} letters, digits, _ and -")]
    Id { what: &'static str, id: String },
    #[error("drive {id}: {source}")]
    Disk { id: String, source: DiskOpenError },
    #[error("drive {id}: {source}")]
    Block { id: String, source: BlockError },
    #[error("drive {id}: {source}")]
    Overlay { id: String, source: OverlayError },
    #[error("drive {0}: path_on_host: what an overlay lies over cannot be changed under it")]
    UnderOverlay(String),
    #[error("drive {0}: path_on_host is missing")]
    NoPath(String),
    #[error("drive {0}: overlay: path is missing")]
    NoOverlayPath(String),
    #[error("drive {id}: it cannot be shared: {source}")]
    Share { id: String, source: io::Error },
    #[error("drive {0}: socket: vhost-user drives are not offered; name an image by path_on_host")]
    VhostUser(String),
    #[error("drive {id}: is_root_device: drive {root} is the root device already")]
    SecondRoot { id: String, root: String },
    #[error("drive {id}: partuuid {partuuid:?} is not made of letters, digits and -")]
    PartUuid { id: String, partuuid: String },
    #[error("drive {id}: {source}")]
    DriveUpdate { id: String, source: io::Error },
    #[error("interface {id}: host_dev_name: {source}")]
    Tap { id: String, source: TapError },
    #[error("interface {id}: {source}")]
    Net { id: String, source: NetError },
    #[error("interface {id}: guest_mac {mac} belongs to interface {other} already")]
    SameMac {
        id: String,
        mac: wire::MacAddr,
        other: String,
    },
    #[error("interface {id}: host_dev_name {tap} belongs to interface {other} already")]
    SameTap {
        id: String,
        tap: String,
        other: String,
    },
    #[error("vsock: guest_cid: {0}")]
    Cid(#[source] vsock::InvalidCid),
    #[error("vsock: uds_path: {0}")]
    Socket(#[source] BindError),
    #[error("vsock: uds_path {path:?}: {source}")]
    Vsock { path: String, source: io::Error },
    #[error("there is no {what} {id}")]
    Unknown { what: &'static str, id: String },
    #[error("{what} {id}: rate limiter: {source}")]
    RateLimiter {
        what: &'static str,
        id: String,
        source: io::Error,
    },
}

struct DriveSlot {
    wire: wire::Drive,
    device: Arc<Mutex<Block>>,
    /// Another process has opened its files: what its paths say is so there.
    is_handed: bool,
}

struct InterfaceSlot {
    wire: wire::NetworkInterface,
    device: Arc<Mutex<Net>>,
}

struct VsockSlot {
    wire: wire::Vsock,
    device: Arc<Mutex<Vsock>>,
    /// Removes the socket when the machine's configuration goes.
    _socket: SocketFile,
}

/// All devices of a machine.
#[derive(Default)]
pub struct Devices {
    drives: Vec<DriveSlot>,
    interfaces: Vec<InterfaceSlot>,
    vsock: Option<VsockSlot>,
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check_id(what: &'static str, id: &str) -> Result<(), DeviceConfigError> {
    let fits = (1..=MAX_ID).contains(&id.len());
    if fits
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
    {
        return Ok(());
    }
    Err(DeviceConfigError::Id {
        what,
        id: id.to_owned(),
    })
}

/// A token bucket as the devices want it.
pub fn bucket(bucket: &wire::TokenBucket) -> BucketConfig {
    BucketConfig {
        size: bucket.size,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
        refill_time_ms: bucket.refill_time,
    }
}

fn limits(limiter: Option<&wire::RateLimiter>) -> RateLimiterConfig {
    RateLimiterConfig {
        bandwidth: limiter.and_then(|l| l.bandwidth.as_ref()).map(bucket),
        ops: limiter.and_then(|l| l.ops.as_ref()).map(bucket),
    }
}

/// What a limiter is after a patch: each bucket named replaces the old one.
fn merge(old: &mut Option<wire::RateLimiter>, patch: Option<&wire::RateLimiter>) {
    if let Some(patch) = patch {
        let old = old.get_or_insert_with(Default::default);
        old.bandwidth = patch.bandwidth.or(old.bandwidth);
        old.ops = patch.ops.or(old.ops);
    }
}

impl Devices {
    /// PUT /drives/{id}: adds a drive or replaces the one of that id. On error nothing changes.
    pub fn put_drive(&mut self, wire: wire::Drive) -> Result<(), DeviceConfigError> {
        self.add_drive(wire, None)
    }

    /// With the image that is given, or what the paths lead to.
    fn add_drive(
        &mut self,
        wire: wire::Drive,
        image: Option<Image>,
    ) -> Result<(), DeviceConfigError> {
        let id = wire.drive_id.clone();
        check_id("drive_id", &id)?;
        if wire.socket.is_some() {
            return Err(DeviceConfigError::VhostUser(id));
        }
        let others = || self.drives.iter().filter(|d| d.wire.drive_id != id);
        if wire.is_root_device
            && let Some(root) = others().find(|d| d.wire.is_root_device)
        {
            return Err(DeviceConfigError::SecondRoot {
                id,
                root: root.wire.drive_id.clone(),
            });
        }
        if let Some(partuuid) = &wire.partuuid
            && !partuuid
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '-')
        {
            let partuuid = partuuid.clone();
            return Err(DeviceConfigError::PartUuid { id, partuuid });
        }
        let is_handed = image.is_some();
        let image = match image {
            Some(image) => image,
            None => open_drive(&wire)?,
        };
        let device = Arc::new(Mutex::new(make_drive(&wire, image)?));
        let slot = DriveSlot {
            wire,
            device,
            is_handed,
        };
        match self.drives.iter_mut().find(|d| d.wire.drive_id == id) {
            Some(old) => *old = slot,
            None => self.drives.push(slot),
        }
        // The root device is /dev/vda, whenever it was configured.
        self.drives.sort_by_key(|d| !d.wire.is_root_device);
        Ok(())
    }

    /// PATCH /drives/{id}: another image under a running drive, or other limits.
    pub fn patch_drive(&mut self, patch: &wire::DrivePatch) -> Result<(), DeviceConfigError> {
        let id = &patch.drive_id;
        let slot = self
            .drives
            .iter_mut()
            .find(|d| d.wire.drive_id == *id)
            .ok_or_else(|| DeviceConfigError::Unknown {
                what: "drive",
                id: id.clone(),
            })?;
        let mut device = lock(&slot.device);
        if patch.path_on_host.is_some() && slot.wire.overlay.is_some() {
            return Err(DeviceConfigError::UnderOverlay(id.clone()));
        }
        if let Some(path) = &patch.path_on_host {
            let read_only = slot.wire.is_read_only.unwrap_or(false);
            let disk = open_disk(Path::new(path), read_only).map_err(|source| {
                DeviceConfigError::Disk {
                    id: id.clone(),
                    source,
                }
            })?;
            device
                .update_backend(disk.into())
                .map_err(|source| DeviceConfigError::Block {
                    id: id.clone(),
                    source,
                })?;
            slot.wire.path_on_host = Some(path.clone());
            slot.is_handed = false;
        }
        if let Some(limiter) = &patch.rate_limiter {
            let limits = limits(Some(limiter));
            device.update_rate_limiter(limits.bandwidth, limits.ops);
        }
        merge(&mut slot.wire.rate_limiter, patch.rate_limiter.as_ref());
        Ok(())
    }

    /// PUT /drives/{id}/reset: throws away what was written to its overlay.
    pub fn reset_drive(&mut self, id: &str) -> Result<(), DeviceConfigError> {
        let slot = self.drive(id)?;
        lock(&slot.device)
            .reset_overlay()
            .map_err(|source| DeviceConfigError::Block {
                id: id.to_owned(),
                source,
            })
    }

    fn drive(&self, id: &str) -> Result<&DriveSlot, DeviceConfigError> {
        let slot = self.drives.iter().find(|d| d.wire.drive_id == id);
        slot.ok_or_else(|| DeviceConfigError::Unknown {
            what: "drive",
            id: id.to_owned(),
        })
    }

    /// Sees to it that nothing the guest has written would be lost with this process.
    pub fn write_back(&self) -> Result<(), DeviceConfigError> {
        for slot in &self.drives {
            lock(&slot.device)
                .write_back()
                .map_err(|source| DeviceConfigError::Block {
                    id: slot.wire.drive_id.clone(),
                    source,
                })?;
        }
        Ok(())
    }

    /// PUT /network-interfaces/{id}: adds an interface or replaces the one of that id. On error nothing changes,
    /// except that a replaced interface of the same tap is gone: a tap has one owner.
    pub fn put_interface(&mut self, wire: wire::NetworkInterface) -> Result<(), DeviceConfigError> {
        let id = wire.iface_id.clone();
        check_id("iface_id", &id)?;
        for other in self.interfaces.iter().filter(|i| i.wire.iface_id != id) {
            let name = other.wire.iface_id.clone();
            if let (Some(mac), Some(taken)) = (wire.guest_mac, other.wire.guest_mac)
                && mac == taken
            {
                return Err(DeviceConfigError::SameMac {
                    id,
                    mac,
                    other: name,
                });
            }
            if wire.host_dev_name == other.wire.host_dev_name {
                return Err(DeviceConfigError::SameTap {
                    id,
                    tap: wire.host_dev_name,
                    other: name,
                });
            }
        }
        let index = self.interfaces.iter().position(|i| i.wire.iface_id == id);
        if let Some(index) = index
            && self.interfaces[index].wire.host_dev_name == wire.host_dev_name
        {
            self.interfaces.remove(index);
        }
        let device = Arc::new(Mutex::new(make_interface(&wire)?));
        let slot = InterfaceSlot { wire, device };
        match self.interfaces.iter_mut().find(|i| i.wire.iface_id == id) {
            Some(old) => *old = slot,
            None => self.interfaces.push(slot),
        }
        Ok(())
    }

    /// PATCH /network-interfaces/{id}: other limits.
    pub fn patch_interface(
        &mut self,
        patch: &wire::NetworkInterfacePatch,
    ) -> Result<(), DeviceConfigError> {
        let slot = self
            .interfaces
            .iter_mut()
            .find(|i| i.wire.iface_id == patch.iface_id)
            .ok_or_else(|| DeviceConfigError::Unknown {
                what: "interface",
                id: patch.iface_id.clone(),
            })?;
        lock(&slot.device).update_rate_limiters(
            limits(patch.rx_rate_limiter.as_ref()),
            limits(patch.tx_rate_limiter.as_ref()),
        );
        merge(
            &mut slot.wire.rx_rate_limiter,
            patch.rx_rate_limiter.as_ref(),
        );
        merge(
            &mut slot.wire.tx_rate_limiter,
            patch.tx_rate_limiter.as_ref(),
        );
        Ok(())
    }

    /// PUT /vsock: makes the socket device or replaces it. On error nothing changes, except that a replaced device of
    /// the same path is gone.
    pub fn put_vsock(&mut self, wire: wire::Vsock) -> Result<(), DeviceConfigError> {
        let cid = Cid::try_from(u64::from(wire.guest_cid)).map_err(DeviceConfigError::Cid)?;
        // A path is free for the new socket only once the old one's file is gone.
        if self
            .vsock
            .as_ref()
            .is_some_and(|old| old.wire.uds_path == wire.uds_path)
        {
            self.vsock = None;
        }
        let (listener, socket) =
            listener::bind(Path::new(&wire.uds_path)).map_err(DeviceConfigError::Socket)?;
        let failed = |source| DeviceConfigError::Vsock {
            path: wire.uds_path.clone(),
            source,
        };
        let device = Vsock::new(VsockConfig {
            guest_cid: cid,
            listener,
            uds_path: wire.uds_path.clone().into(),
            queue_size: QUEUE_SIZE,
        })
        .map_err(failed)?;
        self.vsock = Some(VsockSlot {
            wire,
            device: Arc::new(Mutex::new(device)),
            _socket: socket,
        });
        Ok(())
    }

    /// Holds the guest back from its interfaces and from the vsock, but for this question.
    pub fn hold(&self, question: Exchange) {
        self.hold_all(true);
        if let Some(vsock) = &self.vsock {
            lock(&vsock.device).ask(question);
        }
    }

    /// Lets it talk again. The devices are to look at everything then.
    pub fn release(&self) {
        self.hold_all(false);
    }

    fn hold_all(&self, held: bool) {
        for slot in &self.interfaces {
            lock(&slot.device).hold(held);
        }
        if let Some(vsock) = &self.vsock {
            lock(&vsock.device).hold(held);
        }
    }

    /// All devices by name, in the order in which the guest finds them.
    pub fn all(&self) -> Vec<(String, SharedDevice)> {
        let drives = self
            .drives
            .iter()
            .map(|d| (d.wire.drive_id.clone(), d.device.clone() as SharedDevice));
        let interfaces = self
            .interfaces
            .iter()
            .map(|i| (i.wire.iface_id.clone(), i.device.clone() as SharedDevice));
        let vsock = self
            .vsock
            .iter()
            .map(|v| ("vsock".to_owned(), v.device.clone() as SharedDevice));
        drives.chain(interfaces).chain(vsock).collect()
    }

    /// Metrics of each device, under the name that Firecracker's metrics have for it.
    pub fn metrics(&self) -> Vec<(String, Arc<dyn MetricGroup>)> {
        let mut all: Vec<(String, Arc<dyn MetricGroup>)> = Vec::new();
        for drive in &self.drives {
            let name = format!("block_{}", drive.wire.drive_id);
            all.push((name, lock(&drive.device).metrics()));
        }
        for interface in &self.interfaces {
            let name = format!("net_{}", interface.wire.iface_id);
            all.push((name, lock(&interface.device).metrics().clone()));
        }
        if let Some(vsock) = &self.vsock {
            all.push(("vsock".into(), lock(&vsock.device).metrics().clone()));
        }
        all
    }

    /// What the devices add to the kernel's command line: which one holds the root file system.
    pub fn kernel_arguments(&self) -> String {
        let Some(root) = self.drives.iter().find(|d| d.wire.is_root_device) else {
            return String::new();
        };
        let mode = if root.wire.is_read_only.unwrap_or(false) {
            "ro"
        } else {
            "rw"
        };
        match &root.wire.partuuid {
            Some(partuuid) => format!(" root=PARTUUID={partuuid} {mode}"),
            None => format!(" root=/dev/vda {mode}"),
        }
    }

    /// Leaves in `reach` what requests may open for drives later.
    pub fn reach(&self, reach: &mut Reach) {
        for DriveSlot {
            wire, is_handed, ..
        } in &self.drives
        {
            let is_read_only = wire.is_read_only.unwrap_or(false);
            if let (Some(path), false) = (&wire.path_on_host, is_handed) {
                reach.image(Path::new(path), is_read_only || wire.overlay.is_some());
            }
            let overlay = wire.overlay.as_ref().and_then(|o| o.path.as_ref());
            match overlay.map(Path::new) {
                Some(path) if !is_read_only => reach.overlay(path),
                Some(path) if !is_handed => reach.image(path, true),
                _ => {}
            }
        }
    }

    /// Drives as configured.
    pub fn drives(&self) -> impl Iterator<Item = &wire::Drive> {
        self.drives.iter().map(|d| &d.wire)
    }

    /// Interfaces as configured.
    pub fn interfaces(&self) -> impl Iterator<Item = &wire::NetworkInterface> {
        self.interfaces.iter().map(|i| &i.wire)
    }

    /// The socket device as configured.
    pub fn vsock(&self) -> Option<&wire::Vsock> {
        self.vsock.as_ref().map(|v| &v.wire)
    }
}
