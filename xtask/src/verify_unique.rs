//! `cargo xtask verify-unique`: clones a Linux guest many times in the lab, and counts what two copies have in common.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use crate::check;
use crate::progress::Progress;

/// The test program that does it.
const PROGRAM: &str = "lab_unique";

/// The arguments of `cargo xtask verify-unique`.
#[derive(Debug, Args)]
pub struct VerifyUniqueArguments {
    /// How many copies, a few at a time
    #[arg(short = 'n', long = "copies", value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    copies: u32,
}

/// Runs it, and prints how often what is repeated. 1 if anything is.
pub fn run(arguments: &VerifyUniqueArguments) -> Result<u8> {
    let copies = arguments.copies;
    // A copy takes a second or two in the lab, and many more on a machine that is busy.
    let patience = Duration::from_secs(600) + Duration::from_secs(30) * copies;
    let variables = [("LEPTON_UNIQUE_CLONES", copies.to_string())];
    let counts = check::in_lab(&Progress::every_step(), PROGRAM, &variables, patience)?;
    println!("{counts}");
    Ok(u8::from(counts.failed > 0 || counts.passed == 0))
}
