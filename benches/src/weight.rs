//! Resident memory of an idle machine beyond its guest's.

use std::io::{self, Read};
use std::path::Path;
use std::process::Stdio;

use serde_json::json;
use tempfile::TempDir;

use crate::Sides;
use crate::guest::Program;
use crate::vmm::{Running, configuration, from_file};

const DRIVE: u64 = 64 << 20;

/// Sums up `Rss` of all mappings of process `pid` but those as large as the guest's memory, in KiB.
fn resident(pid: u32, memory_mib: u64) -> io::Result<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut is_guest = false;
    let mut sum = 0;
    for line in maps.lines() {
        let field = |name: &str| {
            let rest = line.strip_prefix(name)?;
            rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
        };
        if let Some(size) = field("Size:") {
            is_guest = size == memory_mib << 10;
        } else if let Some(rss) = field("Rss:").filter(|_| !is_guest) {
            sum += rss;
        }
    }
    Ok(sum)
}

fn measure(vmm: &Path, memory: u64, tap: Option<&str>) -> io::Result<u64> {
    let folder = TempDir::new()?;
    let kernel = Program::Idle.write(folder.path())?;
    let drive = folder.path().join("drive");
    std::fs::File::create(&drive)?.set_len(DRIVE)?;
    let mut config = configuration(&kernel, memory);
    config["drives"] = json!([{
        "drive_id": "a", "path_on_host": drive, "is_root_device": false, "is_read_only": false,
    }]);
    config["vsock"] = json!({"guest_cid": 3, "uds_path": folder.path().join("v.sock")});
    if let Some(tap) = tap {
        config["network-interfaces"] = json!([{"iface_id": "eth0", "host_dev_name": tap}]);
    }
    let mut command = from_file(vmm, folder.path(), &config)?;
    let running = Running(command.stdout(Stdio::null()).spawn()?);
    // The machine runs once its vCPU thread burns or waits in KVM; the socket's existence comes before that, so wait
    // for the thread.
    let pid = running.0.id();
    wait_for_vcpu(pid)?;
    resident(pid, memory)
}

/// Waits until a thread whose name has "vcpu" exists and has run.
fn wait_for_vcpu(pid: u32) -> io::Result<()> {
    for _ in 0..1_000_000 {
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            let mut name = String::new();
            std::fs::File::open(task.join("comm"))?.read_to_string(&mut name)?;
            let status = std::fs::read_to_string(task.join("status"))?;
            let switched = status
                .lines()
                .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"))
                .is_some_and(|n| n.trim() != "0");
            if name.contains("vcpu") && switched {
                return Ok(());
            }
        }
        std::thread::yield_now();
    }
    Err(io::Error::other("no vCPU thread"))
}

/// Prints the weight of each side, the median of the rounds.
pub fn weight(sides: &Sides, tap: Option<&str>) -> Result<(), String> {
    for (side, vmm) in sides.list() {
        let mut all = Vec::new();
        for _ in 0..sides.rounds {
            all.push(measure(&vmm, sides.memory, tap).map_err(|e| format!("{side}: {e}"))?);
        }
        all.sort();
        let median = all.get(all.len() / 2).copied().unwrap_or(0);
        let size = std::fs::metadata(&vmm).map_or(0, |m| m.len());
        println!(
            "{side}: {median} KiB resident beyond the guest's memory; program of {} KiB",
            size >> 10
        );
    }
    Ok(())
}
