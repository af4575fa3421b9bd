//! Where the guest's serial console and the VMM's own messages go.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::stdio::stderr;

use super::RunError;
use crate::arguments::Run;

/// How much of each file is shown when something went wrong, in bytes and lines.
const TAIL_BYTES: u64 = 8 * 1024;
const TAIL_LINES: usize = 30;

/// The two outputs of a VMM.
pub struct Console {
    /// The serial console's file; `None` when a person watches it.
    serial: Option<PathBuf>,
    messages: PathBuf,
}

impl Console {
    pub fn new(arguments: &Run, directory: &Path) -> Result<Self, RunError> {
        let serial = match &arguments.console_log {
            Some(path) => path.clone(),
            None => directory.join("console.log"),
        };
        let console = Self {
            serial: (!arguments.console).then_some(serial),
            messages: directory.join("vmm.log"),
        };
        if let Some(path) = &console.serial {
            File::create(path).map_err(|source| RunError::ConsoleLog {
                path: path.clone(),
                source,
            })?;
        }
        Ok(console)
    }

    /// Standard output and standard error for the VMM: the serial console is on the former.
    pub fn streams(&self) -> io::Result<(Stdio, Stdio)> {
        let append = |path| File::options().append(true).create(true).open(path);
        let serial = match &self.serial {
            Some(path) => append(path)?.into(),
            None => Stdio::from(stderr().try_clone_to_owned()?),
        };
        Ok((serial, append(&self.messages)?.into()))
    }

    /// The last lines of both, for an error message. Nothing in them reaches the terminal as
    /// anything but text.
    pub fn tail(&self) -> String {
        let mut text = String::new();
        let serial = self.serial.as_ref();
        for (name, path) in [("console", serial), ("VMM", Some(&self.messages))] {
            let lines = path.and_then(|path| last_lines(path).ok());
            for line in lines.iter().flatten() {
                text.push_str(&format!("\n  {name}: {line}"));
            }
        }
        if text.is_empty() {
            text.push_str(" (its console said nothing; --console shows more)");
        }
        text
    }
}

fn last_lines(path: &Path) -> io::Result<Vec<String>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).collect())
        .collect();
    let surplus = lines.len().saturating_sub(TAIL_LINES);
    Ok(lines.into_iter().skip(surplus).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_short_and_plain() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text: String = (0..5000).map(|i| format!("\x1b[31mline {i}\r\n")).collect();
        std::fs::write(file.path(), text + "\u{9b}end").unwrap();
        let lines = last_lines(file.path()).unwrap();
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!(lines[TAIL_LINES - 1], "end");
        assert_eq!(lines[TAIL_LINES - 2], "[31mline 4999");
    }
}
