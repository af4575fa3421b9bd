//! The saved form of a machine: what lies on disk, how it is checked, how it is written. Knows no machine.
//!
//! A saved machine is two files, as in Firecracker's API:
//!
//! ```text
//!  state file                                       memory file
//!  0    header: magic, version, sizes, root, hash    0             guest memory as it is, holes where it is zero
//!  96   state: the machine, encoded by [`codec`]     memory bytes  one page: magic, version, sizes, root
//!  ..   one hash per group of 1024 chunks
//!  ..   (next page) one hash per chunk of 64 KiB
//! ```
//!
//! The *root* is the hash of the group hashes, a group's hash that of its chunks' hashes, and a chunk's that of its
//! bytes. The header's hash covers header, state and group hashes. So all that is read at once on a load is checked at
//! once and does not grow with memory (2 KiB for 4 GiB); a chunk's hash is read and checked when the chunk is
//! ([`Manifest`]). The hashes find damage and mistakes; they are no signature: whoever can write the one file can
//! write both.
//!
//! BLAKE3, because it is a tree hash that runs at memory speed (a chunk takes 15 us on one core); SHA-256 takes ten
//! times that where the processor has no instructions for it.
#![forbid(unsafe_code)]

pub mod codec;
pub mod hash;
pub mod manifest;
pub mod memory_file;
pub mod replace;
pub mod state_file;

pub use hash::{CHUNK, Hash};
pub use manifest::{Leaves, Manifest, ManifestError};
pub use memory_file::MemoryFileError;
pub use replace::{Replacement, WriteError};
pub use state_file::{Opened, StateFileError};

/// Version of the format written. Versions up to this one are read; each older one has its reader, named in
/// [`state_file`].
pub const VERSION: u16 = 1;
/// Most bytes of guest memory in a snapshot: 1 TiB.
pub const MAX_MEMORY: u64 = 1 << 40;
/// Most bytes of encoded state. A machine of 32 vCPUs and 59 devices has about 500 KiB.
pub const MAX_STATE: usize = 16 << 20;

/// The architecture of a saved machine, by its ELF number.
pub const ARCHITECTURE: u16 = 62;
