//! The jail's copy of the program. To write it takes as long as all the rest; the keeper does meanwhile, or the VMM's parent.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use crate::folder::{FolderError, Owner};
use crate::process;

/// A copy in which nothing has been written yet.
pub struct Copy {
    /// From, and to.
    files: [OwnedFd; 2],
    owner: Owner,
    /// The file's, for messages.
    path: PathBuf,
}

impl Copy {
    /// A copy of `from` in the new and empty file `to`, which is at `path` and is to belong to `owner`.
    pub fn new(from: File, to: File, owner: Owner, path: PathBuf) -> Self {
        let files = [from.into(), to.into()];
        Self { files, owner, path }
    }

    /// Writes it. When this returns nobody has it open for writing, as no program may be that is run.
    pub fn write(self) -> Result<(), FolderError> {
        let files = self.files.each_ref().map(AsFd::as_fd);
        process::copy(files, self.owner).map_err(|error| failed(self.path, error.into()))
    }

    /// What the keeper needs to write it, and the path for messages.
    pub fn into_parts(self) -> ([OwnedFd; 2], Owner, PathBuf) {
        (self.files, self.owner, self.path)
    }
}

/// That it could not be written.
pub fn failed(path: PathBuf, source: io::Error) -> FolderError {
    let call = "copy";
    FolderError::Call { path, call, source }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use rustix::process::{getegid, geteuid};

    use super::*;

    fn copy(from: File, to: File) -> Copy {
        let owner = Owner {
            uid: geteuid(),
            gid: getegid(),
        };
        Copy::new(from, to, owner, "/jail/program".into())
    }

    #[test]
    fn all_of_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let [original, here] = ["original", "here"].map(|name| folder.path().join(name));
        let content: Vec<u8> = (0..3_000_001u32).map(|at| (at % 251) as u8).collect();
        fs::write(&original, &content).unwrap();
        let copy = copy(File::open(&original).unwrap(), File::create(&here).unwrap());
        copy.write().unwrap();
        assert!(fs::read(&here).unwrap() == content);
        assert_eq!(fs::metadata(here).unwrap().uid(), geteuid().as_raw());
    }

    #[test]
    fn what_cannot_be_written_is_told() {
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let original = || File::open("/proc/self/exe").unwrap();
        let message = copy(original(), full()).write().unwrap_err().to_string();
        assert!(message.starts_with("/jail/program: copy: "), "{message}");
    }
}
