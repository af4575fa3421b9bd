//! Our Linux guest, with its agent.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use lepton_agent::READY_PORT;
use lepton_agent::client::{Client, ConnectError, Exec, ExitStatus, Output as Stream, Process};
use lepton_agent::ready::Ready;
use serde_json::{Value, json};

use crate::api::Api;
use crate::host_socket::HostSocket;
use crate::origin::Origin;
use crate::vmm::{Builder, Ended, Vmm};
use crate::{PATIENCE, suite::Need};

/// What every test with this guest needs.
pub const NEEDS: [Need; 4] = [
    Need::HardwareKvm,
    Need::File("LEPTON_KERNEL"),
    Need::File("LEPTON_BZIMAGE"),
    Need::File("LEPTON_IMAGE"),
];

/// The arguments that the guest's kernel is given. What follows is the test's.
const BOOT_ARGUMENTS: &str =
    "console=ttyS0 reboot=k panic=-1 root=/dev/vda ro rootfstype=erofs init=/sbin/init";

/// A file that `variable` names.
#[track_caller]
pub fn file(variable: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} is not set")))
}

/// A guest that runs, and the ways to it.
pub struct Linux {
    /// Its VMM.
    pub vmm: Vmm,
    /// The VMM's API.
    pub api: Api,
    /// The agent in the guest.
    pub agent: Client,
    /// What the agent said when it was up.
    pub ready: Ready,
}

/// How a command in the guest ended.
#[derive(Debug)]
pub struct Output {
    /// Its status.
    pub status: ExitStatus,
    /// What it wrote to the standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to the standard error.
    pub stderr: String,
}

impl Output {
    /// The standard output as text, without the newline at its end.
    pub fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.stdout);
        text.trim_end().to_owned()
    }
}

impl Linux {
    /// Boots with more kernel arguments, and a configuration that `change` makes of the usual one: 1 vCPU, 128 MiB,
    /// the image as root drive, a vsock. Or comes of one that has, in the way that the suite asks for.
    #[track_caller]
    pub fn boot(arguments: &str, change: impl FnOnce(&Builder, &mut Value)) -> Self {
        let builder = Vmm::builder();
        let uds_path = builder.directory().join("v.sock");
        let mut config = json!({
            "boot-source": {
                "kernel_image_path": file("LEPTON_KERNEL"),
                "boot_args": format!("{BOOT_ARGUMENTS} {arguments}"),
            },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
            "drives": [{
                "drive_id": "root",
                "path_on_host": file("LEPTON_IMAGE"),
                "is_root_device": true,
                "is_read_only": true,
            }],
            "vsock": { "guest_cid": 3, "uds_path": uds_path },
        });
        change(&builder, &mut config);
        let origin = Origin::current();
        if origin != Origin::Booted {
            let vmm = origin.machine(builder, &config, |_, config| {
                let socket = config["vsock"]["uds_path"].as_str().expect("a path");
                connect(Path::new(socket));
            });
            let api = vmm.api();
            return Self::running(vmm, api);
        }
        let vmm = builder.spawn();
        let mut api = vmm.api();
        assert_eq!(api.state(), "Not started");
        let listener = HostSocket::of_vsock(&uds_path, READY_PORT);
        api.configure(&config);
        api.start();
        let ready = Ready::read_from(listener.accept()).expect("the agent is up");
        let agent = Client::connect(&uds_path).expect("the agent listens");
        Self {
            vmm,
            api,
            agent,
            ready,
        }
    }

    /// A guest that runs already, in `vmm`: its vsock is where [`Linux::boot`] puts it.
    #[track_caller]
    pub fn running(vmm: Vmm, api: Api) -> Self {
        let agent = connect(&vmm.directory().join("v.sock"));
        let info = agent.info().expect("the agent answers");
        let ready = Ready {
            version: info.agent_version,
            protocol: lepton_agent::PROTOCOL_VERSION,
            start_us: info.start_us,
            ready_us: info.ready_us,
        };
        Self {
            vmm,
            api,
            agent,
            ready,
        }
    }

    /// Where the host reaches the guest's vsock.
    pub fn uds_path(&self) -> PathBuf {
        self.vmm.directory().join("v.sock")
    }

    /// Starts a shell with `script`.
    #[track_caller]
    pub fn start(&self, script: &str) -> Process {
        let exec = Exec {
            argv: ["sh", "-c", script].map(Into::into).into(),
            ..Exec::default()
        };
        match self.agent.exec(&exec) {
            Ok(process) => process,
            Err(error) => panic!("{script}: {error}"),
        }
    }

    /// Runs a shell with `script` and `input`.
    #[track_caller]
    pub fn run(&self, script: &str, input: &[u8]) -> Output {
        let process = self.start(script);
        let (done, result) = mpsc::channel();
        let (input, runner) = (input.to_vec(), process.clone());
        // On a thread of its own, so that a guest that stands still fails the test.
        thread::spawn(move || done.send(talk(&runner, &input)));
        match result.recv_timeout(PATIENCE) {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => panic!("{script}: {error}"),
            Err(_) => panic!("{script}: no end after {PATIENCE:?}"),
        }
    }

    /// Runs a shell with `script`, which must succeed; its standard output comes back, without the newline at its end.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let output = self.run(script, b"");
        assert_eq!(output.status, ExitStatus::Exited(0), "{script}: {output:?}");
        output.text()
    }

    /// Shuts the guest down by its agent, and waits for the VMM's end, which is a success.
    #[track_caller]
    pub fn shut_down(self) -> Ended {
        self.agent.shutdown().expect("the agent listens");
        self.ended()
    }

    /// Waits for the VMM's end, which is a success.
    #[track_caller]
    pub fn ended(self) -> Ended {
        let Self { vmm, api, .. } = self;
        drop(api);
        vmm.wait().expect_code(0)
    }
}

/// Connects to the agent of a guest, once it listens.
#[track_caller]
fn connect(socket: &Path) -> Client {
    let deadline = Instant::now() + PATIENCE;
    // A busy guest on a busy host may take longer to answer than the two seconds that its VMM waits.
    loop {
        match Client::connect(socket) {
            Ok(agent) => return agent,
            Err(error @ ConnectError::Refused { .. }) => {
                assert!(
                    Instant::now() < deadline,
                    "the agent does not listen: {error}"
                );
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// Writes all of `input` and reads all output, all at once.
fn talk(process: &Process, input: &[u8]) -> Result<Output, lepton_agent::client::CallError> {
    thread::scope(|scope| {
        let stdout = scope.spawn(|| read(process, Stream::Stdout));
        let stderr = scope.spawn(|| read(process, Stream::Stderr));
        if process.write_stdin(input)? {
            process.close_stdin()?;
        }
        let status = process.wait()?;
        let stderr = stderr.join().expect("a reader does not panic")?;
        Ok(Output {
            status,
            stdout: stdout.join().expect("a reader does not panic")?,
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        })
    })
}

fn read(process: &Process, stream: Stream) -> Result<Vec<u8>, lepton_agent::client::CallError> {
    let mut all = Vec::new();
    loop {
        let more = process.read(stream)?;
        if more.is_empty() {
            return Ok(all);
        }
        all.extend(more);
    }
}

/// A drive of a configuration.
pub fn drive(id: &str, path: &Path, engine: &str, read_only: bool) -> Value {
    json!({
        "drive_id": id,
        "path_on_host": path,
        "is_root_device": false,
        "is_read_only": read_only,
        "io_engine": engine,
    })
}
