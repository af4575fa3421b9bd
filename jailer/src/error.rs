//! Why there is no VMM in a jail.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use crate::cgroup::CgroupError;
use crate::folder::FolderError;
use crate::limits::LimitError;
use crate::privileges::PrivilegeError;
use crate::root::RootError;
use crate::tree::ProgramError;

/// Whatever keeps the VMM from running; nothing that was made is left then.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Root has to say who the VMM is to be.
    #[error(
        "--{0} is missing: when root starts a jail, the VMM runs as the user --uid and the group --gid"
    )]
    NoOwner(&'static str),
    /// See [`ProgramError`].
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The folder of all jails cannot be opened.
    #[error("--chroot-base-dir {0}; make it with: mkdir -p {path}", path = .1.display())]
    Base(FolderError, PathBuf),
    /// A part of the jail's folder cannot be made.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// See [`CgroupError`].
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The network namespace cannot be opened.
    #[error("--netns {}: {source}; make it with: ip netns add NAME", path.display())]
    Netns {
        /// As given.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is no namespace.
    #[error("--netns {}: not a namespace; those of ip netns are in /run/netns", .0.display())]
    NotANamespace(PathBuf),
    /// The network namespace cannot be entered.
    #[error("--netns: setns: {0}")]
    Setns(#[source] io::Error),
    /// See [`RootError`].
    #[error(transparent)]
    Root(#[from] RootError),
    /// See [`LimitError`].
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// See [`PrivilegeError`].
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    /// The VMM's process id cannot be written down.
    #[error("pid file: {0}")]
    Pid(#[source] io::Error),
    /// What the jailer was started with cannot be closed.
    #[error("cannot close inherited descriptors: {0}")]
    Inherited(#[source] io::Error),
    /// The standard streams cannot be replaced.
    #[error("--daemonize: /dev/null: {0}")]
    Null(#[source] io::Error),
    /// There is no second process.
    #[error("cannot fork: {0}")]
    Fork(#[source] io::Error),
    /// Two processes cannot talk.
    #[error("pipe: {0}")]
    Pipe(#[source] io::Error),
    /// There is nobody who would clear up.
    #[error("cannot leave a process behind to clear up: {0}")]
    Keeper(#[source] io::Error),
    /// Another process could not go on; its own words.
    #[error("{0}")]
    Inside(String),
    /// An argument cannot be passed on.
    #[error("an argument for the VMM contains a NUL")]
    Argument,
    /// The program needs files that are not in the jail.
    #[error(
        "{}: its dynamic linker is not in the jail; link it statically (RUSTFLAGS='-C target-feature=+crt-static')",
        .0.display()
    )]
    Dynamic(OsString),
    /// The program cannot be run.
    #[error("{}: cannot be run in the jail: {source}", path.display())]
    Exec {
        /// In the jail.
        path: OsString,
        /// Why not.
        source: io::Error,
    },
}
