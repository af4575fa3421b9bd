//! What must be true of the host before anything is started.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::arguments::Run;

/// Why nothing is started.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error(
        "there is no /dev/kvm here: load the kernel module kvm_amd or kvm_intel, or run the \
         microVM in the lab: cargo xtask run --lab"
    )]
    NoKvm,
    #[error(
        "/dev/kvm cannot be opened ({0}): be a member of the group kvm (sudo usermod -aG kvm \
         $USER, then log in again), or run the microVM in the lab: cargo xtask run --lab"
    )]
    KvmDenied(io::Error),
    #[error(
        "/dev/kvm is emulated here: /proc/cpuinfo has neither svm nor vmx, and a Linux guest would \
         take minutes to boot. Run the microVM in the lab: cargo xtask run --lab, or try here all \
         the same with --force"
    )]
    KvmEmulated,
    #[error("{option} {path:?}: {source}")]
    Unreadable {
        option: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{option} {path:?} is {found}, {wanted} was expected")]
    WrongKind {
        option: &'static str,
        path: PathBuf,
        found: &'static str,
        wanted: &'static str,
    },
    #[error("--{option} {path:?} is not UTF-8, which the VMM's API needs: rename it")]
    NotText { option: &'static str, path: PathBuf },
}

/// Checks what the arguments name, and KVM unless told not to.
pub fn check(arguments: &Run) -> Result<(), HostError> {
    let Run {
        vmm, kernel, image, ..
    } = arguments;
    check_file("--vmm", vmm, "a program", |kind, mode| {
        kind.is_file() && mode & 0o111 != 0
    })?;
    check_file("--kernel", kernel, "a file", |kind, _| kind.is_file())?;
    check_file("--image", image, "a file or block device", |kind, _| {
        kind.is_file() || kind.is_block_device()
    })?;
    for (option, path) in [("kernel", kernel), ("image", image)] {
        if path.to_str().is_none() {
            let path = path.clone();
            return Err(HostError::NotText { option, path });
        }
    }
    if arguments.force {
        return Ok(());
    }
    let device = fs::File::options().read(true).write(true).open("/dev/kvm");
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    check_kvm(device.map(drop), &processor)
}

fn check_file(
    option: &'static str,
    path: &Path,
    wanted: &'static str,
    fits: impl Fn(fs::FileType, u32) -> bool,
) -> Result<(), HostError> {
    let metadata = fs::metadata(path).map_err(|source| HostError::Unreadable {
        option,
        path: path.to_owned(),
        source,
    })?;
    let kind = metadata.file_type();
    if fits(kind, metadata.permissions().mode()) {
        return Ok(());
    }
    let found = match kind {
        kind if kind.is_dir() => "a directory",
        kind if kind.is_file() => "a file without execute permission",
        _ => "something else",
    };
    Err(HostError::WrongKind {
        option,
        path: path.to_owned(),
        found,
        wanted,
    })
}

fn check_kvm(opened: io::Result<()>, processor: &str) -> Result<(), HostError> {
    match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(HostError::NoKvm),
        Err(error) => Err(HostError::KvmDenied(error)),
        Ok(()) if has_hardware_support(processor) => Ok(()),
        Ok(()) => Err(HostError::KvmEmulated),
    }
}

/// Whether a processor in `/proc/cpuinfo` has AMD's or Intel's virtualization.
fn has_hardware_support(processor: &str) -> bool {
    processor
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| name.trim() == "flags")
        .any(|(_, flags)| {
            flags
                .split_whitespace()
                .any(|flag| matches!(flag, "svm" | "vmx"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_is_of_use_with_hardware_alone() {
        let amd = "flags\t\t: fpu svm npt\n";
        let intel = "flags\t\t: fpu vmx\nvmx flags\t: ept\n";
        let none = "model name\t: vmx svm\nflags\t\t: fpu svm_lock\nvmx flags\t: vmx\n";
        assert!(check_kvm(Ok(()), amd).is_ok());
        assert!(check_kvm(Ok(()), intel).is_ok());
        assert!(matches!(
            check_kvm(Ok(()), none),
            Err(HostError::KvmEmulated)
        ));
        assert!(matches!(
            check_kvm(Err(io::ErrorKind::NotFound.into()), amd),
            Err(HostError::NoKvm)
        ));
        assert!(matches!(
            check_kvm(Err(io::ErrorKind::PermissionDenied.into()), amd),
            Err(HostError::KvmDenied(_))
        ));
    }
}
