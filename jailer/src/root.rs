//! A root of its own for the VMM.

use std::io;

use rustix::fs::CWD;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};

use crate::folder::Folder;
use crate::process;

/// A step on the way into the new root that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot make {path} the root: {call}: {source}")]
pub struct RootError {
    path: String,
    call: &'static str,
    source: io::Error,
}

/// Makes `root` this process's root directory, in a mount namespace with nothing else in it.
///
/// No path is looked up but `.` and `/`. What is mounted below `root` comes along.
pub fn enter(root: &Folder) -> Result<(), RootError> {
    let failed = |call: &'static str| {
        move |source: io::Error| RootError {
            path: root.path().display().to_string(),
            call,
            source,
        }
    };
    let step = |call: &'static str, result: rustix::io::Result<()>| {
        result.map_err(io::Error::from).map_err(failed(call))
    };
    // The new namespace has copies of all mounts. The working directory is moved to the copy, open descriptors are not.
    step("fchdir", fchdir(root))?;
    process::unshare_mounts().map_err(failed("unshare"))?;
    // What is mounted here from now on is not to show outside; what is unmounted outside is to go here too.
    let downstream = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    step("MS_SLAVE", mount_change("/", downstream))?;
    // pivot_root wants a mount, which the folder is not yet.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, ".", flags)
        .map_err(io::Error::from)
        .map_err(failed("open_tree"))?;
    let attach = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    step("move_mount", move_mount(&tree, "", CWD, ".", attach))?;
    step("fchdir", fchdir(&tree))?;
    // The old root comes to lie on the new one, where it can be unmounted without a folder to put it in (pivot_root(2)).
    step("pivot_root", pivot_root(".", "."))?;
    step("umount2", unmount(".", UnmountFlags::DETACH))?;
    step("chdir", chdir("/"))
}
