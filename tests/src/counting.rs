//! Machines of a guest that counts, in a register and in memory, and sends both numbers on the serial port. Whatever
//! becomes of such a machine, what it has sent shows whether it is still the one it was.

use serde_json::json;

use crate::guest::{Entry, Program};
use crate::{Api, Vmm};

/// Configures a machine of the counting guest.
pub fn configure(vmm: &Vmm, api: &mut Api, vcpus: u8, mib: u64) {
    let kernel = Program::count().write(vmm.directory(), Entry::Pvh);
    api.configure(&json!({
        "boot-source": { "kernel_image_path": kernel },
        "machine-config": { "vcpu_count": vcpus, "mem_size_mib": mib },
    }));
}

/// Lets the guest run until it has made some exits.
pub fn let_run(api: &mut Api) {
    let before = api.counter("lepton_vcpu_exit_io_out");
    api.wait_for_more("lepton_vcpu_exit_io_out", before + 20);
}

/// Checks that the words are 1, 1, 2, 2 and so on, and returns how far they come.
#[track_caller]
pub fn check_counts(stream: &[u8]) -> u32 {
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
