//! What ends the processes that this program has started, should this program be killed.
//!
//! Whoever is killed drops nothing: a VMM under test would run its guest for ever. The kernel's own way
//! (PR_SET_PDEATHSIG) ends a process with the *thread* that started it, and is forgotten where a jailer becomes another
//! user. So this program starts itself a second time, in a process group of its own. That process is handed
//! a descriptor of each of the others (a process id may be somebody else's by the time that it is read), and kills those that
//! are left when the connection to this program closes, however it ended.

use std::fs;
use std::io::{self, BufRead, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
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
static LINK: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// The first thing in `main`. True: this is the second process, all is done, and `main` is to return.
pub fn serves() -> bool {
    CAN_SERVE.store(true, Ordering::Relaxed);
    let asked = std::env::var_os(ROLE).is_some();
    if asked {
        serve();
    }
    asked
}

/// Lets a child, which was not waited for, end with this program at the latest. Returns its descriptor.
pub fn watch(child: &Child) -> io::Result<OwnedFd> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    watch_other(&pidfd)?;
    Ok(pidfd)
}

/// The same, for any process.
pub fn watch_other(pidfd: &OwnedFd) -> io::Result<()> {
    let mut link = LINK.lock().map_err(|_| io::Error::other("a panic"))?;
    let link = match &mut *link {
        Some(link) => link,
        none => none.insert(start()?),
    };
    let files = [pidfd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    let bytes = [IoSlice::new(&[0])];
    rustix::net::sendmsg(&*link, &bytes, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn start() -> io::Result<OwnedFd> {
    if !CAN_SERVE.load(Ordering::Relaxed) {
        return Err(io::Error::other("main does not ask reaper::serves()"));
    }
    let (near, far) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // The program's path may be that of another program by now.
    Command::new("/proc/self/exe")
        .env(ROLE, "1")
        .stdin(far)
        // Whoever reads this program's output does not wait for the reaper.
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Signals to this program's group are not for it.
        .process_group(0)
        .spawn()?;
    Ok(near)
}

fn serve() {
    let mut held: Vec<OwnedFd> = Vec::new();
    while let Some(pidfds) = next_message() {
        held.retain(|pidfd| !has_ended(pidfd));
        held.extend(pidfds);
    }
    for pidfd in held {
        // It may have ended by now.
        let _ = pidfd_send_signal(pidfd, Signal::KILL);
    }
}

/// What the next message brings. None: there will be none.
fn next_message() -> Option<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    loop {
        let received = rustix::net::recvmsg(
            io::stdin(),
            &mut [IoSliceMut::new(&mut [0])],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        match received {
            Ok(message) if message.bytes > 0 => break,
            Err(Errno::INTR) => {}
            Ok(_) | Err(_) => return None,
        }
    }
    let rights = control.drain().filter_map(|part| match part {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    Some(rights.flatten().collect())
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
