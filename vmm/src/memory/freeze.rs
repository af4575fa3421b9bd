//! From memory that a machine writes to a base that stands still, on which the machine goes on.
//!
//! Memory in a file of its own ([`Origin::Shared`]) is not copied: its pages are moved to a second mapping, which
//! costs next to nothing beside copying them, and the file is mapped in the first one's place, privately. KVM has to let
//! go of each page for it, which takes 30 ns; so a machine that has many does most of it while it runs ([`Ram::part`]). What was
//! written since the last time is copied into a new file, and the machine then has it from there, so that the next time it need
//! not be copied again.
#![allow(unsafe_code)] // mremap and mmap of guest memory, and writing it to a file

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use lepton_devices::Memory;
use lepton_devices::dirty::PAGE;

use super::base::{self, Base, MAX_EXTENTS, Part, Places, Sharing, map_over};
use super::private::{self, Runs};
use super::{Origin, Ram};

/// How much memory in pages that are there makes it worth while to begin before the machine stands still: what is written
/// meanwhile has to be copied.
const WORTH_PARTING: u64 = 32 << 20;
/// Bytes of memory of which KVM lets go at once while the guest runs. Whoever touches new pages waits that long: 0.25 ms.
const STRETCH: u64 = 32 << 20;

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
    /// Bytes that had to be copied for it.
    pub copied: u64,
    /// What is to be dropped later.
    pub leftovers: Vec<OldMapping>,
}

impl Ram {
    /// Begins what [`Self::freeze`] would do while the machine stands still, if that is worth while: lets go of the pages of
    /// memory in a file of its own. The guest may run, and I/O be in flight: at any time an address has what it had, and
    /// what is written from now on is this process's alone. To be frozen soon. What cannot be done now is done then.
    pub fn part(&mut self) -> Vec<OldMapping> {
        let mut leftovers = Vec::new();
        let Origin::Shared(file) = &self.origin else {
            return leftovers;
        };
        let there = file.metadata().map_or(0, |data| data.blocks() * 512);
        // Without pagemap what is written meanwhile would have to be looked for in all of memory.
        if there < WORTH_PARTING || self.pagemap.is_none() {
            return leftovers;
        }
        let Ok(file) = file.try_clone() else {
            return leftovers;
        };
        self.is_parting = true;
        let replaced = replace(&self.memory, &file, STRETCH, &mut leftovers);
        if replaced.and_then(|()| base::seal(&file)).is_ok() {
            self.is_parting = false;
            self.origin = Origin::Base(Base::whole(file, self.memory_bytes()));
        }
        leftovers
    }

    /// Copies what is this process's alone to `file`, which has the rest of memory, and says how many bytes that were.
    fn write_back(&self, file: &File) -> io::Result<u64> {
        let base = Base::whole(file.try_clone()?, self.memory_bytes());
        let runs = private::runs(&self.memory, &base, self.pagemap.as_ref())?;
        write_runs(&self.memory, file, &runs)?;
        Ok(length(&runs))
    }

    /// Lets memory as it is now be a base for others and for this machine. The machine is paused.
    pub fn freeze(&mut self) -> Result<Frozen, FreezeError> {
        let bytes = self.memory_bytes();
        let (copied, leftovers) = match &self.origin {
            Origin::Zeroes => (self.write_delta(&Base::zero(bytes))?, Vec::new()),
            Origin::Base(base) => {
                let base = base.clone();
                (self.write_delta(&base)?, Vec::new())
            }
            Origin::Shared(file) => {
                let file = file.try_clone()?;
                let copied = match self.is_parting {
                    true => self.write_back(&file)?,
                    false => 0,
                };
                let mut leftovers = Vec::new();
                let replaced = replace(&self.memory, &file, u64::MAX, &mut leftovers);
                // Now that nobody writes to it any more.
                if let Err(error) = replaced.and_then(|()| base::seal(&file)) {
                    // Nothing was written meanwhile, so all is as before.
                    base::map_file(&self.memory, &file, Sharing::Shared)?;
                    self.is_parting = false;
                    return Err(error.into());
                }
                self.is_parting = false;
                self.origin = Origin::Base(Base::whole(file, bytes));
                (copied, leftovers)
            }
            Origin::File(_) => return Err(FreezeError::Snapshot),
            Origin::Elsewhere(_) => return Err(FreezeError::Origin("another process")),
        };
        self.protect();
        match &self.origin {
            Origin::Base(base) => Ok(Frozen {
                base: base.clone(),
                copied,
                leftovers,
            }),
            _ => Err(FreezeError::Origin("nowhere")),
        }
    }

    /// Copies what is not in `base` to a new file, maps that in its place, and says how many bytes that were.
    fn write_delta(&mut self, base: &Base) -> Result<u64, FreezeError> {
        let mut runs = private::runs(&self.memory, base, self.pagemap.as_ref())?;
        if runs.is_empty() && !base.extents().is_empty() {
            return Ok(0);
        }
        if base.is_full() {
            runs = union(runs, base.small_parts());
        }
        let file = base::new_file(base.bytes())?;
        let next = with_few(base, &file, &mut runs)?;
        write_runs(&self.memory, &file, &runs)?;
        base::seal(&file)?;
        // Before it is so: a part that is not mapped from the file in the end counts as written, and that it is.
        self.origin = Origin::Base(next.clone());
        next.map(&self.memory, Some(&runs))?;
        Ok(length(&runs))
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

/// Bytes in all of them.
fn length(runs: &Runs) -> u64 {
    runs.iter().map(|(_, bytes)| bytes).sum()
}

/// Writes parts of memory to their places in a file.
fn write_runs(memory: &Memory, file: &File, runs: &Runs) -> io::Result<()> {
    let places = Places::new(memory);
    for part in runs.iter().flat_map(|&(at, bytes)| places.of(at, bytes)) {
        // SAFETY: the part lies in a mapping of guest memory that stays mapped while this runs.
        unsafe { write(file, part) }?;
    }
    Ok(())
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

/// Moves the pages of all mappings of memory away and maps `file` in their place, privately: a `stretch` of no more than so many
/// bytes after the other. Where the pages are now goes to `leftovers`. After an error some of memory is private and some not.
fn replace(
    memory: &Memory,
    file: &File,
    stretch: u64,
    leftovers: &mut Vec<OldMapping>,
) -> io::Result<()> {
    for whole in Places::new(memory).all() {
        // Without it the next step is slow: it lets go of all pages. A host before Linux 5.13 refuses to move them, another one
        // may have no addresses left.
        let room = Room::of(*whole).ok();
        let mut begin = 0;
        while begin < whole.bytes {
            let part = Part {
                at: whole.at + begin,
                bytes: stretch.min(whole.bytes - begin),
                host: whole.host + begin as usize,
            };
            begin += part.bytes;
            if let Some(room) = &room {
                let _ = room.take_pages(part);
            }
            // SAFETY: the addresses are those of guest memory, to which there are no references. Who accesses them meanwhile
            // finds the same before and after.
            unsafe { map_over(part.host, part.bytes, file, part.at, Sharing::Private) }?;
        }
        leftovers.extend(room.map(|room| room.reserved));
    }
    Ok(())
}

/// Addresses for the pages of a mapping.
struct Room {
    reserved: OldMapping,
    /// What is to be added to an address of the mapping.
    offset: usize,
}

impl Room {
    /// Reserves them for `whole`.
    fn of(whole: Part) -> io::Result<Self> {
        /// What one page table covers: one is moved whole only from such a boundary to another.
        const TABLE: usize = 2 << 20;
        let bytes = usize::try_from(whole.bytes).map_err(io::Error::other)?;
        let length = bytes.saturating_add(TABLE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: new addresses, that nobody has yet.
        let room =
            unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
        if room == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let reserved = OldMapping {
            address: room as usize,
            bytes: length,
        };
        let to = reserved.address + whole.host.wrapping_sub(reserved.address) % TABLE;
        Ok(Room {
            reserved,
            offset: to.wrapping_sub(whole.host),
        })
    }

    /// Moves the pages of a part of the mapping here. The part stays, without pages, so that at no time somebody else can get
    /// its addresses.
    fn take_pages(&self, part: Part) -> io::Result<()> {
        let bytes = usize::try_from(part.bytes).map_err(io::Error::other)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        // SAFETY: the mapping is guest memory, to which there are no references. What it holds is in the file, so that it
        // holds the same when it gets pages again. It goes to addresses that were reserved for it above.
        let moved = unsafe {
            libc::mremap(
                part.host as *mut libc::c_void,
                bytes,
                bytes,
                flags,
                part.host.wrapping_add(self.offset) as *mut libc::c_void,
            )
        };
        match moved {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
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
