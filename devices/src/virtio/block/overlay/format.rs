//! An overlay file's form. Pure: bytes to values and back.
//!
//! ```text
//! offset                what
//! 0         header, one sector of 512 bytes; the rest of the block is zero
//! 4096      bitmap: one bit per cluster of 4096 bytes, the lowest bit of each byte first. 1: the cluster is in this file
//! map()     one byte per cluster, for those that are not in this file: the layer that has it, the lowest is 1; 0: the
//!           base has it. So a cluster is found at once, however many layers there are
//! data()    the disk: cluster n at `data() + 4096 * n`. A hole reads as zeroes
//! ```
//!
//! Every number is little-endian. All places follow from the disk's size. The file is sparse: what was never written
//! takes no room.

use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lepton_hostio::file::SECTOR_SIZE;

/// Bytes of a cluster: the unit in which a disk's content is in an overlay or below it. It is the page size of guests,
/// so that what their file systems write is whole clusters and nothing has to be copied up.
pub const CLUSTER: u64 = 4096;
/// Bytes of the header.
pub const HEADER_SIZE: usize = 512;
/// Most layers between an overlay and its base: each costs every machine above it one open file.
pub const MAX_LAYERS: usize = 250;
/// Largest disk: 16 TiB, as ext4 has for a file.
pub const MAX_DISK: u64 = 1 << 44;

/// Bytes in a page of the bitmap or the map: the unit in which they are held in memory.
pub(super) const PAGE: u64 = 4096;
/// Clusters that a page of the bitmap tells of.
pub(super) const CLUSTERS_PER_BITMAP_PAGE: u64 = PAGE * 8;
/// Where the bitmap is.
const BITMAP: u64 = 4096;
/// The data starts at a multiple of this, which suits every file system's extents.
const DATA_ALIGNMENT: u64 = 1 << 20;

const MAGIC: [u8; 8] = *b"LEPTONOV";
const VERSION: u32 = 1;
/// The only flag.
const HAS_MAP: u32 = 1;
const CLUSTER_SHIFT: u32 = CLUSTER.trailing_zeros();

/// The name that an overlay got at random when it was made.
pub type OverlayId = [u8; 16];

/// Why bytes are no overlay's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Something else altogether.
    #[error("it is not an overlay")]
    Magic,
    /// Made by another version.
    #[error("format version {0}; this program reads {VERSION}")]
    Version(u32),
    /// Clusters of another size.
    #[error("clusters of 2^{0} bytes; this program has {CLUSTER}")]
    Cluster(u32),
    /// A disk that cannot be.
    #[error("a disk of {0} bytes is not whole sectors, or larger than {MAX_DISK} bytes")]
    Size(u64),
    /// No such state.
    #[error("state {0} is none")]
    State(u32),
    /// More than [`MAX_LAYERS`], or a layer below without a name, or a name without a layer.
    #[error("{0} layers below it do not agree with their name, or are more than {MAX_LAYERS}")]
    Layers(u32),
    /// A time that cannot be.
    #[error("{0} nanoseconds in the time of the base's last change")]
    Time(u32),
    /// Unknown ones.
    #[error("flags {0:#x}")]
    Flags(u32),
    /// Bytes that have no meaning yet.
    #[error("byte {0} of the header is not zero")]
    Reserved(usize),
}

/// What an overlay file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// One machine's own: its owner may write it.
    Own,
    /// It is being emptied: its content means nothing any more.
    Resetting,
    /// Many machines' layer: never written again.
    Layer,
    /// Its content is being written into its base, which until that is finished is neither the old nor the new.
    Committing,
}

impl State {
    const ALL: [State; 4] = [
        State::Own,
        State::Resetting,
        State::Layer,
        State::Committing,
    ];

    fn number(self) -> u32 {
        match self {
            State::Own => 0,
            State::Resetting => 1,
            State::Layer => 2,
            State::Committing => 3,
        }
    }
}

/// An overlay file's first sector. It is written whole, and a sector is on disk whole or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the file is.
    pub state: State,
    /// The disk's size.
    pub geometry: Geometry,
    /// The overlay's name.
    pub id: OverlayId,
    /// Layers below it.
    pub layers: u8,
    /// The topmost layer below it, zero if there is none. That one names the next, so one name is enough.
    pub below: OverlayId,
    /// When the base was last changed; zero for a block device, which does not tell.
    pub base_changed: Changed,
    /// Whether the map is in the file. Else it follows from the layers' bitmaps and maps.
    pub has_map: bool,
}

/// A file's time of last change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changed {
    /// Seconds since 1970.
    pub seconds: i64,
    /// And nanoseconds, below 10^9.
    pub nanoseconds: u32,
}

impl From<SystemTime> for Changed {
    fn from(time: SystemTime) -> Self {
        let seconds = |d: Duration| i64::try_from(d.as_secs()).unwrap_or(i64::MAX);
        match time.duration_since(UNIX_EPOCH) {
            Ok(since) => Changed {
                seconds: seconds(since),
                nanoseconds: since.subsec_nanos(),
            },
            // Before 1970: only its being different counts.
            Err(before) => Changed {
                seconds: seconds(before.duration()).saturating_neg(),
                nanoseconds: before.duration().subsec_nanos(),
            },
        }
    }
}

impl Header {
    /// The header's bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
        let Header {
            state,
            geometry,
            id,
            layers,
            below,
            base_changed,
            has_map,
        } = self;
        let mut bytes = [0; HEADER_SIZE];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            for (to, from) in bytes.iter_mut().skip(at).zip(field) {
                *to = *from;
            }
            at += field.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&CLUSTER_SHIFT.to_le_bytes());
        put(&geometry.size.to_le_bytes());
        put(&state.number().to_le_bytes());
        put(&u32::from(*layers).to_le_bytes());
        put(id);
        put(below);
        put(&base_changed.seconds.to_le_bytes());
        put(&base_changed.nanoseconds.to_le_bytes());
        put(&u32::from(*has_map).to_le_bytes());
        bytes
    }
}

/// Takes fields off the front of a header.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        // The fields are shorter than a header, so this never falls short; zeroes would be refused anyway.
        let (field, rest) = self.0.split_first_chunk().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *field
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
}

impl TryFrom<&[u8; HEADER_SIZE]> for Header {
    type Error = HeaderError;

    fn try_from(bytes: &[u8; HEADER_SIZE]) -> Result<Self, HeaderError> {
        let mut fields = Fields(bytes);
        if fields.take::<8>() != MAGIC {
            return Err(HeaderError::Magic);
        }
        match fields.u32() {
            VERSION => {}
            other => return Err(HeaderError::Version(other)),
        }
        match fields.u32() {
            CLUSTER_SHIFT => {}
            other => return Err(HeaderError::Cluster(other)),
        }
        let size = u64::from_le_bytes(fields.take());
        let geometry = Geometry::new(size).ok_or(HeaderError::Size(size))?;
        let number = fields.u32();
        let state = State::ALL
            .into_iter()
            .find(|state| state.number() == number)
            .ok_or(HeaderError::State(number))?;
        let layers = fields.u32();
        let (id, below) = (fields.take(), fields.take());
        let is_alone = below == OverlayId::default();
        let count = u8::try_from(layers)
            .ok()
            .filter(|&count| usize::from(count) <= MAX_LAYERS && (count == 0) == is_alone)
            .ok_or(HeaderError::Layers(layers))?;
        let base_changed = Changed {
            seconds: i64::from_le_bytes(fields.take()),
            nanoseconds: fields.u32(),
        };
        if base_changed.nanoseconds >= 1_000_000_000 {
            return Err(HeaderError::Time(base_changed.nanoseconds));
        }
        let has_map = match fields.u32() {
            flags @ (0 | HAS_MAP) => flags == HAS_MAP,
            other => return Err(HeaderError::Flags(other)),
        };
        let used = HEADER_SIZE - fields.0.len();
        if let Some(at) = fields.0.iter().position(|&byte| byte != 0) {
            return Err(HeaderError::Reserved(used + at));
        }
        Ok(Header {
            state,
            geometry,
            id,
            layers: count,
            below,
            base_changed,
            has_map,
        })
    }
}

/// Where everything is, for a disk of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    size: u64,
}

impl Geometry {
    /// For a disk of `size` bytes. None: it is no number of sectors, or larger than [`MAX_DISK`].
    pub fn new(size: u64) -> Option<Self> {
        let fits = size > 0 && size <= MAX_DISK && size.is_multiple_of(SECTOR_SIZE);
        fits.then_some(Geometry { size })
    }

    /// Bytes of the disk.
    pub fn size(self) -> u64 {
        self.size
    }

    /// Clusters of the disk. The last may be shorter than the others.
    pub fn clusters(self) -> u64 {
        self.size.div_ceil(CLUSTER)
    }

    /// The bytes of the disk that are cluster `cluster`.
    pub(super) fn cluster(self, cluster: u64) -> Range<u64> {
        let start = cluster.saturating_mul(CLUSTER).min(self.size);
        start..start.saturating_add(CLUSTER).min(self.size)
    }

    pub(super) fn bitmap(self) -> Range<u64> {
        BITMAP..BITMAP + self.clusters().div_ceil(8).next_multiple_of(PAGE)
    }

    /// Pages of the map.
    pub(super) fn map_pages(self) -> u64 {
        self.clusters().div_ceil(PAGE)
    }

    pub(super) fn map(self) -> Range<u64> {
        let start = self.bitmap().end;
        start..start + self.map_pages() * PAGE
    }

    /// Where the disk's byte 0 is.
    pub(super) fn data(self) -> u64 {
        self.map().end.next_multiple_of(DATA_ALIGNMENT)
    }

    /// Bytes of the file.
    pub(super) fn file(self) -> u64 {
        self.data() + self.size
    }
}

/// The clusters that `len` bytes at `offset` touch.
pub(in crate::virtio::block) fn clusters_of(offset: u64, len: u64) -> Range<u64> {
    let start = offset / CLUSTER;
    let end = offset.saturating_add(len).div_ceil(CLUSTER);
    start..end.max(start)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        Header {
            state: State::Own,
            geometry: Geometry::new(3 << 20).unwrap(),
            id: [7; 16],
            layers: 2,
            below: [9; 16],
            base_changed: Changed {
                seconds: -5,
                nanoseconds: 999_999_999,
            },
            has_map: true,
        }
    }

    fn any_header() -> impl Strategy<Value = Header> {
        let sectors = 1..=MAX_DISK / SECTOR_SIZE;
        let layers = 0..=MAX_LAYERS as u8;
        let fields = (0..4usize, sectors, layers, 1..=u8::MAX, any::<bool>());
        (fields, any::<i64>(), 0..1_000_000_000u32).prop_map(
            |((state, sectors, layers, name, has_map), seconds, nanoseconds)| Header {
                state: State::ALL[state],
                geometry: Geometry::new(sectors * SECTOR_SIZE).unwrap(),
                id: [name; 16],
                layers,
                below: if layers == 0 { [0; 16] } else { [name; 16] },
                base_changed: Changed {
                    seconds,
                    nanoseconds,
                },
                has_map,
            },
        )
    }

    proptest! {
        #[test]
        fn there_and_back(header in any_header()) {
            prop_assert_eq!(Header::try_from(&header.to_bytes()), Ok(header));
        }

        /// Every bit counts: a header that is taken says exactly what its bytes say.
        #[test]
        fn what_is_taken_is_what_was_written(
            header in any_header(), at in 0..HEADER_SIZE, byte: u8, more in 0..HEADER_SIZE,
        ) {
            let mut bytes = header.to_bytes();
            bytes[at] = byte;
            bytes[more] ^= 1;
            if let Ok(taken) = Header::try_from(&bytes) {
                prop_assert_eq!(taken.to_bytes(), bytes);
            }
        }

        #[test]
        fn nothing_overlaps(sectors in 1..=MAX_DISK / SECTOR_SIZE) {
            let geometry = Geometry::new(sectors * SECTOR_SIZE).unwrap();
            let clusters = geometry.clusters();
            prop_assert!((clusters - 1) * CLUSTER < geometry.size());
            prop_assert_eq!(geometry.cluster(clusters - 1).end, geometry.size());
            prop_assert!(geometry.bitmap().start >= HEADER_SIZE as u64);
            let bitmap = geometry.bitmap();
            prop_assert!((bitmap.end - bitmap.start) * 8 >= clusters);
            prop_assert_eq!(geometry.map().start, bitmap.end);
            prop_assert!(geometry.map().end - geometry.map().start >= clusters);
            prop_assert!(geometry.data() >= geometry.map().end);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |at: usize, field: &[u8]| {
            let mut bytes = header().to_bytes();
            bytes[at..at + field.len()].copy_from_slice(field);
            Header::try_from(&bytes).unwrap_err()
        };
        assert_eq!(refused(0, b"QFI\xfb"), HeaderError::Magic);
        assert_eq!(refused(8, &[2]), HeaderError::Version(2));
        assert_eq!(refused(12, &[16]), HeaderError::Cluster(16));
        for size in [0, 513, MAX_DISK + 512, u64::MAX] {
            assert_eq!(refused(16, &size.to_le_bytes()), HeaderError::Size(size));
        }
        assert_eq!(refused(24, &[4]), HeaderError::State(4));
        for layers in [0, 251, 256, u32::MAX] {
            assert_eq!(
                refused(28, &layers.to_le_bytes()),
                HeaderError::Layers(layers)
            );
        }
        assert_eq!(refused(48, &[0; 16]), HeaderError::Layers(2));
        let time = 1_000_000_000;
        assert_eq!(
            refused(72, &u32::to_le_bytes(time)),
            HeaderError::Time(time)
        );
        assert_eq!(refused(76, &[2]), HeaderError::Flags(2));
        assert_eq!(refused(80, &[1]), HeaderError::Reserved(80));
        assert_eq!(refused(511, &[1]), HeaderError::Reserved(511));
    }

    #[test]
    fn clusters_that_a_range_touches() {
        assert_eq!(clusters_of(0, 0), 0..0);
        assert_eq!(clusters_of(4095, 2), 0..2);
        assert_eq!(clusters_of(4096, 4096), 1..2);
        assert!(clusters_of(u64::MAX, u64::MAX).start > 0);
    }
}
