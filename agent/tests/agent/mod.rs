//! A running agent for a test.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use lepton_agent::client::{Client, Exec, ExitStatus, Output, Process};
use lepton_agent::ready::Ready;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Agent {
    pub program: Child,
    pub client: Client,
    pub ready: Ready,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Agent {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let ready = directory.path().join("ready.sock");
        let listener = UnixListener::bind(&ready).unwrap();
        let program = Command::new(env!("CARGO_BIN_EXE_lepton-agent"))
            .arg("--listen-unix")
            .arg(&socket)
            .arg("--ready-unix")
            .arg(&ready)
            .spawn()
            .unwrap();
        let timeout = Timespec::try_from(PATIENCE).unwrap();
        let ready_fd = PollFd::new(&listener, PollFlags::IN);
        assert_eq!(poll(&mut [ready_fd], Some(&timeout)), Ok(1), "not ready");
        let (stream, _) = listener.accept().unwrap();
        let ready = Ready::read_from(stream).unwrap();
        let client = Client::from_stream(UnixStream::connect(&socket).unwrap()).unwrap();
        Self {
            program,
            client,
            ready,
            socket,
            _directory: directory,
        }
    }

    pub fn stream(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    pub fn connect(&self) -> Client {
        Client::from_stream(self.stream()).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

pub fn exec(argv: &[&str]) -> Exec {
    Exec {
        argv: argv.iter().map(Into::into).collect(),
        ..Exec::default()
    }
}

pub fn shell(script: &str) -> Exec {
    exec(&["sh", "-c", script])
}

/// All of an output stream.
pub fn drain(process: &Process, output: Output) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let data = process.read(output).unwrap();
        if data.is_empty() {
            return all;
        }
        all.extend(data);
    }
}

/// Runs to the end: standard output and the exit status.
pub fn output(client: &Client, exec: &Exec) -> (String, ExitStatus) {
    let process = client.exec(exec).unwrap();
    let text = drain(&process, Output::Stdout);
    (String::from_utf8(text).unwrap(), process.wait().unwrap())
}

/// Asks again and again, for what no event tells of.
pub fn eventually(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in {PATIENCE:?}");
        std::thread::yield_now();
    }
}
