//! The targets on their seeds, without libFuzzer.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::TARGETS;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds")
}

#[test]
fn every_seed_is_taken() {
    for target in TARGETS {
        let seeds = std::fs::read_dir(folder().join(target.name))
            .unwrap_or_else(|error| panic!("seeds of {}: {error}", target.name));
        let mut count = 0;
        for seed in seeds {
            let path = seed.unwrap().path();
            eprintln!("{}", path.display());
            let bytes = std::fs::read(&path).unwrap();
            (target.run)(&bytes);
            // Cut off anywhere it must be taken, too.
            (target.run)(&bytes[..bytes.len() / 2]);
            count += 1;
        }
        assert!(count > 0, "{} has no seeds", target.name);
    }
}

#[test]
fn the_list_is_that_of_the_targets() {
    let listed: Vec<_> = include_str!("../targets.txt")
        .lines()
        .filter_map(|line| Some(line.split_once(": ")?.0))
        .collect();
    assert_eq!(listed, TARGETS.map(|target| target.name));
    let folders = std::fs::read_dir(folder()).unwrap();
    let folders: BTreeSet<_> = folders
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(folders, listed.into_iter().map(str::to_owned).collect());
}

#[test]
fn seeds_are_small() {
    for target in TARGETS {
        let seeds = std::fs::read_dir(folder().join(target.name)).unwrap();
        let sizes = seeds.map(|seed| seed.unwrap().metadata().unwrap().len());
        let sum: u64 = sizes.sum();
        assert!(sum <= 128 << 10, "{} bytes of {}", sum, target.name);
    }
}
