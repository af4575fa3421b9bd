//! Machines of a guest that counts, in a register and in memory, and sends both numbers on the serial port. Whatever
//! becomes of such a machine, what it has sent shows whether it is still the one it was.

use std::path::Path;

use serde_json::{Value, json};

use crate::guest::{Entry, Program};
use crate::origin::{Origin, running_in};
use crate::{Api, Vmm};

/// Configures a machine of the counting guest.
pub fn configure(vmm: &Vmm, api: &mut Api, vcpus: u8, mib: u64) {
    let kernel = Program::count().write(vmm.directory(), Entry::Pvh);
    api.configure(&json!({
        "boot-source": { "kernel_image_path": kernel },
        "machine-config": { "vcpu_count": vcpus, "mem_size_mib": mib },
    }));
}

/// A machine of the counting guest that runs, with more of a configuration that `more` makes, in the way that the suite asks
/// for. Its log is apart from its console.
#[track_caller]
pub fn running(vcpus: u8, mib: u64, more: impl FnOnce(&Path, &mut Value)) -> (Vmm, Api) {
    let builder = Vmm::builder();
    let log = builder.directory().join("log");
    let builder = builder.arguments(["--log-path".into(), log.into_os_string()]);
    running_in(builder, &Program::count(), Entry::Pvh, |folder, config| {
        config["machine-config"] = json!({ "vcpu_count": vcpus, "mem_size_mib": mib });
        more(folder, config);
    })
}

/// Lets the guest run until it has made some exits.
pub fn let_run(api: &mut Api) {
    let before = api.counter("lepton_vcpu_exit_io_out");
    api.wait_for_more("lepton_vcpu_exit_io_out", before + 20);
}

/// Checks that the words are 1, 1, 2, 2 and so on, and returns how many numbers there are. A machine that is itself a copy
/// goes on from somewhere.
#[track_caller]
pub fn check_counts(stream: &[u8]) -> u32 {
    if Origin::current() != Origin::Booted {
        check_tail(stream);
        return stream.len() as u32 / 8;
    }
    let words = stream.chunks_exact(4);
    let words = words.map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")));
    let mut last = 0;
    for (index, word) in words.enumerate() {
        assert_eq!(word, index as u32 / 2 + 1, "word {index}");
        last = word;
    }
    last
}

/// Checks what a copy has said: that it counts on from somewhere, in its register and in memory alike. Returns where.
#[track_caller]
pub fn check_tail(stream: &[u8]) -> u32 {
    let words: Vec<u32> = stream
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")))
        .collect();
    assert!(words.len() > 4, "{words:?}");
    // The machine may have stood still between the two words of a round.
    let offset = usize::from(words[0] != words[1]);
    for (index, word) in words.iter().enumerate() {
        let round = (index + offset) / 2;
        assert_eq!(*word, words[0] + round as u32, "word {index}");
    }
    words[0]
}
