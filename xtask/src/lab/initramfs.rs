//! The lab's initramfs: busybox, the kernel modules of the base system, the two init scripts and what to run.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cpio::newc;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;
const CHARACTER: u32 = 0o020_600;

/// Applets the init scripts call by name.
const APPLETS: [&str; 17] = [
    "sh",
    "cat",
    "cp",
    "insmod",
    "ln",
    "mkdir",
    "mount",
    "mv",
    "poweroff",
    "switch_root",
    "taskset",
    "uname",
    "sed",
    "stty",
    "sleep",
    "ip",
    "true",
];

/// Writes a cpio archive as the kernel unpacks it.
pub struct Initramfs<W: Write> {
    out: W,
    inode: u32,
}

impl<W: Write> Initramfs<W> {
    /// An archive written to `out`.
    pub fn new(out: W) -> Self {
        // Hard links are told by equal inode numbers: every entry gets its own.
        Self { out, inode: 1 }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.device(name, mode, (0, 0), content)
    }

    fn device(
        &mut self,
        name: &str,
        mode: u32,
        number: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(|_| {
            io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("{name}: 4 GiB or more"),
            )
        })?;
        let mut entry = newc::Builder::new(name)
            .ino(self.inode)
            .nlink(1)
            .mode(mode)
            .rdev_major(number.0)
            .rdev_minor(number.1)
            .write(&mut self.out, size);
        entry.write_all(content)?;
        entry.finish()?;
        self.inode += 1;
        Ok(())
    }

    /// Adds an empty folder.
    pub fn folder(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY, &[])
    }

    /// Adds an executable file.
    pub fn program(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        self.entry(name, PROGRAM, content)
    }

    /// Adds what every lab has: folders, busybox with the applets the scripts use, the console, and the scripts.
    pub fn base(&mut self, busybox: &[u8]) -> io::Result<()> {
        for folder in [
            "bin", "dev", "proc", "sys", "host", "writes", "root", "modules", "lab",
        ] {
            self.folder(folder)?;
        }
        self.device("dev/console", CHARACTER, (5, 1), &[])?;
        self.program("bin/busybox", busybox)?;
        for applet in APPLETS {
            self.entry(&format!("bin/{applet}"), SYMLINK, b"busybox")?;
        }
        self.program("init", include_bytes!("init.sh"))?;
        self.program("lab/start.sh", include_bytes!("start.sh"))
    }

    /// Ends the archive.
    pub fn finish(self) -> io::Result<W> {
        newc::trailer(self.out)
    }
}

/// A line of shell script that the shell reads back as `words`, whatever bytes are in them.
pub fn shell_line<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>) -> Vec<u8> {
    let mut line = Vec::new();
    for word in words {
        if !line.is_empty() {
            line.push(b' ');
        }
        line.push(b'\'');
        for &byte in word.as_ref().as_bytes() {
            if byte == b'\'' {
                line.extend_from_slice(b"'\\''");
            } else {
                line.push(byte);
            }
        }
        line.push(b'\'');
    }
    line.push(b'\n');
    line
}

/// The same for a path.
pub fn shell_path(path: &Path) -> Vec<u8> {
    shell_line([path])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_shell_reads_words_back() {
        let words = ["a b", "", "it's", "$HOME `x` \"q\" \\", "line\nbreak", "*"];
        let mut script = b"printf '%s|' ".to_vec();
        script.extend(shell_line(words));
        let output = Command::new("sh")
            .arg("-c")
            .arg(OsStr::from_bytes(&script))
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            words.map(|w| format!("{w}|")).concat()
        );
    }

    #[test]
    fn an_archive_lists_what_was_put_in() {
        let mut archive = Initramfs::new(Vec::new());
        archive.base(b"busybox's bytes").unwrap();
        archive.program("lab/command", b"x").unwrap();
        let bytes = archive.finish().unwrap();
        let mut names = Vec::new();
        let mut rest = io::Cursor::new(bytes);
        loop {
            let reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push(reader.entry().name().to_owned());
            rest = reader.finish().unwrap();
        }
        for name in [
            "init",
            "bin/busybox",
            "bin/sh",
            "lab/start.sh",
            "lab/command",
            "dev/console",
        ] {
            assert!(
                names.iter().any(|n| n == name),
                "{name} is not in {names:?}"
            );
        }
    }
}
