//! What a person sees while something takes long: nothing for the first two seconds, then what and for how long.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// Steps shorter than this are not shown.
const QUIET: Duration = Duration::from_secs(2);
/// Without a terminal, one line this often tells that a step is still at work.
const HEARTBEAT: Duration = Duration::from_secs(30);
/// Lines of a failed command's output that are shown.
const TAIL: usize = 100;

/// Shows steps on stderr.
#[derive(Clone)]
pub struct Progress {
    terminal: bool,
    always: bool,
}

impl Progress {
    /// Shows only what takes more than two seconds.
    pub fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            always: false,
        }
    }

    /// Shows every step, with the time it took: for checks, where the steps are the result.
    pub fn every_step() -> Self {
        Self {
            always: true,
            ..Self::new()
        }
    }

    /// Starts a step. `what` is a short text such as "building the guest kernel".
    pub fn step(&self, what: &str) -> Step {
        let note = Arc::new(Mutex::new(String::new()));
        let (stop, stopped) = channel::<()>();
        let started = Instant::now();
        if self.always && !self.terminal {
            eprintln!("{what}");
        }
        let shown = {
            let (what, note) = (what.to_owned(), Arc::clone(&note));
            let terminal = self.terminal;
            std::thread::spawn(move || {
                if stopped.recv_timeout(QUIET) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                if terminal {
                    spin(&what, &note, started, &stopped);
                } else {
                    beat(&what, &note, started, &stopped);
                }
            })
        };
        Step {
            what: what.to_owned(),
            always: self.always,
            note,
            started,
            shown: Some((stop, shown)),
        }
    }

    /// Runs `command` as the step `what`; its last line of output is the step's note.
    ///
    /// # Errors
    /// If it cannot be started or fails; the error carries the end of its output.
    pub fn run(&self, what: &str, command: &mut Command) -> Result<()> {
        let (reader, writer) = std::io::pipe()?;
        command.stdout(writer.try_clone()?).stderr(writer);
        let step = self.step(what);
        let child = Started::new(command)?;
        let (status, tail) = child.follow(&step, reader)?;
        child_result(step, what, command, status, tail)
    }

    /// The same, with the command's stdout returned; the note and the error are from its stderr.
    pub fn capture(&self, what: &str, command: &mut Command) -> Result<Vec<u8>> {
        let (reader, writer) = std::io::pipe()?;
        command.stdout(Stdio::piped()).stderr(writer);
        let step = self.step(what);
        let mut child = Started::new(command)?;
        let stdout = child.0.stdout.take();
        let captured = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stdout) = stdout {
                stdout.read_to_end(&mut bytes)?;
            }
            std::io::Result::Ok(bytes)
        });
        let (status, tail) = child.follow(&step, reader)?;
        child_result(step, what, command, status, tail)?;
        match captured.join() {
            Ok(bytes) => Ok(bytes?),
            Err(_) => bail!("{what}: its output could not be read"),
        }
    }
}

struct Started(Child);

impl Started {
    fn new(command: &mut Command) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        // The command holds the pipe's other end until it is replaced.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(child))
    }

    fn follow(mut self, step: &Step, output: impl Read) -> Result<(ExitStatus, VecDeque<String>)> {
        let mut tail = VecDeque::new();
        let mut lines = BufReader::new(output);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            step.note(&text);
            if tail.len() == TAIL {
                tail.pop_front();
            }
            tail.push_back(text);
            line.clear();
        }
        Ok((self.0.wait()?, tail))
    }
}

fn child_result(
    step: Step,
    what: &str,
    command: &Command,
    status: ExitStatus,
    tail: VecDeque<String>,
) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    step.failed();
    bail!(
        "{what} failed: {} ended with {status}\n{}",
        command.get_program().display(),
        Vec::from(tail).join("\n")
    );
}

/// A step being shown; it ends when dropped.
pub struct Step {
    what: String,
    always: bool,
    note: Arc<Mutex<String>>,
    started: Instant,
    shown: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Step {
    /// Shows `text` beside the step.
    pub fn note(&self, text: &str) {
        text.clone_into(&mut self.note.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Ends the step with a short text about its result.
    pub fn done(mut self, result: &str) {
        self.end(result);
    }

    /// Ends the step as failed.
    pub fn failed(mut self) {
        self.end("failed");
    }

    fn end(&mut self, how: &str) {
        let Some((stop, shown)) = self.shown.take() else {
            return;
        };
        drop(stop);
        // The thread only draws: if it panicked there is nothing to undo.
        let _ = shown.join();
        let took = self.started.elapsed();
        if self.always || took >= QUIET {
            eprintln!("{}: {how} ({:.1} s)", self.what, took.as_secs_f32());
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.end("done");
    }
}

type Stopped = std::sync::mpsc::Receiver<()>;

fn spin(what: &str, note: &Mutex<String>, started: Instant, stopped: &Stopped) {
    let bar = ProgressBar::new_spinner().with_style(
        ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {wide_msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    bar.set_prefix(what.to_owned());
    bar.set_elapsed(started.elapsed());
    loop {
        bar.set_message(note.lock().unwrap_or_else(PoisonError::into_inner).clone());
        bar.tick();
        if stopped.recv_timeout(Duration::from_millis(120)) != Err(RecvTimeoutError::Timeout) {
            break;
        }
    }
    bar.finish_and_clear();
}

fn beat(what: &str, note: &Mutex<String>, started: Instant, stopped: &Stopped) {
    loop {
        let text = note.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let seconds = started.elapsed().as_secs();
        if text.is_empty() {
            eprintln!("{what} ... {seconds} s");
        } else {
            eprintln!("{what} ... {seconds} s: {text}");
        }
        if stopped.recv_timeout(HEARTBEAT) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_command_shows_the_end_of_its_output() {
        let error = Progress::new()
            .run(
                "counting",
                Command::new("sh").args(["-c", "seq 200; echo oops >&2; exit 3"]),
            )
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("counting failed: sh ended with exit status: 3\n102\n"));
        assert!(error.ends_with("200\noops"), "{error}");
    }

    #[test]
    fn a_command_that_is_not_there_is_named() {
        let error = Progress::new()
            .run("nothing", &mut Command::new("/nonexistent/program"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent/program"), "{error}");
    }
}
