//! The guest: its kernel, its image, and what is there to test with: Debian, and programs for bare metal.
//!
//! The former are made from `resources/guest/` and Debian's packages, and kept in the cache; the latter are in
//! `tests/guests/`, and built by cargo.

mod debian;
mod elf;
mod image;
mod kernel;
mod metal;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};

pub use debian::{DebianPaths, debian};
pub use image::image;
pub use kernel::{KernelPaths, kernel};
pub use metal::{MetalPaths, metal, metal_cargo};

use crate::programs::{Profile, Programs, workspace};
use crate::progress::Progress;

/// What `cargo xtask guest` makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// The guest's kernel, as ELF file and bzImage
    Kernel,
    /// The guest's root image, with the agent as its first process
    Image,
    /// Debian's stock kernel with an initial RAM disk and a root drive, as the tests boot it
    Debian,
    /// The bare-metal programs that measure and attack the VMM
    Metal,
}

/// The arguments of `cargo xtask guest`.
#[derive(Debug, Args)]
pub struct GuestArgs {
    /// What to make [default: kernel and image]
    #[arg(value_enum)]
    parts: Vec<Part>,
}

/// Makes the parts asked for, or finds them in the cache, and prints where they are, one `name path` a line.
pub fn run(arguments: GuestArgs) -> Result<u8> {
    let progress = Progress::new();
    let mut parts = arguments.parts;
    if parts.is_empty() {
        parts = vec![Part::Kernel, Part::Image];
    }
    for part in parts {
        let made = match part {
            Part::Kernel => {
                let kernel = kernel(&progress)?;
                vec![
                    ("vmlinux", kernel.vmlinux),
                    ("bzimage", kernel.bzimage),
                    ("config", kernel.config),
                ]
            }
            Part::Image => {
                let agent = Programs::build(&progress, Profile::Release, &["lepton-agent"])?;
                vec![("image", image(&progress, agent.path("lepton-agent")?)?)]
            }
            Part::Debian => {
                let debian = debian(&progress)?;
                vec![
                    ("debian-bzimage", debian.bzimage),
                    ("debian-initrd", debian.initrd),
                    ("debian-root", debian.root),
                ]
            }
            Part::Metal => {
                let metal = metal(&progress)?;
                vec![("probe", metal.probe), ("adversary", metal.adversary)]
            }
        };
        for (name, path) in made {
            println!("{name} {}", path.display());
        }
    }
    Ok(0)
}

/// The path of `name` in `resources/guest/`.
fn recipe(name: &str) -> PathBuf {
    workspace().join("resources/guest").join(name)
}
