//! `cargo xtask fuzz`: looks for input that breaks the code which takes it, by libFuzzer. The targets are in `fuzz/`.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::packages;
use crate::programs::{cargo, executables, workspace};
use crate::progress::Progress;

const PROGRAM: &str = "lepton-fuzz";
/// Longer inputs find no more here, and cost time.
const MAX_INPUT: &str = "16384";
/// An input that takes so many seconds is a finding. A busy machine may stand still for a while.
const TOO_LONG: &str = "60";
/// As is one that takes so many MiB.
const TOO_MUCH: &str = "1024";
/// libFuzzer ends so when it is interrupted from the keyboard.
const INTERRUPTED: i32 = 72;

/// The arguments of `cargo xtask fuzz`.
#[derive(Debug, Args)]
pub struct FuzzArguments {
    /// What to give input to; without it, the targets are listed
    target: Option<String>,

    /// Run this one input instead, and say what it does
    #[arg(conflicts_with_all = ["seconds", "keep"])]
    input: Option<PathBuf>,

    /// End after so many seconds [default: when it is interrupted]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    seconds: Option<u64>,

    /// Do not look for more: add to the seeds, from what was found before, the inputs that reach what no seed does
    #[arg(long, conflicts_with = "seconds")]
    keep: bool,
}

/// A target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub name: String,
    /// What it is given.
    pub what: String,
}

impl Target {
    /// The inputs it begins with.
    fn seeds(&self) -> PathBuf {
        workspace().join("fuzz/seeds").join(&self.name)
    }
}

/// All targets.
pub fn targets() -> Result<Vec<Target>> {
    let path = workspace().join("fuzz/targets.txt");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(parse_targets(&text))
}

fn parse_targets(text: &str) -> Vec<Target> {
    let lines = text.lines().filter_map(|line| line.split_once(": "));
    lines
        .map(|(name, what)| Target {
            name: name.to_owned(),
            what: what.to_owned(),
        })
        .collect()
}

fn list(targets: &[Target]) -> String {
    let lines = targets
        .iter()
        .map(|Target { name, what }| format!("{name:<15}{what}\n"));
    lines.collect()
}

/// Lists the targets, runs one, or repeats an input. 1 if something was found.
pub fn run(arguments: &FuzzArguments) -> Result<u8> {
    let targets = targets()?;
    let Some(name) = &arguments.target else {
        print!("{}", list(&targets));
        eprintln!("to run one until Ctrl-C: cargo xtask fuzz TARGET");
        return Ok(0);
    };
    let Some(target) = targets.iter().find(|target| target.name == *name) else {
        bail!("there is no target {name}; there are:\n{}", list(&targets));
    };
    let program = build(&Progress::new())?;
    let mut command = command(&program, target);
    if let Some(input) = &arguments.input {
        let status = command.arg(input).status()?;
        return Ok(u8::from(!status.success()));
    }
    let corpus = workspace().join("target/fuzz/corpus").join(name);
    make_folder(&corpus)?;
    if arguments.keep {
        command.arg("-merge=1").arg(target.seeds()).arg(&corpus);
        let status = command.status().context("cannot start libFuzzer")?;
        return Ok(u8::from(!status.success()));
    }
    if let Some(seconds) = arguments.seconds {
        command.arg(format!("-max_total_time={seconds}"));
    }
    let found = found_path(target)?;
    let status = command
        .arg(artifact(&found))
        .arg("-print_final_stats=1")
        .arg(&corpus)
        .arg(target.seeds())
        .status()
        .context("cannot start libFuzzer")?;
    if let Some(text) = finding(target, status, &found) {
        eprintln!("{text}");
        return Ok(1);
    }
    Ok(0)
}

/// Runs a target for so long from its seeds alone. The text tells how many inputs were tried; an error is a finding.
pub fn check(program: &Path, target: &Target, seconds: u64) -> Result<String> {
    let corpus = tempfile::tempdir()?;
    let found = found_path(target)?;
    let output = command(program, target)
        .arg(artifact(&found))
        .arg(format!("-max_total_time={seconds}"))
        .arg("-print_final_stats=1")
        .arg(corpus.path())
        .arg(target.seeds())
        .output()
        .context("cannot start libFuzzer")?;
    let text = String::from_utf8_lossy(&output.stderr);
    if let Some(finding) = finding(target, output.status, &found) {
        let lines: Vec<&str> = text.lines().collect();
        let end = lines.get(lines.len().saturating_sub(60)..);
        bail!("{}\n{finding}", end.unwrap_or_default().join("\n"));
    }
    let tried = tried(&text).with_context(|| format!("fuzz {}: no counts", target.name))?;
    Ok(format!("{}: {tried} inputs", target.name))
}

/// `stat::number_of_executed_units: 123`
fn tried(text: &str) -> Option<u64> {
    let value = |line: &str| {
        let value = line.strip_prefix("stat::number_of_executed_units:")?;
        value.trim().parse().ok()
    };
    text.lines().find_map(value)
}

/// Builds libFuzzer with all targets.
pub fn build(progress: &Progress) -> Result<PathBuf> {
    packages::ensure(progress, "fuzzing", &["g++"])?;
    let messages = progress.capture(
        "building the fuzzing program",
        cargo()
            .args(["build", "--package", PROGRAM, "--features", "libfuzzer"])
            .arg("--message-format=json-render-diagnostics")
            .env("RUSTC_WORKSPACE_WRAPPER", workspace().join("fuzz/rustc.sh")),
    )?;
    executables(&String::from_utf8_lossy(&messages))?
        .remove(PROGRAM)
        .with_context(|| format!("cargo built no {PROGRAM}"))
}

fn command(program: &Path, target: &Target) -> Command {
    let mut command = Command::new(program);
    command
        .env("LEPTON_FUZZ_TARGET", &target.name)
        .env("RUST_BACKTRACE", "1")
        .arg(format!("-max_len={MAX_INPUT}"))
        .arg(format!("-timeout={TOO_LONG}"))
        .arg(format!("-rss_limit_mb={TOO_MUCH}"));
    command
}

fn make_folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| path.display().to_string())
}

/// Where an input that breaks the target will be.
fn found_path(target: &Target) -> Result<PathBuf> {
    let folder = workspace().join("target/fuzz/found");
    make_folder(&folder)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    Ok(folder.join(format!("{}-{now}", target.name)))
}

fn artifact(path: &Path) -> String {
    format!("-exact_artifact_path={}", path.display())
}

fn finding(target: &Target, status: ExitStatus, found: &Path) -> Option<String> {
    if status.success() || status.code() == Some(INTERRUPTED) {
        return None;
    }
    let name = &target.name;
    if !found.exists() {
        return Some(format!("fuzz {name}: ended with {status}"));
    }
    let found = found.display();
    Some(format!(
        "fuzz {name}: found {found}; to repeat it:\n  cargo xtask fuzz {name} {found}\n\
         once it is mended, keep it under a name of its own in fuzz/seeds/{name}/"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn the_targets_are_read() {
        let targets = targets().unwrap();
        assert!(targets.iter().any(|target| target.name == "http"));
        for target in targets {
            assert!(target.seeds().is_dir(), "{} has no seeds", target.name);
        }
    }

    #[test]
    fn a_wrong_name_is_answered_with_the_right_ones() {
        let arguments = FuzzArguments {
            target: Some("htpt".into()),
            input: None,
            seconds: None,
            keep: false,
        };
        let error = run(&arguments).unwrap_err().to_string();
        assert!(
            error.contains("no target htpt") && error.contains("\nhttp "),
            "{error}"
        );
    }

    #[test]
    fn inputs_are_counted() {
        let text = "Done 5 runs\nstat::number_of_executed_units: 5\nstat::peak_rss_mb:  40\n";
        assert_eq!(tried(text), Some(5));
        assert_eq!(tried("INFO: seed corpus"), None);
    }

    #[test]
    fn a_finding_says_how_to_repeat_it() {
        let target = &parse_targets("a: text\n")[0];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a-1");
        let ended = |code: i32| finding(target, ExitStatus::from_raw(code << 8), &path);
        assert_eq!((ended(0), ended(INTERRUPTED)), (None, None));
        assert!(ended(2).is_some_and(|text| text.contains("ended with")));
        std::fs::write(&path, "").unwrap();
        let text = ended(77).unwrap();
        let command = format!("cargo xtask fuzz a {}", path.display());
        assert!(text.contains(&command), "{text}");
    }
}
