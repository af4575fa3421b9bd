//! Disk images: opening them, and positioned I/O between them and guest memory.
// Positioned vectored I/O on guest memory and fallocate(2) have no safe interface.
#![allow(unsafe_code)]

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr};

ioctl_ior_nr!(BLKGETSIZE64, 0x12, 114, usize);
ioctl_io_nr!(BLKSSZGET, 0x12, 104);

/// Bytes in a sector, the unit of a disk's size and of a request's place on it (VIRTIO 1.3, 5.2.4).
pub const SECTOR_SIZE: u64 = 512;

/// Buffers per system call: far under IOV_MAX (1024), and an array on the stack that is cheap to fill.
const BATCH: usize = 64;

/// Zeroes to write where the file system cannot make them itself.
static ZEROES: [u8; 4096] = [0; 4096];

/// Why a disk image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskOpenError {
    /// The host refused to open it.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The path given.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// It is neither a regular file nor a block device.
    #[error("{} is {kind}, not a regular file or a block device", path.display())]
    FileType {
        /// The path given.
        path: PathBuf,
        /// What it is instead, with its article.
        kind: &'static str,
    },
    /// It has no room for one sector.
    #[error("{} has {bytes} bytes, less than one sector of 512", path.display())]
    TooSmall {
        /// The path given.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Its size or block size could not be found out.
    #[error("cannot find out the size of {}: {source}", path.display())]
    Size {
        /// The path given.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
}

/// An open disk image: a regular file or a block device, with at least one sector.
///
/// A read-only one is opened read-only on the host, so that no bug here can let a guest write it.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    read_only: bool,
    sectors: u64,
    block_size: u32,
    can_deallocate: bool,
    serial: [u8; 20],
}

impl Disk {
    /// The file. All its I/O is positioned: the file's own position means nothing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was opened read-only.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Its size in whole sectors of 512 bytes, at least 1. Bytes behind the last whole sector are not served.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Smallest unit in bytes that the host reads and writes: 512 for a file, a block device's logical block size.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether the host can free part of it ([`deallocate`]).
    pub fn can_deallocate(&self) -> bool {
        self.can_deallocate
    }

    /// A serial number made of the file's device and inode numbers, cut to 20 bytes and padded with zeroes, as
    /// kvmtool and Firecracker make it.
    pub fn serial(&self) -> [u8; 20] {
        self.serial
    }
}

/// Opens the disk image at `path`. It never waits, whatever the path names.
pub fn open_disk(path: &Path, read_only: bool) -> Result<Disk, DiskOpenError> {
    let open_error = |source| DiskOpenError::Open {
        path: path.to_owned(),
        source,
    };
    // Opening some devices has effects, so look before. What counts is the look after: the path may change its
    // meaning in between.
    check_type(path, &std::fs::metadata(path).map_err(open_error)?)?;
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(open_error)?;
    let metadata = file.metadata().map_err(open_error)?;
    check_type(path, &metadata)?;
    clear_nonblock(&file).map_err(open_error)?;
    disk_of(file, path, read_only)
}

/// The disk image that is open as `file`, which the caller got by other means than its path. `path` is for messages.
pub fn disk_of(file: File, path: &Path, read_only: bool) -> Result<Disk, DiskOpenError> {
    let size_error = |source| DiskOpenError::Size {
        path: path.to_owned(),
        source,
    };
    let metadata = file.metadata().map_err(size_error)?;
    check_type(path, &metadata)?;
    let is_device = metadata.file_type().is_block_device();
    let (bytes, block_size) = if is_device {
        device_size(&file).map_err(size_error)?
    } else {
        (metadata.len(), SECTOR_SIZE as u32)
    };
    if bytes < SECTOR_SIZE {
        return Err(DiskOpenError::TooSmall {
            path: path.to_owned(),
            bytes,
        });
    }
    Ok(Disk {
        // Whether a block device can is only known by trying.
        can_deallocate: !read_only && (is_device || probe_deallocate(&file, bytes)),
        file,
        path: path.to_owned(),
        read_only,
        sectors: bytes / SECTOR_SIZE,
        block_size,
        serial: serial(&metadata),
    })
}

fn check_type(path: &Path, metadata: &Metadata) -> Result<(), DiskOpenError> {
    let file_type = metadata.file_type();
    if file_type.is_file() || file_type.is_block_device() {
        return Ok(());
    }
    let kind = if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a FIFO"
    } else if file_type.is_char_device() {
        "a character device"
    } else if file_type.is_socket() {
        "a socket"
    } else {
        "something unknown"
    };
    Err(DiskOpenError::FileType {
        path: path.to_owned(),
        kind,
    })
}

/// O_NONBLOCK was for the open only: io_uring would fail what it cannot do at once.
fn clear_nonblock(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open; F_GETFL and F_SETFL touch no memory of ours.
    let result = unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        if flags < 0 {
            flags
        } else {
            libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK)
        }
    };
    check(result)
}

fn device_size(file: &File) -> io::Result<(u64, u32)> {
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 to its argument.
    check(unsafe { ioctl_with_mut_ref(file, BLKGETSIZE64(), &mut bytes) })?;
    let mut block_size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int to its argument.
    check(unsafe { ioctl_with_mut_ref(file, BLKSSZGET(), &mut block_size) })?;
    let block_size = u32::try_from(block_size).map_err(io::Error::other)?;
    Ok((bytes, block_size))
}

/// Tries to free a range behind the end of the file, where there is nothing to lose.
fn probe_deallocate(file: &File, size: u64) -> bool {
    size.checked_next_multiple_of(1 << 20)
        .is_some_and(|behind| deallocate(file, behind, 1 << 20).is_ok())
}

fn serial(metadata: &Metadata) -> [u8; 20] {
    let text = format!("{}{}{}", metadata.dev(), metadata.rdev(), metadata.ino());
    let mut serial = [0; 20];
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    serial
}

/// Reads from `file` at byte `offset` into `slices`, until they are full or the file ends, and returns the number of
/// bytes read. An error may come after part was read.
pub fn read_vectored_at<B: BitmapSlice>(
    file: &File,
    slices: &[VolatileSlice<B>],
    offset: u64,
) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    let done = transfer(slices, offset, |iovecs, offset| match iovecs {
        // SAFETY: the pointer and length are a live VolatileSlice's, which may be written. Guest memory is shared
        // with the guest, so no Rust reference to it exists that this write could break.
        [one] => unsafe { libc::pread64(fd, one.iov_base, one.iov_len, offset) },
        // SAFETY: as above, for each of the iovecs.
        many => unsafe { libc::preadv64(fd, many.as_ptr(), many.len() as libc::c_int, offset) },
    })?;
    let mut left = done;
    for slice in slices {
        let now = left.min(slice.len());
        slice.bitmap().mark_dirty(0, now);
        left -= now;
    }
    Ok(done)
}

/// Writes `slices` to `file` at byte `offset`, all of them, and returns the number of bytes written. An error may
/// come after part was written.
pub fn write_vectored_at<B: BitmapSlice>(
    file: &File,
    slices: &[VolatileSlice<B>],
    offset: u64,
) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    transfer(slices, offset, |iovecs, offset| match iovecs {
        // SAFETY: the pointer and length are a live VolatileSlice's; the kernel only reads there, and copes with a
        // guest that changes the bytes meanwhile.
        [one] => unsafe { libc::pwrite64(fd, one.iov_base, one.iov_len, offset) },
        // SAFETY: as above, for each of the iovecs.
        many => unsafe { libc::pwritev64(fd, many.as_ptr(), many.len() as libc::c_int, offset) },
    })
}

/// Frees `len` bytes at `offset`, which read as zeroes from then on; the size stays. EOPNOTSUPP: the host cannot.
pub fn deallocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, Allocation::Deallocate, offset, len)
}

/// Makes `len` bytes at `offset` zeroes that keep their room on disk, without writing them. EOPNOTSUPP: the host
/// cannot; see [`write_zeroes`].
pub fn zero_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, Allocation::ZeroRange, offset, len)
}

/// What [`deallocate`] and [`zero_range`] are to the kernel. Linux serves both on block devices too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// See [`deallocate`].
    Deallocate,
    /// See [`zero_range`].
    ZeroRange,
}

impl Allocation {
    /// The mode of fallocate(2).
    pub(crate) fn mode(self) -> libc::c_int {
        let what = match self {
            Allocation::Deallocate => libc::FALLOC_FL_PUNCH_HOLE,
            Allocation::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
        };
        what | libc::FALLOC_FL_KEEP_SIZE
    }
}

fn fallocate(file: &File, what: Allocation, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (file_offset(offset)?, file_offset(len)?);
    loop {
        // SAFETY: fallocate touches no memory of ours.
        let result = unsafe { libc::fallocate64(file.as_raw_fd(), what.mode(), offset, len) };
        match check(result) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Writes `len` zeroes at `offset`, the way any file can.
pub fn write_zeroes(file: &File, mut offset: u64, len: u64) -> io::Result<()> {
    let mut left = len;
    while left > 0 {
        let mut iovecs = [EMPTY; BATCH];
        let (mut used, mut batch) = (0, 0);
        while let (Some(iovec), true) = (iovecs.get_mut(used), batch < left) {
            let now = (left - batch).min(ZEROES.len() as u64);
            iovec.iov_base = ZEROES.as_ptr().cast_mut().cast();
            iovec.iov_len = now as usize;
            batch += now;
            used += 1;
        }
        let (fd, at) = (file.as_raw_fd(), file_offset(offset)?);
        // SAFETY: the first `used` iovecs lie in a static that the kernel only reads.
        let result = unsafe { libc::pwritev64(fd, iovecs.as_ptr(), used as libc::c_int, at) };
        match transferred(result) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset += written as u64;
                left -= written as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

const EMPTY: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// Calls `call` with iovecs over what is left of `slices` until all is done or it transfers nothing.
fn transfer<B: BitmapSlice>(
    slices: &[VolatileSlice<B>],
    offset: u64,
    call: impl Fn(&[libc::iovec], libc::off64_t) -> libc::ssize_t,
) -> io::Result<usize> {
    let mut done = 0usize;
    let mut rest = slices;
    // Bytes of the first slice of `rest` that are done.
    let mut skip = 0usize;
    while let [first, others @ ..] = rest {
        if skip == first.len() {
            (rest, skip) = (others, 0);
            continue;
        }
        let at = file_offset(offset.saturating_add(done as u64))?;
        let result = if others.is_empty() {
            call(&[iovec(first, skip)], at)
        } else {
            let mut iovecs = [EMPTY; BATCH];
            let count = rest.len().min(BATCH);
            for (iovec_at, (i, slice)) in iovecs.iter_mut().zip(rest.iter().enumerate()) {
                *iovec_at = iovec(slice, if i == 0 { skip } else { 0 });
            }
            call(iovecs.get(..count).unwrap_or(&iovecs), at)
        };
        match transferred(result) {
            Ok(0) => break,
            Ok(now) => {
                done += now;
                skip += now;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        while let [first, others @ ..] = rest
            && skip >= first.len()
        {
            skip -= first.len();
            rest = others;
        }
    }
    Ok(done)
}

/// The bytes of `slice` from `skip` on, which is at most its length.
pub(crate) fn iovec<B: BitmapSlice>(slice: &VolatileSlice<B>, skip: usize) -> libc::iovec {
    let skip = skip.min(slice.len());
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().wrapping_add(skip).cast(),
        iov_len: slice.len() - skip,
    }
}

/// Offsets and lengths of files are signed.
pub(crate) fn file_offset(offset: u64) -> io::Result<libc::off64_t> {
    libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn transferred(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

const _: () = assert!(size_of::<usize>() == 8, "lengths and offsets are 64 bits");

#[cfg(test)]
mod tests;
