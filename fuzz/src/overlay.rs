//! An overlay's file, in which anybody may have changed anything. The model of the disk is its bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use arbitrary::{Arbitrary, Unstructured};
use lepton_devices::virtio::block::overlay::{Chain, HEADER_SIZE, Header, Overlay, maintain};

use crate::scratch;

const SECTOR: u64 = 512;
/// Clusters of 4 KiB: 37 and a half.
const BYTES: u64 = 37 * 4096 + 2048;
/// Where things are (see `format.rs`), for a disk of this size.
const BITMAP: u64 = 4096;
const MAP: u64 = 8192;
const DATA: u64 = 1 << 20;
const BASE: u8 = 0xbb;
const MAX_STEPS: usize = 60;

/// Where a file is changed.
#[derive(Arbitrary, Debug)]
enum Place {
    Header(u16),
    Bitmap(u8),
    Map(u8),
    Data(u32),
    Any(u32),
}

impl Place {
    fn offset(&self) -> u64 {
        match *self {
            Place::Header(at) => u64::from(at) % HEADER_SIZE as u64,
            Place::Bitmap(at) => BITMAP + u64::from(at),
            Place::Map(at) => MAP + u64::from(at),
            Place::Data(at) => DATA + u64::from(at) % BYTES,
            Place::Any(at) => u64::from(at) % (DATA + BYTES),
        }
    }
}

#[derive(Arbitrary, Debug)]
struct Files<'a> {
    layers: u8,
    /// Which file, where, with what.
    changes: Vec<(u8, Place, &'a [u8])>,
    /// Bytes, where there is to be no more.
    cut: Option<(u8, u32)>,
    is_read_only: bool,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Write(u16, u16, u8),
    Read(u16, u16),
    Flush,
    Reset,
    Freeze,
    WriteThrough,
}

/// Makes an overlay over layers over a base, changes their files, and uses what is left.
pub fn overlay(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(files) = Files::arbitrary(&mut input) else {
        return;
    };
    let folder = scratch::folder();
    let base = folder.path().join("base");
    std::fs::write(&base, vec![BASE; BYTES as usize]).expect("memory");
    let paths = make(folder.path(), &base, usize::from(files.layers % 3));
    change(&files, &paths);
    let Some((path, layers)) = paths.split_last() else {
        return;
    };
    let mut progress = |_, _| {};
    drop(maintain::info(path));
    if let Ok(chain) = Chain::open(&base, layers) {
        drop(maintain::check(chain, path, &mut progress));
    }
    let opened =
        Chain::open(&base, layers).and_then(|chain| Overlay::open(chain, path, files.is_read_only));
    let overlay = match opened {
        Ok(overlay) => overlay,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    run(overlay, &mut input, folder.path());
    let whole = std::fs::read(&base).expect("the base");
    assert!(whole == vec![BASE; BYTES as usize], "the base was written");
}

/// An overlay and the layers below it, the lowest first, each with something in it.
fn make(folder: &Path, base: &Path, layers: usize) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for number in 0..=layers {
        let path = folder.join(number.to_string());
        let chain = Chain::open(base, &paths).expect("layers");
        let mut overlay = Overlay::open(chain, &path, false).expect("an overlay");
        for cluster in [number as u64, 9, 20 + 3 * number as u64] {
            let bytes = [number as u8; 4096];
            overlay.write_bytes(&bytes, cluster * 4096).expect("memory");
        }
        overlay.flush().expect("memory");
        drop(overlay);
        if number < layers {
            maintain::freeze(&path).expect("a layer");
        }
        paths.push(path);
    }
    paths
}

fn change(files: &Files<'_>, paths: &[PathBuf]) {
    let open = |which: u8| {
        let path = &paths[usize::from(which) % paths.len()];
        File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("a file")
    };
    for (which, place, bytes) in &files.changes {
        open(*which)
            .write_all_at(bytes, place.offset())
            .expect("memory");
    }
    if let Some((which, length)) = files.cut {
        let length = u64::from(length) % (DATA + BYTES + 4096);
        open(which).set_len(length).expect("memory");
    }
    for path in paths {
        let mut bytes = [0; HEADER_SIZE];
        let file = File::open(path).expect("a file");
        // A header that is taken says exactly what its bytes say.
        if file.read_exact_at(&mut bytes, 0).is_ok()
            && let Ok(header) = Header::try_from(&bytes)
        {
            assert_eq!(header.to_bytes(), bytes);
        }
    }
}

/// Steps on an overlay that was opened, until the first that fails.
fn run(mut overlay: Overlay, input: &mut Unstructured<'_>, folder: &Path) {
    let size = overlay.geometry().size();
    assert_eq!(size, BYTES);
    let mut disk = vec![0; size as usize];
    if overlay.read_bytes(&mut disk, 0).is_err() {
        return;
    }
    // What a reset goes back to is what is below, which was not looked at.
    let is_read_only = overlay.disk().read_only();
    for number in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(input) else {
            break;
        };
        let done = match step {
            Step::Write(at, len, value) if !is_read_only => {
                let (at, len) = range(at, len);
                let bytes = vec![value; len];
                let done = overlay.write_bytes(&bytes, at as u64);
                if done.is_ok() {
                    disk[at..at + len].fill(value);
                }
                done
            }
            Step::Read(at, len) => {
                let (at, len) = range(at, len);
                let mut bytes = vec![0; len];
                let done = overlay.read_bytes(&mut bytes, at as u64);
                assert!(
                    done.is_err() || bytes == disk[at..at + len],
                    "bytes at {at}"
                );
                done
            }
            Step::Flush if !is_read_only => overlay.flush(),
            Step::Reset if !is_read_only => {
                let done = overlay.reset();
                assert!(done.is_err() || overlay.own_clusters() == 0);
                done.and_then(|()| overlay.read_bytes(&mut disk, 0))
            }
            Step::Freeze if !is_read_only => {
                let path = folder.join(format!("next{number}"));
                let mut options = File::options();
                let next = options.read(true).write(true).create_new(true).open(&path);
                // If it fails, the overlay is as it was.
                drop(overlay.freeze(next.expect("a file"), &path));
                Ok(())
            }
            Step::WriteThrough => {
                overlay.write_through();
                Ok(())
            }
            _ => Ok(()),
        };
        if done.is_err() {
            return;
        }
    }
    let mut now = vec![0; disk.len()];
    if overlay.read_bytes(&mut now, 0).is_ok() {
        assert!(now == disk, "the disk is not what was written");
    }
}

/// Whole sectors inside the disk.
fn range(at: u16, len: u16) -> (usize, usize) {
    let sectors = BYTES / SECTOR;
    let at = u64::from(at) % sectors;
    let len = 1 + u64::from(len) % 40;
    let end = (at + len).min(sectors);
    ((at * SECTOR) as usize, ((end - at) * SECTOR) as usize)
}
