//! Copies of a running machine. Ours only: no peer has such a request.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use lepton_api::Client;
use lepton_api::types::{Cloned, ClonedChild};
use lepton_hostio::scheduler::First;
use lepton_tests::reaper;
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

use super::weight::own_beyond_guest;
use super::{Case, Context, Place, Reading, UP, UP_IN_WORDS};
use crate::catalogue::{FigureKind, curve, lower};
use crate::guest::Guest;
use crate::host::available_memory_mib;
use crate::process::{Failure, Running, VMM_LOG};
use crate::side::{OURS, Side};

/// All figures.
pub const FIGURES: &[FigureKind] = &[
    lower(
        FIRST,
        "PUT /clone to the copy's first instruction, 128 MiB, the process waiting",
        "ms",
    ),
    lower(
        IDLE,
        "PUT /clone of a machine that is idle to the copy's first instruction, 128 MiB, the process waiting",
        "ms",
    ),
    lower(
        ANSWER,
        "PUT /clone of one copy to its answer, 128 MiB",
        "ms",
    ),
    lower(
        TEMPLATE,
        "PUT /clone to a template to the copy's first instruction, 128 MiB, the process waiting",
        "ms",
    ),
    lower(
        POOLED,
        "PUT /clone to the copy's first instruction, 128 MiB, the process waiting in a jail of a pool",
        "ms",
    ),
    lower(
        SPAWNED,
        "PUT /clone to the copy's first instruction, 128 MiB, the process started and jailed meanwhile",
        "ms",
    ),
    lower(
        IDLE_POOLED,
        "PUT /clone of a machine that is idle to the copy's first instruction, 128 MiB, the process waiting in a jail of a pool",
        "ms",
    ),
    lower(
        IDLE_SPAWNED,
        "PUT /clone of a machine that is idle to the copy's first instruction, 128 MiB, the process started and jailed meanwhile",
        "ms",
    ),
    lower(
        PAUSE_128M,
        "Pause of the machine, 128 MiB all written",
        "ms",
    ),
    lower(PAUSE_1G, "Pause of the machine, 1 GiB all written", "ms"),
    lower(
        PAUSE_AGAIN,
        "Pause of the machine at the tenth clone, 1 GiB, 8 MiB written since the ninth",
        "ms",
    ),
    curve(
        DEPTH,
        "PUT /clone to the copy's first instruction, by depth of clones of clones",
        "ms",
        "depth",
    ),
    lower(HUNDRED, "PUT /clone of 100 copies to its answer", "ms"),
    lower(
        MEMORY,
        "Memory that the host has less for each of 100 copies, process and all",
        "KiB",
    ),
    lower(
        THOUSAND,
        "PUT /clone of 1000 copies to its answer, all of them running",
        "ms",
    ),
    lower(
        LATER,
        "Time between two of the last hundred of 1000 copies, as a part of that between two of the first",
        "",
    ),
    lower(
        OWN,
        "Memory that each of 1000 copies has for itself alone, without the kernel's part in it",
        "KiB",
    ),
];

const FIRST: &str = "clone.first-instruction";
const TEMPLATE: &str = "clone.template";
const POOLED: &str = "clone.pool-warm";
const SPAWNED: &str = "clone.pool-cold";
const IDLE: &str = "clone.idle";
const IDLE_POOLED: &str = "clone.idle-pool-warm";
const IDLE_SPAWNED: &str = "clone.idle-pool-cold";
const ANSWER: &str = "clone.answer";
const PAUSE_128M: &str = "clone.pause-128m";
const PAUSE_1G: &str = "clone.pause-1g";
const PAUSE_AGAIN: &str = "clone.pause-again";
const DEPTH: &str = "clone.depth";
const HUNDRED: &str = "clone.hundred";
const MEMORY: &str = "clone.memory";
const THOUSAND: &str = "clone.thousand";
const LATER: &str = "clone.thousand-later";
const OWN: &str = "clone.thousand-own";

const CLONE: &str = "/clone";
/// What tells a process that waits how much memory its machine will have, in MiB.
const EXPECTS: &str = "--expect-mem-mib";
/// The user and group that jailed VMMs run as.
const NOBODY: &str = "65534";
const DEPTHS: [u32; 3] = [1, 10, 50];
const MANY: u32 = 100;
/// As many as one request can ask for.
const MOST: u32 = 1000;

/// All of it.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    let mut all = Vec::new();
    for side in context.sides.iter().filter(|side| side.id == OURS) {
        let mut case = |at, figures, run| {
            all.push(Case {
                side,
                at,
                figures,
                run,
            });
        };
        for (guest, figures) in [(Guest::Beat, &[FIRST]), (Guest::Doze, &[IDLE])] {
            let run = move || first_instruction(context, side, guest, figures[0]);
            case(None, figures, Box::new(run));
        }
        case(None, &[ANSWER], Box::new(move || answer(context, side)));
        case(
            None,
            &[TEMPLATE],
            Box::new(move || from_template(context, side)),
        );
        for (guest, size, figures) in [
            (Guest::Beat, 1, &[POOLED]),
            (Guest::Beat, 0, &[SPAWNED]),
            (Guest::Doze, 1, &[IDLE_POOLED]),
            (Guest::Doze, 0, &[IDLE_SPAWNED]),
        ] {
            let run = move || from_pool(context, side, guest, size, figures[0]);
            case(None, figures, Box::new(run));
        }
        for (mib, figures) in [(128, &[PAUSE_128M]), (1024, &[PAUSE_1G])] {
            let run = move || pause(context, side, mib, figures[0]);
            case(None, figures, Box::new(run));
        }
        case(
            None,
            &[PAUSE_AGAIN],
            Box::new(move || pause_again(context, side)),
        );
        for depth in DEPTHS {
            let run = move || deep(context, side, depth);
            case(Some(f64::from(depth)), &[DEPTH], Box::new(run));
        }
        case(
            None,
            &[HUNDRED, MEMORY],
            Box::new(move || many(context, side)),
        );
        case(
            None,
            &[THOUSAND, LATER, OWN],
            Box::new(move || most(context, side)),
        );
    }
    all
}

/// A VMM with its API.
pub(super) struct Vmm {
    pub(super) running: Running,
    client: Client,
    /// Where it waits for a machine.
    pub(super) adopt: PathBuf,
    pub(super) place: Place,
}

impl Vmm {
    pub(super) fn new(context: &Context, side: &Side, guest: Guest) -> Result<Self, Failure> {
        Self::started(context, side, guest, &[])
    }

    /// One that waits for a machine of `mib` MiB.
    pub(super) fn heir(context: &Context, side: &Side, mib: u64) -> Result<Self, Failure> {
        let expects = [EXPECTS.into(), mib.to_string()];
        Self::started(context, side, Guest::Idle, &expects)
    }

    fn started(
        context: &Context,
        side: &Side,
        guest: Guest,
        more: &[String],
    ) -> Result<Self, Failure> {
        let place = Place::new(guest, context.patience)?;
        let adopt = place.folder().join("adopt.sock");
        let mut options = vec!["--adopt".as_ref(), adopt.as_os_str()];
        options.extend(more.iter().map(OsStr::new));
        let mut vmm = Self::start(context, side, place, &options)?;
        vmm.adopt = adopt;
        Ok(vmm)
    }

    /// One that waits for no machine.
    fn start(
        context: &Context,
        side: &Side,
        place: Place,
        options: &[&OsStr],
    ) -> Result<Self, Failure> {
        let socket = place.folder().join("api.sock");
        let mut command = Command::new(&side.program);
        command
            .args(["--level", "Error", "--log-path"])
            .arg(place.folder().join(VMM_LOG))
            .arg("--api-sock")
            .arg(&socket)
            .args(options);
        let running = Running::spawn(&mut command, place.folder(), context.patience)?;
        let (stream, _) = running.connect(&socket)?;
        stream.set_read_timeout(Some(context.patience))?;
        let mut client = Client::from_stream(stream);
        // Once it has answered, all of it is there.
        let answer = client.request("GET", "/", "");
        checked("GET /", answer)?;
        Ok(Self {
            running,
            client,
            adopt: PathBuf::new(),
            place,
        })
    }

    pub(super) fn put(&mut self, path: &str, body: &Value) -> Result<String, Failure> {
        checked(path, self.client.request("PUT", path, &body.to_string()))
    }

    fn pause(&mut self) -> Result<(), Failure> {
        let body = json!({ "state": "Paused" }).to_string();
        checked("/vm", self.client.request("PATCH", "/vm", &body)).map(drop)
    }

    /// Boots a machine that can be cloned.
    fn boot(&mut self, boot: &Value, mib: u64) -> Result<(), Failure> {
        self.put("/boot-source", boot)?;
        let machine = json!({ "vcpu_count": 1, "mem_size_mib": mib, "clonable": true });
        self.put("/machine-config", &machine)?;
        let start = json!({ "action_type": "InstanceStart" });
        self.put("/actions", &start).map(drop)
    }

    fn clone_into(&mut self, children: &[Vmm]) -> Result<Cloned, Failure> {
        let children = children.iter().map(Vmm::child).collect();
        self.ask_clone(&json!({ "children": Value::Array(children) }))?;
        self.cloned()
    }

    /// It, in the request that makes it a copy.
    fn child(&self) -> Value {
        json!({ "adopt_socket": self.adopt })
    }

    fn ask_clone(&mut self, request: &Value) -> Result<(), Failure> {
        let asked = self.client.send("PUT", CLONE, &request.to_string());
        asked.map_err(|error| Failure::because(format!("{CLONE}: {error}")))
    }

    /// What is answered to that.
    fn cloned(&mut self) -> Result<Cloned, Failure> {
        let answer = checked(CLONE, self.client.reply())?;
        serde_json::from_str(&answer).map_err(|error| Failure::because(format!("{CLONE}: {error}")))
    }

    /// Clones the machine into `child`, and returns when that ran, from the request on.
    fn clone_one(&mut self, child: &mut Vmm) -> Result<Duration, Failure> {
        let request = json!({ "children": [child.child()] });
        let (took, _) = self.clone_until_up(&request, &mut child.running)?;
        Ok(took)
    }

    /// Clones the machine by `request`, and returns how long it took until its copy wrote to the console of `running`, and
    /// what was answered. The answer has a longer way, on which it would be waited for.
    fn clone_until_up(
        &mut self,
        request: &Value,
        running: &mut Running,
    ) -> Result<(Duration, Cloned), Failure> {
        // The machine and its copy keep both processors of a small host busy. What is measured is when the copy ran, not when
        // this thread was let in.
        let first = First::go();
        let asked = Instant::now();
        self.ask_clone(request)?;
        let ran = running.says(UP, UP_IN_WORDS);
        drop(first);
        let cloned = self.cloned()?;
        Ok((ran? - asked, cloned))
    }
}

fn checked(
    what: &str,
    reply: Result<(u16, String), lepton_api::client::ClientError>,
) -> Result<String, Failure> {
    match reply {
        Ok((200..300, body)) => Ok(body),
        Ok((status, body)) => Err(Failure::because(format!("{what}: {status} {body}"))),
        Err(error) => Err(Failure::because(format!("{what}: {error}"))),
    }
}

/// For how long a machine has run when it is cloned: what its start and its requests have taken of the processors is no longer
/// held against its threads then.
const RUNS: Duration = Duration::from_millis(50);

/// A machine whose guest has run for a while. What it writes to its console nobody reads.
fn running(context: &Context, side: &Side, guest: Guest) -> Result<Vmm, Failure> {
    run(Vmm::new(context, side, guest)?)
}

fn run(mut vmm: Vmm) -> Result<Vmm, Failure> {
    vmm.put("/serial", &json!({ "serial_out_path": "/dev/null" }))?;
    let kernel = vmm.place.machine().kernel;
    vmm.boot(&json!({ "kernel_image_path": kernel }), 128)?;
    std::thread::sleep(RUNS);
    Ok(vmm)
}

fn first_instruction(
    context: &Context,
    side: &Side,
    guest: Guest,
    figure: &'static str,
) -> Result<Vec<Reading>, Failure> {
    let mut child = Vmm::heir(context, side, 128)?;
    let mut parent = running(context, side, guest)?;
    let ran = parent.clone_one(&mut child)?;
    Ok(vec![Reading::milliseconds(figure, ran)])
}

fn answer(context: &Context, side: &Side) -> Result<Vec<Reading>, Failure> {
    let child = Vmm::heir(context, side, 128)?;
    let mut parent = running(context, side, Guest::Beat)?;
    let asked = Instant::now();
    parent.clone_into(&[child])?;
    Ok(vec![Reading::milliseconds(ANSWER, asked.elapsed())])
}

/// A copy of a machine that was saved, and of which none runs.
fn from_template(context: &Context, side: &Side) -> Result<Vec<Reading>, Failure> {
    let mut child = Vmm::heir(context, side, 128)?;
    let place = Place::new(Guest::Idle, context.patience)?;
    let (state, memory) = (place.folder().join("state"), place.folder().join("memory"));
    let mut machine = running(context, side, Guest::Beat)?;
    machine.pause()?;
    let files = json!({ "snapshot_path": state, "mem_file_path": memory });
    machine.put("/snapshot/create", &files)?;
    drop(machine);
    let options = ["--template".as_ref(), state.as_os_str()];
    let of_memory = ["--template-memory".as_ref(), memory.as_os_str()];
    let options = [options, of_memory].concat();
    let mut template = Vmm::start(context, side, place, &options)?;
    let ran = template.clone_one(&mut child)?;
    Ok(vec![Reading::milliseconds(TEMPLATE, ran)])
}

/// A copy that was started by others. Dropped, it ends.
struct Copy(OwnedFd);

impl Copy {
    fn of(child: &ClonedChild) -> Result<Self, Failure> {
        let pid = Pid::from_raw(child.pid.cast_signed());
        let pid = pid.ok_or_else(|| Failure::because("/clone: a copy's process id is 0"))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from)?;
        let copy = Copy(pidfd);
        reaper::watch_other(&copy.0)?;
        Ok(copy)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = pidfd_send_signal(&self.0, Signal::KILL);
    }
}

/// A copy in a process of a pool in which as many wait.
fn from_pool(
    context: &Context,
    side: &Side,
    guest: Guest,
    size: u32,
    figure: &'static str,
) -> Result<Vec<Reading>, Failure> {
    let jailer = side.program.with_file_name("lepton-jailer");
    if !jailer.exists() {
        let why = format!("there is no {}", jailer.display());
        return Err(Failure::NotOffered(why));
    }
    if !geteuid().is_root() {
        return Err(Failure::NotOffered("a jail takes root".into()));
    }
    let place = Place::new(Guest::Idle, context.patience)?;
    let socket = place.folder().join("pool.sock");
    let mut command = Command::new(jailer);
    command
        .args(["--id", "copy", "--uid", NOBODY, "--gid", NOBODY])
        .args(["--pool-size", &size.to_string(), "--exec-file"])
        .arg(&side.program)
        .arg("--chroot-base-dir")
        .arg(place.folder())
        .arg("--pool")
        .arg(&socket)
        .args(["--", "--level", "Error", EXPECTS, "128"]);
    let mut pool = Running::spawn(&mut command, place.folder(), context.patience)?;
    pool.wait_for("its socket", || socket.exists().then_some(()))?;
    if size > 0 {
        let program = side.program.file_name().unwrap_or_default();
        let jail = place.folder().join(program).join("copy-1/root");
        // Once its API answers it waits for a machine.
        let (stream, _) = pool.connect(&jail.join("run/firecracker.socket"))?;
        stream.set_read_timeout(Some(context.patience))?;
        let answer = Client::from_stream(stream).request("GET", "/", "");
        checked("GET /", answer)?;
    }
    let mut parent = running(context, side, guest)?;
    let request = json!({ "pool": socket, "children": [{}] });
    let (took, cloned) = parent.clone_until_up(&request, &mut pool)?;
    // It is nobody's child.
    let copies: Result<Vec<Copy>, Failure> = cloned.children.iter().map(Copy::of).collect();
    drop(copies?);
    Ok(vec![Reading::milliseconds(figure, took)])
}

/// A machine that has written all its memory, and writes the first `kib` of it for ever.
fn written(context: &Context, side: &Side, mib: u64, kib: u64) -> Result<Vmm, Failure> {
    let probe = context.probe.as_ref();
    let probe = probe.ok_or_else(|| Failure::NotOffered("there is no probe guest".into()))?;
    let mut vmm = Vmm::new(context, side, Guest::Idle)?;
    // Not quite all: the guest needs some for itself.
    let arguments = format!(
        "probe.mode=churn probe.mib={} probe.kib={kib}",
        mib - mib / 16
    );
    vmm.boot(
        &json!({ "kernel_image_path": probe, "boot_args": arguments }),
        mib,
    )?;
    vmm.running
        .says(b"PROBE {\"mode\":\"churn\"", "memory being written")?;
    Ok(vmm)
}

fn pause(
    context: &Context,
    side: &Side,
    mib: u64,
    figure: &'static str,
) -> Result<Vec<Reading>, Failure> {
    let child = Vmm::heir(context, side, mib)?;
    let cloned = written(context, side, mib, 0)?.clone_into(&[child])?;
    let pause = Duration::from_micros(cloned.pause_us);
    Ok(vec![Reading::milliseconds(figure, pause)])
}

fn pause_again(context: &Context, side: &Side) -> Result<Vec<Reading>, Failure> {
    let mut parent = written(context, side, 1024, 8 << 10)?;
    let mut pause = Duration::ZERO;
    for _ in 0..10 {
        let child = Vmm::heir(context, side, 1024)?;
        let cloned = parent.clone_into(&[child])?;
        pause = Duration::from_micros(cloned.pause_us);
    }
    Ok(vec![Reading::milliseconds(PAUSE_AGAIN, pause)])
}

fn deep(context: &Context, side: &Side, depth: u32) -> Result<Vec<Reading>, Failure> {
    let mut parent = running(context, side, Guest::Beat)?;
    let mut ran = Duration::ZERO;
    for _ in 0..depth {
        let mut child = Vmm::heir(context, side, 128)?;
        ran = parent.clone_one(&mut child)?;
        // Its place on the processors is the next one's.
        parent.pause()?;
        parent = child;
    }
    Ok(vec![Reading::milliseconds(DEPTH, ran)])
}

fn many(context: &Context, side: &Side) -> Result<Vec<Reading>, Failure> {
    let mut parent = written(context, side, 128, 0)?;
    let before = available_memory_mib();
    let children: Result<Vec<Vmm>, Failure> =
        (0..MANY).map(|_| Vmm::heir(context, side, 128)).collect();
    let children = children?;
    let asked = Instant::now();
    let cloned = parent.clone_into(&children)?;
    let took = asked.elapsed();
    let less = before.saturating_sub(available_memory_mib()) as f64 * 1024.0;
    if cloned.children.len() != children.len() {
        return Err(Failure::because("copies are missing from the answer"));
    }
    Ok(vec![
        Reading::milliseconds(HUNDRED, took),
        Reading {
            figure: MEMORY,
            value: less / f64::from(MANY),
        },
    ])
}

/// Copies of a machine that is idle, as they are when they have their work done: on a small host a thousand that are busy would
/// mostly wait for each other.
fn most(context: &Context, side: &Side) -> Result<Vec<Reading>, Failure> {
    const PART: usize = 100;
    // A request that names as many sockets is longer than what is taken by default.
    let takes = ["--http-api-max-payload-size".into(), (1 << 20).to_string()];
    let mut parent = run(Vmm::started(context, side, Guest::Idle, &takes)?)?;
    let children: Result<Vec<Vmm>, Failure> =
        (0..MOST).map(|_| Vmm::heir(context, side, 128)).collect();
    let children = children?;
    let asked = Instant::now();
    let cloned = parent.clone_into(&children)?;
    let took = asked.elapsed();
    let mut ready: Vec<u64> = cloned.children.iter().map(|child| child.ready_us).collect();
    ready.sort_unstable();
    let [first, .., last] = ready.chunks_exact(PART).collect::<Vec<_>>()[..] else {
        return Err(Failure::because("copies are missing from the answer"));
    };
    let spread = |part: &[u64]| (part[PART - 1] - part[0]).max(1) as f64;
    let mut own = 0.0;
    for child in &children {
        own += own_beyond_guest(child.running.pid())?;
    }
    Ok(vec![
        Reading::milliseconds(THOUSAND, took),
        Reading {
            figure: LATER,
            value: spread(last) / spread(first),
        },
        Reading {
            figure: OWN,
            value: own / f64::from(MOST),
        },
    ])
}
