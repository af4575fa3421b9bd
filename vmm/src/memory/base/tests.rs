use std::io::Write;

use proptest::prelude::*;

use super::*;

fn sealed(bytes: u64) -> File {
    let file = new_file(bytes).unwrap();
    seal(&file).unwrap();
    file
}

fn refusal(bytes: u64, extents: &[(u64, u64, u32)], files: Vec<OwnedFd>) -> String {
    let extents = extents.iter().map(|(at, bytes, file)| Extent {
        at: *at,
        bytes: *bytes,
        file: *file,
    });
    let received = Base::received(bytes, extents.collect(), files);
    received.unwrap_err().to_string()
}

#[test]
fn what_another_process_says_is_checked() {
    let good = || vec![OwnedFd::from(sealed(0x4000))];
    for (extents, why) in [
        (&[(0, 0, 0)][..], "not whole pages"),
        (&[(1, 0x1000, 0)], "not whole pages"),
        (&[(0, 0x1001, 0)], "not whole pages"),
        (&[(0, 0x1000, 1)], "no such file"),
        (&[(0, 0x2000, 0), (0x1000, 0x1000, 0)], "before the end"),
        (&[(0x1000, 0x1000, 0), (0, 0x1000, 0)], "before the end"),
        (&[(0x4000, 0x1000, 0)], "behind the end of its file"),
        (&[(0x7000, 0x2000, 0)], "behind the end of memory"),
        (&[(u64::MAX - 0xfff, 0x1000, 0)], "overflows"),
    ] {
        let text = refusal(0x8000, extents, good());
        assert!(text.contains(why), "{text}");
    }
    let many = vec![(0, 0x1000, 0); MAX_EXTENTS + 1];
    assert!(refusal(0x8000, &many, good()).contains("extents"));
    let many = (0..=MAX_FILES).map(|_| sealed(0).into()).collect();
    assert!(refusal(0x8000, &[], many).contains("files"));
    let open = vec![new_file(0x4000).unwrap().into()];
    assert!(refusal(0x8000, &[(0, 0x1000, 0)], open).contains("not sealed"));
    let other = vec![File::open("/dev/null").unwrap().into()];
    assert!(refusal(0x8000, &[(0, 0x1000, 0)], other).contains("file 0 of memory"));
}

#[test]
fn what_is_sealed_stays() {
    let file = sealed(0x2000);
    assert!((&file).write(b"x").is_err());
    assert!(file.set_len(0).is_err());
    assert!(file.set_len(0x10_0000).is_err());
    assert!(fcntl_add_seals(&file, SealFlags::WRITE).is_err());
}

proptest! {
    /// Against the simplest model there is: each page has a number.
    #[test]
    fn the_last_file_that_has_a_page_counts(
        deltas in proptest::collection::vec(proptest::collection::btree_set(0u64..40, 0..20), 0..60)
    ) {
        let mut base = Base::zero(40 * PAGE);
        let mut model = [0u8; 40];
        for (number, pages) in (1u8..).zip(&deltas) {
            let file = new_file(40 * PAGE).unwrap();
            let mut runs: Vec<(u64, u64)> = Vec::new();
            for page in pages {
                file.write_all_at(&[number; PAGE as usize], page * PAGE).unwrap();
                model[*page as usize] = number;
                match runs.last_mut() {
                    Some((at, bytes)) if *at + *bytes == page * PAGE => *bytes += PAGE,
                    _ => runs.push((page * PAGE, PAGE)),
                }
            }
            base = base.with(file, &runs);
        }
        let mut bytes = vec![0; 40 * PAGE as usize];
        base.read(0, &mut bytes).unwrap();
        let memory = Memory::from_ranges(&[(vm_memory::GuestAddress(0), bytes.len())]).unwrap();
        base.map(&memory, None).unwrap();
        for (page, number) in model.iter().enumerate() {
            let at = page * PAGE as usize;
            prop_assert!(bytes[at..at + PAGE as usize].iter().all(|byte| byte == number));
            let address = vm_memory::GuestAddress(at as u64 + 7);
            let mapped: u8 = vm_memory::Bytes::read_obj(&memory, address).unwrap();
            prop_assert_eq!(mapped, *number);
        }
        // No gaps between neighbours of one file, and no file that nobody needs.
        for pair in base.extents().windows(2) {
            prop_assert!(pair[0].end() < pair[1].at || pair[0].file != pair[1].file);
        }
        let used: std::collections::BTreeSet<u32> = base.extents().iter().map(|e| e.file).collect();
        prop_assert_eq!(used.len(), base.files().len());
    }
}
