//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};

use crate::bench::{self, BenchArguments};
use crate::cache::Cache;
use crate::check;
use crate::doctor;
use crate::fuzz::{self, FuzzArguments};
use crate::guest;
use crate::lab::{self, Lab, Place, Share, Streams};
use crate::programs::Profile;
use crate::progress::Progress;
use crate::run::{self, Choice};
use crate::selftest::{self, SelftestArguments};
use crate::verify_unique::{self, VerifyUniqueArguments};

/// Builds, runs and tests lepton.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build everything and run a command in a fresh microVM.
    ///
    /// Where /dev/kvm is missing or emulated, the microVM runs in the lab. The exit status is the command's.
    #[command(after_help = "Example: cargo xtask run -- uname -a")]
    Run(RunArguments),

    /// Run all checks: format, lints, unit tests, tests on booted machines here and in the lab.
    Test(TestArguments),

    /// Measure lepton-vmm, as it is shipped, beside other VMMs, and write a report.
    ///
    /// QEMU's microvm machine is always compared with; others are named with --peer. The report is
    /// target/bench/report.html, its numbers are target/bench/results.json.
    #[command(
        after_help = "Example: cargo xtask bench --only start --peer firecracker=/usr/bin/firecracker"
    )]
    Bench(BenchArguments),

    /// Run a command in a software-emulated KVM host.
    ///
    /// The lab has a real /dev/kvm with nested paging on any machine, and the files of this one. What the command
    /// writes is gone afterwards, except in folders given with --share DIR:rw.
    /// What changes in this machine's files meanwhile may not be seen inside.
    #[command(after_help = "Example: cargo xtask lab -- ls -l /dev/kvm")]
    Lab(LabArguments),

    /// Build the guest, or a part of it, and say where it is.
    Guest(guest::GuestArgs),

    /// Attack the VMM from inside a guest on this machine, and say whether it held.
    Selftest(SelftestArguments),

    /// Look for input that breaks the code which takes it, by libFuzzer, or list what there is to be broken.
    #[command(after_help = "Example: cargo xtask fuzz http --seconds 60")]
    Fuzz(FuzzArguments),

    /// Clone a Linux guest many times in the lab, and count what two copies have in common.
    VerifyUnique(VerifyUniqueArguments),

    /// Say what this machine can do, and how to mend what it lacks.
    Doctor,
}

#[derive(Debug, Args)]
struct RunArguments {
    /// Use this machine's /dev/kvm, whatever it is
    #[arg(long, conflicts_with = "lab")]
    direct: bool,

    /// Use the lab, even where /dev/kvm would do
    #[arg(long)]
    lab: bool,

    /// Build the programs as they are shipped
    #[arg(long)]
    release: bool,

    /// Memory of the microVM
    #[arg(long, value_name = "MIB")]
    memory: Option<OsString>,

    /// CPUs of the microVM
    #[arg(long, value_name = "N")]
    vcpus: Option<OsString>,

    /// Show the guest's serial console on standard error
    #[arg(long)]
    console: bool,

    /// The command to run in the microVM and its arguments; a shell if there is none
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Debug, Args)]
struct TestArguments {
    /// Only what needs no guest
    #[arg(long)]
    fast: bool,

    /// Test the programs as they are shipped
    #[arg(long)]
    release: bool,

    /// Only these: format, lints, dependencies, unsafe, units, calls, instructions, shipped, fuzz, lab, or a word in the names of system test programs
    #[arg(value_name = "WORD", conflicts_with = "fast")]
    only: Vec<String>,
}

#[derive(Debug, Args)]
struct LabArguments {
    /// One instruction is one nanosecond and every run takes the same time; the command sees only its --payload
    #[arg(long, conflicts_with_all = ["share", "cpus"])]
    icount: bool,

    /// A file for a command under --icount: a static program, a kernel, a configuration
    #[arg(long, value_name = "FILE", requires = "icount", num_args = 1..)]
    payload: Vec<PathBuf>,

    /// Show a folder as it is instead of through the overlay; with :rw, what is written there lasts
    #[arg(long, value_name = "DIR[:rw]", value_parser = parse_share)]
    share: Vec<Share>,

    /// End the lab after this long; 0 for never [default: 900, or never at a terminal]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,

    /// Memory of the lab
    #[arg(long, value_name = "MIB", default_value_t = lab::DEFAULT_MEMORY_MIB, value_parser = clap::value_parser!(u32).range(256..=1 << 20))]
    memory: u32,

    /// CPUs for programs in the lab, which has one more
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,

    /// Pass an environment variable on, besides the usual ones
    #[arg(long, value_name = "NAME")]
    env: Vec<String>,

    /// Say at the end how long the lab took to start and the command to run
    #[arg(long)]
    time: bool,

    /// The command and its arguments; a shell if there is none
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// `DIR` or `DIR:rw`.
fn parse_share(text: &str) -> Result<Share, String> {
    let (folder, writable) = match text.strip_suffix(":rw") {
        Some(folder) => (folder, true),
        None => (text, false),
    };
    let folder = std::fs::canonicalize(folder).map_err(|error| format!("{folder}: {error}"))?;
    if !folder.is_dir() {
        return Err(format!("{}: not a folder", folder.display()));
    }
    Ok(Share { folder, writable })
}

/// Does what was asked, and returns the exit status to end with.
pub fn run(arguments: Arguments) -> Result<u8> {
    match arguments.command {
        Command::Run(arguments) => run_guest(arguments),
        Command::Test(arguments) => check::run(arguments.fast, arguments.release, &arguments.only),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Lab(arguments) => run_lab(arguments),
        Command::Guest(arguments) => guest::run(arguments),
        Command::Selftest(arguments) => selftest::run(&arguments),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
        Command::VerifyUnique(arguments) => verify_unique::run(&arguments),
        Command::Doctor => doctor::run(),
    }
}

fn run_guest(arguments: RunArguments) -> Result<u8> {
    let choice = match (arguments.direct, arguments.lab) {
        (true, _) => Choice::Direct,
        (false, true) => Choice::Lab,
        (false, false) => Choice::Automatic,
    };
    let profile = if arguments.release {
        Profile::Release
    } else {
        Profile::Dev
    };
    let options = [("--memory", arguments.memory), ("--vcpus", arguments.vcpus)];
    let mut options: Vec<OsString> = options
        .into_iter()
        .filter_map(|(name, value)| value.map(|value| [OsString::from(name), value]))
        .flatten()
        .collect();
    if arguments.console {
        options.push("--console".into());
    }
    run::run(choice, profile, options, arguments.command)
}

fn run_lab(arguments: LabArguments) -> Result<u8> {
    let streams = if arguments.icount {
        Streams::Pipes {
            input: false,
            output: lab::stdout()?,
            error: lab::stderr()?,
        }
    } else {
        Streams::inherited()?
    };
    let timeout = match (arguments.timeout, &streams) {
        (Some(0), _) | (None, Streams::Terminal) => None,
        (Some(seconds), _) => Some(Duration::from_secs(seconds)),
        (None, Streams::Pipes { .. }) => Some(Duration::from_secs(900)),
    };
    let mut command = arguments.command;
    if command.is_empty() {
        if arguments.icount {
            bail!("--icount needs a command: cargo xtask lab --icount --payload FILE -- COMMAND");
        }
        command.push(std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into()));
    }
    let place = if arguments.icount {
        Place::Counted {
            payload: arguments.payload,
        }
    } else {
        Place::Host {
            directory: std::env::current_dir().context("cannot tell the working directory")?,
            shares: arguments.share,
            cpus: arguments.cpus,
        }
    };
    let lab = Lab {
        command,
        environment: lab::environment(&arguments.env),
        place,
        memory_mib: arguments.memory,
        timeout,
    };
    let outcome = lab.run(&Cache::open()?, &Progress::new(), streams)?;
    if arguments.time {
        lab::report(&outcome, std::io::stderr())?;
    }
    Ok(outcome.status)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn shares_are_folders() {
        assert_eq!(
            parse_share("/tmp:rw"),
            Ok(Share {
                folder: "/tmp".into(),
                writable: true
            })
        );
        assert!(parse_share("/proc/version").is_err());
        assert!(parse_share("/nonexistent").is_err());
    }

    #[test]
    fn arguments_of_the_command_are_its_own() {
        let parsed =
            Arguments::try_parse_from(["x", "lab", "--time", "--", "ls", "--time", "-l"]).unwrap();
        let Command::Lab(lab) = parsed.command else {
            panic!("not the lab")
        };
        assert!(lab.time);
        assert_eq!(lab.command, ["ls", "--time", "-l"]);
    }

    #[test]
    fn the_dashes_before_the_command_may_be_left_out() {
        for line in [
            ["x", "run", "--lab", "ls", "--lab"].as_slice(),
            &["x", "run", "--lab", "--", "ls", "--lab"],
        ] {
            let parsed = Arguments::try_parse_from(line).unwrap();
            let Command::Run(run) = parsed.command else {
                panic!("not run")
            };
            assert!(run.lab && !run.direct);
            assert_eq!(run.command, ["ls", "--lab"]);
        }
        assert!(Arguments::try_parse_from(["x", "run", "--unknown", "ls"]).is_err());
    }

    #[test]
    fn counted_labs_have_no_shares() {
        assert!(
            Arguments::try_parse_from(["x", "lab", "--icount", "--share", "/tmp", "--", "true"])
                .is_err()
        );
        assert!(
            Arguments::try_parse_from(["x", "lab", "--payload", "/bin/true", "--", "true"])
                .is_err()
        );
    }
}
