//! Files that have no place on a disk, and yet a path.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::TempDir;

/// A file in memory.
pub struct Scratch {
    pub file: File,
    pub path: PathBuf,
}

impl Scratch {
    /// A file with this content.
    pub fn new(content: &[u8]) -> Self {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let mut file: File = memfd_create("fuzz", flags).expect("a memfd").into();
        file.write_all(content).expect("memory");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        Scratch { file, path }
    }
}

/// A folder in memory, if the host has a place for one.
pub fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    }
    .expect("a temporary folder")
}
