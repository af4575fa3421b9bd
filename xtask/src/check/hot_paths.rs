//! Instructions of the hot paths, counted by callgrind.
//!
//! Counts do not depend on what else the machine does, so a few percent can be told apart. They do depend on the compiler. The C
//! library's choice of memcpy by processor is switched off.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use super::instructions::{Counted, version};
use crate::packages;
use crate::programs::{Profile, Programs, target};
use crate::progress::Progress;

/// A path is taken so often, and then so often: the difference has no start and no end in it.
const TIMES: [u64; 2] = [10, 60];
/// The C library and whatever asks the processor take the plainest way.
const PLAIN: &str =
    "glibc.cpu.hwcaps=-AVX512VL,-AVX512F,-AVX2,-AVX,-ERMS,-FSRM,-BMI2,-SSE4_2,-SSE4_1,-SSSE3";

/// Counts those of each path.
pub fn count(progress: &Progress) -> Result<Counted> {
    packages::ensure(progress, "counting instructions", &["valgrind"])?;
    let built = Programs::build(progress, Profile::Release, &["lepton-hot-paths"])?;
    let program = built.path("lepton-hot-paths")?;
    let names = first_lines(Command::new(program))?;
    let step = progress.step("counting instructions of the hot paths");
    let mut instructions = BTreeMap::new();
    for name in names.lines() {
        step.note(name);
        let [few, many] = TIMES;
        let difference =
            collected(program, name, many)?.checked_sub(collected(program, name, few)?);
        let difference = difference.ok_or_else(|| anyhow!("{name}: less for more"))?;
        instructions.insert(name.to_owned(), difference / (many - few));
    }
    step.done("done");
    Ok(Counted {
        tools: vec![
            version("rustc")?,
            version("valgrind")?,
            target(progress).to_owned(),
        ],
        instructions,
    })
}

fn first_lines(mut command: Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("{:?}", command.get_program()))?;
    if !output.status.success() {
        bail!("{:?} ended with {}", command.get_program(), output.status);
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Instructions of one run.
fn collected(program: &Path, name: &str, times: u64) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args([name, &times.to_string()])
        .env("GLIBC_TUNABLES", PLAIN)
        .output()
        .context("valgrind")?;
    let text = String::from_utf8_lossy(&output.stderr);
    match parse_collected(&text) {
        Some(count) if output.status.success() => Ok(count),
        _ => bail!(
            "{name} under valgrind ended with {}:\n{text}",
            output.status
        ),
    }
}

/// `==123== Collected : 456`
fn parse_collected(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.split_once("Collected : "))?;
    line.1.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_found_in_what_callgrind_says() {
        let text = "==7== Events    : Ir\n==7== Collected : 123456\n==7==\n";
        assert_eq!(parse_collected(text), Some(123_456));
        assert_eq!(parse_collected("==7== nothing"), None);
    }
}
