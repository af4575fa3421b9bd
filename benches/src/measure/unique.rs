//! Copies of a Linux guest that become other machines before anybody hears of them, beside the guest's cold boot. Ours only.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use lepton_tests::programs::hardware_kvm;
use serde_json::json;

use super::clone::Vmm;
use super::linux::{self, Announcement};
use super::{Case, Context, Reading};
use crate::catalogue::{FigureKind, lower};
use crate::guest::Guest;
use crate::process::Failure;
use crate::side::{OURS, Side};

/// All figures.
pub const FIGURES: &[FigureKind] = &[
    lower(
        BOOT,
        "InstanceStart of a Linux guest to its agent's answer, 128 MiB",
        "ms",
    ),
    lower(
        CLONE,
        "PUT /clone of that guest to the answer of the copy's agent, held until it is another machine",
        "ms",
    ),
    lower(SHARE, "The time of the copy as a part of the boot's", "x"),
];

const BOOT: &str = "unique.boot";
const CLONE: &str = "unique.clone";
const SHARE: &str = "unique.share";

/// All of it.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    let ours = context.sides.iter().filter(|side| side.id == OURS);
    ours.map(|side| Case {
        side,
        at: None,
        figures: &[BOOT, CLONE, SHARE],
        run: Box::new(move || run(context, side)),
    })
    .collect()
}

fn run(context: &Context, side: &Side) -> Result<Vec<Reading>, Failure> {
    hardware_kvm().map_err(Failure::NotOffered)?;
    // A machine as others boot it; the one that is cloned has its memory in a file, which costs its boot time.
    let (_, boot) = booted(context, side, false)?;
    let (mut parent, _) = booted(context, side, true)?;
    let child = Vmm::heir(context, side, 128)?;
    let socket = vsock_of(&child);
    let request = json!({ "children": [{
        "adopt_socket": child.adopt, "vsock_override": { "uds_path": socket },
        "identity": { "hostname": "copy", "timeout_ms": context.patience.as_millis() as u64 },
    }] });
    let asked = Instant::now();
    parent.put("/clone", &request)?;
    linux::agent(&socket)?;
    let clone = asked.elapsed();
    let share = clone.as_secs_f64() / boot.as_secs_f64();
    Ok(vec![
        Reading::milliseconds(BOOT, boot),
        Reading::milliseconds(CLONE, clone),
        Reading {
            figure: SHARE,
            value: share,
        },
    ])
}

fn vsock_of(vmm: &Vmm) -> PathBuf {
    vmm.place.folder().join("v.sock")
}

/// Boots a machine, and returns how long its agent took to answer.
fn booted(context: &Context, side: &Side, clonable: bool) -> Result<(Vmm, Duration), Failure> {
    let (kernel, image, file_system) = context.linux.kernel_and_image(side)?;
    let mut vmm = Vmm::new(context, side, Guest::Idle)?;
    let socket = vsock_of(&vmm);
    let arguments = linux::command_line(&format!("{file_system} root=/dev/vda ro init=/sbin/init"));
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": 128, "clonable": clonable });
    let root = json!({
        "drive_id": "root", "path_on_host": image, "is_root_device": true, "is_read_only": true,
    });
    vmm.put("/serial", &json!({ "serial_out_path": "/dev/null" }))?;
    vmm.put(
        "/boot-source",
        &json!({ "kernel_image_path": kernel, "boot_args": arguments }),
    )?;
    vmm.put("/machine-config", &machine)?;
    vmm.put("/drives/root", &root)?;
    vmm.put("/vsock", &json!({ "guest_cid": 3, "uds_path": socket }))?;
    let announcement = Announcement::of(&socket)?;
    let asked = Instant::now();
    vmm.put("/actions", &json!({ "action_type": "InstanceStart" }))?;
    announcement.wait(&vmm.running, context.patience)?;
    linux::agent(&socket)?;
    Ok((vmm, asked.elapsed()))
}
