//! Linux guests that are saved, loaded and cloned.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use lepton_agent::client::{ExitStatus, Output};
use lepton_tests::arp::Ear;
use lepton_tests::heir::{Heir, clone, unique_things};
use lepton_tests::linux::{self, Linux};
use lepton_tests::sparse::lay_over;
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::tap::Tap;
use lepton_tests::{PATIENCE, Vmm, test};
use serde_json::{Value, json};
use tempfile::TempDir;

fn main() -> ExitCode {
    suite::run(
        // Each machine has both processors for itself: clocks are compared.
        Order::OneByOne,
        &linux::NEEDS,
        [
            test!(a_guest_is_saved_and_loaded),
            test!(a_running_guest_is_cloned),
            test!(copies_are_others_before_they_speak)
                .needs(Need::Root)
                .needs(Need::Program("ip")),
        ],
    )
}

/// The guest's clock, by `adjtimex`.
#[track_caller]
fn clock(guest: &Linux) -> Duration {
    let text = guest.sh("adjtimex");
    let field = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next());
        let number = number.and_then(|number| number.parse().ok());
        number.unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    Duration::new(field("time.tv_sec:"), 0) + Duration::from_micros(field("time.tv_usec:"))
}

fn now() -> Duration {
    let now = SystemTime::UNIX_EPOCH.elapsed();
    now.expect("after 1970")
}

/// How far the guest's clock is ahead of the host's, in seconds: between these two.
#[track_caller]
fn ahead(guest: &Linux) -> (f64, f64) {
    let before = now().as_secs_f64();
    let time = clock(guest).as_secs_f64();
    let after = now().as_secs_f64();
    (time - after, time - before)
}

/// Checks that the guest's clock is as right as it was before, but for a second. In the lab it is not quite right from the
/// beginning.
#[track_caller]
fn check_clock(guest: &Linux, before: (f64, f64)) {
    let now = ahead(guest);
    assert!(
        now.1 >= before.0 - 1.0 && now.0 <= before.1 + 1.0,
        "ahead by {before:?} s, then by {now:?} s"
    );
}

/// Seconds since the guest booted, by CLOCK_BOOTTIME; as it is never suspended, CLOCK_MONOTONIC is the same.
#[track_caller]
fn uptime(guest: &Linux) -> f64 {
    let text = guest.sh("cat /proc/uptime");
    let first = text.split(' ').next().expect("a word");
    first.parse().expect("seconds")
}

/// Checks that the guest's kernel took the gap in its time for granted. What it said of its boot has been cleared.
#[track_caller]
fn check_log(guest: &Linux) {
    guest.sh("! dmesg | grep -E 'stall|lockup|BUG:|WARNING:|skew'");
}

/// Where a machine is saved.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Place(TempDir::new().expect("a temporary directory"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Saves a machine, as it is now.
    #[track_caller]
    fn save(&self, guest: &mut Linux, kind: &str) {
        guest.api.reach("Paused");
        guest.api.put(
            "/snapshot/create",
            &json!({
                "snapshot_type": kind,
                "snapshot_path": self.path("state"),
                "mem_file_path": self.path(kind),
            }),
        );
    }

    /// Loads what was saved, into a new process.
    #[track_caller]
    fn load(&self) -> Linux {
        self.load_as(&json!({}))
    }

    /// The same, with more in the request.
    #[track_caller]
    fn load_as(&self, more: &Value) -> Linux {
        let (vmm, mut api) = Vmm::with_api();
        let mut load = json!({
                "snapshot_path": self.path("state"),
                "mem_backend": { "backend_type": "File", "backend_path": self.path("Full") },
                "track_dirty_pages": true,
                "resume_vm": true,
                "clock_realtime": true,
                "vsock_override": { "uds_path": vmm.path("v.sock") },
        });
        for (key, value) in more.as_object().expect("an object") {
            load[key] = value.clone();
        }
        api.put("/snapshot/load", &load);
        Linux::running(vmm, api)
    }
}

fn a_guest_is_saved_and_loaded() {
    let place = Place::new();
    let mut guest = Linux::boot("quiet", |_, config| {
        config["machine-config"]["track_dirty_pages"] = true.into();
        config["machine-config"]["vcpu_count"] = 2.into();
    });
    let clock = ahead(&guest);
    guest.sh("dmesg -c >/dev/null; echo one > /tmp/one");
    let first = uptime(&guest);
    place.save(&mut guest, "Full");
    drop(guest);

    let mut guest = place.load();
    let second = uptime(&guest);
    assert!(second >= first, "{second} after {first}");
    check_clock(&guest, clock);
    assert_eq!(guest.sh("cat /tmp/one; nproc"), "one\n2");
    guest.sh("echo two > /tmp/two");
    check_log(&guest);
    let second = uptime(&guest);

    // What has changed since, over what was there.
    place.save(&mut guest, "Diff");
    drop(guest);
    lay_over(&place.path("Full"), &place.path("Diff"));
    let guest = place.load();
    let third = uptime(&guest);
    assert!(third >= second, "{third} after {second}");
    check_clock(&guest, clock);
    assert_eq!(guest.sh("cat /tmp/one /tmp/two"), "one\ntwo");
    // It also ends as it should.
    guest.shut_down();
}

fn a_running_guest_is_cloned() {
    let mut guest = Linux::boot("quiet", |_, config| {
        config["machine-config"]["clonable"] = true.into();
        config["machine-config"]["vcpu_count"] = 2.into();
    });
    guest.sh("dmesg -c >/dev/null; echo one > /tmp/one");
    // A conversation that goes on: each line comes back.
    let cat = guest.start("while read line; do echo $line; done");
    let talk = |line: &str| {
        assert!(cat.write_stdin(line.as_bytes()).expect("the agent listens"));
        let mut heard = Vec::new();
        while heard.len() < line.len() {
            let more = cat.read(Output::Stdout).expect("the agent listens");
            assert!(!more.is_empty(), "the conversation ended");
            heard.extend(more);
        }
        assert_eq!(String::from_utf8_lossy(&heard), line);
    };
    talk("before\n");
    let before = uptime(&guest);
    let clock = ahead(&guest);
    let heirs = [Heir::new(), Heir::new()];
    let children: Vec<Value> = heirs.iter().map(Heir::child).collect();
    clone(&mut guest.api, &children);
    talk("after\n");
    check_clock(&guest, clock);
    let children = heirs.map(Heir::linux);
    for (number, child) in children.iter().enumerate() {
        check_clock(child, clock);
        let after = uptime(child);
        assert!(after >= before, "{after} after {before}");
        assert_eq!(child.sh("cat /tmp/one"), "one");
        // Whoever talked to the machine does not talk to its copy: the connection has ended there, and what was started over
        // it with it.
        let deadline = Instant::now() + PATIENCE;
        while child.sh("ps | grep -c '[w]hile read line'; :") != "0" {
            assert!(Instant::now() < deadline, "{}", child.sh("ps"));
        }
        child.sh(&format!("echo {number} > /tmp/mine; cat /tmp/mine"));
    }
    talk("at last\n");
    for (number, child) in children.iter().enumerate() {
        assert_eq!(child.sh("cat /tmp/mine"), number.to_string());
        check_log(child);
    }
    let seen = guest.run("cat /tmp/mine", b"");
    assert_ne!(seen.status, ExitStatus::Exited(0), "{seen:?}");

    // A copy of a copy, while the others go on.
    let [mut child, other] = children;
    let heir = Heir::new();
    clone(&mut child.api, &[heir.child()]);
    let grandchild = heir.linux();
    check_clock(&grandchild, clock);
    assert_eq!(grandchild.sh("cat /tmp/one /tmp/mine"), "one\n0");
    grandchild.shut_down();
    child.shut_down();
    talk("still here\n");
    cat.close_stdin().expect("the agent listens");
    assert_eq!(
        cat.wait().expect("the agent listens"),
        ExitStatus::Exited(0)
    );
    guest.shut_down();
    assert_eq!(other.sh("cat /tmp/mine"), "1");
    other.shut_down();
}

fn copies_are_others_before_they_speak() {
    // Each has a network of its own, whose host is x.1 and whose guest is x.2.
    let nets = [
        "172.30.81",
        "172.30.82",
        "172.30.83",
        "172.30.84",
        "172.30.85",
    ];
    let taps = nets.map(|net| Tap::new(Some(&format!("{net}.1/24"))));
    let mac = |number: usize| format!("06:00:ac:1e:51:{:02x}", number + 1);
    let ip = format!("quiet ip={0}.2::{0}.1:255.255.255.0::eth0:off", nets[0]);
    let mut guest = Linux::boot(&ip, |_, config| {
        config["network-interfaces"] = json!([{
            "iface_id": "eth0", "host_dev_name": taps[0].name(), "guest_mac": mac(0),
        }]);
    });
    guest.sh("echo 0123456789abcdef0123456789abcdef > /etc/machine-id; hostname parent");
    // It talks while it is cloned, on and on.
    guest.sh(&format!(
        "(setsid ping {}.1 >/dev/null 2>&1 &) ; ping -c 1 -W 20 {}.1",
        nets[0], nets[0]
    ));
    let identity = |number: usize| {
        let (address, gateway) = (
            format!("{}.2/24", nets[number]),
            format!("{}.1", nets[number]),
        );
        json!({
            "hostname": format!("copy-{number}"), "timeout_ms": 50_000,
            "interfaces": [{
                "iface_id": "eth0", "guest_mac": mac(number), "address": address, "gateway": gateway,
            }],
        })
    };
    let tap = |number: usize| json!([{ "iface_id": "eth0", "host_dev_name": taps[number].name() }]);
    let heirs = [Heir::new(), Heir::new()];
    let children: Vec<Value> = (1..)
        .zip(&heirs)
        .map(|(number, heir)| {
            let mut child = heir.child();
            child["network_overrides"] = tap(number);
            child["identity"] = identity(number);
            child
        })
        .collect();
    let mut ear = Ear::new();
    clone(&mut guest.api, &children);
    let mut family: Vec<Linux> = heirs.map(Heir::linux).into();

    // One that is loaded, too.
    let place = Place::new();
    place.save(&mut guest, "Full");
    guest.api.reach("Resumed");
    let more = json!({ "network_overrides": tap(3), "identity": identity(3) });
    family.push(place.load_as(&more));

    // And a copy of what was saved, by a process that only keeps it.
    let template = Vmm::builder()
        .arguments(["--template".into(), place.path("state")])
        .arguments(["--template-memory".into(), place.path("Full")])
        .spawn();
    let heir = Heir::new();
    let mut child = heir.child();
    child["network_overrides"] = tap(4);
    child["identity"] = identity(4);
    clone(&mut template.api(), &[child]);
    family.push(heir.linux());
    template.terminate();

    let parents = unique_things(&guest);
    assert_eq!(
        parents[2..],
        [
            "0123456789abcdef0123456789abcdef",
            "parent",
            &mac(0),
            "172.30.81.2/24"
        ]
    );
    let mut seen = vec![parents];
    for (number, child) in (1..).zip(&family) {
        let things = unique_things(child);
        assert_eq!(
            things[3..],
            [
                format!("copy-{number}"),
                mac(number),
                format!("{}.2/24", nets[number])
            ]
        );
        for other in &seen {
            for (mine, theirs) in things.iter().zip(other) {
                assert_ne!(mine, theirs, "{things:?}\n{other:?}");
            }
        }
        seen.push(things);
        let routes = child.sh("ip -4 route");
        assert!(
            routes.contains(&format!("default via {}.1 dev eth0", nets[number])),
            "{routes}"
        );
        assert!(!routes.contains(nets[0]), "{routes}");
        child.sh(&format!("ping -c 1 -W 20 {}.1", nets[number]));
        // Its neighbours were told, without having asked.
        ear.wait_for(&mac(number), &format!("{}.2", nets[number]));
        // Nobody but itself was ever heard there.
        let heard = std::process::Command::new("ip")
            .args(["neigh", "show", "dev", taps[number].name()])
            .output()
            .expect("ip starts");
        let heard = String::from_utf8_lossy(&heard.stdout).into_owned();
        assert!(
            heard.contains(&mac(number)) && !heard.contains(&mac(0)),
            "{heard}"
        );
    }
    guest.sh(&format!("ping -c 1 -W 20 {}.1", nets[0]));
    for child in family {
        child.shut_down();
    }
    guest.shut_down();
}
