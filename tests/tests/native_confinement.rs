//! What a VMM gives up: system calls, thread by thread, and being looked into.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use lepton_tests::guest::{Entry, Program};
use lepton_tests::origin::{Origin, running, running_in};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::vmm::Builder;
use lepton_tests::{Api, Ended, PATIENCE, Vmm, programs, reaper, test};
use rustix::io::Errno;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use serde_json::{Value, json};
use tempfile::TempDir;

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[Need::Kvm],
        [
            test!(every_thread_has_a_filter_of_its_own).of_every_origin(),
            test!(all_threads_but_vcpus_have_short_slices)
                .needs(Need::Slices)
                .of_every_origin(),
            test!(without_seccomp_there_are_no_filters).of_every_origin(),
            test!(files_outside_are_out_of_reach_once_the_guest_runs)
                .needs(Need::Landlock)
                .of_every_origin(),
            test!(without_a_word_every_place_is_allowed).of_every_origin(),
            test!(a_kernel_without_landlock_is_told_of),
            test!(a_start_that_fails_gives_nothing_up),
            test!(a_forbidden_call_of_the_event_loop_ends_the_vmm),
            test!(a_forbidden_call_of_a_vcpu_ends_the_vmm),
            test!(a_forbidden_call_of_the_api_ends_the_vmm),
            test!(a_forbidden_argument_ends_the_vmm),
            test!(a_file_of_filters_that_cannot_be_used_is_refused),
            test!(guest_memory_stays_out_of_core_dumps).of_every_origin(),
            test!(others_of_the_same_user_cannot_look_into_it).needs(Need::Root),
        ],
    )
}

/// The machine of these tests: it runs until it is stopped.
fn config(directory: &Path, vcpus: u8) -> Value {
    let kernel = Program::tick().write(directory, Entry::Linux64);
    json!({
        "boot-source": { "kernel_image_path": kernel },
        "machine-config": { "vcpu_count": vcpus, "mem_size_mib": 128 },
    })
}

/// A thread's name, its seccomp mode, how many filters it has, and whether it has given up new privileges.
type Confinement = (String, u32, u32, u32);

fn confinement(vmm: &Vmm) -> Vec<Confinement> {
    let path = format!("/proc/{}/task", vmm.pid());
    let mut threads: Vec<Confinement> = fs::read_dir(path)
        .expect("the VMM runs")
        .filter_map(|entry| {
            let status = fs::read_to_string(entry.ok()?.path().join("status")).ok()?;
            let value = |key: &str| {
                let of_key =
                    |line: &str| Some(line.strip_prefix(key)?.strip_prefix(':')?.trim().to_owned());
                status.lines().find_map(of_key)
            };
            let number = |key| value(key)?.parse().ok();
            Some((
                value("Name")?,
                number("Seccomp")?,
                number("Seccomp_filters")?,
                number("NoNewPrivs")?,
            ))
        })
        // The kernel's own.
        .filter(|(name, ..)| !name.starts_with("kvm-") && !name.starts_with("iou-"))
        .collect();
    threads.sort();
    threads
}

#[track_caller]
fn expect_confinement(vmm: &Vmm, expected: &[(&str, u32, u32, u32)]) {
    let expected: Vec<Confinement> = expected
        .iter()
        .map(|(name, a, b, c)| (name.to_string(), *a, *b, *c))
        .collect();
    let deadline = Instant::now() + PATIENCE;
    // A thread takes its filter a moment after it has come to be.
    loop {
        let found = confinement(vmm);
        if found == expected {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{found:?} instead of {expected:?}"
        );
    }
}

/// The name of the first thread: the program's, of which the kernel keeps 15 characters.
fn main_thread() -> String {
    let program = programs::vmm().file_name().expect("a program has a name");
    program.to_string_lossy().chars().take(15).collect()
}

fn every_thread_has_a_filter_of_its_own() {
    let (vmm, _api) = Vmm::with_api();
    let main = main_thread();
    // Before there is a machine, clients are served and confinement is in place.
    expect_confinement(&vmm, &[("api", 2, 1, 1), (&main, 2, 1, 1)]);
    vmm.terminate();
    let (vmm, _api) = running(&Program::tick(), |_, config| {
        config["machine-config"]["vcpu_count"] = 2.into();
    });
    // A vCPU's thread has the event loop's filter, which started it, and its own.
    expect_threads(&vmm, ("api", 2, 1, 1), (&main, 2, 1, 1), 2, 2);
    vmm.terminate();
}

/// As [`expect_confinement`]: with a thread for each vCPU, and one that checks memory where there is one.
#[track_caller]
fn expect_threads(
    vmm: &Vmm,
    api: (&str, u32, u32, u32),
    main: (&str, u32, u32, u32),
    vcpus: usize,
    filters: u32,
) {
    let mode = main.1;
    let mut expected = vec![api, main];
    if Origin::current() == Origin::Restored && rustix::process::geteuid().is_root() {
        // It does what the event loop does while it restores.
        expected.push(("pager", mode, main.2, 1));
    }
    let vcpus = ["vcpu 0", "vcpu 1"].into_iter().take(vcpus);
    expected.extend(vcpus.map(|name| (name, mode, filters, 1)));
    expect_confinement(vmm, &expected);
}

fn all_threads_but_vcpus_have_short_slices() {
    let slice = |task: &Path| -> Option<u64> {
        let sched = fs::read_to_string(task.join("sched")).ok()?;
        let line = sched.lines().find(|line| line.starts_with("se.slice"))?;
        line.rsplit(' ').next()?.parse().ok()
    };
    let usual = slice(Path::new("/proc/self")).expect("the kernel tells");
    let (vmm, mut api) = running(&Program::tick(), |_, _| ());
    // Who answers has all its threads.
    api.get("/");
    let tasks = fs::read_dir(format!("/proc/{}/task", vmm.pid())).expect("the VMM runs");
    let mut seen = Vec::new();
    for task in tasks {
        let task = task.expect("a thread").path();
        let name = fs::read_to_string(task.join("comm")).expect("its name");
        let name = name.trim();
        if name == "api" || name == main_thread() {
            assert!(slice(&task).is_some_and(|slice| slice < usual), "{name}");
            seen.push("short");
        } else if name.starts_with("vcpu") {
            assert_eq!(slice(&task), Some(usual), "{name}");
            seen.push("usual");
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, ["short", "short", "usual"]);
    vmm.terminate();
}

fn without_seccomp_there_are_no_filters() {
    let builder = Vmm::builder().arguments(["--no-seccomp"]);
    let (vmm, _api) = running_in(builder, &Program::tick(), Entry::Linux64, |_, _| ());
    // New privileges are given up for Landlock as well.
    expect_threads(&vmm, ("api", 0, 0, 1), (&main_thread(), 0, 0, 1), 1, 0);
    vmm.terminate();
}

/// A VMM with a drive, a folder beside that of the VMM, and an image in both.
fn with_drive() -> (Builder, TempDir) {
    let builder = Vmm::builder();
    let other = tempfile::tempdir().expect("a folder");
    for image in [
        builder.directory().join("drive.img"),
        builder.directory().join("next.img"),
        other.path().join("next.img"),
    ] {
        let file = File::create(image).expect("a file");
        file.set_len(1 << 20).expect("an image");
    }
    (builder, other)
}

fn configured(builder: Builder) -> (Vmm, Api) {
    running_in(
        builder,
        &Program::tick(),
        Entry::Linux64,
        |folder, config| {
            config["drives"] = json!([{
                "drive_id": "data", "path_on_host": folder.join("drive.img"), "is_root_device": false,
            }]);
        },
    )
}

/// The paths of a snapshot in a folder.
fn snapshot_in(folder: &Path) -> Value {
    json!({ "snapshot_path": folder.join("state"), "mem_file_path": folder.join("memory") })
}

fn image(path: &Path) -> Value {
    json!({ "drive_id": "data", "path_on_host": path })
}

fn files_outside_are_out_of_reach_once_the_guest_runs() {
    let (builder, other) = with_drive();
    let own = builder.directory().join("own");
    fs::create_dir(&own).expect("a folder");
    let allowed = ["--allow-path".into(), own.clone().into_os_string()];
    let (vmm, mut api) = configured(builder.arguments(allowed));
    // What was configured may be replaced by what is beside it.
    api.patch("/drives/data", &image(&vmm.directory().join("next.img")));
    api.reach("Paused");
    api.put("/snapshot/create", &snapshot_in(&own));
    let outside = image(&other.path().join("next.img")).to_string();
    let messages = [
        api.refused("PATCH", "/drives/data", &outside),
        api.refused(
            "PUT",
            "/snapshot/create",
            &snapshot_in(other.path()).to_string(),
        ),
    ];
    for message in messages {
        for part in [
            &other.path().display().to_string(),
            "Landlock",
            "--allow-path",
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    let socket = vmm.directory().join("api.sock");
    let ended = vmm.terminate();
    assert!(!socket.exists());
    assert!(!ended.text().contains(NO_LANDLOCK), "{}", ended.text());
}

/// What a VMM logs that cannot give files up.
const NO_LANDLOCK: &str = "there is no Landlock";

/// Lets the kernel have no Landlock from now on, for this thread and what it starts: with an error of one that was built
/// without it, or of one that was started without it.
fn take_landlock_away(error: Errno) {
    // x86-64.
    const LANDLOCK_CREATE_RULESET: i64 = 444;
    let filter = SeccompFilter::new(
        [(LANDLOCK_CREATE_RULESET, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(error.raw_os_error().cast_unsigned()),
        TargetArch::x86_64,
    );
    let program: BpfProgram = filter
        .and_then(TryInto::try_into)
        .expect("a filter of one call");
    seccompiler::apply_filter(&program).expect("anybody may have fewer calls");
}

/// The machine runs, all files stay in reach, and the log says so.
fn a_kernel_without_landlock_is_told_of() {
    for error in [Errno::NOSYS, Errno::OPNOTSUPP] {
        let run = move || {
            take_landlock_away(error);
            let (builder, other) = with_drive();
            let own = builder.directory().join("own");
            fs::create_dir(&own).expect("a folder");
            let allowed = ["--allow-path".into(), own.into_os_string()];
            let (vmm, mut api) = configured(builder.arguments(allowed));
            vmm.stdout.wait_for(NO_LANDLOCK);
            api.patch("/drives/data", &image(&other.path().join("next.img")));
            assert_eq!(api.state(), "Running");
            vmm.terminate();
        };
        let done = std::thread::spawn(run).join();
        assert!(done.is_ok(), "{error}");
    }
}

fn without_a_word_every_place_is_allowed() {
    let (builder, other) = with_drive();
    // By default everywhere.
    let (vmm, mut api) = configured(builder);
    api.patch("/drives/data", &image(&other.path().join("next.img")));
    api.reach("Paused");
    api.put("/snapshot/create", &snapshot_in(other.path()));
    vmm.terminate();
    let missing = ["--allow-path", "/no/such/folder"];
    let ended = Vmm::builder()
        .arguments(missing)
        .spawn()
        .wait()
        .expect_code(153);
    assert!(
        ended.stderr.contains("--allow-path /no/such/folder: "),
        "{}",
        ended.stderr
    );
}

/// A start that fails leaves everything in reach: the next may be of other files.
fn a_start_that_fails_gives_nothing_up() {
    let other = tempfile::tempdir().expect("a folder");
    let (vmm, mut api) = Vmm::with_api();
    let bad = vmm.directory().join("bad");
    fs::write(&bad, b"no kernel").expect("a file");
    api.put("/boot-source", &json!({ "kernel_image_path": bad }));
    api.refused(
        "PUT",
        "/actions",
        &json!({ "action_type": "InstanceStart" }).to_string(),
    );
    api.configure(&config(other.path(), 1));
    api.start();
    vmm.terminate();
}

/// The VMM's own lists as one file.
fn lists() -> Value {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/seccomp/x86_64");
    let read = |name: &str| -> Value {
        let text = fs::read(folder.join(name).with_extension("json")).expect("a list");
        serde_json::from_slice(&text).expect("JSON")
    };
    let mut all = json!({});
    for thread in ["api", "vmm", "vcpu"] {
        all[thread] = read(thread)[thread].clone();
        // The VMM under test may be a debug build, and with either C library.
        let rules = all[thread]["filter"].as_array_mut().expect("a list");
        let more = [
            read("debug"),
            read("gnu")[thread].take(),
            read("musl")[thread].take(),
        ];
        rules.extend(
            more.iter()
                .flat_map(|list| list.as_array().expect("a list").clone()),
        );
    }
    all
}

/// Takes a call off a thread's list, or with an argument only the rule for that.
fn without(mut lists: Value, thread: &str, call: &str, argument: Option<&str>) -> Value {
    let rules = lists[thread]["filter"].as_array_mut().expect("a list");
    let before = rules.len();
    rules.retain(|rule| {
        let named = |comment: &str| {
            rule["args"]
                .as_array()
                .is_some_and(|args| args.iter().any(|a| a["comment"] == comment))
        };
        rule["syscall"] != call || argument.is_some_and(|comment| !named(comment))
    });
    assert!(rules.len() < before, "{thread} has no {call} {argument:?}");
    lists
}

/// A VMM with these filters, a log and metrics.
fn with_filters(lists: &Value) -> Builder {
    let builder = Vmm::builder();
    let path = |name: &str| builder.directory().join(name).into_os_string();
    let (filters, log, metrics) = (path("filters.json"), path("log"), path("metrics"));
    fs::write(&filters, lists.to_string()).expect("a file can be written");
    builder.arguments([
        "--seccomp-filter".into(),
        filters,
        "--log-path".into(),
        log,
        "--metrics-path".into(),
        metrics,
    ])
}

/// Checks that a VMM ended for a forbidden call, and said so on the standard error, in the log and in the metrics.
#[track_caller]
fn expect_violation(ended: Ended, thread: &str, number: i64, name: &str) {
    let ended = ended.expect_code(148);
    let line =
        format!("thread \"{thread}\": its seccomp filter forbids system call {number} ({name})");
    assert!(ended.stderr.contains(&line), "{line}:\n{}", ended.stderr);
    let read = |name| fs::read_to_string(ended.directory.path().join(name)).expect("a file");
    let log = read("log");
    assert!(log.contains(&line), "{line}:\n{log}");
    let metrics = read("metrics");
    let last: Value = serde_json::from_str(metrics.lines().last().unwrap_or("")).expect("JSON");
    assert_eq!(last["seccomp"]["num_faults"], 1, "{metrics}");
    assert!(
        last["utc_timestamp_ms"].as_u64() > Some(1_700_000_000_000),
        "{metrics}"
    );
}

fn a_forbidden_call_of_the_event_loop_ends_the_vmm() {
    let builder = with_filters(&without(lists(), "vmm", "eventfd2", None)).without_api();
    let config = config(builder.directory(), 1);
    let ended = builder.config(&config).spawn().wait();
    expect_violation(ended, &main_thread(), 290, "eventfd2");
}

fn a_forbidden_call_of_a_vcpu_ends_the_vmm() {
    let builder = with_filters(&without(lists(), "vcpu", "ioctl", None)).without_api();
    let config = config(builder.directory(), 1);
    let ended = builder.config(&config).spawn().wait();
    expect_violation(ended, "vcpu 0", 16, "ioctl");
}

fn a_forbidden_argument_ends_the_vmm() {
    let lists = without(lists(), "vmm", "ioctl", Some("KVM_CREATE_VM"));
    let builder = with_filters(&lists).without_api();
    let config = config(builder.directory(), 1);
    let ended = builder.config(&config).spawn().wait();
    expect_violation(ended, &main_thread(), 16, "ioctl");
}

fn a_forbidden_call_of_the_api_ends_the_vmm() {
    let vmm = with_filters(&without(lists(), "api", "sendmsg", None)).spawn();
    let mut api: Api = vmm.api();
    let answer = api.try_request("GET", "/", "");
    assert!(answer.is_err(), "{answer:?}");
    expect_violation(vmm.wait_for_fault(), "api", 46, "sendmsg");
}

fn a_file_of_filters_that_cannot_be_used_is_refused() {
    let mut no_vcpu = lists();
    no_vcpu.as_object_mut().expect("an object").remove("vcpu");
    let mut unknown_call = lists();
    unknown_call["api"]["filter"][3]["syscall"] = json!("frobnicate");
    for (filters, says) in [
        (
            no_vcpu,
            "filters.json: there is no filter for the thread vcpu",
        ),
        (
            unknown_call,
            "filters.json: thread api, rule 4 (frobnicate)",
        ),
        (json!([]), "filters.json: invalid type"),
    ] {
        let ended = with_filters(&filters).spawn().wait().expect_code(1);
        assert!(ended.stderr.contains(says), "{says}: {}", ended.stderr);
    }
    let missing = ["--seccomp-filter", "/no/such/file"];
    let ended = Vmm::builder()
        .arguments(missing)
        .spawn()
        .wait()
        .expect_code(1);
    assert!(
        ended.stderr.contains("--seccomp-filter: /no/such/file: "),
        "{}",
        ended.stderr
    );
}

fn guest_memory_stays_out_of_core_dumps() {
    let (vmm, _api) = running(&Program::tick(), |_, _| ());
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", vmm.pid())).expect("the VMM runs");
    let (mut size, mut checked) = (0, 0);
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Size:") {
            size = kib.trim().trim_end_matches(" kB").parse().expect("a size");
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            // Nothing else of this size is mapped.
            if size >= 128 << 10 {
                assert!(
                    flags.split_whitespace().any(|flag| flag == "dd"),
                    "{size} KiB: {flags}"
                );
                checked += 1;
            }
        }
    }
    assert_eq!(checked, 1, "{smaps}");
    vmm.terminate();
}

/// A process that is not dumpable belongs to root in /proc, whoever runs it.
fn others_of_the_same_user_cannot_look_into_it() {
    const NOBODY: u32 = 65534;
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| directory.path().join(name);
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("our own");
    // The workspace may lie where nobody may look.
    fs::copy(programs::vmm(), path("vmm")).expect("a program can be copied");
    fs::create_dir(path("own")).expect("a directory");
    chown(path("own"), Some(NOBODY), Some(NOBODY)).expect("we are root");
    let socket = path("own").join("api.sock");
    let mut command = Command::new(path("vmm"));
    command
        .arg("--api-sock")
        .arg(&socket)
        .uid(NOBODY)
        .gid(NOBODY)
        .stdout(Stdio::null());
    let deadline = Instant::now() + PATIENCE;
    let mut child = loop {
        match command.spawn() {
            // A child of another test may hold the copy open for writing, until its own exec.
            Err(error)
                if error.kind() == ErrorKind::ExecutableFileBusy && Instant::now() < deadline => {}
            started => break started.expect("the VMM starts"),
        }
    };
    reaper::watch(&child).expect("there is a reaper");
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < deadline, "the API does not listen");
    }
    let owner = |name: &str| {
        fs::metadata(format!("/proc/{}/{name}", child.id()))
            .expect("it runs")
            .uid()
    };
    let owners = [owner("mem"), owner("fd"), owner("maps")];
    let descriptors = fs::read_dir(format!("/proc/{}/fd", child.id())).expect("we are root");
    let knows_its_pages = descriptors
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .any(|to| to.ends_with("pagemap"));
    child.kill().expect("it runs");
    child.wait().expect("it has ended");
    assert_eq!(owners, [0; 3]);
    assert!(knows_its_pages, "nor can it itself, but before it is so");
    // What the check is worth: a process that is dumpable belongs to its user.
    let mut other = Command::new("cat")
        .uid(NOBODY)
        .gid(NOBODY)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("cat starts");
    other
        .stdin
        .as_mut()
        .expect("a pipe")
        .write_all(b"x")
        .expect("cat reads");
    let mut byte = [0];
    std::io::Read::read_exact(other.stdout.as_mut().expect("a pipe"), &mut byte)
        .expect("cat writes");
    let owner = fs::metadata(format!("/proc/{}/mem", other.id()))
        .expect("it runs")
        .uid();
    other.kill().expect("it runs");
    other.wait().expect("it has ended");
    assert_eq!(owner, NOBODY);
}
