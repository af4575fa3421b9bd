//! Asynchronous I/O between some files and guest memory over io_uring.
//!
//! Every operation in flight sits in a slot that owns what the kernel may still touch: the iovecs, and a share of the
//! guest memory they point into. A slot is emptied only when its completion has been taken from the ring, and the
//! ring is not dropped before every slot is empty. That is what makes the interface safe.
// The kernel reads and writes memory behind the compiler's back; slots make sure that it lives long enough.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::file::{Allocation, file_offset, iovec};

/// Which of a ring's files an operation is for. The first is number 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileNumber(pub u8);

impl FileNumber {
    /// The first file: the only one of most rings.
    pub const FIRST: FileNumber = FileNumber(0);

    fn fixed(self) -> Fixed {
        Fixed(u32::from(self.0))
    }
}

/// Why an operation could not be queued. Nothing was started.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// As many operations are in flight as the ring takes.
    #[error("all operations of the ring are in flight")]
    Full,
    /// A buffer is not in guest memory.
    #[error("buffer outside guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The offset or length does not fit 63 bits, or the files could not be replaced.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A finished operation.
#[derive(Debug)]
pub struct Completion {
    /// The number given with the operation.
    pub token: u64,
    /// Bytes read or written: less than asked for only at the end of the file. 0 for other operations.
    pub result: io::Result<u64>,
}

/// What the kernel is asked to do.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Read,
    Write { durable: bool },
    Sync,
    Allocate { what: Allocation, len: u64 },
}

/// An operation that is queued or in flight.
struct Operation {
    kind: Kind,
    file: FileNumber,
    token: u64,
    /// Where in the file the part that is not done yet starts.
    offset: u64,
    /// Bytes transferred already: the kernel may do less than it was asked for.
    done: u64,
    /// Keeps mapped what the iovecs point to.
    _memory: Option<Arc<GuestMemoryMmap>>,
}

#[derive(Default)]
struct Slot {
    operation: Option<Operation>,
    /// What is left to transfer. Not touched while the operation is in the kernel; kept for the next one.
    iovecs: Vec<libc::iovec>,
    /// The first iovec with bytes left.
    first: usize,
}

// SAFETY: the raw pointers in a slot are never dereferenced by this process, only handed to the kernel, for which it
// does not matter what thread does so.
unsafe impl Send for Slot {}

/// An io_uring for one file or for several, with a bounded number of operations in flight.
///
/// Operations are queued by [`FileRing::read`] and its like, started together by [`FileRing::submit`], and their ends
/// taken by [`FileRing::reap`]. They end in any order.
pub struct FileRing {
    ring: IoUring,
    slots: Vec<Slot>,
    free: Vec<u16>,
    event: EventFd,
    /// Which file is in which place is not known.
    is_mixed: bool,
}

impl FileRing {
    /// A ring for `file` with at most `depth` operations in flight, a power of two up to 4096. The error is the
    /// host's: ENOSYS or EPERM mean that io_uring is not available.
    pub fn new(file: &File, depth: u16) -> io::Result<Self> {
        Self::with_places(&[file], 1, depth)
    }

    /// As [`FileRing::new`], for `files` in the order of their numbers, with room for `places` of them: more can come
    /// by [`FileRing::set_files`].
    pub fn with_places(files: &[&File], places: u8, depth: u16) -> io::Result<Self> {
        const NONE: RawFd = -1;
        let mut ring = IoUring::builder().dontfork().build(u32::from(depth))?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        let mut fds: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
        fds.resize(usize::from(places).max(fds.len()), NONE);
        ring.submitter().register_files(&fds)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        ring.completion().disable_eventfd();
        Ok(FileRing {
            ring,
            slots: (0..depth).map(|_| Slot::default()).collect(),
            free: (0..depth).rev().collect(),
            event,
            is_mixed: false,
        })
    }

    /// A descriptor that has an event after a completion that [`FileRing::watch`] asked for. It is meant for
    /// edge-triggered watching: it may stay readable.
    pub fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Operations queued or in flight.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether no operation can be queued now.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// How many operations can be queued now.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Queues a read from `offset` of a file into `segments` of `memory`.
    pub fn read(
        &mut self,
        token: u64,
        (file, offset): (FileNumber, u64),
        memory: &Arc<GuestMemoryMmap>,
        segments: impl IntoIterator<Item = (GuestAddress, usize)>,
    ) -> Result<(), PushError> {
        self.push_transfer(Kind::Read, token, (file, offset), memory, segments)
    }

    /// Queues a write of `segments` of `memory` to `offset` of the first file. `durable`: it ends only when the bytes are
    /// on stable storage.
    pub fn write(
        &mut self,
        token: u64,
        offset: u64,
        memory: &Arc<GuestMemoryMmap>,
        segments: impl IntoIterator<Item = (GuestAddress, usize)>,
        durable: bool,
    ) -> Result<(), PushError> {
        let kind = Kind::Write { durable };
        self.push_transfer(kind, token, (FileNumber::FIRST, offset), memory, segments)
    }

    /// Queues a sync of the first file's data. It covers what ended before, not what is in flight.
    pub fn sync(&mut self, token: u64) -> Result<(), PushError> {
        self.push_plain(Kind::Sync, token, 0)
    }

    /// Queues [`crate::file::deallocate`] or [`crate::file::zero_range`] on the first file.
    pub fn allocate(
        &mut self,
        token: u64,
        what: Allocation,
        offset: u64,
        len: u64,
    ) -> Result<(), PushError> {
        file_offset(offset)?;
        file_offset(len)?;
        self.push_plain(Kind::Allocate { what, len }, token, offset)
    }

    /// Asks for an event at the next completion, to be called before waiting for one. True: something is there to
    /// reap or to submit already, for which there will be none.
    pub fn watch(&mut self) -> bool {
        if self.in_flight() == 0 {
            return false;
        }
        if !self.ring.submission().is_empty() {
            return true;
        }
        self.ring.completion().enable_eventfd();
        // The kernel adds a completion, then looks whether an event is wanted: here it must be the other way round.
        fence(Ordering::SeqCst);
        !self.ring.completion().is_empty()
    }

    /// Starts all that is queued, in one system call. There will be no events until [`FileRing::watch`]: most
    /// operations are over when this returns, and an event for each would be for nothing.
    pub fn submit(&mut self) -> io::Result<()> {
        self.ring.completion().disable_eventfd();
        while !self.ring.submission().is_empty() {
            retry_interrupted(|| self.ring.submit())?;
        }
        Ok(())
    }

    /// Takes the next finished operation, if there is one. What the kernel did only in part is queued again for the
    /// rest; [`FileRing::submit`] starts it.
    pub fn reap(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.completion().next()?;
            if let Some(completion) = self.finish(entry.user_data(), entry.result()) {
                return Some(completion);
            }
        }
    }

    /// Starts what is queued and waits until at least one operation has ended that [`FileRing::reap`] did not take
    /// yet. With nothing in flight it does nothing.
    pub fn wait(&mut self) -> io::Result<()> {
        if self.in_flight() == 0 {
            return Ok(());
        }
        retry_interrupted(|| self.ring.submit_and_wait(1)).map(drop)
    }

    /// Replaces the files from the first on; the ring has room for as many as it was made for. Call it only with
    /// nothing in flight. After an error nothing can be queued until a later call succeeds: the kernel may have replaced
    /// some of them.
    pub fn set_files(&mut self, files: &[&File]) -> io::Result<()> {
        if self.in_flight() > 0 {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let fds: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
        self.is_mixed = true;
        let replaced = self.ring.submitter().register_files_update(0, &fds)?;
        if replaced < fds.len() {
            return Err(io::Error::other(format!(
                "io_uring took {replaced} of {} files",
                fds.len()
            )));
        }
        self.is_mixed = false;
        Ok(())
    }

    fn push_transfer(
        &mut self,
        kind: Kind,
        token: u64,
        (file, offset): (FileNumber, u64),
        memory: &Arc<GuestMemoryMmap>,
        segments: impl IntoIterator<Item = (GuestAddress, usize)>,
    ) -> Result<(), PushError> {
        file_offset(offset)?;
        let index = self.next_slot()?;
        let slot = slot(&mut self.slots, index)?;
        slot.empty();
        for (addr, len) in segments {
            for slice in memory.get_slices(addr, len) {
                slot.iovecs.push(iovec(&slice?, 0));
            }
        }
        slot.operation = Some(Operation {
            kind,
            file,
            token,
            offset,
            done: 0,
            _memory: Some(memory.clone()),
        });
        self.queue_free_slot(index)
    }

    fn push_plain(&mut self, kind: Kind, token: u64, offset: u64) -> Result<(), PushError> {
        let index = self.next_slot()?;
        slot(&mut self.slots, index)?.operation = Some(Operation {
            kind,
            file: FileNumber::FIRST,
            token,
            offset,
            done: 0,
            _memory: None,
        });
        self.queue_free_slot(index)
    }

    fn next_slot(&self) -> Result<u16, PushError> {
        if self.is_mixed {
            return Err(io::Error::other("the files of the ring could not be replaced").into());
        }
        self.free.last().copied().ok_or(PushError::Full)
    }

    /// Queues the operation in slot `index`, the last of the free ones, which then is free no more.
    fn queue_free_slot(&mut self, index: u16) -> Result<(), PushError> {
        let queued = self.queue(index);
        let slot = slot(&mut self.slots, index)?;
        if queued {
            self.free.pop();
            Ok(())
        } else {
            slot.empty();
            Err(PushError::Full)
        }
    }

    /// Puts slot `index` in the submission queue. There is room: it has as many entries as there are slots.
    fn queue(&mut self, index: u16) -> bool {
        let Some(entry) = self.slots.get(usize::from(index)).and_then(Slot::entry) else {
            return false;
        };
        let entry = entry.user_data(u64::from(index));
        // SAFETY: the entry's pointers lead to the slot's iovecs and to guest memory. The slot keeps both, unmoved
        // and unchanged, until `finish` has seen the completion; dropping the ring waits for that. What guest memory
        // holds is shared with the guest anyhow: nothing here has a reference to it.
        unsafe { self.ring.submission().push(&entry) }.is_ok()
    }

    /// Handles one completion. None: the operation goes on.
    fn finish(&mut self, user_data: u64, result: i32) -> Option<Completion> {
        let index = u16::try_from(user_data).ok()?;
        let slot = self.slots.get_mut(usize::from(index))?;
        let operation = slot.operation.as_mut()?;
        let token = operation.token;
        let result = match u32::try_from(result) {
            Err(_) if result == -libc::EINTR => {
                self.queue(index);
                return None;
            }
            Err(_) => Err(io::Error::from_raw_os_error(result.saturating_neg())),
            Ok(now) => {
                operation.done += u64::from(now);
                operation.offset += u64::from(now);
                let done = operation.done;
                slot.advance(now as usize);
                if now > 0 && slot.first < slot.iovecs.len() {
                    self.queue(index);
                    return None;
                }
                Ok(done)
            }
        };
        // The kernel is done with the slot: now its share of guest memory may go.
        slot.empty();
        self.free.push(index);
        Some(Completion { token, result })
    }
}

impl Drop for FileRing {
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if self.wait().is_err() {
                // The kernel may still use them: never give them back.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            while self.reap().is_some() {}
        }
    }
}

impl Slot {
    /// Forgets the operation, which must not be in the kernel.
    fn empty(&mut self) {
        self.operation = None;
        self.iovecs.clear();
        self.first = 0;
    }

    /// The submission entry for what is left to do.
    fn entry(&self) -> Option<squeue::Entry> {
        let operation = self.operation.as_ref()?;
        let (file, offset) = (operation.file.fixed(), operation.offset);
        let left = self.iovecs.get(self.first..)?;
        // More buffers than one call takes are done in parts.
        let count = left.len().min(libc::UIO_MAXIOV as usize) as u32;
        let entry = match (operation.kind, left) {
            (Kind::Read, [one]) => opcode::Read::new(file, one.iov_base.cast(), length(one))
                .offset(offset)
                .build(),
            (Kind::Read, many) => opcode::Readv::new(file, many.as_ptr(), count)
                .offset(offset)
                .build(),
            (Kind::Write { durable }, [one]) => {
                opcode::Write::new(file, one.iov_base.cast(), length(one))
                    .offset(offset)
                    .rw_flags(write_flags(durable))
                    .build()
            }
            (Kind::Write { durable }, many) => opcode::Writev::new(file, many.as_ptr(), count)
                .offset(offset)
                .rw_flags(write_flags(durable))
                .build(),
            (Kind::Sync, _) => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
            (Kind::Allocate { what, len }, _) => opcode::Fallocate::new(file, len)
                .offset(offset)
                .mode(what.mode())
                .build(),
        };
        Some(entry)
    }

    /// Takes `bytes` off the front of what is left.
    fn advance(&mut self, mut bytes: usize) {
        while let Some(iovec) = self.iovecs.get_mut(self.first) {
            let now = bytes.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(now);
            iovec.iov_len -= now;
            bytes -= now;
            if iovec.iov_len > 0 {
                break;
            }
            self.first += 1;
        }
    }
}

/// A slot by its number, which comes from the list of free ones and is always there.
fn slot(slots: &mut [Slot], index: u16) -> Result<&mut Slot, PushError> {
    slots.get_mut(usize::from(index)).ok_or(PushError::Full)
}

/// A longer buffer is done in parts, as any that the kernel cuts short.
fn length(iovec: &libc::iovec) -> u32 {
    u32::try_from(iovec.iov_len).unwrap_or(!0xfff)
}

fn write_flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

fn retry_interrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests;
