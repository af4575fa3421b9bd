//! A VMM in a jail of `lepton-jailer`.

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

use crate::api::Api;
use crate::{PATIENCE, programs, reaper};

/// The user that jailed VMMs run as.
pub const UID: u32 = 61_234;
/// Their group.
pub const GID: u32 = 61_235;

/// A folder of jails, and the command line for one of them.
pub struct Jail {
    base: TempDir,
    id: String,
    program: PathBuf,
    owner: Option<(u32, u32)>,
    /// Copies of the programs for a maker who is not root, who may be unable to reach the originals.
    programs: Option<TempDir>,
    options: Vec<OsString>,
    vmm: Vec<OsString>,
}

impl Jail {
    /// A jail for the VMM as another user.
    pub fn as_another_user() -> Self {
        let base = tempfile::Builder::new()
            .prefix("lepton-jail-")
            .tempdir()
            .expect("a temporary directory");
        // tempfile's own are for the owner alone: those who run as another user have to pass.
        let all_may_pass = fs::Permissions::from_mode(0o755);
        fs::set_permissions(base.path(), all_may_pass).expect("the directory is ours");
        Self {
            base,
            id: "vm-1".into(),
            program: programs::vmm().to_owned(),
            owner: Some((UID, GID)),
            programs: None,
            options: Vec::new(),
            vmm: Vec::new(),
        }
    }

    /// A jail that [`UID`] makes for itself. Needs root, to become that user.
    pub fn without_root() -> Self {
        let copies = tempfile::Builder::new()
            .prefix("lepton-programs-")
            .tempdir()
            .expect("a temporary directory");
        let all_may_pass = fs::Permissions::from_mode(0o755);
        fs::set_permissions(copies.path(), all_may_pass).expect("the directory is ours");
        for (name, original) in [
            ("lepton-vmm", programs::vmm()),
            ("lepton-jailer", programs::jailer()),
        ] {
            // By another process: had this one the copy open for writing while another test starts a child, the child
            // would have it open too, and until it is gone the copy could not be run (ETXTBSY).
            let copied = Command::new("cp")
                .arg(original)
                .arg(copies.path().join(name))
                .status();
            assert!(copied.is_ok_and(|status| status.success()), "cp {name}");
        }
        let mut jail = Self::as_another_user().without_owner();
        chown(jail.base(), Some(UID), Some(GID)).expect("root may give folders away");
        jail.program = copies.path().join("lepton-vmm");
        jail.programs = Some(copies);
        jail
    }

    /// With this id.
    #[must_use]
    pub fn id(mut self, id: &str) -> Self {
        self.id = id.to_owned();
        self
    }

    /// With this program instead of the VMM.
    #[must_use]
    pub fn program(mut self, path: &Path) -> Self {
        self.program = path.to_owned();
        self
    }

    /// Without `--uid` and `--gid`.
    #[must_use]
    pub fn without_owner(mut self) -> Self {
        self.owner = None;
        self
    }

    /// Adds options of the jailer.
    #[must_use]
    pub fn options<A: Into<OsString>>(mut self, more: impl IntoIterator<Item = A>) -> Self {
        self.options.extend(more.into_iter().map(Into::into));
        self
    }

    /// Adds arguments of the VMM.
    #[must_use]
    pub fn vmm<A: Into<OsString>>(mut self, more: impl IntoIterator<Item = A>) -> Self {
        self.vmm.extend(more.into_iter().map(Into::into));
        self
    }

    /// The folder of all jails.
    pub fn base(&self) -> &Path {
        self.base.path()
    }

    /// The VMM's root directory.
    pub fn root(&self) -> PathBuf {
        let name = self.program.file_name().expect("a program has a name");
        self.base().join(name).join(&self.id).join("root")
    }

    /// Puts a file for the VMM into its root, before or after the start.
    pub fn file(&self, name: &str, content: &[u8]) {
        let mut folder = self.base().to_owned();
        for name in self.root().strip_prefix(self.base()).expect("it is below") {
            folder.push(name);
            if !folder.exists() {
                fs::create_dir(&folder).expect("a folder can be made");
                chown(&folder, Some(UID), Some(GID)).expect("root may give folders away");
            }
        }
        let path = self.root().join(name);
        fs::write(&path, content).expect("a file can be written");
        chown(&path, Some(UID), Some(GID)).expect("root may give files away");
    }

    /// The command that starts it.
    pub fn command(&self) -> Command {
        let mut command = match &self.programs {
            None => Command::new(programs::jailer()),
            Some(copies) => {
                let mut command = Command::new(copies.path().join("lepton-jailer"));
                command.uid(UID).gid(GID);
                command
            }
        };
        command
            .args(["--id", &self.id, "--exec-file"])
            .arg(&self.program);
        if let Some((uid, gid)) = self.owner {
            command.args(["--uid", &uid.to_string(), "--gid", &gid.to_string()]);
        }
        command
            .arg("--chroot-base-dir")
            .arg(self.base())
            .args(&self.options)
            .arg("--")
            .args(&self.vmm)
            .stdin(Stdio::null());
        command
    }

    /// Runs the jailer to its end.
    #[track_caller]
    pub fn run(&self) -> Output {
        self.command().output().expect("the jailer starts")
    }

    /// Runs the jailer, which must refuse; what it says comes back.
    #[track_caller]
    pub fn refused(&self) -> String {
        Self::refusal_of(self.command())
    }

    /// Runs a jailer's command, which must refuse; what it says comes back.
    #[track_caller]
    pub fn refusal_of(mut command: Command) -> String {
        // Should the VMM be started after all, it ends at once.
        let output = command.arg("--version").output();
        let output = output.expect("the jailer starts");
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(output.stdout.is_empty(), "{:?}", output.stdout);
        assert!(!message.contains("panicked"), "{message}");
        message
    }

    /// Starts the jailer, which becomes the VMM.
    #[track_caller]
    pub fn spawn(self) -> Jailed {
        let child = self.command().spawn().expect("the jailer starts");
        Jailed::of(child, self)
    }

    /// Runs the jailer, which leaves the VMM behind and tells its process id in a file.
    #[track_caller]
    pub fn detach(self) -> Jailed {
        // A pipe would stay open in a VMM that keeps its standard streams.
        let status = self
            .command()
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("the jailer starts");
        assert_eq!(status.code(), Some(0));
        Jailed::new(self.written_pid(), None, self)
    }

    /// The process id in the VMM's pid file.
    #[track_caller]
    pub fn written_pid(&self) -> u32 {
        let mut name = self.program.file_name().expect("a name").to_owned();
        name.push(".pid");
        let text = fs::read_to_string(self.root().join(name)).expect("there is a pid file");
        text.parse().expect("a pid file has a number")
    }

    /// Everything below the folder of all jails: path, type, mode, owner and, for a device, its number.
    pub fn listing(&self) -> Vec<String> {
        let output = Command::new("find")
            .arg(self.base())
            .args(["-mindepth", "1", "-printf", "%P %y %m %U:%G\n"])
            .output()
            .expect("find starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    }
}

/// A VMM in its jail. Dropping it kills it.
pub struct Jailed {
    child: Option<Child>,
    pidfd: OwnedFd,
    /// The VMM's process id.
    pub pid: u32,
    /// Where it is.
    pub jail: Jail,
}

impl Jailed {
    #[track_caller]
    fn new(pid: u32, child: Option<Child>, jail: Jail) -> Self {
        let found = Pid::from_raw(pid.cast_signed()).expect("not 0");
        let pidfd = pidfd_open(found, PidfdFlags::empty()).expect("the VMM runs");
        reaper::watch_other(&pidfd).expect("there is a reaper");
        Self {
            child,
            pidfd,
            pid,
            jail,
        }
    }

    /// A jailer that was started by the jail's command.
    #[track_caller]
    pub fn of(child: Child, jail: Jail) -> Self {
        Self::new(child.id(), Some(child), jail)
    }

    /// A VMM that is a child of the jailer that is started here.
    #[track_caller]
    pub fn of_child(jail: Jail) -> Self {
        let mut child = jail.command().spawn().expect("the jailer starts");
        reaper::watch(&child).expect("there is a reaper");
        let deadline = Instant::now() + PATIENCE;
        let socket = jail.root().join("run/firecracker.socket");
        // The file with the VMM's process id is complete once the VMM runs.
        while !socket.exists() {
            let ended = child.try_wait().expect("a child can be asked");
            assert_eq!(ended, None, "the jailer has ended");
            assert!(Instant::now() < deadline, "the VMM does not start");
            std::thread::sleep(Duration::from_millis(1));
        }
        Self::new(jail.written_pid(), Some(child), jail)
    }

    /// Checks that the VMM is [`UID`] and nobody else, and may do what anybody may.
    #[track_caller]
    pub fn assert_no_privileges(&self) {
        for (field, value) in [
            ("Uid", format!("{UID} {UID} {UID} {UID}")),
            ("Gid", format!("{GID} {GID} {GID} {GID}")),
            ("Groups", String::new()),
            ("CapInh", "0".repeat(16)),
            ("CapPrm", "0".repeat(16)),
            ("CapEff", "0".repeat(16)),
            ("CapBnd", "0".repeat(16)),
            ("CapAmb", "0".repeat(16)),
            ("NoNewPrivs", "1".to_owned()),
            ("Umask", "0077".to_owned()),
        ] {
            assert_eq!(self.status(field), value, "{field}");
        }
    }

    /// The API's socket, as seen from outside.
    pub fn socket(&self) -> PathBuf {
        self.jail.root().join("run/firecracker.socket")
    }

    /// Connects to the API, as soon as it listens.
    #[track_caller]
    pub fn api(&self) -> Api {
        let deadline = Instant::now() + PATIENCE;
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            // The wait is for the process's end, which would make all waiting vain.
            let ended = self.has_ended_within(Duration::from_millis(1));
            assert!(!ended, "the VMM has ended");
            assert!(Instant::now() < deadline, "the API does not listen");
        }
        Api::connect(&self.socket())
    }

    /// Waits for the VMM's end, but no longer than `patience`.
    #[track_caller]
    pub fn has_ended_within(&self, patience: Duration) -> bool {
        let timeout = Timespec::try_from(patience).expect("a short time");
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut fds, Some(&timeout)).expect("a process can be awaited") > 0
    }

    /// What `/proc/PID/file` says.
    #[track_caller]
    pub fn proc(&self, file: &str) -> String {
        let path = format!("/proc/{}/{file}", self.pid);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Where a link in `/proc/PID` leads.
    #[track_caller]
    pub fn link(&self, name: &str) -> PathBuf {
        let path = format!("/proc/{}/{name}", self.pid);
        fs::read_link(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// A field of `/proc/PID/status`.
    #[track_caller]
    pub fn status(&self, field: &str) -> String {
        let text = self.proc("status");
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let value = value.unwrap_or_else(|| panic!("there is no {field} in:\n{text}"));
        value.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Where its descriptors lead.
    #[track_caller]
    pub fn descriptors(&self) -> Vec<String> {
        let folder = format!("/proc/{}/fd", self.pid);
        fs::read_dir(folder)
            .expect("the VMM runs")
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .map(|path| path.to_string_lossy().into_owned())
            .collect()
    }

    /// Checks that of /proc it has what tells which pages of its own memory were written, and no way to anything else.
    #[track_caller]
    pub fn assert_only_its_pagemap(&self) {
        let all = self.descriptors();
        let folder = format!("/{}", self.pid);
        let of_proc = all.iter().filter(|to| to.contains(&folder));
        let of_proc: Vec<_> = of_proc.collect();
        let pagemap = format!("{folder}/pagemap");
        assert!(!of_proc.is_empty(), "{all:?}");
        assert!(of_proc.iter().all(|to| to.ends_with(&pagemap)), "{all:?}");
    }

    /// Sends a signal to the VMM.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.pidfd, signal).expect("the VMM runs");
    }

    /// Sends a signal to the jailer that waits for the VMM.
    #[track_caller]
    pub fn signal_jailer(&self, signal: Signal) {
        let child = self.child.as_ref().expect("not detached");
        rustix::process::kill_process(Pid::from_child(child), signal).expect("it runs");
    }

    /// Waits for the VMM's end, and gives its exit status if it is our child.
    #[track_caller]
    pub fn wait(&mut self) -> Option<i32> {
        assert!(self.has_ended_within(PATIENCE), "the VMM does not end");
        let child = self.child.as_mut()?;
        child.wait().expect("it has ended").code()
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is gone after this.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        if let Some(child) = &mut self.child {
            drop(child.wait());
        }
    }
}

/// Waits until a path is gone.
#[track_caller]
pub fn wait_until_gone(path: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while path.exists() {
        assert!(Instant::now() < deadline, "{} stays", path.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}
