//! Files that are replaced as a whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};

/// What a file's name has behind it while its successor is written.
const SUFFIX: &str = ".new";

/// Why a file was not replaced.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}: {source}", path.display())]
pub struct WriteError {
    /// The file.
    pub path: PathBuf,
    /// What was tried.
    pub what: &'static str,
    /// The host's reason.
    pub source: io::Error,
}

/// The name under which the successor of the file at `path` is written.
pub fn successor(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(SUFFIX);
    name.into()
}

/// The successor of a file, not yet in its place. Dropped before that, it is removed; killed before that, it stays as
/// a file that the next successor overwrites.
#[derive(Debug)]
pub struct Replacement {
    path: PathBuf,
    file: File,
    in_place: bool,
}

impl Replacement {
    /// An empty file beside the one at `path`.
    pub fn new(path: &Path) -> Result<Self, WriteError> {
        let fail = |what, source| WriteError {
            path: path.to_owned(),
            what,
            source,
        };
        if fs::symlink_metadata(path).is_ok_and(|found| !found.is_file()) {
            let kind = io::Error::other("there is something that is no regular file");
            return Err(fail("cannot be replaced", kind));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .mode(0o600)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32)
            .open(successor(path))
            .map_err(|source| fail("cannot be made", source))?;
        // Two writers of one file would mix what they write.
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|source| fail("is being written by another process", source.into()))?;
        file.set_len(0)
            .map_err(|source| fail("cannot be emptied", source))?;
        Ok(Replacement {
            path: path.to_owned(),
            file,
            in_place: false,
        })
    }

    /// The file to write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Wraps an error of writing.
    pub fn fail(&self, what: &'static str, source: io::Error) -> WriteError {
        WriteError {
            path: self.path.clone(),
            what,
            source,
        }
    }

    /// Puts what was written on stable storage.
    pub fn sync(&self) -> Result<(), WriteError> {
        self.file
            .sync_all()
            .map_err(|source| self.fail("cannot be made durable", source))
    }

    /// Takes the old file's place, durably. The content must have been synced.
    pub fn put_in_place(mut self) -> Result<(), WriteError> {
        rename(&self.path)?;
        self.in_place = true;
        Ok(())
    }

    /// Leaves the successor where it is, for [`finish`].
    pub fn keep(mut self) {
        self.in_place = true;
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.in_place {
            // What stays is overwritten by the next.
            drop(fs::remove_file(successor(&self.path)));
        }
    }
}

/// Puts a successor that was kept, or whose writer was killed, in its place.
pub fn finish(path: &Path) -> Result<(), WriteError> {
    rename(path)
}

fn rename(path: &Path) -> Result<(), WriteError> {
    let fail = |what, source| WriteError {
        path: path.to_owned(),
        what,
        source,
    };
    fs::rename(successor(path), path).map_err(|source| fail("cannot be put in place", source))?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| fail("the directory cannot be made durable", source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_old_file_stays_until_the_new_one_is_in_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "old").unwrap();
        let new = Replacement::new(&path).unwrap();
        new.file().write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        let busy = Replacement::new(&path).unwrap_err();
        assert!(busy.to_string().contains("another process"), "{busy}");
        drop(new);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let new = Replacement::new(&path).unwrap();
        new.file().write_all(b"new").unwrap();
        new.sync().unwrap();
        new.put_in_place().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Replacement::new(folder.path()).is_err());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        assert!(Replacement::new(&link).is_err());
        assert!(Replacement::new(&folder.path().join("no/such")).is_err());
    }
}
