//! A guest that attacks: every device by VIRTIO's own rules, in bursts that follow from a seed.
//!
//! After each burst, well-behaved drivers must find every device working, if need be after a reset. The last line on
//! the serial port is the verdict, `ADVERSARY {"verdict":"held",...}`, and then the machine is reset.
//!
//! | argument, with `adversary.` before it | |
//! |---|---|
//! | `seed` | where all attacks follow from |
//! | `seconds` (with `tsc_khz`), or `bursts` | when to stop |
//! | `first` | the first burst: each follows from the seed and its own number alone |
//! | `only` | attack in one way: `registers`, `rings`, `requests`, `storm`, `platform` |
//! | `copied` | wait until the machine is a copy of the one that booted, after the first burst |
//! | `port` | a vsock port at which the host sends back what it gets |
//!
//! A drive that is read-only must hold the probe's pattern of seed 7.

#![no_std]
#![no_main]

mod blk;
mod check;
mod net;
mod platform;
mod raw;
mod registers;
mod rings;
mod sandbox;
mod storm;
mod vsock;

use guest::random::Random;
use guest::time::{Deadline, ticks, ticks_per_second};
use guest::virtio::find;
use guest::{arguments, program, say};

use raw::Raw;
use sandbox::Sandbox;

program!(main);

/// Most devices that are attacked.
const MAX_DEVICES: usize = 8;
/// Ticks of one burst, about: some tens of milliseconds.
const BURST: u64 = 60_000_000;

/// A way to attack. It counts the cases the device has dealt with.
type Attack = fn(&mut Raw, &Sandbox, &mut Random) -> u64;

const WAYS: [(&str, Attack); 5] = [
    ("requests", requests),
    ("rings", rings::attack),
    ("registers", registers::attack),
    ("storm", storm::attack),
    ("platform", platform::attack),
];

/// Requests of the device's own kind, in well-formed rings.
fn requests(raw: &mut Raw, sandbox: &Sandbox, random: &mut Random) -> u64 {
    match raw.kind() {
        1 => net::attack(raw, sandbox, random),
        2 => blk::attack(raw, sandbox, random),
        19 => vsock::attack(raw, sandbox, random),
        _ => rings::attack(raw, sandbox, random),
    }
}

fn main() {
    let seed = arguments::number("seed", 1);
    let only = arguments::text("only");
    let mut sandbox = Sandbox::new();
    let mut devices: [Option<Raw>; MAX_DEVICES] = [const { None }; MAX_DEVICES];
    let mut count = 0;
    for device in find::devices().into_iter().flatten().take(MAX_DEVICES) {
        devices[count] = Some(Raw::new(device, &mut sandbox));
        count += 1;
    }
    if count == 0 {
        say!("ADVERSARY {{\"verdict\":\"nothing to attack\"}}");
        return;
    }
    let seconds = arguments::number("seconds", 0);
    let end = (seconds > 0).then(|| Deadline::after(seconds.saturating_mul(ticks_per_second())));
    let default = if end.is_some() { u64::MAX } else { 20 };
    let bursts = arguments::number("bursts", default);
    let first = arguments::number("first", 0);
    let mut cases = [0; WAYS.len()];
    let mut done = 0;
    let start = ticks();
    while done < bursts && !end.is_some_and(Deadline::is_over) {
        let burst = first + done;
        let mut random = Random::new(seed ^ burst.wrapping_mul(0xd1b5_4a32_d192_ed03));
        let way = match only {
            Some(name) => match WAYS.iter().position(|(way, _)| *way == name) {
                Some(way) => way,
                None => panic!("only: there is no way {name}"),
            },
            // Requests are the cheapest cases by far, and registers the dearest.
            None => [0, 0, 0, 1, 1, 2, 3, 4][random.below(8) as usize],
        };
        let Some(device) = &mut devices[random.below(count as u64) as usize] else {
            continue;
        };
        let over = Deadline::after(BURST);
        while !over.is_over() {
            cases[way] += WAYS[way].1(device, &sandbox, &mut random);
        }
        platform::restore();
        for device in devices.iter_mut().flatten() {
            device.forget();
            device.device().reset();
        }
        for device in devices.iter().flatten() {
            if let Err(what) = check::works(device.device(), burst) {
                say!(
                    "ADVERSARY {{\"verdict\":\"broken\",\"what\":\"{what}\",\"way\":\"{}\",\"kind\":{},\"seed\":{seed},\
                     \"burst\":{burst}}}",
                    WAYS[way].0,
                    device.kind()
                );
                return;
            }
        }
        done += 1;
    }
    let ticks = ticks() - start;
    for ((way, _), cases) in WAYS.iter().zip(cases) {
        say!("ADVERSARY {{\"way\":\"{way}\",\"cases\":{cases}}}");
    }
    let cases: u64 = cases.iter().sum();
    say!(
        "ADVERSARY {{\"verdict\":\"held\",\"seed\":{seed},\"bursts\":{done},\"cases\":{cases},\"ticks\":{ticks}}}"
    );
}
