//! Test programs that need a KVM host with nested paging: run in the lab, as many as possible in one boot.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::captured::Captured;
use super::counts::Counts;
use crate::cache::Cache;
use crate::lab::{self, Lab, LabError, Place, Streams};
use crate::progress::Progress;

/// A boot with everything in it takes no longer than this on two cores.
pub const TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Lines the script inside writes between the programs' own.
const BEGIN: &str = "lab-test: begin ";
const END: &str = "lab-test: end ";

/// A test program by name.
pub type Program = (String, PathBuf);

/// Runs `programs` in `folder` and returns their counts. The program during which a lab ends or takes too long counts as failed,
/// and those after it get another lab.
pub fn run(
    programs: &[Program],
    folder: &Path,
    environment: &[(OsString, OsString)],
    patience: Duration,
) -> Result<Counts> {
    let cache = Cache::open()?;
    run_by(programs, |left| {
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
        let ended = lab.run(&cache, &Progress::new(), streams).map(drop);
        Ok((output.text(), ended))
    })
}

/// Runs `programs` by `in_lab`, which runs as many as it can and returns what they wrote and how the lab ended.
///
/// If the lab's machine ended itself, by a panic of its kernel or a fault of QEMU, the program at that time runs once more and
/// fails if that ends as well: QEMU was seen to end so with programs that had passed hundreds of times.
fn run_by(
    programs: &[Program],
    mut in_lab: impl FnMut(&[Program]) -> Result<(String, Result<(), LabError>)>,
) -> Result<Counts> {
    let mut counts = Counts::default();
    let mut left = programs;
    let mut again = None;
    while !left.is_empty() {
        let (output, ended) = in_lab(left)?;
        let log = read_log(&output);
        counts += log.counts;
        left = left.get(log.ended..).unwrap_or_default();
        if let Err(error) = &ended {
            eprintln!("{error}");
        }
        let Some(((lost, _), rest)) = left.split_first() else {
            break;
        };
        if matches!(ended, Err(LabError::Crashed { .. })) && again != Some(lost) {
            again = Some(lost);
            eprintln!("THE LAB ITSELF ENDED during {lost}, which runs once more in another");
            continue;
        }
        counts += Counts::one(false);
        eprintln!("{lost} did not end");
        left = rest;
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

    /// Three programs, in labs that end in turn as `ends` says: after so many programs, by a crash or a time-out.
    fn labs(ends: &[(usize, bool)]) -> (Counts, Vec<usize>) {
        let programs: Vec<Program> = ["a", "b", "c"]
            .map(|name| (name.to_owned(), name.into()))
            .into();
        let (mut ends, mut begun) = (ends.iter(), Vec::new());
        let counts = run_by(&programs, |left| {
            begun.push(left.len());
            let console = String::new();
            let (passing, ended) = match ends.next() {
                None => (left.len(), Ok(())),
                Some((passing, true)) => {
                    let messages = String::new();
                    (*passing, Err(LabError::Crashed { console, messages }))
                }
                Some((passing, false)) => {
                    let limit = Duration::from_secs(1);
                    (*passing, Err(LabError::TimedOut { limit, console }))
                }
            };
            let one = "lab-test: begin x\ntest result: ok. 1 passed; 0 failed; 0 ignored\nlab-test: end 0\n";
            Ok((one.repeat(passing), ended))
        });
        (counts.unwrap(), begun)
    }

    #[test]
    fn a_program_runs_again_after_the_lab_has_ended_itself_but_once() {
        let counts = |passed, failed| Counts {
            passed,
            failed,
            skipped: 0,
        };
        assert_eq!(labs(&[]), (counts(3, 0), vec![3]));
        assert_eq!(labs(&[(1, true)]), (counts(3, 0), vec![3, 2]));
        // Each may.
        let twice = [(0, true), (1, true)];
        assert_eq!(labs(&twice), (counts(3, 0), vec![3, 3, 2]));
        let same = [(1, true), (0, true)];
        assert_eq!(labs(&same), (counts(2, 1), vec![3, 2, 1]));
        // One that takes too long does not.
        assert_eq!(labs(&[(1, false)]), (counts(2, 1), vec![3, 1]));
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
