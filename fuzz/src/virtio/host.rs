//! What is behind a device: nothing that lasts.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use arbitrary::{Result, Unstructured};
use lepton_devices::rate_limiter::RateLimiterConfig;
use lepton_devices::virtio::device::VirtioDevice;
use lepton_devices::virtio::net::{Backend, Net, NetConfig};
use lepton_devices::virtio::transport::mmio::SharedDevice;
use lepton_devices::virtio::vsock::{Cid, HOST_CID, Vsock, VsockConfig};
use lepton_hostio::tap::{Offloads, VNET_HEADER_LEN};
use tempfile::TempDir;
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::EventFd;

use super::drive::{Drive, Form, SECTORS};
use crate::scratch;

/// A guest's context ID.
pub const GUEST_CID: u64 = 3;
/// Where a program of the host listens.
pub const SERVER_PORT: u32 = 52;
const MAX_STREAMS: usize = 8;
/// Largest queue of a device.
pub const QUEUE_SIZE: u16 = 256;

/// Which device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Block(Form),
    Net,
    Vsock,
}

/// Frames, both ways.
#[derive(Default)]
pub struct Wire {
    pub to_guest: VecDeque<Vec<u8>>,
    pub from_guest: Vec<Vec<u8>>,
}

/// The host's side.
pub enum Host {
    Block(Drive),
    Net(Arc<Mutex<Wire>>),
    Vsock(Sockets),
}

/// Programs of the host that talk to the guest.
pub struct Sockets {
    pub path: PathBuf,
    pub server: UnixListener,
    streams: Vec<UnixStream>,
    _folder: TempDir,
}

/// A network in this process.
struct Tap {
    wire: Arc<Mutex<Wire>>,
    event: EventFd,
}

fn lock(wire: &Mutex<Wire>) -> std::sync::MutexGuard<'_, Wire> {
    wire.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Backend for Tap {
    fn read_frame(&mut self, guest: &[VolatileSlice<'_>], rest: &mut [u8]) -> io::Result<usize> {
        let frame = lock(&self.wire).to_guest.pop_front();
        let frame = frame.ok_or(io::ErrorKind::WouldBlock)?;
        let mut left = frame.as_slice();
        for slice in guest {
            let (now, later) = left.split_at(left.len().min(slice.len()));
            slice.copy_from(now);
            left = later;
        }
        let fits = left.len().min(rest.len());
        rest[..fits].copy_from_slice(&left[..fits]);
        Ok(frame.len() - (left.len() - fits))
    }

    fn write_frame(
        &mut self,
        header: &[u8; VNET_HEADER_LEN],
        guest: &[VolatileSlice<'_>],
    ) -> io::Result<()> {
        let mut frame = header.to_vec();
        for slice in guest {
            let start = frame.len();
            frame.resize(start + slice.len(), 0);
            slice.copy_to(&mut frame[start..]);
        }
        let mut wire = lock(&self.wire);
        wire.from_guest.push(frame);
        if wire.from_guest.len() > 64 {
            wire.from_guest.remove(0);
        }
        Ok(())
    }

    fn supported_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn set_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl Host {
    /// A device and what is behind it.
    pub fn make(kind: Kind) -> (SharedDevice, Self) {
        match kind {
            Kind::Block(form) => {
                let (device, drive) = Drive::make(form);
                (device, Host::Block(drive))
            }
            Kind::Net => {
                let wire = Arc::<Mutex<Wire>>::default();
                let tap = Tap {
                    wire: wire.clone(),
                    event: EventFd::new(0).expect("an eventfd"),
                };
                let net = Net::new(NetConfig {
                    tap,
                    mac: None,
                    mtu: None,
                    queue_size: QUEUE_SIZE,
                    rx_rate_limiter: RateLimiterConfig::default(),
                    tx_rate_limiter: RateLimiterConfig::default(),
                });
                (share(net.expect("an interface")), Host::Net(wire))
            }
            Kind::Vsock => {
                let (device, sockets) = vsock();
                (share(device), Host::Vsock(sockets))
            }
        }
    }

    /// A header that such a device understands, mostly.
    pub fn header(&self, kind: Kind, input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
        let mut header = Vec::new();
        match kind {
            Kind::Block(_) => {
                // Type, reserved, sector (VIRTIO 1.3, 5.2.6).
                let types = [0, 1, 4, 8, 11, 13, input.arbitrary::<u8>()?];
                header.extend(u32::from(*input.choose(&types)?).to_le_bytes());
                header.extend(input.arbitrary::<u32>()?.to_le_bytes());
                let sector = match input.arbitrary::<bool>()? {
                    true => input.int_in_range(0..=SECTORS + 2)?,
                    false => input.arbitrary()?,
                };
                header.extend(sector.to_le_bytes());
            }
            Kind::Net => header.extend(input.arbitrary::<[u8; VNET_HEADER_LEN]>()?),
            Kind::Vsock => {
                // VIRTIO 1.3, 5.10.6.
                let ports = [
                    1,
                    2,
                    SERVER_PORT,
                    1 << 30,
                    (1 << 30) + 1,
                    input.arbitrary()?,
                ];
                header.extend(GUEST_CID.to_le_bytes());
                let others = [HOST_CID, HOST_CID, HOST_CID, input.arbitrary()?];
                header.extend(input.choose(&others)?.to_le_bytes());
                for _ in 0..2 {
                    header.extend(input.choose(&ports)?.to_le_bytes());
                }
                let len = match input.arbitrary::<bool>()? {
                    true => 0,
                    false => u32::from(input.arbitrary::<u16>()?),
                };
                header.extend(len.to_le_bytes());
                let kinds = [1u16, 1, 1, input.arbitrary()?];
                header.extend(input.choose(&kinds)?.to_le_bytes());
                header.extend(input.int_in_range(0..=8u16)?.to_le_bytes());
                header.extend(input.arbitrary::<u32>()?.to_le_bytes());
                let credits = [0u32, 4096, 1 << 18, input.arbitrary()?];
                header.extend(input.choose(&credits)?.to_le_bytes());
                let forwarded = [0u32, 0, 0, input.arbitrary()?];
                header.extend(input.choose(&forwarded)?.to_le_bytes());
            }
        }
        Ok(header)
    }

    /// Something happens.
    pub fn act(&mut self, what: u8, bytes: &[u8]) {
        match self {
            Host::Block(drive) => drive.act(what),
            Host::Net(wire) => {
                let mut frame = vec![0; VNET_HEADER_LEN];
                frame.extend(bytes);
                // Rather short bytes stand for long frames.
                frame.resize(frame.len() + usize::from(what) * 250, what);
                frame.truncate(65_562);
                let mut wire = lock(wire);
                if wire.to_guest.len() < 32 {
                    wire.to_guest.push_back(frame);
                }
            }
            Host::Vsock(sockets) => sockets.act(what, bytes),
        }
    }
}

fn share(device: impl VirtioDevice + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

/// A socket device.
pub fn vsock() -> (Vsock, Sockets) {
    let folder = scratch::folder();
    let path = folder.path().join("v");
    let listener = UnixListener::bind(&path).expect("a socket");
    let server = folder.path().join(format!("v_{SERVER_PORT}"));
    let server = UnixListener::bind(server).expect("a socket");
    server.set_nonblocking(true).expect("a flag");
    let device = Vsock::new(VsockConfig {
        guest_cid: Cid::try_from(GUEST_CID).expect("a CID"),
        listener,
        uds_path: path.clone(),
        queue_size: QUEUE_SIZE,
    });
    let sockets = Sockets {
        path,
        server,
        streams: Vec::new(),
        _folder: folder,
    };
    (device.expect("a socket device"), sockets)
}

impl Sockets {
    fn act(&mut self, what: u8, bytes: &[u8]) {
        let chosen = usize::from(what >> 3);
        let count = self.streams.len().max(1);
        let has_room = self.streams.len() < MAX_STREAMS;
        let stream = self.streams.get_mut(chosen % count);
        // The other side may be gone at any time, and a full socket is as good as any.
        match (what & 7, stream) {
            (0 | 1, _) if has_room => {
                let stream = match what & 1 {
                    0 => UnixStream::connect(&self.path).ok(),
                    _ => self.server.accept().ok().map(|(stream, _)| stream),
                };
                if let Some(mut stream) = stream {
                    stream.set_nonblocking(true).expect("a flag");
                    let _ = stream.write(bytes);
                    self.streams.push(stream);
                }
            }
            (2 | 3, Some(stream)) => drop(stream.write(bytes)),
            (4, Some(stream)) => drop(stream.write(b"CONNECT 52\n")),
            (5, Some(stream)) => drop(stream.read(&mut [0; 4096])),
            (6, Some(stream)) => {
                let _ = stream.shutdown(std::net::Shutdown::Write);
            }
            (7, Some(_)) => drop(self.streams.swap_remove(chosen % count)),
            _ => {}
        }
    }
}
