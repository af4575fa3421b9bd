//! `cargo xtask doctor`: what this machine can do, each with the fix if it cannot.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::Result;

use crate::cache::Cache;
use crate::host::Kvm;
use crate::{lab, packages};

/// What was found about one thing.
struct Finding {
    state: State,
    /// What was looked at.
    what: &'static str,
    /// What was found, in a few words.
    found: String,
    /// How to mend it.
    fix: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Works.
    Good,
    /// Something is slower or not possible without it.
    Lacking,
    /// Nothing runs without it.
    Needed,
}

impl Finding {
    fn good(what: &'static str, found: impl Into<String>) -> Self {
        Self {
            state: State::Good,
            what,
            found: found.into(),
            fix: String::new(),
        }
    }

    fn lacking(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            state: State::Lacking,
            what,
            found: found.into(),
            fix: fix.into(),
        }
    }

    fn needed(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            state: State::Needed,
            ..Self::lacking(what, found, fix)
        }
    }
}

/// Prints the table; the exit status is 0 unless something needed is missing.
pub fn run() -> Result<u8> {
    let findings = [
        kvm(&Kvm::of_this_machine()),
        device(
            "tap",
            "/dev/net/tun",
            "sudo modprobe tun, and root or CAP_NET_ADMIN to make interfaces",
        ),
        userfaultfd(),
        io_uring(),
        cgroups(&read("/proc/self/mountinfo")),
        hugepages(&read("/proc/meminfo")),
        namespaces(),
        linker(),
        lab_packages(),
        cache(),
    ];
    let mut out = io::stdout().lock();
    for finding in &findings {
        let mark = match finding.state {
            State::Good => "ok",
            State::Lacking => "-",
            State::Needed => "MISSING",
        };
        writeln!(out, "{mark:<8} {:<12} {}", finding.what, finding.found)?;
        if finding.state != State::Good {
            writeln!(out, "{:21} -> {}", "", finding.fix)?;
        }
    }
    Ok(u8::from(
        findings
            .iter()
            .any(|finding| finding.state == State::Needed),
    ))
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn kvm(kvm: &Kvm) -> Finding {
    let what = "KVM";
    match kvm {
        Kvm::Hardware => Finding::good(what, "/dev/kvm, by the processor: microVMs run right here"),
        Kvm::Emulated => Finding::lacking(
            what,
            "/dev/kvm is emulated (no svm or vmx in /proc/cpuinfo): Linux guests run in the lab",
            "enable AMD-V or VT-x in the firmware, or nested virtualization for this machine",
        ),
        Kvm::Denied(error) => Finding::lacking(
            what,
            format!("/dev/kvm cannot be opened ({error}): microVMs run in the lab"),
            "sudo usermod --append --groups kvm $USER, then log in again",
        ),
        Kvm::Missing => Finding::lacking(
            what,
            "no /dev/kvm: microVMs run in the lab",
            "sudo modprobe kvm-amd or kvm-intel; in a container, start it with --device /dev/kvm",
        ),
    }
}

fn device(what: &'static str, path: &str, fix: &str) -> Finding {
    match fs::File::options().read(true).write(true).open(path) {
        Ok(_) => Finding::good(what, path),
        Err(error) => Finding::lacking(what, format!("{path}: {error}"), fix),
    }
}

fn userfaultfd() -> Finding {
    let what = "userfaultfd";
    if fs::File::open("/dev/userfaultfd").is_ok() {
        return Finding::good(what, "/dev/userfaultfd");
    }
    let unprivileged = read("/proc/sys/vm/unprivileged_userfaultfd");
    match unprivileged.trim() {
        "1" => Finding::good(what, "for every user"),
        "0" if rustix::process::geteuid().is_root() => Finding::good(what, "for root"),
        "0" => Finding::lacking(
            what,
            "for root only",
            "sudo sysctl vm.unprivileged_userfaultfd=1",
        ),
        _ => Finding::lacking(
            what,
            "not in this kernel",
            "a kernel with CONFIG_USERFAULTFD",
        ),
    }
}

fn io_uring() -> Finding {
    match io_uring::IoUring::new(2) {
        Ok(_) => Finding::good("io_uring", "works: drives can use the Async engine"),
        Err(error) => Finding::lacking(
            "io_uring",
            format!("{error}: drives use the Sync engine"),
            "sudo sysctl kernel.io_uring_disabled=0; in a container, a seccomp profile that allows it",
        ),
    }
}

fn cgroups(mountinfo: &str) -> Finding {
    let what = "cgroups";
    let (mut first, mut second) = (Vec::new(), None);
    for line in mountinfo.lines() {
        // Fields before the dash: id, parent, device, root, mount point, options.
        let Some((mount, filesystem)) = line.split_once(" - ") else {
            continue;
        };
        let point = mount.split(' ').nth(4).unwrap_or_default();
        match filesystem.split(' ').next() {
            Some("cgroup") => first.extend(point.rsplit('/').next()),
            Some("cgroup2") => second = Some(point),
            _ => {}
        }
    }
    let controllers = second.map(|point| read(Path::new(point).join("cgroup.controllers")));
    judge_cgroups(what, &first, controllers.as_deref())
}

fn judge_cgroups(what: &'static str, first: &[&str], second: Option<&str>) -> Finding {
    let described = match second.map(str::trim) {
        None => String::new(),
        Some("") => "v2 without controllers".to_owned(),
        Some(controllers) => format!("v2 with {controllers}"),
    };
    let has = |name| second.is_some_and(|list| list.split_whitespace().any(|word| word == name));
    if has("cpu") && has("memory") {
        return Finding::good(what, described);
    }
    if first.contains(&"cpu") && first.contains(&"memory") {
        let comma = if described.is_empty() { "" } else { ", " };
        return Finding::good(
            what,
            format!("v1 with {}{comma}{described}", first.join(" ")),
        );
    }
    Finding::lacking(
        what,
        if described.is_empty() {
            "none mounted".to_owned()
        } else {
            described
        },
        "boot with systemd.unified_cgroup_hierarchy=1, or sudo mount -t cgroup2 none /sys/fs/cgroup",
    )
}

fn hugepages(meminfo: &str) -> Finding {
    let field = |name: &str| -> u64 {
        meminfo
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|number| number.parse().ok())
            .unwrap_or(0)
    };
    let (total, free) = (field("HugePages_Total:"), field("HugePages_Free:"));
    if total > 0 {
        return Finding::good(
            "hugepages",
            format!(
                "{free} of {total} free, {} KiB each",
                field("Hugepagesize:")
            ),
        );
    }
    Finding::lacking(
        "hugepages",
        "none set aside: machines with huge_pages cannot start",
        "sudo sysctl vm.nr_hugepages=128",
    )
}

fn namespaces() -> Finding {
    const KINDS: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];
    let what = "namespaces";
    let (there, missing): (Vec<_>, Vec<_>) = KINDS
        .into_iter()
        .partition(|kind| Path::new("/proc/self/ns").join(kind).exists());
    if !missing.is_empty() {
        return Finding::lacking(
            what,
            format!("without {}", missing.join(" ")),
            "a kernel with CONFIG_NAMESPACES and all kinds of them",
        );
    }
    let denied = [
        "/proc/sys/user/max_user_namespaces",
        "/proc/sys/kernel/unprivileged_userns_clone",
    ]
    .into_iter()
    .find(|path| read(path).trim() == "0");
    match denied {
        None => Finding::good(what, there.join(" ")),
        Some(path) => Finding::lacking(
            what,
            format!("{path} is 0: no user namespaces without root"),
            format!("echo 10000 | sudo tee {path}"),
        ),
    }
}

fn linker() -> Finding {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join("cc").is_file()));
    if found {
        Finding::good("linker", "cc")
    } else {
        Finding::needed("linker", "no cc", "sudo apt-get install gcc libc6-dev")
    }
}

fn lab_packages() -> Finding {
    let what = "the lab";
    match packages::missing(&lab::PACKAGES) {
        Ok(missing) if missing.is_empty() => Finding::good(what, "all its packages are installed"),
        Ok(missing) if rustix::process::geteuid().is_root() => Finding::lacking(
            what,
            format!("not installed: {}", missing.join(" ")),
            "nothing to do: it installs them when it is used",
        ),
        Ok(missing) => Finding::needed(
            what,
            format!("not installed: {}", missing.join(" ")),
            format!(
                "sudo apt-get install --no-install-recommends {}",
                missing.join(" ")
            ),
        ),
        Err(error) => Finding::needed(
            what,
            format!("{error:#}"),
            "use Debian or one of its relatives",
        ),
    }
}

fn cache() -> Finding {
    match Cache::open() {
        Ok(cache) => Finding::good("cache", cache.folder().display().to_string()),
        Err(error) => Finding::needed(
            "cache",
            format!("{error:#}"),
            "set LEPTON_CACHE to a folder you can write",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_version_of_cgroups_will_do() {
        let judge = |first: &[&str], second| judge_cgroups("cgroups", first, second).state;
        assert_eq!(judge(&[], Some("cpu io memory\n")), State::Good);
        assert_eq!(judge(&["cpu", "memory"], Some("hugetlb\n")), State::Good);
        assert_eq!(judge(&["cpu"], Some("hugetlb\n")), State::Lacking);
        assert_eq!(judge(&[], None), State::Lacking);
    }

    #[test]
    fn mounts_are_read() {
        let finding = cgroups(
            "30 20 0:25 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
             31 20 0:26 / /sys/fs/cgroup/memory rw shared:1 - cgroup cgroup rw,memory\n\
             32 20 0:27 / /nonexistent rw - cgroup2 cgroup2 rw\n",
        );
        assert_eq!(finding.found, "v1 with cpu memory, v2 without controllers");
    }

    #[test]
    fn hugepages_are_counted() {
        let text =
            "HugePages_Total:      16\nHugePages_Free:        4\nHugepagesize:       2048 kB\n";
        assert_eq!(hugepages(text).found, "4 of 16 free, 2048 KiB each");
        assert_eq!(
            hugepages("HugePages_Total:       0\n").state,
            State::Lacking
        );
    }

    #[test]
    fn everything_lacking_has_a_fix() {
        for finding in [
            kvm(&Kvm::Emulated),
            kvm(&Kvm::Missing),
            kvm(&Kvm::Denied("no".into())),
            cgroups(""),
            hugepages(""),
            device("x", "/nonexistent", "do this"),
        ] {
            assert_eq!(finding.state, State::Lacking);
            assert!(!finding.fix.is_empty() && !finding.found.is_empty());
        }
    }
}
