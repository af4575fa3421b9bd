//! The kernel's random numbers: a copy of a guest would otherwise draw the same ones.
#![allow(unsafe_code)] // the random device's requests have no safe form: random(4)

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `struct rand_pool_info` of <linux/random.h>.
#[repr(C)]
pub struct PoolInfo {
    /// Bits of entropy.
    entropy_count: i32,
    /// Bytes.
    buf_size: i32,
    buf: [u8; 64],
}

// The size in the number is that of the first two fields: RNDADDENTROPY of <linux/random.h>.
nix::ioctl_write_ptr_bad!(
    add_entropy,
    nix::request_code_write!(b'R', 0x03, 2 * size_of::<i32>()),
    PoolInfo
);
nix::ioctl_none_bad!(reseed_generator, nix::request_code_none!(b'R', 0x07));

/// Mixes `seed` in, and has the generator begin anew: whatever is drawn from now on depends on it.
pub fn reseed(seed: &[u8; 64]) -> io::Result<()> {
    let random = File::options().write(true).open("/dev/urandom")?;
    let info = PoolInfo {
        entropy_count: 8 * 64,
        buf_size: 64,
        buf: *seed,
    };
    // SAFETY: the descriptor is open, and the request reads `buf_size` bytes of `buf`, which has as many.
    unsafe { add_entropy(random.as_raw_fd(), &raw const info) }?;
    // SAFETY: the descriptor is open; the request touches no memory of ours.
    unsafe { reseed_generator(random.as_raw_fd()) }?;
    Ok(())
}
