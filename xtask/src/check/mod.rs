//! `cargo xtask test`: everything that has to hold, with a closing line of counts.

mod boot;
mod captured;
mod counts;
mod dependencies;
mod fuzzing;
mod guest_reach;
mod hot_paths;
pub mod instructions;
mod lab_itself;
mod lab_tests;
mod shipped;
mod used_calls;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::guest::{self, DebianPaths, MetalPaths};
use crate::lab;
use crate::packages;
use crate::programs::{self, Profile, cargo};
use crate::progress::Progress;
use crate::run::Built;
use counts::Counts;
use lab_tests::Program;

/// The crates whose tests need the programs built, the guest, or a long time.
const SYSTEM_TESTS: &str = "lepton-tests";

/// Programs that tests in the lab start.
const LAB_PACKAGES: [&str; 6] = [
    "e2fsprogs",
    "iproute2",
    "nftables",
    "python3",
    "runc",
    "sqlite3",
];

/// The program with Debian's own kernel.
const DEBIAN: &str = "lab_debian";

/// Paths by the names of environment variables.
type Environment = BTreeMap<&'static str, PathBuf>;

type Check = fn(&Progress) -> Result<Counts>;

/// Runs all checks, or with `fast` only those that need no guest, or only what
/// `only` names: checks, or programs of system tests that have a word of it in their names; returns the exit status.
pub fn run(fast: bool, release: bool, only: &[String]) -> Result<u8> {
    let started = Instant::now();
    let progress = Progress::every_step();
    let mut counts = Counts::default();
    let mut check = |result: Result<Counts>| match result {
        Ok(counted) => counts += counted,
        Err(error) => {
            eprintln!("{error:#}");
            counts += Counts::one(false);
        }
    };
    let checks: [(&str, Check); 5] = [
        ("format", formatting),
        ("lints", lints),
        ("dependencies", crate_dependencies),
        (guest_reach::NAME, guest_reach::run),
        ("units", unit_tests),
    ];
    let slow: [(&str, Check); 4] = [
        ("instructions", instructions::run),
        (shipped::NAME, shipped::run),
        ("fuzz", fuzzing::run),
        ("lab", lab_itself::run),
    ];
    let chosen = |name: &str| only.is_empty() || only.iter().any(|word| word == name);
    for (name, run) in checks {
        if chosen(name) {
            check(run(&progress));
        }
    }
    for (name, run) in slow {
        if chosen(name) && !fast {
            check(run(&progress));
        }
    }
    let is_check = |word: &String| checks.iter().chain(&slow).any(|(name, _)| name == word);
    if fast {
        eprintln!("--fast: the tests of the whole system were not run");
    } else if only.is_empty() || !only.iter().all(is_check) {
        let profile = if release {
            Profile::Release
        } else {
            Profile::Dev
        };
        match Built::get(&progress, profile).and_then(|built| environment(&progress, &built)) {
            Ok(mut environment) => {
                // Without it, the tests that do not need it still tell something.
                if only.is_empty() || only.iter().any(|word| DEBIAN.contains(word.as_str())) {
                    match debian(&progress) {
                        Ok(more) => environment.extend(more),
                        Err(error) => check(Err(error)),
                    }
                }
                system_tests(&progress, &environment, only, &mut check);
            }
            Err(error) => check(Err(error)),
        }
    }
    eprintln!("all checks took {:.0} s", started.elapsed().as_secs_f32());
    println!("{counts}");
    Ok(u8::from(counts.failed > 0))
}

fn formatting(progress: &Progress) -> Result<Counts> {
    progress.run(
        "checking the format",
        cargo().args(["fmt", "--all", "--check"]),
    )?;
    progress.run(
        "checking the format of the bare-metal guests",
        guest::metal_cargo().args(["fmt", "--check"]),
    )?;
    Ok(Counts::one(true))
}

fn lints(progress: &Progress) -> Result<Counts> {
    progress.run(
        "checking for lints",
        cargo().args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "--deny",
            "warnings",
        ]),
    )?;
    progress.run(
        "checking the bare-metal guests for lints",
        guest::metal_cargo().args(["clippy", "--release", "--", "--deny", "warnings"]),
    )?;
    Ok(Counts::one(true))
}

fn crate_dependencies(progress: &Progress) -> Result<Counts> {
    let metadata = progress.capture(
        "checking which crate uses which",
        cargo().args(["metadata", "--no-deps", "--format-version", "1"]),
    )?;
    let mut violations = dependencies::violations(&metadata)?;
    let lock = std::fs::read_to_string(programs::workspace().join("Cargo.lock"))
        .context("cannot read Cargo.lock")?;
    violations.extend(dependencies::below_floor(&lock));
    let all = progress.capture(
        "checking licences",
        cargo().args(["metadata", "--locked", "--format-version", "1"]),
    )?;
    let deny = std::fs::read_to_string(programs::workspace().join("deny.toml"))
        .context("cannot read deny.toml")?;
    violations.extend(dependencies::licences(&all, &deny)?);
    if !violations.is_empty() {
        bail!("{}", violations.join("\n"));
    }
    Ok(Counts::one(true))
}

fn unit_tests(progress: &Progress) -> Result<Counts> {
    let mut command = cargo();
    command.args([
        "test",
        "--workspace",
        "--no-fail-fast",
        "--exclude",
        SYSTEM_TESTS,
    ]);
    counted(progress, "running the unit tests", &mut command)
}

/// Runs a command that prints libtest's results. Its output is shown only if something failed.
fn counted(progress: &Progress, what: &str, command: &mut Command) -> Result<Counts> {
    let step = progress.step(what);
    let (reader, writer) = std::io::pipe()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    // The command holds the pipe's other end until it is replaced.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut output = String::new();
    for line in BufReader::new(reader).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        step.note(line.trim_end());
        output.push_str(&line);
        output.push('\n');
    }
    let success = child.wait()?.success();
    let counts = Counts::of_output(&output, success);
    if counts.failed == 0 {
        step.done(&counts.to_string());
    } else {
        step.failed();
        eprintln!("{output}");
    }
    Ok(counts)
}

/// What the tests find the system under test by.
fn environment(progress: &Progress, built: &Built) -> Result<Environment> {
    let MetalPaths { probe, adversary } = guest::metal(progress)?;
    Ok(BTreeMap::from([
        ("LEPTON_VMM", built.programs.path("lepton-vmm")?.into()),
        (
            "LEPTON_JAILER",
            built.programs.path("lepton-jailer")?.into(),
        ),
        ("LEPTON_CLI", built.programs.path("lepton")?.into()),
        ("LEPTON_KERNEL", built.kernel.vmlinux.clone()),
        ("LEPTON_BZIMAGE", built.kernel.bzimage.clone()),
        ("LEPTON_IMAGE", built.image.clone()),
        ("LEPTON_PROBE", probe),
        ("LEPTON_ADVERSARY", adversary),
    ]))
}

/// Debian as a guest, which the VMM has to boot as it is.
fn debian(progress: &Progress) -> Result<Environment> {
    let DebianPaths {
        bzimage,
        initrd,
        root,
    } = guest::debian(progress)?;
    Ok(BTreeMap::from([
        ("LEPTON_DEBIAN_KERNEL", bzimage),
        ("LEPTON_DEBIAN_INITRD", initrd),
        ("LEPTON_DEBIAN_ROOT", root),
    ]))
}

/// The programs with tests of the whole system, by name.
fn test_programs(progress: &Progress) -> Result<BTreeMap<String, PathBuf>> {
    let messages = progress.capture(
        "building the tests of the whole system",
        cargo()
            .args(["test", "--package", SYSTEM_TESTS, "--no-run"])
            .arg("--message-format=json-render-diagnostics"),
    )?;
    programs::executables(&String::from_utf8_lossy(&messages))
}

fn lab_variables(environment: &Environment) -> Vec<(OsString, OsString)> {
    let mut variables = lab::environment(&[]);
    variables.extend(
        environment
            .iter()
            .map(|(name, path)| (OsString::from(name), OsString::from(path))),
    );
    variables
}

/// Installs what tests in the lab use of its host, which is this machine's files.
fn lab_packages(progress: &Progress) {
    // A test that does without says so, and what.
    if let Err(error) = packages::ensure(progress, "the tests in the lab", &LAB_PACKAGES) {
        eprintln!("{error:#}");
    }
}

/// Runs one test program in a lab of its own, with the programs as they are shipped and more variables.
pub fn in_lab(
    progress: &Progress,
    program: &str,
    more: &[(&str, String)],
    patience: Duration,
) -> Result<Counts> {
    let built = Built::get(progress, Profile::Release)?;
    lab_packages(progress);
    let mut variables = lab_variables(&environment(progress, &built)?);
    variables.extend(more.iter().map(|(name, value)| (name.into(), value.into())));
    let path = test_programs(progress)?.remove(program);
    let path = path.with_context(|| format!("cargo built no {program}"))?;
    let folder = programs::workspace().join("tests");
    lab_tests::run(&[(program.to_owned(), path)], &folder, &variables, patience)
}

/// Tests on booted machines: `lab_*` in the lab, the others on this machine.
fn system_tests(
    progress: &Progress,
    environment: &Environment,
    only: &[String],
    check: &mut impl FnMut(Result<Counts>),
) {
    let programs = match test_programs(progress) {
        Ok(programs) => programs,
        Err(error) => return check(Err(error)),
    };
    let trace = only.is_empty() || only.iter().any(|word| word == used_calls::NAME);
    let all: Option<Vec<Program>> = trace.then(|| programs.clone().into_iter().collect());
    let (in_lab, here): (Vec<Program>, Vec<Program>) = programs
        .into_iter()
        .filter(|(name, _)| only.is_empty() || only.iter().any(|word| name.contains(word)))
        .partition(|(name, _)| name.starts_with("lab_"));
    let folder = programs::workspace().join("tests");
    for (name, path) in here {
        let mut command = Command::new(path);
        command.envs(environment).current_dir(&folder);
        check(counted(progress, &format!("running {name}"), &mut command));
    }
    if let Some(all) = all {
        check(used_calls::run(progress, &all, environment));
    }
    if in_lab.is_empty() {
        return;
    }
    lab_packages(progress);
    let variables = lab_variables(environment);
    let step = progress.step("running the tests in the lab");
    let result = lab_tests::run(&in_lab, &folder, &variables, lab_tests::TIMEOUT);
    match &result {
        Ok(counts) if counts.failed == 0 => step.done(&counts.to_string()),
        _ => step.failed(),
    }
    check(result);
}
