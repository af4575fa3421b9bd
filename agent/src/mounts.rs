//! The file systems of a fresh guest.

use std::ffi::{CStr, CString};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::Path;

use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{chdir, pivot_root};

use crate::report;

/// A file system without a drive.
struct Pseudo {
    target: &'static str,
    kind: &'static str,
    flags: MountFlags,
    options: &'static CStr,
}

/// Mounted in this order: later ones lie in earlier ones.
fn pseudo_file_systems() -> [Pseudo; 8] {
    let none = MountFlags::NOSUID
        .union(MountFlags::NODEV)
        .union(MountFlags::NOEXEC);
    let data = MountFlags::NOSUID.union(MountFlags::NODEV);
    let entry = |target, kind, flags, options| Pseudo {
        target,
        kind,
        flags,
        options,
    };
    [
        entry("/proc", "proc", none, c""),
        entry("/sys", "sysfs", none, c""),
        entry("/dev", "devtmpfs", MountFlags::NOSUID, c"mode=0755"),
        entry(
            "/dev/pts",
            "devpts",
            MountFlags::NOSUID.union(MountFlags::NOEXEC),
            c"gid=5,mode=0620,ptmxmode=0666",
        ),
        entry("/dev/shm", "tmpfs", data, c"mode=1777"),
        entry("/tmp", "tmpfs", data, c"mode=1777"),
        entry("/run", "tmpfs", data, c"mode=0755"),
        entry("/sys/fs/cgroup", "cgroup2", none, c"nsdelegate"),
    ]
}

/// Mounts what programs expect to find.
pub fn mount_all() {
    for fs in pseudo_file_systems() {
        let result = match mount(fs.kind, fs.target, fs.kind, fs.flags, fs.options) {
            // Most images have the directory, so look for it only when it is missing.
            Err(rustix::io::Errno::NOENT) => {
                let made = std::fs::DirBuilder::new().mode(0o755).create(fs.target);
                report(fs.target, made);
                mount(fs.kind, fs.target, fs.kind, fs.flags, fs.options)
            }
            // The kernel mounts /dev itself if it was built to.
            Err(rustix::io::Errno::BUSY) => Ok(()),
            result => result,
        };
        report(fs.target, result);
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        report(link, symlink(target, link));
    }
}

/// Puts a writable layer of memory over a read-only root. A root that can be written to is left as
/// it is.
pub fn writable_root() {
    match statvfs("/") {
        Ok(root) if root.f_flag.contains(StatVfsMountFlags::RDONLY) => {
            report("a writable layer over /", overlay_root());
        }
        Ok(_) => {}
        Err(e) => report("/", Err(e)),
    }
}

fn overlay_root() -> std::io::Result<()> {
    // Any directory of the image will do: the layer's own file system is not seen afterwards.
    let base = ["/run", "/mnt", "/tmp", "/dev"]
        .into_iter()
        .find(|path| Path::new(path).is_dir())
        .ok_or_else(|| std::io::Error::other("the image has none of /run /mnt /tmp /dev"))?;
    mount("tmpfs", base, "tmpfs", MountFlags::empty(), c"mode=0755")?;
    for directory in ["upper", "work", "root"] {
        std::fs::create_dir(format!("{base}/{directory}"))?;
    }
    let root = format!("{base}/root");
    let options = CString::new(format!(
        "lowerdir=/,upperdir={base}/upper,workdir={base}/work"
    ))?;
    mount(
        "overlay",
        &root,
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )?;
    // The new root on top of the old one in one step, then the old one away: pivot_root(2), NOTES.
    chdir(&root)?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    Ok(())
}
