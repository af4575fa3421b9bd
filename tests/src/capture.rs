//! What a process writes, kept and waited for.

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
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
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
            state
                .bytes
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
        state.bytes.clone()
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
    #[should_panic(expected = "\"never\" did not come:\nother")]
    fn a_stream_that_ends_without_the_pattern_fails() {
        Capture::of(&b"other"[..]).wait_for("never");
    }
}
