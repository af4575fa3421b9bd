//! Loop devices, and a file system on one. Needs root, and what `NEEDS` names.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::suite::Need;

/// What a test with loop devices needs.
pub const NEEDS: [Need; 6] = [
    Need::Root,
    Need::Program("modprobe"),
    Need::Program("losetup"),
    Need::Program("blockdev"),
    Need::Program("mkfs.ext4"),
    Need::Program("mount"),
];

#[track_caller]
fn output(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// A block device that is a file. It goes with this value.
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Over `file`, by reads and writes without the host's cache if `is_direct`. Only then does a read past the file's end
    /// fail (Linux, drivers/block/loop.c, `lo_complete_rq`); otherwise it gives zeroes.
    #[track_caller]
    pub fn over(file: &Path, is_direct: bool) -> Self {
        output(Command::new("modprobe").arg("loop"));
        let mut command = Command::new("losetup");
        command.args(["--find", "--show"]);
        command.arg(format!(
            "--direct-io={}",
            if is_direct { "on" } else { "off" }
        ));
        let path = PathBuf::from(output(command.arg(file)).trim_end());
        let device = Self { path };
        let name = device.path.file_name().expect("a device");
        let setting = Path::new("/sys/block").join(name).join("loop/dio");
        let told = fs::read_to_string(&setting).expect("a loop device");
        assert_eq!(told.trim_end() == "1", is_direct, "{}", setting.display());
        device
    }

    /// Its node.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes what the host's cache has of it, and drops it.
    #[track_caller]
    pub fn drop_cache(&self) {
        output(Command::new("blockdev").arg("--flushbufs").arg(&self.path));
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Whoever still has it open keeps it.
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.path)
            .status();
    }
}

/// An ext4 file system, mounted for as long as this value lives. Unlike one in memory, it can be read without the cache.
pub struct Ext4 {
    folder: TempDir,
    _device: LoopDevice,
}

impl Ext4 {
    /// Made in `file`, which it fills.
    #[track_caller]
    pub fn in_file(file: &Path) -> Self {
        let mut mkfs = Command::new("mkfs.ext4");
        // No block is kept for root, who writes here.
        output(mkfs.args(["-q", "-m", "0", "-O", "^has_journal"]).arg(file));
        let device = LoopDevice::over(file, false);
        let folder = tempfile::tempdir().expect("a temporary directory");
        let mut mount = Command::new("mount");
        output(
            mount
                .args(["-t", "ext4"])
                .arg(device.path())
                .arg(folder.path()),
        );
        Self {
            folder,
            _device: device,
        }
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(self.folder.path())
            .status();
    }
}
