//! A guest that measures: modes chosen on the command line, one after the other, with results on the serial port.
//!
//! A result is a line `PROBE {...}` of JSON. Times are ticks of the time stamp counter. After the last one the machine
//! is reset.
//!
//! | `probe.mode=` | what it does | further arguments, each with `probe.` before it |
//! |---|---|---|
//! | `reset` | nothing | |
//! | `idle` | says so, then stops the processor for good | |
//! | `port_write`, `port_read`, `mmio_write`, `mmio_read`, `kick` | leaves the guest again and again | `count`, `port` |
//! | `touch` | writes, then reads memory | `mib`, `stride` |
//! | `churn` | writes memory, says so, then writes the first `kib` of it for ever | `mib`, `kib` |
//! | `blk_check` | writes all of a drive, then reads and checks it, again and again with other data; ends at the first difference | `drive`, `qd`, `size`, `seed` |
//! | `blk_read`, `blk_write`, `blk_flush` | drives a drive | `drive`, `pattern=sequential\|random`, `qd`, `size`, `verify`, `seed` |
//! | `net_tx` | sends UDP frames, or TCP frames to be cut into segments | `interface`, `size`, `qd`, `ip`, `port`, `peer`, `peer_port`, `peer_mac`, `offload` |
//! | `net_rx`, `net_echo` | counts UDP frames to `port`, or sends them back | as above; a first 64-bit word of all ones ends it |
//! | `vsock_tx`, `vsock_rx`, `vsock_echo` | streams to and from the host | `port`, `connections`, `listen`, `size`, `verify` |
//! | `vsock_confirm` | waits to be told who it is, says what it was told, and confirms | `port`, with `listen=1` |
//!
//! Several modes, with commas between them, share their arguments.
//!
//! All that repeat something do so `count` times, or for `seconds` (`tsc_khz` says how long a second is).
//! `probe.copied=1` waits, as soon as a device is started or else before the mode's work, until the machine is a copy of the one
//! that booted. `probe.find=acpi` finds the devices by ACPI even if the command line has them. `probe.event_idx=0` does without
//! that feature, `probe.interrupts=1` asks for interrupts that nobody takes.
//!
//! It runs unchanged in other VMMs that boot an ELF file with the PVH entry: Firecracker, and QEMU by
//! `qemu-system-x86_64 -M microvm,accel=kvm -cpu host -m 128 -nodefaults -nographic -no-reboot -serial stdio -global
//! virtio-mmio.force-legacy=false -kernel probe -append probe.mode=... -drive id=d,file=d.img,format=raw,if=none -device
//! virtio-blk-device,drive=d`.

#![no_std]
#![no_main]

mod blk;
mod exits;
mod net;
mod report;
mod touch;
mod vsock;

use guest::{arguments, boot, copied, program, say};

program!(main);

fn main() {
    let modes = arguments::text("mode").unwrap_or("reset");
    modes.split(',').for_each(run);
}

fn run(mode: &str) {
    match mode {
        "reset" => {}
        "idle" => {
            copied::wait();
            say!("PROBE {{\"mode\":\"idle\"}}");
            boot::halt()
        }
        "port_write" | "port_read" | "mmio_write" | "mmio_read" | "kick" => exits::run(mode),
        "touch" => touch::run(),
        "churn" => touch::churn(),
        "blk_read" | "blk_write" | "blk_flush" | "blk_check" => blk::run(mode),
        "net_tx" | "net_rx" | "net_echo" => net::run(mode),
        "vsock_tx" | "vsock_rx" | "vsock_echo" | "vsock_confirm" => vsock::run(mode),
        _ => report::refuse("there is no such mode"),
    }
}
