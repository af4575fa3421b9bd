//! Descriptors that a process was started with.
#![allow(unsafe_code)] // fcntl by number

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// A second descriptor for what `number` stands for, closed on exec. The first stays: who knows who else uses it.
pub fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    const FIRST_AFTER_STREAMS: RawFd = 3;
    // SAFETY: F_DUPFD_CLOEXEC takes any number and touches no memory.
    let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, FIRST_AFTER_STREAMS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What `number` stands for, under another number that is closed on exec. The first is closed: nobody else may use it.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    let fd = duplicate(number)?;
    // SAFETY: the caller says that it is nobody's. It touches no memory.
    unsafe { libc::close(number) };
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_is_open_can_be_had_twice() {
        let file = File::open("/proc/self/stat").unwrap();
        let mut second = File::from(duplicate(file.as_raw_fd()).unwrap());
        drop(file);
        let mut text = String::new();
        second.read_to_string(&mut text).unwrap();
        assert!(!text.is_empty());
    }

    #[test]
    fn what_is_taken_is_open_once() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let taken = take(writer.into_raw_fd()).unwrap();
        drop(taken);
        // It does not end as long as the other side is open.
        let mut text = String::new();
        assert_eq!(reader.read_to_string(&mut text).unwrap(), 0);
    }

    #[test]
    fn what_is_not_open_is_refused() {
        for number in [-1, i32::MAX] {
            take(number).unwrap_err();
            let error = duplicate(number).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EBADF), "{number}");
        }
    }
}
