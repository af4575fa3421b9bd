//! Byte streams (sockets) between the host and guest memory.
// readv and sendmsg on guest memory have no safe interface.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::file::iovec;

/// Buffers per system call: far under IOV_MAX (1024), and an array on the stack that is cheap to fill.
const BATCH: usize = 64;

/// Reads from `socket` into the first of `slices`, up to 64 of them, with one system call. 0 bytes: the stream ended.
pub fn read_vectored<B: BitmapSlice>(
    socket: impl AsFd,
    slices: &[VolatileSlice<B>],
) -> io::Result<usize> {
    let fd = socket.as_fd();
    let done = with_iovecs(slices, |iovecs| {
        // SAFETY: each iovec is a live VolatileSlice's memory, which may be written. Guest memory is shared with the
        // guest, so no Rust reference to it exists that this write could break.
        unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) }
    })?;
    let mut left = done;
    for slice in slices {
        let now = left.min(slice.len());
        slice.bitmap().mark_dirty(0, now);
        left -= now;
    }
    Ok(done)
}

/// Writes `slices` to `socket` until it takes no more, without waiting and without SIGPIPE. An error is returned only
/// if nothing was written: the next call meets it again.
pub fn send_vectored<B: BitmapSlice>(
    socket: impl AsFd,
    slices: &[VolatileSlice<B>],
) -> io::Result<usize> {
    let fd = socket.as_fd();
    let mut total = 0;
    for batch in slices.chunks(BATCH) {
        let sent = with_iovecs(batch, |iovecs| {
            // SAFETY: a msghdr is plain data, in which null pointers and zero lengths mean nothing.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = iovecs.as_ptr().cast_mut();
            // The field's type is each C library's own; a batch is short.
            message.msg_iovlen = (iovecs.len() as u8).into();
            // SAFETY: `message` and its iovecs live through the call. Each iovec is a live VolatileSlice's memory, which
            // the kernel only reads; it copes with a guest that changes the bytes meanwhile.
            unsafe {
                libc::sendmsg(
                    fd.as_raw_fd(),
                    &message,
                    libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
                )
            }
        });
        match sent {
            Ok(sent) => {
                total += sent;
                if sent < batch.iter().map(VolatileSlice::len).sum() {
                    break;
                }
            }
            Err(_) if total > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(total)
}

/// Calls `call` with iovecs over the first of `slices`, again if a signal interrupts it.
fn with_iovecs<B: BitmapSlice>(
    slices: &[VolatileSlice<B>],
    call: impl Fn(&[libc::iovec]) -> libc::ssize_t,
) -> io::Result<usize> {
    let mut iovecs = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; BATCH];
    for (to, slice) in iovecs.iter_mut().zip(slices) {
        *to = iovec(slice, 0);
    }
    let iovecs = iovecs.get(..slices.len().min(BATCH)).unwrap_or(&iovecs);
    loop {
        match usize::try_from(call(iovecs)) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn slices<'a>(buffers: &'a mut [Vec<u8>]) -> Vec<VolatileSlice<'a>> {
        buffers
            .iter_mut()
            .map(|b| VolatileSlice::from(b.as_mut_slice()))
            .collect()
    }

    #[test]
    fn scatters_and_gathers_past_one_batch() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut parts: Vec<Vec<u8>> = (0..150u8).map(|i| vec![i; 3]).collect();
        assert_eq!(send_vectored(&b, &slices(&mut parts)).unwrap(), 450);
        let mut got = [0; 450];
        a.read_exact(&mut got).unwrap();
        assert_eq!(got.as_slice(), parts.concat());

        a.write_all(&got).unwrap();
        let mut room: Vec<Vec<u8>> = vec![vec![0; 3]; 150];
        assert_eq!(read_vectored(&b, &slices(&mut room)).unwrap(), 3 * BATCH);
        assert_eq!(room.concat()[..192], got[..192]);
    }

    #[test]
    fn ends_and_full_sockets_are_told() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut parts = vec![vec![7; 1 << 20]];
        let sent = send_vectored(&b, &slices(&mut parts)).unwrap();
        assert!(0 < sent && sent < 1 << 20);
        let error = send_vectored(&b, &slices(&mut parts)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(a);
        let error = send_vectored(&b, &slices(&mut parts)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        let (a, b) = UnixStream::pair().unwrap();
        drop(a);
        assert_eq!(read_vectored(&b, &slices(&mut parts)).unwrap(), 0);
    }
}
