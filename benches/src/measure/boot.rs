//! A Linux guest's way to its init.

use std::path::{Path, PathBuf};

use lepton_tests::programs::hardware_kvm;

use super::{Case, Context, Place, Reading, for_each_side};
use crate::guest::Guest;
use crate::init;
use crate::machine::{Drive, Engine};
use crate::process::{Failure, Running};
use crate::side::{Driver, OURS, Side};

const INSTRUCTION: &str = "boot.first-instruction";
const INIT: &str = "boot.init";
const END: &str = "boot.end";

/// What /bin/echo says as init.
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

impl Linux {
    /// Where kernel, root image and its kind are.
    pub(super) fn kernel_and_image(&self) -> Result<(PathBuf, PathBuf, &str), Failure> {
        let (Some(kernel), Some(image)) = (&self.kernel, &self.image) else {
            let reason = "a Linux guest is given by --kernel and --image".to_owned();
            return Err(Failure::NotOffered(reason));
        };
        let (kernel, image) = (std::path::absolute(kernel)?, std::path::absolute(image)?);
        Ok((kernel, image, &self.file_system))
    }
}

/// Start to init, and to the end.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    for_each_side(context, &[INSTRUCTION, INIT, END], move |side, driver| {
        boot(side, driver, context)
    })
}

fn boot(side: &Side, driver: &dyn Driver, context: &Context) -> Result<Vec<Reading>, Failure> {
    let (own_kernel, image, file_system) = context.linux.kernel_and_image()?;
    let kernel = match &context.linux.peer_kernel {
        Some(kernel) if side.id != OURS => std::path::absolute(kernel)?,
        _ => own_kernel,
    };
    hardware_kvm().map_err(Failure::NotOffered)?;
    let place = Place::new(Guest::Reset, context.patience)?;

    // An image of our own, whose init writes its mark and restarts.
    let own = init::write_image(place.folder())?;
    let mut running = run(
        &place,
        driver,
        &kernel,
        &own,
        &format!("erofs init={}", init::PATH),
    )?;
    let first = running.says(&[init::MARK], "init")?;
    let mut readings = vec![Reading::milliseconds(INSTRUCTION, first - running.started)];
    drop(running);

    let echo = format!("{file_system} init=/bin/echo -- {SAYS}");
    let mut running = run(&place, driver, &kernel, &image, &echo)?;
    let output = running.says(SAYS.as_bytes(), "init")?;
    readings.push(Reading::milliseconds(INIT, output - running.started));
    if driver.ends_with_reset() {
        running.console()?;
        let (_, end) = running.ends()?;
        readings.push(Reading::milliseconds(END, end - running.started));
    }
    Ok(readings)
}

/// Boots `kernel` with `image` as its root; `root` is the root's file system and the arguments behind it.
fn run(
    place: &Place,
    driver: &dyn Driver,
    kernel: &Path,
    image: &Path,
    root: &str,
) -> Result<Running, Failure> {
    let mut machine = place.machine();
    machine.kernel = kernel.to_owned();
    machine.command_line = format!("console=ttyS0 quiet reboot=k panic=-1 rootfstype={root}");
    machine.drives.push(Drive {
        path: image.to_owned(),
        root: true,
        read_only: true,
        engine: Engine::Sync,
    });
    place.boots(driver, &machine)
}
