//! Programs of the host, carried into a guest on a drive: its image has busybox and no others.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::linux::Linux;

/// Where the guest has the drive.
pub const PLACE: &str = "/mnt";

/// Puts programs in the host's `PATH` into `tree/bin`, their loader and their libraries into `tree/lib`.
#[track_caller]
pub fn carry(tree: &Path, programs: &[&str]) {
    let [bin, lib] = ["bin", "lib"].map(|name| tree.join(name));
    for folder in [&bin, &lib] {
        fs::create_dir_all(folder).expect("a folder");
    }
    for name in programs {
        let program = in_path(name);
        fs::copy(&program, bin.join(name)).expect("a copy");
        let needed = succeeds(Command::new("ldd").arg(&program));
        for library in needed
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
        {
            let name = Path::new(library).file_name().expect("a file");
            fs::copy(library, lib.join(name)).expect("a copy");
        }
    }
}

/// An ext4 file system of 64 MiB with what is in `tree`, in a file beside that.
#[track_caller]
pub fn image(tree: &Path) -> PathBuf {
    let image = tree.with_extension("image");
    succeeds(
        Command::new("mkfs.ext4")
            .args(["-q", "-d"])
            .args([tree, &image])
            .arg("64M"),
    );
    image
}

/// Mounts such a drive, the guest's second, and lets its programs find their libraries where Debian's loader looks.
#[track_caller]
pub fn mount(guest: &Linux, options: &str) {
    guest.sh(&format!(
        "mount -t ext4 -o {options} /dev/vdb {PLACE} && ln -s {PLACE}/lib /lib && ln -s {PLACE}/lib /lib64"
    ));
}

/// Where a program of this name is.
#[track_caller]
fn in_path(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").expect("a PATH");
    let mut found = std::env::split_paths(&path).map(|folder| folder.join(name));
    let found = found.find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("there is no program {name}"))
}

#[track_caller]
fn succeeds(command: &mut Command) -> String {
    let output = command.output().expect("the program starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).expect("text")
}
