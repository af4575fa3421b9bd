//! What is behind a drive: a raw image or an overlay, at once or by io_uring; and a host that freezes, empties and
//! replaces it meanwhile.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use lepton_devices::rate_limiter::RateLimiterConfig;
use lepton_devices::virtio::block::overlay::{Chain, Overlay, maintain};
use lepton_devices::virtio::block::{
    Block, BlockConfig, BlockError, CacheType, EngineKind, Frozen, Image, Successor,
};
use lepton_devices::virtio::transport::mmio::SharedDevice;
use lepton_hostio::file::open_disk;
use tempfile::TempDir;

use super::host::QUEUE_SIZE;
use crate::scratch::{self, Scratch};

/// Sectors of a drive: eight clusters of an overlay.
pub const SECTORS: u64 = 64;
const BYTES: usize = SECTORS as usize * 512;
const CLUSTER: u64 = 4096;
/// What the base has, and a layer in its two clusters.
const BASE: u8 = 0xbb;
const LAYER: u8 = 0x1a;
/// An overlay is opened for each of them.
const MAX_FILES: usize = 8;

/// Which drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    pub is_overlay: bool,
    pub engine: EngineKind,
}

impl Form {
    /// A raw image, at once.
    pub const RAW: Self = Form {
        is_overlay: false,
        engine: EngineKind::Sync,
    };
}

/// A drive and its files.
pub struct Drive {
    device: Arc<Mutex<Block>>,
    files: Files,
}

enum Files {
    Raw(Scratch),
    Overlay(Stack),
}

/// A base, layers from the lowest on, and an overlay that is written.
struct Stack {
    folder: TempDir,
    layers: Vec<PathBuf>,
    own: PathBuf,
    made: usize,
}

impl Stack {
    fn new() -> Self {
        let folder = scratch::folder();
        let mut stack = Stack {
            own: folder.path().join("0"),
            layers: Vec::new(),
            made: 0,
            folder,
        };
        std::fs::write(stack.base(), [BASE; BYTES]).expect("memory");
        let mut layer = stack.open();
        for cluster in [1, 4] {
            let bytes = [LAYER; CLUSTER as usize];
            layer
                .write_bytes(&bytes, cluster * CLUSTER)
                .expect("memory");
        }
        layer.flush().expect("memory");
        drop(layer);
        maintain::freeze(&stack.own).expect("a layer");
        let next = stack.next();
        stack.layers.push(std::mem::replace(&mut stack.own, next));
        stack
    }

    fn base(&self) -> PathBuf {
        self.folder.path().join("base")
    }

    fn next(&mut self) -> PathBuf {
        self.made += 1;
        self.folder.path().join(self.made.to_string())
    }

    fn chain(&self) -> Chain {
        Chain::open(&self.base(), &self.layers).expect("layers")
    }

    fn open(&self) -> Overlay {
        Overlay::open(self.chain(), &self.own, false).expect("an overlay")
    }

    /// As it is without a drive: whole, over a base and a layer that nobody wrote.
    fn check(&self) {
        maintain::check(self.chain(), &self.own, &mut |_, _| {}).expect("a whole overlay");
        let base = std::fs::read(self.base()).expect("the base");
        assert!(base == [BASE; BYTES], "the base was written");
        let lowest = self.layers.get(..1).unwrap_or_default();
        let chain = Chain::open(&self.base(), lowest).expect("a layer");
        let spare = self.folder.path().join("spare");
        let mut seen = [0; BYTES];
        let mut overlay = Overlay::open(chain, &spare, false).expect("an overlay");
        overlay.read_bytes(&mut seen, 0).expect("memory");
        for (number, cluster) in seen.chunks(CLUSTER as usize).enumerate() {
            let content = match number {
                1 | 4 => LAYER,
                _ => BASE,
            };
            let is_whole = cluster.iter().all(|byte| *byte == content);
            assert!(is_whole, "cluster {number} below was written");
        }
    }
}

fn raw() -> Scratch {
    let scratch = Scratch::new(&[]);
    scratch.file.set_len(BYTES as u64).expect("memory");
    scratch
}

fn image_of(scratch: &Scratch) -> Image {
    open_disk(&scratch.path, false).expect("an image").into()
}

impl Drive {
    /// A drive and what is behind it.
    pub fn make(form: Form) -> (SharedDevice, Self) {
        let (files, image) = match form.is_overlay {
            false => {
                let scratch = raw();
                let image = image_of(&scratch);
                (Files::Raw(scratch), image)
            }
            true => {
                let stack = Stack::new();
                let image = stack.open().into();
                (Files::Overlay(stack), image)
            }
        };
        let block = Block::new(BlockConfig {
            image,
            serial: None,
            cache: CacheType::Writeback,
            engine: form.engine,
            queue_size: QUEUE_SIZE,
            rate_limiter: RateLimiterConfig::default(),
        });
        let device = Arc::new(Mutex::new(block.expect("a drive")));
        let drive = Drive {
            device: device.clone(),
            files,
        };
        (device, drive)
    }

    /// Something that a host does with a drive while its guest uses it. It may be refused.
    pub fn act(&mut self, what: u8) {
        let mut block = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        let done = match (what % 8, &mut self.files) {
            (0, _) => block.write_back(),
            (1, _) => block.reset_overlay(),
            (2, Files::Raw(scratch)) => {
                let next = raw();
                let done = block.update_backend(image_of(&next));
                if done.is_ok() {
                    *scratch = next;
                }
                done
            }
            (2, Files::Overlay(stack)) if stack.made < MAX_FILES => {
                let next = stack.next();
                let before = std::mem::replace(&mut stack.own, next);
                let done = block.update_backend(stack.open().into());
                if done.is_err() {
                    stack.own = before;
                }
                done
            }
            (3, Files::Overlay(stack)) if stack.made < MAX_FILES => freeze(&mut block, stack),
            _ => Ok(()),
        };
        if let Err(error) = done {
            assert!(!error.to_string().is_empty());
        }
    }

    /// Looks at the files once the device is gone.
    pub fn check(self) {
        let Drive { device, files } = self;
        drop(device);
        match files {
            Files::Raw(scratch) => {
                let metadata = scratch.file.metadata().expect("a file");
                assert_eq!(metadata.len(), BYTES as u64, "the image has another size");
            }
            Files::Overlay(stack) => stack.check(),
        }
    }
}

fn freeze(block: &mut Block, stack: &mut Stack) -> Result<(), BlockError> {
    let path = stack.next();
    let successor = || {
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path);
        Ok(Successor {
            file: file?,
            path: path.clone(),
            reader: None,
        })
    };
    let Frozen { next, .. } = block.freeze(successor)?;
    if let Some(next) = next {
        assert_eq!(next.as_deref(), Some(path.as_path()));
        stack.layers.push(std::mem::replace(&mut stack.own, path));
    }
    Ok(())
}
