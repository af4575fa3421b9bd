//! `cargo xtask bench`: builds the harness and what it measures, and hands over to it.
//!
//! The harness is `lepton-bench` (the crate `benches`). What is shipped, and so measured, is the static release build.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

use crate::check::instructions;
use crate::guest;
use crate::host::Kvm;
use crate::packages;
use crate::programs::{self, Profile, Programs};
use crate::progress::Progress;

/// Name and one line about each benchmark. The harness has the same file, and tests that it is true.
const BENCHMARKS: &str = include_str!("../../benches/benchmarks.txt");
/// Whom the harness can compare with.
const PEERS: [&str; 3] = ["firecracker", "cloud-hypervisor", QEMU];
const QEMU: &str = "qemu";
/// The benchmarks that need a Linux guest.
const LINUX: [&str; 3] = ["boot", "unique", "parity"];
const QEMU_PACKAGES: [&str; 1] = ["qemu-system-x86"];

#[derive(Debug, Args)]
pub struct BenchArguments {
    /// Only these benchmarks, or figures of them: clone, clone.pause-1g
    #[arg(long, value_name = "NAME", num_args = 1.., value_parser = parse_name)]
    only: Vec<String>,

    /// Compare with this VMM too: firecracker, cloud-hypervisor, or a QEMU other than Debian's
    #[arg(long, value_name = "NAME=PATH", value_parser = parse_peer)]
    peer: Vec<String>,

    /// Rounds of each benchmark, instead of its own number
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: Option<u32>,

    /// End with status 1 if anything failed to be measured
    #[arg(long)]
    strict: bool,

    /// List the benchmarks
    #[arg(long)]
    list: bool,

    /// Count the instructions of the hot paths and of a boot instead, and compare them with benches/baseline.json
    #[arg(long, conflicts_with_all = ["only", "peer", "rounds", "strict", "list"])]
    instructions: bool,

    /// Make the counted instructions the new benches/baseline.json
    #[arg(long, requires = "instructions")]
    accept: bool,
}

fn names() -> impl Iterator<Item = &'static str> {
    let lines = BENCHMARKS.lines().filter_map(|line| line.split_once(": "));
    lines.map(|(name, _)| name)
}

/// The name of the benchmark that gives a figure.
fn benchmark_of(text: &str) -> &str {
    text.split_once('.').map_or(text, |(name, _)| name)
}

fn parse_name(text: &str) -> Result<String, String> {
    // Which figures it has is told by the harness.
    if names().any(|name| name == benchmark_of(text)) {
        return Ok(text.to_owned());
    }
    let all: Vec<&str> = names().collect();
    Err(format!("benchmarks are {}", all.join(", ")))
}

fn parse_peer(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, path)) if PEERS.contains(&name) && !path.is_empty() => Ok(text.to_owned()),
        None if text == QEMU => Ok(text.to_owned()),
        None if PEERS.contains(&text) => Err(format!("where is it? type --peer {text}=PATH")),
        _ => Err(format!("type NAME=PATH; names are {}", PEERS.join(", "))),
    }
}

/// Builds what is missing and measures. Does not return but by an error, or with the list that was asked for.
pub fn run(arguments: &BenchArguments) -> Result<u8> {
    if arguments.list {
        print!("{BENCHMARKS}");
        return Ok(0);
    }
    let progress = Progress::new();
    if arguments.accept {
        instructions::accept(&progress)?;
        return Ok(0);
    }
    if arguments.instructions {
        let counts = instructions::run(&progress)?;
        return Ok(u8::from(counts.failed > 0));
    }
    let built = Programs::build(
        &progress,
        Profile::Release,
        &["lepton-vmm", "lepton-jailer", "lepton-benches"],
    )?;
    let mut peers = arguments.peer.clone();
    if !peers
        .iter()
        .any(|peer| peer.split('=').next() == Some(QEMU))
    {
        peers.push(QEMU.to_owned());
    }
    if peers.iter().any(|peer| peer == QEMU) {
        // Without it the rest still tells something, and the report says that it was not there.
        if let Err(error) = packages::ensure(&progress, "the comparison with QEMU", &QEMU_PACKAGES)
        {
            eprintln!("{error:#}");
        }
    }
    let harness = built.path("lepton-bench")?;
    let mut command = Command::new(harness);
    command.args(&arguments.only);
    let only: Vec<&str> = arguments
        .only
        .iter()
        .map(|text| benchmark_of(text))
        .collect();
    let chosen = |name: &str| only.is_empty() || only.contains(&name);
    if LINUX.into_iter().any(chosen) && Kvm::of_this_machine() == Kvm::Hardware {
        let agent = Programs::build(&progress, Profile::Release, &["lepton-agent"])?;
        command
            .arg("--kernel")
            .arg(guest::kernel(&progress)?.vmlinux);
        let image = guest::image(&progress, agent.path("lepton-agent")?)?;
        command.arg("--image").arg(image);
    }
    // Most benchmarks need it, and it is built in seconds.
    command.arg("--probe").arg(guest::metal(&progress)?.probe);
    command.arg("--vmm").arg(built.path("lepton-vmm")?);
    for peer in &peers {
        command.args(["--peer", peer]);
    }
    if let Some(rounds) = arguments.rounds {
        command.args(["--rounds", &rounds.to_string()]);
    }
    if arguments.strict {
        command.arg("--strict");
    }
    command
        .arg("--out")
        .arg(programs::workspace().join("target/bench"));
    // Ctrl-C is the harness's business: it ends its children and writes what it has.
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start {}", harness.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_name_is_answered_with_all_names() {
        for name in ["start", "start.socket"] {
            assert_eq!(parse_name(name), Ok(name.to_owned()));
        }
        assert!(parse_name("strat").unwrap_err().contains("start, weight"));
    }

    #[test]
    fn peers_are_named_with_their_programs() {
        for good in [
            "qemu",
            "qemu=/bin/q",
            "firecracker=fc",
            "cloud-hypervisor=ch",
        ] {
            assert_eq!(parse_peer(good), Ok(good.to_owned()));
        }
        assert!(
            parse_peer("firecracker")
                .unwrap_err()
                .contains("--peer firecracker=PATH")
        );
        for bad in ["crosvm=x", "firecracker=", "=", ""] {
            let error = parse_peer(bad).unwrap_err();
            assert!(
                error.contains("firecracker, cloud-hypervisor, qemu"),
                "{error}"
            );
        }
    }
}
