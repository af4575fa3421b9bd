//! All that can be found out before anything is made: what the command line names, opened and checked.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use lepton_hostio::inherited;
use lepton_hostio::tap::Tap;
use rustix::fs::{Gid, Mode, OFlags, Uid, fstatfs};
use rustix::process::{getegid, geteuid};

use crate::cgroup::{Parent, Plan as Cgroups, Wanted};
use crate::cli::{Cli, DEFAULT_BASE};
use crate::error::JailError;
use crate::folder::{Folder, Made, Owner};
use crate::keeper::Fate;
use crate::limits::Limit;
use crate::tree::{Program, Spare};

/// statfs(2): the file system of namespaces.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Who makes the jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Maker {
    /// Root, who may do everything and gives it up.
    Root,
    /// Somebody else, who gets namespaces of its own.
    User,
}

/// A descriptor that the VMM is to have.
pub struct Handed {
    /// The VMM's option for it.
    pub option: &'static str,
    /// The descriptor.
    pub fd: OwnedFd,
}

/// A request that is in order.
pub struct Plan {
    /// The machine's id.
    pub id: String,
    /// Folder of all jails.
    pub base: Folder,
    /// What is to run.
    pub program: Program,
    /// By whom the jail is made.
    pub maker: Maker,
    /// As whom.
    pub owner: Owner,
    /// What the VMM gets beside the standard streams.
    pub handed: Vec<Handed>,
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
    /// For a VMM of a pool: what tells whether it has become a machine.
    pub fate: Option<Fate>,
    /// A copy of the program that was written ahead.
    pub spare: Option<Spare>,
}

impl Plan {
    /// Opens what `cli` names. `handed` has what [`inherited`] took.
    pub fn open(cli: Cli, mut handed: Vec<Handed>) -> Result<Self, JailError> {
        let maker = if geteuid().is_root() {
            Maker::Root
        } else {
            Maker::User
        };
        let owner = owner(maker, cli.uid, cli.gid)?;
        if let (Maker::User, Some(_)) = (maker, &cli.netns) {
            return Err(JailError::NetnsWithoutRoot);
        }
        let program = Program::open(&cli.exec_file)?;
        let base = match (cli.chroot_base_dir, maker) {
            (Some(path), _) => named_base(path)?,
            (None, Maker::Root) => named_base(PathBuf::from(DEFAULT_BASE))?,
            (None, Maker::User) => users_base()?,
        };
        open_devices(maker, &cli.tap, &mut handed)?;
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
            maker,
            owner,
            handed,
            netns,
            cgroups,
            limits: cli.resource_limit,
            null: null.map_err(JailError::Null)?,
            new_pid_ns: cli.new_pid_ns,
            arguments: cli.vmm,
            fate: None,
            spare: None,
        })
    }
}

fn owner(maker: Maker, uid: Option<Uid>, gid: Option<Gid>) -> Result<Owner, JailError> {
    if maker == Maker::Root {
        return Ok(Owner {
            uid: uid.ok_or(JailError::NoOwner("uid"))?,
            gid: gid.ok_or(JailError::NoOwner("gid"))?,
        });
    }
    let own = Owner {
        uid: geteuid(),
        gid: getegid(),
    };
    if uid.is_some_and(|uid| uid != own.uid) {
        return Err(JailError::AnotherOwner("uid", own.uid.as_raw()));
    }
    if gid.is_some_and(|gid| gid != own.gid) {
        return Err(JailError::AnotherOwner("gid", own.gid.as_raw()));
    }
    Ok(own)
}

/// The folder of a user's jails, which is made if it is not there.
fn users_base() -> Result<Folder, JailError> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty());
    let runtime = named_base(PathBuf::from(runtime.ok_or(JailError::NoBase)?))?;
    let mut made = Made::default();
    let base = runtime.enter_or_make(OsStr::new("jailer"), 0o755, &mut made);
    let path = || runtime.path().join("jailer");
    let base = base.map_err(|error| JailError::Base(error, path()))?;
    // Other jails of this user's may be in it by now.
    made.keep();
    Ok(base)
}

fn named_base(path: PathBuf) -> Result<Folder, JailError> {
    Folder::open(&path).map_err(|error| JailError::Base(error, path))
}

const KVM: &str = "--kvm-fd";
const TAP: &str = "--tap-fd";
/// The VMM's option for its folder in /proc.
pub const PROC: &str = "--proc-fd";
/// The VMM's option for the connection over which it becomes a machine.
pub const ADOPT: &str = "--adopt-fd";

/// Takes the descriptors that the command line names, under other numbers: the old ones can be closed.
pub fn inherited(kvm: Option<RawFd>, taps: &[RawFd]) -> Result<Vec<Handed>, JailError> {
    let kvm = kvm.iter().map(|number| (KVM, number));
    kvm.chain(taps.iter().map(|number| (TAP, number)))
        .map(|(option, &number)| match inherited::duplicate(number) {
            Ok(fd) => Ok(Handed { option, fd }),
            Err(source) => Err(JailError::Descriptor {
                option,
                number,
                source,
            }),
        })
        .collect()
}

/// Opens what else the VMM is to have: /dev/kvm if its jail has none, and taps by name.
fn open_devices(maker: Maker, taps: &[String], handed: &mut Vec<Handed>) -> Result<(), JailError> {
    let has_kvm = handed.iter().any(|handed| handed.option == KVM);
    if maker == Maker::User && !has_kvm {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/dev/kvm", flags, Mode::empty());
        let fd = fd.map_err(|error| JailError::Kvm(error.into()))?;
        handed.push(Handed { option: KVM, fd });
    }
    for name in taps {
        let tap = Tap::open(name).map_err(JailError::Tap)?;
        let fd = tap.as_fd().try_clone_to_owned();
        let fd = fd.map_err(JailError::Inherited)?;
        handed.push(Handed { option: TAP, fd });
    }
    Ok(())
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
