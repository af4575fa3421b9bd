//! The machine that is asked for, whoever makes it.

use std::path::PathBuf;

/// What a machine has. Every VMM gets the same.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The guest.
    pub kernel: PathBuf,
    /// Its command line.
    pub command_line: String,
    /// Its memory, in MiB.
    pub memory_mib: u64,
    /// Its processors.
    pub vcpus: u32,
    /// Its drives.
    pub drives: Vec<Drive>,
    /// Tap devices of the host, one for each of its interfaces.
    pub taps: Vec<String>,
    /// The host's socket of its vsock device, if it has one.
    pub vsock: Option<PathBuf>,
}

/// How a VMM does a drive's input and output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// System calls that block.
    Sync,
    /// io_uring.
    Async,
}

/// A drive.
#[derive(Debug, Clone)]
pub struct Drive {
    /// Its image.
    pub path: PathBuf,
    /// Whether it is the root of a Linux guest.
    pub root: bool,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// How it is served.
    pub engine: Engine,
}

impl Machine {
    /// A machine of one processor and 128 MiB without devices.
    pub fn bare(kernel: PathBuf) -> Self {
        Self {
            kernel,
            command_line: "quiet".to_owned(),
            memory_mib: 128,
            vcpus: 1,
            drives: Vec::new(),
            taps: Vec::new(),
            vsock: None,
        }
    }

    /// The command line with what names the root drive: for VMMs that do not add that themselves.
    pub fn command_line_with_root(&self) -> String {
        let roots = self.drives.iter().enumerate();
        let root = roots.map(|(index, drive)| (b'a'.saturating_add(index as u8) as char, drive));
        let root = root.filter(|(_, drive)| drive.root).map(|(letter, drive)| {
            let mode = if drive.read_only { "ro" } else { "rw" };
            format!("root=/dev/vd{letter} {mode} ")
        });
        root.collect::<String>() + &self.command_line
    }
}
