//! The jail's folder: `<chroot base>/<program's name>/<id>/root`, as Firecracker's jailer lays it out.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags, fchown, fstat, makedev};
use rustix::process::Pid;

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
        let found = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let found = found.map_err(failed)?;
        let name = found.file_name().unwrap_or_default().to_owned();
        Ok(Self {
            file,
            name,
            mode: stat.st_mode & 0o777,
        })
    }

    /// Its name, which is also that of the folder of all its jails.
    pub fn name(&self) -> &OsStr {
        &self.name
    }
}

/// A jail's folder, complete.
pub struct Tree {
    root: Folder,
    program: OwnedFd,
    program_name: OsString,
    pid: File,
}

/// Character devices that every VMM finds: below which folder of /dev, name, major and minor number
/// (Linux, Documentation/admin-guide/devices.txt).
const DEVICES: [(&[&str], &str, u32, u32); 3] = [
    (&["dev", "net"], "tun", 10, 200),
    (&["dev"], "kvm", 10, 232),
    (&["dev"], "urandom", 1, 9),
];
/// Major number of userfaultfd, whose minor number is in /proc/misc.
const MISC: u32 = 10;

/// The minor number of /dev/userfaultfd, if the kernel has it; `misc` is the text of /proc/misc.
pub fn userfaultfd_minor(misc: &str) -> Option<u32> {
    misc.lines().find_map(|line| {
        let (minor, name) = line.trim().split_once(' ')?;
        (name == "userfaultfd").then(|| minor.parse().ok())?
    })
}

impl Tree {
    /// Makes the folder of jail `id` below `base`, with a copy of the program. Folders that are there stay, with what is
    /// in them; device nodes must not be there.
    pub fn make(
        base: &Folder,
        program: &Program,
        id: &str,
        owner: Owner,
        devices: bool,
        made: &mut Made,
    ) -> Result<Self, FolderError> {
        let name = &program.name;
        let root = base
            .enter_or_make(name, OPEN_TO_ALL, made)?
            .enter_or_make(OsStr::new(id), OPEN_TO_ALL, made)?
            .enter_or_make(OsStr::new("root"), OWNERS_ALONE, made)?;
        // A copy, so that two VMMs share no memory, not even their code.
        let mut copy = root.replace(name, program.mode, made)?;
        io::copy(&mut &program.file, &mut copy)
            .map_err(|source| root.failed(name, "copy", source))?;
        fchown(&copy, Some(owner.uid), Some(owner.gid))
            .map_err(|error| root.failed(name, "fchown", error.into()))?;
        let runnable = root.runnable(name, &copy)?;
        if devices {
            make_devices(&root, owner, made)?;
        }
        // The API's socket is made in here.
        let run = root.enter_or_make(OsStr::new("run"), OWNERS_ALONE, made)?;
        run.give_to(owner)?;
        let mut pid_name = name.clone();
        pid_name.push(".pid");
        let pid = root.create(&pid_name, 0o644, made)?;
        // Last: from now on the owner can change what is in it.
        root.give_to(owner)?;
        Ok(Self {
            root,
            program: runnable,
            program_name: name.clone(),
            pid,
        })
    }

    /// Writes the VMM's process id into the file for it.
    pub fn write_pid(&self, pid: Pid) -> io::Result<()> {
        write!(&self.pid, "{}", pid.as_raw_nonzero())
    }

    /// The folder that becomes the VMM's root.
    pub fn root(&self) -> &Folder {
        &self.root
    }

    /// The copy of the program, to be run.
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
    let userfaultfd = std::fs::read_to_string("/proc/misc")
        .ok()
        .and_then(|misc| userfaultfd_minor(&misc));
    let userfaultfd = userfaultfd.map(|minor| (&["dev"][..], "userfaultfd", MISC, minor));
    for (folders, name, major, minor) in DEVICES.into_iter().chain(userfaultfd) {
        let mut folder = root.clone();
        for name in folders {
            folder = folder.enter_or_make(OsStr::new(name), OWNERS_ALONE, made)?;
        }
        let device = makedev(major, minor);
        folder.make_device(OsStr::new(name), device, owner, made)?;
    }
    let dev = root.enter(OsStr::new("dev"))?;
    dev.enter(OsStr::new("net"))?.give_to(owner)?;
    dev.give_to(owner)
}

#[cfg(test)]
mod tests {
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
}
