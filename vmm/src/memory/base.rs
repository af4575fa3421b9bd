//! Memory that stands still: what several machines have in common, and each changes only for itself.
//!
//! A base is a flat list of extents, each a part of memory and the file (memfd) it is in, at the same offset. Where there
//! is no extent, memory is zero. However often a machine and its clones were cloned, a page is in one file only, and who
//! looks for it looks once.
#![allow(unsafe_code)] // mmap over guest memory

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use lepton_devices::Memory;
use lepton_devices::dirty::PAGE;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Most extents of a base. The host kernel looks for the extent of a page in a tree of them; a process may have 65530.
pub const MAX_EXTENTS: usize = 1024;
/// Most files of a base. All of them go to a clone with one message, which takes 253.
pub const MAX_FILES: usize = 32;

/// Nobody can change the file any more, or make it shorter under those who have it mapped.
const FROZEN: SealFlags = SealFlags::FUTURE_WRITE
    .union(SealFlags::SHRINK)
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// A part of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First byte, counted from the beginning of memory without its hole: a multiple of the page size.
    pub at: u64,
    /// Bytes, a multiple of the page size.
    pub bytes: u64,
    /// Number of the file that it is in.
    pub file: u32,
}

impl Extent {
    fn end(&self) -> u64 {
        self.at.saturating_add(self.bytes)
    }
}

/// Why what another process sent is no base.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum BaseError {
    #[error("{0} extents are more than {MAX_EXTENTS}")]
    Extents(usize),
    #[error("{0} files of memory are more than {MAX_FILES}")]
    Files(usize),
    #[error("extent of {bytes:#x} bytes at {at:#x}: {why}")]
    Extent {
        at: u64,
        bytes: u64,
        why: &'static str,
    },
    #[error("file {0} of memory is not sealed: somebody could change it")]
    NotSealed(usize),
    #[error("file {number} of memory: {source}")]
    Host { number: usize, source: io::Error },
}

/// Memory that stands still.
#[derive(Debug, Clone)]
pub struct Base {
    bytes: u64,
    files: Vec<Arc<File>>,
    /// In ascending order, without overlaps.
    extents: Vec<Extent>,
}

/// A file for memory of `bytes` bytes. It takes no room until something is written.
pub fn new_file(bytes: u64) -> io::Result<File> {
    let file = memfd_create(
        "guest memory",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    rustix::fs::ftruncate(&file, bytes)?;
    Ok(file.into())
}

/// Seals a file: from here on it does not change. A mapping that is shared and writable must be gone soon.
pub fn seal(file: &File) -> io::Result<()> {
    Ok(fcntl_add_seals(file, FROZEN)?)
}

impl Base {
    /// Memory of `bytes` bytes, all zero.
    pub fn zero(bytes: u64) -> Self {
        Base {
            bytes,
            files: Vec::new(),
            extents: Vec::new(),
        }
    }

    /// Memory that is `file` as a whole.
    pub fn whole(file: File, bytes: u64) -> Self {
        Base {
            bytes,
            files: vec![Arc::new(file)],
            extents: vec![Extent {
                at: 0,
                bytes,
                file: 0,
            }],
        }
    }

    /// A base that another process sent. It may say anything.
    pub fn received(
        bytes: u64,
        extents: Vec<Extent>,
        files: Vec<OwnedFd>,
    ) -> Result<Self, BaseError> {
        if extents.len() > MAX_EXTENTS {
            return Err(BaseError::Extents(extents.len()));
        }
        if files.len() > MAX_FILES {
            return Err(BaseError::Files(files.len()));
        }
        let mut sizes = Vec::with_capacity(files.len());
        for (number, file) in files.iter().enumerate() {
            let host = |source| BaseError::Host { number, source };
            // Other files cannot be asked for seals.
            let seals = fcntl_get_seals(file).map_err(|error| host(error.into()))?;
            if !seals.contains(FROZEN) {
                return Err(BaseError::NotSealed(number));
            }
            let size = rustix::fs::fstat(file).map_err(|error| host(error.into()))?;
            sizes.push(u64::try_from(size.st_size).unwrap_or(0));
        }
        let mut end = 0;
        for extent in &extents {
            let Extent {
                at,
                bytes: of,
                file,
            } = *extent;
            let wrong = |why| BaseError::Extent { at, bytes: of, why };
            if of == 0 || !at.is_multiple_of(PAGE) || !of.is_multiple_of(PAGE) {
                return Err(wrong("not whole pages"));
            }
            if at < end {
                return Err(wrong("before the end of the one before it"));
            }
            end = at.checked_add(of).ok_or(wrong("its end overflows"))?;
            if end > bytes {
                return Err(wrong("behind the end of memory"));
            }
            match sizes.get(file as usize) {
                None => return Err(wrong("there is no such file")),
                Some(size) if *size < end => return Err(wrong("behind the end of its file")),
                Some(_) => {}
            }
        }
        let files = files.into_iter().map(|file| Arc::new(file.into()));
        Ok(Base {
            bytes,
            files: files.collect(),
            extents,
        })
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The files.
    pub fn files(&self) -> &[Arc<File>] {
        &self.files
    }

    /// The extents.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// This base with `file` instead of what it has in `runs`, each (first byte, bytes) in ascending order.
    #[must_use]
    pub fn with(&self, file: File, runs: &[(u64, u64)]) -> Self {
        let new = self.files.len() as u32;
        let mut extents = Vec::with_capacity(self.extents.len() + runs.len() * 2);
        let mut old = self.extents.iter().copied();
        let mut left = old.next();
        for &(at, bytes) in runs {
            let end = at + bytes;
            while let Some(extent) = left {
                if extent.at >= end {
                    break;
                }
                if extent.at < at {
                    let before = extent.end().min(at) - extent.at;
                    extents.push(Extent {
                        bytes: before,
                        ..extent
                    });
                }
                if extent.end() > end {
                    left = Some(Extent {
                        at: end,
                        bytes: extent.end() - end,
                        file: extent.file,
                    });
                    break;
                }
                left = old.next();
            }
            extents.push(Extent {
                at,
                bytes,
                file: new,
            });
        }
        extents.extend(left);
        extents.extend(old);
        let mut files = self.files.clone();
        files.push(Arc::new(file));
        Base {
            bytes: self.bytes,
            files,
            extents,
        }
        .tidy()
    }

    /// Joins what belongs together and drops files that are not needed any more.
    fn tidy(self) -> Self {
        let Base {
            bytes,
            files,
            extents,
        } = self;
        let mut joined: Vec<Extent> = Vec::with_capacity(extents.len());
        for extent in extents {
            match joined.last_mut() {
                Some(last) if last.end() == extent.at && last.file == extent.file => {
                    last.bytes += extent.bytes;
                }
                _ => joined.push(extent),
            }
        }
        let mut kept = Vec::new();
        let mut numbers = vec![None; files.len()];
        for extent in &mut joined {
            let number = &mut numbers[extent.file as usize];
            extent.file = *number.get_or_insert_with(|| {
                kept.push(files[extent.file as usize].clone());
                kept.len() as u32 - 1
            });
        }
        Base {
            bytes,
            files: kept,
            extents: joined,
        }
    }

    /// Whether there are parts of memory that are in none of its files.
    pub fn has_gaps(&self) -> bool {
        let there: u64 = self.extents.iter().map(|extent| extent.bytes).sum();
        there < self.bytes
    }

    /// Whether all but the largest of its files should be put into one, so that the next delta has room.
    pub fn is_full(&self) -> bool {
        self.files.len() >= MAX_FILES
    }

    /// The extents that are not in the file that has most of memory, as runs.
    pub fn small_parts(&self) -> Vec<(u64, u64)> {
        let mut sizes = vec![0u64; self.files.len()];
        for extent in &self.extents {
            sizes[extent.file as usize] += extent.bytes;
        }
        let largest = (0..sizes.len()).max_by_key(|file| sizes[*file]);
        let small = self
            .extents
            .iter()
            .filter(|extent| Some(extent.file as usize) != largest);
        small.map(|extent| (extent.at, extent.bytes)).collect()
    }

    /// Reads what is at `at`; zero where there is nothing.
    pub fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        let end = at.saturating_add(buffer.len() as u64);
        let first = self.extents.partition_point(|extent| extent.end() <= at);
        for extent in &self.extents[first..] {
            let (from, to) = (extent.at.max(at), extent.end().min(end));
            if from >= to {
                break;
            }
            let part = &mut buffer[(from - at) as usize..(to - at) as usize];
            self.files[extent.file as usize].read_exact_at(part, from)?;
        }
        Ok(())
    }

    /// Puts the extents under `memory` in the place of what is there, each as a private mapping: what is written there
    /// from now on stays in this process. Only those within `only`, if it says so.
    ///
    /// Nobody may use the memory meanwhile. If it fails, some parts are replaced and others not.
    pub fn map(&self, memory: &Memory, only: Option<&[(u64, u64)]>) -> io::Result<()> {
        let all = [(0, self.bytes)];
        let places = Places::new(memory);
        for &(at, bytes) in only.unwrap_or(&all) {
            let end = at.saturating_add(bytes);
            let first = self.extents.partition_point(|extent| extent.end() <= at);
            for extent in &self.extents[first..] {
                let (from, to) = (extent.at.max(at), extent.end().min(end));
                if from >= to {
                    break;
                }
                let file = &self.files[extent.file as usize];
                for part in places.of(from, to - from) {
                    // SAFETY: the place lies in a mapping of guest memory that `memory` keeps and to which there are no
                    // references. The file is as long, and cannot be made shorter.
                    unsafe { map_over(part.host, part.bytes, file, part.at, Sharing::Private) }?;
                }
            }
        }
        Ok(())
    }
}

/// Puts a file that is all of memory under `memory`.
///
/// Nobody may use the memory meanwhile.
pub fn map_file(memory: &Memory, file: &File, sharing: Sharing) -> io::Result<()> {
    for part in Places::new(memory).all() {
        // SAFETY: the place is a mapping of guest memory, to which there are no references.
        unsafe { map_over(part.host, part.bytes, file, part.at, sharing) }?;
    }
    Ok(())
}

/// Where the parts of memory are in this process.
pub struct Places(Vec<Part>);

/// A part of memory that is in one piece here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// First byte, counted as in [`Extent::at`].
    pub at: u64,
    /// Bytes.
    pub bytes: u64,
    /// Address of the first byte.
    pub host: usize,
}

impl Places {
    /// Those of `memory`.
    pub fn new(memory: &Memory) -> Self {
        let mut at = 0;
        let parts = memory.iter().map(|region| {
            let part = Part {
                at,
                bytes: region.len(),
                host: region.as_ptr() as usize,
            };
            at += region.len();
            part
        });
        Places(parts.collect())
    }

    /// All of them, in ascending order.
    pub fn all(&self) -> &[Part] {
        &self.0
    }

    /// The pieces of `bytes` bytes from `at` on.
    pub fn of(&self, at: u64, bytes: u64) -> impl Iterator<Item = Part> {
        let end = at.saturating_add(bytes);
        self.0.iter().filter_map(move |part| {
            let from = part.at.max(at);
            let to = (part.at + part.bytes).min(end);
            (from < to).then(|| Part {
                at: from,
                bytes: to - from,
                host: part.host + (from - part.at) as usize,
            })
        })
    }
}

/// Where what is written to a mapping goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// To the file.
    Shared,
    /// Nowhere.
    Private,
}

/// Maps a part of a file over what is at an address.
///
/// # Safety
/// The addresses belong to a mapping of guest memory, or are kept for one, and nobody has a reference into it.
pub unsafe fn map_over(
    address: usize,
    bytes: u64,
    file: &File,
    at: u64,
    sharing: Sharing,
) -> io::Result<()> {
    let at = libc::off_t::try_from(at).map_err(io::Error::other)?;
    let sharing = match sharing {
        Sharing::Shared => libc::MAP_SHARED,
        Sharing::Private => libc::MAP_PRIVATE,
    };
    // SAFETY: the caller's.
    unsafe { map_at(address, bytes, sharing, file.as_raw_fd(), at) }
}

/// Maps zeroes over what is at an address.
///
/// # Safety
/// As for [`map_over`].
pub unsafe fn map_zeroes(address: usize, bytes: u64) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the caller's.
    unsafe { map_at(address, bytes, flags, -1, 0) }
}

/// # Safety
/// As for [`map_over`].
unsafe fn map_at(
    address: usize,
    bytes: u64,
    flags: libc::c_int,
    file: RawFd,
    at: libc::off_t,
) -> io::Result<()> {
    let length = usize::try_from(bytes).map_err(io::Error::other)?;
    // SAFETY: the caller's.
    let mapped = unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            flags | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file,
            at,
        )
    };
    match mapped {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
