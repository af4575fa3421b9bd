//! The command line: that of Firecracker's jailer, and a few options more.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Parser;
use rustix::fs::{Gid, Uid};

use crate::cgroup::{Parent, Setting, Version};
use crate::limits::Limit;

/// Where jails are if nothing is said, for root.
pub const DEFAULT_BASE: &str = "/srv/jailer";
const MAX_ID: usize = 64;

/// Starts lepton-vmm in a jail: a root directory of its own, no privileges, limited resources.
///
/// As root, the VMM becomes the user and group given. As anybody else, it stays who it is, in namespaces of its own.
#[derive(Debug, Clone, Parser)]
#[command(name = "lepton-jailer", version, disable_help_subcommand = true)]
pub struct Cli {
    /// The machine's id: 1 to 64 letters, digits and hyphens.
    #[arg(long, value_parser = parse_id)]
    pub id: String,

    /// The VMM's program, statically linked. The jail gets a copy.
    #[arg(long, value_name = "PATH")]
    pub exec_file: PathBuf,

    /// The user that the VMM runs as. Only root can choose, and must.
    #[arg(long, value_parser = parse_uid)]
    pub uid: Option<Uid>,

    /// The group that the VMM runs as. Only root can choose, and must.
    #[arg(long, value_parser = parse_gid)]
    pub gid: Option<Gid>,

    /// Folder of all jails; it must exist. For root it is /srv/jailer if nothing is said, for others
    /// $XDG_RUNTIME_DIR/jailer, which is made.
    #[arg(long, value_name = "PATH")]
    pub chroot_base_dir: Option<PathBuf>,

    /// Network namespace for the VMM, such as /run/netns/NAME. Needs root.
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,

    /// Detach from the terminal: a new session, and /dev/null for the standard streams.
    #[arg(long)]
    pub daemonize: bool,

    /// Run the VMM in a PID namespace of its own, and end once it runs.
    #[arg(long)]
    pub new_pid_ns: bool,

    /// A control group's file and its value, such as cpu.shares=10. May be repeated.
    #[arg(long, value_name = "FILE=VALUE")]
    pub cgroup: Vec<Setting>,

    /// Most bytes of a written file (fsize=BYTES), or one more than the highest file descriptor (no-file=NUMBER, 2048 if
    /// nothing is said). May be repeated.
    #[arg(long, value_name = "RESOURCE=NUMBER")]
    pub resource_limit: Vec<Limit>,

    /// Version of the control groups: 1 or 2.
    #[arg(long, default_value = "1")]
    pub cgroup_version: Version,

    /// The group in which the VMM's group is made; the program's name if nothing is said. With --cgroup-version 2 and
    /// no --cgroup: the group that the VMM joins, if it exists.
    #[arg(long, value_name = "PATH")]
    pub parent_cgroup: Option<Parent>,

    /// An inherited descriptor of /dev/kvm for the VMM. Without root there is no device node in the jail; unless this is
    /// given, /dev/kvm is opened for the VMM.
    #[arg(long, value_name = "NUMBER", value_parser = parse_descriptor)]
    pub kvm_fd: Option<RawFd>,

    /// An inherited descriptor of a tap for the VMM, which uses it for host_dev_name with the tap's name. May be repeated.
    #[arg(long, value_name = "NUMBER", value_parser = parse_descriptor)]
    pub tap_fd: Vec<RawFd>,

    /// A tap of this user's, to be opened here and handed to the VMM. May be repeated.
    #[arg(long, value_name = "NAME")]
    pub tap: Vec<String>,

    /// Jail VMMs ahead of time, with the number of each behind --id, and give them by a socket here to those who clone
    /// machines (PUT /clone with this pool). The socket belongs to --uid. An addition.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["daemonize", "tap", "tap_fd"])]
    pub pool: Option<PathBuf>,

    /// VMMs that wait in the pool, 0 to 1000 [default: 4]. With 0, each is started when it is asked for.
    #[arg(long, value_name = "NUMBER", requires = "pool", value_parser = clap::value_parser!(u16).range(..=1000))]
    pub pool_size: Option<u16>,

    /// VMMs that the pool starts at once, 1 to 1000 [default: 2].
    #[arg(long, value_name = "NUMBER", requires = "pool", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub pool_refill: Option<u16>,

    /// Arguments for the VMM.
    #[arg(last = true, value_name = "ARGUMENTS")]
    pub vmm: Vec<OsString>,
}

pub fn parse_id(id: &str) -> Result<String, String> {
    let fits = (1..=MAX_ID).contains(&id.len());
    if fits && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        return Ok(id.to_owned());
    }
    Err(format!(
        "an id has 1 to {MAX_ID} letters, digits and hyphens"
    ))
}

/// The highest number means "unchanged" to the kernel.
fn parse_number(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(number) if number != u32::MAX => Ok(number),
        _ => Err(format!("a number up to {} is wanted", u32::MAX - 1)),
    }
}

/// The standard streams are no devices.
fn parse_descriptor(text: &str) -> Result<RawFd, String> {
    match text.parse() {
        Ok(number @ 3..) => Ok(number),
        _ => Err("a number from 3 up is wanted".into()),
    }
}

fn parse_uid(text: &str) -> Result<Uid, String> {
    parse_number(text).map(Uid::from_raw)
}

fn parse_gid(text: &str) -> Result<Gid, String> {
    parse_number(text).map(Gid::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
        let needed = ["lepton-jailer", "--id", "a-1", "--exec-file", "/bin/vmm"];
        Cli::try_parse_from([&needed[..], arguments].concat())
    }

    #[test]
    fn what_scripts_for_the_peer_pass_is_understood() {
        let cli = parse(&[
            "--uid",
            "123",
            "--gid",
            "100",
            "--chroot-base-dir",
            "/srv/jailer",
            "--netns",
            "/var/run/netns/my_netns",
            "--daemonize",
            "--new-pid-ns",
            "--cgroup",
            "cpuset.mems=0",
            "--cgroup",
            "cpuset.cpus=0-1",
            "--cgroup-version",
            "1",
            "--parent-cgroup",
            "all/mine",
            "--resource-limit",
            "fsize=250000000",
            "--resource-limit",
            "no-file=1024",
            "--",
            "--config-file",
            "vm.json",
            "--",
            "--no-api",
        ])
        .unwrap();
        assert_eq!(cli.uid, Some(Uid::from_raw(123)));
        assert_eq!((cli.cgroup.len(), cli.resource_limit.len()), (2, 2));
        assert_eq!(cli.vmm, ["--config-file", "vm.json", "--", "--no-api"]);
        assert!(cli.daemonize && cli.new_pid_ns);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        let long = "a".repeat(65);
        for bad in [
            &["--uid", "-1"][..],
            &["--uid=-1"],
            &["--uid", "nobody"],
            &["--gid", "4294967295"],
            &["--gid", "4294967296"],
            &["--cgroup", "cpu.shares"],
            &["--cgroup-version", "3"],
            &["--parent-cgroup", "../up"],
            &["--resource-limit", "cores=1"],
            &["--kvm-fd", "2"],
            &["--tap-fd", "tap0"],
            &["--no-such-option"],
            &["config-file"],
        ] {
            let error = parse(bad).unwrap_err().to_string();
            assert!(
                error.contains(bad[bad.len() - 1].trim_start_matches("--uid=")),
                "{error}"
            );
        }
        for id in ["", "../x", "a/b", "a_b", ".", "\u{e9}", &long] {
            let bad = ["lepton-jailer", "--exec-file", "x", "--id", id];
            assert!(Cli::try_parse_from(bad).is_err(), "{id:?}");
        }
    }
}
