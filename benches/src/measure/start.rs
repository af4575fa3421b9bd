//! How long it takes to start a machine, and to be rid of it.

use std::time::Duration;

use super::{Case, Context, Place, Reading, UP, UP_IN_WORDS, for_each, for_each_floor};
use crate::guest::Guest;
use crate::process::Failure;
use crate::side::{Driver, IrqChip, Side};

const SOCKET: &str = "start.socket";
const FIRST: &str = "start.first-instruction";
const LIFE: &str = "start.life";
/// Start over the API, by memory in MiB.
const API: [(u64, &[&str]); 2] = [(128, &["start.api-128m"]), (4096, &["start.api-4g"])];

/// All of it.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    let patience = context.patience;
    let mut all = for_each(context, &[SOCKET], move |driver| {
        to_socket(driver, patience)
    });
    all.extend(for_each(context, &[FIRST], move |driver| {
        to_first_instruction(driver, patience)
    }));
    all.extend(for_each_floor(context, &[FIRST], move |side, irqchip| {
        floor_to_first_instruction(side, irqchip, patience)
    }));
    for (memory, figures) in API {
        all.extend(for_each(context, figures, move |driver| {
            Ok(readings(figures, over_api(driver, memory, patience)?))
        }));
        all.extend(for_each_floor(context, figures, move |side, irqchip| {
            Ok(readings(
                figures,
                floor_alone(side, irqchip, memory, patience)?,
            ))
        }));
    }
    all.extend(for_each(context, &[LIFE], move |driver| {
        life(driver, patience)
    }));
    all.extend(for_each_floor(context, &[LIFE], move |side, irqchip| {
        floor_life(side, irqchip, patience)
    }));
    all
}

fn readings(figures: &'static [&'static str], time: Duration) -> Vec<Reading> {
    let one = |figure: &&'static str| Reading::milliseconds(figure, time);
    figures.iter().map(one).collect()
}

fn to_socket(driver: &dyn Driver, patience: Duration) -> Result<Vec<Reading>, Failure> {
    let place = Place::new(Guest::Idle, patience)?;
    let (running, socket) = place.serves(driver, &place.machine())?;
    let (_stream, at) = running.connect(&socket)?;
    Ok(vec![Reading::milliseconds(SOCKET, at - running.started)])
}

fn to_first_instruction(driver: &dyn Driver, patience: Duration) -> Result<Vec<Reading>, Failure> {
    let place = Place::new(Guest::Mark, patience)?;
    let mut running = place.boots(driver, &place.machine())?;
    let at = running.says(UP, UP_IN_WORDS)?;
    Ok(vec![Reading::milliseconds(FIRST, at - running.started)])
}

fn floor_to_first_instruction(
    side: &Side,
    irqchip: IrqChip,
    patience: Duration,
) -> Result<Vec<Reading>, Failure> {
    let place = Place::new(Guest::Mark, patience)?;
    let mut running = place.floor(side, irqchip, 128)?;
    let at = running.says(UP, UP_IN_WORDS)?;
    Ok(vec![Reading::milliseconds(FIRST, at - running.started)])
}

fn over_api(driver: &dyn Driver, memory: u64, patience: Duration) -> Result<Duration, Failure> {
    let place = Place::new(Guest::Mark, patience)?;
    let mut machine = place.machine();
    machine.memory_mib = memory;
    let (mut running, socket) = place.serves(driver, &machine)?;
    let (stream, _) = running.connect(&socket)?;
    stream.set_read_timeout(Some(patience))?;
    let prepared = driver.configure(stream, &machine)?;
    let (sent_at, sent) = prepared.send()?;
    match running.says(UP, UP_IN_WORDS) {
        Ok(at) => Ok(at - sent_at),
        Err(failure @ Failure::Interrupted) => Err(failure),
        Err(failure) => {
            // A refused start says why.
            sent.accepted()?;
            Err(failure)
        }
    }
}

/// What the bare program says it took from KVM_CREATE_VM on.
fn floor_alone(
    side: &Side,
    irqchip: IrqChip,
    memory: u64,
    patience: Duration,
) -> Result<Duration, Failure> {
    let place = Place::new(Guest::Mark, patience)?;
    let mut running = place.floor(side, irqchip, memory)?;
    running.succeeds()?;
    let said = String::from_utf8_lossy(running.console()?.strip_prefix(UP).unwrap_or_default());
    let nanoseconds: Result<u64, _> = said.trim().parse();
    nanoseconds
        .map(Duration::from_nanos)
        .map_err(|_| Failure::because(format!("the bare program says {said:?}")))
}

fn life(driver: &dyn Driver, patience: Duration) -> Result<Vec<Reading>, Failure> {
    if !driver.ends_with_reset() {
        let reason = "a reset starts the machine again".to_owned();
        return Err(Failure::NotOffered(reason));
    }
    let place = Place::new(Guest::Reset, patience)?;
    let mut running = place.boots(driver, &place.machine())?;
    let at = running.succeeds()?;
    Ok(vec![Reading::milliseconds(LIFE, at - running.started)])
}

fn floor_life(side: &Side, irqchip: IrqChip, patience: Duration) -> Result<Vec<Reading>, Failure> {
    let place = Place::new(Guest::Reset, patience)?;
    let mut running = place.floor(side, irqchip, 128)?;
    let at = running.succeeds()?;
    Ok(vec![Reading::milliseconds(LIFE, at - running.started)])
}
