//! userfaultfd(2): page faults of this process, also those that KVM meets, handled by this process or another.
//!
//! Done here by five ioctls: the crate `userfaultfd` generates its bindings by libclang at build time, and Linux's
//! interface has not changed in years.
#![allow(unsafe_code)] // ioctls on addresses of guest memory

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, RawFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

const API: u64 = 0xaa;
const EVENT_PAGEFAULT: u8 = 0x12;
const MODE_MISSING: u64 = 1;

#[repr(C)]
#[derive(Default)]
struct Handshake {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
#[derive(Default)]
struct Zero {
    range: Range,
    mode: u64,
    zeroed: i64,
}

ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, Handshake);
ioctl_iowr_nr!(UFFDIO_REGISTER, 0xaa, 0x00, Register);
ioctl_ior_nr!(UFFDIO_WAKE, 0xaa, 0x02, Range);
ioctl_iowr_nr!(UFFDIO_COPY, 0xaa, 0x03, Copy);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, 0xaa, 0x04, Zero);
ioctl_io_nr!(USERFAULTFD_IOC_NEW, 0xaa, 0x00);

/// A descriptor from which page faults are read.
pub struct Userfault(File);

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A call on pages that somebody else has filled meanwhile has nothing to do.
fn unless_there(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Userfault {
    /// A descriptor for faults in user and in kernel mode: KVM's are of the latter. Needs CAP_SYS_PTRACE, the sysctl
    /// vm.unprivileged_userfaultfd, or the right to open /dev/userfaultfd.
    pub fn new() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes flags only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = match RawFd::try_from(fd) {
            Ok(fd @ 0..) => fd,
            _ => {
                let refused = io::Error::last_os_error();
                let device = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open("/dev/userfaultfd")
                    .map_err(|_| refused)?;
                // SAFETY: the descriptor is open, and the call takes flags only.
                let fd = unsafe {
                    ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags as libc::c_ulong)
                };
                check(fd)?;
                fd
            }
        };
        // SAFETY: the kernel just gave us this descriptor, and nobody else has it.
        let uffd = Userfault(unsafe { File::from_raw_fd(fd) });
        let mut handshake = Handshake {
            api: API,
            ..Default::default()
        };
        // SAFETY: the kernel reads and writes one `uffdio_api`, which `handshake` is.
        check(unsafe { ioctl_with_mut_ref(&uffd.0, UFFDIO_API(), &mut handshake) })?;
        Ok(uffd)
    }

    /// Lets faults on missing pages of a mapping come here.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut register = Register {
            range: Range { start, len },
            mode: MODE_MISSING,
            ..Default::default()
        };
        // SAFETY: the kernel reads and writes one `uffdio_register`. It changes how faults on the range are handled,
        // not what it holds.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_REGISTER(), &mut register) })
    }

    /// Waits for the next fault, and returns its address; none once `stop` is readable.
    pub fn next(&mut self, stop: &EventFd) -> io::Result<Option<u64>> {
        loop {
            let mut ready = [
                PollFd::new(&self.0, PollFlags::IN),
                PollFd::from_borrowed_fd(borrow(stop), PollFlags::IN),
            ];
            match poll(&mut ready, None) {
                Ok(_) if !ready[1].revents().is_empty() => return Ok(None),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let mut message = [0; 32];
            match self.0.read(&mut message) {
                Ok(32) if message[0] == EVENT_PAGEFAULT => {
                    let [.., a, b, c, d, e, f, g, h, _, _, _, _, _, _, _, _] = message;
                    let address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                    return Ok(Some(address));
                }
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error)
                    if [io::ErrorKind::Interrupted, io::ErrorKind::WouldBlock]
                        .contains(&error.kind()) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Fills missing pages at `start` with `bytes` and wakes who waits for them. False: they were there.
    ///
    /// # Safety
    /// `start..start + bytes.len()` lies in a mapping that was registered here and is there still.
    pub unsafe fn copy(&self, start: u64, bytes: &[u8]) -> io::Result<bool> {
        let mut copy = Copy {
            dst: start,
            src: bytes.as_ptr() as u64,
            len: bytes.len() as u64,
            ..Default::default()
        };
        // SAFETY: the source is `bytes`, the destination the caller's.
        unless_there(check(unsafe {
            ioctl_with_mut_ref(&self.0, UFFDIO_COPY(), &mut copy)
        }))
    }

    /// As [`Userfault::copy`], with zeroes.
    ///
    /// # Safety
    /// As for [`Userfault::copy`].
    pub unsafe fn zero(&self, start: u64, len: u64) -> io::Result<bool> {
        let mut zero = Zero {
            range: Range { start, len },
            ..Default::default()
        };
        // SAFETY: the destination is the caller's.
        unless_there(check(unsafe {
            ioctl_with_mut_ref(&self.0, UFFDIO_ZEROPAGE(), &mut zero)
        }))
    }

    /// Wakes who waits for pages that are there.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let range = Range { start, len };
        // SAFETY: the kernel reads one `uffdio_range`, and changes no memory.
        check(unsafe { ioctl_with_ref(&self.0, UFFDIO_WAKE(), &range) })
    }
}

impl AsRawFd for Userfault {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
