//! Work that a guest and its host are both given, to be compared: what `lepton-load` does.
//!
//! Each kind goes on for [`SPAN`] and gives a rate. None knows where it runs.

pub mod stream;

use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use stream::Address;

/// How long one piece of work goes on.
pub const SPAN: Duration = Duration::from_millis(400);

/// Bytes of a page, which every block is aligned to: direct input and output ask for it.
const PAGE: usize = 4096;
/// Bytes that are touched at once, page by page.
const TOUCHED: usize = 16 << 20;

/// What is done to a drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Bytes at once.
    pub block: usize,
    /// Anywhere, not one after the other.
    pub random: bool,
    /// Written, not read.
    pub write: bool,
}

/// What a piece of work is done with.
#[derive(Clone, Copy)]
pub enum Target {
    /// The processor and memory alone.
    Nothing(fn() -> io::Result<f64>),
    /// A drive or a file.
    Drive(Access),
    /// A server, by its address.
    Server(fn(&Address) -> io::Result<f64>),
}

/// A kind of work.
#[derive(Clone, Copy)]
pub struct Work {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is done with, and how.
    pub target: Target,
}

const fn work(name: &'static str, target: Target) -> Work {
    Work { name, target }
}

const fn access(block: usize, random: bool, write: bool) -> Target {
    Target::Drive(Access {
        block,
        random,
        write,
    })
}

/// All kinds.
pub const WORKS: &[Work] = &[
    work("integer", Target::Nothing(integer)),
    work("float", Target::Nothing(float)),
    work("memory", Target::Nothing(memory)),
    work("read-sequential", access(128 << 10, false, false)),
    work("read-random", access(PAGE, true, false)),
    work("write-sequential", access(128 << 10, false, true)),
    work("write-random", access(PAGE, true, true)),
    work("send", Target::Server(stream::send)),
    work("receive", Target::Server(stream::receive)),
];

/// The kind of that name.
pub fn find(name: &str) -> Option<&'static Work> {
    WORKS.iter().find(|work| work.name == name)
}

/// Does `work`, and returns how much of it was done in a second. `target` is the path or the address of what it is done with.
pub fn run(work: &Work, target: &str) -> io::Result<f64> {
    match work.target {
        Target::Nothing(run) => run(),
        Target::Drive(access) => drive(Path::new(target), access),
        Target::Server(run) => {
            let address = target.parse();
            run(&address.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?)
        }
    }
}

/// Does `batch`, which says how much it did, again and again. Returns how much was done in a second.
fn rate(mut batch: impl FnMut() -> io::Result<u64>) -> io::Result<f64> {
    let (begin, mut done) = (Instant::now(), 0u64);
    loop {
        done = done.saturating_add(batch()?);
        let elapsed = begin.elapsed();
        if elapsed >= SPAN {
            return Ok(done as f64 / elapsed.as_secs_f64());
        }
    }
}

/// Shifts and multiplications of integers, each waiting for the one before.
pub fn integer() -> io::Result<f64> {
    const STEPS: u64 = 50_000;
    let mut state = black_box(0x9e37_79b9_7f4a_7c15_u64);
    rate(|| {
        for _ in 0..STEPS {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            state = state.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
        }
        state = black_box(state);
        Ok(STEPS)
    })
}

/// Multiplications and square roots of floating-point numbers, each waiting for the one before.
pub fn float() -> io::Result<f64> {
    const STEPS: u64 = 20_000;
    let mut value = black_box(0.37_f64);
    rate(|| {
        for _ in 0..STEPS {
            value = (3.9 * value * (1.0 - value)).sqrt().clamp(0.01, 0.99);
        }
        value = black_box(value);
        Ok(STEPS)
    })
}

/// Pages of fresh memory, each touched for the first time, and read once more.
pub fn memory() -> io::Result<f64> {
    rate(|| {
        let mut fresh = vec![0u8; TOUCHED];
        for page in fresh.chunks_mut(PAGE) {
            if let Some(byte) = page.first_mut() {
                *byte = 1;
            }
        }
        let sum: usize = fresh
            .iter()
            .step_by(PAGE)
            .map(|byte| usize::from(*byte))
            .sum();
        black_box(&fresh);
        Ok(sum as u64)
    })
}

/// Bytes of the drive or file at `path`, read or written past the page cache where its file system can do that.
///
/// # Errors
/// If it cannot be opened, has not one whole block, or refuses one.
pub fn drive(path: &Path, access: Access) -> io::Result<f64> {
    let file = open(path, access.write)?;
    // A block device has no length but its end's.
    let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
    let block = access.block as u64;
    let blocks = size / block;
    if blocks == 0 {
        let reason = format!("{}: {size} bytes, less than a block", path.display());
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
    }
    let mut room = vec![0x5a; access.block + PAGE];
    let from = room.as_ptr().align_offset(PAGE);
    let buffer = room
        .get_mut(from..from + access.block)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let mut random = fastrand::Rng::with_seed(1);
    let mut next = 0;
    let done = rate(|| {
        let index = if access.random {
            random.u64(0..blocks)
        } else {
            next = (next + 1) % blocks;
            next
        };
        match access.write {
            true => file.write_all_at(buffer, index * block)?,
            false => file.read_exact_at(buffer, index * block)?,
        }
        Ok(block)
    })?;
    Ok(done)
}

fn open(path: &Path, write: bool) -> io::Result<File> {
    let with = |flags: OFlags| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags.bits() as i32)
            .open(path)
    };
    match with(OFlags::DIRECT) {
        // What a file system in memory answers.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => with(OFlags::empty()),
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_gives_a_rate() {
        for name in ["integer", "float", "memory"] {
            let rate = run(find(name).unwrap(), "").unwrap();
            assert!(rate.is_finite() && rate > 100.0, "{rate}");
        }
    }

    #[test]
    fn every_kind_is_found_by_its_name_and_wants_its_target() {
        for work in WORKS {
            assert_eq!(find(work.name).map(|found| found.name), Some(work.name));
            let wants = !matches!(work.target, Target::Nothing(_));
            assert_eq!(run(work, "").is_err(), wants, "{}", work.name);
        }
        assert!(find("idle").is_none());
    }

    #[test]
    fn drives_are_read_and_written() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&[1; 8 * PAGE], 0).unwrap();
        let access = |random, write| Access {
            block: PAGE,
            random,
            write,
        };
        for random in [false, true] {
            assert!(drive(file.path(), access(random, false)).unwrap() > 0.0);
        }
        assert_eq!(std::fs::read(file.path()).unwrap(), [1; 8 * PAGE]);
        assert!(drive(file.path(), access(false, true)).unwrap() > 0.0);
        // All of it, in whole blocks, and nothing behind.
        assert_eq!(std::fs::read(file.path()).unwrap(), [0x5a; 8 * PAGE]);
    }

    #[test]
    fn a_drive_smaller_than_a_block_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let access = Access {
            block: PAGE,
            random: true,
            write: false,
        };
        let error = drive(file.path(), access).unwrap_err().to_string();
        assert!(error.contains("0 bytes"), "{error}");
        assert!(drive(Path::new("/nonexistent"), access).is_err());
    }
}
