//! Memory that is checked when it is first touched.
//!
//! The machine's memory is empty, and faults on it come to a thread of ours. It reads the chunk of 64 KiB from the
//! memory file, hashes it, compares, and only then fills it in. So a load costs nothing that grows with memory, and a
//! guest never sees a byte that was not saved.
#![allow(unsafe_code)] // filling pages of guest memory

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use lepton_devices::Memory;
use lepton_devices::dirty::DirtyPages;
use lepton_snapshot::{CHUNK, Hash, Manifest, ManifestError};
use rustix::event::{Timespec, poll};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::userfault::Userfault;
use crate::arch::x86_64::paging::Fetch;
use crate::exit::ExitCode;
use crate::reach::{self, ReachError};

/// How long the machine has to end in order, once a chunk is bad.
const GRACE: Timespec = Timespec {
    tv_sec: 2,
    tv_nsec: 0,
};

/// Why a chunk cannot be filled in.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// It is not what was saved.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// It cannot be read.
    #[error("memory file: chunk {chunk} cannot be read: {source}")]
    Read {
        /// The chunk.
        chunk: u64,
        /// The host's reason.
        source: io::Error,
    },
    /// The kernel did not take it, or tells of no more faults.
    #[error("userfaultfd: {0}")]
    Userfault(#[from] io::Error),
    /// Files could not be given up.
    #[error(transparent)]
    Files(#[from] ReachError),
    /// A fault in memory that is none of the machine's.
    #[error("userfaultfd: a fault at {0:#x}, where no guest memory is")]
    Stray(u64),
}

/// A memory file and its hashes.
pub struct Source {
    /// The file.
    pub file: File,
    /// The hashes.
    pub manifest: Manifest,
}

impl Source {
    /// Reads a chunk into `buffer` and checks it. False: it is all zeroes, and was not read.
    pub fn read(&mut self, chunk: u64, buffer: &mut [u8]) -> Result<bool, PageError> {
        if self.manifest.leaf(chunk)? == Hash::ZERO {
            return Ok(false);
        }
        self.file
            .read_exact_at(buffer, chunk * CHUNK as u64)
            .map_err(|source| PageError::Read { chunk, source })?;
        self.manifest.check(chunk, buffer)?;
        Ok(true)
    }
}

/// Bytes that take the place of those that were saved.
struct Laid {
    /// Where, from the beginning of memory. They end in the chunk in which they begin.
    at: u64,
    bytes: Vec<u8>,
    /// Who notes that they were written, once they are.
    dirty: Option<Arc<DirtyPages>>,
}

/// Fills memory from a source. Runs on a thread of its own.
pub struct Pager {
    userfault: Userfault,
    /// Kept: the addresses below are its mappings.
    memory: Arc<Memory>,
    source: Source,
    buffer: Vec<u8>,
    laid: Arc<Mutex<Option<Laid>>>,
    stop: Arc<EventFd>,
}

/// Who is told why a pager cannot go on.
type Failed = Box<dyn FnOnce(PageError) + Send>;

/// A pager, at work or ready. It stops when this is dropped, which must not be before all who touch the memory are gone.
pub struct Paging {
    laid: Arc<Mutex<Option<Laid>>>,
    stop: Arc<EventFd>,
    /// Until it begins.
    ready: Option<(Pager, Failed)>,
    thread: Option<JoinHandle<()>>,
}

impl Paging {
    /// Has it serve faults, if it does not yet. Before the first it fills in what the processor will read for `fetch`, which would
    /// be a fault each, and for each the processor would wait for two threads to wake.
    pub fn begin(&mut self, fetch: Option<Fetch>) -> io::Result<()> {
        let Some((mut pager, failed)) = self.ready.take() else {
            return Ok(());
        };
        let thread = std::thread::Builder::new()
            .name("pager".into())
            .stack_size(256 << 10)
            .spawn(move || {
                let without_files = reach::give_up_files().map_err(PageError::Files);
                if let Err(error) = without_files.and_then(|()| pager.serve(fetch)) {
                    log::error!("{error}");
                    failed(error);
                    // The event loop itself may be who waits for the chunk, on behalf of a device.
                    let _ = poll(&mut [], Some(&GRACE));
                    std::process::exit(ExitCode::Failure as i32);
                }
            })?;
        self.thread = Some(thread);
        Ok(())
    }

    /// Lets memory have `bytes` at `at`, below the hole for devices, once their chunk is touched, which nobody has done yet. They
    /// end in that chunk. The last call counts.
    pub fn lay_over(&self, at: u64, bytes: &[u8], dirty: Option<Arc<DirtyPages>>) {
        let laid = Laid {
            at,
            bytes: bytes.to_vec(),
            dirty,
        };
        *self.laid.lock().unwrap_or_else(PoisonError::into_inner) = Some(laid);
    }
}

impl Drop for Paging {
    fn drop(&mut self) {
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
        {
            // A panic has ended the process already.
            drop(thread.join());
        }
    }
}

impl Pager {
    /// Lets faults on `memory`, which nobody has touched yet, be served from `source`.
    pub fn new(memory: Arc<Memory>, source: Source) -> io::Result<Self> {
        let userfault = Userfault::new()?;
        for region in memory.iter() {
            userfault.register(region.as_ptr() as u64, region.len())?;
        }
        Ok(Pager {
            userfault,
            memory,
            source,
            buffer: vec![0; CHUNK],
            laid: Arc::default(),
            stop: Arc::new(EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?),
        })
    }

    /// It, ready to serve. `failed` is told, once, why it cannot go on; who waits for the bad chunk then waits for ever.
    pub fn ready(self, failed: impl FnOnce(PageError) + Send + 'static) -> Paging {
        Paging {
            laid: self.laid.clone(),
            stop: self.stop.clone(),
            ready: Some((self, Box::new(failed))),
            thread: None,
        }
    }

    fn serve(&mut self, fetch: Option<Fetch>) -> Result<(), PageError> {
        if let Some(fetch) = fetch {
            self.fill_for(fetch)?;
        }
        while let Some(fault) = self.userfault.next(&self.stop)? {
            self.fill(fault)?;
        }
        Ok(())
    }

    fn fill_for(&mut self, fetch: Fetch) -> Result<(), PageError> {
        let memory = self.memory.clone();
        let mut filled = Ok(());
        let mut last = None;
        let mut fill = |at: u64| -> Option<GuestAddress> {
            let address = GuestAddress(at);
            // Where there is no memory is for the processor to say.
            let host = memory.get_host_address(address).ok()? as u64;
            let chunk = self.find(host);
            // Tables often lie together.
            if chunk != last {
                last = chunk;
                filled = self.fill(host);
            }
            filled.is_ok().then_some(address)
        };
        let code = fetch.walk(|entry| memory.read_obj(fill(entry)?).ok());
        code.and_then(fill);
        filled
    }

    fn fill(&mut self, fault: u64) -> Result<(), PageError> {
        let (start, chunk) = self.find(fault).ok_or(PageError::Stray(fault))?;
        let mut content = self.source.read(chunk, &mut self.buffer)?;
        content |= self.lay(chunk, content);
        // SAFETY: `find` gave a whole chunk of a mapping that `new` registered and `self.memory` keeps.
        let filled = unsafe {
            match content {
                true => self.userfault.copy(start, &self.buffer)?,
                false => self.userfault.zero(start, CHUNK as u64)?,
            }
        };
        if !filled {
            // Two vCPUs met at the same chunk: the second is only to be woken.
            self.userfault.wake(start, CHUNK as u64)?;
        }
        Ok(())
    }

    /// Lays over a chunk, which is in the buffer if it has a `content` other than zeroes, what belongs there instead. False:
    /// nothing does.
    fn lay(&mut self, chunk: u64, content: bool) -> bool {
        let laid = self.laid.lock().unwrap_or_else(PoisonError::into_inner);
        let here = |laid: &&Laid| laid.at / CHUNK as u64 == chunk;
        let Some(Laid { at, bytes, dirty }) = laid.as_ref().filter(here) else {
            return false;
        };
        if !content {
            self.buffer.fill(0);
        }
        let rest = self.buffer.iter_mut().skip((at % CHUNK as u64) as usize);
        for (to, from) in rest.zip(bytes) {
            *to = *from;
        }
        if let Some(dirty) = dirty {
            dirty.mark(*at, bytes.len() as u64);
        }
        true
    }

    /// Where the chunk of an address begins, and its number. Regions are whole numbers of chunks.
    fn find(&self, address: u64) -> Option<(u64, u64)> {
        let mut before = 0;
        for region in self.memory.iter() {
            let base = region.as_ptr() as u64;
            if let Some(offset) = address.checked_sub(base)
                && offset < region.len()
            {
                let offset = offset - offset % CHUNK as u64;
                return Some((base + offset, (before + offset) / CHUNK as u64));
            }
            before += region.len();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_regs, kvm_sregs};
    use lepton_api::types::HugePages;
    use lepton_snapshot::{Leaves, Replacement, state_file};
    use std::path::Path;
    use std::sync::mpsc::channel;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::image::copy_verified;
    use crate::memory::{MemorySize, allocate};

    /// A saved memory of 1 MiB, whose second chunk holds sevens and whose third eights.
    fn source(folder: &Path) -> Source {
        let memory = Replacement::new(&folder.join("memory")).unwrap();
        let mut leaves = Leaves::new(1 << 20).unwrap();
        for (chunk, byte) in [(1, 7), (2, 8)] {
            let content = vec![byte; CHUNK];
            leaves.set(chunk, Hash::of_chunk(&content)).unwrap();
            let at = chunk * CHUNK as u64;
            memory.file().write_all_at(&content, at).unwrap();
        }
        let state = Replacement::new(&folder.join("state")).unwrap();
        state_file::write(&state, b"", &leaves, &leaves.groups()).unwrap();
        state.put_in_place().unwrap();
        Source {
            file: memory.file().try_clone().unwrap(),
            manifest: state_file::open(&folder.join("state")).unwrap().memory,
        }
    }

    #[test]
    fn a_copy_is_checked_and_has_no_zeroes() {
        let folder = tempfile::tempdir().unwrap();
        let saved = source(folder.path());
        let mut seen = Vec::new();
        let base = copy_verified(saved, |chunk| seen.push(chunk)).unwrap();
        assert_eq!(seen, (0..16).collect::<Vec<_>>());
        let extents: Vec<_> = base.extents().iter().map(|e| (e.at, e.bytes)).collect();
        assert_eq!(extents, [(CHUNK as u64, 2 * CHUNK as u64)]);
        let mut bytes = [1; 4];
        for (chunk, byte) in [(0, 0), (1, 7), (2, 8), (3, 0)] {
            base.read(chunk * CHUNK as u64, &mut bytes).unwrap();
            assert_eq!(bytes, [byte; 4]);
        }
        let damaged = source(folder.path());
        damaged
            .file
            .write_all_at(&[9], 3 * CHUNK as u64 - 1)
            .unwrap();
        let error = copy_verified(damaged, |_| ()).unwrap_err().to_string();
        assert!(error.contains("chunk 2 (bytes 0x20000"), "{error}");
    }

    #[test]
    fn a_chunk_is_checked_when_it_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        let source = source(folder.path());
        source.file.write_all_at(&[9], 2 * CHUNK as u64).unwrap();
        let size = MemorySize::new(1, HugePages::None).unwrap();
        let memory = allocate(size, HugePages::None).unwrap();
        let pager = match Pager::new(memory.clone(), source) {
            Ok(pager) => pager,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("SKIPPED: userfaultfd: {error}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let mut pager = pager;
        // Over what was saved, and over zeroes.
        let dirty = Arc::new(DirtyPages::new(&memory));
        for at in [CHUNK as u64 + 6000, 4 * CHUNK as u64 + 6000] {
            let laid = Laid {
                at,
                bytes: vec![1, 2],
                dirty: Some(dirty.clone()),
            };
            pager.laid = Arc::new(Mutex::new(Some(laid)));
            assert!(!pager.lay(2, false));
            pager.buffer.fill(9);
            assert!(pager.lay(at / CHUNK as u64, at > 2 * CHUNK as u64));
            let rest = if at > 2 * CHUNK as u64 { 9 } else { 0 };
            assert_eq!(pager.buffer[5999..6003], [rest, 1, 2, rest]);
        }
        assert_eq!(dirty.take()[0], 1 << 17);
        let (sender, failed) = channel();
        // What is filled in ahead waits for nobody who serves.
        let (regs, sregs) = (
            kvm_regs {
                rip: CHUNK as u64,
                ..Default::default()
            },
            kvm_sregs::default(),
        );
        let fetch = Fetch::next(&regs, &sregs).unwrap();
        pager.fill_for(fetch).unwrap();
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(CHUNK as u64)).unwrap(),
            7
        );
        let outside = kvm_regs {
            rip: 1 << 40,
            ..regs
        };
        pager
            .fill_for(Fetch::next(&outside, &sregs).unwrap())
            .unwrap();
        // Not `begin`: that ends the process.
        std::thread::spawn(move || sender.send(pager.serve(None).unwrap_err().to_string()));
        let at = |chunk: u64| GuestAddress(chunk * CHUNK as u64 + 5000);
        assert_eq!(memory.read_obj::<u8>(at(1)).unwrap(), 7);
        assert_eq!(memory.read_obj::<u8>(at(3)).unwrap(), 0);
        memory.write_obj(1u8, at(3)).unwrap();
        assert_eq!(memory.read_obj::<u8>(at(3)).unwrap(), 1);
        // Nobody will ever fill the damaged one: a thread that is left behind waits for it.
        let waits = memory.clone();
        std::thread::spawn(move || waits.read_obj::<u8>(at(2)).unwrap());
        let error = failed.recv().unwrap();
        assert!(error.contains("chunk 2 (bytes 0x20000"), "{error}");
    }
}
