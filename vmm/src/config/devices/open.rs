//! Devices and what they need of the host, made as they are configured.

use std::path::Path;

use lepton_api::types as wire;
use lepton_devices::virtio::block::overlay::{Chain, Overlay};
use lepton_devices::virtio::block::{Block, BlockConfig, CacheType, EngineKind, Image};
use lepton_devices::virtio::net::{Net, NetConfig};
use lepton_hostio::file::open_disk;
use lepton_hostio::tap::Tap;

use super::{DeviceConfigError, QUEUE_SIZE, limits};

/// Opens what the paths lead to.
pub(super) fn open_drive(wire: &wire::Drive) -> Result<Image, DeviceConfigError> {
    let id = || wire.drive_id.clone();
    let path = wire
        .path_on_host
        .as_ref()
        .ok_or_else(|| DeviceConfigError::NoPath(id()))?;
    let (path, read_only) = (Path::new(path), wire.is_read_only.unwrap_or(false));
    Ok(match &wire.overlay {
        None => open_disk(path, read_only)
            .map_err(|source| DeviceConfigError::Disk { id: id(), source })?
            .into(),
        Some(overlay) => {
            let own = overlay.path.as_ref();
            let own = own.ok_or_else(|| DeviceConfigError::NoOverlayPath(id()))?;
            Chain::open(path, &overlay.layers)
                .and_then(|chain| Overlay::open(chain, Path::new(own), read_only))
                .map_err(|source| DeviceConfigError::Overlay { id: id(), source })?
                .into()
        }
    })
}

/// A drive with that image.
pub(super) fn make_drive(wire: &wire::Drive, image: Image) -> Result<Block, DeviceConfigError> {
    Block::new(BlockConfig {
        image,
        serial: None,
        cache: match wire.cache_type {
            wire::CacheType::Unsafe => CacheType::Unsafe,
            wire::CacheType::Writeback => CacheType::Writeback,
        },
        engine: match wire.io_engine.unwrap_or_default() {
            wire::IoEngine::Sync => EngineKind::Sync,
            wire::IoEngine::Async => EngineKind::Async,
        },
        queue_size: QUEUE_SIZE,
        rate_limiter: limits(wire.rate_limiter.as_ref()),
    })
    .map_err(|source| DeviceConfigError::Block {
        id: wire.drive_id.clone(),
        source,
    })
}

/// An interface and its tap.
pub(super) fn make_interface(wire: &wire::NetworkInterface) -> Result<Net, DeviceConfigError> {
    let id = || wire.iface_id.clone();
    let tap = Tap::open(&wire.host_dev_name)
        .map_err(|source| DeviceConfigError::Tap { id: id(), source })?;
    Net::new(NetConfig {
        tap,
        mac: wire.guest_mac.map(|mac| mac.0),
        mtu: wire.mtu,
        queue_size: QUEUE_SIZE,
        rx_rate_limiter: limits(wire.rx_rate_limiter.as_ref()),
        tx_rate_limiter: limits(wire.tx_rate_limiter.as_ref()),
    })
    .map_err(|source| DeviceConfigError::Net { id: id(), source })
}
