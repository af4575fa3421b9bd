//! Instructions of the hot paths and of a boot, compared with `benches/baseline.json`.
//!
//! Counts mean something only beside counts of the same tools: with another compiler, or another lab, nothing is compared, and
//! that is said and counted as skipped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use super::counts::Counts;
use super::{boot, hot_paths};
use crate::programs::workspace;
use crate::progress::Progress;

/// What a count may grow by.
const ALLOWED_PERCENT: u64 = 3;

type Count = fn(&Progress) -> Result<Counted>;

/// What is counted, by the names in the baseline.
const KINDS: [(&str, Count); 2] = [("hot-paths", hot_paths::count), ("boot", boot::count)];

/// Counts by name, and what they depend on besides our code.
#[derive(Debug, Clone, PartialEq)]
pub struct Counted {
    /// Names and versions.
    pub tools: Vec<String>,
    /// The counts.
    pub instructions: BTreeMap<String, u64>,
}

impl Counted {
    fn to_json(&self) -> Value {
        json!({ "tools": self.tools, "instructions": self.instructions })
    }

    fn from_json(value: &Value) -> Option<Self> {
        let tools = value["tools"].as_array()?.iter();
        let counts = value["instructions"].as_object()?.iter();
        Some(Self {
            tools: tools
                .map(|tool| Some(tool.as_str()?.to_owned()))
                .collect::<Option<_>>()?,
            instructions: counts
                .map(|(name, count)| Some((name.clone(), count.as_u64()?)))
                .collect::<Option<_>>()?,
        })
    }
}

fn baseline() -> PathBuf {
    workspace().join("benches/baseline.json")
}

/// What the baseline has of `kind`.
fn read(path: &Path, kind: &str) -> Result<Counted> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let all: Value = serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?;
    Counted::from_json(&all[kind]).ok_or_else(|| {
        anyhow!(
            "{} has no {kind}: cargo xtask bench --instructions --accept counts anew",
            path.display()
        )
    })
}

/// Counts and compares.
pub fn run(progress: &Progress) -> Result<Counts> {
    let mut counts = Counts::default();
    for (kind, count) in KINDS {
        let before = read(&baseline(), kind)?;
        match count(progress).and_then(|now| judge(kind, &before, &now)) {
            Ok(judged) => counts += judged,
            Err(error) => {
                eprintln!("{error:#}");
                counts += Counts::one(false);
            }
        }
    }
    Ok(counts)
}

/// Counts, and makes that the baseline.
pub fn accept(progress: &Progress) -> Result<()> {
    let mut all = BTreeMap::new();
    for (kind, count) in KINDS {
        all.insert(kind, count(progress)?.to_json());
    }
    let text = serde_json::to_string_pretty(&all)? + "\n";
    std::fs::write(baseline(), text)?;
    eprintln!("{} is written", baseline().display());
    Ok(())
}

/// Shows how the counts have changed. An error if one has grown too much.
fn judge(kind: &str, before: &Counted, now: &Counted) -> Result<Counts> {
    if let Some(reason) = incomparable(before, now) {
        eprintln!(
            "SKIPPED: instructions, {kind}: {reason}; to count anew: cargo xtask bench --instructions --accept"
        );
        return Ok(Counts {
            skipped: 1,
            ..Counts::default()
        });
    }
    let (lines, grown) = compare(before, now);
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

/// Why two counts mean nothing beside each other.
fn incomparable(before: &Counted, now: &Counted) -> Option<String> {
    if before.tools == now.tools {
        return None;
    }
    let only = |one: &Counted, other: &Counted| {
        let tools = one.tools.iter();
        let tools: Vec<&str> = tools
            .filter(|tool| !other.tools.contains(tool))
            .map(String::as_str)
            .collect();
        tools.join(", ")
    };
    Some(format!(
        "the baseline was counted with {}, this is {}",
        only(before, now),
        only(now, before)
    ))
}

/// A line for each count, and those that have grown or have no baseline.
pub fn compare(before: &Counted, now: &Counted) -> (Vec<String>, Vec<String>) {
    let mut lines = Vec::new();
    let mut grown = Vec::new();
    for (name, &count) in &now.instructions {
        let Some(&old) = before.instructions.get(name) else {
            grown.push(format!("{name}, which is new"));
            continue;
        };
        let change = (count as f64 / old as f64 - 1.0) * 100.0;
        lines.push(format!(
            "{name:<16} {count:>11} instructions, {change:+.1} %"
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

/// The first line of what a program says of its version.
pub fn version(program: &str) -> Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(line.trim().to_owned()),
        _ => bail!("{program} --version ended with {}", output.status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(rustc: &str, instructions: &[(&str, u64)]) -> Counted {
        let each = instructions
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count));
        Counted {
            tools: vec![rustc.to_owned(), "v".to_owned()],
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
    fn a_count_that_has_grown_is_a_failure() {
        let before = counted("1", &[("true", 90_000_000)]);
        let judged = |now| judge("boot", &before, &counted("1", &[("true", now)]));
        assert_eq!(judged(92_700_000).unwrap(), Counts::one(true));
        let error = judged(92_700_001).unwrap_err().to_string();
        assert!(error.contains("true by 3.0 %"), "{error}");
        assert!(error.contains("--accept"), "{error}");
    }

    #[test]
    fn a_path_without_a_baseline_is_told_and_so_is_one_that_is_gone() {
        let before = counted("1", &[("a", 1), ("b", 1)]);
        let (_, grown) = compare(&before, &counted("1", &[("b", 1), ("c", 1)]));
        assert_eq!(grown, ["c, which is new", "a, which is gone"]);
    }

    #[test]
    fn counts_of_another_compiler_are_not_compared() {
        let (before, now) = (counted("1", &[]), counted("2", &[]));
        let reason = incomparable(&before, &now).unwrap();
        assert!(reason.ends_with("with 1, this is 2"), "{reason}");
        assert_eq!(incomparable(&before, &before), None);
        assert_eq!(judge("boot", &before, &now).unwrap().skipped, 1);
    }

    #[test]
    fn baselines_are_read_as_they_were_written() {
        let written = counted("1", &[("a", 5)]);
        assert_eq!(Counted::from_json(&written.to_json()), Some(written));
        assert_eq!(Counted::from_json(&json!({ "tools": ["1"] })), None);
    }

    /// A guard without a baseline would be none.
    #[test]
    fn the_baseline_has_every_kind() {
        for (kind, _) in KINDS {
            assert!(!read(&baseline(), kind).unwrap().instructions.is_empty());
        }
    }
}
