//! A Linux guest's way to its init.

use std::path::Path;

use lepton_tests::programs::hardware_kvm;

use super::{Case, Context, Place, Reading, for_each_side, linux};
use crate::guest::Guest;
use crate::init;
use crate::process::{Failure, Running};
use crate::side::{Driver, Side};

const INSTRUCTION: &str = "boot.first-instruction";
const INIT: &str = "boot.init";
const END: &str = "boot.end";

/// What /bin/echo says as init.
const SAYS: &str = "init-runs";

/// Start to init, and to the end.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    for_each_side(context, &[INSTRUCTION, INIT, END], move |side, driver| {
        boot(side, driver, context)
    })
}

fn boot(side: &Side, driver: &dyn Driver, context: &Context) -> Result<Vec<Reading>, Failure> {
    let (kernel, image, file_system) = context.linux.kernel_and_image(side)?;
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
    linux::boots_from(&mut machine, kernel, image, root);
    place.boots(driver, &machine)
}
