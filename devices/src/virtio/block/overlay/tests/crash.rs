//! What is left after a crash at any moment: every change of every file is recorded, and replayed up to a cut. What was
//! put on stable storage before the cut is there; of what came after, any sector may be there or not, in any order.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vmm_sys_util::tempdir::TempDir;

use super::super::*;

/// A change of an overlay file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::virtio::block) enum Write {
    Bytes(u64, Vec<u8>),
    Zeroes(u64, u64),
    /// All before it is on stable storage.
    Sync,
}

/// All changes of overlay files in order, each with the file's number.
pub(in crate::virtio::block) type Record = Arc<Mutex<Vec<(usize, Write)>>>;

const SECTOR: usize = 512;
/// Five clusters and a half.
const SECTORS: usize = 44;
const BASE: u8 = 0xff;

#[derive(Debug, Clone)]
enum Step {
    /// Each with a value of its own.
    Write(usize, usize),
    Discard(usize, usize),
    Zero(usize, usize),
    Flush,
    Freeze,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..SECTORS, 1..20usize).prop_map(|(at, n)| (at, n.min(SECTORS - at)));
    prop_oneof![
        6 => range.clone().prop_map(|(at, n)| Step::Write(at, n)),
        2 => range.clone().prop_map(|(at, n)| Step::Discard(at, n)),
        1 => range.prop_map(|(at, n)| Step::Zero(at, n)),
        4 => Just(Step::Flush),
        1 => Just(Step::Freeze),
        1 => Just(Step::Reset),
    ]
}

/// What may be in a sector: what was there at the last flush, or anything since.
#[derive(Clone)]
struct Sector {
    last: u8,
    may_be: BTreeSet<u8>,
}

#[derive(Clone)]
struct Model {
    sectors: Vec<Sector>,
    /// What a reset goes back to.
    below: Vec<u8>,
}

impl Model {
    fn new() -> Self {
        let sector = Sector {
            last: BASE,
            may_be: [BASE].into(),
        };
        Model {
            sectors: vec![sector; SECTORS],
            below: vec![BASE; SECTORS],
        }
    }

    fn put(&mut self, at: usize, n: usize, value: u8) {
        for sector in &mut self.sectors[at..at + n] {
            sector.last = value;
            sector.may_be.insert(value);
        }
    }

    fn flushed(&mut self) {
        for sector in &mut self.sectors {
            sector.may_be = [sector.last].into();
        }
    }
}

/// An overlay whose changes are recorded, and the paths of its files, the lowest first.
struct Recorded {
    overlay: Overlay,
    record: Record,
    paths: Vec<PathBuf>,
    base: PathBuf,
    _folder: TempDir,
}

impl Recorded {
    fn new() -> Self {
        let folder = TempDir::new_in(Path::new("/dev/shm")).unwrap();
        let base = folder.as_path().join("base");
        std::fs::write(&base, [BASE; SECTORS * SECTOR]).unwrap();
        let path = folder.as_path().join("0");
        let chain = Chain::open::<&Path>(&base, &[]).unwrap();
        let overlay = Overlay::open(chain, &path, false).unwrap();
        let mut new = Recorded {
            overlay,
            record: Record::default(),
            paths: vec![path],
            base,
            _folder: folder,
        };
        new.follow();
        new
    }

    /// Records the newest file, from its header on.
    fn follow(&mut self) {
        let number = self.paths.len() - 1;
        self.overlay.own.record = Some((self.record.clone(), number));
        let header = self.overlay.header.to_bytes().to_vec();
        let mut record = self.record.lock().unwrap();
        record.push((number, Write::Bytes(0, header)));
    }

    fn step(&mut self, step: &Step, value: u8, model: &mut Model) {
        let bytes = |n: usize| (n * SECTOR) as u64;
        match *step {
            Step::Write(at, n) => {
                model.put(at, n, value);
                let content = vec![value; n * SECTOR];
                self.overlay.write_bytes(&content, bytes(at)).unwrap();
            }
            Step::Discard(at, n) => {
                model.put(at, n, 0);
                self.overlay.discard(bytes(at), bytes(n)).unwrap();
            }
            Step::Zero(at, n) => {
                model.put(at, n, 0);
                self.overlay.write_zeroes(bytes(at), bytes(n)).unwrap();
            }
            Step::Flush => {
                self.overlay.flush().unwrap();
                model.flushed();
            }
            Step::Freeze => {
                let path = self.base.with_file_name(self.paths.len().to_string());
                let mut options = File::options();
                options.read(true).write(true).create(true).truncate(false);
                let layers = self.overlay.chain().layers();
                let next = options.open(&path).unwrap();
                self.overlay.freeze(next, &path).unwrap();
                if self.overlay.chain().layers() > layers {
                    self.paths.push(path);
                    self.follow();
                }
                let now = model.sectors.iter().map(|sector| sector.last);
                model.below = now.collect();
            }
            Step::Reset => {
                let below = model.below.clone();
                for (at, value) in below.into_iter().enumerate() {
                    model.put(at, 1, value);
                }
                self.overlay.reset().unwrap();
                // What it goes back to may still be what the last flush did not cover.
                for (sector, below) in model.sectors.iter_mut().zip(&model.below) {
                    sector.may_be.insert(*below);
                }
            }
        }
    }
}

/// The files after a crash at `cut` of the record: `lost` says of each sector written since the file's last sync whether
/// it is lost.
fn after_crash(
    record: &[(usize, Write)],
    cut: usize,
    lengths: &[u64],
    mut lost: impl FnMut() -> bool,
) -> Vec<Vec<u8>> {
    let mut files: Vec<_> = lengths.iter().map(|len| vec![0; *len as usize]).collect();
    for (at, (number, write)) in record[..cut].iter().enumerate() {
        let rest = &record[at..cut];
        let is_synced = rest.contains(&(*number, Write::Sync));
        let (offset, len, bytes) = match write {
            Write::Bytes(offset, bytes) => (*offset, bytes.len(), Some(bytes)),
            Write::Zeroes(offset, len) => (*offset, *len as usize, None),
            Write::Sync => continue,
        };
        let mut done = 0;
        while done < len {
            let now = (len - done).min(SECTOR);
            if is_synced || !lost() {
                let start = offset as usize + done;
                let place = &mut files[*number][start..start + now];
                match bytes {
                    Some(bytes) => place.copy_from_slice(&bytes[done..done + now]),
                    None => place.fill(0),
                }
            }
            done += now;
        }
    }
    files
}

/// Opens what is left of the overlay in the topmost of the files, or if that never came to be, in the one below.
fn reopen(folder: &Path, base: &Path, files: &[Vec<u8>]) -> Overlay {
    let paths: Vec<_> = (0..files.len())
        .map(|n| folder.join(n.to_string()))
        .collect();
    for (path, bytes) in paths.iter().zip(files) {
        std::fs::write(path, bytes).unwrap();
    }
    for top in (0..files.len()).rev() {
        let chain = Chain::open(base, &paths[..top]);
        let overlay = chain.and_then(|chain| Overlay::open(chain, &paths[top], false));
        match overlay {
            Ok(overlay) => return overlay,
            // Frozen, and what goes on from it lost: it is all there is.
            Err(OverlayError::IsALayer(_)) => {
                let chain = Chain::open(base, &paths[..top]).unwrap();
                return Overlay::open(chain, &paths[top], true).unwrap();
            }
            Err(OverlayError::Header { .. } | OverlayError::NotALayer(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let chain = Chain::open::<&Path>(base, &[]).unwrap();
    Overlay::open(chain, &folder.join("never"), false).unwrap()
}

fn check(overlay: &mut Overlay, model: &Model) -> Result<(), TestCaseError> {
    let mut disk = vec![0; SECTORS * SECTOR];
    overlay.read_bytes(&mut disk, 0).unwrap();
    for (n, (bytes, sector)) in disk.chunks(SECTOR).zip(&model.sectors).enumerate() {
        let found: BTreeSet<u8> = bytes.iter().copied().collect();
        prop_assert_eq!(found.len(), 1, "sector {} is torn: {:?}", n, found);
        prop_assert!(
            found.is_subset(&sector.may_be),
            "sector {}: {:?}, not {:?}",
            n,
            found,
            &sector.may_be
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_was_flushed_survives_a_cut_anywhere(
        steps in prop::collection::vec(step(), 1..10), seed: u64,
    ) {
        let mut recorded = Recorded::new();
        let mut model = Model::new();
        // How long the record was, and what could be expected, before each step and after it.
        let mut moments = vec![(0, model.clone())];
        for (number, step) in steps.iter().enumerate() {
            let before = model.clone();
            recorded.step(step, number as u8 + 1, &mut model);
            let length = recorded.record.lock().unwrap().len();
            // In the midst of a step, what it writes may be there, and nothing more is lost than before.
            let mut midst = before;
            for (sector, after) in midst.sectors.iter_mut().zip(&model.sectors) {
                sector.may_be.extend(&after.may_be);
            }
            moments.push((length, midst));
            moments.push((length, model.clone()));
        }
        check(&mut recorded.overlay, &model)?;
        let record = recorded.record.lock().unwrap().clone();
        let geometry = recorded.overlay.geometry();
        let lengths = vec![geometry.file(); recorded.paths.len()];
        let mut random = seed | 1;
        for cut in 0..=record.len() {
            let at_least = moments.iter().rposition(|(length, _)| *length <= cut).unwrap();
            let expected = match moments.get(at_least + 1) {
                Some((length, midst)) if moments[at_least].0 < cut && cut < *length => midst,
                _ => &moments[at_least].1,
            };
            for lossy in [0, 1, 2] {
                let files = after_crash(&record, cut, &lengths, || {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    match lossy {
                        // SIGKILL: the page cache stays.
                        0 => false,
                        1 => true,
                        _ => random & 2 != 0,
                    }
                });
                let folder = TempDir::new_in(Path::new("/dev/shm")).unwrap();
                let mut overlay = reopen(folder.as_path(), &recorded.base, &files);
                check(&mut overlay, expected)?;
                // And it can be gone on with.
                if !overlay.disk().read_only() {
                    overlay.write_bytes(&[1; 100], 5000).unwrap();
                    overlay.flush().unwrap();
                    let mut byte = [0];
                    overlay.read_bytes(&mut byte, 5099).unwrap();
                    prop_assert_eq!(byte, [1]);
                }
            }
        }
    }
}

#[test]
fn a_reset_is_whole_or_not_at_all() {
    let mut recorded = Recorded::new();
    let mut model = Model::new();
    let all = Step::Write(0, SECTORS);
    for (step, value) in [(&all, 1), (&Step::Flush, 0), (&Step::Reset, 0)] {
        recorded.step(step, value, &mut model);
    }
    let record = recorded.record.lock().unwrap().clone();
    let lengths = [recorded.overlay.geometry().file()];
    let flushed = record
        .iter()
        .rposition(|(_, write)| matches!(write, Write::Bytes(4096.., _)));
    let mut seen = BTreeSet::new();
    for cut in flushed.unwrap() + 2..=record.len() {
        for lost in [false, true] {
            let files = after_crash(&record, cut, &lengths, || lost);
            let folder = TempDir::new_in(Path::new("/dev/shm")).unwrap();
            let mut overlay = reopen(folder.as_path(), &recorded.base, &files);
            let mut disk = vec![0; SECTORS * SECTOR];
            overlay.read_bytes(&mut disk, 0).unwrap();
            let found: BTreeSet<u8> = disk.into_iter().collect();
            assert_eq!(found.len(), 1, "a mixture: {found:?}");
            seen.extend(found);
        }
    }
    assert_eq!(seen, [1, BASE].into());
}

#[test]
fn bits_that_are_written_through_survive_the_process() {
    let mut recorded = Recorded::new();
    recorded.overlay.write_through();
    recorded.overlay.write_bytes(&[7; 512], 512).unwrap();
    assert!(!recorded.overlay.is_behind());
    let mut bitmap = [0; 2];
    let at = recorded.overlay.geometry().bitmap().start;
    recorded
        .overlay
        .disk()
        .file()
        .read_exact_at(&mut bitmap, at)
        .unwrap();
    assert_eq!(bitmap, [1, 0]);
}
