//! `lepton-bench`: measures our VMM and its peers in turn. `cargo xtask bench` builds it and runs it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use clap::{Parser, ValueEnum};
use lepton_benches::bars;
use lepton_benches::catalogue::{BENCHMARKS, parse_name};
use lepton_benches::host::{self, Host};
use lepton_benches::interrupt;
use lepton_benches::measure::{Context, linux::Linux};
use lepton_benches::report;
use lepton_benches::results::{Absent, Program, Results, VERSION};
use lepton_benches::schedule;
use lepton_benches::side::{self, CALLS, IrqChip, Kind, Peer, Side, parse_peer};
use lepton_benches::text;
use lepton_tests::reaper;

/// Measures lepton-vmm and its peers in turn.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Benchmarks to run, or figures of them; all if none is named
    #[arg(value_name = "BENCHMARK", value_parser = parse_name)]
    only: Vec<&'static str>,

    /// The lepton-vmm to measure
    #[arg(long, value_name = "PATH", required_unless_present = "list")]
    vmm: Option<PathBuf>,

    /// A VMM to compare with: firecracker=PATH, cloud-hypervisor=PATH, qemu or qemu=PATH
    #[arg(long, value_name = "NAME[=PATH]", value_parser = parse_peer)]
    peer: Vec<Peer>,

    /// Rounds of each benchmark, instead of its own number
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: Option<u32>,

    /// Write results.json and report.html into this folder
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,

    /// End with status 1 if anything failed to be measured
    #[arg(long)]
    strict: bool,

    /// The longest that one VMM may take for one measurement
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    patience: u64,

    #[command(flatten)]
    linux: Linux,

    /// The probe guest, for the benchmarks of exits and devices
    #[arg(long, value_name = "PATH")]
    probe: Option<PathBuf>,

    /// The jailer, for the benchmark confinement, unless it is beside the VMM
    #[arg(long, value_name = "PATH")]
    jailer: Option<PathBuf>,

    /// Machines at once, for the benchmark density
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    machines: u32,

    /// List the benchmarks and end
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    if reaper::serves() {
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::parse();
    if arguments.list {
        for benchmark in BENCHMARKS {
            println!("{:<10} {}", benchmark.name, benchmark.about());
        }
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(code) => code,
        Err(reason) => {
            eprintln!("lepton-bench: {reason}");
            ExitCode::FAILURE
        }
    }
}

/// Our sides and the peers that are there; those that are not, with the reason.
fn sides(arguments: &Arguments) -> Result<(Vec<Side>, Vec<Absent>), String> {
    let vmm = arguments.vmm.as_deref().unwrap_or(Path::new("lepton-vmm"));
    let vmm = std::path::absolute(vmm).map_err(|error| error.to_string())?;
    side::version(&vmm)?;
    let mut sides = vec![Side::ours(vmm)];
    let mut absent = Vec::new();
    for peer in &arguments.peer {
        match Side::peer(peer) {
            Ok(side) if sides.iter().any(|other| other.id == side.id) => {
                return Err(format!("--peer {} is given twice", side.id));
            }
            Ok(side) => sides.push(side),
            Err(reason) => {
                let side = peer.kind.id().to_owned();
                eprintln!("{side} is left out: {reason}");
                absent.push(Absent { side, reason });
            }
        }
    }
    for kind in Kind::value_variants() {
        if !arguments.peer.iter().any(|peer| peer.kind == *kind) {
            let side = kind.id().to_owned();
            let reason = format!("not asked for by --peer {side}=PATH");
            absent.push(Absent { side, reason });
        }
    }
    let mut beside = |side: &str, program: &str| {
        let path = beside_us(program).ok()?;
        if path.is_file() {
            return Some(path);
        }
        let reason = format!("there is no program {}", path.display());
        eprintln!("{side} is left out: {reason}");
        let side = side.to_owned();
        absent.push(Absent { side, reason });
        None
    };
    if let Some(floor) = beside("floor", "lepton-floor") {
        for irqchip in [IrqChip::Split, IrqChip::Full] {
            sides.push(Side::floor(floor.clone(), irqchip));
        }
    }
    if let Some(calls) = beside(CALLS, "lepton-calls") {
        sides.push(Side::calls(calls));
    }
    Ok((sides, absent))
}

/// A program of the harness, in the folder of this one.
fn beside_us(program: &str) -> Result<PathBuf, String> {
    let here = std::env::current_exe().map_err(|error| error.to_string())?;
    Ok(here.with_file_name(program))
}

fn describe(side: &Side) -> Program {
    let version = match side.is_vmm() {
        true => side::version(&side.program).unwrap_or_else(|reason| reason),
        false => "of this harness".to_owned(),
    };
    Program {
        side: side.id.to_owned(),
        vmm: side.is_vmm(),
        path: side.program.display().to_string(),
        version,
        sha256: host::sha256(&side.program),
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode, String> {
    interrupt::install().map_err(|error| format!("signals: {error}"))?;
    let started = Instant::now();
    let began = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let host = Host::describe();
    let (sides, absent) = sides(arguments)?;
    let vmms = sides.iter().filter(|side| side.is_vmm()).count();
    let all_there = vmms == 1 + arguments.peer.len();
    let programs = sides.iter().map(describe).collect();
    let context = Context {
        sides,
        patience: Duration::from_secs(arguments.patience),
        linux: arguments.linux.clone(),
        probe: arguments.probe.clone(),
        load: beside_us("lepton-load")?,
        jailer: arguments.jailer.clone(),
        machines: arguments.machines,
        scratch: tempfile::tempdir().map_err(|error| error.to_string())?,
        taps: Default::default(),
    };
    let only = &arguments.only;
    let mut figures = Vec::new();
    let mut interrupted = false;
    for benchmark in BENCHMARKS {
        let whole = only.is_empty() || only.contains(&benchmark.name);
        let chosen = |figure: &str| whole || only.contains(&figure);
        if !benchmark.figures.iter().any(|figure| chosen(figure.id)) {
            continue;
        }
        let rounds = arguments.rounds.unwrap_or(benchmark.rounds);
        let (measured, ended_early) = schedule::run(benchmark, &context, rounds, &chosen);
        figures.extend(measured);
        interrupted = ended_early;
        if interrupted {
            eprintln!("interrupted: what was measured is written");
            break;
        }
    }
    let command: Vec<String> = std::env::args().collect();
    let results = Results {
        version: VERSION,
        began,
        seconds: started.elapsed().as_secs_f64(),
        command: command.join(" "),
        interrupted,
        host: Host {
            load_after: host::load(),
            ..host
        },
        sides: programs,
        absent,
        bars: bars::judge(&figures),
        figures,
    };
    print!("{}", text::tables(&results));
    if let Some(folder) = &arguments.out {
        write(folder, &results)?;
    }
    if interrupted {
        return Ok(ExitCode::from(130));
    }
    let fails = arguments.strict && (results.has_failures() || !all_there);
    Ok(ExitCode::from(u8::from(fails)))
}

fn write(folder: &Path, results: &Results) -> Result<(), String> {
    let json = serde_json::to_string_pretty(results).map_err(|error| error.to_string())?;
    let html = report::html(results).map_err(|error| error.to_string())?;
    let put = |name: &str, text: String| {
        let path = folder.join(name);
        let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, text));
        written.map_err(|error| format!("{}: {error}", path.display()))?;
        println!("{}", path.display());
        Ok::<_, String>(())
    };
    println!();
    put("results.json", json)?;
    put("report.html", html)
}
