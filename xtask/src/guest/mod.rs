//! The guest: its kernel, its image, and Debian as a guest to test with.
//!
//! All of it is made from `resources/guest/` and Debian's packages, and kept in the cache.

mod elf;
mod image;
mod kernel;

use std::path::PathBuf;

pub use image::image;
pub use kernel::{KernelPaths, kernel};

/// The path of `name` in `resources/guest/`.
fn recipe(name: &str) -> PathBuf {
    crate::programs::workspace()
        .join("resources/guest")
        .join(name)
}
