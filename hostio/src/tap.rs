//! Tap interfaces: frames to and from the host's network, with a virtio header in front of each.
#![allow(unsafe_code)] // ioctl, readv and writev have no safe wrapper that takes guest memory.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{MaybeUninit, size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::inherited;
use vm_memory::VolatileSlice;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

// Linux, include/uapi/linux/if_tun.h. The libc crate has them in another type for each C library.
const TUN: libc::c_uint = b'T' as libc::c_uint;
ioctl_iow_nr!(TUNSETIFF, TUN, 202, libc::c_int);
ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, libc::c_uint);
ioctl_ior_nr!(TUNGETIFF, TUN, 210, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, libc::c_int);

/// Bytes of the virtio header in front of every frame: `struct virtio_net_hdr` with `num_buffers` (VIRTIO 1.3, 5.1.6).
pub const VNET_HEADER_LEN: usize = 12;

/// Most pieces of memory one read or write takes, the kernel's UIO_MAXIOV.
const MAX_IOVECS: usize = 1024;
/// Most guest memory slices of one frame; the header or the rest takes one piece more.
pub const MAX_SLICES: usize = MAX_IOVECS - 1;

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name cannot be an interface's.
    #[error("interface name {name:?}: {reason}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The host offers no taps to this process.
    #[error("cannot open /dev/net/tun: {0}")]
    OpenTun(#[source] io::Error),
    /// Somebody has it open.
    #[error("tap {name} is in use by another process")]
    Busy {
        /// The interface.
        name: String,
    },
    /// It does not exist and this process may not make it, or it belongs to somebody else.
    #[error(
        "tap {name} is missing or belongs to another user; make it with: \
         sudo ip tuntap add dev {name} mode tap user $(id -un) && sudo ip link set {name} up"
    )]
    Denied {
        /// The interface.
        name: String,
    },
    /// An interface of that name is something else.
    #[error("interface {name} is not a tap with one queue")]
    NotATap {
        /// The interface.
        name: String,
    },
    /// The kernel refused for another reason.
    #[error("tap {name}: {what}: {source}")]
    Refused {
        /// The interface.
        name: String,
        /// The call that failed.
        what: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// Work that the reader of a tap is willing to find undone in frames it reads: the host then hands over large frames
/// without checksums instead of segmenting and summing them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums may be missing. All others need this.
    pub csum: bool,
    /// TCP over IPv4 may come unsegmented.
    pub tso4: bool,
    /// TCP over IPv6 may come unsegmented.
    pub tso6: bool,
    /// Unsegmented TCP may carry congestion marks.
    pub ecn: bool,
    /// UDP may come unfragmented.
    pub ufo: bool,
}

impl Offloads {
    /// Everything there is.
    pub const ALL: Offloads = Offloads {
        csum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        ufo: true,
    };

    /// Whether frames larger than the interface's MTU may come.
    pub fn has_large_frames(self) -> bool {
        self.tso4 || self.tso6 || self.ufo
    }

    fn flags(self) -> libc::c_uint {
        let mut flags = 0;
        for (on, flag) in [
            (self.csum, libc::TUN_F_CSUM),
            (self.tso4, libc::TUN_F_TSO4),
            (self.tso6, libc::TUN_F_TSO6),
            (self.ecn, libc::TUN_F_TSO_ECN),
            (self.ufo, libc::TUN_F_UFO),
        ] {
            if on {
                flags |= flag;
            }
        }
        flags
    }
}

/// An open tap with one queue, never blocking, with a [`VNET_HEADER_LEN`] byte header in front of each frame.
///
/// An interface made by opening it goes away with it; one made beforehand stays.
#[derive(Debug)]
pub struct Tap {
    file: Arc<File>,
    name: String,
    supported: Offloads,
}

/// Taps that this process was started with, see [`Tap::hand_in`].
static HANDED: Mutex<Vec<(String, Arc<File>)>> = Mutex::new(Vec::new());

impl Tap {
    /// Lets [`Tap::open`] use an inherited descriptor for the tap that it is of, as often as it is asked to: who was
    /// started without the right to open taps, or in another network, has nothing else.
    pub fn hand_in(number: RawFd) -> Result<(), TapError> {
        let fd = inherited::duplicate(number).map_err(|source| TapError::Refused {
            name: format!("descriptor {number}"),
            what: "dup",
            source,
        })?;
        let tap = Self::from_fd(fd)?;
        let mut handed = HANDED.lock().unwrap_or_else(PoisonError::into_inner);
        handed.push((tap.name, tap.file));
        Ok(())
    }

    /// Opens the tap `name`, or makes it if there is none and the process may (CAP_NET_ADMIN).
    pub fn open(name: &str) -> Result<Self, TapError> {
        check_name(name)?;
        let handed = HANDED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, file)) = handed.iter().find(|(found, _)| found == name) {
            return Self::prepare(file.clone(), name.to_owned());
        }
        drop(handed);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(TapError::OpenTun)?;
        let mut request = request(name);
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the descriptor is open and TUNSETIFF reads and writes one ifreq, which `request` is.
        if unsafe { ioctl_with_mut_ref(&file, TUNSETIFF(), &mut request) } < 0 {
            return Err(attach_error(name, io::Error::last_os_error()));
        }
        Self::prepare(Arc::new(file), name.to_owned())
    }

    /// Takes a tap that somebody else opened and attached, with a virtio header and without packet information.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        let unnamed = format!("descriptor {}", file.as_raw_fd());
        let mut request = request("");
        // SAFETY: the descriptor is open and TUNGETIFF writes one ifreq, which `request` is.
        if unsafe { ioctl_with_mut_ref(&file, TUNGETIFF(), &mut request) } < 0 {
            return Err(TapError::NotATap { name: unnamed });
        }
        let name: String = request
            .ifr_name
            .iter()
            .take_while(|c| **c != 0)
            .map(|c| char::from(*c as u8))
            .collect();
        // SAFETY: TUNGETIFF filled in the flags, and every bit pattern is a valid one.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & wanted != wanted {
            return Err(TapError::NotATap { name });
        }
        // SAFETY: F_GETFL and F_SETFL take an open descriptor and integers.
        let set = unsafe {
            let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        if set < 0 {
            return Err(refused(&name, "O_NONBLOCK"));
        }
        Self::prepare(Arc::new(file), name)
    }

    fn prepare(file: Arc<File>, name: String) -> Result<Self, TapError> {
        let len = VNET_HEADER_LEN as libc::c_int;
        // SAFETY: the descriptor is open and TUNSETVNETHDRSZ reads one int.
        if unsafe { ioctl_with_ref(&file, TUNSETVNETHDRSZ(), &len) } < 0 {
            return Err(refused(&name, "TUNSETVNETHDRSZ"));
        }
        let mut tap = Tap {
            file,
            name,
            supported: Offloads::default(),
        };
        tap.supported = tap.probe();
        // An interface made beforehand may have been left with another reader's offloads.
        tap.set_offloads(Offloads::default())
            .map_err(|source| TapError::Refused {
                name: tap.name.clone(),
                what: "TUNSETOFFLOAD",
                source,
            })?;
        Ok(tap)
    }

    /// The most this kernel does: some lack UFO, and all have lacked the rest at some time.
    fn probe(&mut self) -> Offloads {
        let without_ufo = Offloads {
            ufo: false,
            ..Offloads::ALL
        };
        let only_csum = Offloads {
            csum: true,
            ..Offloads::default()
        };
        [Offloads::ALL, without_ufo, only_csum]
            .into_iter()
            .find(|&offloads| self.set_offloads(offloads).is_ok())
            .unwrap_or_default()
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What [`Tap::set_offloads`] accepts at most.
    pub fn supported_offloads(&self) -> Offloads {
        self.supported
    }

    /// Says what may be left undone in frames that are read from now on. Frames that wait already are as they are.
    pub fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let flags = libc::c_ulong::from(offloads.flags());
        // SAFETY: the descriptor is open and TUNSETOFFLOAD takes an integer.
        if unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD(), flags) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Reads one frame and its header into `guest` and, past its end, into `rest`; what does not fit there either is
    /// lost. Returns the bytes read. `WouldBlock`: there is no frame.
    ///
    /// At most [`MAX_SLICES`] slices are used.
    pub fn read_frame(
        &mut self,
        guest: &[VolatileSlice<'_>],
        rest: &mut [u8],
    ) -> io::Result<usize> {
        let mut iovecs = Iovecs::new();
        iovecs.extend(guest);
        if !rest.is_empty() {
            iovecs.push(rest.as_mut_ptr(), rest.len());
        }
        let (pointer, count) = iovecs.raw();
        // SAFETY: each of the `count` entries describes memory that `guest` and `rest` hold borrowed for writing
        // during the call. Guest memory may change at any time, and nothing here relies on its content.
        let read = unsafe { libc::syscall(libc::SYS_readv, self.file.as_raw_fd(), pointer, count) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// Writes one frame: `header`, then the bytes of `guest`. Never blocks: `WouldBlock` is a full host queue.
    ///
    /// At most [`MAX_SLICES`] slices are possible: more are refused as invalid input.
    pub fn write_frame(
        &mut self,
        header: &[u8; VNET_HEADER_LEN],
        guest: &[VolatileSlice<'_>],
    ) -> io::Result<()> {
        if guest.len() > MAX_SLICES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut iovecs = Iovecs::new();
        iovecs.push(header.as_ptr().cast_mut(), header.len());
        iovecs.extend(guest);
        let (pointer, count) = iovecs.raw();
        // SAFETY: each of the `count` entries describes memory that `header` and `guest` hold borrowed during the
        // call, and writev only reads it.
        let written =
            unsafe { libc::syscall(libc::SYS_writev, self.file.as_raw_fd(), pointer, count) };
        if written < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

// The calls are made without the C library's functions for them, which are points of cancellation: of a process with
// threads each call changes the thread's state before and after, which is 4 % of what sending a small frame takes.

/// An array for readv and writev on the stack, of which only the part in use is ever written.
struct Iovecs {
    entries: [MaybeUninit<libc::iovec>; MAX_IOVECS],
    len: usize,
}

impl Iovecs {
    fn new() -> Self {
        Iovecs {
            entries: [const { MaybeUninit::uninit() }; MAX_IOVECS],
            len: 0,
        }
    }

    /// Adds an entry, unless the array is full.
    fn push(&mut self, base: *mut u8, len: usize) {
        if let Some(entry) = self.entries.get_mut(self.len) {
            entry.write(libc::iovec {
                iov_base: base.cast(),
                iov_len: len,
            });
            self.len += 1;
        }
    }

    /// Adds up to [`MAX_SLICES`] of `slices`.
    fn extend(&mut self, slices: &[VolatileSlice<'_>]) {
        for slice in slices.iter().take(MAX_SLICES) {
            self.push(slice.ptr_guard_mut().as_ptr(), slice.len());
        }
    }

    /// For the calls: the first entry, all up to the count being written. The count is as wide as a register, which the
    /// kernel looks at whole.
    fn raw(&self) -> (*const libc::iovec, libc::c_ulong) {
        (self.entries.as_ptr().cast(), self.len as libc::c_ulong)
    }
}

/// An ifreq for `name`, which is shorter than IFNAMSIZ.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data, for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    const { assert!(size_of::<libc::c_char>() == 1) };
    // The last byte stays 0.
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .zip(name.bytes().take(libc::IFNAMSIZ - 1))
    {
        *to = from as libc::c_char;
    }
    request
}

/// The kernel's rules (dev_valid_name) and one more: it would replace a `%d` by a number of its choice.
fn check_name(name: &str) -> Result<(), TapError> {
    let reason = if name.is_empty() {
        "is empty"
    } else if name.len() >= libc::IFNAMSIZ {
        "is longer than 15 bytes"
    } else if name == "." || name == ".." {
        "is reserved"
    } else if name
        .bytes()
        .any(|b| matches!(b, b'/' | b':' | b'%' | 0) || b.is_ascii_whitespace() || b == 0x0b)
    {
        "has a character that is not allowed ('/', ':', '%', NUL, white space)"
    } else {
        return Ok(());
    };
    Err(TapError::Name {
        name: name.to_owned(),
        reason,
    })
}

fn attach_error(name: &str, error: io::Error) -> TapError {
    let name = name.to_owned();
    match error.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy { name },
        Some(libc::EPERM | libc::EACCES) => TapError::Denied { name },
        Some(libc::EINVAL) => TapError::NotATap { name },
        _ => TapError::Refused {
            name,
            what: "TUNSETIFF",
            source: error,
        },
    }
}

fn refused(name: &str, what: &'static str) -> TapError {
    TapError::Refused {
        name: name.to_owned(),
        what,
        source: io::Error::last_os_error(),
    }
}

#[cfg(test)]
mod tests;
