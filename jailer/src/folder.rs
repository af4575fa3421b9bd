//! Folders held open, and what is made in them.
//!
//! Every name is looked up once, in a folder that is held open, without following a link (openat2 with RESOLVE_BENEATH
//! and RESOLVE_NO_SYMLINKS). What is opened is checked, and changes of owner or mode go through the same descriptor. So
//! whoever swaps names under the jailer can make it refuse, and nothing else.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, chownat, fchmod,
    fchown, fstat, fstatfs, linkat, mkdirat, mknodat, openat2, unlinkat,
};
use rustix::io::Errno;

/// Why something cannot be made or opened in a folder.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// A link stands where something of the jail has to be.
    #[error("{} is a symbolic link, and none is followed in a jail; remove it", .0.display())]
    Symlink(PathBuf),
    /// Something else stands where a folder has to be.
    #[error("{} is not a folder", .0.display())]
    NotAFolder(PathBuf),
    /// Left from an earlier jail of the same id.
    #[error(
        "{} exists already: there is or was a jail of this id; choose another --id, or remove the old one's folder",
        .0.display()
    )]
    Exists(PathBuf),
    /// The file has another name, under which somebody else may use it.
    #[error("{} has hard links elsewhere; remove it", .0.display())]
    HardLink(PathBuf),
    /// Somebody replaces files while the jail is made.
    #[error("{} changed while the jail was being made", .0.display())]
    Changed(PathBuf),
    /// The kernel refused.
    #[error("{}: {call}: {source}", path.display())]
    Call {
        /// On what.
        path: PathBuf,
        /// The system call.
        call: &'static str,
        /// Its error.
        source: io::Error,
    },
}

/// The user and group that the VMM runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The user's id.
    pub uid: Uid,
    /// The group's id.
    pub gid: Gid,
}

/// A folder held open.
#[derive(Debug, Clone)]
pub struct Folder {
    fd: Arc<OwnedFd>,
    /// For messages only.
    path: PathBuf,
}

const NO_LINKS: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);
const READ_FOLDER: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

impl Folder {
    /// Opens the folder that a path of the operator's leads to, through links if it has some: once.
    pub fn open(path: &Path) -> Result<Self, FolderError> {
        let fd = rustix::fs::open(path, READ_FOLDER, Mode::empty())
            .map_err(|error| refusal(path.to_owned(), "open", error))?;
        Ok(Self {
            fd: Arc::new(fd),
            path: path.to_owned(),
        })
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn refusal(&self, name: &OsStr, call: &'static str, error: Errno) -> FolderError {
        refusal(self.path.join(name), call, error)
    }

    fn open_name(&self, name: &OsStr, flags: OFlags, mode: Mode) -> Result<OwnedFd, FolderError> {
        openat2(&*self.fd, name, flags | OFlags::CLOEXEC, mode, NO_LINKS)
            .map_err(|error| self.refusal(name, "openat2", error))
    }

    /// A folder in it.
    pub fn enter(&self, name: &OsStr) -> Result<Self, FolderError> {
        let fd = self.open_name(name, READ_FOLDER, Mode::empty())?;
        Ok(Self {
            fd: Arc::new(fd),
            path: self.path.join(name),
        })
    }

    /// A folder in it, which is made if it is not there.
    pub fn enter_or_make(
        &self,
        name: &OsStr,
        mode: u32,
        made: &mut Made,
    ) -> Result<Self, FolderError> {
        match mkdirat(&*self.fd, name, Mode::from_raw_mode(mode)) {
            Ok(()) => made.note(self, name, AtFlags::REMOVEDIR),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(self.refusal(name, "mkdirat", error)),
        }
        self.enter(name)
    }

    /// The same, for a folder that is to go in any case: if it is there, it was left by a jailer that was killed.
    pub fn claim(&self, name: &OsStr, mode: u32, made: &mut Made) -> Result<Self, FolderError> {
        let mut none = Made::default();
        let folder = self.enter_or_make(name, mode, &mut none)?;
        none.keep();
        made.note(self, name, AtFlags::REMOVEDIR);
        Ok(folder)
    }

    /// Makes a file that must not be there, open for writing.
    pub fn create(&self, name: &OsStr, mode: u32, made: &mut Made) -> Result<File, FolderError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let fd = self.open_name(name, flags, Mode::from_raw_mode(mode))?;
        made.note(self, name, AtFlags::empty());
        Ok(File::from(fd))
    }

    /// Makes a file in the place of an old one, which must be a plain file of one name.
    pub fn replace(&self, name: &OsStr, mode: u32, made: &mut Made) -> Result<File, FolderError> {
        self.in_place_of_old(name, || self.create(name, mode, made))
    }

    /// Gives a name to a file that has none yet, in the place of an old one as in [`Self::replace`].
    pub fn link(
        &self,
        name: &OsStr,
        file: BorrowedFd<'_>,
        made: &mut Made,
    ) -> Result<(), FolderError> {
        let place = own_descriptor(file);
        self.in_place_of_old(name, || {
            // To do without a path takes a capability (linkat(2)).
            linkat(CWD, &place, &*self.fd, name, AtFlags::SYMLINK_FOLLOW)
                .map_err(|error| self.refusal(name, "linkat", error))
        })?;
        made.note(self, name, AtFlags::empty());
        Ok(())
    }

    /// Makes a file without a name on the file system that this is on, open for writing, and a descriptor by which it can be run and
    /// get a name once nobody writes to it any more. Without a name it goes when nobody has it open.
    pub fn nameless(&self, mode: u32) -> Result<(File, OwnedFd), FolderError> {
        let name = OsStr::new(".");
        let flags = OFlags::WRONLY | OFlags::TMPFILE;
        let file = self.open_name(name, flags, Mode::from_raw_mode(mode))?;
        let again = own_descriptor(file.as_fd());
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let runnable = rustix::fs::open(&again, flags, Mode::empty())
            .map_err(|error| refusal(again, "open", error))?;
        Ok((File::from(file), runnable))
    }

    fn in_place_of_old<T>(
        &self,
        name: &OsStr,
        mut make: impl FnMut() -> Result<T, FolderError>,
    ) -> Result<T, FolderError> {
        match make() {
            Err(FolderError::Exists(path)) => {
                let old = self.look_at(name)?;
                if FileType::from_raw_mode(old.st_mode) != FileType::RegularFile {
                    return Err(FolderError::Exists(path));
                }
                if old.st_nlink > 1 {
                    return Err(FolderError::HardLink(path));
                }
                // Removes a name only: whatever else stands there by now, nothing outside can be meant.
                unlinkat(&*self.fd, name, AtFlags::empty())
                    .map_err(|error| self.refusal(name, "unlinkat", error))?;
                match make() {
                    Err(FolderError::Exists(path)) => Err(FolderError::Changed(path)),
                    other => other,
                }
            }
            other => other,
        }
    }

    fn look_at(&self, name: &OsStr) -> Result<Stat, FolderError> {
        let fd = self.open_name(name, OFlags::PATH, Mode::empty())?;
        fstat(&fd).map_err(|error| self.refusal(name, "fstat", error))
    }

    /// A descriptor by which `file`, just written by the name `name`, can be run. Refused if the name means another file.
    pub fn runnable(&self, name: &OsStr, file: &File) -> Result<OwnedFd, FolderError> {
        let fd = self.open_name(name, OFlags::PATH, Mode::empty())?;
        let stat = |fd: BorrowedFd| fstat(fd).map_err(|error| self.refusal(name, "fstat", error));
        let (found, written) = (stat(fd.as_fd())?, stat(file.as_fd())?);
        if (found.st_dev, found.st_ino) != (written.st_dev, written.st_ino) {
            return Err(FolderError::Changed(self.path.join(name)));
        }
        Ok(fd)
    }

    /// Makes a character device, for its owner alone.
    pub fn make_device(
        &self,
        name: &OsStr,
        device: u64,
        owner: Owner,
        made: &mut Made,
    ) -> Result<(), FolderError> {
        let mode = Mode::RUSR | Mode::WUSR;
        mknodat(&*self.fd, name, FileType::CharacterDevice, mode, device)
            .map_err(|error| self.refusal(name, "mknodat", error))?;
        made.note(self, name, AtFlags::empty());
        let fd = self.open_name(name, OFlags::PATH, Mode::empty())?;
        let found = fstat(&fd).map_err(|error| self.refusal(name, "fstat", error))?;
        let kind = FileType::from_raw_mode(found.st_mode);
        // Of this kind, number and count of names there is nothing that must not belong to the owner.
        if kind != FileType::CharacterDevice || found.st_rdev != device || found.st_nlink != 1 {
            return Err(FolderError::Changed(self.path.join(name)));
        }
        self.give(name, &fd, owner)
    }

    /// A path of `name` in it, for calls that take nothing else: as long as this is open, it leads here.
    pub fn place(&self, name: &OsStr) -> PathBuf {
        own_descriptor(self.as_fd()).join(name)
    }

    /// Gives a socket that was just made in it to `owner`. Refused if something else has the name by now.
    pub fn give_socket(&self, name: &OsStr, owner: Owner) -> Result<(), FolderError> {
        let fd = self.open_name(name, OFlags::PATH, Mode::empty())?;
        let found = fstat(&fd).map_err(|error| self.refusal(name, "fstat", error))?;
        let kind = FileType::from_raw_mode(found.st_mode);
        // With one name it is no socket of another folder's.
        if kind != FileType::Socket || found.st_nlink != 1 {
            return Err(FolderError::Changed(self.path.join(name)));
        }
        self.give(name, &fd, owner)
    }

    fn give(&self, name: &OsStr, fd: &OwnedFd, owner: Owner) -> Result<(), FolderError> {
        let Owner { uid, gid } = owner;
        chownat(fd, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)
            .map_err(|error| self.refusal(name, "fchownat", error))
    }

    /// Gives the folder to `owner`, for it alone.
    pub fn give_to(&self, owner: Owner) -> Result<(), FolderError> {
        let call = |call, error| refusal(self.path.clone(), call, error);
        fchown(&*self.fd, Some(owner.uid), Some(owner.gid)).map_err(|e| call("fchown", e))?;
        fchmod(&*self.fd, Mode::RWXU).map_err(|e| call("fchmod", e))
    }

    /// Removes the names of all that is in it but of folders.
    pub fn remove_files(&self) -> io::Result<()> {
        for entry in Dir::read_from(&*self.fd)? {
            // A folder is refused. What is gone is gone.
            let _ = unlinkat(&*self.fd, entry?.file_name(), AtFlags::empty());
        }
        Ok(())
    }

    /// The type of the file system that it is on (statfs(2)).
    pub fn file_system(&self) -> Result<i64, FolderError> {
        let found =
            fstatfs(&*self.fd).map_err(|error| refusal(self.path.clone(), "fstatfs", error))?;
        Ok(found.f_type)
    }

    /// What a short file says.
    pub fn read(&self, name: &OsStr) -> Result<String, FolderError> {
        const MOST: u64 = 64 << 10;
        let file = File::from(self.open_name(name, OFlags::RDONLY, Mode::empty())?);
        let mut text = String::new();
        file.take(MOST)
            .read_to_string(&mut text)
            .map_err(|source| self.failed(name, "read", source))?;
        Ok(text)
    }

    /// Opens a file that is there for writing.
    pub fn writable(&self, name: &OsStr) -> Result<File, FolderError> {
        let fd = self.open_name(name, OFlags::WRONLY, Mode::empty())?;
        Ok(File::from(fd))
    }

    /// Writes to a file that is there, in one call.
    pub fn write(&self, name: &OsStr, text: &str) -> Result<(), FolderError> {
        self.writable(name)?
            .write_all(text.as_bytes())
            .map_err(|source| self.failed(name, "write", source))
    }

    /// The failure of a call on what is named `name` in here.
    pub fn failed(&self, name: &OsStr, call: &'static str, source: io::Error) -> FolderError {
        FolderError::Call {
            path: self.path.join(name),
            call,
            source,
        }
    }
}

impl AsRawFd for Folder {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A path that leads to what this process has open.
fn own_descriptor(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn refusal(path: PathBuf, call: &'static str, error: Errno) -> FolderError {
    match error {
        Errno::LOOP => FolderError::Symlink(path),
        Errno::NOTDIR => FolderError::NotAFolder(path),
        Errno::EXIST => FolderError::Exists(path),
        error => FolderError::Call {
            path,
            call,
            source: error.into(),
        },
    }
}

struct Step {
    folder: Folder,
    name: OsString,
    flags: AtFlags,
}

/// What has been made and has to go if the jail cannot be. Goes when dropped.
#[derive(Default)]
pub struct Made(Vec<Step>);

impl Made {
    fn note(&mut self, folder: &Folder, name: &OsStr, flags: AtFlags) {
        self.0.push(Step {
            folder: folder.clone(),
            name: name.to_owned(),
            flags,
        });
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Lets everything stay.
    pub fn keep(mut self) {
        self.0.clear();
    }

    /// The descriptors that are needed to remove it all.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.0.iter().map(|step| step.folder.fd.as_raw_fd())
    }

    /// Removes everything, newest first. What is still in use is tried again until `patience` is over.
    pub fn remove(&mut self, patience: Duration) {
        const PAUSE: Duration = Duration::from_millis(5);
        let end = Instant::now() + patience;
        while let Some(step) = self.0.pop() {
            // What is not empty or gone already is somebody else's by now.
            while unlinkat(&step.folder, &step.name, step.flags) == Err(Errno::BUSY)
                && Instant::now() < end
            {
                std::thread::sleep(PAUSE);
            }
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        // A control group stays in use for a moment after its last member, or the last group in it, has gone.
        self.remove(Duration::from_secs(1));
    }
}

#[cfg(test)]
mod tests;
