//! The Linux guest of the benchmarks: what it is booted from, and its agent.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lepton_agent::READY_PORT;
use lepton_agent::client::Client;
use lepton_agent::ready::Ready;

use crate::machine::{Drive, Engine, Machine};
use crate::process::{Failure, Running};
use crate::side::{OURS, Side};

/// The Linux that is booted.
#[derive(Debug, Clone, clap::Args)]
pub struct Linux {
    /// Kernel of the Linux guest, for the benchmarks boot, unique and parity
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Kernel of the peers' Linux guest, if another
    #[arg(long, value_name = "PATH")]
    pub peer_kernel: Option<PathBuf>,
    /// Root image of the Linux guest; it has /bin/echo
    #[arg(long, value_name = "PATH")]
    pub image: Option<PathBuf>,
    /// The image's file system
    #[arg(long, value_name = "TYPE", default_value = "erofs")]
    pub file_system: String,
}

impl Linux {
    /// Where kernel, root image and its kind are, for `side`.
    pub(super) fn kernel_and_image(
        &self,
        side: &Side,
    ) -> Result<(PathBuf, PathBuf, &str), Failure> {
        let (Some(kernel), Some(image)) = (&self.kernel, &self.image) else {
            let reason = "a Linux guest is given by --kernel and --image".to_owned();
            return Err(Failure::NotOffered(reason));
        };
        let kernel = match &self.peer_kernel {
            Some(theirs) if side.id != OURS => theirs,
            _ => kernel,
        };
        let (kernel, image) = (std::path::absolute(kernel)?, std::path::absolute(image)?);
        Ok((kernel, image, &self.file_system))
    }
}

/// What the kernel is told; `root` is the root's file system and what follows it.
pub fn command_line(root: &str) -> String {
    format!("console=ttyS0 quiet reboot=k panic=-1 rootfstype={root}")
}

/// Makes a Linux guest of `machine`.
pub fn boots_from(machine: &mut Machine, kernel: &Path, image: &Path, root: &str) {
    machine.kernel = kernel.to_owned();
    machine.command_line = command_line(root);
    machine.drives.push(Drive {
        path: image.to_owned(),
        root: true,
        read_only: true,
        engine: Engine::Sync,
    });
}

/// Where a guest's agent says that it is up.
pub struct Announcement(UnixListener);

impl Announcement {
    /// Of a guest whose vsock is `socket` on the host.
    pub fn of(socket: &Path) -> Result<Self, Failure> {
        let mut path = socket.to_owned().into_os_string();
        path.push(format!("_{READY_PORT}"));
        Ok(Self(UnixListener::bind(path)?))
    }

    /// Waits for it.
    pub fn wait(&self, running: &Running, patience: Duration) -> Result<(), Failure> {
        running.readable(self.0.as_fd(), "the agent's word")?;
        let (stream, _) = self.0.accept()?;
        stream.set_read_timeout(Some(patience))?;
        Ready::read_from(stream).map_err(|error| Failure::because(error.to_string()))?;
        Ok(())
    }
}

/// Connects to a guest's agent, which has to answer who it is.
pub fn agent(socket: &Path) -> Result<Client, Failure> {
    let agent = Client::connect(socket).map_err(|error| Failure::because(error.to_string()))?;
    let info = agent.info();
    info.map_err(|error| Failure::because(error.to_string()))?;
    Ok(agent)
}
