//! Test programs that need a KVM host with nested paging: run in the lab, as many as possible in one boot.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::captured::Captured;
use super::counts::Counts;
use crate::cache::Cache;
use crate::lab::{self, Lab, Place, Streams};
use crate::progress::Progress;

/// A boot with everything in it takes no longer than this on two cores.
pub const TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Lines the script inside writes between the programs' own.
const BEGIN: &str = "lab-test: begin ";
const END: &str = "lab-test: end ";

/// A test program by name.
pub type Program = (String, PathBuf);

/// Runs `programs` in `folder` and returns their counts. A program during which the lab ends counts as failed, and the ones after
/// it get another lab.
pub fn run(
    programs: &[Program],
    folder: &Path,
    environment: &[(OsString, OsString)],
    patience: Duration,
) -> Result<Counts> {
    let cache = Cache::open()?;
    let mut counts = Counts::default();
    let mut left = programs;
    while !left.is_empty() {
        let output = Captured::shown();
        let lab = Lab {
            command: command(left),
            environment: environment.to_vec(),
            place: Place::Host {
                directory: folder.to_path_buf(),
                shares: Vec::new(),
                cpus: 2,
            },
            memory_mib: lab::DEFAULT_MEMORY_MIB,
            timeout: Some(patience),
        };
        let streams = Streams::Pipes {
            input: false,
            output: Box::new(output.clone()),
            error: lab::stderr()?,
        };
        let result = lab.run(&cache, &Progress::new(), streams);
        let log = read_log(&output.text());
        counts += log.counts;
        if let Err(error) = result {
            eprintln!("{error}");
        } else if log.ended == left.len() {
            break;
        }
        // The one that was running, or that never came to run, has failed.
        counts += Counts::one(false);
        let lost = left.get(log.ended).map_or("", |(name, _)| name);
        eprintln!("{lost} did not end");
        left = left.get(log.ended + 1..).unwrap_or_default();
    }
    Ok(counts)
}

fn command(programs: &[Program]) -> Vec<OsString> {
    let script = format!(
        "for program; do echo; echo '{BEGIN}'\"${{program##*/}}\"; \"$program\"; status=$?; echo; echo '{END}'$status; done"
    );
    let mut words: Vec<OsString> = ["sh", "-c", &script, "lab-tests"]
        .map(OsString::from)
        .into();
    words.extend(programs.iter().map(|(_, path)| path.into()));
    words
}

struct Log {
    /// Programs that ended.
    ended: usize,
    counts: Counts,
}

fn read_log(text: &str) -> Log {
    let mut log = Log {
        ended: 0,
        counts: Counts::default(),
    };
    let mut output = String::new();
    for line in text.lines() {
        if line.starts_with(BEGIN) {
            output.clear();
        } else if let Some(status) = line.strip_prefix(END) {
            log.counts += Counts::of_output(&output, status == "0");
            log.ended += 1;
        } else {
            output.push_str(line);
            output.push('\n');
        }
    }
    log
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_script_reports_every_program() {
        let programs: Vec<Program> = ["/bin/true", "/bin/false"]
            .map(|path| (path.to_owned(), path.into()))
            .into();
        let words = command(&programs);
        let output = Command::new(&words[0]).args(&words[1..]).output().unwrap();
        let log = read_log(&String::from_utf8(output.stdout).unwrap());
        assert_eq!(log.ended, 2);
        // `false` failed without saying which test did.
        assert_eq!(log.counts, Counts::one(false));
    }

    #[test]
    fn a_program_that_does_not_end_is_not_counted() {
        let log = read_log(
            "lab-test: begin a\ntest result: ok. 2 passed; 0 failed; 0 ignored; 0 measured\nlab-test: end 0\n\
             lab-test: begin b\ntest result: ok. 7 passed; 0 failed; 0 ignored; 0 measured\n",
        );
        assert_eq!(log.ended, 1);
        assert_eq!(log.counts.passed, 2);
    }
}
