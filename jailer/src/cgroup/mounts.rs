//! Where the control group hierarchies are mounted.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::Version;

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub path: PathBuf,
    /// Of which version.
    pub version: Version,
    /// Mount options; those of version 1 have the controllers among them.
    options: Vec<String>,
}

impl Mount {
    /// Whether a version 1 hierarchy has this controller.
    pub fn has_controller(&self, name: &str) -> bool {
        self.options.iter().any(|option| option == name)
    }
}

/// All hierarchies that the text of /proc/self/mounts names.
pub fn parse(mounts: &str) -> Vec<Mount> {
    let hierarchy = |line: &str| {
        let mut fields = line.split(' ');
        let (_, path, kind, options) = (
            fields.next()?,
            fields.next()?,
            fields.next()?,
            fields.next()?,
        );
        let version = match kind {
            "cgroup" => Version::V1,
            "cgroup2" => Version::V2,
            _ => return None,
        };
        Some(Mount {
            path: unescape(path),
            version,
            options: options.split(',').map(str::to_owned).collect(),
        })
    };
    mounts.lines().filter_map(hierarchy).collect()
}

/// The kernel writes white space and backslashes in paths as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let escaped = (*first == b'\\')
            .then(|| after.split_at_checked(3))
            .flatten()
            .and_then(|(digits, after)| {
                let digits = std::str::from_utf8(digits).ok()?;
                Some((u8::from_str_radix(digits, 8).ok()?, after))
            });
        let (byte, after) = escaped.unwrap_or((*first, after));
        bytes.push(byte);
        rest = after;
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
proc /proc proc rw,nosuid 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,relatime,cpu,cpuacct 0 0
cgroup /mnt/with\\040space\\134 cgroup rw,memory 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nsdelegate 0 0
broken
";

    #[test]
    fn hierarchies_are_found_among_mounts() {
        let found = parse(MOUNTS);
        assert_eq!(found.len(), 3);
        assert!(found[0].has_controller("cpu") && found[0].has_controller("cpuacct"));
        assert!(!found[0].has_controller("cpu,cpuacct"));
        assert_eq!(found[1].path, PathBuf::from("/mnt/with space\\"));
        assert_eq!(found[2].version, Version::V2);
    }

    #[test]
    fn a_backslash_without_digits_is_itself() {
        assert_eq!(unescape("a\\b"), PathBuf::from("a\\b"));
        assert_eq!(unescape("a\\04"), PathBuf::from("a\\04"));
        assert_eq!(unescape("a\\999"), PathBuf::from("a\\999"));
    }
}
