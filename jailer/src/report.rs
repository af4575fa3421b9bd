//! How the process that starts the VMM tells another one whether it could.
//!
//! It writes a byte right before the VMM's program replaces it, and an error's text if something goes wrong. The pipe's
//! writing end closes with the start, so its end after the byte alone means success.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};

const READY: u8 = 0;

/// The writing end.
pub struct Reporter(File);

/// The reading end.
pub struct Outcome(File);

/// Both ends; each process drops the one that it does not use.
pub fn pair() -> io::Result<(Reporter, Outcome)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Reporter(writer.into()), Outcome(reader.into())))
}

impl Reporter {
    /// Says that the VMM is about to run.
    pub fn ready(&mut self) {
        // Whoever does not listen any more needs no word.
        drop(self.0.write_all(&[READY]));
    }

    /// Whether anybody can still read what is said.
    pub fn is_heard(&self) -> io::Result<bool> {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut polled = [PollFd::new(&self.0, PollFlags::empty())];
        poll(&mut polled, Some(&now))?;
        let [polled] = polled;
        Ok(!polled.revents().contains(PollFlags::ERR))
    }

    /// Says why it does not.
    pub fn failed(mut self, message: &str) {
        drop(self.0.write_all(message.as_bytes()));
    }
}

impl Outcome {
    /// Waits for the start, or for the reason why there is none.
    pub fn wait(mut self) -> Result<(), String> {
        let mut bytes = Vec::new();
        if let Err(error) = self.0.read_to_end(&mut bytes) {
            return Err(format!("cannot learn whether the VMM has started: {error}"));
        }
        match bytes.as_slice() {
            [READY] => Ok(()),
            [] => Err("the jailer was killed".into()),
            [READY, text @ ..] | text => Err(String::from_utf8_lossy(text).into_owned()),
        }
    }
}

impl AsRawFd for Outcome {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_after_the_byte_is_a_start() {
        let (mut reporter, outcome) = pair().unwrap();
        reporter.ready();
        drop(reporter);
        assert_eq!(outcome.wait(), Ok(()));
    }

    #[test]
    fn an_end_without_the_byte_is_none() {
        let (reporter, outcome) = pair().unwrap();
        drop(reporter);
        assert!(outcome.wait().unwrap_err().contains("killed"));
    }

    #[test]
    fn an_error_is_handed_on_whenever_it_comes() {
        let (reporter, outcome) = pair().unwrap();
        reporter.failed("no room");
        assert_eq!(outcome.wait(), Err("no room".into()));
        let (mut reporter, outcome) = pair().unwrap();
        reporter.ready();
        reporter.failed("no program");
        assert_eq!(outcome.wait(), Err("no program".into()));
    }
}
