//! The command line: Firecracker's options, so that what starts it starts this.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use clap::Parser;
use lepton_api::types::{HugePages, LogLevel};

use crate::memory::MemorySize;

/// Where the API listens if nothing is said.
pub const DEFAULT_API_SOCKET: &str = "/run/firecracker.socket";
/// A machine's id if nothing is said.
pub const DEFAULT_ID: &str = "anonymous-instance";
/// Most bytes of a request's body if nothing is said.
pub const DEFAULT_MAX_PAYLOAD: usize = 51_200;
const MAX_ID: usize = 64;

/// Runs one virtual machine.
#[derive(Debug, Parser)]
#[command(name = "lepton-vmm", version, disable_help_subcommand = true)]
pub struct Cli {
    /// Unix socket on which the API listens [default: /run/firecracker.socket].
    #[arg(long, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,

    /// The machine's id: 1 to 64 letters, digits and hyphens [default: anonymous-instance].
    #[arg(long, value_parser = parse_id)]
    pub id: Option<String>,

    /// JSON file with the machine's configuration. The machine is started at once.
    #[arg(long, value_name = "PATH")]
    pub config_file: Option<PathBuf>,

    /// Do not listen for API requests.
    #[arg(long, requires = "config_file")]
    pub no_api: bool,

    /// Give the guest a register to tell that it has booted; the log then says how long it took.
    #[arg(long)]
    pub boot_timer: bool,

    /// File or named pipe for the log instead of the standard output.
    #[arg(long, value_name = "PATH")]
    pub log_path: Option<PathBuf>,

    /// Least severe level that is logged: Off, Error, Warn, Info, Debug or Trace.
    #[arg(long)]
    pub level: Option<LogLevel>,

    /// Log each line's level.
    #[arg(long)]
    pub show_level: bool,

    /// Log each line's file and line number.
    #[arg(long)]
    pub show_log_origin: bool,

    /// Log only what comes from modules with this prefix.
    #[arg(long, value_name = "PREFIX")]
    pub module: Option<String>,

    /// File or named pipe for the metrics, one line of JSON each time.
    #[arg(long, value_name = "PATH")]
    pub metrics_path: Option<PathBuf>,

    /// JSON file of seccomp filters to use instead of the built-in ones.
    #[arg(long, value_name = "PATH", conflicts_with = "no_seccomp")]
    pub seccomp_filter: Option<PathBuf>,

    /// Run without seccomp filters. Not for production.
    #[arg(long)]
    pub no_seccomp: bool,

    /// Run with all files in reach, as on a kernel without Landlock. Not for production.
    #[arg(long, conflicts_with = "allow_path")]
    pub no_landlock: bool,

    /// Folder or file that requests may name once the machine was started; nothing else is then in reach but the folders
    /// of drives. May be repeated [default: /, and nothing with --no-api].
    #[arg(long, value_name = "PATH")]
    pub allow_path: Vec<PathBuf>,

    /// Most bytes of an API request's body [default: 51200].
    #[arg(long, value_name = "BYTES")]
    pub http_api_max_payload_size: Option<usize>,

    /// Inherited descriptor of /dev/kvm, which is not opened then.
    #[arg(long, value_name = "NUMBER", value_parser = parse_descriptor)]
    pub kvm_fd: Option<RawFd>,

    /// Inherited descriptor of a tap, which is used for the host_dev_name that is the tap's name. May be repeated.
    #[arg(long, value_name = "NUMBER", value_parser = parse_descriptor)]
    pub tap_fd: Vec<RawFd>,

    /// Inherited descriptor of this process's folder in /proc, where there is none in a jail. It is closed before anything
    /// else is done; what stays open tells which pages of memory were written.
    #[arg(long, value_name = "NUMBER", value_parser = parse_descriptor)]
    pub proc_fd: Option<RawFd>,

    /// Unix socket on which this process waits to become a copy of a machine that another one clones.
    #[arg(long, value_name = "PATH", conflicts_with = "config_file")]
    pub adopt: Option<PathBuf>,

    /// The same by an inherited descriptor of a connected socket (SOCK_SEQPACKET).
    #[arg(long, value_name = "NUMBER", value_parser = parse_descriptor, conflicts_with_all = ["adopt", "config_file"])]
    pub adopt_fd: Option<RawFd>,

    /// Memory of the machine that this process will get by a clone or by PUT /snapshot/load, in MiB. What takes longest of
    /// getting one is then done ahead; a machine of another size is taken as without it.
    #[arg(long, value_name = "MIB", value_parser = parse_memory, alias = "adopt-mem-mib", conflicts_with = "config_file")]
    pub expect_mem_mib: Option<MemorySize>,

    /// State file of a saved machine that this process keeps to be cloned, and does not run.
    #[arg(
        long,
        value_name = "PATH",
        requires = "template_memory",
        conflicts_with_all = ["config_file", "no_api", "adopt", "adopt_fd", "expect_mem_mib", "boot_timer", "kvm_fd", "tap_fd"]
    )]
    pub template: Option<PathBuf>,

    /// Memory file of the machine that --template names.
    #[arg(long, value_name = "PATH", requires = "template")]
    pub template_memory: Option<PathBuf>,

    /// Wall clock in microseconds when this process was started, for the metrics.
    #[arg(long, value_name = "MICROSECONDS")]
    pub start_time_us: Option<u64>,

    /// CPU clock in microseconds when this process was started, for the metrics.
    #[arg(long, value_name = "MICROSECONDS")]
    pub start_time_cpu_us: Option<u64>,

    /// CPU microseconds that the parent spent for this process, for the metrics.
    #[arg(long, value_name = "MICROSECONDS")]
    pub parent_cpu_time_us: Option<u64>,
}

/// The standard streams are no devices.
fn parse_descriptor(text: &str) -> Result<RawFd, String> {
    match text.parse() {
        Ok(number @ 3..) => Ok(number),
        _ => Err("a number from 3 up is wanted".into()),
    }
}

fn parse_memory(text: &str) -> Result<MemorySize, String> {
    let mib = text.parse().map_err(|_| "a number of MiB is wanted")?;
    MemorySize::new(mib, HugePages::None).map_err(|error| error.to_string())
}

// clap parses a default as if it had been typed, which costs as much as all the options of a usual command line. So the
// three defaults are given here instead.
impl Cli {
    /// Where requests may open files after the start.
    pub fn allowed_paths(&self) -> Vec<PathBuf> {
        match self.allow_path.as_slice() {
            // There are no requests.
            [] if self.no_api => Vec::new(),
            // Clients of Firecracker save machines wherever they like.
            [] => vec!["/".into()],
            paths => paths.to_vec(),
        }
    }

    /// Where the API listens.
    pub fn api_socket(&self) -> &Path {
        self.api_sock
            .as_deref()
            .unwrap_or(Path::new(DEFAULT_API_SOCKET))
    }

    /// The machine's id.
    pub fn id(&self) -> &str {
        self.id.as_deref().unwrap_or(DEFAULT_ID)
    }

    /// Most bytes of an API request's body.
    pub fn max_payload(&self) -> usize {
        self.http_api_max_payload_size
            .unwrap_or(DEFAULT_MAX_PAYLOAD)
    }
}

pub(crate) fn parse_id(id: &str) -> Result<String, String> {
    let fits = (1..=MAX_ID).contains(&id.len());
    if fits && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        Ok(id.to_owned())
    } else {
        Err(format!(
            "an id has 1 to {MAX_ID} letters, digits and hyphens"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["lepton-vmm"], args].concat())
    }

    #[test]
    fn without_an_api_nothing_is_in_reach_for_requests() {
        let allowed = |arguments: &[&str]| parse(arguments).unwrap().allowed_paths();
        let alone = ["--no-api", "--config-file", "x"];
        assert_eq!(allowed(&[]), [PathBuf::from("/")]);
        assert!(allowed(&alone).is_empty());
        let named = [&alone[..], &["--allow-path", "/tmp"]].concat();
        assert_eq!(allowed(&named), [PathBuf::from("/tmp")]);
    }

    #[test]
    fn what_clients_pass_is_understood() {
        let cli = parse(&[
            "--api-sock",
            "/tmp/a.sock",
            "--id",
            "vm-1",
            "--level",
            "warning",
            "--start-time-us",
            "12",
            "--no-seccomp",
        ])
        .unwrap();
        assert_eq!(cli.level, Some(LogLevel::Warn));
        assert_eq!(cli.start_time_us, Some(12));
        assert!(parse(&["--config-file", "x", "--no-api"]).is_ok());
    }

    #[test]
    fn the_defaults_are_what_the_help_says() {
        let cli = parse(&[]).unwrap();
        let help = <Cli as clap::CommandFactory>::command()
            .render_long_help()
            .to_string();
        let socket = cli.api_socket().display().to_string();
        for default in [&socket, cli.id(), &cli.max_payload().to_string()] {
            assert!(help.contains(&format!("[default: {default}]")), "{help}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for bad in [
            &["--id", ""][..],
            &["--id", "a/b"],
            &["--id", &"a".repeat(65)],
            &["--no-api"],
            &["--level", "loud"],
            &["--seccomp-filter", "x", "--no-seccomp"],
            &["--http-api-max-payload-size", "-1"],
            &["--kvm-fd", "2"],
            &["--tap-fd", "tap0"],
            &["--expect-mem-mib", "0"],
            &["--expect-mem-mib", "1048577"],
            &["--expect-mem-mib", "128M"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
