//! `lepton-vmm overlay ...`: what people do to overlays that no machine uses. Firecracker's command line has no
//! arguments without a name, so the word in the first place disturbs none of its options.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use lepton_devices::virtio::block::overlay::maintain::{self, Info};
use lepton_devices::virtio::block::overlay::{CLUSTER, Chain, Overlay, OverlayError, State};

/// The word that makes a command line one of these.
pub const WORD: &str = "overlay";

/// Makes, shows and changes overlays of drives. No machine may use them meanwhile.
#[derive(Debug, Parser)]
#[command(name = "lepton-vmm overlay", bin_name = "lepton-vmm overlay")]
pub struct OverlayCli {
    #[command(subcommand)]
    command: Command,
}

/// What an overlay lies over.
#[derive(Debug, Args)]
struct Below {
    /// The image at the bottom.
    #[arg(long, value_name = "IMAGE")]
    base: PathBuf,
    /// A frozen overlay between the image and this one, the lowest first. May be repeated.
    #[arg(long, value_name = "PATH")]
    layer: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make an empty overlay. A drive does that by itself if there is none.
    Create {
        /// The overlay.
        path: PathBuf,
        #[command(flatten)]
        below: Below,
    },
    /// Show what an overlay says of itself.
    Info {
        /// The overlay.
        path: PathBuf,
    },
    /// Read all of the disk, and check that overlay and layers agree.
    Check {
        /// The overlay.
        path: PathBuf,
        #[command(flatten)]
        below: Below,
    },
    /// Make an overlay a layer, over which any number of others can lie. It can never be written again.
    Freeze {
        /// The overlay.
        path: PathBuf,
    },
    /// Write an overlay into its base and empty it. All other overlays over that base are lost.
    Commit {
        /// The overlay.
        path: PathBuf,
        /// The image that it lies over.
        #[arg(long, value_name = "IMAGE")]
        base: PathBuf,
    },
    /// Lay an overlay over another image, so that the disk stays what it is.
    Rebase {
        /// The overlay.
        path: PathBuf,
        #[command(flatten)]
        below: Below,
        /// The other image. What is different there is copied into the overlay.
        #[arg(long, value_name = "IMAGE", required_unless_present = "same_content")]
        onto: Option<PathBuf>,
        /// The base has the content that it had when the overlay was made, though its time of last change is another:
        /// believe that.
        #[arg(long, conflicts_with_all = ["onto", "layer"])]
        same_content: bool,
    },
}

/// Does what the command line says. The text is for the standard output.
pub fn run(arguments: impl Iterator<Item = OsString>) -> Result<String, OverlayFailure> {
    let cli = OverlayCli::try_parse_from(arguments).map_err(OverlayFailure::Arguments)?;
    execute(cli.command).map_err(OverlayFailure::Overlay)
}

/// Why nothing, or not all, was done.
#[derive(Debug, thiserror::Error)]
pub enum OverlayFailure {
    /// The command line is not one, or asks for help.
    #[error(transparent)]
    Arguments(clap::Error),
    /// An overlay cannot be used.
    #[error(transparent)]
    Overlay(OverlayError),
}

fn execute(command: Command) -> Result<String, OverlayError> {
    let mut shown = Shown::new();
    let mut progress = |done, all| shown.tell(done, all);
    Ok(match command {
        Command::Create { path, below } => {
            if path.metadata().is_ok_and(|found| found.len() > 0) {
                return Err(OverlayError::Exists(path));
            }
            Overlay::open(open(&below)?, &path, false)?;
            String::new()
        }
        Command::Info { path } => shown_info(&path, &maintain::info(&path)?),
        Command::Check { path, below } => {
            let (own, others) = maintain::check(open(&below)?, &path, &mut progress)?;
            let mut text = format!("own clusters: {own}\n");
            for (layer, count) in others.iter().enumerate().rev() {
                text += &match layer {
                    0 => format!("clusters of the base: {count}\n"),
                    layer => format!("clusters of layer {layer}: {count}\n"),
                };
            }
            text
        }
        Command::Freeze { path } => {
            maintain::freeze(&path)?;
            String::new()
        }
        Command::Commit { path, base } => {
            let count = maintain::commit(&base, &path, &mut progress)?;
            format!("{} bytes written\n", count * CLUSTER)
        }
        Command::Rebase {
            path, below, onto, ..
        } => match onto {
            Some(onto) => {
                let count = maintain::rebase(open(&below)?, &path, &onto, &mut progress)?;
                format!("{} bytes copied up\n", count * CLUSTER)
            }
            None => {
                maintain::same_content(&below.base, &path)?;
                String::new()
            }
        },
    })
}

fn open(below: &Below) -> Result<Chain, OverlayError> {
    Chain::open(&below.base, &below.layer)
}

fn shown_info(path: &Path, info: &Info) -> String {
    let header = &info.header;
    let state = match header.state {
        State::Own => "a machine's own",
        State::Resetting => "being emptied",
        State::Layer => "a layer, never written again",
        State::Committing => "being committed: commit it again",
    };
    format!(
        "overlay: {}\nname: {}\nstate: {state}\ndisk: {} bytes\nclusters: {} of {CLUSTER} bytes\nroom on the host: {} \
         bytes\nlayers below: {}\n",
        path.display(),
        maintain::name(&header.id),
        header.geometry.size(),
        info.clusters,
        info.room,
        header.layers
    )
}

/// Progress, once the work takes longer than a moment.
struct Shown {
    last: Instant,
}

impl Shown {
    fn new() -> Self {
        Shown {
            last: Instant::now(),
        }
    }

    fn tell(&mut self, done: u64, all: u64) {
        if self.last.elapsed() >= Duration::from_secs(2) && all > 0 {
            self.last = Instant::now();
            eprintln!("{} %", u128::from(done) * 100 / u128::from(all));
        }
    }
}
