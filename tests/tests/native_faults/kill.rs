//! SIGKILL at any moment of a machine's life: while it starts, while the guest uses its drive, while the drive is reset
//! between two drivers, while it is paused and saved. Everything stays where it was: the next one starts with the same
//! sockets, the same drive, the same snapshot.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lepton_api::Client;
use lepton_devices::virtio::block::overlay::{Chain, Overlay};
use lepton_tests::metal::pattern;
use lepton_tests::{PATIENCE, linux, programs, reaper};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Rounds; `LEPTON_KILL_ROUNDS` says another number, such as 500.
const ROUNDS: u64 = 100;
const BYTES: usize = 256 << 10;
const PLACE: usize = 4096;

/// All rounds, which have one folder: what one leaves is in the way of the next, if it is in the way.
struct Rounds {
    folder: TempDir,
    random: u64,
}

/// The drive of a round.
#[derive(Debug, Clone, Copy)]
struct Drive {
    engine: &'static str,
    has_overlay: bool,
}

/// What the rounds have come to.
#[derive(Debug, Default)]
struct Seen {
    before_the_api: u64,
    with_an_api: u64,
    ended_before: u64,
    partly_written: u64,
    saved: u64,
}

impl Rounds {
    fn new() -> Self {
        // In memory, where there is such a place: a real disk would make of this a test of disks.
        let memory = Path::new("/dev/shm");
        let folder = match memory.is_dir() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        Self {
            folder: folder.expect("a temporary directory"),
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// Moments, the same each time: xorshift from a fixed seed.
    fn next_below(&mut self, bound: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % bound.max(1)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What a machine is made from: a guest that writes its drive in order, each write followed by a flush, then begins
    /// again with another driver, reads all and checks it.
    fn config(&self, drive: Drive) -> Value {
        let arguments = format!(
            "probe.mode=blk_flush,blk_read probe.verify=1 probe.seed=5 probe.count={}",
            2 * BYTES / PLACE
        );
        let mut config = json!({
            "boot-source": { "kernel_image_path": linux::file("LEPTON_PROBE"), "boot_args": arguments },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 },
            "drives": [{
                "drive_id": "d", "path_on_host": self.path("base"), "is_root_device": false,
                "is_read_only": false, "cache_type": "Writeback", "io_engine": drive.engine,
            }],
            "vsock": { "guest_cid": 3, "uds_path": self.path("vsock") },
        });
        if drive.has_overlay {
            config["drives"][0]["overlay"] = json!({ "path": self.path("overlay") });
        }
        config
    }

    fn start(&self, drive: Drive) -> Child {
        let config = self.path("config.json");
        fs::write(&config, self.config(drive).to_string()).expect("a file can be written");
        let child = Command::new(programs::vmm())
            .arg("--api-sock")
            .arg(self.path("api"))
            .arg("--config-file")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(File::create(self.path("console")).expect("a file"))
            .stderr(File::create(self.path("errors")).expect("a file"))
            .spawn()
            .expect("the VMM starts");
        reaper::watch(&child).expect("there is a reaper");
        child
    }

    /// The disk as it is now. Whoever had it is gone: it can be opened to be written.
    fn disk(&self, drive: Drive) -> Vec<u8> {
        let base = self.path("base");
        if !drive.has_overlay || !self.path("overlay").exists() {
            return fs::read(base).expect("the image");
        }
        let chain = Chain::open::<&Path>(&base, &[]).expect("a base");
        let overlay = Overlay::open(chain, &self.path("overlay"), false);
        let mut disk = vec![0; BYTES];
        let mut overlay = overlay.expect("an overlay that was not written past its format");
        overlay.read_bytes(&mut disk, 0).expect("a whole disk");
        disk
    }
}

/// Asks for all sorts of things until nobody answers any more.
fn disturb(socket: &Path, snapshot: &Value, enough: &AtomicBool) -> bool {
    let mut reached = false;
    while !enough.load(Ordering::Relaxed) {
        let Ok(mut client) = Client::connect(socket) else {
            thread::yield_now();
            continue;
        };
        client.set_timeout(Some(PATIENCE)).expect("a socket");
        let paused = json!({ "state": "Paused" }).to_string();
        let resumed = json!({ "state": "Resumed" }).to_string();
        let requests = [
            ("GET", "/vm/config", String::new()),
            ("PATCH", "/vm", paused),
            ("PUT", "/snapshot/create", snapshot.to_string()),
            ("PATCH", "/vm", resumed),
            ("GET", "/metrics", String::new()),
        ];
        while requests
            .iter()
            .all(|(method, path, body)| client.request(method, path, body).is_ok())
        {
            reached = true;
        }
    }
    reached
}

/// Each place is as it was before or as it was written, never half of both; and what is written comes before what is
/// not. Returns how many are written.
fn written(disk: &[u8]) -> usize {
    let new = pattern(5, BYTES);
    let places = disk.chunks(PLACE).zip(new.chunks(PLACE));
    let states: Vec<bool> = places
        .enumerate()
        .map(|(number, (found, new))| {
            let is_old = found.iter().all(|byte| *byte == 0xee);
            assert!(
                is_old || found == new,
                "place {number} is neither old nor new"
            );
            !is_old
        })
        .collect();
    let count = states.iter().take_while(|is_new| **is_new).count();
    // One write may be under way, and all before it were flushed.
    assert!(
        !states[count..].contains(&true),
        "{count} are written, and others behind a gap"
    );
    count
}

/// See the module.
pub fn killed_at_any_moment_it_keeps_what_was_flushed() {
    let asked = std::env::var("LEPTON_KILL_ROUNDS").ok();
    let count = asked.and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let mut rounds = Rounds::new();
    let snapshot = json!({
        "snapshot_path": rounds.path("state"), "mem_file_path": rounds.path("memory"),
    });
    let drives = [
        ("Sync", false),
        ("Async", false),
        ("Sync", true),
        ("Async", true),
    ];
    let drives = drives.map(|(engine, has_overlay)| Drive {
        engine,
        has_overlay,
    });
    let mut seen = Seen::default();
    // How long a whole life takes here and now.
    let mut life = Duration::from_millis(100);
    for round in 0..count {
        let drive = drives[round as usize % drives.len()];
        fs::write(rounds.path("base"), [0xee; BYTES]).expect("a file can be written");
        drop(fs::remove_file(rounds.path("overlay")));
        // Every tenth is left alone, so that the moments are those of whole lives.
        let is_spared = round % 10 == 0;
        let moment = Duration::from_nanos(rounds.next_below(life.as_nanos() as u64));
        let started = Instant::now();
        let mut vmm = rounds.start(drive);
        let enough = AtomicBool::new(false);
        let (status, reached) = thread::scope(|scope| {
            let socket = rounds.path("api");
            let disturbed = !is_spared;
            let (enough, snapshot) = (&enough, &snapshot);
            let client = scope.spawn(move || disturbed && disturb(&socket, snapshot, enough));
            if !is_spared {
                // The moment is what is tested: nothing is waited for.
                thread::sleep(moment);
                vmm.kill().expect("it is our child");
            }
            let status = vmm.wait().expect("it is our child");
            enough.store(true, Ordering::Relaxed);
            (status, client.join().expect("the client"))
        });
        let errors = fs::read_to_string(rounds.path("errors")).expect("a file");
        assert_eq!(errors, "", "round {round} did not start");
        let disk = rounds.disk(drive);
        let done = written(&disk);
        match status.code() {
            Some(0) => {
                assert_eq!(
                    done,
                    BYTES / PLACE,
                    "round {round} ended and is not all there"
                );
                seen.ended_before += u64::from(!is_spared);
            }
            _ => assert_eq!(status.signal(), Some(9), "round {round}: {status}"),
        }
        if is_spared {
            life = started.elapsed();
        }
        // A console that tells of the writes was told so after the last flush.
        let console = fs::read_to_string(rounds.path("console")).expect("a file");
        if console.contains("\"mode\":\"blk_flush\"") {
            assert_eq!(done, BYTES / PLACE, "round {round}: a flush was not true");
        }
        assert!(!console.contains("\"errors\":1"), "{console}");
        if rounds.path("state").exists() {
            check_snapshot(&rounds);
            seen.saved += 1;
        }
        seen.with_an_api += u64::from(reached);
        seen.before_the_api += u64::from(!reached && !is_spared);
        seen.partly_written += u64::from(0 < done && done < BYTES / PLACE);
    }
    eprintln!("{count} rounds: {seen:?}");
}

/// Whatever a killed writer left is a whole snapshot, the old one or the new one.
fn check_snapshot(rounds: &Rounds) {
    let state = lepton_snapshot::state_file::open(&rounds.path("state"));
    let manifest = state.expect("a whole state file").memory;
    let (bytes, root) = (manifest.bytes(), manifest.root());
    lepton_snapshot::memory_file::open(&rounds.path("memory"), bytes, root)
        .expect("the state file's memory");
}
