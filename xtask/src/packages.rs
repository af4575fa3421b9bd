//! Debian packages a command needs: installed when we may, or the exact command to type when we may not.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::progress::Progress;

/// Makes sure `packages` are installed, which `purpose` needs ("the lab", "the guest kernel").
///
/// # Errors
/// If they are missing and cannot be installed; the text says what to type.
pub fn ensure(progress: &Progress, purpose: &str, packages: &[&str]) -> Result<()> {
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        bail!("{}", what_to_type(purpose, &missing));
    }
    eprintln!(
        "{purpose} needs Debian packages that are not installed: {}",
        missing.join(" ")
    );
    if !lists_present(Path::new("/var/lib/apt/lists")) {
        update(progress)?;
    }
    if install(progress, &missing).is_err() {
        // The usual cause is lists older than the mirror: the second failure is the one that counts.
        update(progress)?;
        install(progress, &missing)?;
    }
    Ok(())
}

/// Makes sure that apt knows which packages there are.
pub fn ensure_lists(progress: &Progress) -> Result<()> {
    if lists_present(Path::new("/var/lib/apt/lists")) {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        bail!("apt has no package lists: type\n  sudo apt-get update");
    }
    update(progress)
}

/// Those of `packages` that are not installed.
pub fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n"])
        .args(packages)
        .stderr(Stdio::null())
        .output()
        .with_context(|| {
            format!(
                "cannot ask dpkg-query: this needs Debian, or its packages' equivalents: {}",
                packages.join(" ")
            )
        })?;
    Ok(not_installed(
        packages,
        &String::from_utf8_lossy(&output.stdout),
    ))
}

fn not_installed<'a>(packages: &[&'a str], shown: &str) -> Vec<&'a str> {
    let installed: Vec<&str> = shown
        .lines()
        .filter_map(|line| line.strip_suffix(" installed"))
        .collect();
    packages
        .iter()
        .copied()
        .filter(|package| !installed.contains(package))
        .collect()
}

fn what_to_type(purpose: &str, missing: &[&str]) -> String {
    format!(
        "{purpose} needs Debian packages that are not installed. Type\n  \
         sudo apt-get update && sudo apt-get install --no-install-recommends {}",
        missing.join(" ")
    )
}

fn lists_present(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return false;
    };
    entries
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Another apt may be at work on a machine that has just started.
        .args(["-q", "-o", "DPkg::Lock::Timeout=300"]);
    command
}

fn update(progress: &Progress) -> Result<()> {
    progress.run(
        "reading the package lists (apt-get update)",
        apt_get().arg("update"),
    )
}

fn install(progress: &Progress, packages: &[&str]) -> Result<()> {
    progress.run(
        &format!("installing {}", packages.join(" ")),
        apt_get()
            .args(["install", "--yes", "--no-install-recommends"])
            .args(packages),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fully_installed_counts() {
        let shown = "bc installed\nflex not-installed\nbison config-files\n";
        assert_eq!(
            not_installed(&["bc", "flex", "bison", "cpio"], shown),
            ["flex", "bison", "cpio"]
        );
    }

    #[test]
    fn a_package_that_does_not_exist_is_missing() {
        // Asked of the real dpkg: an unknown name makes it fail, and must not hide the others.
        let Ok(found) = missing(&["dpkg", "no-such-package-at-all"]) else {
            return; // not a Debian machine
        };
        assert_eq!(found, ["no-such-package-at-all"]);
    }

    #[test]
    fn lists_are_present_only_with_packages_in_them() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!lists_present(&folder.path().join("missing")));
        std::fs::create_dir(folder.path().join("partial")).unwrap();
        std::fs::write(folder.path().join("lock"), "").unwrap();
        assert!(!lists_present(folder.path()));
        std::fs::write(
            folder
                .path()
                .join("deb.debian.org_main_binary-amd64_Packages.lz4"),
            "",
        )
        .unwrap();
        assert!(lists_present(folder.path()));
    }

    #[test]
    fn the_text_says_what_to_type() {
        let text = what_to_type("The lab", &["bc", "flex"]);
        assert!(
            text.contains("sudo apt-get install --no-install-recommends bc flex"),
            "{text}"
        );
    }
}
