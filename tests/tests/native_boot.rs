//! Boots of guests of a few instructions: how they are entered, what they are given, how they end.

use std::process::ExitCode;
use std::time::Instant;

use lepton_tests::guest::{Entry, Program, bzimage};
use lepton_tests::origin::{running, running_in};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::{Ended, PATIENCE, Vmm, test};
use serde_json::{Value, json};

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[Need::Kvm],
        [
            test!(a_reset_is_a_success).of_every_origin(),
            test!(a_power_off_has_its_own_status).of_every_origin(),
            test!(a_triple_fault_has_its_own_status).of_every_origin(),
            test!(what_kvm_cannot_run_is_a_failure).of_every_origin(),
            test!(the_64_bit_entry_and_pvh_both_boot_through_the_api),
            test!(the_start_is_answered_even_if_the_guest_ends_at_once),
            test!(a_bzimage_boots),
            test!(the_command_line_arrives),
            test!(the_initrd_arrives_at_the_end_of_memory),
            test!(an_initrd_that_does_not_fit_is_refused),
            test!(acpi_and_mp_tables_are_where_a_kernel_looks),
            test!(memory_sizes_arrive_in_the_memory_map),
            test!(memory_goes_up_to_the_hole),
            test!(memory_goes_on_behind_the_hole),
            test!(memory_of_one_mib_has_no_room_for_a_kernel),
            test!(every_vcpu_can_be_started).of_every_origin(),
            test!(the_boot_timer_is_logged),
            test!(the_code_that_started_a_machine_is_let_go).of_every_origin(),
            test!(huge_pages_that_the_host_has_not_are_refused_and_nothing_is_left),
        ],
    )
}

fn machine(kernel: &str, vcpus: u8, mib: u64) -> Value {
    json!({
        "boot-source": { "kernel_image_path": kernel },
        "machine-config": { "vcpu_count": vcpus, "mem_size_mib": mib },
    })
}

/// Boots a program by a configuration file, without an API, on `mib` MiB.
#[track_caller]
fn boot_on(program: &Program, entry: Entry, vcpus: u8, mib: u64) -> Ended {
    let builder = Vmm::builder();
    let kernel = program.write(builder.directory(), entry);
    let config = machine(kernel.to_str().expect("a plain path"), vcpus, mib);
    builder.config(&config).without_api().spawn().wait()
}

/// Lets a machine of any origin run a program that ends it.
#[track_caller]
fn end_by(program: &Program, entry: Entry, vcpus: u8) -> Ended {
    let builder = Vmm::builder();
    let log = builder.directory().join("log").into_os_string();
    let builder = builder.arguments(["--log-path".into(), log]);
    let (vmm, mut api) = running_in(
        builder,
        &Program::once_typed(program),
        entry,
        |_, config| {
            config["machine-config"]["vcpu_count"] = vcpus.into();
        },
    );
    api.type_keys();
    vmm.wait()
}

fn log_of(ended: &Ended) -> String {
    std::fs::read_to_string(ended.directory.path().join("log")).expect("a log")
}

/// Boots a program that sends bytes and resets; the bytes come back. The log goes to a file.
#[track_caller]
fn bytes_sent_by(program: &Program, entry: Entry, change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let builder = Vmm::builder();
    let kernel = program.write(builder.directory(), entry);
    let mut config = machine(kernel.to_str().expect("a plain path"), 1, 128);
    config["logger"] = json!({ "log_path": builder.directory().join("log") });
    change(&mut config);
    let ended = builder.config(&config).without_api().spawn().wait();
    ended.expect_code(0).stdout
}

fn both_entries() -> [Entry; 2] {
    [Entry::Linux64, Entry::Pvh]
}

fn a_reset_is_a_success() {
    for entry in both_entries() {
        let ended = end_by(&Program::reset(), entry, 1).expect_code(0);
        let log = log_of(&ended);
        assert!(log.contains("the guest reset itself"), "{entry:?}: {log}");
    }
}

fn a_power_off_has_its_own_status() {
    for entry in both_entries() {
        let ended = end_by(&Program::power_off(), entry, 1).expect_code(160);
        let log = log_of(&ended);
        assert!(log.contains("the guest powered off"), "{entry:?}: {log}");
    }
}

fn a_triple_fault_has_its_own_status() {
    for entry in both_entries() {
        let ended = end_by(&Program::triple_fault(), entry, 1).expect_code(161);
        let log = log_of(&ended);
        assert!(
            log.contains("the guest had a triple fault"),
            "{entry:?}: {log}"
        );
    }
}

fn what_kvm_cannot_run_is_a_failure() {
    let ended = end_by(&Program::jump_into_the_hole(), Entry::Pvh, 1).expect_code(1);
    let log = log_of(&ended);
    assert!(log.contains("the machine failed: "), "{log}");
    assert!(log.contains("0xd0000000"), "{log}");
}

fn the_64_bit_entry_and_pvh_both_boot_through_the_api() {
    for entry in both_entries() {
        let (vmm, mut api) = Vmm::with_api();
        let kernel = Program::print("hello from the guest\n").write(vmm.directory(), entry);
        api.configure(&machine(kernel.to_str().expect("a plain path"), 1, 128));
        api.start_short_life();
        vmm.stdout.wait_for("hello from the guest\n");
        vmm.wait().expect_code(0);
    }
}

fn the_start_is_answered_even_if_the_guest_ends_at_once() {
    for _ in 0..20 {
        let (vmm, mut api) = Vmm::with_api();
        let kernel = Program::reset().write(vmm.directory(), Entry::Linux64);
        api.configure(&machine(kernel.to_str().expect("a plain path"), 1, 128));
        api.start();
        vmm.wait().expect_code(0);
    }
}

fn a_bzimage_boots() {
    let builder = Vmm::builder();
    let kernel = builder.directory().join("kernel");
    let program = Program::power_off();
    std::fs::write(&kernel, bzimage::of(program.code())).expect("a file can be written");
    let config = machine(kernel.to_str().expect("a plain path"), 1, 128);
    let vmm = builder.config(&config).without_api().spawn();
    vmm.wait().expect_code(160);
}

const COMMAND_LINE: u32 = 0x2_0000;
const ZERO_PAGE: u32 = 0x7000;

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn the_command_line_arrives() {
    for (given, expected) in [
        ("console=ttyS0 quiet", "console=ttyS0 quiet"),
        ("quiet -- one two", "quiet -- one two"),
    ] {
        let program = Program::dump(&[(COMMAND_LINE, 64)]);
        let bytes = bytes_sent_by(&program, Entry::Linux64, |config| {
            config["boot-source"]["boot_args"] = given.into();
        });
        assert_eq!(String::from_utf8_lossy(until_nul(&bytes)), expected);
    }
    // A root device adds where it is, before what is for init.
    let program = Program::dump(&[(COMMAND_LINE, 128)]);
    let bytes = bytes_sent_by(&program, Entry::Pvh, |config| {
        config["boot-source"]["boot_args"] = "quiet -- x".into();
        config["drives"] = json!([{
            "drive_id": "root",
            "path_on_host": config["boot-source"]["kernel_image_path"],
            "is_root_device": true,
            "is_read_only": true,
        }]);
    });
    let line = String::from_utf8_lossy(until_nul(&bytes)).into_owned();
    assert!(line.starts_with("quiet root=/dev/vda ro "), "{line}");
    assert!(line.ends_with(" -- x"), "{line}");
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn the_initrd_arrives_at_the_end_of_memory() {
    const MIB: u32 = 1 << 20;
    let content = b"an initrd of some bytes";
    let expected = 128 * MIB - 0x1000;
    // ramdisk_image and ramdisk_size of the setup header, and what lies there.
    let program = Program::dump(&[(ZERO_PAGE + 0x218, 8), (expected, content.len() as u32)]);
    let folder = tempfile::tempdir().expect("a temporary directory");
    let initrd = folder.path().join("initrd");
    std::fs::write(&initrd, content).expect("a file can be written");
    let bytes = bytes_sent_by(&program, Entry::Linux64, |config| {
        config["boot-source"]["initrd_path"] = json!(initrd);
    });
    assert_eq!(word(&bytes, 0), expected);
    assert_eq!(word(&bytes, 4), content.len() as u32);
    assert_eq!(&bytes[8..], content);
}

fn an_initrd_that_does_not_fit_is_refused() {
    let (vmm, mut api) = Vmm::with_api();
    let kernel = Program::reset().write(vmm.directory(), Entry::Linux64);
    let initrd = vmm.sparse_file("initrd", 127 << 20 | 1);
    api.configure(&machine(kernel.to_str().expect("a plain path"), 1, 128));
    api.put(
        "/boot-source",
        &json!({ "kernel_image_path": kernel, "initrd_path": initrd }),
    );
    // What the VMM does after an answer is done before the next.
    api.state();
    let before = vmm.open_files();
    let start = json!({ "action_type": "InstanceStart" }).to_string();
    let message = api.refused("PUT", "/actions", &start);
    assert!(message.contains(&initrd), "{message}");
    assert!(message.contains("133169153"), "{message}");
    assert_eq!(api.state(), "Not started");
    assert_eq!(vmm.open_files(), before);
    api.put("/boot-source", &json!({ "kernel_image_path": kernel }));
    api.start_short_life();
    vmm.wait().expect_code(0);
}

fn acpi_and_mp_tables_are_where_a_kernel_looks() {
    let program = Program::dump(&[(0xe_0000, 8), (0x9_fc00, 4), (ZERO_PAGE + 0x70, 8)]);
    let bytes = bytes_sent_by(&program, Entry::Linux64, |_| {});
    assert_eq!(&bytes[..8], b"RSD PTR ");
    assert_eq!(&bytes[8..12], b"_MP_");
    assert_eq!(long(&bytes, 12), 0xe_0000, "acpi_rsdp_addr");
}

/// The usable ranges of the zero page's memory map, as (start, end).
fn memory_map(mib: u64) -> Vec<(u64, u64)> {
    const TABLE: u32 = ZERO_PAGE + 0x2d0;
    const ENTRY: usize = 20;
    let program = Program::dump(&[(ZERO_PAGE + 0x1e8, 1), (TABLE, 8 * ENTRY as u32)]);
    let bytes = bytes_sent_by(&program, Entry::Linux64, |config| {
        config["machine-config"]["mem_size_mib"] = mib.into();
    });
    bytes[1..]
        .chunks_exact(ENTRY)
        .take(usize::from(bytes[0]))
        .filter(|entry| word(entry, 16) == 1)
        .map(|entry| (long(entry, 0), long(entry, 0) + long(entry, 8)))
        .collect()
}

fn memory_sizes_arrive_in_the_memory_map() {
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    let low = (0, 0x9_f000);
    assert_eq!(memory_map(128), [low, (MIB, 128 * MIB)]);
    assert_eq!(memory_map(3 * 1024), [low, (MIB, 3 * GIB)]);
    // 4 GiB: the fourth lies behind the hole.
    assert_eq!(
        memory_map(4 * 1024),
        [low, (MIB, 3 * GIB), (4 * GIB, 5 * GIB)]
    );
    assert_eq!(
        memory_map(5 * 1024),
        [low, (MIB, 3 * GIB), (4 * GIB, 6 * GIB)]
    );
}

fn memory_goes_up_to_the_hole() {
    let last = Program::echo_at(0xc000_0000 - 4, *b"last");
    let bytes = bytes_sent_by(&last, Entry::Pvh, |config| {
        config["machine-config"]["mem_size_mib"] = 4096.into();
    });
    assert_eq!(bytes, b"last");
    // With less memory there is nothing at that place, and nothing reads as all ones.
    let bytes = bytes_sent_by(&last, Entry::Pvh, |_| {});
    assert_eq!(bytes, [0xff; 4]);
}

fn memory_goes_on_behind_the_hole() {
    let first = Program::echo_at_4_gib(*b"high");
    let bytes = bytes_sent_by(&first, Entry::Linux64, |config| {
        config["machine-config"]["mem_size_mib"] = 5120.into();
    });
    assert_eq!(bytes, b"high");
    let bytes = bytes_sent_by(&first, Entry::Linux64, |config| {
        config["machine-config"]["mem_size_mib"] = 3072.into();
    });
    assert_eq!(bytes, [0xff; 4]);
}

fn memory_of_one_mib_has_no_room_for_a_kernel() {
    let ended = boot_on(&Program::reset(), Entry::Linux64, 1, 1).expect_code(152);
    assert!(ended.stderr.contains("kernel"), "{}", ended.stderr);
    boot_on(&Program::reset(), Entry::Linux64, 1, 2).expect_code(0);
}

fn every_vcpu_can_be_started() {
    for vcpus in [2, 32] {
        let ended = end_by(&Program::count_processors(vcpus - 1), Entry::Pvh, vcpus);
        assert_eq!(ended.expect_code(0).stdout, [vcpus - 1]);
    }
}

fn the_boot_timer_is_logged() {
    let timed = |arguments: &[&str]| {
        let builder = Vmm::builder();
        let kernel = Program::booted().write(builder.directory(), Entry::Pvh);
        let config = machine(kernel.to_str().expect("a plain path"), 1, 128);
        let vmm = builder.config(&config).without_api().arguments(arguments);
        vmm.spawn().wait().expect_code(0).text()
    };
    let log = timed(&["--boot-timer"]);
    let (_, time) = log.split_once("Guest-boot-time = ").expect("a boot time");
    let (us, _) = time.trim_start().split_once(" us ").expect("a number");
    assert!((1..60_000_000).contains(&us.parse().unwrap_or(0)), "{log}");
    assert!(!timed(&[]).contains("Guest-boot-time"));
}

fn the_code_that_started_a_machine_is_let_go() {
    let (idle, _) = Vmm::with_api();
    let before = idle.file_memory().expect("it waits for a machine");
    let (vmm, mut api) = running(&Program::tick(), |_, _| ());
    // A machine that came from elsewhere runs for a moment before.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let after = vmm.file_memory().expect("the machine runs");
        if after < before {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{before} KiB without a machine, {after} KiB with one"
        );
    }
    // What is used again comes back.
    api.reach("Paused");
    api.reach("Resumed");
    assert_eq!(api.state(), "Running");
}

fn huge_pages_that_the_host_has_not_are_refused_and_nothing_is_left() {
    let (vmm, mut api) = Vmm::with_api();
    let kernel = Program::reset().write(vmm.directory(), Entry::Linux64);
    let mut config = machine(
        kernel.to_str().expect("a plain path"),
        1,
        free_huge_mib() + 128,
    );
    config["machine-config"]["huge_pages"] = "2M".into();
    api.configure(&config);
    // What the VMM does after an answer is done before the next.
    api.state();
    let before = vmm.open_files();
    let start = json!({ "action_type": "InstanceStart" }).to_string();
    for _ in 0..3 {
        let message = api.refused("PUT", "/actions", &start);
        assert!(message.contains("huge"), "{message}");
        assert!(message.contains("guest memory"), "{message}");
    }
    api.state();
    assert_eq!(vmm.open_files(), before);
    api.put(
        "/machine-config",
        &json!({ "vcpu_count": 1, "mem_size_mib": 128 }),
    );
    api.start_short_life();
    vmm.wait().expect_code(0);
}

/// MiB of huge pages that the host has free.
fn free_huge_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find(|line| line.starts_with("HugePages_Free:"));
    let pages = line.and_then(|line| line.split_whitespace().nth(1));
    pages
        .and_then(|pages| pages.parse::<u64>().ok())
        .unwrap_or(0)
        * 2
}
