//! Why an overlay cannot be used.

use std::io;
use std::path::{Path, PathBuf};

use lepton_hostio::file::DiskOpenError;

use super::format::{HeaderError, MAX_DISK, MAX_LAYERS};

/// Why an overlay cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// A file cannot be opened.
    #[error(transparent)]
    Open(#[from] DiskOpenError),
    /// A file is no overlay.
    #[error("{}: {source}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: HeaderError,
    },
    /// A file was cut or grew.
    #[error("{} has {found} bytes, not the {wanted} that its header tells", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// What it has to be.
        wanted: u64,
    },
    /// It is for a disk of another size.
    #[error("{} is for a disk of {bytes} bytes; the base has {base}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Bytes of its disk.
        bytes: u64,
        /// Bytes of the base.
        base: u64,
    },
    /// The base is too large.
    #[error("{} is larger than {MAX_DISK} bytes", .0.display())]
    BaseSize(PathBuf),
    /// The base is not what it was when the overlay was made.
    #[error(
        "{} was written since {} was made over it, which now makes no sense any more. If the content is the same \
         (a copy): lepton-vmm overlay rebase --same-content",
        base.display(), path.display()
    )]
    BaseChanged {
        /// The overlay.
        path: PathBuf,
        /// The base.
        base: PathBuf,
    },
    /// A layer was expected.
    #[error(
        "{} is not a layer, which is never written again: lepton-vmm overlay freeze makes it one",
        .0.display()
    )]
    NotALayer(PathBuf),
    /// A layer has no owner who writes it.
    #[error(
        "{} is a layer, over which other overlays may lie: it cannot be written. Name it in overlay.layers",
        .0.display()
    )]
    IsALayer(PathBuf),
    /// Layers are missing, or too many are given.
    #[error("{} lies over {wanted} layers; {given} are given", path.display())]
    LayerCount {
        /// The file.
        path: PathBuf,
        /// Layers it has below it.
        wanted: u8,
        /// Layers given.
        given: usize,
    },
    /// Another layer is below.
    #[error("{} lies over another layer than the one given below it", .0.display())]
    OtherLayer(PathBuf),
    /// Too many layers.
    #[error(
        "{0} layers are more than {MAX_LAYERS}: lepton-vmm overlay rebase puts them into one base"
    )]
    TooManyLayers(usize),
    /// Somebody else has it.
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// A commit was interrupted.
    #[error(
        "{} was being committed when that ended before its time: run lepton-vmm overlay commit again",
        .0.display()
    )]
    Committing(PathBuf),
    /// An overlay is a regular file.
    #[error("{} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// The map and a layer do not agree.
    #[error("{}: layer {layer} does not have cluster {cluster}, as the map says", path.display())]
    Map {
        /// The overlay.
        path: PathBuf,
        /// The cluster.
        cluster: u64,
        /// The layer.
        layer: u8,
    },
    /// Only what lies right over its base can be put into it.
    #[error(
        "{} lies over layers, which others may share: lepton-vmm overlay rebase puts it over an image of its own first",
        .0.display()
    )]
    HasLayers(PathBuf),
    /// There is something already.
    #[error("{} is there already", .0.display())]
    Exists(PathBuf),
    /// Another file has its name.
    #[error("{} is not the file any more that is open: it was moved or replaced", .0.display())]
    Moved(PathBuf),
    /// The host failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
}

impl OverlayError {
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        OverlayError::Io { path, source }
    }
}
