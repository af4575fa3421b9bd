//! `lepton-bench`: how long a machine takes to start and how much it weighs, beside a peer's in the same run.
//!
//! Both sides are driven in the same way, by Firecracker's command line, in turn (A B A B ...), so that whatever else
//! the host does hits both. The floor, a program that does nothing but make a KVM machine, is measured in the same turn.

mod boot;
mod floor;
mod guest;
mod stats;
mod vmm;
mod weight;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Measures lepton-vmm, and a peer with the same command line.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start to API socket, start to first guest instruction, whole life; beside the bare KVM program.
    Start(Sides),
    /// Memory of an idle machine with a drive, vsock and, if a tap is named, an interface, beyond the guest's own.
    Weight {
        #[command(flatten)]
        sides: Sides,
        /// A tap that nobody uses.
        #[arg(long)]
        tap: Option<String>,
    },
    /// Start to the first output of a Linux guest's init.
    Boot {
        #[command(flatten)]
        sides: Sides,
        #[command(flatten)]
        linux: boot::Linux,
    },
    /// The bare KVM program itself: make a machine, run one instruction, end.
    Floor {
        /// Interrupt controller of the machine.
        #[arg(long, value_enum, default_value_t = floor::IrqChip::Split)]
        irqchip: floor::IrqChip,
    },
}

/// What is measured against what.
#[derive(Args)]
struct Sides {
    /// The lepton-vmm to measure.
    #[arg(long)]
    vmm: PathBuf,
    /// A VMM with Firecracker's command line to compare with.
    #[arg(long)]
    peer: Option<PathBuf>,
    /// Rounds; in each, every side is measured once.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 128)]
    memory: u64,
}

impl Sides {
    fn list(&self) -> Vec<(&'static str, PathBuf)> {
        let mut list = vec![("lepton", self.vmm.clone())];
        list.extend(self.peer.clone().map(|peer| ("peer", peer)));
        list
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Start(sides) => vmm::start(&sides),
        Command::Weight { sides, tap } => weight::weight(&sides, tap.as_deref()),
        Command::Boot { sides, linux } => boot::boot(&sides, &linux),
        Command::Floor { irqchip } => floor::run(irqchip).map_err(|e| e.to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("lepton-bench: {reason}");
            ExitCode::FAILURE
        }
    }
}
