//! A host whose storage fails under a running Linux guest: a full file system, a block device with bad sectors, and loop
//! devices whose files are cut.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use lepton_agent::client::ExitStatus;
use lepton_tests::linux::{self, Linux, drive};
use lepton_tests::loop_device::{self, Ext4, LoopDevice};
use lepton_tests::small::SmallFileSystem;
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::test;
use serde_json::{Value, json};

fn main() -> ExitCode {
    suite::run(
        Order::OneByOne,
        &linux::NEEDS,
        [
            test!(a_full_disk_and_bad_sectors_reach_the_guest)
                .of_every_origin()
                .needs(Need::Root)
                .needs(Need::Program("mount"))
                .needs(Need::Program("modprobe")),
            loop_device::NEEDS.into_iter().fold(
                test!(files_cut_under_loop_devices_reach_the_guest).of_every_origin(),
                |test, need| test.needs(need),
            ),
        ],
    )
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// How the VMM's log has these: what C libraries call them differs.
const IO_ERROR: &str = "(os error 5)";
const NO_SPACE: &str = "(os error 28)";

#[track_caller]
fn succeeds(program: &str, arguments: &[&str]) {
    let status = Command::new(program)
        .args(arguments)
        .status()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(status.success(), "{program} {}", arguments.join(" "));
}

/// A block device of 16 MiB in memory with bad sectors (Linux, Documentation/block/null_blk.rst). It goes with this
/// value.
struct BadDevice {
    name: &'static str,
}

impl BadDevice {
    /// Where the bad sectors begin: 512 of them from sector 16384, one entry of the driver's list.
    const BAD_FROM_MIB: usize = 8;

    /// The device `name`: kernels differ in what they call one whose folder is not called `nullb` and a number.
    #[track_caller]
    fn new(name: &'static str) -> Self {
        succeeds("modprobe", &["null_blk", "nr_devices=0"]);
        if !Path::new("/sys/kernel/config/nullb").exists() {
            succeeds("mount", &["-t", "configfs", "config", "/sys/kernel/config"]);
        }
        let device = Self { name };
        fs::create_dir(device.settings()).expect("the driver makes a device");
        for (name, value) in [
            ("size", "16"),
            ("memory_backed", "1"),
            ("badblocks", "+16384-16895"),
            ("power", "1"),
        ] {
            fs::write(device.settings().join(name), value)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        device
    }

    fn settings(&self) -> PathBuf {
        Path::new("/sys/kernel/config/nullb").join(self.name)
    }

    fn path(&self) -> PathBuf {
        Path::new("/dev").join(self.name)
    }
}

impl Drop for BadDevice {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.settings());
    }
}

/// Writes `bytes` at the start of the guest's `device` and flushes them.
#[track_caller]
fn keeps(guest: &Linux, device: &str, bytes: &[u8]) {
    let script = format!("dd of=/dev/{device} bs=65536 oflag=direct conv=fsync 2>&1");
    let output = guest.run(&script, bytes);
    assert_eq!(output.status, ExitStatus::Exited(0), "{device}: {output:?}");
}

/// Runs a command that has to fail for an I/O error, as the command and the guest's kernel see it.
#[track_caller]
fn io_error(guest: &Linux, device: &str, script: &str) {
    guest.sh("dmesg -c > /dev/null");
    let output = guest.run(&format!("{script} 2>&1"), b"");
    assert_ne!(output.status, ExitStatus::Exited(0), "{device}: {output:?}");
    assert!(
        output.text().contains("Input/output error"),
        "{device}: {output:?}"
    );
    let messages = guest.sh("dmesg");
    let line = format!("I/O error, dev {device}");
    assert!(messages.contains(&line), "{device}: {messages}");
}

/// Checks that the guest's `device` begins with `bytes`, read again from the host.
#[track_caller]
fn has_kept(guest: &Linux, device: &str, bytes: &[u8]) {
    let count = bytes.len() / 65536;
    let script = format!("dd if=/dev/{device} bs=65536 count={count} iflag=direct 2>/dev/null");
    let output = guest.run(&script, b"");
    assert_eq!(output.status, ExitStatus::Exited(0), "{device}: {output:?}");
    assert!(output.stdout == bytes, "{device}: flushed bytes are lost");
}

fn a_full_disk_and_bad_sectors_reach_the_guest() {
    let small = SmallFileSystem::of_mib(8);
    let ballast = small.path("ballast");
    fs::write(&ballast, vec![1; 4 * MIB]).expect("there is room for it");
    // One for each drive: an error of writing back is told to everyone who has the device open.
    let bad = ["nullb0", "nullb1"].map(BadDevice::new);
    let images = [
        ("sync", small.image("sync", 16 * MIB as u64), "Sync"),
        ("async", small.image("async", 16 * MIB as u64), "Async"),
        ("bad", bad[0].path(), "Sync"),
        ("bad-async", bad[1].path(), "Async"),
    ];
    let guest = Linux::boot("quiet", |_, config| {
        let drives = config["drives"].as_array_mut().expect("a list");
        drives.extend(images.iter().map(|(id, path, engine)| {
            let mut drive: Value = drive(id, path, engine, false);
            drive["cache_type"] = json!("Writeback");
            drive
        }));
    });
    let kept: Vec<u8> = (0..512 * KIB).map(|i| (i / 509) as u8).collect();

    // The host's file system fills up.
    for device in ["vdb", "vdc"] {
        keeps(&guest, device, &kept);
    }
    for device in ["vdb", "vdc"] {
        let script = format!("dd if=/dev/zero of=/dev/{device} bs=65536 seek=16 oflag=direct");
        io_error(&guest, device, &script);
    }
    guest.vmm.stdout.wait_for(NO_SPACE);
    for (device, (id, path, _)) in ["vdb", "vdc"].into_iter().zip(&images) {
        has_kept(&guest, device, &kept);
        let bytes = fs::read(path).expect("the image is there");
        assert!(bytes.starts_with(&kept), "{id}: flushed bytes are lost");
    }
    // With room again, the same drives go on.
    fs::remove_file(&ballast).expect("the ballast is there");
    for device in ["vdb", "vdc"] {
        guest.sh(&format!(
            "dd if=/dev/zero of=/dev/{device} bs=65536 seek=16 count=8 oflag=direct conv=fsync"
        ));
        has_kept(&guest, device, &kept);
    }

    // The host's block device has bad sectors, which reads and flushes meet.
    let first = BadDevice::BAD_FROM_MIB * MIB / 65536;
    for device in ["vdd", "vde"] {
        keeps(&guest, device, &kept);
        let read =
            format!("dd if=/dev/{device} of=/dev/null bs=65536 skip={first} count=1 iflag=direct");
        io_error(&guest, device, &read);
        let write = format!(
            "dd if=/dev/zero of=/dev/{device} bs=65536 seek={first} count=1 oflag=direct conv=fsync"
        );
        io_error(&guest, device, &write);
        has_kept(&guest, device, &kept);
    }
    guest.vmm.stdout.wait_for(IO_ERROR);
    guest.shut_down();
    drop(bad);
}

/// Takes all the room that is left in the file system of `path`.
#[track_caller]
fn take_all_room(path: &Path) {
    let mut file = File::create(path).expect("a file can be made");
    let chunk = vec![1; 64 * KIB];
    loop {
        match file.write_all(&chunk).and_then(|()| file.sync_all()) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::StorageFull => break,
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }
}

fn files_cut_under_loop_devices_reach_the_guest() {
    const CUT: usize = 8 * MIB;
    let small = SmallFileSystem::of_mib(64);
    let host = Ext4::in_file(&small.image("ext4", 48 * MIB as u64));
    let drives =
        [("sync", "Sync", "vdb"), ("async", "Async", "vdc")].map(|(id, engine, device)| {
            let path = host.path(id);
            let file = File::create(&path).expect("a file can be made");
            file.set_len(16 * MIB as u64).expect("it can have a hole");
            (id, engine, device, file, LoopDevice::over(&path, true))
        });
    let guest = Linux::boot("quiet", |_, config| {
        let list = config["drives"].as_array_mut().expect("a list");
        list.extend(drives.iter().map(|(id, engine, _, _, disk)| {
            let mut drive: Value = drive(id, disk.path(), engine, false);
            drive["cache_type"] = json!("Writeback");
            drive
        }));
    });
    let kept: Vec<u8> = (0..512 * KIB).map(|i| (i / 509) as u8).collect();
    // The last block that is there and the first one that is not, once the file is cut.
    let first = CUT / 65536;
    let read = |device: &str, block: usize| {
        format!("dd if=/dev/{device} of=/dev/null bs=65536 skip={block} count=1 iflag=direct")
    };
    let write = |device: &str, block: usize| {
        format!(
            "dd if=/dev/zero of=/dev/{device} bs=65536 seek={block} count=1 oflag=direct conv=fsync"
        )
    };
    for (_, _, device, file, disk) in &drives {
        keeps(&guest, device, &kept);
        guest.sh(&write(device, first));
        guest.sh(&read(device, first));
        file.set_len(CUT as u64).expect("it can be cut");
        disk.drop_cache();
    }
    take_all_room(&host.path("ballast"));
    for (_, _, device, _, disk) in &drives {
        guest.sh(&read(device, first - 1));
        io_error(&guest, device, &read(device, first));
        has_kept(&guest, device, &kept);
        // A write would make the file longer, but for the room: its flush fails.
        io_error(&guest, device, &write(device, first));
        disk.drop_cache();
        has_kept(&guest, device, &kept);
    }
    guest.vmm.stdout.wait_for(IO_ERROR);
    // With room again, the same drives go on.
    fs::remove_file(host.path("ballast")).expect("the ballast is there");
    for (_, _, device, _, disk) in &drives {
        guest.sh(&write(device, first));
        disk.drop_cache();
        guest.sh(&read(device, first));
        has_kept(&guest, device, &kept);
    }
    guest.shut_down();
}
