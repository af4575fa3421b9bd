//! Somebody who may write below the chroot base works against the jailer.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use lepton_tests::jail::Jail;
use tempfile::TempDir;

/// What the jailer must not touch.
struct Outside(TempDir);

impl Outside {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary directory");
        fs::write(folder.path().join("file"), "untouched").expect("a file can be written");
        let mode = fs::Permissions::from_mode(0o711);
        fs::set_permissions(folder.path(), mode).expect("the folder is ours");
        Self(folder)
    }

    fn folder(&self) -> &Path {
        self.0.path()
    }

    fn file(&self) -> PathBuf {
        self.folder().join("file")
    }

    #[track_caller]
    fn is_untouched(&self) {
        let names = |folder: &Path| fs::read_dir(folder).expect("a folder").count();
        assert_eq!(names(self.folder()), 1, "something was made outside");
        let text = fs::read_to_string(self.file()).expect("the file is there");
        assert_eq!(text, "untouched");
        for (path, mode) in [(self.folder().to_owned(), 0o711), (self.file(), 0o644)] {
            let meta = fs::symlink_metadata(&path).expect("it is there");
            assert_eq!((meta.uid(), meta.gid()), (0, 0), "{}", path.display());
            assert_eq!(meta.mode() & 0o7777, mode, "{}", path.display());
        }
    }
}

/// Everything that the jailer opens or makes, below the jail's root and above.
const FOLDERS: [&str; 6] = [
    "lepton-vmm",
    "lepton-vmm/vm-1",
    "lepton-vmm/vm-1/root",
    "lepton-vmm/vm-1/root/dev",
    "lepton-vmm/vm-1/root/dev/net",
    "lepton-vmm/vm-1/root/run",
];
const FILES: [&str; 5] = [
    "lepton-vmm/vm-1/root/lepton-vmm",
    "lepton-vmm/vm-1/root/lepton-vmm.pid",
    "lepton-vmm/vm-1/root/dev/kvm",
    "lepton-vmm/vm-1/root/dev/net/tun",
    "lepton-vmm/vm-1/root/dev/urandom",
];

/// A link at each place, one at a time, to a folder or a file, also to one that is not there.
pub fn cve_2026_1386_symlink_in_the_jailers_way() {
    let outside = Outside::new();
    let none = outside.folder().join("none");
    for place in FOLDERS.iter().chain(&FILES) {
        for target in [outside.folder(), &outside.file(), &none] {
            let jail = Jail::as_another_user();
            let path = jail.base().join(place);
            fs::create_dir_all(path.parent().expect("it is below")).expect("folders can be made");
            symlink(target, &path).expect("a link can be made");
            let before = jail.listing();
            let message = jail.refused();
            assert!(message.contains(place), "{place}: {message}");
            outside.is_untouched();
            assert_eq!(jail.listing(), before, "{place}: something is left");
        }
    }
}

pub fn cve_2026_1386_hard_link_in_the_programs_place() {
    let outside = Outside::new();
    for place in FILES {
        let jail = Jail::as_another_user();
        let path = jail.base().join(place);
        fs::create_dir_all(path.parent().expect("it is below")).expect("folders can be made");
        if fs::hard_link(outside.file(), &path).is_err() {
            // Two file systems.
            return;
        }
        let message = jail.refused();
        assert!(message.contains(place), "{place}: {message}");
        outside.is_untouched();
    }
}

/// A thread puts links in the place of folders and files as fast as it can while jails are made.
pub fn cve_2026_1386_symlink_swapped_in_under_the_jailer() {
    const ROUNDS: usize = 24;
    let outside = Outside::new();
    let (mut refusals, mut starts) = (0, 0);
    for round in 0..ROUNDS {
        let place = FOLDERS[1..].iter().chain(&FILES).cycle().nth(round);
        let place = place.expect("the list goes round");
        // A program that ends at once, whatever it is told.
        let jail = Jail::as_another_user().vmm(["--version"]);
        let path = jail.base().join(place);
        let target = if FOLDERS.contains(place) {
            outside.folder().to_owned()
        } else {
            outside.file()
        };
        fs::create_dir_all(path.parent().expect("it is below")).expect("folders can be made");
        let aside = jail.base().join("aside");
        let stop = AtomicBool::new(false);
        let output = thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // Each may fail, when there is nothing to swap: then there is in the next turn.
                    drop(fs::rename(&path, &aside));
                    drop(symlink(&target, &path));
                    drop(fs::remove_file(&path));
                    drop(fs::rename(&aside, &path));
                }
            });
            let output = jail.run();
            stop.store(true, Ordering::Relaxed);
            output
        });
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!message.contains("panicked"), "{message}");
        match output.status.code() {
            Some(0) => starts += 1,
            Some(1) => refusals += 1,
            other => panic!("{place}: {other:?} {message}"),
        }
        outside.is_untouched();
    }
    eprintln!("{ROUNDS} rounds: {refusals} refused, {starts} started");
    assert!(refusals > 0, "the links came too late in every round");
}
