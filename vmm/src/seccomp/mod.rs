//! Which system calls each thread may make: BPF programs compiled from the lists in `resources/seccomp`.
//!
//! A thread takes its filter once its own setup is done and before it takes input that is not ours: `api` before the
//! first client, `main` before the configuration, `vcpu N` before the guest's first instruction. A thread inherits the
//! filter of the one that starts it, and filters add up: what a vCPU may do is on the lists `vmm` and `vcpu`.

mod compile;
#[cfg(test)]
mod lists;
mod optimize;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use seccompiler::sock_filter;

use crate::signal;

pub use self::compile::{CompileError, THREADS};

mod built_in {
    use seccompiler::sock_filter;

    include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));
}

/// Largest file of filters, in bytes. The built-in lists have a tenth of it.
const MAX_FILE: u64 = 256 << 10;

/// A thread, as far as its filter goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Serves clients.
    Api,
    /// The event loop.
    Vmm,
    /// Runs the guest.
    Vcpu,
}

/// Why there are no filters.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is too large to be one of filters.
    #[error("{}: more than {MAX_FILE} bytes", .0.display())]
    Size(PathBuf),
    /// What is in the file cannot be compiled.
    #[error("{}: {source}", path.display())]
    Compile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: CompileError,
    },
}

type Program = Cow<'static, [sock_filter]>;

/// The filters of all threads. Without a filter a thread may do everything.
#[derive(Debug, Clone, Default)]
pub struct Filters {
    api: Program,
    vmm: Program,
    vcpu: Program,
}

impl Filters {
    /// None, for `--no-seccomp`.
    pub fn none() -> Self {
        Self::default()
    }

    /// Those of `resources/seccomp`, compiled when this program was built.
    pub fn built_in() -> Self {
        Filters {
            api: Cow::Borrowed(&built_in::API),
            vmm: Cow::Borrowed(&built_in::VMM),
            vcpu: Cow::Borrowed(&built_in::VCPU),
        }
    }

    /// Those that a file has as JSON.
    pub fn from_file(path: &Path) -> Result<Self, FilterError> {
        let read = |source| FilterError::Read {
            path: path.to_owned(),
            source,
        };
        let mut text = Vec::new();
        let file = File::open(path).map_err(read)?;
        file.take(MAX_FILE + 1)
            .read_to_end(&mut text)
            .map_err(read)?;
        if text.len() as u64 > MAX_FILE {
            return Err(FilterError::Size(path.to_owned()));
        }
        let [api, vmm, vcpu] = compile::compile(&text).map_err(|source| FilterError::Compile {
            path: path.to_owned(),
            source,
        })?;
        Ok(Filters {
            api: Cow::Owned(api),
            vmm: Cow::Owned(vmm),
            vcpu: Cow::Owned(vcpu),
        })
    }

    /// Lets the calling thread from now on do only what is on the list of `thread`, and gain no privilege.
    pub fn confine(&self, thread: Thread) -> Result<(), seccompiler::Error> {
        let program = match thread {
            Thread::Api => &self.api,
            Thread::Vmm => &self.vmm,
            Thread::Vcpu => &self.vcpu,
        };
        if program.is_empty() {
            return Ok(());
        }
        signal::remember_thread();
        seccompiler::apply_filter(program)
    }
}
