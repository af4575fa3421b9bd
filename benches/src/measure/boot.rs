//! A Linux guest's way to its init.

use std::path::PathBuf;

use lepton_tests::programs::hardware_kvm;

use super::{Case, Context, Place, Reading, for_each_side};
use crate::guest::Guest;
use crate::machine::{Drive, Engine};
use crate::process::Failure;
use crate::side::{Driver, OURS, Side};

const INIT: &str = "boot.init";
const END: &str = "boot.end";

/// What init says.
const SAYS: &str = "init-runs";

/// The Linux that is booted.
#[derive(Debug, Clone, clap::Args)]
pub struct Linux {
    /// Kernel of the Linux guest, for the benchmark boot
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

/// Start to init, and to the end.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    for_each_side(context, &[INIT, END], move |side, driver| {
        boot(side, driver, context)
    })
}

fn boot(side: &Side, driver: &dyn Driver, context: &Context) -> Result<Vec<Reading>, Failure> {
    let linux = &context.linux;
    let kernel = match &linux.peer_kernel {
        Some(kernel) if side.id != OURS => Some(kernel),
        _ => linux.kernel.as_ref(),
    };
    let (Some(kernel), Some(image)) = (kernel, &linux.image) else {
        let reason = "a Linux guest is given by --kernel and --image".to_owned();
        return Err(Failure::NotOffered(reason));
    };
    hardware_kvm().map_err(Failure::NotOffered)?;
    let place = Place::new(Guest::Reset, context.patience)?;
    let mut machine = place.machine();
    machine.kernel = std::path::absolute(kernel)?;
    machine.command_line = format!(
        "console=ttyS0 quiet reboot=k panic=-1 rootfstype={} init=/bin/echo -- {SAYS}",
        linux.file_system
    );
    machine.drives.push(Drive {
        path: std::path::absolute(image)?,
        root: true,
        read_only: true,
        engine: Engine::Sync,
    });
    let mut running = place.boots(driver, &machine)?;
    let init = running.says(SAYS.as_bytes(), "init")?;
    let mut readings = vec![Reading::milliseconds(INIT, init - running.started)];
    if driver.ends_with_reset() {
        running.console()?;
        let (_, end) = running.ends()?;
        readings.push(Reading::milliseconds(END, end - running.started));
    }
    Ok(readings)
}
