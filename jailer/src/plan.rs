//! All that can be found out before anything is made: what the command line names, opened and checked.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, fstatfs};

use crate::cgroup::{Parent, Plan as Cgroups, Wanted};
use crate::cli::{Cli, DEFAULT_BASE};
use crate::error::JailError;
use crate::folder::{Folder, Owner};
use crate::limits::Limit;
use crate::tree::Program;

/// statfs(2): the file system of namespaces.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// A request that is in order.
pub struct Plan {
    /// The machine's id.
    pub id: String,
    /// Folder of all jails.
    pub base: Folder,
    /// What is to run.
    pub program: Program,
    /// As whom.
    pub owner: Owner,
    /// In which network.
    pub netns: Option<OwnedFd>,
    /// In which groups.
    pub cgroups: Cgroups,
    /// With which limits.
    pub limits: Vec<Limit>,
    /// /dev/null, for the standard streams of a daemon.
    pub null: Option<File>,
    /// Whether it gets process ids of its own.
    pub new_pid_ns: bool,
    /// What it is told.
    pub arguments: Vec<OsString>,
}

impl Plan {
    /// Opens what `cli` names.
    pub fn open(cli: Cli) -> Result<Self, JailError> {
        let owner = Owner {
            uid: cli.uid.ok_or(JailError::NoOwner("uid"))?,
            gid: cli.gid.ok_or(JailError::NoOwner("gid"))?,
        };
        let program = Program::open(&cli.exec_file)?;
        let base = cli
            .chroot_base_dir
            .unwrap_or_else(|| PathBuf::from(DEFAULT_BASE));
        let base = Folder::open(&base).map_err(|error| JailError::Base(error, base))?;
        let netns = cli.netns.as_deref().map(open_netns).transpose()?;
        let parent = cli.parent_cgroup;
        let cgroups = Cgroups::open(Wanted {
            version: cli.cgroup_version,
            parent: parent.unwrap_or_else(|| Parent::of_program(program.name())),
            settings: cli.cgroup,
        })?;
        let open_null = || File::options().read(true).write(true).open("/dev/null");
        let null = cli.daemonize.then(open_null).transpose();
        Ok(Self {
            id: cli.id,
            base,
            program,
            owner,
            netns,
            cgroups,
            limits: cli.resource_limit,
            null: null.map_err(JailError::Null)?,
            new_pid_ns: cli.new_pid_ns,
            arguments: cli.vmm,
        })
    }
}

fn open_netns(path: &Path) -> Result<OwnedFd, JailError> {
    let failed = |error: rustix::io::Errno| JailError::Netns {
        path: path.to_owned(),
        source: error.into(),
    };
    // A named pipe must not hold us up.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
    if fstatfs(&fd).map_err(failed)?.f_type != NSFS_MAGIC {
        return Err(JailError::NotANamespace(path.to_owned()));
    }
    Ok(fd)
}
