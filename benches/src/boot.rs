//! A Linux guest's way to its init.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use tempfile::TempDir;

use crate::Sides;
use crate::stats::Series;
use crate::vmm::{Running, configuration, from_file};

/// What init says.
const SAYS: &str = "init-runs";

/// The Linux that is booted.
#[derive(Args)]
pub struct Linux {
    /// Kernel of ours.
    #[arg(long)]
    kernel: PathBuf,
    /// Kernel of the peer's, if another.
    #[arg(long)]
    peer_kernel: Option<PathBuf>,
    /// Root image; it has /bin/echo.
    #[arg(long)]
    image: PathBuf,
    /// Its file system.
    #[arg(long, default_value = "erofs")]
    file_system: String,
}

/// Times from spawning to init's first output, and to the reaping of the VMM.
fn measure(
    vmm: &Path,
    kernel: &Path,
    linux: &Linux,
    memory: u64,
) -> io::Result<(Duration, Duration)> {
    let folder = TempDir::new()?;
    let mut config = configuration(kernel, memory);
    config["boot-source"]["boot_args"] = json!(format!(
        "console=ttyS0 quiet reboot=k panic=-1 rootfstype={} init=/bin/echo -- {SAYS}",
        linux.file_system
    ));
    config["drives"] = json!([{
        "drive_id": "rootfs", "path_on_host": linux.image, "is_root_device": true, "is_read_only": true,
    }]);
    let mut command = from_file(vmm, folder.path(), &config)?;
    let started = Instant::now();
    let mut running = Running(command.spawn()?);
    let mut out = running.0.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut console = Vec::new();
    let mut byte = [0];
    while !console.ends_with(SAYS.as_bytes()) {
        if out.read(&mut byte)? == 0 {
            let console = String::from_utf8_lossy(&console).into_owned();
            return Err(io::Error::other(format!("no init; console: {console}")));
        }
        console.push(byte[0]);
    }
    let init = started.elapsed();
    io::copy(&mut out, &mut io::sink())?;
    running.0.wait()?;
    Ok((init, started.elapsed()))
}

/// Boots each side in turn.
pub fn boot(sides: &Sides, linux: &Linux) -> Result<(), String> {
    let mut all: Vec<_> = sides
        .list()
        .into_iter()
        .map(|(side, vmm)| (side, vmm, Series::default(), Series::default()))
        .collect();
    for _ in 0..sides.rounds {
        for (side, vmm, init, life) in &mut all {
            let kernel = match (*side, &linux.peer_kernel) {
                ("peer", Some(kernel)) => kernel,
                _ => &linux.kernel,
            };
            let (to_init, whole) =
                measure(vmm, kernel, linux, sides.memory).map_err(|e| format!("{side}: {e}"))?;
            init.push(to_init);
            life.push(whole);
        }
    }
    println!("{}", Series::header());
    for (side, _, init, life) in &all {
        println!("{}", init.line(&format!("{side}: start to init's output")));
        println!("{}", life.line(&format!("{side}: start to end")));
    }
    Ok(())
}
