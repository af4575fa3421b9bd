//! Why there is no VMM in a jail.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use lepton_hostio::listener::BindError;
use lepton_hostio::tap::TapError;

use crate::cgroup::CgroupError;
use crate::folder::FolderError;
use crate::limits::LimitError;
use crate::privileges::PrivilegeError;
use crate::root::RootError;
use crate::tree::ProgramError;
use crate::user::MapError;

/// Why a pool has no socket.
#[derive(Debug, thiserror::Error)]
pub enum PoolSocketError {
    /// Its folder cannot be opened, or something else stands in its place.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// It cannot be made.
    #[error("{}", because(.0))]
    Bind(#[from] BindError),
}

/// The reason alone: the path that it is about is one of this process's own.
fn because(error: &BindError) -> String {
    match error {
        BindError::Exists(_) => "the path exists already".to_owned(),
        BindError::Locked(_) => {
            "the path exists already, and its folder is locked (flock) by another process"
                .to_owned()
        }
        BindError::Path(_) => "not a path a Unix socket can have".to_owned(),
        BindError::Io { source, .. } => source.to_string(),
    }
}

/// Whatever keeps the VMM from running; nothing that was made is left then.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Root has to say who the VMM is to be.
    #[error(
        "--{0} is missing: when root starts a jail, the VMM runs as the user --uid and the group --gid"
    )]
    NoOwner(&'static str),
    /// Nobody else can.
    #[error(
        "--{0}: without root the VMM runs as you, {1}; leave --{0} out, or start the jailer as root"
    )]
    AnotherOwner(&'static str, u32),
    /// Joining a network takes privileges in it.
    #[error("--netns needs root; without, hand the VMM a tap: --tap NAME")]
    NetnsWithoutRoot,
    /// There is no room behind the id for a number.
    #[error("--pool: --id {0}: too long to have a number behind it")]
    PoolId(String),
    /// The pool's socket cannot be made.
    #[error("--pool {}: {source}", path.display())]
    PoolSocket {
        /// As given.
        path: PathBuf,
        /// Why not.
        source: PoolSocketError,
    },
    /// The pool cannot go on.
    #[error("--pool: {0}")]
    Pool(#[source] io::Error),
    /// No VMM starts.
    #[error("--pool: {0} VMMs have ended before they were ready, one after the other")]
    PoolFails(u32),
    /// There is no place for a user's jails.
    #[error("XDG_RUNTIME_DIR is not set; name a folder of yours: --chroot-base-dir PATH")]
    NoBase,
    /// /dev/kvm is not for this user.
    #[error(
        "/dev/kvm: {0}; try: sudo usermod -aG kvm $(id -un), or hand a descriptor in: --kvm-fd NUMBER"
    )]
    Kvm(#[source] io::Error),
    /// There is no such inherited descriptor.
    #[error("{option} {number}: {source}; a shell opens one for the jailer by {number}<>FILE")]
    Descriptor {
        /// The option.
        option: &'static str,
        /// What it was given.
        number: i32,
        /// Why not.
        source: io::Error,
    },
    /// See [`TapError`].
    #[error("--tap: {0}")]
    Tap(#[source] TapError),
    /// A user namespace cannot be set up.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The kernel has no namespaces for this user.
    #[error(
        "cannot make namespaces: {0}; see user.max_user_namespaces and kernel.unprivileged_userns_clone (sysctl), or start \
         the jailer as root"
    )]
    Namespaces(#[source] io::Error),
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
