//! What is read is what was written.

use proptest::prelude::*;

use super::*;

/// One step of a driver.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Zero {
        sector: u64,
        sectors: u32,
        unmap: bool,
    },
    Discard(u64, u32),
    Flush,
}

const SECTORS: usize = 32;
/// Sectors that one step of a batch may touch, so that the order of a batch does not matter.
const STRIPE: u64 = 8;

/// A step in a stripe of so many sectors.
pub(super) fn step(stripe: u64) -> impl Strategy<Value = Step> {
    let place = (0..stripe, 0..=stripe as usize)
        .prop_map(move |(at, n)| (at, n.min((stripe - at) as usize)));
    (0..6u8, place, any::<u8>(), any::<bool>()).prop_map(|(kind, (sector, n), byte, unmap)| {
        let sectors = n as u32;
        match kind {
            0 | 1 => Step::Read(sector, n),
            2 => {
                let bytes = (0..n * SECTOR).map(|i| byte.wrapping_add((i / 7) as u8));
                Step::Write(sector, bytes.collect())
            }
            3 => Step::Zero {
                sector,
                sectors,
                unmap,
            },
            4 => Step::Discard(sector, sectors),
            _ => Step::Flush,
        }
    })
}

impl Step {
    /// The request, in the stripe that starts at sector `base`.
    pub(super) fn ask(&self, base: u64, cut: Option<usize>) -> Ask {
        let ask = match self {
            Step::Read(sector, n) => Ask::read(base + sector, *n),
            Step::Write(sector, bytes) => Ask::write(base + sector, bytes.clone()),
            Step::Zero {
                sector,
                sectors,
                unmap,
            } => {
                let flags = u32::from(*unmap);
                Ask::range(VIRTIO_BLK_T_WRITE_ZEROES, base + sector, *sectors, flags)
            }
            Step::Discard(sector, n) => Ask::range(VIRTIO_BLK_T_DISCARD, base + sector, *n, 0),
            Step::Flush => Ask::flush(),
        };
        Ask { cut, ..ask }
    }

    /// The same on a plain array of bytes; gives what is read.
    pub(super) fn model(&self, base: u64, disk: &mut [u8]) -> Vec<u8> {
        let range = |sector: u64, n: usize| {
            let start = (base + sector) as usize * SECTOR;
            start..start + n * SECTOR
        };
        match self {
            Step::Read(sector, n) => return disk[range(*sector, *n)].to_vec(),
            Step::Write(sector, bytes) => {
                disk[range(*sector, bytes.len() / SECTOR)].copy_from_slice(bytes);
            }
            Step::Zero {
                sector, sectors: n, ..
            }
            | Step::Discard(sector, n) => {
                disk[range(*sector, *n as usize)].fill(0);
            }
            Step::Flush => {}
        }
        Vec::new()
    }
}

fn agrees_with_model(options: Options, batches: &[(Vec<Step>, Option<usize>)]) {
    let mut model = pattern(SECTORS);
    let mut rig = Rig::with(options, &model);
    for (steps, cut) in batches {
        let asks: Vec<_> = steps
            .iter()
            .enumerate()
            .map(|(i, step)| step.ask(i as u64 * STRIPE, *cut))
            .collect();
        let answers = rig.ask_all(&asks);
        for (i, (step, answer)) in steps.iter().zip(answers).enumerate() {
            let expected = step.model(i as u64 * STRIPE, &mut model);
            assert_eq!(answer.status, status::OK, "{step:?}");
            assert_eq!(answer.used_len as usize, expected.len() + 1, "{step:?}");
            assert_eq!(answer.data, expected, "{step:?}");
        }
    }
    assert!(rig.image() == model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_requests_agree_with_an_array(
        asynchronous: bool,
        on_tmpfs: bool,
        through: bool,
        batches in prop::collection::vec(
            (prop::collection::vec(step(STRIPE), 1..=4), prop::option::of(300usize..5000)), 1..12),
    ) {
        let engine = if asynchronous { EngineKind::Async } else { EngineKind::Sync };
        let mut options = Options::new(engine);
        // A tmpfs cannot make zeroes without writing them.
        options.folder = if on_tmpfs { "/dev/shm" } else { "/tmp" };
        options.cache = if through { CacheType::Writeback } else { CacheType::Unsafe };
        let batches: Vec<_> = batches.into_iter().map(|(mut steps, cut)| {
            steps.retain(|step| through || !matches!(step, Step::Flush));
            (steps, cut)
        }).collect();
        agrees_with_model(options, &batches);
    }
}

#[test]
fn a_queue_of_any_size_is_served() {
    for engine in ENGINES {
        for queue_size in [1, 2, 4, 1024] {
            let mut options = Options::new(engine);
            options.queue_size = queue_size;
            let image = pattern(1100);
            let mut rig = Rig::with(options, &image);
            let seg_max = u32::from_le_bytes(rig.config(12));
            assert_eq!(seg_max, u32::from(queue_size).saturating_sub(2).max(1));
            // As many segments as are allowed, each of one sector, in an indirect table.
            let mut buffers = vec![rig.driver.readable(&[0; 16])];
            for _ in 0..seg_max {
                buffers.push(rig.driver.writable(SECTOR));
            }
            let status = rig.driver.writable(1);
            buffers.push(status);
            let table = rig.driver.alloc(16 * buffers.len());
            for round in 0..3 {
                let direct = queue_size > 2 && round == 1;
                let head = if direct {
                    rig.driver.queues[0].offer(&buffers)
                } else {
                    rig.driver.queues[0].offer_indirect(table, &buffers)
                };
                let used_len = seg_max * 512 + 1;
                assert_eq!(rig.collect(1), [(head, used_len)]);
                assert_eq!(rig.driver.bytes(status), [status::OK]);
                for (i, buffer) in buffers[1..=seg_max as usize].iter().enumerate() {
                    assert!(rig.driver.bytes(*buffer) == image[i * SECTOR..(i + 1) * SECTOR]);
                }
            }
        }
    }
}

#[test]
fn a_full_ring_comes_back_whole() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, &pattern(64));
        // 21 chains of three descriptors fill a queue of 64.
        for round in 0..20 {
            let asks: Vec<_> = (0..21).map(|i| Ask::read((i + round) % 64, 1)).collect();
            for (ask, answer) in asks.iter().zip(rig.ask_all(&asks)) {
                let at = ask.sector as usize * SECTOR;
                assert!(answer.data == pattern(64)[at..at + SECTOR]);
            }
        }
        assert_eq!(rig.block.metrics().read_count.get(), 420);
        assert_eq!(rig.block.metrics().read_bytes.get(), 420 * 512);
    }
}

#[test]
fn work_per_turn_is_bounded() {
    for engine in ENGINES {
        let mut options = Options::new(engine);
        options.queue_size = 1024;
        let mut rig = Rig::with(options, &pattern(2048));
        for i in 0..300 {
            rig.offer(&Ask::read(i, 1));
        }
        assert_eq!(rig.block.process_queue(0).unwrap(), Progress::Again);
        assert_eq!(rig.block.process_queue(0).unwrap(), Progress::Again);
        assert_eq!(rig.block.process_queue(0).unwrap(), Progress::Done);
        assert_eq!(rig.collect(300).len(), 300);
        rig.driver.free_all();

        // Few requests with many bytes: one buffer of 1 MiB, 9 times in each of 4 chains.
        let mut options = Options::new(engine);
        options.queue_size = 64;
        let mut rig = Rig::with(options, &vec![5; 9 << 20]);
        let header = rig.driver.readable(&[0; 16]);
        let buffer = rig.driver.writable(1 << 20);
        let status = rig.driver.writable(1);
        let mut buffers = vec![header];
        buffers.extend([buffer; 9]);
        buffers.push(status);
        for _ in 0..4 {
            rig.driver.queues[0].offer(&buffers);
        }
        assert_eq!(rig.block.process_queue(0).unwrap(), Progress::Again);
        assert_eq!(rig.block.process_queue(0).unwrap(), Progress::Again);
        assert_eq!(rig.block.process_queue(0).unwrap(), Progress::Done);
        assert!(rig.collect(4).iter().all(|(_, len)| *len == (9 << 20) + 1));
        assert!(rig.driver.bytes(buffer).iter().all(|&b| b == 5));
    }
}

#[test]
fn discarding_frees_room_on_the_host() {
    for engine in ENGINES {
        for unmap in [false, true] {
            let mut rig = Rig::new(engine, &vec![9; 1 << 20]);
            rig.block.disk().file().sync_all().unwrap();
            let before = std::fs::metadata(&rig.path).unwrap().blocks();
            let ask = if unmap {
                Ask::range(VIRTIO_BLK_T_WRITE_ZEROES, 8, 1024, 1)
            } else {
                Ask::range(VIRTIO_BLK_T_DISCARD, 8, 1024, 0)
            };
            assert_eq!(rig.status_of(&ask), status::OK);
            let after = std::fs::metadata(&rig.path).unwrap().blocks();
            assert!(after + 1000 <= before, "{after} {before}");
            let image = rig.image();
            let range = 8 * SECTOR..1032 * SECTOR;
            assert!(image[range.clone()].iter().all(|&b| b == 0));
            assert!(
                image[..range.start]
                    .iter()
                    .chain(&image[range.end..])
                    .all(|&b| b == 9)
            );
        }
    }
}

#[test]
fn zeroing_without_unmap_keeps_room_on_the_host() {
    for engine in ENGINES {
        for folder in ["/tmp", "/dev/shm"] {
            let mut options = Options::new(engine);
            options.folder = folder;
            let mut rig = Rig::with(options, &vec![9; 1 << 20]);
            rig.block.disk().file().sync_all().unwrap();
            let before = std::fs::metadata(&rig.path).unwrap().blocks();
            for _ in 0..2 {
                let ask = Ask::range(VIRTIO_BLK_T_WRITE_ZEROES, 8, 1024, 0);
                assert_eq!(rig.status_of(&ask), status::OK);
                assert!(
                    rig.image()[8 * SECTOR..1032 * SECTOR]
                        .iter()
                        .all(|&b| b == 0)
                );
            }
            let after = std::fs::metadata(&rig.path).unwrap().blocks();
            assert!(after >= before, "{after} {before}");
        }
    }
}
