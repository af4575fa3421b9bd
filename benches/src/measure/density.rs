//! Many machines on one host.

use std::time::{Duration, Instant};

use super::{Case, Context, Place, Reading, UP, UP_IN_WORDS, for_each};
use crate::guest::Guest;
use crate::host::available_memory_mib;
use crate::interrupt;
use crate::process::{Failure, Running};
use crate::side::Driver;

const RATE: &str = "density.rate";
const IDLE: &str = "density.idle-cpu";
const MEMORY: &str = "density.memory";

/// How long the idle machines are watched.
const WATCHED: Duration = Duration::from_secs(3);
/// No more machines are started when less than this is left: the host's other work goes on.
const RESERVE_MIB: u64 = 2048;

/// Starts them all, watches them idle, ends them all.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    for_each(context, &[RATE, IDLE, MEMORY], move |driver| {
        run(context, driver)
    })
}

fn run(context: &Context, driver: &dyn Driver) -> Result<Vec<Reading>, Failure> {
    let place = Place::new(Guest::Idle, context.patience)?;
    let machine = place.machine();
    let before = available_memory_mib();
    let mut running: Vec<Running> = Vec::new();
    let started = Instant::now();
    for number in 0..context.machines {
        if number % 16 == 0 && available_memory_mib() < RESERVE_MIB {
            let reason =
                format!("after {number} machines the host has less than {RESERVE_MIB} MiB left");
            return Err(Failure::because(reason));
        }
        let mut one = place.boots(driver, &machine)?;
        one.says(UP, UP_IN_WORDS)?;
        running.push(one);
    }
    let took = started.elapsed();
    let count = f64::from(context.machines);
    let memory = before.saturating_sub(available_memory_mib()) as f64 * 1024.0 / count;
    let cpu_before = processor_time(&running)?;
    let watched_from = Instant::now();
    interrupt::sleep(WATCHED)?;
    let cpu = processor_time(&running)?.saturating_sub(cpu_before);
    let watched = watched_from.elapsed();
    Ok(vec![
        Reading {
            figure: RATE,
            value: count / took.as_secs_f64(),
        },
        Reading {
            figure: IDLE,
            value: cpu.as_secs_f64() / watched.as_secs_f64() * 100.0,
        },
        Reading {
            figure: MEMORY,
            value: memory,
        },
    ])
}

/// What all threads of these processes have used, to the nanosecond.
fn processor_time(running: &[Running]) -> Result<Duration, Failure> {
    let mut sum = 0;
    for process in running {
        for task in std::fs::read_dir(format!("/proc/{}/task", process.pid()))? {
            let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
            let first = text.split_whitespace().next();
            sum += first.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Ok(Duration::from_nanos(sum))
}
