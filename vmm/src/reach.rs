//! Which files this process can still reach once its guest runs: Landlock, by the crate of its authors.
//!
//! Every thread but the first gives up all files when it starts; what it works with is open by then. The first does
//! when the machine is complete, before the guest's first instruction, but for the places where later requests may
//! have something to open. A start that fails takes nothing away.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use landlock::{
    ABI, Access, AccessFs, BitFlags, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope, make_bitflags,
};
use rustix::fs::{CWD, Mode, OFlags, openat};

/// What is denied unless allowed, where the kernel knows it. Later versions would also want to be asked for the sockets
/// of the host that a guest connects to.
const KNOWN: ABI = ABI::V6;
/// For places where requests make, replace and remove files.
const FILES: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    ReadFile | WriteFile | Truncate | ReadDir | MakeReg | RemoveFile | IoctlDev
});

/// Set by [`keep_files`].
static KEPT: AtomicBool = AtomicBool::new(false);

/// Lets no thread of this process give anything up, for `--no-landlock`. To be called before there are others.
pub fn keep_files() {
    KEPT.store(true, Ordering::Relaxed);
}

/// Files could not be given up.
#[derive(Debug, thiserror::Error)]
#[error("Landlock: {0}")]
pub struct ReachError(#[from] RulesetError);

/// The places where requests may open something after the start, once the rest is given up.
#[derive(Debug)]
pub struct Within(Vec<PathBuf>);

impl Within {
    /// What to add to an error whose cause may be that something is outside.
    pub fn hint(&self, error: &(dyn std::error::Error + 'static)) -> Option<String> {
        let mut causes = std::iter::successors(Some(error), |error| error.source());
        let is_denied = |cause: &io::Error| cause.kind() == io::ErrorKind::PermissionDenied;
        causes.find(|cause| cause.downcast_ref().is_some_and(is_denied))?;
        let places: Vec<String> = self.0.iter().map(|p| p.display().to_string()).collect();
        Some(format!(
            "Landlock lets a machine that was started open only what is in {}; --allow-path names other places",
            places.join(", ")
        ))
    }
}

/// What is to stay in reach.
#[derive(Debug, Default)]
pub struct Reach {
    rules: Vec<PathBeneath<OwnedFd>>,
    within: Vec<PathBuf>,
}

impl Reach {
    /// Places in which requests may make, replace and remove files.
    pub fn new(allowed: &[PathBuf]) -> Self {
        let mut reach = Reach::default();
        allowed.iter().for_each(|path| reach.files(path));
        // For snapshots and clones.
        reach.allow(
            Path::new("/dev/kvm"),
            AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
        );
        reach
    }

    /// A place in which requests may make, replace and remove files.
    pub fn files(&mut self, path: &Path) {
        self.allow(path, FILES);
        self.within.push(path.to_owned());
    }

    /// An image, which another one may replace by a request: one in the same folder.
    pub fn image(&mut self, path: &Path, is_read_only: bool) {
        let mut access = AccessFs::ReadFile | AccessFs::IoctlDev;
        if !is_read_only {
            access |= AccessFs::WriteFile;
        }
        self.allow(path, access);
        // The folder of a device has other devices.
        let is_device =
            std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
        if is_device {
            self.within.push(path.to_owned());
        } else {
            let folder = folder_of(path);
            self.allow(&folder, access);
            self.within.push(folder);
        }
    }

    /// An overlay that is written. Clones of the machine need others beside it.
    pub fn overlay(&mut self, path: &Path) {
        self.files(&folder_of(path));
    }

    /// A socket of this process, which it removes when it ends.
    pub fn socket(&mut self, path: &Path) {
        self.allow(&folder_of(path), AccessFs::RemoveFile.into());
    }

    /// What cannot be found now is left out.
    fn allow(&mut self, path: &Path, access: BitFlags<AccessFs>) {
        if let Ok(place) = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            self.rules.push(PathBeneath::new(place, access));
        }
    }

    /// Gives up everything else, for the calling thread and those it starts from now on.
    pub fn confine(self) -> Result<Within, ReachError> {
        let Reach { rules, mut within } = self;
        if !restrict(rules)? {
            log::warn!(
                "there is no Landlock: what a guest could do to this process, it could do to any file"
            );
        }
        within.sort();
        within.dedup();
        Ok(Within(within))
    }
}

/// The folder that a path is in.
pub fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Gives up all files, for the calling thread, in a kernel that has Landlock.
pub fn give_up_files() -> Result<(), ReachError> {
    restrict(Vec::new())?;
    Ok(())
}

/// Whether the kernel does it.
fn restrict(rules: Vec<PathBeneath<OwnedFd>>) -> Result<bool, RulesetError> {
    if KEPT.load(Ordering::Relaxed) {
        return Ok(false);
    }
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .scope(Scope::AbstractUnixSocket)?
        .create()?
        .add_rules(rules.into_iter().map(Ok::<_, RulesetError>))?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    /// Does it on a thread of its own, which ends with what it has given up. False without Landlock.
    fn alone(test: impl FnOnce() + Send + 'static) -> bool {
        let here = std::thread::spawn(|| restrict(Vec::new()).unwrap()).join();
        let is_there = here.unwrap();
        if is_there {
            std::thread::spawn(test).join().unwrap();
        } else {
            eprintln!("SKIPPED: this kernel has no Landlock");
        }
        is_there
    }

    fn is_denied<T>(result: io::Result<T>) -> bool {
        result.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    }

    #[test]
    fn a_thread_without_files_opens_none() {
        let own = File::open("/proc/self/exe").unwrap();
        alone(move || {
            give_up_files().unwrap();
            assert!(is_denied(File::open("/proc/self/exe")));
            assert!(is_denied(fs::read_dir("/")));
            // What is open stays so.
            assert!(own.metadata().unwrap().is_file());
        });
        File::open("/proc/self/exe").unwrap();
    }

    #[test]
    fn what_is_in_reach_is_what_was_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["own", "images", "read-only", "sockets", "other"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("a"), "x").unwrap();
            fs::write(path(name).join("b"), "x").unwrap();
        }
        let paths = ["own", "images", "read-only", "sockets", "other"].map(path);
        alone(move || {
            let [own, images, read_only, sockets, other] = paths;
            let mut reach = Reach::new(std::slice::from_ref(&own));
            reach.image(&images.join("a"), false);
            reach.image(&read_only.join("a"), true);
            reach.socket(&sockets.join("a"));
            let within = reach.confine().unwrap();

            let write = |path: &Path| File::options().write(true).open(path);
            fs::write(own.join("c.new"), "x").unwrap();
            fs::rename(own.join("c.new"), own.join("c")).unwrap();
            fs::remove_file(own.join("c")).unwrap();
            File::open(&own).unwrap().sync_all().unwrap();
            assert!(is_denied(fs::create_dir(own.join("d"))));

            write(&images.join("b")).unwrap();
            assert!(is_denied(fs::write(images.join("c"), "x")));
            assert!(is_denied(fs::remove_file(images.join("b"))));

            File::open(read_only.join("b")).unwrap();
            assert!(is_denied(write(&read_only.join("a"))));

            fs::remove_file(sockets.join("a")).unwrap();
            assert!(is_denied(File::open(sockets.join("b"))));

            let error = File::open(other.join("a")).unwrap_err();
            let hint = within.hint(&error).unwrap();
            for name in [&own, &images, &read_only] {
                assert!(hint.contains(&name.display().to_string()), "{hint}");
            }
            assert!(!hint.contains(&sockets.display().to_string()), "{hint}");
            let missing = File::open(own.join("nothing")).unwrap_err();
            assert_eq!(within.hint(&missing), None);
        });
    }
}
