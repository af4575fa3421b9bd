//! Where frames come from and go to.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use lepton_hostio::tap::{Offloads, Tap, VNET_HEADER_LEN};
use vm_memory::VolatileSlice;

/// A network as the device sees it. Nothing blocks.
pub trait Backend: Send {
    /// Reads one frame with its virtio header into `guest` and, past its end, into `rest`. Returns the bytes of both.
    /// `WouldBlock`: there is no frame, and [`Backend::event_fd`] becomes readable with the next.
    fn read_frame(&mut self, guest: &[VolatileSlice<'_>], rest: &mut [u8]) -> io::Result<usize>;

    /// Writes one frame: its virtio header, then what is in `guest`, at most
    /// [`MAX_SLICES`](lepton_hostio::tap::MAX_SLICES) slices. After an error the frame is gone.
    fn write_frame(
        &mut self,
        header: &[u8; VNET_HEADER_LEN],
        guest: &[VolatileSlice<'_>],
    ) -> io::Result<()>;

    /// The most that [`Backend::set_offloads`] takes.
    fn supported_offloads(&self) -> Offloads;

    /// Says what may be left undone in frames to be read.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// A descriptor that becomes readable when there are frames.
    fn event_fd(&self) -> RawFd;
}

impl Backend for Tap {
    fn read_frame(&mut self, guest: &[VolatileSlice<'_>], rest: &mut [u8]) -> io::Result<usize> {
        Tap::read_frame(self, guest, rest)
    }

    fn write_frame(
        &mut self,
        header: &[u8; VNET_HEADER_LEN],
        guest: &[VolatileSlice<'_>],
    ) -> io::Result<()> {
        Tap::write_frame(self, header, guest)
    }

    fn supported_offloads(&self) -> Offloads {
        Tap::supported_offloads(self)
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        Tap::set_offloads(self, offloads)
    }

    fn event_fd(&self) -> RawFd {
        self.as_raw_fd()
    }
}
