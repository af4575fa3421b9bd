//! The lab: a KVM host with nested paging in QEMU's software CPU, on any machine, in two seconds.
//!
//! QEMU emulates AMD SVM, so Debian's own kernel in it has a real `/dev/kvm`. The host's file system is its root, under
//! an overlay in memory: every installed program works in it and nothing it writes lasts, except in folders shared on
//! purpose. See `init.sh` and `start.sh` for what happens inside.

mod bzimage;
mod initramfs;
mod kernel;
mod machine;
mod relay;

use std::ffi::OsString;
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};

use crate::cache::Cache;
use crate::packages;
use crate::progress::Progress;
use crate::terminal;
use initramfs::{shell_line, shell_path};
use machine::{Machine, Running, Wiring};
use relay::Event;

pub use initramfs::Initramfs;
pub use kernel::Kernel;
pub use relay::{Sink, stderr, stdout};

/// Modules for the root on the host's files and for the wires to us, in the order they load.
const HOST_MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "fuse",
    "virtiofs",
    "overlay",
    "virtio_console",
];

/// Modules a VMM needs of its host.
const KVM_MODULES: [&str; 4] = ["irqbypass", "kvm", "kvm-amd", "tun"];

/// Packages the lab is made from.
pub const PACKAGES: [&str; 5] = [
    "qemu-system-x86",
    "qemu-system-common",
    "busybox-static",
    "kmod",
    "xz-utils",
];

const NEEDS_ROOT: &str = "the lab shows this machine's files to the command in it, and needs root for that. Type\n  \
                          sudo --preserve-env env PATH=\"$PATH\" cargo xtask ...\n\
                          (with --icount, which shows no files, it does not need root)";

/// Statically linked by its package, so it runs in an initramfs without libraries.
const BUSYBOX: &str = "/bin/busybox";

/// Enough for a few guests; only what is touched is taken from the host.
pub const DEFAULT_MEMORY_MIB: u32 = 4096;

/// A folder of the host seen directly, not through the overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The folder, absolute.
    pub folder: PathBuf,
    /// Whether what the lab writes there lasts.
    pub writable: bool,
}

/// Where the command runs.
pub enum Place {
    /// On the host's files.
    Host {
        /// The working directory.
        directory: PathBuf,
        /// Folders seen directly.
        shares: Vec<Share>,
        /// CPUs of the lab, each a thread.
        cpus: u32,
    },
    /// With nothing but these files, in a machine where one instruction is one nanosecond: the same command takes the
    /// same time in every run.
    Counted {
        /// Files, put by their names into the working directory and on the path.
        payload: Vec<PathBuf>,
    },
}

/// One run of a command in a lab.
pub struct Lab {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// Its environment, besides what the lab sets.
    pub environment: Vec<(OsString, OsString)>,
    /// Where it runs.
    pub place: Place,
    /// The lab's memory.
    pub memory_mib: u32,
    /// How long it may take, the lab's boot included.
    pub timeout: Option<Duration>,
}

/// Where the command's input comes from and its output goes to.
pub enum Streams {
    /// This program's terminal.
    Terminal,
    /// Pipes.
    Pipes {
        /// Whether this program's stdin is the command's. Otherwise it reads nothing.
        input: bool,
        /// Takes its stdout.
        output: Sink,
        /// Takes its stderr.
        error: Sink,
    },
}

impl Streams {
    /// This program's own: a terminal if it has one at both ends.
    pub fn inherited() -> io::Result<Self> {
        if terminal::is_interactive() {
            return Ok(Self::Terminal);
        }
        Ok(Self::Pipes {
            input: true,
            output: stdout()?,
            error: stderr()?,
        })
    }
}

/// This program's environment variables that mean the same in the lab, and those in `more`.
pub fn environment(more: &[String]) -> Vec<(OsString, OsString)> {
    const NAMES: [&str; 10] = [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "TERM",
        "LANG",
        "TZ",
        "TMPDIR",
        "COLORTERM",
    ];
    const PREFIXES: [&str; 4] = ["LC_", "RUST_", "CARGO_", "LEPTON_"];
    std::env::vars_os()
        .filter(|(name, _)| {
            name.to_str().is_some_and(|name| {
                NAMES.contains(&name)
                    || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
                    || more.iter().any(|more| more == name)
            })
        })
        .collect()
}

/// How a command ended.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Its exit status; 128 and the signal's number if it was killed.
    pub status: u8,
    /// From the start of QEMU to the start of the command, on the host's clock.
    pub ready: Duration,
    /// How long the command ran, on the lab's clock.
    pub inside: Duration,
}

/// Why a lab did not carry its command through.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// It took too long.
    #[error("the lab was ended after {} s; the end of its console:\n{console}", limit.as_secs())]
    TimedOut {
        /// The limit given.
        limit: Duration,
        /// The last lines.
        console: String,
    },
    /// The machine ended before the command.
    #[error(
        "the lab ended before its command did; the end of its console:\n{console}\nand of its processes' messages:\n{messages}"
    )]
    Crashed {
        /// The last lines.
        console: String,
        /// What QEMU and virtiofsd wrote to stderr.
        messages: String,
    },
    /// Nobody takes the command's output any more.
    #[error("the lab's output cannot be written")]
    OutputClosed(#[source] io::Error),
    /// It could not be set up.
    #[error(transparent)]
    Setup(#[from] anyhow::Error),
}

impl LabError {
    /// Whether the reader of the command's output went away.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::OutputClosed(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// The exit status that tells it apart.
    pub fn exit_status(&self) -> u8 {
        match self {
            // As timeout(1) has it.
            Self::TimedOut { .. } => 124,
            Self::Crashed { .. } | Self::Setup(_) => 125,
            // As a shell shows SIGPIPE.
            Self::OutputClosed(_) => 141,
        }
    }
}

/// Checks that we may start a lab on the host's files.
///
/// # Errors
/// If not; the text says what to type.
pub fn check_rights() -> anyhow::Result<()> {
    // virtiofsd opens files as overlayfs asks it to, which only their owner and root may.
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(anyhow!("{NEEDS_ROOT}"))
}

impl Lab {
    /// Runs the command.
    ///
    /// # Errors
    /// If the lab cannot be set up, ends early or takes too long. A command that fails is not an error: it is
    /// [`Outcome::status`].
    pub fn run(
        &self,
        cache: &Cache,
        progress: &Progress,
        streams: Streams,
    ) -> Result<Outcome, LabError> {
        if matches!(self.place, Place::Host { .. }) {
            check_rights()?;
        }
        packages::ensure(progress, "the lab", &PACKAGES)?;
        let kernel = Kernel::get(cache, progress)?;
        let wiring = match (&self.place, &streams) {
            (Place::Counted { .. }, Streams::Terminal) => {
                return Err(anyhow!("a counted lab has no terminal: redirect its output").into());
            }
            (Place::Counted { .. }, Streams::Pipes { .. }) => Wiring::Counted,
            (Place::Host { .. }, Streams::Terminal) => Wiring::Terminal,
            (Place::Host { .. }, Streams::Pipes { .. }) => Wiring::Ports,
        };
        let initramfs = self
            .initramfs(&kernel, &wiring)
            .context("cannot make the lab's initramfs")?;
        let started = Instant::now();
        let machine = Machine {
            kernel: &kernel.boot,
            initramfs,
            memory_mib: self.memory_mib,
            cpus: match self.place {
                Place::Host { cpus, .. } => cpus,
                Place::Counted { .. } => 1,
            },
            wiring,
        };
        self.carry(machine.start()?, streams, started)
    }

    fn carry(
        &self,
        mut machine: Running,
        streams: Streams,
        started: Instant,
    ) -> Result<Outcome, LabError> {
        let (events, inbox) = channel();
        let relay = relay::start(&mut machine, streams, &events).map_err(anyhow::Error::from)?;
        // From here the threads hold the only senders.
        drop(events);
        let deadline = self.timeout.map(|limit| (limit, started + limit));
        let mut ready = None;
        loop {
            let event = match deadline {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some((_, at)) => inbox.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match event {
                Ok(Event::Started { clock }) => ready = Some((started.elapsed(), clock)),
                Ok(Event::Ended { status, clock }) => {
                    machine.end();
                    relay.finish();
                    let (ready, start) = ready.unwrap_or((started.elapsed(), clock));
                    return Ok(Outcome {
                        status,
                        ready,
                        inside: clock.saturating_sub(start),
                    });
                }
                Ok(Event::OutputClosed(error)) => return Err(LabError::OutputClosed(error)),
                Ok(Event::ReportClosed) | Err(RecvTimeoutError::Disconnected) => {
                    let messages = machine.end();
                    let console = relay.finish();
                    return Err(LabError::Crashed { console, messages });
                }
                Err(RecvTimeoutError::Timeout) => {
                    machine.end();
                    let console = relay.finish();
                    let limit = self.timeout.unwrap_or_default();
                    return Err(LabError::TimedOut { limit, console });
                }
            }
        }
    }

    fn initramfs(&self, kernel: &Kernel, wiring: &Wiring) -> anyhow::Result<std::fs::File> {
        let mut archive = Initramfs::new(io::BufWriter::new(machine::memory_file("initramfs")?));
        archive.base(&read(Path::new(BUSYBOX))?)?;
        let names: Vec<&str> = match self.place {
            Place::Host { .. } => HOST_MODULES.into_iter().chain(KVM_MODULES).collect(),
            Place::Counted { .. } => KVM_MODULES.to_vec(),
        };
        for (number, module) in kernel.modules(&names)?.iter().enumerate() {
            // The names sort in the order they are to be loaded.
            archive.program(&format!("modules/{number:02}"), module)?;
        }
        archive.program("lab/config", &self.config(kernel, wiring))?;
        archive.program("lab/command", &self.script())?;
        if let Place::Counted { payload } = &self.place {
            archive.folder("payload")?;
            for path in payload {
                let name = path
                    .file_name()
                    .and_then(|name| name.to_str())
                    .ok_or_else(|| anyhow!("{}: not a file's name", path.display()))?;
                archive.program(&format!("payload/{name}"), &read(path)?)?;
            }
        }
        let mut file = archive
            .finish()?
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        Ok(file)
    }

    /// Variables for the scripts inside.
    fn config(&self, kernel: &Kernel, wiring: &Wiring) -> Vec<u8> {
        let mut config = Vec::new();
        let (root, terminal) = match wiring {
            Wiring::Ports => ("host", "no"),
            Wiring::Terminal => ("host", "yes"),
            Wiring::Counted => ("payload", "no"),
        };
        let (rows, columns) = terminal::size();
        let ports = match wiring {
            Wiring::Counted => {
                "lab_in=\nlab_out=/dev/ttyS1\nlab_err=/dev/ttyS2\nlab_report=/dev/ttyS3\n"
            }
            Wiring::Ports | Wiring::Terminal => {
                "lab_in=/dev/vport0p1\nlab_out=/dev/vport0p2\nlab_err=/dev/vport0p3\nlab_report=/dev/vport0p4\n"
            }
        };
        config.extend_from_slice(
            format!("lab_root={root}\nlab_terminal={terminal}\nlab_rows={rows}\nlab_columns={columns}\n{ports}")
                .as_bytes(),
        );
        config.extend_from_slice(b"lab_modules=");
        config.extend(shell_path(&kernel.modules));
        let shares: &[Share] = match &self.place {
            Place::Host { shares, .. } => shares,
            Place::Counted { .. } => &[],
        };
        let writes = shares.iter().any(|share| share.writable);
        // Without a writable share, the host's files cannot be written even by a mistake in the scripts.
        config.extend_from_slice(if writes {
            b"lab_export=rw\nlab_sync=yes\n"
        } else {
            b"lab_export=ro\nlab_sync=\n"
        });
        config.extend_from_slice(b"lab_shares() {\n:\n");
        for share in shares {
            config.extend_from_slice(if share.writable {
                b"share rw "
            } else {
                b"share ro "
            });
            config.extend(shell_path(&share.folder));
        }
        config.extend_from_slice(b"}\n");
        config
    }

    /// The command as a script.
    fn script(&self) -> Vec<u8> {
        let mut script = Vec::new();
        for (name, value) in &self.environment {
            let mut assignment = name.clone();
            assignment.push("=");
            assignment.push(value);
            script.extend_from_slice(b"export ");
            script.extend(shell_line([assignment]));
        }
        match &self.place {
            Place::Host { directory, .. } => {
                script.extend_from_slice(b"cd ");
                script.extend(shell_path(directory));
                script.extend_from_slice(b"[ $? = 0 ] || exit 126\n");
                // By way of env: busybox's shell would take its own applets before the host's programs.
                script.extend_from_slice(b"exec /usr/bin/env -- ");
            }
            Place::Counted { .. } => {
                script.extend_from_slice(b"export PATH=/payload:/bin HOME=/\ncd /payload\nexec ");
            }
        }
        script.extend(shell_line(&self.command));
        script
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// What this program says about a run besides the command's own output.
pub fn report(outcome: &Outcome, mut to: impl Write) -> io::Result<()> {
    writeln!(
        to,
        "lab: ready after {:.2} s, command took {:.6} s on the lab's clock",
        outcome.ready.as_secs_f64(),
        outcome.inside.as_secs_f64()
    )
}
