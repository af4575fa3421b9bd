use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;

use lepton_api::types::HugePages;
use lepton_devices::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{MemorySize, allocate, allocate_shared};

const MIB: u64 = 1 << 20;

fn size(mib: u64) -> MemorySize {
    MemorySize::new(mib, HugePages::None).unwrap()
}

fn shared(mib: u64) -> Ram {
    let (memory, file) = allocate_shared(size(mib), HugePages::None).unwrap();
    Ram::new(memory, Origin::Shared(file))
}

/// Another machine on this base.
fn copy(base: &Base) -> Arc<Memory> {
    let memory = allocate(size(base.bytes() / MIB), HugePages::None).unwrap();
    base.map(&memory, None).unwrap();
    memory
}

fn put(memory: &Memory, at: u64, value: u64) {
    memory.write_obj(value, GuestAddress(at)).unwrap();
}

fn get(memory: &Memory, at: u64) -> u64 {
    memory.read_obj(GuestAddress(at)).unwrap()
}

fn anonymous(mib: u64) -> Ram {
    Ram::new(
        allocate(size(mib), HugePages::None).unwrap(),
        Origin::Zeroes,
    )
}

#[test]
fn what_is_written_later_stays_where_it_is_written() {
    for mut ram in [shared(64), anonymous(64)] {
        put(&ram.memory, 0x1000, 1);
        put(&ram.memory, 0x5000, 2);
        let frozen = ram.freeze().unwrap();
        let (one, two) = (copy(&frozen.base), copy(&frozen.base));
        put(&ram.memory, 0x1000, 10);
        put(&one, 0x1008, 11);
        put(&one, 0x9000, 12);
        assert_eq!(
            (get(&ram.memory, 0x1000), get(&ram.memory, 0x1008)),
            (10, 0)
        );
        assert_eq!((get(&one, 0x1000), get(&one, 0x1008)), (1, 11));
        assert_eq!((get(&two, 0x1000), get(&two, 0x1008)), (1, 0));
        assert_eq!((get(&two, 0x5000), get(&two, 0x9000)), (2, 0));
        drop(frozen.leftovers);
        assert_eq!(
            (get(&ram.memory, 0x1000), get(&ram.memory, 0x5000)),
            (10, 2)
        );
    }
}

#[test]
fn memory_behind_the_hole_stands_still_too() {
    let mut ram = shared(4096);
    let high = 0x1_0000_0000 + 0x1000;
    put(&ram.memory, high, 7);
    let base = ram.freeze().unwrap().base;
    put(&ram.memory, high, 8);
    let one = copy(&base);
    assert_eq!((get(&ram.memory, high), get(&one, high)), (8, 7));
    let base = ram.freeze().unwrap().base;
    assert_eq!((get(&copy(&base), high), get(&one, high)), (8, 7));
}

#[test]
fn however_often_it_is_done_nothing_is_lost() {
    // The next one is what the last one became, or a copy of it.
    for follow_copies in [false, true] {
        let mut ram = shared(16);
        let mut model = vec![0u64; 4096];
        let mut bases = Vec::new();
        for round in 1..100u64 {
            for step in 0..20 {
                let page = (round * 977 + step * 131) % 4096;
                put(&ram.memory, page * PAGE, round);
                model[page as usize] = round;
            }
            let frozen = ram.freeze().unwrap();
            let base = &frozen.base;
            assert!(base.files().len() <= base::MAX_FILES);
            assert!(base.extents().len() <= MAX_EXTENTS);
            if follow_copies {
                ram = Ram::new(copy(base), Origin::Base(base.clone()));
            }
            bases.push((frozen.base.clone(), model.clone()));
        }
        for (base, model) in bases {
            let memory = copy(&base);
            for (page, value) in model.iter().enumerate() {
                assert_eq!(get(&memory, page as u64 * PAGE), *value, "page {page}");
            }
        }
    }
}

#[test]
fn scattered_pages_do_not_make_more_extents_than_there_may_be() {
    for mut ram in [shared(64), anonymous(64)] {
        drop(ram.freeze().unwrap());
        for page in (0..64 * MIB / PAGE).step_by(2) {
            put(&ram.memory, page * PAGE, page);
        }
        let base = ram.freeze().unwrap().base;
        assert!(base.extents().len() <= MAX_EXTENTS);
        let memory = copy(&base);
        for page in (0..64 * MIB / PAGE).step_by(2) {
            assert_eq!(get(&memory, page * PAGE), page);
            assert_eq!(get(&memory, (page + 1) * PAGE), 0);
        }
    }
}

#[test]
fn what_was_not_written_is_not_copied() {
    let mut ram = shared(64);
    put(&ram.memory, 0, 1);
    let first = ram.freeze().unwrap().base;
    assert_eq!(first.files().len(), 1);
    // Reading is not writing.
    get(&ram.memory, 0x10_0000);
    let second = ram.freeze().unwrap().base;
    assert_eq!(second.files().len(), 1);
    put(&ram.memory, 0x3000, 1);
    let third = ram.freeze().unwrap().base;
    assert_eq!(third.files().len(), 2);
    assert_eq!(third.extents().len(), 3);
    assert_eq!(ram.freeze().unwrap().base.files().len(), 2);
}

/// Pages of a machine's memory of 64 MiB, all written: each has its number.
fn numbered() -> (Ram, u64) {
    let ram = shared(64);
    let pages = ram.memory_bytes() / PAGE;
    (0..pages).for_each(|page| put(&ram.memory, page * PAGE, page));
    (ram, pages)
}

#[test]
fn a_guest_that_runs_loses_nothing_while_its_pages_are_let_go() {
    let (mut ram, pages) = numbered();
    let memory = ram.memory.clone();
    let end = Arc::new(AtomicBool::new(false));
    let until = end.clone();
    let (begun, runs) = channel();
    // Counts in a word of every page, from one page to another that is far from it, and looks at what it counted before.
    let guest = std::thread::spawn(move || {
        let mut rounds = vec![0; pages as usize];
        for step in 0u64.. {
            let page = step.wrapping_mul(4099) % pages;
            let word = page * PAGE + 8;
            assert_eq!(get(&memory, word), rounds[page as usize], "page {page}");
            assert_eq!(get(&memory, page * PAGE), page);
            rounds[page as usize] += 1;
            put(&memory, word, rounds[page as usize]);
            if step == 1000 {
                begun.send(()).unwrap();
            }
            if until.load(Ordering::SeqCst) {
                break;
            }
        }
        rounds
    });
    runs.recv().unwrap();
    let parted = ram.part();
    assert_eq!(parted.len(), 1);
    assert!(matches!(ram.origin, Origin::Base(_)));
    end.store(true, Ordering::SeqCst);
    let rounds = guest.join().unwrap();
    let frozen = ram.freeze().unwrap();
    drop(parted);
    let one = copy(&frozen.base);
    for memory in [&ram.memory, &one] {
        for (page, round) in (0..).zip(&rounds) {
            assert_eq!(get(memory, page * PAGE), page);
            assert_eq!(get(memory, page * PAGE + 8), *round, "page {page}");
        }
    }
}

#[test]
fn what_could_not_be_let_go_ahead_is_when_the_machine_stands_still() {
    let (mut ram, pages) = numbered();
    let Origin::Shared(file) = &ram.origin else {
        panic!("not shared");
    };
    // As if it had ended half way.
    let half = ram.memory_bytes() / 2;
    let places = Places::new(&ram.memory);
    for part in places.of(0, half) {
        // SAFETY: guest memory, to which there are no references.
        unsafe { map_over(part.host, part.bytes, file, part.at, Sharing::Private) }.unwrap();
    }
    ram.is_parting = true;
    put(&ram.memory, 5 * PAGE, 500);
    put(&ram.memory, half + 5 * PAGE, 700);
    let base = ram.freeze().unwrap().base;
    put(&ram.memory, 5 * PAGE, 1);
    let one = copy(&base);
    assert_eq!(get(&one, 5 * PAGE), 500);
    assert_eq!(get(&one, half + 5 * PAGE), 700);
    let last = pages - 1;
    assert_eq!(get(&one, last * PAGE), last);
}

#[test]
fn a_machine_with_little_memory_waits_until_it_stands_still() {
    let mut ram = shared(64);
    put(&ram.memory, 0x1000, 1);
    assert!(ram.part().is_empty());
    assert!(matches!(ram.origin, Origin::Shared(_)));
}
