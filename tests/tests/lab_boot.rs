//! Linux: one machine for each group of checks, as a boot is what costs most.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use lepton_agent::client::{Client, ExitStatus, connect_vsock};
use lepton_tests::host_socket::HostSocket;
use lepton_tests::linux::{self, Linux, drive};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::tap::Tap;
use lepton_tests::{PATIENCE, test};
use serde_json::{Value, json};

fn main() -> ExitCode {
    suite::run(
        // Each machine has both processors for itself: some checks compare times.
        Order::OneByOne,
        &linux::NEEDS,
        [
            test!(a_guest_runs_commands_and_reboots),
            test!(a_bzimage_boots_with_two_processors),
            test!(four_processors_pause_and_resume_under_load).of_every_origin(),
            test!(drives_keep_what_was_written)
                .needs(Need::Program("mkfs.ext4"))
                .of_every_origin(),
            test!(a_running_drive_is_changed).of_every_origin(),
            test!(the_network_carries_both_ways)
                .needs(Need::Root)
                .needs(Need::Program("ip"))
                .of_every_origin(),
            test!(vsock_carries_both_ways).of_every_origin(),
            test!(ctrl_alt_del_shuts_down).of_every_origin(),
        ],
    )
}

/// Bytes that differ everywhere and are the same each time.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64)
        .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

fn a_guest_runs_commands_and_reboots() {
    // Not quiet: the kernel's messages are the console's test.
    let guest = Linux::boot("", |_, _| {});
    guest.vmm.stdout.wait_for("Linux version 6.");
    assert!(
        guest.ready.start_us <= guest.ready.ready_us,
        "{:?}",
        guest.ready
    );
    assert_eq!(guest.sh("uname -s; nproc; id -u"), "Linux\n1\n0");
    assert_eq!(guest.sh("cat /proc/1/comm"), "init");
    let line = guest.sh("cat /proc/cmdline");
    assert!(line.contains("root=/dev/vda"), "{line}");
    let kib: u64 = guest
        .sh("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")
        .parse()
        .expect("a number");
    assert!((90 << 10..128 << 10).contains(&kib), "{kib} KiB of 128 MiB");

    let output = guest.run("cat; echo bad >&2; exit 7", b"good");
    assert_eq!(output.status, ExitStatus::Exited(7));
    assert_eq!(
        (output.text().as_str(), output.stderr.as_str()),
        ("good", "bad\n")
    );
    let output = guest.run("kill -9 $$", b"");
    assert_eq!(output.status, ExitStatus::Killed(9));
    // The root is read-only below, and can be written above.
    guest.sh("echo x > /etc/mine && grep -q x /etc/mine");
    assert!(guest.sh("grep ' /dev ' /proc/mounts").contains("devtmpfs"));
    // The clock goes on, and at the host's pace: kvm-clock.
    let now = |guest: &Linux| guest.sh("date +%s").parse::<u64>().expect("a number");
    let host = std::time::SystemTime::UNIX_EPOCH
        .elapsed()
        .expect("after 1970");
    assert!(
        now(&guest).abs_diff(host.as_secs()) < 30,
        "the guest's clock is wrong"
    );
    assert_eq!(
        guest.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "kvm-clock"
    );

    guest.start("reboot -f || echo b > /proc/sysrq-trigger");
    let ended = guest.ended();
    assert!(
        ended.text().contains("the guest reset itself"),
        "{}",
        ended.text()
    );
}

fn a_bzimage_boots_with_two_processors() {
    let guest = Linux::boot("quiet", |_, config| {
        config["boot-source"]["kernel_image_path"] = json!(linux::file("LEPTON_BZIMAGE"));
        config["machine-config"]["vcpu_count"] = 2.into();
        config["machine-config"]["mem_size_mib"] = 192.into();
    });
    assert_eq!(guest.sh("nproc"), "2");
    assert_eq!(guest.sh("grep -c ^processor /proc/cpuinfo"), "2");
    // Each runs: both at once, bound to it.
    let load = "taskset 1 sh -c 'i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done' & \
                taskset 2 sh -c 'i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done' & wait; echo done";
    assert_eq!(guest.sh(load), "done");
    guest.shut_down();
}

fn four_processors_pause_and_resume_under_load() {
    let mut guest = Linux::boot("quiet", |_, config| {
        config["machine-config"]["vcpu_count"] = 4.into();
    });
    assert_eq!(guest.sh("nproc"), "4");
    guest.sh(
        "for i in 1 2 3 4; do (while :; do echo $i > /tmp/load$i; done) & done; \
         (n=0; while :; do n=$((n+1)); echo $n > /tmp/count.new; mv /tmp/count.new /tmp/count; done) & \
         while [ ! -s /tmp/count ]; do :; done",
    );
    let count = |guest: &Linux| guest.sh("cat /tmp/count").parse::<u64>().expect("a number");
    for _ in 0..5 {
        let before = count(&guest);
        guest.api.reach("Paused");
        assert_eq!(guest.api.state(), "Paused");
        let still = exits(&mut guest);
        for _ in 0..20 {
            assert_eq!(exits(&mut guest), still);
        }
        guest.api.reach("Resumed");
        let deadline = Instant::now() + PATIENCE;
        while count(&guest) <= before {
            assert!(
                Instant::now() < deadline,
                "the guest stands still after a pause"
            );
        }
    }
    guest.shut_down();
}

/// Register accesses of all vCPUs so far.
fn exits(guest: &mut Linux) -> u64 {
    ["io_in", "io_out", "mmio_read", "mmio_write"]
        .iter()
        .map(|kind| guest.api.counter(&format!("lepton_vcpu_exit_{kind}")))
        .sum()
}

#[track_caller]
fn make_ext4(path: &str) {
    let status = Command::new("mkfs.ext4")
        .args(["-q", "-F", path])
        .status()
        .expect("mkfs.ext4 starts");
    assert!(status.success(), "mkfs.ext4 {path}");
}

/// Blocks of 512 bytes that a file has on the host.
fn blocks(path: &str) -> u64 {
    fs::metadata(path).expect("the file is there").blocks()
}

fn drives_keep_what_was_written() {
    const MIB: u64 = 1 << 20;
    let guest = Linux::boot("quiet", |vmm, config| {
        let drives = config["drives"].as_array_mut().expect("a list");
        for (id, engine) in [("sync", "Sync"), ("async", "Async")] {
            let path = vmm.sparse_file(id, 32 * MIB);
            make_ext4(&path);
            drives.push(drive(id, Path::new(&path), engine, false));
        }
        let raw = vmm.file("ro", &pattern(MIB as usize));
        drives.push(drive("ro", Path::new(&raw), "Async", true));
        let raw = vmm.sparse_file("raw", 4 * MIB);
        drives.push(drive("raw", Path::new(&raw), "Async", false));
    });
    let random = pattern(4 * MIB as usize);
    for device in ["vdb", "vdc"] {
        guest.sh(&format!(
            "mkdir -p /mnt/{device} && mount -t ext4 -o discard /dev/{device} /mnt/{device}"
        ));
        let output = guest.run(
            &format!("cat > /mnt/{device}/file && sync && sync /mnt/{device}/file"),
            &random,
        );
        assert_eq!(output.status, ExitStatus::Exited(0), "{output:?}");
        // Read again from the drive, not from memory.
        guest.sh(&format!(
            "umount /mnt/{device} && mount -t ext4 -o discard /dev/{device} /mnt/{device}"
        ));
        let output = guest.run(&format!("cat /mnt/{device}/file"), b"");
        assert!(output.stdout == random, "{device}: other bytes came back");
    }
    // What the guest frees, the host gets back.
    for (device, id) in [("vdb", "sync"), ("vdc", "async")] {
        let path = guest.vmm.path(id);
        let full = blocks(&path);
        guest.sh(&format!(
            "rm /mnt/{device}/file && sync && fstrim /mnt/{device} && umount /mnt/{device}"
        ));
        let left = blocks(&path);
        assert!(left + 4096 <= full, "{id}: {full} blocks, then {left}");
    }
    // A read-only drive reads and does not write, by whatever means.
    assert_eq!(guest.sh("blockdev --getro /dev/vdd"), "1");
    let output = guest.run("cat /dev/vdd", b"");
    assert!(
        output.stdout == pattern(MIB as usize),
        "the read-only drive has other bytes"
    );
    for attempt in [
        "echo x > /dev/vdd",
        "blockdev --setrw /dev/vdd; dd if=/dev/zero of=/dev/vdd bs=512 count=1 conv=fsync",
    ] {
        let output = guest.run(attempt, b"");
        assert_ne!(
            output.status,
            ExitStatus::Exited(0),
            "{attempt}: {output:?}"
        );
    }
    let bytes = fs::read(guest.vmm.path("ro")).expect("the file is there");
    assert!(
        bytes == pattern(MIB as usize),
        "the read-only drive was written to"
    );
    // What was written and flushed is in the host's file.
    let output = guest.run(
        "dd of=/dev/vde bs=65536 oflag=direct conv=fsync 2>&1",
        &random,
    );
    assert_eq!(output.status, ExitStatus::Exited(0), "{output:?}");
    let bytes = fs::read(guest.vmm.path("raw")).expect("the file is there");
    assert!(bytes == random, "the raw drive has other bytes");
    // Past the end there is nothing.
    let output = guest.run("dd if=/dev/zero of=/dev/vde bs=65536 seek=64 count=1", b"");
    assert_ne!(output.status, ExitStatus::Exited(0), "{output:?}");
    guest.shut_down();
}

fn a_running_drive_is_changed() {
    const MIB: u64 = 1 << 20;
    let mut guest = Linux::boot("quiet", |vmm, config| {
        let path = vmm.sparse_file("one", 8 * MIB);
        let drives = config["drives"].as_array_mut().expect("a list");
        drives.push(drive("data", Path::new(&path), "Async", false));
    });
    assert_eq!(
        guest.sh("blockdev --getsize64 /dev/vdb"),
        (8 * MIB).to_string()
    );
    // Another image, twice as large: the guest is told.
    let other = guest.vmm.sparse_file("two", 16 * MIB);
    guest.api.patch(
        "/drives/data",
        &json!({ "drive_id": "data", "path_on_host": other }),
    );
    guest.sh(&format!(
        "until [ $(cat /sys/block/vdb/size) = {} ]; do :; done",
        16 * MIB / 512
    ));
    guest.sh("echo written after the change | dd of=/dev/vdb bs=512 conv=sync,fsync");
    let bytes = fs::read(&other).expect("the file is there");
    assert!(bytes.starts_with(b"written after the change\n"));
    let first = fs::read(guest.vmm.path("one")).expect("the file is there");
    assert!(
        first.iter().all(|byte| *byte == 0),
        "the old image was written to"
    );
    // A missing image changes nothing.
    let bad = json!({ "drive_id": "data", "path_on_host": "/no/such/image" }).to_string();
    let message = guest.api.refused("PATCH", "/drives/data", &bad);
    assert!(message.contains("/no/such/image"), "{message}");
    guest.sh("dd if=/dev/vdb of=/dev/null bs=65536 count=4");

    // A bucket of 1 MiB, full again after a second: 4 MiB take three seconds or more.
    let write = |guest: &Linux| {
        let started = Instant::now();
        guest.sh("dd if=/dev/zero of=/dev/vdb bs=65536 count=64 oflag=direct");
        started.elapsed()
    };
    let limit = |guest: &mut Linux, bandwidth: Value| {
        let limiter = json!({ "drive_id": "data", "rate_limiter": { "bandwidth": bandwidth } });
        guest.api.patch("/drives/data", &limiter);
    };
    limit(&mut guest, json!({ "size": MIB, "refill_time": 1000 }));
    let limited = write(&guest);
    assert!(
        limited > Duration::from_millis(2500),
        "{limited:?} for 4 MiB at 1 MiB/s"
    );
    assert!(
        limited < Duration::from_secs(20),
        "{limited:?} for 4 MiB at 1 MiB/s"
    );
    // How long it takes without one is the machine's affair: the limiter says that it held nothing back.
    limit(&mut guest, json!({ "size": 0, "refill_time": 0 }));
    const THROTTLED: &str = "lepton_block_rate_limiter_throttled_events";
    let before = guest.api.counter(THROTTLED);
    assert!(before > 0, "{THROTTLED}");
    write(&guest);
    assert_eq!(guest.api.counter(THROTTLED), before, "{THROTTLED}");
    guest.shut_down();
}

fn the_network_carries_both_ways() {
    const HOST: &str = "172.30.77.1";
    const GUEST: &str = "172.30.77.2";
    let tap = Tap::new(Some("172.30.77.1/24"));
    let ip = format!("quiet ip={GUEST}::{HOST}:255.255.255.0::eth0:off");
    let mut guest = Linux::boot(&ip, |_, config| {
        config["network-interfaces"] = json!([{
            "iface_id": "eth0", "host_dev_name": tap.name(), "guest_mac": "06:00:ac:1e:4d:02", "mtu": 1400,
        }]);
    });
    assert_eq!(
        guest.sh("cat /sys/class/net/eth0/address"),
        "06:00:ac:1e:4d:02"
    );
    assert_eq!(guest.sh("cat /sys/class/net/eth0/mtu"), "1400");
    guest.sh(&format!("ping -c 3 -W 5 {HOST}"));
    guest.sh(&format!("ping -c 2 -W 5 -s 1300 {HOST}"));

    let bytes = pattern(4 << 20);
    sends(&guest, HOST, &bytes);

    receives(&guest, GUEST, &bytes);
    assert!(guest.api.counter("lepton_net_rx_packets_count") > 0);
    assert!(guest.api.counter("lepton_net_tx_packets_count") > 0);

    // A bucket of half a MiB, full again after a second: 4 MiB take seven seconds or more.
    let limit = |guest: &mut Linux, limiter: &str, bandwidth: Value| {
        let change = json!({ "iface_id": "eth0", limiter: { "bandwidth": bandwidth } });
        guest.api.patch("/network-interfaces/eth0", &change);
    };
    for (limiter, metric) in [
        ("tx_rate_limiter", "lepton_net_tx_rate_limiter_throttled"),
        ("rx_rate_limiter", "lepton_net_rx_rate_limiter_throttled"),
    ] {
        assert_eq!(guest.api.counter(metric), 0);
        limit(
            &mut guest,
            limiter,
            json!({ "size": 512 << 10, "refill_time": 1000 }),
        );
        let took = if limiter == "tx_rate_limiter" {
            sends(&guest, HOST, &bytes)
        } else {
            receives(&guest, GUEST, &bytes)
        };
        // A busy machine may be that slow by itself: the limiter says that it held something back.
        assert!(
            took > Duration::from_secs(6),
            "{limiter}: {took:?} for 4 MiB at half a MiB/s"
        );
        assert!(guest.api.counter(metric) > 0, "{metric}");
        limit(&mut guest, limiter, json!({ "size": 0, "refill_time": 0 }));
        guest.sh(&format!("ping -c 2 -W 5 {HOST}"));
    }
    guest.shut_down();
}

/// Sends `bytes` to the guest's address, where something listens in a moment, and checks what arrives. How long it
/// took comes back.
#[track_caller]
fn receives(guest: &Linux, address: &str, bytes: &[u8]) -> Duration {
    let server = guest.start("nc -l -p 5000 > /tmp/received; sync");
    let deadline = Instant::now() + PATIENCE;
    let mut stream = loop {
        match TcpStream::connect((address, 5000)) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    };
    stream
        .set_write_timeout(Some(PATIENCE))
        .expect("a socket has timeouts");
    let started = Instant::now();
    stream.write_all(bytes).expect("the guest takes it");
    drop(stream);
    server.close_stdin().expect("the agent listens");
    assert_eq!(
        server.wait().expect("the agent listens"),
        ExitStatus::Exited(0)
    );
    let took = started.elapsed();
    let output = guest.run("cat /tmp/received", b"");
    assert!(output.stdout == bytes, "other bytes went into the guest");
    took
}

/// Lets the guest send `bytes` to the host's address, and checks what arrives. How long it took comes back.
#[track_caller]
fn sends(guest: &Linux, host: &str, bytes: &[u8]) -> Duration {
    let listener = TcpListener::bind((host, 0)).expect("the tap has that address");
    let port = listener.local_addr().expect("an address").port();
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("a socket has timeouts");
        let mut received = Vec::new();
        stream.read_to_end(&mut received).map(|_| received)
    });
    // First into the guest, so that only its way out is measured.
    guest.run("cat > /tmp/sent", bytes);
    let started = Instant::now();
    guest.sh(&format!("nc {host} {port} < /tmp/sent"));
    let took = started.elapsed();
    let received = receiver.join().expect("the receiver does not panic");
    let whole = received.expect("all of it") == bytes;
    assert!(whole, "other bytes came out of the guest");
    took
}

fn vsock_carries_both_ways() {
    let guest = Linux::boot("quiet", |_, _| {});
    // Host-initiated, both ways at once, more than any buffer on the way holds.
    let bytes = pattern(8 << 20);
    let output = guest.run("cat", &bytes);
    assert!(output.stdout == bytes, "other bytes came back");
    // Many connections at once, each of its own.
    std::thread::scope(|scope| {
        for number in 0..16 {
            let path = guest.uds_path();
            let guest = &guest;
            scope.spawn(move || {
                let client = Client::connect(&path).expect("the agent listens");
                let info = client.info().expect("the agent answers");
                assert_eq!(info.agent_version, guest.ready.version);
                assert_eq!(guest.sh(&format!("echo {number}")), number.to_string());
            });
        }
    });
    // Where nobody listens, the connection ends.
    let error = connect_vsock(&guest.uds_path(), 4444).expect_err("nobody listens there");
    assert!(error.to_string().contains("4444"), "{error}");
    // That the agent said it was up shows a connection from the guest; a host on which nobody listens refuses one, and
    // the guest goes on.
    let unused = HostSocket::of_vsock(&guest.uds_path(), 7777);
    drop(unused);
    assert_eq!(guest.sh("echo still here"), "still here");
    // A client that leaves in the middle of its conversation takes nothing with it.
    for _ in 0..20 {
        drop(
            connect_vsock(&guest.uds_path(), lepton_agent::AGENT_PORT).expect("the agent listens"),
        );
    }
    assert_eq!(guest.sh("echo still here"), "still here");
    guest.shut_down();
}

fn ctrl_alt_del_shuts_down() {
    let mut guest = Linux::boot("quiet", |vmm, config| {
        let path = vmm.sparse_file("data", 1 << 20);
        let drives = config["drives"].as_array_mut().expect("a list");
        drives.push(drive("data", Path::new(&path), "Sync", false));
    });
    let keyboard = guest.run("grep -i keyboard /proc/bus/input/devices", b"");
    let found = keyboard.status == ExitStatus::Exited(0);
    assert!(
        found,
        "{}",
        guest.sh("cat /proc/bus/input/devices; dmesg | grep -i 'i8042\\|serio\\|input'")
    );
    // Written, and not flushed: a clean end flushes it.
    guest.sh("echo not flushed by itself | dd of=/dev/vdb bs=512 conv=sync");
    guest.api.act("SendCtrlAltDel");
    let ended = guest.ended();
    let bytes = fs::read(ended.directory.path().join("data")).expect("the file is there");
    assert!(bytes.starts_with(b"not flushed by itself\n"));
}
