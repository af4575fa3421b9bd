//! What this machine can do.

use std::fs;
use std::io;

/// How a KVM guest would fare on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// The processor runs guests.
    Hardware,
    /// `/dev/kvm` is there, without the processor's help: kernel code of a guest is interpreted.
    Emulated,
    /// `/dev/kvm` is there and may not be opened.
    Denied(String),
    /// There is no `/dev/kvm`.
    Missing,
}

impl Kvm {
    /// Looks at this machine.
    pub fn of_this_machine() -> Self {
        let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self::judge(opened.map(drop), &processor)
    }

    fn judge(opened: io::Result<()>, processor: &str) -> Self {
        match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::Missing,
            Err(error) => Self::Denied(error.to_string()),
            Ok(()) if has_flag(processor, "svm") || has_flag(processor, "vmx") => Self::Hardware,
            Ok(()) => Self::Emulated,
        }
    }

    /// Why guests do not run directly here, if they do not.
    pub fn obstacle(&self) -> Option<String> {
        match self {
            Self::Hardware => None,
            Self::Emulated => {
                Some("/dev/kvm is emulated here (no svm or vmx in /proc/cpuinfo)".to_owned())
            }
            Self::Denied(error) => Some(format!("/dev/kvm cannot be opened ({error})")),
            Self::Missing => Some("there is no /dev/kvm here".to_owned()),
        }
    }
}

/// Whether the first processor in `/proc/cpuinfo` has `flag`.
fn has_flag(processor: &str, flag: &str) -> bool {
    processor
        .lines()
        .find_map(|line| line.strip_prefix("flags"))
        .is_some_and(|flags| flags.split_whitespace().any(|word| word == flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMD: &str = "processor\t: 0\nflags\t\t: fpu vme svm npt\n\nprocessor\t: 1\n";
    const PLAIN: &str = "processor\t: 0\nflags\t\t: fpu vme svm_lock\nvmx flags\t: none\n";

    #[test]
    fn hardware_needs_the_flag_and_the_device() {
        assert_eq!(Kvm::judge(Ok(()), AMD), Kvm::Hardware);
        assert_eq!(Kvm::judge(Ok(()), PLAIN), Kvm::Emulated);
        assert_eq!(Kvm::judge(Ok(()), ""), Kvm::Emulated);
        assert_eq!(
            Kvm::judge(Err(io::ErrorKind::NotFound.into()), AMD),
            Kvm::Missing
        );
        assert!(matches!(
            Kvm::judge(Err(io::ErrorKind::PermissionDenied.into()), AMD),
            Kvm::Denied(_)
        ));
    }

    #[test]
    fn only_hardware_has_no_obstacle() {
        assert_eq!(Kvm::Hardware.obstacle(), None);
        for kvm in [Kvm::Emulated, Kvm::Denied("x".into()), Kvm::Missing] {
            assert!(kvm.obstacle().is_some_and(|text| text.contains("/dev/kvm")));
        }
    }
}
