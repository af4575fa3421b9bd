//! `cargo xtask selftest`: lets the attacking guest at the VMM on this machine, and says whether it held.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

use crate::guest;
use crate::programs::{Profile, Programs, cargo, executables, workspace};
use crate::progress::Progress;

/// The test program that attacks, and how many tests it has that share the time: four, each on a machine that booted, on one
/// that was loaded and on a clone.
const PROGRAM: &str = "native_adversary";
const TESTS: u64 = 4 * 3;

/// The arguments of `cargo xtask selftest`.
#[derive(Debug, Args)]
pub struct SelftestArguments {
    /// How long to attack, in all
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(TESTS..=1 << 20))]
    seconds: u64,

    /// Where all attacks follow from
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Builds the VMM as it is shipped and the attacking guest, runs the attack and prints the verdict. 1 if it did not hold.
pub fn run(arguments: &SelftestArguments) -> Result<u8> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("/dev/kvm: the attack needs KVM; `cargo xtask doctor` says more")?;
    let progress = Progress::new();
    let programs = Programs::build(&progress, Profile::Release, &["lepton-vmm"])?;
    let guests = guest::metal(&progress)?;
    let status = Command::new(attack_program(&progress)?)
        .current_dir(workspace().join("tests"))
        .env("LEPTON_VMM", programs.path("lepton-vmm")?)
        .env("LEPTON_ADVERSARY", guests.adversary)
        .env(
            "LEPTON_ATTACK_SECONDS",
            (arguments.seconds / TESTS).to_string(),
        )
        .env("LEPTON_ATTACK_SEED", arguments.seed.to_string())
        .status()
        .context("cannot start the attack")?;
    let verdict = if status.success() {
        "held"
    } else {
        "DID NOT HOLD"
    };
    println!("verdict: lepton-vmm {verdict} (seed {})", arguments.seed);
    Ok(u8::from(!status.success()))
}

fn attack_program(progress: &Progress) -> Result<PathBuf> {
    let messages = progress.capture(
        "building the attack",
        cargo()
            .args([
                "test",
                "--package",
                "lepton-tests",
                "--no-run",
                "--test",
                PROGRAM,
            ])
            .arg("--message-format=json-render-diagnostics"),
    )?;
    executables(&String::from_utf8_lossy(&messages))?
        .remove(PROGRAM)
        .with_context(|| format!("cargo built no {PROGRAM}"))
}
