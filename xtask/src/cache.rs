//! What is costly to make is kept, keyed by a hash of everything it was made from.
//!
//! One folder per result: `<kind>-<hash>`. It appears by rename, so a folder that exists is complete.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

/// Everything a cached result depends on.
pub struct Inputs(Sha256);

impl Inputs {
    /// No inputs yet.
    pub fn new() -> Self {
        Self(Sha256::new())
    }

    /// Adds `bytes` under `name`.
    #[must_use]
    pub fn with(mut self, name: &str, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        // Lengths first: no two lists of inputs give the same stream.
        self.0.update(format!("{} {} ", name.len(), bytes.len()));
        self.0.update(name);
        self.0.update(bytes);
        self
    }

    fn key(self) -> String {
        let digest = self.0.finalize();
        digest[..8].iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// The folder of cached results, shared by all checkouts of this user.
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$LEPTON_CACHE`, or `lepton` in the user's cache folder.
    pub fn open() -> Result<Self> {
        let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty());
        let root = if let Some(path) = variable("LEPTON_CACHE") {
            std::path::absolute(PathBuf::from(path))?
        } else if let Some(path) = variable("XDG_CACHE_HOME") {
            PathBuf::from(path).join("lepton")
        } else {
            let home = variable("HOME").ok_or_else(|| {
                anyhow!("HOME is not set: set LEPTON_CACHE to a folder to build in")
            })?;
            PathBuf::from(home).join(".cache/lepton")
        };
        fs::create_dir_all(&root)
            .with_context(|| format!("cannot create the cache folder {}", root.display()))?;
        Ok(Self { root })
    }

    /// Where everything is kept.
    pub fn folder(&self) -> &Path {
        &self.root
    }

    /// The folder of `kind` made from `inputs`; `fill` makes it in the empty folder it is given if it is not there
    /// yet. Of two processes asking at once, one makes it and the other waits.
    pub fn get_or_make(
        &self,
        kind: &str,
        inputs: Inputs,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let name = format!("{kind}-{}", inputs.key());
        let entry = self.root.join(&name);
        if entry.is_dir() {
            return Ok(entry);
        }
        let lock = File::create(self.root.join(format!(".{name}.lock")))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            eprintln!("waiting for another process that makes {kind}");
            flock(&lock, FlockOperation::LockExclusive)?;
        }
        if entry.is_dir() {
            return Ok(entry);
        }
        let prefix = format!(".{name}-");
        self.remove_unfinished(&prefix)?;
        let making = tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir_in(&self.root)?;
        fill(making.path())?;
        fs::rename(making.path(), &entry)
            .with_context(|| format!("cannot keep {}", entry.display()))?;
        // Renamed: there is nothing left to remove.
        let _ = making.keep();
        Ok(entry)
    }

    /// Removes what a killed process left; the lock says that nobody is at work there.
    fn remove_unfinished(&self, prefix: &str) -> Result<()> {
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_path_buf();
        (folder, Cache { root })
    }

    #[test]
    fn a_result_is_made_once() {
        let (_folder, cache) = cache();
        let mut made = 0;
        for _ in 0..2 {
            let path = cache
                .get_or_make("thing", Inputs::new().with("a", "1"), |folder| {
                    made += 1;
                    fs::write(folder.join("f"), "content")?;
                    Ok(())
                })
                .unwrap();
            assert_eq!(fs::read(path.join("f")).unwrap(), b"content");
        }
        assert_eq!(made, 1);
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let (folder, cache) = cache();
        let result = cache.get_or_make("thing", Inputs::new(), |folder| {
            fs::write(folder.join("half"), "")?;
            Err(anyhow!("broken"))
        });
        assert!(result.is_err());
        let left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.ends_with(".lock"))
            .collect();
        assert_eq!(left, Vec::<String>::new());
    }

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let (folder, cache) = cache();
        let name = format!(".thing-{}-killed", Inputs::new().key());
        let left = folder.path().join(name);
        fs::create_dir(&left).unwrap();
        let other = folder.path().join(".other-killed");
        fs::create_dir(&other).unwrap();
        cache
            .get_or_make("thing", Inputs::new(), |_| Ok(()))
            .unwrap();
        assert!(!left.exists() && other.exists());
    }

    #[test]
    fn every_input_counts() {
        let keys: std::collections::HashSet<_> = [
            Inputs::new(),
            Inputs::new().with("a", "1"),
            Inputs::new().with("a", "2"),
            Inputs::new().with("a1", ""),
            Inputs::new().with("a", "1").with("b", "2"),
            Inputs::new().with("a", "1b2"),
        ]
        .into_iter()
        .map(Inputs::key)
        .collect();
        assert_eq!(keys.len(), 6);
    }
}
