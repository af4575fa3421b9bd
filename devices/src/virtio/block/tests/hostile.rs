//! A driver that breaks the rules, and a host that does not keep its word.

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::virtio::testing::{HOLE_END, HOLE_START, MEMORY_SIZE, RawDescriptor};

/// Addresses around all edges that there are, and lengths likewise.
fn descriptor() -> impl Strategy<Value = RawDescriptor> {
    let heap = 5 << 20;
    let high_end = HOLE_END + MEMORY_SIZE - HOLE_START;
    let edges = vec![
        heap,
        heap,
        heap,
        HOLE_START,
        HOLE_END,
        high_end,
        0,
        u64::MAX,
    ];
    let addr = (prop::sample::select(edges), 0u64..1100)
        .prop_map(|(edge, back)| edge.saturating_sub(back));
    let len = prop::sample::select(vec![0, 1, 15, 16, 17, 512, 513, 1024, u32::MAX]);
    let flags = prop_oneof![6 => 0u16..4, 1 => 0u16..8, 1 => any::<u16>()];
    (addr, len, flags, 0u16..10).prop_map(|(addr, len, flags, next)| RawDescriptor {
        addr,
        len,
        flags,
        next,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Nothing that a driver writes anywhere gets more out of the device than an error, and a reset heals it.
    #[test]
    fn any_rings_at_all(
        asynchronous: bool,
        table in prop::collection::vec(descriptor(), 8),
        heads in prop::collection::vec(0u16..10, 0..12),
        avail_idx in prop::option::weighted(0.2, any::<u16>()),
        heap in prop::collection::vec(0u8..14, 1100),
    ) {
        let engine = if asynchronous { EngineKind::Async } else { EngineKind::Sync };
        let mut options = Options::new(engine);
        options.queue_size = 8;
        let mut rig = Rig::with(options, &pattern(64));
        for at in [(5 << 20) - 1100, HOLE_START - 1100, HOLE_END] {
            rig.driver.memory.write_slice(&heap, vm_memory::GuestAddress(at)).unwrap();
        }
        for (index, descriptor) in table.into_iter().enumerate() {
            rig.driver.queues[0].write_descriptor(index as u16, descriptor);
        }
        for head in heads {
            rig.driver.queues[0].publish(head);
        }
        if let Some(index) = avail_idx {
            rig.driver.queues[0].set_avail_idx(index);
        }
        // A device that has failed is not called again.
        let alive = rig.kick().is_ok();
        if alive {
            rig.block.quiesce().unwrap();
        }
        rig.reset();
        prop_assert_eq!(rig.status_of(&Ask::read(0, 8)), status::OK);
        prop_assert_eq!(rig.image().len() % 512, 0);
        prop_assert!(rig.image().len() <= 64 * 512);
    }
}

#[test]
fn read_only_drives_are_not_written() {
    for engine in ENGINES {
        let mut options = Options::new(engine);
        options.read_only = true;
        let image = pattern(8);
        let mut rig = Rig::with(options, &image);
        assert_ne!(rig.block.features() & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(rig.block.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
        assert_eq!(rig.block.features() & 1 << VIRTIO_BLK_F_WRITE_ZEROES, 0);
        // The driver takes features that were not offered and leaves RO.
        rig.features = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        rig.reset();
        for ask in [
            Ask::write(0, vec![1; 512]),
            Ask::range(VIRTIO_BLK_T_DISCARD, 0, 1, 0),
            Ask::range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 0),
        ] {
            assert_eq!(rig.status_of(&ask), status::IO_ERROR);
        }
        assert_eq!(rig.ask(&Ask::read(0, 8)).data, image);
        assert_eq!(rig.image(), image);
        assert_eq!(rig.block.metrics().invalid_reqs_count.get(), 3);
    }
}

#[test]
fn refused_requests_get_their_status_and_the_queue_goes_on() {
    for engine in ENGINES {
        let image = pattern(8);
        let mut rig = Rig::new(engine, &image);
        let cases = [
            (Ask::read(8, 1), status::IO_ERROR),
            (Ask::read(u64::MAX, 1), status::IO_ERROR),
            (Ask::write(7, vec![1; 1024]), status::IO_ERROR),
            (Ask::write(0, vec![1; 100]), status::IO_ERROR),
            (Ask::new(77, 0), status::UNSUPPORTED),
            (
                Ask::range(VIRTIO_BLK_T_DISCARD, 0, 1, 1),
                status::UNSUPPORTED,
            ),
            (
                Ask::range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 8),
                status::UNSUPPORTED,
            ),
            (Ask::range(VIRTIO_BLK_T_DISCARD, 8, 1, 0), status::IO_ERROR),
        ];
        for (ask, expected) in cases {
            let answer = rig.ask(&ask);
            assert_eq!(answer.status, expected, "{ask:?}");
            assert_eq!(answer.used_len, 1);
            assert!(
                answer.data.iter().all(|&b| b == NO_STATUS),
                "nothing is leaked"
            );
        }
        assert_eq!(rig.block.metrics().invalid_reqs_count.get(), 8);
        assert_eq!(rig.image(), image);
        assert_eq!(rig.status_of(&Ask::read(0, 8)), status::OK);
    }
}

#[test]
fn nothing_is_flushed_that_was_not_offered() {
    for engine in ENGINES {
        let mut options = Options::new(engine);
        options.cache = CacheType::Unsafe;
        let mut rig = Rig::with(options, &pattern(8));
        assert_eq!(rig.block.features() & 1 << VIRTIO_BLK_F_FLUSH, 0);
        rig.features |= 1 << VIRTIO_BLK_F_FLUSH;
        rig.reset();
        assert_eq!(rig.status_of(&Ask::flush()), status::UNSUPPORTED);
        assert_eq!(rig.block.metrics().flush_count.get(), 0);
    }
}

#[test]
fn a_chain_that_cannot_be_answered_needs_a_reset() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, &pattern(8));
        for broken in 0..4 {
            // Something in flight before it.
            rig.offer(&Ask::read(0, 8));
            let short = rig.driver.readable(&[0; 15]);
            let header = rig.driver.readable(&[0; 16]);
            let room = rig.driver.writable(513);
            match broken {
                0 => rig.driver.queues[0].offer(&[short, room]),
                1 => rig.driver.queues[0].offer(&[header]),
                2 => rig.driver.queues[0].offer(&[room]),
                _ => rig.driver.queues[0].offer(&[room, header]),
            };
            assert!(rig.kick().is_err());
            rig.reset();
            assert_eq!(rig.ask(&Ask::read(0, 8)).data, pattern(8));
        }
        assert_eq!(rig.block.metrics().event_fails.get(), 4);
    }
}

/// CVE-2026-45782: the same head twice in flight freed the buffer of the first request under it.
#[test]
fn cve_2026_45782_a_head_offered_twice_needs_a_reset() {
    let mut rig = Rig::new(EngineKind::Async, &pattern(8));
    let offered = rig.offer(&Ask::read(0, 1));
    rig.driver.queues[0].publish(offered.head);
    assert!(matches!(
        rig.kick(),
        Err(DeviceError::Queue { index: 0, .. })
    ));
    rig.reset();
    assert_eq!(rig.status_of(&Ask::read(0, 1)), status::OK);
}

#[test]
fn an_image_cut_short_is_an_io_error() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, &pattern(16));
        let file = std::fs::File::options()
            .write(true)
            .open(&rig.path)
            .unwrap();
        file.set_len(5 * 512 + 100).unwrap();
        let answer = rig.ask(&Ask::read(4, 4));
        assert_eq!((answer.status, answer.used_len), (status::IO_ERROR, 1));
        assert_eq!(rig.status_of(&Ask::read(10, 1)), status::IO_ERROR);
        assert_eq!(rig.status_of(&Ask::read(0, 5)), status::OK);
        assert_eq!(rig.block.metrics().execute_fails.get(), 2);
        // Writing makes it whole again.
        assert_eq!(rig.status_of(&Ask::write(5, vec![1; 11 * 512])), status::OK);
        assert_eq!(rig.status_of(&Ask::read(0, 16)), status::OK);
    }
}

/// Needs a small tmpfs, so root.
#[test]
fn a_full_host_disk_is_an_io_error() {
    for engine in ENGINES {
        let dir = TempDir::new().unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "none"])
            .arg(dir.as_path())
            .output();
        if !mount.is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: cannot mount a tmpfs");
            return;
        }
        let result = std::panic::catch_unwind(|| fill_host_disk(engine, dir.as_path()));
        let umount = std::process::Command::new("umount")
            .arg("-l")
            .arg(dir.as_path())
            .status();
        result.unwrap();
        assert!(umount.unwrap().success());
    }
}

fn fill_host_disk(engine: EngineKind, folder: &Path) {
    let path = folder.join("image");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let mut rig = Rig::new(engine, &pattern(8));
    rig.block
        .update_backend(open_disk(&path, false).unwrap().into())
        .unwrap();
    let mut acknowledged = 0;
    let full = (0..64).any(|i| {
        let answer = rig.ask(&Ask::write(i * 16, vec![i as u8 + 1; 16 * SECTOR]));
        acknowledged += u64::from(answer.status == status::OK);
        answer.status == status::IO_ERROR
    });
    assert!(full && acknowledged > 0);
    assert!(rig.block.metrics().execute_fails.get() > 0);
    assert_eq!(rig.status_of(&Ask::flush()), status::OK);
    for i in 0..acknowledged {
        assert_eq!(
            rig.ask(&Ask::read(i * 16, 16)).data,
            vec![i as u8 + 1; 16 * SECTOR]
        );
    }
    // Room comes back, and with it the drive.
    assert_eq!(
        rig.status_of(&Ask::range(VIRTIO_BLK_T_DISCARD, 0, 2048, 0)),
        status::OK
    );
    assert_eq!(
        rig.status_of(&Ask::write(1000, vec![1; 16 * SECTOR])),
        status::OK
    );
}
