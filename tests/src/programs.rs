//! The programs under test, and what the host has.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The VMM: `$LEPTON_VMM`, or else the one of this workspace, built now if it is not up to date.
pub fn vmm() -> &'static Path {
    static VMM: OnceLock<PathBuf> = OnceLock::new();
    VMM.get_or_init(|| match std::env::var_os("LEPTON_VMM") {
        Some(path) => PathBuf::from(path),
        None => build("lepton-vmm"),
    })
}

/// The jailer: `$LEPTON_JAILER`. It runs only static programs, so no other one will do.
pub fn jailer() -> &'static Path {
    static JAILER: OnceLock<PathBuf> = OnceLock::new();
    JAILER.get_or_init(|| PathBuf::from(std::env::var_os("LEPTON_JAILER").unwrap_or_default()))
}

/// Builds a program into the target directory in which this test program lies.
fn build(package: &str) -> PathBuf {
    let here = std::env::current_exe().expect("a test program has a path");
    // TARGET/debug/deps/native_boot-0123456789abcdef
    let profile = here
        .ancestors()
        .nth(2)
        .expect("a test program lies in a target directory");
    let target = profile
        .parent()
        .expect("a profile lies in a target directory");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--package", package, "--target-dir"])
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .expect("cargo starts");
    assert!(status.success(), "{package} cannot be built");
    target.join("debug").join(package)
}

/// Whether `/dev/kvm` is of use at all, and else why not.
pub fn kvm() -> Result<(), String> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(drop)
        .map_err(|error| format!("/dev/kvm: {error}"))
}

/// Whether the processor helps KVM, and else why not.
pub fn hardware_kvm() -> Result<(), String> {
    kvm()?;
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = processor.lines().find(|line| line.starts_with("flags"));
    let has = |flag| flags.is_some_and(|line| line.split_whitespace().any(|word| word == flag));
    if has("svm") || has("vmx") {
        return Ok(());
    }
    Err("/dev/kvm is emulated here: Linux does not boot in useful time".to_owned())
}

/// Whether a program is in the `PATH`.
pub fn is_in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}
