use std::fs;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::hash::CHUNK;
use crate::{ManifestError, memory_file};

const STATE: &[u8] = b"a state of some bytes";

struct Saved {
    folder: TempDir,
    root: Hash,
}

impl Saved {
    /// A memory of `chunks` chunks, of which those in `touched` hold their number.
    fn new(chunks: usize, touched: &[u64]) -> Self {
        let saved = Saved {
            folder: tempfile::tempdir().unwrap(),
            root: Hash::ZERO,
        };
        saved.write(chunks, touched)
    }

    fn write(mut self, chunks: usize, touched: &[u64]) -> Self {
        let bytes = (chunks * CHUNK) as u64;
        let mut leaves = Leaves::new(bytes).unwrap();
        let memory = Replacement::new(&self.memory()).unwrap();
        for chunk in touched {
            let content = vec![(*chunk % 250) as u8 + 1; CHUNK];
            leaves.set(*chunk, Hash::of_chunk(&content)).unwrap();
            let at = chunk * CHUNK as u64;
            memory.file().write_all_at(&content, at).unwrap();
        }
        let groups = leaves.groups();
        self.root = leaves.root(&groups);
        memory_file::write_footer(memory.file(), bytes, self.root).unwrap();
        let state = Replacement::new(&self.state()).unwrap();
        write(&state, STATE, &leaves, &groups).unwrap();
        state.put_in_place().unwrap();
        memory.put_in_place().unwrap();
        self
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn memory(&self) -> PathBuf {
        self.folder.path().join("memory")
    }

    fn refused(&self) -> String {
        open(&self.state()).unwrap_err().to_string()
    }

    /// Changes the state file.
    fn change(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.state()).unwrap();
        change(&mut bytes);
        fs::write(self.state(), bytes).unwrap();
    }
}

#[test]
fn what_is_written_is_read() {
    let touched = [0, 3, 1023, 1024, 2047];
    let saved = Saved::new(2050, &touched);
    let mut opened = open(&saved.state()).unwrap();
    assert_eq!(opened.state, STATE);
    assert_eq!(opened.memory.root(), saved.root);
    let file = memory_file::open(&saved.memory(), opened.memory.bytes(), saved.root).unwrap();
    for chunk in 0..2050 {
        let mut content = vec![0; CHUNK];
        let at = chunk * CHUNK as u64;
        file.read_exact_at(&mut content, at).unwrap();
        opened.memory.check(chunk, &content).unwrap();
        content[77] ^= 1;
        let error = opened.memory.check(chunk, &content).unwrap_err();
        assert!(error.to_string().contains(&format!("chunk {chunk} ")));
    }
    assert!(matches!(
        opened.memory.leaf(2050),
        Err(ManifestError::NoChunk(2050))
    ));
    let leaves = opened.memory.leaves().unwrap();
    assert_eq!(leaves.root(&leaves.groups()), saved.root);
}

#[test]
fn untouched_memory_takes_no_room() {
    use std::os::unix::fs::MetadataExt;
    let saved = Saved::new(1 << 16, &[5]);
    let state = fs::metadata(saved.state()).unwrap();
    assert!(state.len() > 2 << 20);
    assert!(state.blocks() * 512 < 64 << 10, "{}", state.blocks());
    assert!(fs::metadata(saved.memory()).unwrap().blocks() * 512 < 256 << 10);
}

#[test]
fn every_flipped_bit_is_found() {
    let saved = Saved::new(4, &[1]);
    let size = fs::metadata(saved.state()).unwrap().len() as usize;
    let head = HEADER + STATE.len() + HASH;
    for at in 0..head {
        saved.change(|bytes| bytes[at] ^= 0x10);
        // Four bytes of the header say nothing, and are hashed all the same.
        assert!(open(&saved.state()).is_err(), "byte {at}");
        saved.change(|bytes| bytes[at] ^= 0x10);
    }
    saved.change(|bytes| bytes[size - 1] ^= 1);
    let mut opened = open(&saved.state()).unwrap();
    let error = opened.memory.leaf(2).unwrap_err().to_string();
    assert!(error.contains("chunks 0 to 3 are damaged"), "{error}");
}

#[test]
fn other_versions_architectures_and_files_are_refused_by_name() {
    let saved = Saved::new(4, &[1]);
    assert_eq!(version(&saved.state()).unwrap(), VERSION);
    saved.change(|bytes| bytes[8] = 9);
    assert!(saved.refused().contains("format version 9"));
    assert_eq!(version(&saved.state()).unwrap(), 9);
    saved.change(|bytes| (bytes[8], bytes[10]) = (1, 183));
    assert!(saved.refused().contains("ELF machine 183"));
    saved.change(|bytes| bytes[10] = 62);
    open(&saved.state()).unwrap();
    saved.change(|bytes| bytes[0] = 0);
    assert!(saved.refused().contains("no state file"));
    fs::write(saved.state(), "short").unwrap();
    assert!(saved.refused().contains("no state file"));
    fs::remove_file(saved.state()).unwrap();
    assert!(saved.refused().contains("state: No such file"));
    fs::create_dir(saved.state()).unwrap();
    assert!(saved.refused().contains("not a regular file"));
}

#[test]
fn lengths_are_not_believed() {
    let saved = Saved::new(4, &[1]);
    for (at, what) in [(16, "state bytes"), (24, "memory bytes")] {
        let mut before = [0; 8];
        saved.change(|bytes| {
            before.copy_from_slice(&bytes[at..at + 8]);
            bytes[at..at + 8].fill(0xff);
        });
        assert!(saved.refused().contains(what), "{}", saved.refused());
        saved.change(|bytes| bytes[at..at + 8].copy_from_slice(&before));
    }
    saved.change(|bytes| bytes.push(0));
    assert!(saved.refused().contains("cut or changed"));
    saved.change(|bytes| bytes.truncate(5000));
    assert!(saved.refused().contains("cut or changed"));
}

#[test]
fn a_mixture_is_refused() {
    let (one, two) = (Saved::new(4, &[1]), Saved::new(4, &[2]));
    let opened = open(&one.state()).unwrap();
    let bytes = opened.memory.bytes();
    let refused = |path: &Path| {
        let error = memory_file::open(path, bytes, opened.memory.root()).unwrap_err();
        error.to_string()
    };
    assert!(refused(&two.memory()).contains("another snapshot"));
    let file = OpenOptions::new().write(true).open(one.memory()).unwrap();
    file.set_len(bytes).unwrap();
    assert!(refused(&one.memory()).contains("it was cut"));
    file.set_len(bytes + memory_file::FOOTER).unwrap();
    assert!(refused(&one.memory()).contains("no memory file"));
}

#[test]
fn a_writer_killed_between_the_renames_leaves_the_new_snapshot() {
    let old = Saved::new(4, &[1]);
    // The state file is in place, the memory file is not yet.
    let new = Saved::new(4, &[2]);
    fs::rename(new.state(), old.state()).unwrap();
    fs::rename(new.memory(), crate::replace::successor(&old.memory())).unwrap();
    let opened = open(&old.state()).unwrap();
    let bytes = opened.memory.bytes();
    memory_file::open(&old.memory(), bytes, opened.memory.root()).unwrap();
    memory_file::recover(&old.memory(), bytes, opened.memory.root()).unwrap();
    assert!(!crate::replace::successor(&old.memory()).exists());
    memory_file::open(&old.memory(), bytes, new.root).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_panic(start in 0usize..200, noise: Vec<u8>, keep_hash: bool) {
        let saved = Saved::new(2, &[1]);
        saved.change(|bytes| {
            for (to, from) in bytes.iter_mut().skip(start).zip(&noise) {
                *to = *from;
            }
            if keep_hash {
                let state = STATE.len() + HASH;
                let hash = head_hash(&bytes[..HASHED], &bytes[HEADER..HEADER + state]);
                bytes[HASHED..HEADER].copy_from_slice(&hash.0);
            }
        });
        if let Ok(mut opened) = open(&saved.state()) {
            let _ = opened.memory.leaf(0);
            let _ = opened.memory.leaves();
        }
    }
}
