//! The jail's folder: `<chroot base>/<program's name>/<id>/root`, as Firecracker's jailer lays it out.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::iter::once;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags, Stat, fstat, major, makedev, minor};
use rustix::process::Pid;

use crate::copy::Copy;
use crate::folder::{Folder, FolderError, Made, Owner};

/// Folders above the jail's root.
const OPEN_TO_ALL: u32 = 0o755;
const OWNERS_ALONE: u32 = 0o700;

/// Why the program to run cannot be that.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It cannot be opened or read.
    #[error("--exec-file {}: {source}", path.display())]
    Open {
        /// As given.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is a folder, a device, a pipe or a socket.
    #[error("--exec-file {}: not a regular file; give the path of lepton-vmm", .0.display())]
    NotAFile(PathBuf),
    /// Nobody may run it.
    #[error("--exec-file {}: not executable; try chmod +x", .0.display())]
    NotExecutable(PathBuf),
}

/// The program that is to run in the jail, opened.
pub struct Program {
    file: File,
    name: OsString,
    mode: u32,
    version: Version,
}

/// What differs when a file is another one, or was written to.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    file: (u64, u64),
    changed: (i64, u64),
}

impl From<&Stat> for Version {
    fn from(stat: &Stat) -> Self {
        Self {
            file: (stat.st_dev, stat.st_ino),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

impl Program {
    /// Opens the program. Its name is that of the file which was opened, also if `path` is a link to it.
    pub fn open(path: &Path) -> Result<Self, ProgramError> {
        let failed = |source| ProgramError::Open {
            path: path.to_owned(),
            source,
        };
        // A named pipe must not hold us up.
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::options()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
            .map_err(failed)?;
        let stat = fstat(&file).map_err(|error| failed(error.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(ProgramError::NotAFile(path.to_owned()));
        }
        if stat.st_mode & 0o111 == 0 {
            return Err(ProgramError::NotExecutable(path.to_owned()));
        }
        // The path itself is not looked up again.
        let found = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let found = found.map_err(failed)?;
        let name = found.file_name().unwrap_or_default().to_owned();
        Ok(Self {
            file,
            name,
            mode: stat.st_mode & 0o777,
            version: Version::from(&stat),
        })
    }

    /// Its name, which is also that of the folder of all its jails.
    pub fn name(&self) -> &OsStr {
        &self.name
    }
}

/// A copy of a program that was written ahead, and belongs to no jail yet: it has no name, and goes when nobody has it open.
pub struct Spare {
    copy: OwnedFd,
    of: Version,
}

impl Spare {
    /// Writes one where jails below `base` can have it.
    pub fn write(base: &Folder, program: Program, owner: Owner) -> Result<Self, FolderError> {
        let Program {
            file,
            name,
            mode,
            // As it was before it is read: what is written to the program meanwhile makes it another one.
            version: of,
        } = program;
        let (to, copy) = base.nameless(mode)?;
        Copy::new(file, to, owner, base.path().join(&name)).write()?;
        Ok(Self { copy, of })
    }
}

/// A jail's folder.
pub struct Tree {
    root: Folder,
    program: OwnedFd,
    program_name: OsString,
}

/// The file for the VMM's process id.
pub struct PidFile(File);

impl PidFile {
    /// Writes it.
    pub fn write(&self, pid: Pid) -> io::Result<()> {
        write!(&self.0, "{}", pid.as_raw_nonzero())
    }
}

/// Character devices that every VMM finds: name, major and minor number (Linux, Documentation/admin-guide/devices.txt). The
/// first one is in /dev/net, the others are in /dev.
const DEVICES: [(&str, u32, u32); 3] = [("tun", 10, 200), ("kvm", 10, 232), ("urandom", 1, 9)];
/// Major number of userfaultfd, whose minor number is in /proc/misc.
const MISC: u32 = 10;

/// The minor number of /dev/userfaultfd, if the kernel has it; `misc` is the text of /proc/misc.
pub fn userfaultfd_minor(misc: &str) -> Option<u32> {
    misc.lines().find_map(|line| {
        let (minor, name) = line.trim().split_once(' ')?;
        (name == "userfaultfd").then(|| minor.parse().ok())?
    })
}

/// The same, of this kernel.
fn userfaultfd() -> Option<u32> {
    // The host's own, where there is one, is found sooner.
    if let Ok(found) = rustix::fs::stat("/dev/userfaultfd")
        && FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
        && major(found.st_rdev) == MISC
    {
        return Some(minor(found.st_rdev));
    }
    // A page is what the kernel hands out at once, and several times what there is.
    let mut misc = [0; 4096];
    let length = File::open("/proc/misc").ok()?.read(&mut misc).ok()?;
    userfaultfd_minor(&String::from_utf8_lossy(misc.get(..length)?))
}

impl Tree {
    /// Makes the folder of jail `id` below `base`, and in it `spare`, or else a file for a copy of the program, which is still to be
    /// written. Folders that are there stay, with what is in them.
    pub fn begin(
        base: &Folder,
        program: Program,
        spare: Option<Spare>,
        id: &str,
        owner: Owner,
        made: &mut Made,
    ) -> Result<(Self, Option<Copy>), FolderError> {
        let Program {
            file,
            name,
            mode,
            version,
        } = program;
        let root = base
            .enter_or_make(&name, OPEN_TO_ALL, made)?
            .enter_or_make(OsStr::new(id), OPEN_TO_ALL, made)?
            .enter_or_make(OsStr::new("root"), OWNERS_ALONE, made)?;
        // A copy, so that two VMMs share no memory, not even their code.
        if let Some(Spare { copy, of }) = spare
            && of == version
            && root.link(&name, copy.as_fd(), made).is_ok()
        {
            let tree = Self {
                program: copy,
                program_name: name,
                root,
            };
            return Ok((tree, None));
        }
        let copy = root.replace(&name, mode, made)?;
        let tree = Self {
            program: root.runnable(&name, &copy)?,
            program_name: name,
            root,
        };
        let path = tree.root.path().join(&tree.program_name);
        let copy = Copy::new(file, copy, owner, path);
        Ok((tree, Some(copy)))
    }

    /// Makes what else is in it, of which device nodes must not be there, and gives the folder to its owner.
    pub fn furnish(
        &self,
        owner: Owner,
        devices: bool,
        made: &mut Made,
    ) -> Result<PidFile, FolderError> {
        let root = &self.root;
        if devices {
            make_devices(root, owner, made)?;
        }
        // The API's socket is made in here.
        let run = root.enter_or_make(OsStr::new("run"), OWNERS_ALONE, made)?;
        run.give_to(owner)?;
        let mut pid_name = self.program_name.clone();
        pid_name.push(".pid");
        let pid = root.create(&pid_name, 0o644, made)?;
        // Last: from now on the owner can change what is in it.
        root.give_to(owner)?;
        Ok(PidFile(pid))
    }

    /// The folder that becomes the VMM's root.
    pub fn root(&self) -> &Folder {
        &self.root
    }

    /// The copy of the program, to be run once it is written.
    pub fn program(&self) -> &OwnedFd {
        &self.program
    }

    /// The path of the copy as the VMM sees it.
    pub fn program_path(&self) -> OsString {
        let mut path = OsString::from("/");
        path.push(&self.program_name);
        path
    }
}

fn make_devices(root: &Folder, owner: Owner, made: &mut Made) -> Result<(), FolderError> {
    let dev = root.enter_or_make(OsStr::new("dev"), OWNERS_ALONE, made)?;
    let net = dev.enter_or_make(OsStr::new("net"), OWNERS_ALONE, made)?;
    let [tun, kvm, urandom] = DEVICES;
    let userfaultfd = userfaultfd().map(|minor| ("userfaultfd", MISC, minor));
    let in_dev = [kvm, urandom].into_iter().chain(userfaultfd);
    for (folder, device) in once((&net, tun)).chain(in_dev.map(|device| (&dev, device))) {
        let (name, major, minor) = device;
        folder.make_device(OsStr::new(name), makedev(major, minor), owner, made)?;
    }
    net.give_to(owner)?;
    dev.give_to(owner)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn userfaultfd_is_found_among_the_misc_devices() {
        let misc = "234 btrfs-control\n257 userfaultfd\n  1 psaux\n";
        assert_eq!(userfaultfd_minor(misc), Some(257));
        assert_eq!(userfaultfd_minor("232 kvm\n"), None);
        assert_eq!(userfaultfd_minor("x userfaultfd\n"), None);
    }

    #[test]
    fn a_program_is_a_file_that_can_be_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plain");
        std::fs::write(&path, "x").unwrap();
        let refused = |path: &Path| Program::open(path).err().unwrap().to_string();
        assert!(refused(&path).contains("not executable"));
        assert!(refused(folder.path()).contains("not a regular file"));
        assert!(refused(Path::new("/dev/null")).contains("not a regular file"));
        assert!(refused(&folder.path().join("none")).contains("none: No such file"));
    }

    #[test]
    fn a_link_to_a_program_has_the_programs_name() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/bin/true", &link).unwrap();
        assert_eq!(Program::open(&link).unwrap().name(), "true");
    }

    #[test]
    fn a_spare_is_for_the_program_that_it_is_a_copy_of() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        std::fs::write(&path, "program").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        let jails = tempfile::tempdir().unwrap();
        let base = Folder::open(jails.path()).unwrap();
        let owner = Owner {
            uid: rustix::process::geteuid(),
            gid: rustix::process::getegid(),
        };
        // What is in the jail, and whether that is still to be written.
        let begin = |id: &str, spare| {
            let mut made = Made::default();
            let program = Program::open(&path).unwrap();
            let (_, copy) = Tree::begin(&base, program, Some(spare), id, owner, &mut made).unwrap();
            let here = jails.path().join("program").join(id).join("root/program");
            (std::fs::read_to_string(here).unwrap(), copy.is_some())
        };
        let spare = || Spare::write(&base, Program::open(&path).unwrap(), owner).unwrap();
        for id in ["one", "two"] {
            assert_eq!(begin(id, spare()), ("program".into(), false));
        }
        let old = spare();
        std::fs::write(&path, "another").unwrap();
        assert_eq!(begin("three", old), (String::new(), true));
    }
}
