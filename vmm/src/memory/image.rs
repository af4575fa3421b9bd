//! Guest memory that was saved: from a memory file, checked or not, or from a process that has it.

use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lepton_api::types::HugePages;
use lepton_devices::Memory;
use lepton_snapshot::CHUNK;
use serde::Serialize;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::base::{self, Base, Sharing};
use super::freeze::with_few;
use super::pager::{PageError, Pager, Source};
use super::userfault::Userfault;
use super::{MemoryError, Origin, Ram};

/// Why saved memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// This process may not handle KVM's page faults, so that memory cannot be checked when it is touched.
    #[error(
        "memory cannot be checked when it is touched: userfaultfd: {0}; run as root, or let this user open \
         /dev/userfaultfd, or load with mem_backend.verify false"
    )]
    Unchecked(#[source] io::Error),
    /// The process that has the memory cannot be given the faults.
    #[error("{}: {source}", path.display())]
    Handler {
        /// Its socket.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// A part of it is not what was saved, or cannot be read.
    #[error(transparent)]
    Page(#[from] PageError),
    /// The host refused.
    #[error("host: {0}")]
    Host(#[from] io::Error),
}

/// Maps the memory file of `source`, whose first bytes are such a memory, over the empty `memory`. Pages are read when they are touched,
/// and copied when they are written; nothing checks them. Who truncates the file kills the machine by SIGBUS.
pub fn map_unverified(source: Source, memory: Arc<Memory>) -> Result<Ram, ImageError> {
    base::map_file(&memory, &source.file, Sharing::Private)?;
    let ram = Ram::new(memory, Origin::File(Mutex::new(source)));
    ram.protect();
    Ok(ram)
}

/// The empty `memory`, filled from `source` and checked when it is touched. `failed` is told of the first chunk
/// that is not what was saved.
pub fn map_verified(
    source: Source,
    memory: Arc<Memory>,
    failed: impl FnOnce(PageError) + Send + 'static,
) -> Result<Ram, ImageError> {
    let own = Source {
        file: source.file.try_clone()?,
        manifest: source.manifest.try_clone()?,
    };
    let pager = Pager::new(memory.clone(), source).map_err(ImageError::Unchecked)?;
    let mut ram = Ram::new(memory, Origin::File(Mutex::new(own)));
    ram.pager = Some(pager.ready(failed));
    Ok(ram)
}

/// Reads and checks all of `source`, and keeps it as memory that others can be given. It takes a time that grows with what
/// was saved, and as much memory; `progress` is told of each chunk that was looked at.
pub fn copy_verified(
    mut source: Source,
    mut progress: impl FnMut(u64),
) -> Result<Base, ImageError> {
    let bytes = source.manifest.bytes();
    let file = base::new_file(bytes)?;
    let mut runs = Vec::new();
    let mut buffer = vec![0; CHUNK];
    for chunk in 0..source.manifest.chunks() {
        if source.read(chunk, &mut buffer)? {
            let at = chunk * CHUNK as u64;
            file.write_all_at(&buffer, at)?;
            runs.push((at, CHUNK as u64));
        }
        progress(chunk);
    }
    let base = with_few(&Base::zero(bytes), &file, &mut runs)?;
    base::seal(&file)?;
    Ok(base)
}

/// A mapping, as the process that serves its faults is told: Firecracker's protocol.
#[derive(Serialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    /// Has a wrong name, and is what older handlers read.
    page_size_kib: u64,
}

/// The empty `memory`, whose faults are served by the process that listens at `path`. It is sent one message, a JSON list
/// of the mappings, and with it the descriptor from which it reads the faults.
pub fn map_elsewhere(
    path: &Path,
    memory: Arc<Memory>,
    huge_pages: HugePages,
) -> Result<Ram, ImageError> {
    let failed = |source: io::Error| ImageError::Handler {
        path: path.to_owned(),
        source,
    };
    let userfault = Userfault::new().map_err(failed)?;
    let page_size = match huge_pages {
        HugePages::Hugetlbfs2M => 2 << 20,
        HugePages::None | HugePages::Transparent => 4096,
    };
    let mut mappings = Vec::new();
    let mut offset = 0;
    for region in memory.iter() {
        let base_host_virt_addr = region.as_ptr() as u64;
        userfault
            .register(base_host_virt_addr, region.len())
            .map_err(failed)?;
        mappings.push(Mapping {
            base_host_virt_addr,
            size: region.len(),
            offset,
            page_size,
            page_size_kib: page_size,
        });
        offset += region.len();
    }
    let message = serde_json::to_vec(&mappings).map_err(|e| failed(e.into()))?;
    let socket = UnixStream::connect(path).map_err(failed)?;
    socket
        .send_with_fd(message.as_slice(), userfault.as_raw_fd())
        .map_err(|error| failed(error.into()))?;
    // Left open: a handler learns by its closing that this process is gone.
    mem::forget(socket);
    Ok(Ram::new(memory, Origin::Elsewhere(userfault)))
}
