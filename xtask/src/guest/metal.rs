//! The programs for bare metal in `tests/guests/`: a workspace of its own, linked like none of the others.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::programs::{cargo, executables, workspace};
use crate::progress::Progress;

/// Guests without an operating system, as ELF files with the PVH and the 64-bit Linux entry.
#[derive(Debug, Clone)]
pub struct MetalPaths {
    /// Measures.
    pub probe: PathBuf,
    /// Attacks.
    pub adversary: PathBuf,
}

/// Cargo for these programs. Flags of the host's programs are wrong for them; their own are in their folder.
pub fn metal_cargo() -> Command {
    let mut command = cargo();
    command
        .current_dir(workspace().join("tests/guests"))
        .env("CARGO_TARGET_DIR", workspace().join("target/guests"));
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        command.env_remove(name);
    }
    command
}

/// Builds the programs, if they are not up to date.
pub fn metal(progress: &Progress) -> Result<MetalPaths> {
    let messages = progress.capture(
        "building the bare-metal guests",
        metal_cargo().args([
            "build",
            "--release",
            "--message-format=json-render-diagnostics",
        ]),
    )?;
    let mut found = executables(&String::from_utf8_lossy(&messages))?;
    let mut path = |name: &str| {
        found
            .remove(name)
            .with_context(|| format!("cargo built no guest {name}"))
    };
    Ok(MetalPaths {
        probe: path("probe")?,
        adversary: path("adversary")?,
    })
}
