//! Lists of system calls that a user brings.

use lepton_vmm::seccomp::Filters;

use crate::scratch::Scratch;

/// A file of filters.
pub fn seccomp(data: &[u8]) {
    let scratch = Scratch::new(data);
    if let Err(error) = Filters::from_file(&scratch.path) {
        assert!(!error.to_string().is_empty());
    }
}
