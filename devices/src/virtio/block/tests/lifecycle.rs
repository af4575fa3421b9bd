//! Configuration, activation, reset, limits and changes at run time.

use std::sync::Arc;

use super::*;

#[test]
fn configuration_space_says_what_the_drive_is() {
    let rig = Rig::new(EngineKind::Sync, &vec![0; 10 * 512 + 511]);
    assert_eq!(u64::from_le_bytes(rig.config(0)), 10);
    assert_eq!(
        u32::from_le_bytes(rig.config(8)),
        0,
        "size_max is not offered"
    );
    assert_eq!(u32::from_le_bytes(rig.config(12)), 62);
    assert_eq!(u32::from_le_bytes(rig.config(20)), 512);
    let discard = [36, 40, 44].map(|at| u32::from_le_bytes(rig.config(at)));
    assert_eq!(discard, [1 << 21, 1, 8]);
    let zeroes = [48, 52].map(|at| u32::from_le_bytes(rig.config(at)));
    assert_eq!(zeroes, [1 << 16, 1]);
    assert_eq!(rig.config(56), [1, 0, 0, 0]);
    // Any width, and nothing behind the end.
    assert_eq!(rig.config(1), [0u8; 3]);
    assert_eq!(rig.config(58), [0u8; 9]);
    assert_eq!(rig.config(u64::MAX), [0u8; 4]);
    let offered = [
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ];
    let offered = offered.iter().fold(0, |bits, bit| bits | 1u64 << bit);
    assert_eq!(rig.block.features(), offered);
}

#[test]
fn writes_to_configuration_are_ignored() {
    let mut rig = Rig::new(EngineKind::Sync, &pattern(8));
    rig.block.write_config(0, &[1; 8]);
    assert_eq!(u64::from_le_bytes(rig.config(0)), 8);
    assert_eq!(rig.block.metrics().cfg_fails.get(), 1);
}

#[test]
fn impossible_queue_sizes_are_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("image");
    std::fs::write(&path, [0; 512]).unwrap();
    for queue_size in [0, 3, 1000, 2048, u16::MAX] {
        let refused = Block::new(BlockConfig {
            image: open_disk(&path, true).unwrap().into(),
            serial: None,
            cache: CacheType::Unsafe,
            engine: EngineKind::Async,
            queue_size,
            rate_limiter: RateLimiterConfig::default(),
        });
        assert!(matches!(refused, Err(BlockError::QueueSize(size)) if size == queue_size));
    }
}

#[test]
fn one_signal_for_a_batch_and_none_for_nothing() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, &pattern(8));
        for _ in 0..5 {
            rig.offer(&Ask::get_id());
        }
        rig.kick().unwrap();
        assert_eq!(rig.driver.queues[0].used().len(), 5);
        assert_eq!(rig.driver.interrupts(), 1);
        rig.kick().unwrap();
        assert_eq!(rig.driver.interrupts(), 0);
        assert_eq!(rig.block.metrics().no_avail_buffer.get(), 1);
    }
}

#[test]
fn the_serial_number_is_the_images_or_the_configured_one() {
    let mut rig = Rig::new(EngineKind::Sync, &pattern(8));
    let answer = rig.ask(&Ask::get_id());
    assert_eq!(answer.data, rig.block.disk().serial());
    assert_eq!((answer.status, answer.used_len), (status::OK, 21));

    let serial = *b"configured-serial-20";
    let mut block = Block::new(BlockConfig {
        image: open_disk(&rig.path, true).unwrap().into(),
        serial: Some(serial),
        cache: CacheType::Unsafe,
        engine: EngineKind::Sync,
        queue_size: 64,
        rate_limiter: RateLimiterConfig::default(),
    })
    .unwrap();
    rig.driver.reset();
    block.activate(rig.driver.resources(0)).unwrap();
    rig.block = block;
    assert_eq!(rig.ask(&Ask::get_id()).data, serial);
}

#[test]
fn a_driver_that_never_flushes_has_its_writes_made_durable() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, &pattern(8));
        rig.features = 0;
        rig.reset();
        assert!(rig.block.writes_are_durable());
        assert_eq!(rig.status_of(&Ask::write(3, vec![1; 512])), status::OK);
        assert_eq!(rig.ask(&Ask::read(3, 1)).data, vec![1; 512]);
        assert_eq!(rig.status_of(&Ask::flush()), status::UNSUPPORTED);
        rig.features = rig.block.features();
        rig.reset();
        assert!(!rig.block.writes_are_durable());
    }
}

#[test]
fn a_reset_waits_for_io_in_flight_and_lets_memory_go() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, &pattern(64));
        rig.features = 0;
        rig.reset();
        for round in 0..20u8 {
            for i in 0..16 {
                rig.offer(&Ask::write(i * 4, vec![round; 4 * SECTOR]));
            }
            rig.kick().unwrap();
            rig.block.reset();
            // The driver, its queue and this test.
            assert_eq!(Arc::strong_count(&rig.driver.memory), 2);
            assert!(rig.image().iter().all(|&b| b == round));
            rig.driver.reset();
            rig.activate();
        }
    }
}

#[test]
fn quiescing_finishes_everything() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, &pattern(64));
        rig.features = 0;
        rig.reset();
        for i in 0..16 {
            rig.offer(&Ask::write(i * 4, vec![7; 4 * SECTOR]));
        }
        rig.kick().unwrap();
        rig.block.quiesce().unwrap();
        assert_eq!(rig.driver.queues[0].used().len(), 16);
        assert!(rig.image().iter().all(|&b| b == 7));
        rig.block.quiesce().unwrap();
        rig.driver.free_all();
        assert_eq!(rig.status_of(&Ask::read(0, 1)), status::OK);
    }
}

#[test]
fn events_while_inactive_are_harmless() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, &pattern(8));
        rig.block.reset();
        rig.kick().unwrap();
        for source in 0..rig.block.sources().len() + 1 {
            assert_eq!(rig.block.process_source(source).unwrap(), Progress::Done);
        }
        rig.block.quiesce().unwrap();
        rig.block.reset();
        rig.driver.reset();
        rig.activate();
        assert_eq!(rig.status_of(&Ask::read(0, 8)), status::OK);
    }
}

fn ops(size: u64, refill_time_ms: u64) -> Option<BucketConfig> {
    Some(BucketConfig {
        size,
        one_time_burst: 0,
        refill_time_ms,
    })
}

#[test]
fn a_limited_drive_goes_on_when_its_time_has_come() {
    for engine in ENGINES {
        let mut options = Options::new(engine);
        options.rate_limiter.ops = ops(2, 20);
        let mut rig = Rig::with(options, &pattern(8));
        for _ in 0..5 {
            rig.offer(&Ask::read(0, 8));
        }
        let start = std::time::Instant::now();
        assert_eq!(rig.collect(5).len(), 5);
        // Two at once, one every 10 ms after.
        assert!(start.elapsed().as_millis() >= 30);
        assert!(rig.block.metrics().rate_limiter_throttled_events.get() >= 1);
        assert!(rig.block.metrics().rate_limiter_event_count.get() >= 1);
    }
}

#[test]
fn limits_change_at_run_time() {
    for engine in ENGINES {
        let mut options = Options::new(engine);
        // As good as never again.
        options.rate_limiter.bandwidth = ops(512, u64::MAX);
        let mut rig = Rig::with(options, &pattern(8));
        for _ in 0..3 {
            rig.offer(&Ask::read(0, 1));
        }
        rig.kick().unwrap();
        rig.block.quiesce().unwrap();
        assert_eq!(rig.driver.queues[0].used().len(), 1);
        // Kicks do not help.
        rig.kick().unwrap();
        assert_eq!(rig.driver.queues[0].used().len(), 0);
        rig.block.update_rate_limiter(ops(0, 0), None);
        rig.handle_event().unwrap();
        assert_eq!(rig.collect(2).len(), 2);
    }
}

/// A limit that is lifted when more waits than one turn does: the turns after it are for the same event.
#[test]
fn all_that_waited_goes_on_when_a_limit_is_lifted() {
    const COUNT: usize = 3 * super::super::device::REQUESTS_PER_TURN;
    for engine in ENGINES {
        let mut options = Options::new(engine);
        options.queue_size = 1024;
        options.rate_limiter.ops = ops(1, u64::MAX);
        let mut rig = Rig::with(options, &pattern(8));
        rig.offer(&Ask::read(0, 1));
        rig.kick().unwrap();
        let mut done = 0;
        for _ in 0..COUNT {
            rig.offer(&Ask::flush());
        }
        rig.kick().unwrap();
        rig.block.quiesce().unwrap();
        done += rig.driver.queues[0].used().len();
        assert_eq!(done, 1);
        rig.block.update_rate_limiter(None, ops(0, 0));
        rig.handle_event().unwrap();
        rig.block.quiesce().unwrap();
        done += rig.driver.queues[0].used().len();
        assert_eq!(done, 1 + COUNT);
    }
}

#[test]
fn a_reset_does_not_forget_what_was_used_up() {
    let mut options = Options::new(EngineKind::Sync);
    options.rate_limiter.ops = ops(1, u64::MAX);
    let mut rig = Rig::with(options, &pattern(8));
    assert_eq!(rig.status_of(&Ask::read(0, 1)), status::OK);
    for _ in 0..3 {
        rig.reset();
        rig.offer(&Ask::read(0, 1));
        rig.kick().unwrap();
        assert_eq!(rig.driver.queues[0].used().len(), 0);
    }
}

#[test]
fn another_image_takes_the_place_of_the_first() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, &pattern(8));
        let other = TempDir::new().unwrap();
        let path = other.as_path().join("other");
        std::fs::write(&path, vec![0x55; 16 * SECTOR]).unwrap();
        let generation = rig.driver.interrupt.config_generation();
        // In flight while it happens: it goes to the first image.
        for i in 0..8 {
            rig.offer(&Ask::write(i, vec![1; 512]));
        }
        rig.kick().unwrap();
        rig.block
            .update_backend(open_disk(&path, false).unwrap().into())
            .unwrap();
        assert_eq!(rig.driver.queues[0].used().len(), 8);
        assert!(rig.image().iter().all(|&b| b == 1));
        assert_ne!(rig.driver.interrupt.config_generation(), generation);
        assert_eq!(rig.driver.interrupt.status() & 2, 2);
        assert_eq!(u64::from_le_bytes(rig.config(0)), 16);
        rig.driver.free_all();
        assert_eq!(rig.ask(&Ask::read(8, 8)).data, vec![0x55; 8 * SECTOR]);
        assert_eq!(rig.ask(&Ask::get_id()).data, rig.block.disk().serial());
        assert_eq!(rig.status_of(&Ask::write(15, vec![2; 512])), status::OK);
        let mut byte = [0];
        let file = std::fs::File::open(&path).unwrap();
        file.read_exact_at(&mut byte, 15 * 512).unwrap();
        assert_eq!(byte, [2]);

        let refused = rig
            .block
            .update_backend(open_disk(&path, true).unwrap().into());
        assert!(matches!(refused, Err(BlockError::ReadOnly(true))));
        assert_eq!(rig.status_of(&Ask::read(0, 1)), status::OK);
        let metrics = rig.block.metrics();
        assert_eq!(
            (metrics.update_count.get(), metrics.update_fails.get()),
            (1, 1)
        );
    }
}
