//! What a process writes, kept and waited for.
//!
//! A VMM writes two things to its standard output, the guest's console byte by byte and its log line by line, so that a
//! line of the log can stand in the midst of the guest's. Here it stands before it.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::PATIENCE;

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

/// What a line of the log begins with: digits are zeroes here.
const TIME: &[u8] = b"0000-00-00T00:00:00.000000000 [";

fn begins_log_line(bytes: &[u8]) -> bool {
    let Some(head) = bytes.get(..TIME.len()) else {
        return false;
    };
    let is_alike = |(byte, form): (&u8, &u8)| match form {
        b'0' => byte.is_ascii_digit(),
        _ => byte == form,
    };
    head.iter().zip(TIME).all(is_alike)
}

/// `bytes` with each complete line of the log that stands in the midst of another line before that line.
fn untangled(bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes.len());
    let mut line = 0;
    let mut rest = bytes;
    while let Some((&byte, after)) = rest.split_first() {
        if text.len() > line
            && begins_log_line(rest)
            && let Some(end) = rest.iter().position(|&byte| byte == b'\n')
        {
            let (log, after) = rest.split_at(end + 1);
            text.splice(line..line, log.iter().copied());
            line += log.len();
            rest = after;
            continue;
        }
        text.push(byte);
        if byte == b'\n' {
            line = text.len();
        }
        rest = after;
    }
    text
}

/// A stream that a thread reads to its end.
#[derive(Clone, Default)]
pub struct Capture(Arc<(Mutex<State>, Condvar)>);

impl Capture {
    /// Starts to read.
    pub fn of(mut stream: impl Read + Send + 'static) -> Self {
        let capture = Self::default();
        let shared = capture.clone();
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            // A failed read is an end: a terminal's stream ends that way.
            while let Ok(length @ 1..) = stream.read(&mut chunk) {
                shared.lock().bytes.extend_from_slice(&chunk[..length]);
                shared.0.1.notify_all();
            }
            shared.lock().ended = true;
            shared.0.1.notify_all();
        });
        capture
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_until(
        &self,
        patience: Duration,
        done: impl Fn(&State) -> bool,
    ) -> MutexGuard<'_, State> {
        let (state, _) = self
            .0
            .1
            .wait_timeout_while(self.lock(), patience, |state| !done(state) && !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        state
    }

    /// All so far, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&untangled(&self.lock().bytes)).into_owned()
    }

    /// Waits until the stream contains `pattern`.
    ///
    /// # Panics
    /// If the stream ends without it, or it does not come in time.
    #[track_caller]
    pub fn wait_for(&self, pattern: &str) {
        self.wait_for_within(pattern, PATIENCE);
    }

    /// As [`Capture::wait_for`], for what takes longer.
    #[track_caller]
    pub fn wait_for_within(&self, pattern: &str, patience: Duration) {
        let found = |state: &State| {
            untangled(&state.bytes)
                .windows(pattern.len())
                .any(|window| window == pattern.as_bytes())
        };
        let state = self.wait_until(patience, found);
        let there = found(&state);
        drop(state);
        assert!(there, "{pattern:?} did not come:\n{}", self.text());
    }

    /// Waits for the stream's end, and returns all of it.
    ///
    /// # Panics
    /// If the end does not come in time.
    #[track_caller]
    pub fn to_end(&self) -> Vec<u8> {
        let state = self.wait_until(PATIENCE, |_| false);
        assert!(state.ended, "the stream did not end");
        untangled(&state.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_pattern_that_comes_in_pieces_is_found() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let capture = Capture::of(reader);
        writer.write_all(b"login").unwrap();
        writer.write_all(b": ").unwrap();
        capture.wait_for("gin: ");
        drop(writer);
        assert_eq!(capture.to_end(), b"login: ");
    }

    #[test]
    fn a_line_of_the_log_does_not_part_a_line_of_the_guest() {
        let log = "2026-11-22T03:31:07.100329733 [vm:main] the guest reset itself\n";
        let stream = format!("{log}P{log}AN{log}IC\nend");
        let capture = Capture::of(std::io::Cursor::new(stream.clone()));
        capture.wait_for("PANIC\n");
        let text = String::from_utf8(capture.to_end()).unwrap();
        assert_eq!(text, format!("{log}{log}{log}PANIC\nend"));
        // What is no line of the log, or not all of one, stays where it is.
        for other in ["a 2026-11-22T03:31:07 [x]\nb", &stream[..log.len() + 40]] {
            assert_eq!(untangled(other.as_bytes()), other.as_bytes());
        }
    }

    #[test]
    #[should_panic(expected = "\"never\" did not come:\nother")]
    fn a_stream_that_ends_without_the_pattern_fails() {
        Capture::of(&b"other"[..]).wait_for("never");
    }
}
