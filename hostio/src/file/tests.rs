use std::ffi::CString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;

use super::*;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

/// `count` slices of `len` bytes each, one behind the other with a gap of one byte.
fn slices(memory: &GuestMemoryMmap, count: u64, len: usize) -> Vec<VolatileSlice<'_>> {
    (0..count)
        .map(|i| {
            memory
                .get_slice(GuestAddress(i * (len as u64 + 1)), len)
                .unwrap()
        })
        .collect()
}

fn image(bytes: &[u8]) -> TempFile {
    let file = TempFile::new().unwrap();
    file.as_file().write_all(bytes).unwrap();
    file
}

#[test]
fn more_buffers_than_one_call_takes() {
    let content: Vec<u8> = (0..3000u32).map(|i| (i * 7) as u8).collect();
    let file = image(&content);
    let memory = memory();
    // Lengths 0 to 3: empty buffers must not end the loop.
    let mut list = Vec::new();
    let mut wanted = 0;
    for (i, slice) in slices(&memory, 2000, 3).into_iter().enumerate() {
        let slice = slice.subslice(0, i % 4).unwrap();
        wanted += slice.len();
        list.push(slice);
    }
    let wanted = wanted.min(2995);
    assert_eq!(read_vectored_at(file.as_file(), &list, 5).unwrap(), wanted);
    let mut read = Vec::new();
    for slice in &list {
        let mut bytes = vec![0; slice.len()];
        slice.copy_to(&mut bytes[..]);
        read.extend(bytes);
    }
    assert_eq!(read[..wanted], content[5..5 + wanted]);

    let copy = TempFile::new().unwrap();
    assert_eq!(
        write_vectored_at(copy.as_file(), &list, 9).unwrap(),
        read.len()
    );
    assert_eq!(std::fs::read(copy.as_path()).unwrap()[9..], read);
}

#[test]
fn a_short_file_reads_short() {
    let file = image(b"abc");
    let memory = memory();
    let room = slices(&memory, 2, 2);
    assert_eq!(read_vectored_at(file.as_file(), &room, 0).unwrap(), 3);
    assert_eq!(read_vectored_at(file.as_file(), &room, 3).unwrap(), 0);
    let mut bytes = [0; 5];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert_eq!(&bytes, b"ab\0c\0");
}

#[test]
fn offsets_past_63_bits_are_refused() {
    let file = image(b"abc");
    let memory = memory();
    let room = slices(&memory, 1, 2);
    let error = read_vectored_at(file.as_file(), &room, u64::MAX).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(write_vectored_at(file.as_file(), &room, 1 << 63).is_err());
    assert!(deallocate(file.as_file(), 1 << 63, 1).is_err());
    assert!(zero_range(file.as_file(), 0, u64::MAX).is_err());
}

#[test]
fn a_full_device_is_an_error() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let memory = memory();
    let error = write_vectored_at(&full, &slices(&memory, 3, 512), 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
}

#[test]
fn freeing_gives_back_blocks_and_reads_as_zero() {
    let file = image(&[7; 1 << 20]);
    file.as_file().sync_all().unwrap();
    let before = file.as_file().metadata().unwrap().blocks();
    deallocate(file.as_file(), 4096, 1 << 19).unwrap();
    let after = file.as_file().metadata().unwrap();
    assert!(
        after.blocks() + 1000 <= before,
        "{} {before}",
        after.blocks()
    );
    assert_eq!(after.len(), 1 << 20);
    let bytes = std::fs::read(file.as_path()).unwrap();
    assert!(bytes[4096..4096 + (1 << 19)].iter().all(|&b| b == 0));
    assert_eq!((bytes[4095], bytes[4096 + (1 << 19)]), (7, 7));
}

#[test]
fn zeroes_both_ways() {
    for by_hand in [false, true] {
        let file = image(&[7; 600_000]);
        let result = if by_hand {
            write_zeroes(file.as_file(), 512, 598_976)
        } else {
            zero_range(file.as_file(), 512, 598_976)
        };
        if let Err(error) = result {
            assert!(!by_hand && error.raw_os_error() == Some(libc::EOPNOTSUPP));
            continue;
        }
        let bytes = std::fs::read(file.as_path()).unwrap();
        assert!(bytes[512..599_488].iter().all(|&b| b == 0));
        assert!(
            bytes[..512]
                .iter()
                .chain(&bytes[599_488..])
                .all(|&b| b == 7)
        );
    }
}

#[test]
fn a_disk_is_opened_as_asked() {
    let file = image(&[1; 512 * 3 + 511]);
    let disk = open_disk(file.as_path(), false).unwrap();
    assert_eq!((disk.sectors(), disk.block_size()), (3, 512));
    assert!(!disk.read_only());
    assert!(disk.can_deallocate());
    // SAFETY: the descriptor is open.
    let flags = unsafe { libc::fcntl(disk.file().as_raw_fd(), libc::F_GETFL) };
    assert_eq!(flags & (libc::O_NONBLOCK | libc::O_ACCMODE), libc::O_RDWR);
    // SAFETY: the descriptor is open.
    let flags = unsafe { libc::fcntl(disk.file().as_raw_fd(), libc::F_GETFD) };
    assert_eq!(flags, libc::FD_CLOEXEC);
    let meta = disk.file().metadata().unwrap();
    let text = format!("{}{}{}", meta.dev(), meta.rdev(), meta.ino());
    assert!(
        disk.serial()
            .starts_with(&text.as_bytes()[..text.len().min(20)])
    );
}

#[test]
fn read_only_is_the_hosts_word() {
    let file = image(&[1; 512]);
    let disk = open_disk(file.as_path(), true).unwrap();
    assert!(disk.read_only() && !disk.can_deallocate());
    let memory = memory();
    let error = write_vectored_at(disk.file(), &slices(&memory, 1, 512), 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    assert!(deallocate(disk.file(), 0, 512).is_err());
    assert!(zero_range(disk.file(), 0, 512).is_err());
    assert!(write_zeroes(disk.file(), 0, 512).is_err());
}

/// CVE-2026-24054: a directory or a mount was taken for a block device.
#[test]
fn cve_2026_24054_what_is_no_disk_is_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.as_path().join(name);
    let c_path = CString::new(path("fifo").as_os_str().as_bytes()).unwrap();
    // SAFETY: the path is a C string.
    assert_eq!(unsafe { libc::mkfifo(c_path.as_ptr(), 0o600) }, 0);
    let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    std::fs::create_dir(path("dir")).unwrap();
    std::os::unix::fs::symlink(path("dir"), path("link")).unwrap();
    let refused = [
        (path("fifo"), "a FIFO"),
        (path("socket"), "a socket"),
        (path("dir"), "a directory"),
        (path("link"), "a directory"),
        ("/dev/null".into(), "a character device"),
    ];
    for (path, expected) in refused {
        for read_only in [false, true] {
            let error = open_disk(&path, read_only).unwrap_err();
            assert!(matches!(&error, DiskOpenError::FileType { kind, .. } if *kind == expected));
            assert!(
                error.to_string().contains(path.to_str().unwrap()),
                "{error}"
            );
        }
    }
    let error = open_disk(&path("absent"), true).unwrap_err();
    assert!(matches!(error, DiskOpenError::Open { .. }), "{error}");
    for bytes in [0, 511] {
        std::fs::write(path("small"), vec![0; bytes as usize]).unwrap();
        let error = open_disk(&path("small"), true).unwrap_err();
        assert!(matches!(error, DiskOpenError::TooSmall { bytes: b, .. } if b == bytes));
    }
}

/// CVE-2026-27211: a guest wrote another format's header to its raw drive, and read the host's files through it.
#[test]
fn cve_2026_27211_an_image_is_raw_whatever_it_holds() {
    // qcow2, version 2: the backing file's name at 0x1f0, 11 bytes long; a size of 1 TiB.
    let mut bytes = vec![0; 4096];
    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x02");
    bytes[8..16].copy_from_slice(&0x1f0_u64.to_be_bytes());
    bytes[16..20].copy_from_slice(&11_u32.to_be_bytes());
    bytes[24..32].copy_from_slice(&(1_u64 << 40).to_be_bytes());
    bytes[0x1f0..0x1fb].copy_from_slice(b"/etc/passwd");
    let file = image(&bytes);
    let disk = open_disk(file.as_path(), false).unwrap();
    assert_eq!(disk.sectors(), 8);
    let memory = memory();
    let views = slices(&memory, 1, 4096);
    assert_eq!(read_vectored_at(disk.file(), &views, 0).unwrap(), 4096);
    let mut found = vec![0; 4096];
    views[0].copy_to(&mut found[..]);
    assert!(found == bytes, "an image reads otherwise than its bytes");
}

/// Needs a loop device, so root.
#[test]
fn a_block_device_is_a_disk() {
    let file = image(&vec![3; 1 << 20]);
    let losetup = std::process::Command::new("losetup")
        .args(["--find", "--show"])
        .arg(file.as_path())
        .output();
    let Ok(output) = losetup.filter_success() else {
        eprintln!("skipped: no loop device to be had");
        return;
    };
    let path = PathBuf::from(String::from_utf8(output).unwrap().trim());
    let disk = open_disk(&path, false);
    std::process::Command::new("losetup")
        .arg("-d")
        .arg(&path)
        .status()
        .unwrap();
    let disk = disk.unwrap();
    assert_eq!((disk.sectors(), disk.block_size()), (2048, 512));
    let memory = memory();
    let room = slices(&memory, 2, 512);
    assert_eq!(read_vectored_at(disk.file(), &room, 0).unwrap(), 1024);
    assert_eq!(
        write_vectored_at(disk.file(), &room[..1], 512).unwrap(),
        512
    );
    zero_range(disk.file(), 0, 4096).unwrap();
    disk.file().sync_all().unwrap();
    assert_eq!(read_vectored_at(disk.file(), &room, 3584).unwrap(), 1024);
    let mut bytes = [0; 1025];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert!(bytes[..512].iter().all(|&b| b == 0) && bytes[513..].iter().all(|&b| b == 3));
}

trait FilterSuccess {
    fn filter_success(self) -> Result<Vec<u8>, ()>;
}

impl FilterSuccess for io::Result<std::process::Output> {
    fn filter_success(self) -> Result<Vec<u8>, ()> {
        let output = self.map_err(drop)?;
        output.status.success().then_some(output.stdout).ok_or(())
    }
}
