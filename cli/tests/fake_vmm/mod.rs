//! A stand-in for the VMM, as a program of its own: the API and the vsock of a VMM, and behind them
//! not a guest but the agent's service on this host.
//!
//! The program is this test executable again: a script, which is the `--vmm` of the tests, starts it
//! for the one ignored test [`vmm`].

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use lepton_agent::ready::Ready;
use lepton_agent::service::{Admission, Children, Service, StartTimes, Table};
use lepton_api::{Action, Fault, Reply, Server};

/// How the stand-in behaves, and what it was asked: files in the directory of the script.
pub struct FakeVmm {
    directory: tempfile::TempDir,
}

impl FakeVmm {
    pub fn new(behaviour: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("vmm");
        let executable = std::env::current_exe().unwrap();
        let script = format!(
            "#!/bin/sh\nexport FAKE_VMM_HOME={home:?} FAKE_VMM_BEHAVIOUR={behaviour:?}\n\
             export FAKE_VMM_ARGUMENTS=\"$*\"\n\
             exec {executable:?} --ignored --exact fake_vmm::vmm --nocapture\n",
            home = directory.path(),
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["kernel", "image"] {
            fs::write(directory.path().join(name), name).unwrap();
        }
        Self { directory }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The actions the stand-in was asked for, one a line.
    pub fn actions(&self) -> String {
        fs::read_to_string(self.file("actions")).unwrap_or_default()
    }
}

/// Not a test: the program of [`FakeVmm`].
#[test]
#[ignore = "the program that other tests start"]
fn vmm() {
    let Ok(home) = std::env::var("FAKE_VMM_HOME") else {
        return;
    };
    let behaviour = std::env::var("FAKE_VMM_BEHAVIOUR").unwrap();
    let arguments = std::env::var("FAKE_VMM_ARGUMENTS").unwrap();
    let words: Vec<&str> = arguments.split(' ').collect();
    let ["--api-sock", socket, "--id", _] = words[..] else {
        panic!("{arguments}");
    };
    fs::write(Path::new(&home).join("pid"), std::process::id().to_string()).unwrap();
    match behaviour.as_str() {
        "fails to start" => {
            eprintln!("the VMM's last words");
            std::process::exit(153);
        }
        "hides" => loop {
            thread::park();
        },
        _ => {}
    }
    let mut actions = fs::File::create(Path::new(&home).join("actions")).unwrap();
    let mut vsock = None;
    let handle = move |action: Action| {
        writeln!(actions, "{action:?}").unwrap();
        match action {
            Action::PutMachineConfig(_) if behaviour == "refuses" => {
                return Err(Fault::bad_request("mem_size_mib 256 is too odd"));
            }
            Action::PutVsock(config) => vsock = Some(PathBuf::from(&config.uds_path)),
            Action::InstanceStart => start(&behaviour, vsock.clone().unwrap()),
            _ => {}
        }
        Ok(Reply::NoContent)
    };
    let listener = UnixListener::bind(socket).unwrap();
    Server::from_listener(listener)
        .unwrap()
        .serve(handle)
        .unwrap();
}

fn start(behaviour: &str, vsock: PathBuf) {
    println!("guest kernel \x1b[31mspeaking");
    match behaviour {
        "never ready" => {}
        "panics" => {
            println!("Kernel panic - not syncing");
            std::process::exit(1);
        }
        "babbles" => {
            let mut stream = ready(&vsock);
            let _ = stream.write_all(&[b'a'; 100_000]);
        }
        "future" => {
            let line = "lepton-agent 9.0.0 protocol=99 start_us=1 ready_us=2\n";
            ready(&vsock).write_all(line.as_bytes()).unwrap();
        }
        "boots" => drop(thread::spawn(move || guest(&vsock))),
        _ => panic!("{behaviour}"),
    }
}

/// The connection that the agent makes to tell that it is up.
fn ready(vsock: &Path) -> UnixStream {
    UnixStream::connect(format!("{}_1025", vsock.display())).unwrap()
}

/// The agent's service, reached through the vsock's socket. A shutdown ends the stand-in.
fn guest(vsock: &Path) {
    let table = Arc::new(Table::default());
    let agent = vsock.with_file_name("agent.sock");
    let listener = UnixListener::bind(&agent).unwrap();
    listener.set_nonblocking(true).unwrap();
    let shutdown = || std::process::exit(0);
    let service = Service::new(Arc::clone(&table), StartTimes::default(), shutdown);
    let _server = service.serve(listener.into(), Admission::Anyone).unwrap();

    let host = UnixListener::bind(vsock).unwrap();
    let ready_line = Ready {
        version: "0.0.1".into(),
        protocol: lepton_agent::PROTOCOL_VERSION,
        start_us: 1,
        ready_us: 2,
    };
    writeln!(ready(vsock), "{ready_line}").unwrap();
    thread::spawn(move || reap(&table));
    for stream in host.incoming() {
        let agent = agent.clone();
        thread::spawn(move || connect(stream.unwrap(), &agent));
    }
}

fn reap(table: &Table) {
    let (mut ended, signal) = UnixStream::pair().unwrap();
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGCHLD, signal).unwrap();
    loop {
        assert!(matches!(table.reap(), Children::Some | Children::None));
        ended.read_exact(&mut [0]).unwrap();
    }
}

fn connect(mut host: UnixStream, agent: &Path) -> io::Result<()> {
    let mut request = [0; b"CONNECT 1024\n".len()];
    host.read_exact(&mut request)?;
    assert_eq!(&request, b"CONNECT 1024\n");
    let mut agent = UnixStream::connect(agent)?;
    host.write_all(b"OK 1073741824\n")?;
    let (mut from_agent, mut to_host) = (agent.try_clone()?, host.try_clone()?);
    thread::spawn(move || {
        let copied = io::copy(&mut from_agent, &mut to_host);
        to_host.shutdown(std::net::Shutdown::Both)?;
        copied
    });
    io::copy(&mut host, &mut agent)?;
    agent.shutdown(std::net::Shutdown::Both)
}
