//! A driver on plain memory against the whole device, with both engines.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use lepton_hostio::file::open_disk;
use virtio_bindings::bindings::virtio_blk::*;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::tempdir::TempDir;

use super::backend::Image;
use super::device::{Block, BlockConfig, BlockError, CacheType};
use super::engine::EngineKind;
use super::request::status;
use crate::rate_limiter::{BucketConfig, RateLimiterConfig};
use crate::virtio::device::{DeviceError, Progress, VirtioDevice};
use crate::virtio::testing::{Buffer, TestDriver};

mod data;
mod hostile;
mod lifecycle;
mod overlay;

const ENGINES: [EngineKind; 2] = [EngineKind::Sync, EngineKind::Async];
const SECTOR: usize = 512;
/// A status byte that no device writes.
const NO_STATUS: u8 = 0xaa;

/// What a test asks for.
#[derive(Debug, Clone)]
struct Ask {
    request_type: u32,
    sector: u64,
    out: Vec<u8>,
    room: usize,
    /// Bytes per buffer; None: header, data and status in a buffer each.
    cut: Option<usize>,
}

/// What the driver got.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u8,
    data: Vec<u8>,
    used_len: u32,
}

impl Ask {
    fn new(request_type: u32, sector: u64) -> Self {
        Ask {
            request_type,
            sector,
            out: Vec::new(),
            room: 0,
            cut: None,
        }
    }

    fn read(sector: u64, sectors: usize) -> Self {
        Ask {
            room: sectors * SECTOR,
            ..Ask::new(VIRTIO_BLK_T_IN, sector)
        }
    }

    fn write(sector: u64, out: Vec<u8>) -> Self {
        Ask {
            out,
            ..Ask::new(VIRTIO_BLK_T_OUT, sector)
        }
    }

    fn flush() -> Self {
        Ask::new(VIRTIO_BLK_T_FLUSH, 0)
    }

    fn range(request_type: u32, sector: u64, sectors: u32, flags: u32) -> Self {
        let mut out = sector.to_le_bytes().to_vec();
        out.extend(sectors.to_le_bytes());
        out.extend(flags.to_le_bytes());
        Ask {
            out,
            ..Ask::new(request_type, 0)
        }
    }

    fn get_id() -> Self {
        Ask {
            room: 20,
            ..Ask::new(VIRTIO_BLK_T_GET_ID, 0)
        }
    }
}

/// A chain that was offered.
struct Offered {
    head: u16,
    room: Vec<Buffer>,
}

/// A drive, its image and its driver.
struct Rig {
    driver: TestDriver,
    block: Block,
    path: PathBuf,
    _dir: TempDir,
    epoll: Epoll,
    features: u64,
}

struct Options {
    engine: EngineKind,
    read_only: bool,
    cache: CacheType,
    queue_size: u16,
    rate_limiter: RateLimiterConfig,
    /// The image lies in this folder.
    folder: &'static str,
    /// The disk is an overlay, and under it are so many layers.
    layers: Option<usize>,
}

impl Options {
    fn new(engine: EngineKind) -> Self {
        Options {
            engine,
            read_only: false,
            cache: CacheType::Writeback,
            queue_size: 64,
            rate_limiter: RateLimiterConfig::default(),
            folder: "/tmp",
            layers: None,
        }
    }
}

impl Rig {
    fn new(engine: EngineKind, image: &[u8]) -> Self {
        Rig::with(Options::new(engine), image)
    }

    fn with(options: Options, image: &[u8]) -> Self {
        let dir = TempDir::new_in(Path::new(options.folder)).unwrap();
        let path = dir.as_path().join("image");
        std::fs::write(&path, image).unwrap();
        let block = Block::new(BlockConfig {
            image: match options.layers {
                None => open_disk(&path, options.read_only).unwrap().into(),
                Some(layers) => overlay::stack(&path, layers).into(),
            },
            serial: None,
            cache: options.cache,
            engine: options.engine,
            queue_size: options.queue_size,
            rate_limiter: options.rate_limiter,
        })
        .unwrap();
        let epoll = Epoll::new().unwrap();
        for (index, fd) in block.sources().into_iter().enumerate() {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let event = EpollEvent::new(events, index as u64);
            epoll.ctl(ControlOperation::Add, fd, event).unwrap();
        }
        let mut rig = Rig {
            driver: TestDriver::new(&[options.queue_size]),
            features: block.features(),
            block,
            path,
            _dir: dir,
            epoll,
        };
        rig.activate();
        rig
    }

    fn activate(&mut self) {
        let resources = self.driver.resources(self.features);
        self.block.activate(resources).unwrap();
    }

    fn reset(&mut self) {
        self.block.reset();
        self.driver.reset();
        self.activate();
    }

    /// Makes the chain available.
    fn offer(&mut self, ask: &Ask) -> Offered {
        let mut message = ask.request_type.to_le_bytes().to_vec();
        message.extend([0; 4]);
        message.extend(ask.sector.to_le_bytes());
        let mut buffers = Vec::new();
        let mut room = Vec::new();
        if let Some(cut) = ask.cut {
            message.extend(&ask.out);
            buffers.extend(message.chunks(cut).map(|part| self.driver.readable(part)));
            let mut left = ask.room + 1;
            while left > 0 {
                room.push(self.driver.writable(left.min(cut)));
                left -= left.min(cut);
            }
        } else {
            buffers.push(self.driver.readable(&message));
            if !ask.out.is_empty() {
                buffers.push(self.driver.readable(&ask.out));
            }
            if ask.room > 0 {
                room.push(self.driver.writable(ask.room));
            }
            room.push(self.driver.writable(1));
        }
        buffers.extend(&room);
        let head = self.driver.queues[0].offer(&buffers);
        Offered { head, room }
    }

    /// Handles one event of the device, waiting for it.
    fn handle_event(&mut self) -> Result<(), DeviceError> {
        let mut events = [EpollEvent::default()];
        // io_uring interrupts a wait to finish work in the thread that started it.
        let count = loop {
            match self.epoll.wait(20_000, &mut events) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                result => break result.unwrap(),
            }
        };
        assert_eq!(count, 1, "no event within 20 s");
        let source = events[0].data() as usize;
        while self.block.process_source(source)? == Progress::Again {}
        Ok(())
    }

    fn kick(&mut self) -> Result<(), DeviceError> {
        while self.block.process_queue(0)? == Progress::Again {}
        Ok(())
    }

    /// Kicks, and handles events until `count` chains came back.
    fn collect(&mut self, count: usize) -> Vec<(u16, u32)> {
        self.kick().unwrap();
        let mut used = self.driver.queues[0].used();
        while used.len() < count {
            self.handle_event().unwrap();
            used.extend(self.driver.queues[0].used());
        }
        assert_eq!(used.len(), count);
        used
    }

    fn ask_all(&mut self, asks: &[Ask]) -> Vec<Answer> {
        let offered: Vec<_> = asks.iter().map(|ask| self.offer(ask)).collect();
        let used = self.collect(asks.len());
        let answers = offered.iter().map(|offered| {
            let (_, used_len) = used.iter().find(|(head, _)| *head == offered.head).unwrap();
            self.answer(offered, *used_len)
        });
        let answers = answers.collect();
        self.driver.free_all();
        answers
    }

    fn answer(&self, offered: &Offered, used_len: u32) -> Answer {
        let rooms = offered.room.iter();
        let mut data: Vec<u8> = rooms.flat_map(|room| self.driver.bytes(*room)).collect();
        Answer {
            status: data.pop().unwrap(),
            data,
            used_len,
        }
    }

    fn ask(&mut self, ask: &Ask) -> Answer {
        self.ask_all(std::slice::from_ref(ask)).remove(0)
    }

    fn status_of(&mut self, ask: &Ask) -> u8 {
        self.ask(ask).status
    }

    fn image(&mut self) -> Vec<u8> {
        match &mut self.block.backend.image {
            Image::Raw(_) => std::fs::read(&self.path).unwrap(),
            Image::Overlay(overlay) => overlay::content(overlay),
        }
    }

    fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0xee; N];
        self.block.read_config(offset, &mut bytes);
        bytes
    }
}

/// `sectors` sectors, each byte telling its place.
fn pattern(sectors: usize) -> Vec<u8> {
    (0..sectors * SECTOR).map(|i| (i % 251) as u8).collect()
}
