//! A drive under load. The image is in the host's page cache: what is measured is the way to it.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use super::probe;
use super::{Case, Context, Reading, for_each_load};
use crate::machine::{Drive, Engine, Machine};
use crate::process::Failure;
use crate::side::Side;

/// A load.
struct Load {
    arguments: &'static str,
    engine: Engine,
    /// Operations or MiB a second, then microseconds of processor time per operation.
    figures: &'static [&'static str; 2],
    in_mib: bool,
}

const RANDOM_1: &str = "probe.mode=blk_read probe.pattern=random probe.size=4096 probe.qd=1";
const RANDOM_32: &str = "probe.mode=blk_read probe.pattern=random probe.size=4096 probe.qd=32";
const WRITE_32: &str = "probe.mode=blk_write probe.pattern=random probe.size=4096 probe.qd=32";
const LARGE: &str = "probe.mode=blk_read probe.pattern=sequential probe.size=1048576 probe.qd=4";
const FLUSH: &str = "probe.mode=blk_flush probe.size=4096 probe.qd=1";

const fn load(
    arguments: &'static str,
    engine: Engine,
    figures: &'static [&'static str; 2],
    in_mib: bool,
) -> Load {
    Load {
        arguments,
        engine,
        figures,
        in_mib,
    }
}

#[rustfmt::skip]
const LOADS: [Load; 9] = [
    load(RANDOM_1, Engine::Sync, &["blk.read-1-sync", "blk.read-1-sync-cpu"], false),
    load(RANDOM_1, Engine::Async, &["blk.read-1-async", "blk.read-1-async-cpu"], false),
    load(RANDOM_32, Engine::Sync, &["blk.read-32-sync", "blk.read-32-sync-cpu"], false),
    load(RANDOM_32, Engine::Async, &["blk.read-32-async", "blk.read-32-async-cpu"], false),
    load(WRITE_32, Engine::Sync, &["blk.write-32-sync", "blk.write-32-sync-cpu"], false),
    load(WRITE_32, Engine::Async, &["blk.write-32-async", "blk.write-32-async-cpu"], false),
    load(LARGE, Engine::Sync, &["blk.large-sync", "blk.large-sync-cpu"], true),
    load(LARGE, Engine::Async, &["blk.large-async", "blk.large-async-cpu"], true),
    load(FLUSH, Engine::Sync, &["blk.flush-sync", "blk.flush-sync-cpu"], false),
];

/// Small enough to stay in the page cache, larger than any other cache.
const IMAGE_MIB: usize = 256;

/// An image with blocks, made by the first who needs it.
fn image(context: &Context) -> Result<PathBuf, Failure> {
    let path = context.scratch.path().join("blk.img");
    if !path.exists() {
        let unfinished = path.with_extension("new");
        let mut file = File::create(&unfinished)?;
        let mut block = vec![0; 1 << 20];
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..IMAGE_MIB {
            random.fill(&mut block);
            file.write_all(&block)?;
        }
        file.sync_all()?;
        std::fs::rename(&unfinished, &path)?;
    }
    Ok(path)
}

/// One case for each load and VMM.
pub fn cases(context: &Context) -> Vec<Case<'_>> {
    for_each_load(context, &LOADS, |load| load.figures, run)
}

/// 4 KiB random reads a second, one at a time, by the engine Sync.
pub fn reads(context: &Context, side: &Side) -> Result<f64, Failure> {
    probe(context, side, RANDOM_1, Engine::Sync)?.rate()
}

fn probe(
    context: &Context,
    side: &Side,
    arguments: &str,
    engine: Engine,
) -> Result<probe::Run, Failure> {
    let path = image(context)?;
    let arguments = format!("{arguments} probe.seconds=1 probe.seed=1");
    let drive = Drive {
        path,
        root: false,
        read_only: false,
        engine,
    };
    let with = |machine: &mut Machine| {
        machine.drives.push(drive);
        Ok(())
    };
    probe::run(context, side, &arguments, with, |_| Ok(()))
}

fn run(context: &Context, side: &Side, load: &Load) -> Result<Vec<Reading>, Failure> {
    let run = probe(context, side, load.arguments, load.engine)?;
    let [rate, processor] = *load.figures;
    let value = match load.in_mib {
        true => run.mib_per_second()?,
        false => run.rate()?,
    };
    Ok(vec![
        Reading {
            figure: rate,
            value,
        },
        Reading {
            figure: processor,
            value: run.processor_per_operation(),
        },
    ])
}
