//! Resident memory beyond the guest's own.

use std::path::Path;

use super::{Case, Context, Place, Reading, UP, UP_IN_WORDS, for_each, net, probe, vsock};
use crate::guest::Guest;
use crate::machine::{Drive, Engine, Machine};
use crate::process::Failure;
use crate::side::{Driver, Means};

const BARE: &str = "weight.bare";
const DRIVE: &str = "weight.drive";
const DEVICES: &str = "weight.devices";
const BUSY: &str = "weight.after-io";
const PROGRAM: &str = "weight.program";

/// Each device under load, one after the other, then nothing any more.
const EVERYTHING: &str = "probe.mode=blk_write,blk_read,net_echo,vsock_tx,idle probe.pattern=random probe.size=4096 \
     probe.qd=128 probe.seconds=2 probe.connections=32";
/// What the guest says then.
const DONE: &[u8] = b"\"mode\":\"idle\"";

/// All of it.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    let patience = context.patience;
    let mut all = for_each(context, &[BARE], move |driver| {
        let place = Place::new(Guest::Idle, patience)?;
        let machine = place.machine();
        weigh(driver, &place, &machine, BARE)
    });
    all.extend(for_each(context, &[DRIVE], move |driver| {
        let place = Place::new(Guest::Idle, patience)?;
        let mut machine = place.machine();
        machine.drives.push(sparse_drive(&place, "drive")?);
        weigh(driver, &place, &machine, DRIVE)
    }));
    all.extend(for_each(context, &[DEVICES], move |driver| {
        with_devices(context, driver)
    }));
    all.extend(for_each(context, &[BUSY], move |driver| {
        after_io(context, driver)
    }));
    all.extend(context.sides.iter().filter_map(|side| match side.means {
        Means::Vmm(_) => Some(Case {
            side,
            at: None,
            figures: &[PROGRAM],
            run: Box::new(|| size_of_file(&side.program)),
        }),
        Means::Floor(_) | Means::Calls => None,
    }));
    all
}

/// A drive of 64 MiB of zeroes without blocks.
pub fn sparse_drive(place: &Place, name: &str) -> Result<Drive, Failure> {
    let path = place.folder().join(name);
    std::fs::File::create(&path)?.set_len(64 << 20)?;
    Ok(Drive {
        path,
        root: false,
        read_only: false,
        engine: Engine::Sync,
    })
}

fn with_devices(context: &Context, driver: &dyn Driver) -> Result<Vec<Reading>, Failure> {
    let place = Place::new(Guest::Idle, context.patience)?;
    let mut machine = place.machine();
    machine.drives.push(sparse_drive(&place, "drive")?);
    machine.taps = context.taps(1)?;
    machine.vsock = Some(place.folder().join("v.sock"));
    weigh(driver, &place, &machine, DEVICES)
}

/// The machine with all devices, when its guest has used them.
fn after_io(context: &Context, driver: &dyn Driver) -> Result<Vec<Reading>, Failure> {
    if !driver.has_mmio_devices() {
        return Err(Failure::NotOffered(
            "the probe drives devices of virtio-mmio".to_owned(),
        ));
    }
    let place = Place::new(Guest::Reset, context.patience)?;
    let mut machine = place.machine();
    machine.kernel = probe::program(context)?;
    machine.command_line = format!(
        "{EVERYTHING} probe.port={} probe.tsc_khz={}",
        vsock::PORT,
        probe::tsc_khz()?
    );
    machine.drives.push(sparse_drive(&place, "drive")?);
    machine.taps = context.taps(1)?;
    let listener = vsock::listener(&place)?;
    machine.vsock = Some(vsock::socket(&place));
    let mut running = place.boots(driver, &machine)?;
    for tap in &machine.taps {
        net::play_32(tap, &mut running)?;
    }
    vsock::take_32(&running, &listener)?;
    running.says(DONE, "the end of the guest's work")?;
    let value = resident_beyond_guest(running.pid())?;
    Ok(vec![Reading {
        figure: BUSY,
        value,
    }])
}

fn weigh(
    driver: &dyn Driver,
    place: &Place,
    machine: &Machine,
    figure: &'static str,
) -> Result<Vec<Reading>, Failure> {
    let mut running = place.boots(driver, machine)?;
    running.says(UP, UP_IN_WORDS)?;
    let value = resident_beyond_guest(running.pid())?;
    Ok(vec![Reading { figure, value }])
}

/// Mappings of at least this are guest memory: no machine here has less, and none of the VMMs maps as much for itself.
const GUEST_KIB: u64 = 128 << 10;

/// Resident memory of a process but the guest's, in KiB.
pub fn resident_beyond_guest(pid: u32) -> Result<f64, Failure> {
    sum_beyond_guest(pid, &["Rss:"])
}

/// What of it is this process's alone.
pub fn own_beyond_guest(pid: u32) -> Result<f64, Failure> {
    sum_beyond_guest(pid, &["Private_Clean:", "Private_Dirty:"])
}

fn sum_beyond_guest(pid: u32, fields: &[&str]) -> Result<f64, Failure> {
    let path = format!("/proc/{pid}/smaps");
    let maps = std::fs::read_to_string(&path)
        .map_err(|error| Failure::because(format!("{path}: {error}")))?;
    match beyond_guest(&maps, fields) {
        Some(kib) => Ok(kib as f64),
        None => Err(Failure::because(
            "no mapping is as large as the guest's memory",
        )),
    }
}

/// The sum of these fields of all mappings but the guest's memory (proc_pid_smaps(5)).
fn beyond_guest(maps: &str, fields: &[&str]) -> Option<u64> {
    let mut guests = 0;
    let mut is_guest = false;
    let mut sum = 0;
    for line in maps.lines() {
        let field = |name: &str| {
            let rest = line.strip_prefix(name)?;
            rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
        };
        if let Some(size) = field("Size:") {
            is_guest = size >= GUEST_KIB;
            guests += u32::from(is_guest);
        } else if !is_guest {
            sum += fields.iter().find_map(|name| field(name)).unwrap_or(0);
        }
    }
    (guests > 0).then_some(sum)
}

fn size_of_file(program: &Path) -> Result<Vec<Reading>, Failure> {
    let bytes = std::fs::metadata(program)?.len();
    Ok(vec![Reading {
        figure: PROGRAM,
        value: bytes as f64 / 1024.0,
    }])
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
7f0000000000-7f0008000000 rw-p 00000000 00:00 0 
Size:             131072 kB
KernelPageSize:        4 kB
Rss:                  64 kB
Private_Dirty:        64 kB
7f0010000000-7f0010001000 r-xp 00000000 08:01 12 /bin/vmm
Size:                 40 kB
Rss:                  24 kB
Private_Clean:         4 kB
Private_Dirty:         0 kB
7f0020000000-7f0020001000 rw-p 00000000 00:00 0 [heap]
Size:                  8 kB
Rss:                   8 kB
Private_Clean:         0 kB
Private_Dirty:         8 kB
";

    #[test]
    fn guest_memory_is_not_weighed() {
        assert_eq!(beyond_guest(MAPS, &["Rss:"]), Some(32));
        let own = ["Private_Clean:", "Private_Dirty:"];
        assert_eq!(beyond_guest(MAPS, &own), Some(12));
    }

    #[test]
    fn without_guest_memory_nothing_is_said() {
        let rest = MAPS.split_once("/bin/vmm").unwrap().1;
        assert_eq!(beyond_guest(rest, &["Rss:"]), None);
    }
}
