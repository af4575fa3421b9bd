//! Instructions of the hot paths, counted by callgrind and compared with `benches/baseline.json`.
//!
//! Counts do not depend on what else the machine does, so a few percent can be told apart. They do depend on the
//! compiler: with another one nothing is compared, and that is said and counted as skipped. The C library's choice of
//! memcpy by processor is switched off.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use super::counts::Counts;
use crate::packages;
use crate::programs::{Profile, Programs, workspace};
use crate::progress::Progress;

/// What a path may grow by.
const ALLOWED_PERCENT: u64 = 3;
/// A path is taken so often, and then so often: the difference has no start and no end in it.
const TIMES: [u64; 2] = [10, 60];
/// The C library and whatever asks the processor take the plainest way.
const PLAIN: &str =
    "glibc.cpu.hwcaps=-AVX512VL,-AVX512F,-AVX2,-AVX,-ERMS,-FSRM,-BMI2,-SSE4_2,-SSE4_1,-SSSE3";

/// A count of each path, and with what they were made.
#[derive(Debug, PartialEq)]
struct Counted {
    rustc: String,
    valgrind: String,
    instructions: BTreeMap<String, u64>,
}

impl Counted {
    fn to_json(&self) -> Value {
        json!({ "rustc": self.rustc, "valgrind": self.valgrind, "instructions": self.instructions })
    }

    fn from_json(value: &Value) -> Option<Self> {
        let text = |name: &str| Some(value[name].as_str()?.to_owned());
        let counts = value["instructions"].as_object()?.iter();
        Some(Self {
            rustc: text("rustc")?,
            valgrind: text("valgrind")?,
            instructions: counts
                .map(|(name, count)| Some((name.clone(), count.as_u64()?)))
                .collect::<Option<_>>()?,
        })
    }
}

fn baseline() -> PathBuf {
    workspace().join("benches/baseline.json")
}

/// Counts and compares.
pub fn run(progress: &Progress) -> Result<Counts> {
    let now = count(progress)?;
    let path = baseline();
    let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let before = serde_json::from_slice(&bytes)
        .ok()
        .as_ref()
        .and_then(Counted::from_json);
    let before = before.ok_or_else(|| anyhow!("{} is not a baseline", path.display()))?;
    if let Some(reason) = incomparable(&before, &now) {
        eprintln!(
            "SKIPPED: instructions: {reason}; to count anew: cargo xtask bench --instructions --accept"
        );
        return Ok(Counts {
            skipped: 1,
            ..Counts::default()
        });
    }
    let (lines, grown) = compare(&before, &now);
    for line in lines {
        eprintln!("{line}");
    }
    if grown.is_empty() {
        return Ok(Counts::one(true));
    }
    bail!(
        "more instructions than {ALLOWED_PERCENT} % above benches/baseline.json: {}; if that is on purpose: \
         cargo xtask bench --instructions --accept",
        grown.join(", ")
    )
}

/// Counts, and makes that the baseline.
pub fn accept(progress: &Progress) -> Result<()> {
    let now = count(progress)?;
    let text = serde_json::to_string_pretty(&now.to_json())? + "\n";
    std::fs::write(baseline(), text)?;
    eprintln!("{} is written", baseline().display());
    Ok(())
}

/// Why two counts mean nothing beside each other.
fn incomparable(before: &Counted, now: &Counted) -> Option<String> {
    let tools = [
        (&before.rustc, &now.rustc),
        (&before.valgrind, &now.valgrind),
    ];
    let (before, now) = tools.into_iter().find(|(before, now)| before != now)?;
    Some(format!(
        "the baseline was counted with {before}, this is {now}"
    ))
}

/// A line for each path, and those that have grown or have no baseline.
fn compare(before: &Counted, now: &Counted) -> (Vec<String>, Vec<String>) {
    let mut lines = Vec::new();
    let mut grown = Vec::new();
    for (name, &count) in &now.instructions {
        let Some(&old) = before.instructions.get(name) else {
            grown.push(format!("{name}, which is new"));
            continue;
        };
        let change = (count as f64 / old as f64 - 1.0) * 100.0;
        lines.push(format!(
            "{name:<16} {count:>9} instructions, {change:+.1} %"
        ));
        if count * 100 > old * (100 + ALLOWED_PERCENT) {
            grown.push(format!("{name} by {change:.1} %"));
        }
    }
    let gone = before
        .instructions
        .keys()
        .filter(|name| !now.instructions.contains_key(*name));
    grown.extend(gone.map(|name| format!("{name}, which is gone")));
    (lines, grown)
}

fn count(progress: &Progress) -> Result<Counted> {
    packages::ensure(progress, "counting instructions", &["valgrind"])?;
    let built = Programs::build(progress, Profile::Release, &["lepton-hot-paths"])?;
    let program = built.path("lepton-hot-paths")?;
    let names = first_lines(Command::new(program))?;
    let step = progress.step("counting instructions");
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
    let version = |name: &str| {
        let mut command = Command::new(name);
        command.arg("--version");
        Ok::<_, anyhow::Error>(first_lines(command)?.trim().to_owned())
    };
    Ok(Counted {
        rustc: version("rustc")?,
        valgrind: version("valgrind")?,
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

    fn counted(rustc: &str, instructions: &[(&str, u64)]) -> Counted {
        let each = instructions
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count));
        Counted {
            rustc: rustc.to_owned(),
            valgrind: "v".to_owned(),
            instructions: each.collect(),
        }
    }

    #[test]
    fn three_percent_are_allowed() {
        let before = counted("1", &[("a", 1000), ("b", 1000)]);
        let grown = |a, b| compare(&before, &counted("1", &[("a", a), ("b", b)])).1;
        assert_eq!(grown(1030, 500), [] as [&str; 0]);
        assert_eq!(grown(1031, 1000), ["a by 3.1 %"]);
    }

    #[test]
    fn a_path_without_a_baseline_is_told_and_so_is_one_that_is_gone() {
        let before = counted("1", &[("a", 1), ("b", 1)]);
        let (_, grown) = compare(&before, &counted("1", &[("b", 1), ("c", 1)]));
        assert_eq!(grown, ["c, which is new", "a, which is gone"]);
    }

    #[test]
    fn counts_of_another_compiler_are_not_compared() {
        let reason = incomparable(&counted("1", &[]), &counted("2", &[]));
        assert!(reason.is_some_and(|reason| reason.contains("with 1, this is 2")));
        assert_eq!(incomparable(&counted("1", &[]), &counted("1", &[])), None);
    }

    #[test]
    fn baselines_are_read_as_they_were_written() {
        let written = counted("1", &[("a", 5)]);
        assert_eq!(Counted::from_json(&written.to_json()), Some(written));
        assert_eq!(Counted::from_json(&json!({ "rustc": "1" })), None);
    }

    #[test]
    fn the_count_is_found_in_what_callgrind_says() {
        let text = "==7== Events    : Ir\n==7== Collected : 123456\n==7==\n";
        assert_eq!(parse_collected(text), Some(123_456));
        assert_eq!(parse_collected("==7== nothing"), None);
    }
}
