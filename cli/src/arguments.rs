//! What a person types, parsed into what can be done.

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, value_parser};

/// Runs commands in microVMs
#[derive(Debug, Parser)]
#[command(name = "lepton", version)]
pub struct Arguments {
    #[command(subcommand)]
    pub subcommand: Subcommand,
}

#[derive(Debug, clap::Subcommand)]
pub enum Subcommand {
    /// Boot a microVM, run a command in it, shut it down
    Run(Run),
    /// Run a command in a microVM that runs already
    Exec(Exec),
}

#[derive(Debug, Args)]
pub struct Run {
    /// The VMM: the program lepton-vmm
    #[arg(long, value_name = "PATH")]
    pub vmm: PathBuf,
    /// The guest's kernel: a vmlinux or bzImage
    #[arg(long, value_name = "PATH")]
    pub kernel: PathBuf,
    /// The guest's root file system, attached read-only
    #[arg(long, value_name = "PATH")]
    pub image: PathBuf,
    /// The guest's memory, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = value_parser!(u32).range(1..))]
    pub memory: u32,
    /// The guest's processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u8).range(1..=32))]
    pub vcpus: u8,
    #[command(flatten)]
    pub network: Network,
    /// Show the guest's serial console on standard error, with all that its kernel says
    #[arg(long)]
    pub console: bool,
    /// Keep what the guest's serial console says in this file
    #[arg(long, value_name = "PATH", conflicts_with = "console")]
    pub console_log: Option<PathBuf>,
    /// More parameters for the guest's kernel
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub boot_args: String,
    /// How long the guest may take to boot, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    /// Do not print the boot time
    #[arg(long, short)]
    pub quiet: bool,
    /// Try even where KVM is emulated or seems to be missing
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct Network {
    /// Give the guest an interface, eth0, on this tap device of the host
    #[arg(long, value_name = "NAME")]
    pub tap: Option<String>,
    /// The guest's address on it, such as 172.16.0.2/24
    #[arg(long, value_name = "ADDRESS/PREFIX", requires = "tap")]
    pub ip: Option<Cidr>,
    /// The router the guest is to use
    #[arg(long, value_name = "ADDRESS", requires = "ip")]
    pub gateway: Option<Ipv4Addr>,
    /// The name server the guest is to use
    #[arg(long, value_name = "ADDRESS", requires = "ip")]
    pub dns: Option<Ipv4Addr>,
}

#[derive(Debug, Args)]
pub struct Exec {
    /// The VMM's vsock socket, its uds_path
    #[arg(long, value_name = "UDS_PATH")]
    pub vsock: PathBuf,
    #[command(flatten)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct Command {
    /// Add to the command's environment; may be given several times
    #[arg(long = "env", short = 'e', value_name = "KEY=VALUE", value_parser = ParseVariable)]
    pub environment: Vec<(OsString, OsString)>,
    /// The user in the guest, by name or number
    #[arg(long, short, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// The directory in the guest
    #[arg(long, short, value_name = "PATH")]
    pub workdir: Option<OsString>,
    /// The command and its arguments; a login shell if there is none
    #[arg(last = true, value_name = "COMMAND")]
    pub argv: Vec<OsString>,
}

/// `KEY=VALUE`, of any bytes.
#[derive(Clone)]
struct ParseVariable;

impl clap::builder::TypedValueParser for ParseVariable {
    type Value = (OsString, OsString);

    fn parse_ref(
        &self,
        command: &clap::Command,
        _argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<Self::Value, clap::Error> {
        variable(value).ok_or_else(|| {
            let text = format!("--env {value:?}: type KEY=VALUE, such as --env LANG=C\n");
            clap::Error::raw(clap::error::ErrorKind::ValueValidation, text).with_cmd(command)
        })
    }
}

fn variable(text: &OsStr) -> Option<(OsString, OsString)> {
    let bytes = text.as_bytes();
    let equals = bytes.iter().position(|&byte| byte == b'=')?;
    let (key, value) = bytes.split_at(equals);
    let owned = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    (!key.is_empty()).then(|| (owned(key), owned(value.get(1..).unwrap_or_default())))
}

/// An IPv4 address and the length of its network's prefix, 0 to 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    pub address: Ipv4Addr,
    prefix: u8,
}

impl Cidr {
    /// The network's mask.
    pub fn netmask(self) -> Ipv4Addr {
        let host_bits = 32 - u32::from(self.prefix);
        Ipv4Addr::from_bits(u32::MAX.checked_shl(host_bits).unwrap_or(0))
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split_once('/')
            .and_then(|(address, prefix)| {
                Some(Self {
                    address: address.parse().ok()?,
                    prefix: prefix.parse().ok().filter(|prefix| *prefix <= 32)?,
                })
            })
            .ok_or_else(|| "type ADDRESS/PREFIX, such as 172.16.0.2/24".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Subcommand, String> {
        Arguments::try_parse_from(words)
            .map(|arguments| arguments.subcommand)
            .map_err(|error| error.to_string())
    }

    const RUN: [&str; 8] = [
        "lepton", "run", "--vmm", "v", "--kernel", "k", "--image", "i",
    ];

    fn run(more: &[&str]) -> Result<Run, String> {
        match parse(&[&RUN, more].concat())? {
            Subcommand::Run(run) => Ok(run),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_holds_together() {
        <Arguments as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn the_command_is_taken_as_it_is() {
        let run = run(&["--env", "A=b=c", "-e", "B=", "--", "ls", "--memory", "-x"]).unwrap();
        assert_eq!(run.command.argv, ["ls", "--memory", "-x"]);
        assert_eq!(
            run.command.environment,
            [("A".into(), "b=c".into()), ("B".into(), OsString::from(""))]
        );
        assert_eq!((run.memory, run.vcpus), (256, 1));
    }

    #[test]
    fn impossible_values_are_named() {
        for (words, text) in [
            (&["--memory", "0"][..], "--memory"),
            (&["--memory", "9999999999999"], "9999999999999"),
            (&["--vcpus", "33"], "33"),
            (&["--env", "novalue"], "novalue"),
            (&["--env", "=x"], "=x"),
            (&["--tap", "t", "--ip", "1.2.3.4"], "ADDRESS/PREFIX"),
            (&["--tap", "t", "--ip", "1.2.3.4/33"], "1.2.3.4/33"),
            (&["--ip", "1.2.3.4/24"], "--tap"),
            (&["--timeout", "0"], "--timeout"),
        ] {
            let error = run(words).unwrap_err();
            assert!(error.contains(text), "{words:?}: {error}");
        }
    }

    #[test]
    fn netmasks() {
        for (cidr, mask) in [
            ("10.0.0.1/24", "255.255.255.0"),
            ("10.0.0.1/0", "0.0.0.0"),
            ("10.0.0.1/32", "255.255.255.255"),
            ("10.0.0.1/30", "255.255.255.252"),
        ] {
            assert_eq!(cidr.parse::<Cidr>().unwrap().netmask().to_string(), mask);
        }
    }
}
