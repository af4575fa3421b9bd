//! SIGKILL at any moment: nothing that the jailer made stays but the jail's folder, and the next start is not hindered.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use lepton_tests::guest::{Entry, Program};
use lepton_tests::jail::{Jail, wait_until_gone};
use lepton_tests::{PATIENCE, reaper};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::user::{kvm, with_kvm};

/// Rounds of each test; `LEPTON_KILL_ROUNDS` says another number, such as 500.
fn rounds() -> u64 {
    let asked = std::env::var("LEPTON_KILL_ROUNDS").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(24)
}

/// Moments, the same each time: xorshift from a fixed seed.
struct Moments(u64);

impl Moments {
    fn next_below(&mut self, bound: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let nanoseconds = u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(self.0 % nanoseconds)
    }
}

/// The groups that are left below a parent, in all hierarchies.
fn groups(parent: &str) -> Vec<PathBuf> {
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten();
    hierarchies
        .filter_map(|entry| fs::read_dir(entry.ok()?.path().join(parent)).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()).filter(|path| path.is_dir()))
        .collect()
}

/// Puts the machine of `--config-file /vm.json` into the jail.
fn give_machine(jail: &Jail) {
    let config = json!({ "boot-source": { "kernel_image_path": "/kernel" } }).to_string();
    jail.file("kernel", &Program::tick().elf(Entry::Linux64));
    jail.file("vm.json", config.as_bytes());
}

/// Starts the jailer with such a machine, and kills it, or the VMM that it has become, at the next moment, right after a look
/// at things. Returns whether there was an API by then. No mount is left.
fn kill_some_time_after_its_start(jail: &Jail, moments: &mut Moments, look: impl FnOnce()) -> bool {
    give_machine(jail);
    let mut command = jail.command();
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the jailer starts");
    reaper::watch(&child).expect("there is a reaper");
    // The moment is what is tested: nothing is waited for.
    std::thread::sleep(moments.next_below(Duration::from_millis(150)));
    let reached = jail.root().join("run/firecracker.socket").exists();
    look();
    kill_process(Pid::from_child(&child), Signal::KILL).expect("it is our child");
    drop(child.wait());
    let here = fs::read_to_string("/proc/self/mounts").expect("mounts");
    assert!(!here.contains("lepton-jail-"), "a mount is left:\n{here}");
    reached
}

/// As the documentation has it: once the folder is gone, the id is free.
fn free_id(jail: &Jail) {
    let folder = jail.root();
    let folder = folder.parent().expect("the id's folder");
    fs::remove_dir_all(folder).expect("the folder was made");
}

/// The jailer is killed, or the VMM that it has become, some time after its start: while it makes the jail, while the VMM
/// starts, while a guest runs.
pub fn killed_at_any_moment_it_leaves_nothing_in_the_way() {
    let parent = format!("lepton-test-{}-kill", std::process::id());
    let mut moments = Moments(0x9e37_79b9_7f4a_7c15);
    // One that nobody has made: it is there as long as somebody has it open.
    let tap = format!("lk{}", std::process::id());
    let jail = Jail::as_another_user()
        .vmm(["--config-file", "/vm.json"])
        .options(["--tap", &tap]);
    let jail = if Path::new("/sys/fs/cgroup/cpu/tasks").exists() {
        jail.options(["--cgroup", "cpu.shares=20", "--parent-cgroup", &parent])
    } else {
        jail
    };
    let (mut reached_guest, mut had_tap) = (0, 0);
    let tap = Path::new("/sys/class/net").join(tap);
    for _ in 0..rounds() {
        reached_guest += u64::from(kill_some_time_after_its_start(&jail, &mut moments, || {
            had_tap += u64::from(tap.exists());
        }));
        // The keeper may be about to close what it has of the jailer's.
        wait_until_gone(&tap);
        free_id(&jail);
    }
    give_machine(&jail);
    let last = jail.vmm(["--level", "Error"]).spawn();
    assert_eq!(last.api().state(), "Running");
    last.signal(Signal::KILL);
    drop(last);
    for group in groups(&parent) {
        wait_until_gone(&group);
    }
    eprintln!(
        "{} rounds, {reached_guest} of them with an API, {had_tap} with a tap",
        rounds()
    );
    assert!(had_tap > 0, "no round had a tap");
    drop(fs::remove_dir(
        Path::new("/sys/fs/cgroup/cpu").join(&parent),
    ));
}

/// Whether a process has this word on its command line.
fn is_somewhere(word: &str) -> bool {
    let processes = fs::read_dir("/proc").expect("processes").flatten();
    let lines = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let mut words = lines.flat_map(|line| {
        let words = line.split(|byte| *byte == 0).map(<[u8]>::to_vec);
        words.collect::<Vec<_>>()
    });
    words.any(|found| found == word.as_bytes())
}

/// The same for a jailer that is not root, whose VMM is a child in namespaces of its own.
pub fn without_root_killed_at_any_moment_nobody_stays() {
    let kvm = kvm();
    let mut moments = Moments(0x2545_f491_4f6c_dd1d);
    let id = format!("kill-{}", std::process::id());
    let jail = with_kvm(&kvm).id(&id).vmm(["--config-file", "/vm.json"]);
    let mut reached_guest = 0;
    for _ in 0..rounds() {
        reached_guest += u64::from(kill_some_time_after_its_start(&jail, &mut moments, || {}));
        let deadline = Instant::now() + PATIENCE;
        while is_somewhere(&id) {
            assert!(Instant::now() < deadline, "a process of {id} goes on");
        }
        free_id(&jail);
    }
    eprintln!("{} rounds, {reached_guest} of them with an API", rounds());
}
