//! What ends the processes that this program has started, should this program be killed.
//!
//! Whoever is killed drops nothing: a VMM under test would run its guest for ever. The kernel's own way
//! (PR_SET_PDEATHSIG) ends a process with the *thread* that started it, and is forgotten where a jailer becomes another
//! user. So this program starts itself a second time, in a process group of its own. That process is told of the others,
//! holds a descriptor of each, and kills those that are left when the pipe to this program closes, however it ended.

use std::fs;
use std::io::{self, BufRead, PipeWriter, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

use crate::PATIENCE;

/// Set for the second process.
const ROLE: &str = "LEPTON_REAPER";
/// Set for a program that is to be killed, in [`check`].
const VICTIM: &str = "LEPTON_VICTIM";
/// Whether this program can be the second process.
static CAN_SERVE: AtomicBool = AtomicBool::new(false);
/// To the second process, once there is one.
static PIPE: Mutex<Option<PipeWriter>> = Mutex::new(None);

/// The first thing in `main`. True: this is the second process, all is done, and `main` is to return.
pub fn serves() -> bool {
    CAN_SERVE.store(true, Ordering::Relaxed);
    let asked = std::env::var_os(ROLE).is_some();
    if asked {
        serve();
    }
    asked
}

/// Lets the process `pid`, which runs, or has ended and was not waited for, end with this program at the latest.
pub fn watch(pid: u32) -> io::Result<()> {
    let mut pipe = PIPE.lock().map_err(|_| io::Error::other("a panic"))?;
    let pipe = match &mut *pipe {
        Some(pipe) => pipe,
        none => none.insert(start()?),
    };
    pipe.write_all(format!("{pid}\n").as_bytes())
}

fn start() -> io::Result<PipeWriter> {
    if !CAN_SERVE.load(Ordering::Relaxed) {
        return Err(io::Error::other("main does not ask reaper::serves()"));
    }
    let (reader, writer) = io::pipe()?;
    // The program's path may be that of another program by now.
    Command::new("/proc/self/exe")
        .env(ROLE, "1")
        .stdin(reader)
        // Whoever reads this program's output does not wait for the reaper.
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Signals to this program's group are not for it.
        .process_group(0)
        .spawn()?;
    Ok(writer)
}

fn serve() {
    let mut held: Vec<OwnedFd> = Vec::new();
    for line in io::stdin().lock().lines().map_while(Result::ok) {
        held.retain(|pidfd| !has_ended(pidfd));
        let pid = line.parse().ok().and_then(Pid::from_raw);
        let pidfd = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        // Without one it has ended already.
        held.extend(pidfd);
    }
    for pidfd in held {
        // It may have ended by now.
        let _ = pidfd_send_signal(pidfd, Signal::KILL);
    }
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let ready = poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&now));
    ready.is_ok_and(|count| count > 0)
}

/// Starts this program again, to run only `test`, kills it as soon as it has started something, and checks that this
/// ends. In that program `start` is called, which returns a process id and whatever keeps that process alive.
#[track_caller]
pub fn check<T>(test: &str, start: impl FnOnce() -> (u32, T)) {
    const PREFIX: &str = "has started ";
    if std::env::var_os(VICTIM).is_some() {
        let (pid, _alive) = start();
        println!("{PREFIX}{pid}");
        // The end of the input is that of whoever was to kill this.
        let _ = io::stdin().read_line(&mut String::new());
        return;
    }
    // What it cannot remove goes with this. Other users have to pass.
    let place = TempDir::new().expect("a temporary directory");
    let all_may_pass = fs::Permissions::from_mode(0o755);
    fs::set_permissions(place.path(), all_may_pass).expect("the directory is ours");
    let mut victim = Command::new("/proc/self/exe")
        .args([test, "--exact"])
        .env(VICTIM, "1")
        .env("TMPDIR", place.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program can be started");
    let said = io::BufReader::new(victim.stdout.take().expect("a pipe")).lines();
    let pid = said
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix(PREFIX)?.parse().ok());
    let pid = pid.and_then(Pid::from_raw);
    let started = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty()));
    victim.kill().expect("it is our child");
    let status = victim.wait().expect("it ends");
    assert_eq!(status.signal(), Some(Signal::KILL.as_raw()), "{status}");
    let pidfd = started
        .expect("it has started something")
        .expect("which runs");
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    let timeout = Timespec::try_from(PATIENCE).expect("a short time");
    let ready = poll(&mut fds, Some(&timeout)).expect("a process can be awaited");
    if ready == 0 {
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    }
    assert_eq!(ready, 1, "{pid:?} goes on");
}
