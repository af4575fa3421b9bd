//! Memory files with holes.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};

/// Lays the data of `changes` over `base`, as far as it has some.
pub fn lay_over(base: &Path, changes: &Path) {
    let from = File::open(changes).expect("changes");
    let to = OpenOptions::new().write(true).open(base).expect("a base");
    let mut at = 0;
    while let Ok(start) = seek(&from, SeekFrom::Data(at)) {
        let end = seek(&from, SeekFrom::Hole(start)).expect("an end");
        let mut bytes = vec![0; (end - start) as usize];
        from.read_exact_at(&mut bytes, start).expect("data");
        to.write_all_at(&bytes, start).expect("room");
        at = end;
    }
}
