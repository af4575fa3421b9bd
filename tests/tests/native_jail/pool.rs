//! VMMs that were jailed ahead of time.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use lepton_hostio::packet::PacketSocket;
use lepton_tests::counting::{self, let_run};
use lepton_tests::guest::{Entry, Program};
use lepton_tests::jail::{GID, Jail, Jailed, UID};
use lepton_tests::{Api, PATIENCE, Vmm, programs, reaper};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::user::{kvm, with_kvm};

/// A jailer with a pool. Dropped, it ends, and with it all that it has started.
struct Pool {
    jail: Jail,
    child: Child,
}

impl Pool {
    #[track_caller]
    fn new(jail: Jail, options: &[&str]) -> Self {
        let socket = jail.base().join("pool.sock");
        let pool = [OsString::from("--pool"), socket.clone().into()];
        let jail = jail.id("copy").options(pool).options(options);
        let child = jail.command().stdout(Stdio::null()).spawn();
        let child = child.expect("the jailer starts");
        reaper::watch(&child).expect("there is a reaper");
        let pool = Pool { jail, child };
        wait_until("the pool listens", || {
            PacketSocket::connect(&socket).is_ok()
        });
        pool
    }

    fn socket(&self) -> PathBuf {
        self.jail.base().join("pool.sock")
    }

    fn folder(&self) -> PathBuf {
        self.jail.base().join("lepton-vmm")
    }

    /// The ids of all jails.
    fn ids(&self) -> Vec<String> {
        let entries = self.folder().read_dir().into_iter().flatten();
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        names.map(|n| n.into_string().expect("an id")).collect()
    }

    /// Waits until none of these has a jail.
    #[track_caller]
    fn wait_until_gone(&self, ids: &[String]) {
        wait_until("their jails go", || {
            self.ids().iter().all(|id| !ids.contains(id))
        });
    }

    fn root(&self, id: &str) -> PathBuf {
        self.folder().join(id).join("root")
    }

    fn api(&self, id: &str) -> Api {
        Api::connect(&self.root(id).join("run/firecracker.socket"))
    }

    fn pid(&self, id: &str) -> Option<Pid> {
        let text = fs::read_to_string(self.root(id).join("lepton-vmm.pid")).ok()?;
        Pid::from_raw(text.parse().ok()?)
    }

    #[track_caller]
    fn end(&mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
        self.child.wait().expect("it ends");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        for pid in self.ids().iter().filter_map(|id| self.pid(id)) {
            // Most have ended by themselves.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

#[track_caller]
pub fn wait_until(what: &str, so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "not so in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A jailed machine that runs, with the pool's socket in its jail.
#[track_caller]
fn parent(jail: Jail, start: fn(Jail) -> Jailed, pool: &Pool) -> (Jailed, Api) {
    jail.file("console", b"");
    jail.file("log", b"");
    jail.file("kernel", &Program::count().elf(Entry::Pvh));
    let vmm = start(jail);
    let mut api = vmm.api();
    api.put("/logger", &json!({ "log_path": "/log" }));
    api.put("/serial", &json!({ "serial_out_path": "/console" }));
    api.put("/boot-source", &json!({ "kernel_image_path": "/kernel" }));
    let shape = json!({ "vcpu_count": 1, "mem_size_mib": 16, "clonable": true });
    api.put("/machine-config", &shape);
    api.start();
    let_run(&mut api);
    fs::hard_link(pool.socket(), vmm.jail.root().join("pool.sock")).expect("one file system");
    (vmm, api)
}

/// A request for as many copies, which differ in nothing.
fn copies(count: usize) -> Value {
    json!({ "pool": "/pool.sock", "children": vec![json!({}); count] })
}

/// Clones, and returns the copies' ids.
#[track_caller]
fn clone(api: &mut Api, count: usize) -> Vec<String> {
    let (status, reply) = api.request("PUT", "/clone", &copies(count).to_string());
    assert_eq!(status, 200, "{reply}");
    let reply: Value = serde_json::from_str(&reply).expect("JSON");
    let children = reply["children"].as_array().expect("a list");
    assert_eq!(children.len(), count);
    let id = |child: &Value| child["id"].as_str().expect("an id").to_owned();
    children.iter().map(id).collect()
}

/// Takes VMMs as who clones does, and returns the connection, and those to the VMMs.
#[track_caller]
fn take(pool: &Pool, count: usize) -> (PacketSocket, Vec<OwnedFd>) {
    let link = PacketSocket::connect(&pool.socket()).expect("it listens");
    link.send(format!("take {count}").as_bytes(), &[])
        .expect("it listens");
    let mut taken = Vec::new();
    while taken.len() < count {
        let left = Timespec::try_from(PATIENCE).expect("a short time");
        let mut polled = [PollFd::new(&link, PollFlags::IN)];
        assert!(poll(&mut polled, Some(&left)).expect("it can be awaited") > 0);
        let packet = link.receive(64).expect("an answer").expect("one");
        taken.extend(packet.files);
    }
    (link, taken)
}

/// What a file is, by whatever name.
#[track_caller]
fn inode(path: &Path) -> (u64, u64) {
    let file = fs::metadata(path).expect("it is there");
    (file.dev(), file.ino())
}

/// What confinement shows in.
fn confinement(pid: u32) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let wanted = [
        "Uid",
        "Gid",
        "Groups",
        "Cap",
        "NoNewPrivs",
        "Umask",
        "Seccomp:",
        "NSpid",
        "SigBlk",
        "SigIgn",
    ];
    let lines = text
        .lines()
        .filter(|line| wanted.iter().any(|name| line.starts_with(name)));
    // Process ids are others; how many namespaces they are in is the same.
    lines
        .map(|line| match line.strip_prefix("NSpid:") {
            Some(ids) => format!("NSpid {}", ids.split_whitespace().count()),
            None => line.to_owned(),
        })
        .collect()
}

pub fn copies_come_from_a_pool_of_jails() {
    let jail = Jail::as_another_user;
    copies_come_from_a_pool(jail(), jail(), Jailed::of_child);
}

/// Their jailers are their parents then, which outlive the start.
pub fn copies_with_process_ids_of_their_own_come_from_a_pool() {
    let jail = || Jail::as_another_user().options(["--new-pid-ns"]);
    copies_come_from_a_pool(jail(), jail(), Jail::detach);
}

pub fn without_root_copies_come_from_a_pool_of_jails() {
    let kvm = kvm();
    copies_come_from_a_pool(with_kvm(&kvm), with_kvm(&kvm), Jailed::of_child);
}

fn copies_come_from_a_pool(of_pool: Jail, of_parent: Jail, start: fn(Jail) -> Jailed) {
    let mut pool = Pool::new(of_pool, &["--pool-size", "3"]);
    let socket = || fs::metadata(pool.socket()).expect("a socket");
    // It listens before it is given away.
    wait_until("the socket is the user's", || {
        (socket().uid(), socket().gid()) == (UID, GID)
    });
    assert_eq!(socket().permissions().mode() & 0o777, 0o600);
    let (vmm, mut api) = parent(of_parent, start, &pool);
    let first = clone(&mut api, 3);
    let mut programs = HashSet::from([inode(programs::vmm())]);
    for id in &first {
        let pid = pool.pid(id).expect("it runs").as_raw_nonzero().get();
        let pid = pid.cast_unsigned();
        // As its parent, which the plain jailer has made.
        assert_eq!(confinement(pid), confinement(vmm.pid), "{id}");
        let own = fs::read_link(format!("/proc/{pid}/ns/mnt")).expect("it runs");
        assert_ne!(own, vmm.link("ns/mnt"));
        // It runs what lies in its jail, which is nobody else's.
        let program = inode(&PathBuf::from(format!("/proc/{pid}/exe")));
        assert_eq!(program, inode(&pool.root(id).join("lepton-vmm")));
        assert!(programs.insert(program), "{id} runs another one's program");
        let mut copy = pool.api(id);
        let_run(&mut copy);
        copy.reach("Paused");
    }
    let_run(&mut api);
    // Others are made in their place. Whoever takes them and makes no machines of them leaves nothing of them.
    let (link, taken) = take(&pool, 3);
    let unused: Vec<_> = pool.ids();
    let unused: Vec<_> = unused
        .into_iter()
        .filter(|id| !first.contains(id))
        .collect();
    assert!(unused.len() >= 3, "{unused:?}");
    drop((link, taken));
    wait_until("their jails go", || {
        unused.iter().filter(|id| pool.root(id).exists()).count() + 3 <= unused.len()
    });
    // More than are ready.
    let more = clone(&mut api, 5);
    let used = [first, more].concat();
    // The pool's end is the end of those that are nobody, and of no other.
    pool.end(Signal::TERM);
    assert!(!pool.socket().exists());
    wait_until("only copies stay", || pool.ids().len() == used.len());
    for id in &used {
        let mut copy = pool.api(id);
        assert!(["Running", "Paused"].contains(&copy.state().as_str()));
    }
}

/// Without a name, so that nothing is left of it when the pool is killed.
pub fn the_next_copy_of_the_program_is_written_ahead() {
    let pool = Pool::new(Jail::as_another_user(), &["--pool-size", "0"]);
    let (_vmm, mut api) = parent(Jail::as_another_user(), Jailed::of_child, &pool);
    let ahead = || {
        let open = fs::read_dir(format!("/proc/{}/fd", pool.child.id())).expect("it runs");
        let files = open.map(|file| file.expect("a descriptor").path());
        let files = files.filter_map(|file| Some((fs::read_link(&file).ok()?, file)));
        let below = |(path, _): &(PathBuf, PathBuf)| path.starts_with(pool.jail.base());
        // The pool's socket has no path here, and folders have one that is there.
        let mut nameless = files.filter(below).filter(|(path, _)| !path.exists());
        nameless.next().map(|(_, file)| inode(&file))
    };
    for _ in 0..2 {
        wait_until("a copy is written", || ahead().is_some());
        let written = ahead().expect("nobody has taken it");
        let id = &clone(&mut api, 1)[0];
        assert_eq!(inode(&pool.root(id).join("lepton-vmm")), written);
    }
}

pub fn copies_of_a_template_come_from_a_pool_of_jails() {
    let pool = Pool::new(Jail::as_another_user(), &["--pool-size", "2"]);
    let (saved, mut api) = Vmm::quiet();
    counting::configure(&saved, &mut api, 1, 16);
    api.start();
    let_run(&mut api);
    api.reach("Paused");
    let [state, memory] = ["state", "memory"].map(|name| saved.path(name));
    let both = json!({ "snapshot_path": state, "mem_file_path": memory });
    api.put("/snapshot/create", &both);
    let arguments = ["--template", &state, "--template-memory", &memory];
    let template = Vmm::builder().arguments(arguments).spawn();
    let mut copies = Vec::new();
    // Those that are ready, and more than are.
    for count in [1, 4] {
        let request = json!({ "pool": pool.socket(), "children": vec![json!({}); count] });
        let (status, reply) = template
            .api()
            .request("PUT", "/clone", &request.to_string());
        assert_eq!(status, 200, "{reply}");
        let reply: Value = serde_json::from_str(&reply).expect("JSON");
        let children = reply["children"].as_array().expect("a list");
        copies.extend(children.iter().map(|child| {
            let id = child["id"].as_str().expect("an id");
            assert!(pool.root(id).exists(), "{id}");
            pool.api(id)
        }));
    }
    template.terminate();
    assert_eq!(copies.len(), 5);
    for copy in &mut copies {
        let_run(copy);
        copy.reach("Paused");
    }
}

pub fn what_a_pool_is_asked_for_is_checked() {
    let pool = Pool::new(Jail::as_another_user(), &["--pool-size", "1"]);
    let jail = Jail::as_another_user().id("vm-1");
    let (_vmm, mut api) = parent(jail, Jailed::of_child, &pool);
    for (bad, reason) in [
        (json!({ "children": [{}] }), "each child needs one"),
        (
            json!({ "pool": "/pool.sock", "children": [{ "adopt_socket": "/x" }] }),
            "come from the pool",
        ),
        (copies(0), "0 children"),
        (copies(1001), "1001 children"),
        (json!({ "pool": "/no.sock", "children": [{}] }), "/no.sock"),
    ] {
        let message = api.refused("PUT", "/clone", &bad.to_string());
        assert!(message.contains(reason), "{message}");
    }
    // A copy that fails ends, and its jail goes; others can be had.
    let tap = json!({ "iface_id": "eth7", "host_dev_name": "tap7" });
    let bad = json!({ "pool": "/pool.sock", "children": [{}, { "network_overrides": [tap] }] });
    let message = api.refused("PUT", "/clone", &bad.to_string());
    assert!(message.contains("children[1]"), "{message}");
    assert!(message.contains("eth7"), "{message}");
    pool.wait_until_gone(&["copy-1".into(), "copy-2".into()]);
    clone(&mut api, 1);
    // Who says what nobody says is let go.
    for word in ["take 0", "take 1001", "x"] {
        let link = PacketSocket::connect(&pool.socket()).expect("it listens");
        link.send(word.as_bytes(), &[]).expect("it listens");
        let left = Timespec::try_from(PATIENCE).expect("a short time");
        let mut polled = [PollFd::new(&link, PollFlags::IN)];
        assert!(poll(&mut polled, Some(&left)).expect("it can be awaited") > 0);
        assert!(link.receive(64).is_err(), "{word}");
    }
}

pub fn a_pool_that_is_killed_leaves_nothing() {
    for more in [&[][..], &["--new-pid-ns"]] {
        let options = ["--pool-size", "2", "--pool-refill", "1"];
        let mut pool = Pool::new(Jail::as_another_user(), &[&options, more].concat());
        // Once they are ready, and one of them is in somebody's hands.
        let (_link, _taken) = take(&pool, 1);
        pool.end(Signal::KILL);
        wait_until("no jail stays", || pool.ids().is_empty());
    }
}

pub fn a_pool_that_cannot_start_says_why() {
    let jail = Jail::as_another_user().id("copy").vmm(["--no-such-option"]);
    let socket = jail.base().join("pool.sock");
    let pool = [OsString::from("--pool"), socket.clone().into()];
    let jail = jail.options(pool);
    let output = jail.run();
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        errors.contains("VMMs have ended before they were ready"),
        "{errors}"
    );
    assert!(errors.contains("--no-such-option"), "{errors}");
    assert!(!socket.exists());
    let long = "x".repeat(60);
    let message = jail.id(&long).refused();
    assert!(message.contains("too long to have a number"), "{message}");
}
