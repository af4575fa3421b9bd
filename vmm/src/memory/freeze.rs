//! From memory that a machine writes to a base that stands still, on which the machine goes on.
//!
//! Memory in a file of its own ([`Origin::Shared`]) is not copied: its pages are moved to a second mapping, which
//! costs next to nothing, and the file is mapped in the first one's place, privately. What was written since the last time is copied into a new
//! file, and the machine then has it from there, so that the next time it need not be copied again.
#![allow(unsafe_code)] // mremap and mmap of guest memory, and writing it to a file

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use lepton_devices::Memory;
use lepton_devices::dirty::PAGE;

use super::base::{self, Base, MAX_EXTENTS, Part, Places, Sharing, map_over};
use super::private::{self, Runs};
use super::{Origin, Ram};

/// Why memory cannot stand still. The machine goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// Memory that comes from somewhere that only this process can ask.
    #[error("its memory comes from {0}, which a clone cannot ask for it")]
    Origin(&'static str),
    /// Memory that comes from a snapshot as it is touched.
    #[error(
        "its memory comes from a snapshot, as it is touched: to clone a snapshot, start lepton-vmm --template STATE_FILE \
         --template-memory MEMORY_FILE, and PUT /clone there"
    )]
    Snapshot,
    /// The host refused.
    #[error("memory: {0}")]
    Host(#[from] io::Error),
}

/// A mapping that nobody uses any more. To be dropped when there is time: it takes as long as memory is large.
pub struct OldMapping {
    address: usize,
    bytes: usize,
}

impl Drop for OldMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours: the kernel has chosen its addresses, and nobody else was told.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.bytes) };
    }
}

/// Memory that stands still.
pub struct Frozen {
    /// As it is now.
    pub base: Base,
    /// What is to be dropped later.
    pub leftovers: Vec<OldMapping>,
}

impl Ram {
    /// Lets memory as it is now be a base for others and for this machine. The machine is paused.
    pub fn freeze(&mut self) -> Result<Frozen, FreezeError> {
        let bytes = self.memory_bytes();
        let leftovers = match &self.origin {
            Origin::Zeroes => {
                self.write_delta(&Base::zero(bytes))?;
                Vec::new()
            }
            Origin::Base(base) => {
                let base = base.clone();
                self.write_delta(&base)?;
                Vec::new()
            }
            Origin::Shared(file) => {
                let file = file.try_clone()?;
                let leftovers = replace(&self.memory, &file)?;
                // Now that nobody writes to it any more.
                if let Err(error) = base::seal(&file) {
                    base::share(&self.memory, &file)?;
                    return Err(error.into());
                }
                self.origin = Origin::Base(Base::whole(file, bytes));
                leftovers
            }
            Origin::File(_) => return Err(FreezeError::Snapshot),
            Origin::Elsewhere(_) => return Err(FreezeError::Origin("another process")),
        };
        self.protect();
        match &self.origin {
            Origin::Base(base) => Ok(Frozen {
                base: base.clone(),
                leftovers,
            }),
            _ => Err(FreezeError::Origin("nowhere")),
        }
    }

    /// Copies what is not in `base` to a new file, and maps that in its place.
    fn write_delta(&mut self, base: &Base) -> Result<(), FreezeError> {
        let mut runs = private::runs(&self.memory, base, self.pagemap.as_ref())?;
        if runs.is_empty() && !base.extents().is_empty() {
            return Ok(());
        }
        if base.is_full() {
            runs = union(runs, base.small_parts());
        }
        let file = base::new_file(base.bytes())?;
        let next = with_few(base, &file, &mut runs)?;
        let places = Places::new(&self.memory);
        for &(at, bytes) in &runs {
            for part in places.of(at, bytes) {
                // SAFETY: the part lies in a mapping of guest memory that stays mapped while this runs.
                unsafe { write(&file, part) }?;
            }
        }
        base::seal(&file)?;
        // Before it is so: a part that is not mapped from the file in the end counts as written, and that it is.
        self.origin = Origin::Base(next.clone());
        next.map(&self.memory, Some(&runs))?;
        Ok(())
    }
}

/// `base` with `file` instead of what it has in `runs`, which are joined where they would make too many extents.
pub(super) fn with_few(base: &Base, file: &File, runs: &mut Runs) -> io::Result<Base> {
    let mut next = base.with(file.try_clone()?, runs);
    let mut gap = PAGE;
    while next.extents().len() > MAX_EXTENTS {
        // A page too many costs less than an extent too many.
        gap *= 2;
        *runs = join(runs, gap);
        next = base.with(file.try_clone()?, runs);
    }
    Ok(next)
}

/// Writes a part of guest memory to its place in a file.
///
/// # Safety
/// The part is mapped, and stays so.
unsafe fn write(file: &File, part: Part) -> io::Result<()> {
    let Part {
        mut at,
        mut bytes,
        mut host,
    } = part;
    while bytes > 0 {
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(at).map_err(io::Error::other)?;
        // SAFETY: the kernel reads `length` bytes, which the caller says are mapped.
        let written = unsafe {
            libc::pwrite(
                file.as_raw_fd(),
                host as *const libc::c_void,
                length,
                offset,
            )
        };
        match usize::try_from(written) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                at += written as u64;
                bytes -= written as u64;
                host += written;
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Moves the pages of all mappings of memory away and maps `file` in their place, privately.
fn replace(memory: &Memory, file: &File) -> io::Result<Vec<OldMapping>> {
    let mut leftovers = Vec::new();
    for part in Places::new(memory).all() {
        // Without it the next step is slow: it lets go of all pages. A host before Linux 5.13 refuses.
        leftovers.extend(move_pages(*part).ok());
        // SAFETY: the addresses are those of guest memory, to which there are no references.
        let mapped = unsafe { map_over(part.host, part.bytes, file, part.at, Sharing::Private) };
        if let Err(error) = mapped {
            // Nothing was written meanwhile, so all is as before.
            base::share(memory, file)?;
            return Err(error);
        }
    }
    Ok(leftovers)
}

/// Moves the pages of a mapping of a file to a second one. The first stays, without pages, so that at no time somebody
/// else can get its addresses.
fn move_pages(part: Part) -> io::Result<OldMapping> {
    /// What one page table covers: one is moved whole only from such a boundary to another.
    const TABLE: usize = 2 << 20;
    let bytes = usize::try_from(part.bytes).map_err(io::Error::other)?;
    let length = bytes.saturating_add(TABLE);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: new addresses, that nobody has yet.
    let room = unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
    if room == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let room = OldMapping {
        address: room as usize,
        bytes: length,
    };
    let to = room.address + part.host.wrapping_sub(room.address) % TABLE;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    // SAFETY: the mapping is guest memory, to which there are no references. What it holds is in the file, so that it
    // holds the same when it gets pages again. It goes to addresses that were reserved for it above.
    let moved = unsafe {
        libc::mremap(
            part.host as *mut libc::c_void,
            bytes,
            bytes,
            flags,
            to as *mut libc::c_void,
        )
    };
    match moved {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(room),
    }
}

/// Joins runs that are no more than `gap` bytes apart.
fn join(runs: &Runs, gap: u64) -> Runs {
    let mut joined: Runs = Vec::with_capacity(runs.len());
    for &(at, bytes) in runs {
        match joined.last_mut() {
            Some((first, length)) if at <= *first + *length + gap => {
                *length = (*length).max(at + bytes - *first);
            }
            _ => joined.push((at, bytes)),
        }
    }
    joined
}

/// What is in either.
fn union(mut one: Runs, two: Runs) -> Runs {
    one.extend(two);
    one.sort_unstable();
    join(&one, 0)
}

#[cfg(test)]
mod tests;
