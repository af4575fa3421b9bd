use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::FileExt;

use vm_memory::Bytes;
use vmm_sys_util::tempfile::TempFile;

use super::*;

const FIRST: FileNumber = FileNumber::FIRST;

fn memory() -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 22)]).unwrap())
}

fn image(bytes: &[u8]) -> TempFile {
    let file = TempFile::new().unwrap();
    file.as_file().write_all(bytes).unwrap();
    file
}

/// Finishes everything.
fn finish(ring: &mut FileRing) -> HashMap<u64, io::Result<u64>> {
    let mut done = HashMap::new();
    while ring.in_flight() > 0 {
        ring.wait().unwrap();
        while let Some(completion) = ring.reap() {
            assert!(done.insert(completion.token, completion.result).is_none());
        }
    }
    done
}

#[test]
fn reads_and_writes_in_one_batch() {
    let content: Vec<u8> = (0..65536u32).map(|i| (i % 251) as u8).collect();
    let file = image(&content);
    let memory = memory();
    let mut ring = FileRing::new(file.as_file(), 64).unwrap();
    for i in 0..32u64 {
        let at = GuestAddress(i * 2048);
        let parts = [(at, 1000), (GuestAddress(at.0 + 1000), 1048)];
        if i % 2 == 0 {
            ring.read(i, (FIRST, i * 2048), &memory, parts).unwrap();
        } else {
            memory.write_slice(&[i as u8; 2048], at).unwrap();
            ring.write(i, i * 2048, &memory, parts, i % 3 == 0).unwrap();
        }
    }
    ring.sync(99).unwrap();
    ring.submit().unwrap();
    let done = finish(&mut ring);
    assert_eq!(done.len(), 33);
    for i in 0..32u64 {
        assert_eq!(*done[&i].as_ref().unwrap(), 2048);
        let range = i as usize * 2048..(i as usize + 1) * 2048;
        let mut in_memory = [0; 2048];
        memory
            .read_slice(&mut in_memory, GuestAddress(i * 2048))
            .unwrap();
        let mut in_file = [0; 2048];
        file.as_file()
            .read_exact_at(&mut in_file, i * 2048)
            .unwrap();
        assert_eq!(in_file, in_memory);
        if i % 2 == 0 {
            assert_eq!(in_memory, content[range]);
        } else {
            assert_eq!(in_memory, [i as u8; 2048]);
        }
    }
}

#[test]
fn more_buffers_than_one_call_takes() {
    let content: Vec<u8> = (0..9000u32).map(|i| (i % 251) as u8).collect();
    let file = image(&content);
    let memory = memory();
    let mut ring = FileRing::new(file.as_file(), 1).unwrap();
    let parts: Vec<_> = (0..3000).map(|i| (GuestAddress(i * 5), 3)).collect();
    ring.read(1, (FIRST, 0), &memory, parts.iter().copied())
        .unwrap();
    assert_eq!(*finish(&mut ring)[&1].as_ref().unwrap(), 9000);
    for (i, (addr, _)) in parts.iter().enumerate() {
        let mut bytes = [0; 3];
        memory.read_slice(&mut bytes, *addr).unwrap();
        assert_eq!(bytes, content[3 * i..3 * i + 3]);
    }
    // The same into a file, and reading past its end.
    let copy = TempFile::new().unwrap();
    ring.set_files(&[copy.as_file()]).unwrap();
    ring.write(2, 0, &memory, parts.iter().copied(), false)
        .unwrap();
    assert_eq!(*finish(&mut ring)[&2].as_ref().unwrap(), 9000);
    assert_eq!(std::fs::read(copy.as_path()).unwrap(), content);
    ring.read(3, (FIRST, 100), &memory, parts).unwrap();
    assert_eq!(*finish(&mut ring)[&3].as_ref().unwrap(), 8900);
}

#[test]
fn each_operation_is_for_the_file_it_names() {
    let memory = memory();
    let files = [image(&[1; 512]), image(&[2; 512]), image(&[3; 512])];
    let [first, second, third] = files.each_ref().map(TempFile::as_file);
    let mut ring = FileRing::with_places(&[first, second], 3, 4).unwrap();
    let read = |ring: &mut FileRing, number: u8| {
        let part = [(GuestAddress(0), 512)];
        ring.read(1, (FileNumber(number), 0), &memory, part)
            .unwrap();
        let result = finish(ring).remove(&1).unwrap();
        result.map(|_| memory.read_obj::<u8>(GuestAddress(0)).unwrap())
    };
    assert_eq!(read(&mut ring, 0).unwrap(), 1);
    assert_eq!(read(&mut ring, 1).unwrap(), 2);
    // An empty place, and none at all.
    assert!(read(&mut ring, 2).is_err());
    assert!(read(&mut ring, 3).is_err());
    ring.set_files(&[second, third, first]).unwrap();
    assert_eq!([0, 1, 2].map(|n| read(&mut ring, n).unwrap()), [2, 3, 1]);
    ring.write(2, 0, &memory, [(GuestAddress(0), 1)], false)
        .unwrap();
    finish(&mut ring);
    assert_eq!(std::fs::read(files[1].as_path()).unwrap()[..2], [1, 2]);
}

#[test]
fn a_ring_whose_files_were_replaced_in_part_does_nothing_more() {
    let memory = memory();
    let files = [image(&[1; 512]), image(&[2; 512])];
    let [first, second] = files.each_ref().map(TempFile::as_file);
    let mut ring = FileRing::with_places(&[first, second], 2, 4).unwrap();
    let part = [(GuestAddress(0), 512)];
    // The kernel takes the first of them: no ring may have a ring among its files.
    let other = IoUring::new(2).unwrap();
    // SAFETY: the ring lives until the end of this function.
    let other = unsafe { std::os::fd::BorrowedFd::borrow_raw(other.as_raw_fd()) };
    let other = File::from(other.try_clone_to_owned().unwrap());
    let error = ring.set_files(&[second, &other]).unwrap_err();
    assert!(error.to_string().contains("1 of 2"), "{error}");
    let refused = ring.read(1, (FIRST, 0), &memory, part);
    assert!(matches!(refused, Err(PushError::Io(_))));
    assert!(matches!(ring.sync(1), Err(PushError::Io(_))));
    // More files than there are places: it takes none of them, and it need not be known that it did not.
    assert!(ring.set_files(&[first, second, first]).is_err());
    assert!(ring.sync(1).is_err());
    ring.set_files(&[first, second]).unwrap();
    ring.read(1, (FIRST, 0), &memory, part).unwrap();
    assert_eq!(*finish(&mut ring)[&1].as_ref().unwrap(), 512);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 1);
}

#[test]
fn the_depth_is_a_bound_and_slots_come_back() {
    let file = image(&[5; 4096]);
    let memory = memory();
    let mut ring = FileRing::new(file.as_file(), 4).unwrap();
    let part = [(GuestAddress(0), 512)];
    for round in 0..100 {
        for i in 0..4 {
            ring.read(round * 4 + i, (FIRST, 0), &memory, part).unwrap();
        }
        assert!(ring.is_full());
        let refused = ring.read(9999, (FIRST, 0), &memory, part);
        assert!(matches!(refused, Err(PushError::Full)));
        assert!(ring.set_files(&[file.as_file()]).is_err(), "in flight");
        ring.submit().unwrap();
        assert_eq!(finish(&mut ring).len(), 4);
        assert_eq!(ring.in_flight(), 0);
    }
}

#[test]
fn what_cannot_be_queued_leaves_no_trace() {
    let file = image(&[5; 4096]);
    let memory = memory();
    let mut ring = FileRing::new(file.as_file(), 2).unwrap();
    let outside = [(GuestAddress(0), 10), (GuestAddress((1 << 22) - 5), 10)];
    let refused = ring.read(1, (FIRST, 0), &memory, outside);
    assert!(matches!(refused, Err(PushError::Memory(_))));
    let refused = ring.read(1, (FIRST, u64::MAX), &memory, []);
    assert!(matches!(refused, Err(PushError::Io(_))));
    assert!(
        ring.allocate(1, Allocation::Deallocate, 0, u64::MAX)
            .is_err()
    );
    assert_eq!((ring.in_flight(), ring.is_full()), (0, false));
    assert_eq!(Arc::strong_count(&memory), 1);
    ring.read(2, (FIRST, 0), &memory, [(GuestAddress(0), 512)])
        .unwrap();
    assert_eq!(Arc::strong_count(&memory), 2);
    assert_eq!(*finish(&mut ring)[&2].as_ref().unwrap(), 512);
    assert_eq!(Arc::strong_count(&memory), 1, "memory is let go");
}

#[test]
fn errors_come_back_as_such() {
    let memory = memory();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut ring = FileRing::new(&full, 2).unwrap();
    ring.write(7, 0, &memory, [(GuestAddress(0), 512)], false)
        .unwrap();
    let done = finish(&mut ring);
    let error = done[&7].as_ref().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));

    let file = image(&[5; 4096]);
    let read_only = File::open(file.as_path()).unwrap();
    ring.set_files(&[&read_only]).unwrap();
    ring.write(8, 0, &memory, [(GuestAddress(0), 512)], false)
        .unwrap();
    let done = finish(&mut ring);
    let error = done[&8].as_ref().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
}

#[test]
fn frees_and_zeroes() {
    let file = image(&[7; 1 << 20]);
    let mut ring = FileRing::new(file.as_file(), 2).unwrap();
    ring.allocate(1, Allocation::Deallocate, 4096, 8192)
        .unwrap();
    assert!(finish(&mut ring)[&1].is_ok());
    let bytes = std::fs::read(file.as_path()).unwrap();
    assert!(bytes[4096..12288].iter().all(|&b| b == 0));
    assert_eq!((bytes[4095], bytes[12288]), (7, 7));
}

#[test]
fn a_slot_serves_any_operation_after_any_other() {
    let file = image(&[7; 65536]);
    let memory = memory();
    let mut ring = FileRing::new(file.as_file(), 1).unwrap();
    let parts = |n: u64| (0..n).map(|i| (GuestAddress(i * 512), 512));
    for first in 0..4 {
        for second in 0..4 {
            for kind in [first, second] {
                match kind {
                    0 => ring.read(0, (FIRST, 0), &memory, parts(3)).unwrap(),
                    1 => ring.write(1, 0, &memory, parts(1), false).unwrap(),
                    2 => ring.sync(2).unwrap(),
                    _ => ring.allocate(3, Allocation::Deallocate, 0, 512).unwrap(),
                }
                let wanted = [1536, 512, 0, 0][kind as usize];
                assert_eq!(*finish(&mut ring)[&kind].as_ref().unwrap(), wanted);
            }
        }
    }
}

/// A pipe's read end never completes by itself: the ring must wait for it, and then let memory go.
#[test]
fn dropping_waits_for_what_is_in_flight() {
    let (reader, writer) = std::io::pipe().unwrap();
    let reader = File::from(std::os::fd::OwnedFd::from(reader));
    let memory = memory();
    let mut ring = FileRing::new(&reader, 2).unwrap();
    ring.read(1, (FIRST, 0), &memory, [(GuestAddress(0), 3)])
        .unwrap();
    ring.submit().unwrap();
    assert!(ring.reap().is_none(), "nothing was written yet");
    assert_eq!(ring.in_flight(), 1);
    let dropped = std::thread::spawn(move || drop(ring));
    (&writer).write_all(b"abc").unwrap();
    dropped.join().unwrap();
    assert_eq!(Arc::strong_count(&memory), 1);
    let mut bytes = [0; 3];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert_eq!(&bytes, b"abc");
}

#[test]
fn events_come_when_they_are_asked_for() {
    let (reader, writer) = std::io::pipe().unwrap();
    let reader = File::from(std::os::fd::OwnedFd::from(reader));
    let memory = memory();
    let mut ring = FileRing::new(&reader, 2).unwrap();
    assert!(!ring.watch(), "nothing is in flight");
    for asked in [true, false, true] {
        ring.read(1, (FIRST, 0), &memory, [(GuestAddress(0), 3)])
            .unwrap();
        ring.submit().unwrap();
        assert!(ring.reap().is_none());
        if asked {
            assert!(!ring.watch(), "nothing has ended");
        }
        (&writer).write_all(b"abc").unwrap();
        ring.wait().unwrap();
        assert_eq!(ring.event.read().is_ok(), asked);
        assert!(ring.watch(), "asked too late, and told so");
        assert!(ring.reap().is_some());
    }
}
