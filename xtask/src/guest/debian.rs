//! Debian as a guest: its stock kernel and a minimal system, as the tests boot them.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use super::recipe;
use crate::cache::{Cache, Inputs};
use crate::lab::{Initramfs, Kernel};
use crate::packages;
use crate::progress::Progress;

/// What making the guest needs on the host.
const PACKAGES: [&str; 4] = [
    "busybox-static",
    "debootstrap",
    "debian-archive-keyring",
    "e2fsprogs",
];
/// What is in it besides the required packages: an init, a device manager (without it systemd starts no getty on a
/// serial line), and what the tests use.
const INCLUDE: [&str; 6] = [
    "systemd-sysv",
    "udev",
    "iproute2",
    "iputils-ping",
    "socat",
    "login",
];
/// The drivers a stock kernel has as modules; what each needs is looked up. vsock's packet parts come with it.
const DRIVERS: [&str; 4] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
];
/// Counts with the way the guest is made: a change makes every cached one stale.
const FORM: &str = "1";
/// Size of the root drive. It is a sparse file.
const DRIVE: &str = "640M";
/// Fixed, as is all that is not Debian's.
const UUID: &str = "6c657074-6f6e-4000-8000-000000000001";

/// A Debian guest: `root` is a raw drive to copy before it is written to, mounted from `/dev/vda`.
#[derive(Debug, Clone)]
pub struct DebianPaths {
    /// Debian's own kernel for clouds.
    pub bzimage: PathBuf,
    /// The initial RAM disk with that kernel's drivers.
    pub initrd: PathBuf,
    /// The root drive: ext4 without partitions. root logs in on ttyS0 without a password.
    pub root: PathBuf,
}

/// Makes the Debian guest, or finds it in the cache.
///
/// # Errors
/// If it is not in the cache and we are not root, which debootstrap needs: the text says what to type.
pub fn debian(progress: &Progress) -> Result<DebianPaths> {
    packages::ensure(progress, "the Debian guest", &PACKAGES)?;
    let cache = Cache::open()?;
    let kernel = Kernel::get(&cache, progress)?;
    let initrd = initrd(&cache, &kernel)?;
    let root = root(&cache, progress)?;
    Ok(DebianPaths {
        bzimage: kernel.image,
        initrd,
        root,
    })
}

fn initrd(cache: &Cache, kernel: &Kernel) -> Result<PathBuf> {
    let busybox = fs::read("/bin/busybox").context("cannot read /bin/busybox")?;
    let init =
        fs::read(recipe("debian/init")).context("cannot read the initial RAM disk's init")?;
    let release = kernel
        .modules
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let inputs = Inputs::new()
        .with("form", FORM)
        .with("kernel", release)
        .with("busybox", &busybox)
        .with("init", &init);
    let folder = cache.get_or_make("debian-initrd", inputs, |folder| {
        let list = fs::read_to_string(kernel.modules.join("modules.dep"))?;
        let order = load_order(&list, &DRIVERS)?;
        let names: Vec<&str> = order.iter().map(String::as_str).collect();
        let mut archive = Initramfs::new(BufWriter::new(File::create(folder.join("initrd"))?));
        for name in ["bin", "dev", "modules", "root"] {
            archive.folder(name)?;
        }
        archive.program("bin/busybox", &busybox)?;
        archive.program("init", &init)?;
        for (index, (name, module)) in names.iter().zip(kernel.modules(&names)?).enumerate() {
            // Numbered: the shell loads them in the order of their names.
            archive.program(&format!("modules/{index:02}-{name}.ko"), &module)?;
        }
        archive
            .finish()?
            .into_inner()
            .map_err(|error| error.into_error())?;
        Ok(())
    })?;
    Ok(folder.join("initrd"))
}

/// The modules to load for `wanted`, each after what it needs, from the text of `modules.dep`.
fn load_order(list: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let name = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split(".ko").next().unwrap_or(file).to_owned()
    };
    let needs: HashMap<String, &str> = list
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (name(module), needs))
        .collect();
    let mut order = Vec::new();
    for module in wanted {
        let needed = needs
            .get(*module)
            .ok_or_else(|| anyhow!("Debian's kernel has no module {module}"))?;
        // A line lists the nearest first, and all that those need after them.
        let chain = needed
            .split_whitespace()
            .rev()
            .map(name)
            .chain([(*module).to_owned()]);
        for module in chain {
            if !order.contains(&module) {
                order.push(module);
            }
        }
    }
    Ok(order)
}

fn root(cache: &Cache, progress: &Progress) -> Result<PathBuf> {
    let (mirror, suite) = mirror(progress)?;
    let customize = recipe("debian/customize");
    let inputs = Inputs::new()
        .with("form", FORM)
        .with("suite", &suite)
        .with("include", INCLUDE.join(","))
        .with("drive", DRIVE)
        .with("customize", fs::read(&customize)?);
    let folder = cache.get_or_make("debian-root", inputs, |folder| {
        if !rustix::process::geteuid().is_root() {
            bail!(
                "debootstrap needs root to make the Debian guest. Type\n  sudo --preserve-env=PATH,HOME,LEPTON_CACHE,\
                 XDG_CACHE_HOME {} xtask guest debian\nonce: it stays in the cache",
                std::env::var("CARGO").unwrap_or_else(|_| "cargo".into())
            );
        }
        let tree = folder.join("tree");
        progress.run(
            &format!("debootstrap {suite} from {mirror}"),
            Command::new("debootstrap")
                .args(["--arch=amd64", "--variant=minbase"])
                .arg(format!("--include={}", INCLUDE.join(",")))
                .arg(&suite)
                .arg(&tree)
                .arg(&mirror),
        )?;
        progress.run("setting the Debian guest up", Command::new(&customize).arg(&tree))?;
        pack(&tree, &folder.join("root.ext4"), progress)?;
        Ok(fs::remove_dir_all(&tree)?)
    })?;
    Ok(folder.join("root.ext4"))
}

fn pack(tree: &Path, drive: &Path, progress: &Progress) -> Result<()> {
    progress.run(
        "packing the Debian guest",
        Command::new("/sbin/mke2fs")
            .args([
                "-q", "-t", "ext4", "-L", "debian", "-U", UUID, "-m", "0", "-d",
            ])
            .args([tree, drive])
            .arg(DRIVE),
    )
}

/// Where this machine gets Debian from, and which one it is.
fn mirror(progress: &Progress) -> Result<(String, String)> {
    packages::ensure_lists(progress)?;
    let output = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(CODENAME) $(ORIGIN) $(COMPONENT)",
        ])
        .arg("Identifier: Packages")
        .output()
        .context("cannot start apt-get")?;
    first_mirror(&String::from_utf8_lossy(&output.stdout))
        .ok_or_else(|| anyhow!("apt has no Debian package source (main): debootstrap needs one"))
}

fn first_mirror(targets: &str) -> Option<(String, String)> {
    targets
        .lines()
        .find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            // Updates and security have suites of their own, which are not whole.
            [uri, suite, "Debian", "main"] if !suite.contains('-') => {
                Some((uri.to_owned(), suite.to_owned()))
            }
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let list = "kernel/a/net.ko: kernel/b/failover.ko kernel/c/core.ko\n\
                    kernel/b/failover.ko: kernel/c/core.ko\n\
                    kernel/c/core.ko:\n\
                    kernel/d/block.ko.xz: kernel/c/core.ko\n";
        assert_eq!(
            load_order(list, &["block", "net"]).unwrap(),
            ["core", "block", "failover", "net"]
        );
        let error = load_order(list, &["sound"]).unwrap_err().to_string();
        assert!(error.contains("sound"), "{error}");
    }

    #[test]
    fn only_a_whole_debian_is_bootstrapped() {
        let targets = "https://example.org/x nodistro . main\n\
                       http://deb.debian.org/debian-security/ bookworm-security Debian main\n\
                       http://deb.debian.org/debian/ bookworm Debian contrib\n\
                       http://deb.debian.org/debian/ bookworm Debian main\n";
        assert_eq!(
            first_mirror(targets),
            Some((
                "http://deb.debian.org/debian/".to_owned(),
                "bookworm".to_owned()
            ))
        );
        assert_eq!(first_mirror(""), None);
    }
}
