//! The lab's kernel: Debian's own for clouds, unpacked and not installed.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use super::bzimage;
use crate::cache::{Cache, Inputs};
use crate::packages;
use crate::progress::Progress;

/// The package that names the current kernel package.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// The ELF file's place in the cached folder.
const UNPACKED: &str = "boot/vmlinux";

/// Debian's kernel, unpacked.
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// What QEMU boots: the ELF file from it, or the image itself.
    pub boot: PathBuf,
    /// Its modules, `/lib/modules/<release>` elsewhere, with depmod's lists.
    pub modules: PathBuf,
}

impl Kernel {
    /// The kernel from the cache, downloaded the first time.
    pub fn get(cache: &Cache, progress: &Progress) -> Result<Self> {
        let inputs = Inputs::new()
            .with("package", META_PACKAGE)
            .with("form", "3");
        let folder = cache.get_or_make("lab-kernel", inputs, |folder| unpack(folder, progress))?;
        let release = only_entry(&folder.join("lib/modules"))?;
        let name = release
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| anyhow!("{}: not a kernel release", release.display()))?;
        let image = folder.join(format!("boot/vmlinuz-{name}"));
        let unpacked = folder.join(UNPACKED);
        Ok(Self {
            boot: if unpacked.exists() {
                unpacked
            } else {
                image.clone()
            },
            image,
            modules: release,
        })
    }

    /// The modules named, as insmod takes them, in the order given.
    ///
    /// # Errors
    /// If this kernel does not have one of them.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Vec<u8>>> {
        let list = fs::read_to_string(self.modules.join("modules.order"))?;
        names
            .iter()
            .map(|name| {
                let path = list
                    .lines()
                    .find(|line| {
                        Path::new(line)
                            .file_stem()
                            .is_some_and(|stem| stem == *name)
                    })
                    .ok_or_else(|| anyhow!("Debian's kernel has no module {name}"))?;
                self.module(path)
            })
            .collect()
    }

    fn module(&self, path: &str) -> Result<Vec<u8>> {
        let plain = self.modules.join(path);
        if plain.exists() {
            return Ok(fs::read(plain)?);
        }
        for (suffix, program) in [("xz", "xz"), ("zst", "zstd")] {
            let packed = self.modules.join(format!("{path}.{suffix}"));
            if packed.exists() {
                let output = Command::new(program)
                    .args(["--decompress", "--stdout"])
                    .arg(&packed)
                    .output()
                    .with_context(|| format!("cannot start {program}"))?;
                if output.status.success() {
                    return Ok(output.stdout);
                }
                bail!("{program} cannot unpack {}", packed.display());
            }
        }
        bail!("{}: no such module file", plain.display())
    }
}

fn unpack(folder: &Path, progress: &Progress) -> Result<()> {
    packages::ensure_lists(progress)?;
    let shown = Command::new("apt-cache")
        .args(["depends", "--important", META_PACKAGE])
        .output()
        .context("cannot start apt-cache")?;
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    let package = shown
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .ok_or_else(|| {
            anyhow!(
                "apt offers no {META_PACKAGE}: the lab needs Debian's package sources (main) for amd64 and, if the \
                 lists are old, sudo apt-get update"
            )
        })?;
    let download = folder.join("download");
    fs::create_dir(&download)?;
    progress.run(
        &format!("downloading {package}"),
        Command::new("apt-get")
            .args([
                "-q",
                "-o",
                "APT::Sandbox::User=root",
                "download",
                &format!("{package}-unsigned"),
            ])
            .current_dir(&download),
    )?;
    let archive = only_entry(&download)?;
    progress.run(
        "unpacking the lab's kernel",
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&archive)
            .arg(folder),
    )?;
    fs::remove_dir_all(&download)?;
    fs::remove_dir_all(folder.join("usr"))?;
    let release = only_entry(&folder.join("lib/modules"))?;
    let release = release.file_name().unwrap_or_default();
    let mut image = OsString::from("boot/vmlinuz-");
    image.push(release);
    match bzimage::unpack(&fs::read(folder.join(image))?) {
        Ok(kernel) => fs::write(folder.join(UNPACKED), kernel)?,
        // It boots all the same, if later.
        Err(error) => eprintln!("the lab's kernel stays packed: {error}"),
    }
    progress.run(
        "listing the lab kernel's modules",
        Command::new("/sbin/depmod")
            .arg("--basedir")
            .arg(folder)
            .arg(release),
    )
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    let mut entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    match (entries.next(), entries.next()) {
        (Some(entry), None) => Ok(entry?.path()),
        _ => bail!("{}: not exactly one entry", folder.display()),
    }
}
