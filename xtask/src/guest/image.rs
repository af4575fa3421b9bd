//! The guest's root image: a read-only file system with busybox and the agent.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::recipe;
use crate::cache::{Cache, Inputs};
use crate::packages;
use crate::progress::Progress;

/// What making the image needs.
const PACKAGES: [&str; 2] = ["busybox-static", "erofs-utils"];
/// Debian's busybox-static.
const BUSYBOX: &str = "/bin/busybox";
/// Counts with the way the image is made: a change makes every cached image stale.
const FORM: &str = "1";
/// The image is a file of its content alone, so it has no identity and no age.
const UUID: &str = "00000000-0000-0000-0000-000000000000";
/// Bound of the image's size: it is read at every boot.
const MAX_BYTES: u64 = 8 << 20;
/// Empty folders: what is mounted on, and what programs expect.
const FOLDERS: [(&str, u32); 14] = [
    ("dev", 0o755),
    ("etc", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("bin", 0o755),
    ("sbin", 0o755),
    ("usr/bin", 0o755),
    ("usr/sbin", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
];
/// Applets that the agent stands for.
const NOT_OURS: [&str; 2] = ["linuxrc", "sbin/init"];

/// Builds the guest's root image with `agent`, a static program, as its first process, or finds it in the cache.
/// No root is needed, and the same inputs give the same bytes.
///
/// # Errors
/// If a Debian package is missing and cannot be installed, `agent` is not a static program, or the image is larger
/// than 8 MiB.
pub fn image(progress: &Progress, agent: &Path) -> Result<PathBuf> {
    packages::ensure(progress, "the guest image", &PACKAGES)?;
    let applets = applets(Path::new(BUSYBOX))?;
    let program = fs::read(agent).with_context(|| format!("cannot read {}", agent.display()))?;
    let mut inputs = Inputs::new()
        .with("form", FORM)
        .with("agent", &program)
        .with("busybox", fs::read(BUSYBOX)?)
        .with("mkfs.erofs", version()?);
    let etc = etc()?;
    for (name, content) in &etc {
        inputs = inputs.with(name, content);
    }
    let folder = Cache::open()?.get_or_make("guest-image", inputs, |folder| {
        let tree = folder.join("tree");
        stage(&tree, &program, &applets, &etc)?;
        pack(&tree, &folder.join("root.erofs"), progress)?;
        Ok(fs::remove_dir_all(&tree)?)
    })?;
    Ok(folder.join("root.erofs"))
}

/// The paths busybox's applets have, relative to the root.
fn applets(busybox: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new(busybox)
        .arg("--list-full")
        .output()
        .with_context(|| format!("cannot start {}", busybox.display()))?;
    Ok(applet_paths(&String::from_utf8_lossy(&output.stdout)))
}

fn applet_paths(list: &str) -> Vec<PathBuf> {
    let plain = |path: &Path| {
        path.components()
            .all(|part| matches!(part, Component::Normal(_)))
    };
    list.lines()
        .filter(|line| !line.is_empty() && !NOT_OURS.contains(line))
        .map(PathBuf::from)
        .filter(|path| plain(path))
        .collect()
}

fn version() -> Result<Vec<u8>> {
    let output = Command::new("mkfs.erofs")
        .arg("--version")
        .output()
        .context("cannot start mkfs.erofs")?;
    Ok([output.stdout, output.stderr].concat())
}

/// The files of `resources/guest/root/etc`, by name.
fn etc() -> Result<Vec<(String, Vec<u8>)>> {
    let folder = recipe("root/etc");
    let mut files = Vec::new();
    for entry in
        fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?
    {
        let entry = entry?;
        files.push((
            entry.file_name().to_string_lossy().into_owned(),
            fs::read(entry.path())?,
        ));
    }
    files.sort();
    Ok(files)
}

/// Lays the image's files out in `tree`. Modes are set one by one: the user's umask must not count.
fn stage(tree: &Path, agent: &[u8], applets: &[PathBuf], etc: &[(String, Vec<u8>)]) -> Result<()> {
    let mut builder = DirBuilder::new();
    builder.mode(0o755).recursive(true);
    for (name, mode) in FOLDERS {
        builder.create(tree.join(name))?;
        fs::set_permissions(tree.join(name), Permissions::from_mode(mode))?;
    }
    for parent in ["", "usr", "var"] {
        fs::set_permissions(tree.join(parent), Permissions::from_mode(0o755))?;
    }
    let file = |name: &str, content: &[u8], mode| -> Result<()> {
        let path = tree.join(name);
        fs::write(&path, content)?;
        Ok(fs::set_permissions(&path, Permissions::from_mode(mode))?)
    };
    for (name, content) in etc {
        file(&format!("etc/{name}"), content, 0o644)?;
    }
    file("bin/busybox", &fs::read(BUSYBOX)?, 0o755)?;
    file("sbin/init", agent, 0o755)?;
    for applet in applets {
        let path = tree.join(applet);
        if path.exists() {
            continue;
        }
        let up = "../".repeat(applet.components().count() - 1);
        symlink(format!("{up}bin/busybox"), &path)
            .with_context(|| format!("busybox's applet {}", applet.display()))?;
    }
    Ok(())
}

fn pack(tree: &Path, image: &Path, progress: &Progress) -> Result<()> {
    progress.run(
        "packing the guest image",
        Command::new("mkfs.erofs")
            // No compression: reading a page more is cheaper at boot than unpacking one.
            .args(["-x-1", "-T0", "--all-root", "-U", UUID])
            .args([image, tree]),
    )?;
    let size = fs::metadata(image)?.len();
    if size > MAX_BYTES {
        bail!(
            "the guest image has {size} bytes, and must not have more than {MAX_BYTES}: it is read at every boot"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn applets_that_are_ours_or_lead_outside_are_left_out() {
        let list = "bin/ash\nlinuxrc\nsbin/init\nusr/bin/[[\n../../etc/passwd\n/bin/sh\n\n";
        assert_eq!(
            applet_paths(list),
            [Path::new("bin/ash"), Path::new("usr/bin/[[")]
        );
    }

    /// One image, made twice from files written in different orders under different umasks.
    #[test]
    fn the_same_inputs_give_the_same_bytes() {
        if !Path::new(BUSYBOX).exists() || version().is_err() {
            return; // the packages are installed when an image is asked for
        }
        let folder = tempfile::tempdir().unwrap();
        let mut applets = applets(Path::new(BUSYBOX)).unwrap();
        let mut etc = etc().unwrap();
        let mut images = Vec::new();
        for name in ["first", "second"] {
            let tree = folder.path().join(name);
            stage(&tree, b"agent", &applets, &etc).unwrap();
            let image = folder.path().join(format!("{name}.erofs"));
            pack(&tree, &image, &Progress::new()).unwrap();
            images.push(fs::read(image).unwrap());
            applets.reverse();
            etc.reverse();
        }
        assert!(images[0] == images[1]);
        assert!(images[0].windows(5).any(|window| window == b"agent"));
    }
}
