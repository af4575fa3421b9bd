//! A file system that is soon full.

use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

/// A file system in memory, mounted for as long as this value lives. Needs root.
pub struct SmallFileSystem {
    folder: TempDir,
}

impl SmallFileSystem {
    /// One with room for so much.
    #[track_caller]
    pub fn of_mib(mib: u32) -> Self {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}M"), "small"])
            .arg(folder.path())
            .status()
            .expect("mount starts");
        assert!(status.success(), "mount: {status}");
        Self { folder }
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a file of zeroes without blocks in it, which may be larger than the file system.
    #[track_caller]
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        let file = std::fs::File::create(&path).expect("a file can be made");
        file.set_len(bytes).expect("a file can have a hole");
        path
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        // Whoever still has a file of it open keeps it.
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(self.folder.path())
            .status();
    }
}
