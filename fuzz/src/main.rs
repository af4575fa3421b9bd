//! libFuzzer with all targets in one program, because linking takes longer than building them. The variable
//! LEPTON_FUZZ_TARGET names the one to run; `cargo xtask fuzz` sets it.
#![no_main] // libFuzzer has it

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock};

use lepton_fuzz::{Target, find};
use libfuzzer_sys::fuzz_target;

static CHOSEN: LazyLock<Target> = LazyLock::new(|| {
    // As in every program of Rust's, whose main function this is not: a peer that is gone is an error, not the end.
    signal_hook::flag::register(signal_hook::consts::SIGPIPE, Arc::<AtomicBool>::default())
        .expect("a signal can be handled");
    let name = std::env::var("LEPTON_FUZZ_TARGET").unwrap_or_default();
    find(&name).unwrap_or_else(|| {
        eprintln!("LEPTON_FUZZ_TARGET={name}: there is no such target; type: cargo xtask fuzz");
        std::process::exit(2);
    })
});

fuzz_target!(|data: &[u8]| (CHOSEN.run)(data));
