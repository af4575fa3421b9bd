//! Resource limits of the VMM.

use std::io;
use std::str::FromStr;

use rustix::process::{Resource, Rlimit, setrlimit};

/// Most open files if nothing is said.
const NO_FILE: u64 = 2048;

/// One `--resource-limit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Most bytes of a file that is written.
    FileSize(u64),
    /// One more than the highest number of an open file.
    OpenFiles(u64),
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((name, value)) = text.split_once('=') else {
            return Err("type RESOURCE=NUMBER, such as no-file=1024".into());
        };
        let number = || {
            value
                .parse::<u64>()
                .map_err(|_| format!("{value:?} is not a number"))
        };
        match name {
            "fsize" => Ok(Self::FileSize(number()?)),
            "no-file" => Ok(Self::OpenFiles(number()?)),
            _ => Err(format!(
                "there is no resource {name:?}; there are fsize and no-file"
            )),
        }
    }
}

/// A limit that cannot be set.
#[derive(Debug, thiserror::Error)]
#[error("--resource-limit {name}={value}: {source}")]
pub struct LimitError {
    name: &'static str,
    value: u64,
    source: io::Error,
}

/// Sets `limits`, soft and hard, of this process; the later of two for the same resource counts.
pub fn set(limits: &[Limit]) -> Result<(), LimitError> {
    for limit in [Limit::OpenFiles(NO_FILE)].iter().chain(limits) {
        let later = limits.iter().rev();
        let same = |other: &&Limit| std::mem::discriminant(*other) == std::mem::discriminant(limit);
        let (name, resource, value) = match *later.clone().find(same).unwrap_or(limit) {
            Limit::FileSize(value) => ("fsize", Resource::Fsize, value),
            Limit::OpenFiles(value) => ("no-file", Resource::Nofile, value),
        };
        let both = Rlimit {
            current: Some(value),
            maximum: Some(value),
        };
        setrlimit(resource, both).map_err(|error| LimitError {
            name,
            value,
            source: error.into(),
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_resources_are_known() {
        assert_eq!("fsize=250000000".parse(), Ok(Limit::FileSize(250_000_000)));
        assert_eq!("no-file=0".parse(), Ok(Limit::OpenFiles(0)));
    }

    #[test]
    fn what_is_no_limit_is_told() {
        for (bad, part) in [
            ("no-file", "RESOURCE=NUMBER"),
            ("files=1", "\"files\""),
            ("no-file=", "\"\""),
            ("no-file=-1", "\"-1\""),
            ("fsize=1=2", "\"1=2\""),
            ("fsize=18446744073709551616", "18446744073709551616"),
            ("", "RESOURCE=NUMBER"),
        ] {
            let error = bad.parse::<Limit>().unwrap_err();
            assert!(error.contains(part), "{bad}: {error}");
        }
    }
}
