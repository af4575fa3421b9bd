//! The device on overlays.

use std::fs::File;
use std::path::Path;

use proptest::prelude::*;

use super::data::{Step, step};
use super::*;
use crate::virtio::block::Successor;
use crate::virtio::block::engine::AsyncEngine;
use crate::virtio::block::overlay::{CLUSTER, Chain, Overlay, OverlayError};
use crate::virtio::block::turn::Engine;

/// Twelve clusters and a half.
const SECTORS: usize = 100;
/// No number of clusters: what is written at once is often in the same cluster.
const STRIPE: u64 = 12;
const STRIPES: u64 = SECTORS as u64 / STRIPE;

/// An empty file, perhaps left behind by a freeze that did not need it.
fn empty(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

/// The overlay of number `number` beside `base`.
fn beside(base: &Path, number: usize) -> PathBuf {
    base.with_extension(number.to_string())
}

/// An overlay with the content of `base`, which is in `layers` layers and the base: what is above hides in each of them
/// something wrong.
pub(super) fn stack(base: &Path, layers: usize) -> Overlay {
    let right = std::fs::read(base).unwrap();
    let cluster = CLUSTER as usize;
    if layers > 0 {
        let mut wrong = right.clone();
        for (n, bytes) in wrong.chunks_mut(cluster).enumerate() {
            if !n.is_multiple_of(layers + 1) {
                bytes.fill(0xbd);
            }
        }
        std::fs::write(base, &wrong).unwrap();
    }
    let chain = Chain::open::<&Path>(base, &[]).unwrap();
    let mut overlay = Overlay::open(chain, &beside(base, 0), false).unwrap();
    for layer in 1..=layers {
        for (n, bytes) in right.chunks(cluster).enumerate() {
            let at = (n * cluster) as u64;
            if n % (layers + 1) == layer {
                overlay.write_bytes(bytes, at).unwrap();
            } else if n % (layers + 1) > layer {
                overlay
                    .write_bytes(&vec![layer as u8; bytes.len()], at)
                    .unwrap();
            }
        }
        let path = beside(base, layer);
        overlay.freeze(empty(&path), &path).unwrap();
    }
    assert_eq!(overlay.chain().layers(), layers);
    overlay.flush().unwrap();
    overlay
}

/// All of the disk.
pub(super) fn content(overlay: &mut Overlay) -> Vec<u8> {
    let mut bytes = vec![0; overlay.geometry().size() as usize];
    overlay.read_bytes(&mut bytes, 0).unwrap();
    bytes
}

impl Rig {
    fn overlay(&mut self) -> &mut Overlay {
        match &mut self.block.backend.image {
            Image::Overlay(overlay) => overlay,
            Image::Raw(_) => panic!("not an overlay"),
        }
    }

    /// Opens the overlay again, as another process would.
    fn reopen(&mut self, layers: usize, cache: CacheType) {
        let paths: Vec<_> = (0..layers).map(|n| beside(&self.path, n)).collect();
        let own = beside(&self.path, layers);
        // Its locks go with it.
        let none = Chain::open::<&Path>(&self.path, &[]).unwrap();
        let spare = Overlay::open(none, &self.path.with_extension("spare"), false).unwrap();
        self.block.reset();
        self.block.update_backend(spare.into()).unwrap();
        let chain = Chain::open(&self.path, &paths).unwrap();
        let mut overlay = Overlay::open(chain, &own, false).unwrap();
        if cache == CacheType::Unsafe {
            overlay.write_through();
        }
        self.block.update_backend(overlay.into()).unwrap();
        self.driver.reset();
        self.activate();
    }

    fn freeze(&mut self, layers: usize) {
        let path = beside(&self.path, layers + 1);
        let next = Successor {
            file: empty(&path),
            path,
            reader: None,
        };
        self.block.freeze(|| Ok(next)).unwrap();
    }
}

/// What happens between two batches of requests.
#[derive(Debug, Clone, Copy)]
enum Between {
    Nothing,
    Reopen,
    Freeze,
    Reset,
}

fn between() -> impl Strategy<Value = Between> {
    prop_oneof![
        6 => Just(Between::Nothing),
        2 => Just(Between::Reopen),
        2 => Just(Between::Freeze),
        1 => Just(Between::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_requests_agree_with_an_array(
        asynchronous: bool,
        on_tmpfs: bool,
        through: bool,
        mut layers in 0..4usize,
        batches in prop::collection::vec(
            (prop::collection::vec(step(STRIPE), 1..=STRIPES as usize),
                prop::option::of(300usize..5000), between()), 1..10),
    ) {
        let engine = if asynchronous { EngineKind::Async } else { EngineKind::Sync };
        let mut options = Options::new(engine);
        options.folder = if on_tmpfs { "/dev/shm" } else { "/tmp" };
        options.cache = if through { CacheType::Unsafe } else { CacheType::Writeback };
        options.layers = Some(layers);
        // Requests in many small buffers take many descriptors.
        options.queue_size = 256;
        let cache = options.cache;
        let mut model = pattern(SECTORS);
        let mut rig = Rig::with(options, &model);
        let base = std::fs::read(&rig.path).unwrap();
        // What a reset goes back to.
        let mut below = model.clone();
        if layers > 0 {
            rig.freeze(layers);
            layers += usize::from(rig.overlay().chain().layers() > layers);
        }
        for (mut steps, cut, between) in batches {
            steps.retain(|step| !through || !matches!(step, Step::Flush));
            let asks: Vec<_> = steps.iter().enumerate()
                .map(|(i, step)| step.ask(i as u64 * STRIPE, cut)).collect();
            let answers = rig.ask_all(&asks);
            for (i, (step, answer)) in steps.iter().zip(answers).enumerate() {
                let expected = step.model(i as u64 * STRIPE, &mut model);
                prop_assert_eq!(answer.status, status::OK);
                prop_assert!(answer.data == expected, "{:?}", step);
            }
            match between {
                Between::Nothing => {}
                Between::Reopen => {
                    if !through {
                        prop_assert_eq!(rig.status_of(&Ask::flush()), status::OK);
                    }
                    rig.reopen(layers, cache);
                }
                Between::Freeze => {
                    let had = rig.overlay().own_clusters();
                    rig.freeze(layers);
                    layers += usize::from(had > 0);
                    below.clone_from(&model);
                }
                Between::Reset => {
                    rig.block.reset_overlay().unwrap();
                    model.clone_from(&below);
                }
            }
            prop_assert_eq!(rig.overlay().chain().layers(), layers);
        }
        prop_assert!(rig.image() == model);
        prop_assert!(std::fs::read(&rig.path).unwrap() == base, "the base was written");
    }
}

#[test]
fn a_freeze_whose_file_the_ring_does_not_take_ends_all_io() {
    let mut options = Options::new(EngineKind::Async);
    options.layers = Some(0);
    let mut rig = Rig::with(options, &pattern(SECTORS));
    let write = Ask::write(0, vec![7; SECTOR]);
    assert_eq!(rig.status_of(&write), status::OK);
    // Its ring has no place for one more file.
    let engine = AsyncEngine::with_places(&rig.block.backend.image, 64, 2).unwrap();
    rig.block.engine = Engine::Async(Box::new(engine));
    let path = beside(&rig.path, 1);
    let next = Successor {
        file: empty(&path),
        path,
        reader: None,
    };
    let refused = rig.block.freeze(|| Ok(next));
    assert!(matches!(refused, Err(BlockError::Change(_))));
    let layer = std::fs::read(beside(&rig.path, 0)).unwrap();
    for ask in [Ask::write(0, vec![8; SECTOR]), Ask::read(0, 1)] {
        assert_eq!(rig.status_of(&ask), status::IO_ERROR);
    }
    // Nor past the ring: what was frozen may be in others' hands.
    assert!(rig.overlay().write_bytes(&[8; SECTOR], 0).is_err());
    assert!(rig.overlay().flush().is_err());
    assert!(std::fs::read(beside(&rig.path, 0)).unwrap() == layer);
    assert_eq!(rig.overlay().own_clusters(), 0);
}

#[test]
fn two_over_one_base_do_not_see_each_other() {
    for engine in ENGINES {
        let mut options = Options::new(engine);
        options.layers = Some(0);
        let image = pattern(64);
        let mut one = Rig::with(options, &image);
        let chain = Chain::open::<&Path>(&one.path, &[]).unwrap();
        let other = Overlay::open(chain, &one.path.with_extension("other"), false).unwrap();
        one.ask(&Ask::write(3, vec![7; 10 * SECTOR]));
        let mut other = other;
        other.write_bytes(&[9; 512], 512).unwrap();
        let mut expected = image.clone();
        expected[3 * SECTOR..13 * SECTOR].fill(7);
        assert!(one.image() == expected);
        let mut expected = image.clone();
        expected[512..1024].fill(9);
        assert!(content(&mut other) == expected);
        assert!(std::fs::read(&one.path).unwrap() == image);
    }
}

#[test]
fn what_is_not_written_takes_no_room() {
    for engine in ENGINES {
        let mut options = Options::new(engine);
        options.layers = Some(0);
        let mut rig = Rig::with(options, &vec![5; 8 << 20]);
        let blocks = |rig: &Rig| std::fs::metadata(beside(&rig.path, 0)).unwrap().blocks();
        assert!(blocks(&rig) <= 16, "{}", blocks(&rig));
        rig.ask(&Ask::write(8 * 100, vec![1; 1 << 20]));
        rig.ask(&Ask::flush());
        let written = blocks(&rig);
        assert!((2048..2100).contains(&written), "{written}");
        // A discard gives it back and reads as zeroes, not as the base.
        let discard = Ask::range(VIRTIO_BLK_T_DISCARD, 8 * 100, 2048, 0);
        assert_eq!(rig.status_of(&discard), status::OK);
        assert!(blocks(&rig) < 100, "{}", blocks(&rig));
        let answer = rig.ask(&Ask::read(8 * 100 - 1, 3));
        assert!(answer.data[..512].iter().all(|&byte| byte == 5));
        assert!(answer.data[512..].iter().all(|&byte| byte == 0));
        // A reset reads as the base again.
        rig.block.reset_overlay().unwrap();
        assert!(rig.image().iter().all(|&byte| byte == 5));
        assert!(blocks(&rig) <= 16, "{}", blocks(&rig));
    }
}

#[test]
fn an_overlay_has_one_owner() {
    let mut options = Options::new(EngineKind::Sync);
    options.layers = Some(1);
    let rig = Rig::with(options, &pattern(64));
    let chain = || Chain::open(&rig.path, &[beside(&rig.path, 0)]).unwrap();
    let refused = |chain, path: &Path, read_only| Overlay::open(chain, path, read_only).err();
    let own = beside(&rig.path, 1);
    assert!(matches!(
        refused(chain(), &own, false),
        Some(OverlayError::InUse(_))
    ));
    assert!(matches!(
        refused(chain(), &own, true),
        Some(OverlayError::InUse(_))
    ));
    let layer = beside(&rig.path, 0);
    let bare = Chain::open::<&Path>(&rig.path, &[]).unwrap();
    assert!(matches!(
        refused(bare, &layer, false),
        Some(OverlayError::InUse(_))
    ));
    drop(rig.block);
    let bare = Chain::open::<&Path>(&rig.path, &[]).unwrap();
    assert!(matches!(
        refused(bare, &layer, false),
        Some(OverlayError::IsALayer(_))
    ));
    let bare = Chain::open::<&Path>(&rig.path, &[]).unwrap();
    assert!(matches!(
        refused(bare, &own, false),
        Some(OverlayError::LayerCount { .. })
    ));
    let not_a_layer = Chain::open(&rig.path, &[&own]).err();
    assert!(matches!(not_a_layer, Some(OverlayError::NotALayer(_))));
    // Another base.
    let base = File::options().write(true).open(&rig.path).unwrap();
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
    base.set_modified(later).unwrap();
    let changed = Chain::open(&rig.path, &[&layer]).err();
    assert!(matches!(changed, Some(OverlayError::BaseChanged { .. })));
}
