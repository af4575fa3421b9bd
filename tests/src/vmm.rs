//! A VMM under test.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api::Api;
use crate::capture::Capture;
use crate::guest::{Entry, Program};
use crate::{PATIENCE, programs, reaper};

/// What to start.
pub struct Builder {
    directory: TempDir,
    arguments: Vec<OsString>,
    api: bool,
    input: bool,
}

impl Builder {
    /// A directory of the VMM's own, gone with it.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Writes a file into [`Builder::directory`], and returns its path.
    pub fn file(&self, name: &str, content: &[u8]) -> String {
        let path = path_in(self.directory(), name);
        fs::write(&path, content).expect("a file can be written");
        path
    }

    /// Makes a file of zeroes without blocks in [`Builder::directory`], and returns its path.
    pub fn sparse_file(&self, name: &str, bytes: u64) -> String {
        sparse_file_in(self.directory(), name, bytes)
    }

    /// Adds arguments to the command line.
    #[must_use]
    pub fn arguments<A: Into<OsString>>(mut self, more: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(more.into_iter().map(Into::into));
        self
    }

    /// Lets the VMM boot `config` at once.
    #[must_use]
    pub fn config(self, config: &Value) -> Self {
        let path = self.directory().join("config.json");
        fs::write(&path, config.to_string()).expect("a configuration file can be written");
        self.arguments([OsString::from("--config-file"), path.into()])
    }

    /// Leaves the API out.
    #[must_use]
    pub fn without_api(mut self) -> Self {
        self.api = false;
        self
    }

    /// Puts it back.
    #[must_use]
    pub fn with_api(mut self) -> Self {
        self.api = true;
        self
    }

    /// Gives the VMM a standard input, on which the guest's console is typed. Without it there is none.
    #[must_use]
    pub fn with_input(mut self) -> Self {
        self.input = true;
        self
    }

    /// Starts the VMM.
    #[track_caller]
    pub fn spawn(self) -> Vmm {
        let Self {
            directory,
            mut arguments,
            api,
            input,
        } = self;
        let socket = directory.path().join("api.sock");
        if api {
            arguments.extend([OsString::from("--api-sock"), socket.clone().into()]);
        } else {
            arguments.push("--no-api".into());
        }
        let mut child = Command::new(programs::vmm())
            .args(&arguments)
            .current_dir(directory.path())
            .stdin(if input { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", programs::vmm().display()));
        let pidfd = reaper::watch(&child).expect("there is a reaper");
        Vmm {
            stdout: Capture::of(child.stdout.take().expect("a pipe")),
            stderr: Capture::of(child.stderr.take().expect("a pipe")),
            child,
            pidfd,
            socket,
            directory: Some(directory),
        }
    }
}

fn path_in(directory: &Path, name: &str) -> String {
    let path = directory.join(name);
    path.to_str().expect("a plain path").to_owned()
}

fn sparse_file_in(directory: &Path, name: &str, bytes: u64) -> String {
    let path = path_in(directory, name);
    let file = File::create(&path).expect("a file can be made");
    file.set_len(bytes).expect("a file can be sparse");
    path
}

/// A VMM that runs. Dropping it kills it.
pub struct Vmm {
    child: Child,
    pidfd: OwnedFd,
    /// Console and log.
    pub stdout: Capture,
    /// What it says before there is a log.
    pub stderr: Capture,
    socket: PathBuf,
    directory: Option<TempDir>,
}

/// How a VMM ended.
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// All it wrote to the standard output.
    pub stdout: Vec<u8>,
    /// All it wrote to the standard error.
    pub stderr: String,
    /// What is left of it.
    pub directory: TempDir,
}

impl Ended {
    /// The standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Checks the exit status.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        let found = self.status.code();
        assert_eq!(
            found,
            Some(code),
            "{}\n{}\n{}",
            self.status,
            self.text(),
            self.stderr
        );
        self
    }
}

impl Vmm {
    /// One with an API that has answered, whose log is apart from its console.
    #[track_caller]
    pub fn quiet() -> (Self, Api) {
        let builder = Self::builder();
        let log = builder.directory().join("log");
        let vmm = builder
            .arguments(["--log-path".into(), log.into_os_string()])
            .spawn();
        let api = vmm.ready();
        (vmm, api)
    }

    /// A VMM with an API, in a directory of its own.
    pub fn builder() -> Builder {
        Builder {
            directory: tempfile::Builder::new()
                .prefix("lepton-test-")
                .tempdir()
                .expect("a temporary directory"),
            arguments: Vec::new(),
            api: true,
            input: false,
        }
    }

    /// A VMM without a machine, and its API. It has answered a request, so all of it is there.
    #[track_caller]
    pub fn with_api() -> (Self, Api) {
        let vmm = Self::builder().spawn();
        let api = vmm.ready();
        (vmm, api)
    }

    /// Its API, once all of it is there and nothing goes on: what it does after an answer is done before the next.
    #[track_caller]
    fn ready(&self) -> Api {
        let mut api = self.api();
        for _ in 0..2 {
            assert_eq!(api.state(), "Not started");
        }
        api
    }

    /// A VMM whose machine has a kernel and is not started, its API, and the kernel's path. Entered in 64-bit mode.
    #[track_caller]
    pub fn with_kernel(program: &Program) -> (Self, Api, String) {
        let (vmm, mut api) = Self::with_api();
        program.write(vmm.directory(), Entry::Linux64);
        let kernel = vmm.path("kernel");
        api.put("/boot-source", &json!({ "kernel_image_path": kernel }));
        (vmm, api, kernel)
    }

    /// The VMM's own directory.
    pub fn directory(&self) -> &Path {
        let directory = self.directory.as_ref();
        directory.expect("kept until the end").path()
    }

    /// The path of a file in [`Vmm::directory`].
    pub fn path(&self, name: &str) -> String {
        path_in(self.directory(), name)
    }

    /// Writes a file into [`Vmm::directory`], and returns its path.
    pub fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.path(name);
        fs::write(&path, content).expect("a file can be written");
        path
    }

    /// Makes a file of zeroes without blocks in [`Vmm::directory`], and returns its path.
    pub fn sparse_file(&self, name: &str, bytes: u64) -> String {
        sparse_file_in(self.directory(), name, bytes)
    }

    /// The API's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects to the API, as soon as it listens.
    #[track_caller]
    pub fn api(&self) -> Api {
        let deadline = Instant::now() + PATIENCE;
        while std::os::unix::net::UnixStream::connect(&self.socket).is_err() {
            // The wait is for the process's end, which would make all waiting vain.
            let ended = self.has_ended_within(Duration::from_millis(1));
            assert!(!ended, "the VMM ended: {}", self.stderr.text());
            assert!(Instant::now() < deadline, "the API does not listen");
        }
        Api::connect(&self.socket)
    }

    /// Types on the guest's console.
    #[track_caller]
    pub fn types(&mut self, text: &str) {
        let input = self.child.stdin.as_mut().expect("built with an input");
        input.write_all(text.as_bytes()).expect("the VMM reads");
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.pidfd, signal).expect("the VMM runs");
    }

    /// Waits for the process's end, but no longer than `patience`.
    pub fn has_ended_within(&self, patience: Duration) -> bool {
        let timeout = Timespec::try_from(patience).expect("a short time");
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        loop {
            match poll(&mut fds, Some(&timeout)) {
                Ok(ready) => return ready > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("poll: {error}"),
            }
        }
    }

    /// Waits for the process to end by itself, and checks that it leaves no socket behind.
    #[track_caller]
    pub fn wait(self) -> Ended {
        let ended = self.wait_for_fault();
        let left = sockets(ended.directory.path());
        assert!(
            left.is_empty(),
            "sockets left behind: {left:?}\n{}",
            ended.text()
        );
        ended
    }

    /// Waits for an end that comes too suddenly to remove sockets.
    #[track_caller]
    pub fn wait_for_fault(mut self) -> Ended {
        let ended = self.has_ended_within(PATIENCE);
        assert!(ended, "the VMM does not end");
        Ended {
            status: self.child.wait().expect("it has ended"),
            stdout: self.stdout.to_end(),
            stderr: String::from_utf8_lossy(&self.stderr.to_end()).into_owned(),
            directory: self.directory.take().expect("kept until now"),
        }
    }

    /// Ends the process by SIGTERM.
    #[track_caller]
    pub fn terminate(self) -> Ended {
        self.signal(Signal::TERM);
        self.wait().expect_code(143)
    }

    /// How many descriptors the process has open.
    pub fn open_files(&self) -> usize {
        let path = format!("/proc/{}/fd", self.pid());
        fs::read_dir(path).expect("the VMM runs").count()
    }

    /// Whether no more than `bound` descriptors are open, or soon will be: a connection that a client has closed is open
    /// until the VMM has noticed.
    #[track_caller]
    pub fn open_files_fall_to(&self, bound: usize, api: &mut Api) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while self.open_files() > bound {
            // Something for the VMM to do, before which it notices.
            api.state();
            if Instant::now() > deadline {
                return false;
            }
        }
        true
    }

    /// The most KiB that were resident at any time, guest memory included. None: it has ended.
    pub fn peak_memory(&self) -> Option<u64> {
        self.kib_of("VmHWM:")
    }

    /// KiB that are resident now and come from files, guest memory not included. None: it has ended.
    pub fn file_memory(&self) -> Option<u64> {
        self.kib_of("RssFile:")
    }

    fn kib_of(&self, what: &str) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(what))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    }

    /// The state of the thread of this name, as in `/proc/PID/stat`: `R`, `S`, ...
    #[track_caller]
    pub fn thread_state(&self, name: &str) -> char {
        let path = format!("/proc/{}/task", self.pid());
        let stat = fs::read_dir(path)
            .expect("the VMM runs")
            .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("stat")).ok())
            .find_map(|stat| {
                let (_, rest) = stat.split_once(&format!("({name}) "))?;
                rest.chars().next()
            });
        stat.unwrap_or_else(|| panic!("there is no thread {name}"))
    }

    /// The names of its threads, sorted. Threads that the kernel's KVM and io_uring put beside them are left out.
    pub fn threads(&self) -> Vec<String> {
        let path = format!("/proc/{}/task", self.pid());
        let mut names: Vec<String> = fs::read_dir(path)
            .expect("the VMM runs")
            .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("comm")).ok())
            .map(|name| name.trim_end().to_owned())
            .filter(|name| !name.starts_with("kvm-") && !name.starts_with("iou-"))
            .collect();
        names.sort();
        names
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if self.directory.is_none() {
            return;
        }
        // It may have ended by itself; either way it is gone after this.
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            eprintln!(
                "--- standard output of the VMM\n{}--- its standard error\n{}---",
                self.stdout.text(),
                self.stderr.text()
            );
        }
    }
}

/// The sockets in a directory.
fn sockets(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .expect("a directory")
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()))
        .map(|entry| entry.path())
        .collect()
}
