//! Feature bits and configuration space (VIRTIO 1.3, 5.2.3 and 5.2.4).

use lepton_hostio::file::SECTOR_SIZE;
use virtio_bindings::bindings::virtio_blk::*;

use super::backend::Image;
use super::device::CacheType;
use super::request::{MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS};

/// Bytes of configuration space, up to and with the fields of write-zeroes.
const CONFIG_SIZE: usize = 60;
/// File systems free whole blocks, mostly of 4 KiB.
const DISCARD_ALIGNMENT: u32 = 4096;

/// The feature bits offered for `image`. They stay when another image is put in its place.
pub(super) fn features(image: &Image, cache: CacheType) -> u64 {
    let mut features = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
    if cache == CacheType::Writeback {
        features |= 1 << VIRTIO_BLK_F_FLUSH;
    }
    if image.read_only() {
        features |= 1 << VIRTIO_BLK_F_RO;
    } else {
        features |= 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        if image.can_deallocate() {
            features |= 1 << VIRTIO_BLK_F_DISCARD;
        }
    }
    features
}

/// `struct virtio_blk_config` for `image`. Fields of features that are not offered are 0.
pub(super) fn config_space(image: &Image, features: u64, queue_size: u16) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in config.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    put(0, &image.sectors().to_le_bytes());
    // A chain also holds a header and a status. An indirect table may be longer than the queue, but not by our word.
    let seg_max = u32::from(queue_size).saturating_sub(2).max(1);
    put(12, &seg_max.to_le_bytes());
    put(20, &image.block_size().to_le_bytes());
    if features & (1 << VIRTIO_BLK_F_DISCARD) != 0 {
        let alignment = image.block_size().max(DISCARD_ALIGNMENT) / SECTOR_SIZE as u32;
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &alignment.to_le_bytes());
    }
    if features & (1 << VIRTIO_BLK_F_WRITE_ZEROES) != 0 {
        put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[u8::from(image.can_deallocate())]);
    }
    config
}
