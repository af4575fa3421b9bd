//! The jailer's system calls, as strace(1) tells them.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::process::Command;

use lepton_tests::jail::Jail;

/// A call with a path: who made it, its name, and what is between the parentheses.
struct Call {
    process: String,
    name: String,
    arguments: String,
}

impl Call {
    /// `123 openat2(4, "dev", {...}, 24) = 5`. A call during which another process made one ends with `<unfinished ...>`, and
    /// has a second line for its result.
    fn parse(line: &str) -> Option<Self> {
        let (process, rest) = line.split_once(' ')?;
        let (name, rest) = rest.trim_start().split_once('(')?;
        let whole = rest.rsplit_once(") ").or(rest.split_once("<unfinished"));
        let (arguments, _) = whole.filter(|_| !name.starts_with('<'))?;
        Some(Self {
            process: process.to_owned(),
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        })
    }

    /// The text of the first path, and what stands before it: nothing, or a folder.
    fn path(&self) -> Option<(&str, &str)> {
        let (before, rest) = self.arguments.split_once('"')?;
        let (path, _) = rest.split_once('"')?;
        Some((before.trim_end_matches(", "), path))
    }
}

/// What the jailer does with paths until its processes run something else, or end.
#[track_caller]
fn calls_of(jail: &Jail, code: i32) -> Vec<Call> {
    let trace = jail.base().join("trace");
    let jailer = jail.command();
    let status = Command::new("strace")
        .args(["--follow-forks", "--quiet=all", "--string-limit=4096"])
        .args(["--trace=%file,fchown,fchownat,fchmod,fchmodat"])
        .arg("--output")
        .arg(&trace)
        .arg(jailer.get_program())
        .args(jailer.get_args())
        .output()
        .expect("strace starts");
    assert_eq!(status.status.code(), Some(code), "{status:?}");
    let text = fs::read_to_string(&trace).expect("a trace");
    let mut gone = HashSet::new();
    let calls = text.lines().filter_map(Call::parse);
    let calls = calls.filter(|call| {
        let of_jailer = !gone.contains(&call.process);
        if call.name == "execveat" {
            gone.insert(call.process.clone());
        }
        of_jailer
    });
    // The first is strace's own, which starts the jailer.
    let calls: Vec<Call> = calls.filter(|call| call.name != "execve").collect();
    assert!(calls.len() > 10, "{text}");
    calls
}

/// What the operator names is looked up once by its path, and what lies below it by its name in a folder that is open, without
/// links. Owners and modes are changed by descriptors.
#[track_caller]
fn check(calls: &[Call]) {
    // Each process of a pool makes a jail of its own.
    let mut seen = HashSet::new();
    let mut in_folders = 0;
    for call in calls {
        let told = format!("{}({})", call.name, call.arguments);
        let Some((folder, path)) = call.path() else {
            continue;
        };
        // A descriptor alone; the kernel's own places, where nobody swaps anything; the way into the new root, which is the
        // working directory by then.
        let by_descriptor = path.is_empty() && call.arguments.contains("AT_EMPTY_PATH");
        let of_kernel = path.starts_with("/proc/") || path.starts_with("/sys/");
        if by_descriptor || of_kernel || ["", ".", "/"].contains(&path) {
            continue;
        }
        match call.name.as_str() {
            "chown" | "lchown" | "fchownat" | "chmod" | "fchmodat" | "fchmodat2" | "rename"
            | "link" | "symlink" | "mkdir" | "mknod" | "unlink" | "rmdir" => {
                panic!("by a path: {told}");
            }
            _ => {}
        }
        if folder.is_empty() || folder == "AT_FDCWD" {
            assert!(path.starts_with('/'), "in whatever folder: {told}");
            let first = seen.insert((call.process.clone(), path.to_owned()));
            assert!(first, "looked up twice: {told}");
            continue;
        }
        assert!(!path.contains('/'), "more than a name: {told}");
        if call.name == "openat2" {
            for flag in ["RESOLVE_BENEATH", "RESOLVE_NO_SYMLINKS"] {
                assert!(call.arguments.contains(flag), "{told}");
            }
        } else {
            let makes = ["mkdirat", "mknodat", "unlinkat"];
            assert!(makes.contains(&call.name.as_str()), "with links: {told}");
        }
        in_folders += 1;
    }
    assert!(in_folders > 10, "{in_folders} names in folders");
}

pub fn no_path_is_looked_up_twice() {
    // A VMM that ends at once.
    let jail = || Jail::as_another_user().vmm(["--version"]);
    for options in [
        &[][..],
        &["--new-pid-ns"],
        &["--daemonize", "--resource-limit", "no-file=512"],
    ] {
        check(&calls_of(&jail().options(options), 0));
    }
    let jail = Jail::as_another_user().id("copy").vmm(["--no-such-option"]);
    // A folder that no other option names.
    let folder = tempfile::tempdir().expect("a temporary directory");
    let pool = [OsString::from("--pool"), folder.path().join("sock").into()];
    check(&calls_of(&jail.options(pool), 1));
}
