//! Carries bytes between this program's streams and the lab's wires.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::{Handle, Signals};

use super::Streams;
use super::machine::Running;
use crate::terminal;

/// Takes a stream's bytes.
pub type Sink = Box<dyn Write + Send>;

/// The console's end that is kept to be shown.
const CONSOLE_KEPT: usize = 16 << 10;

/// This program's stdout, not line-buffered.
pub fn stdout() -> io::Result<Sink> {
    Ok(Box::new(File::from(
        io::stdout().as_fd().try_clone_to_owned()?,
    )))
}

/// This program's stderr.
pub fn stderr() -> io::Result<Sink> {
    Ok(Box::new(File::from(
        io::stderr().as_fd().try_clone_to_owned()?,
    )))
}

/// What happens in the lab. Clocks are the lab's own.
pub enum Event {
    /// The command starts.
    Started { clock: Duration },
    /// The command has ended and all its output is on its way.
    Ended { status: u8, clock: Duration },
    /// The machine is gone.
    ReportClosed,
    /// Our own output cannot be written.
    OutputClosed(io::Error),
}

/// The threads at work.
pub struct Relay {
    outputs: Vec<JoinHandle<()>>,
    console: JoinHandle<VecDeque<u8>>,
    // Dropped in this order: the input thread ends, resizes are no longer followed, the terminal is as it was.
    _stop: OwnedFd,
    _resizes: Option<Resizes>,
    _raw: Option<terminal::Raw>,
}

struct Resizes(Handle);

impl Drop for Resizes {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Relay {
    /// Waits until all output has been written; the machine must have ended. Returns the end of its console.
    pub fn finish(self) -> String {
        for output in self.outputs {
            // A sink that panics has said so on stderr.
            let _ = output.join();
        }
        let console = Vec::from(self.console.join().unwrap_or_default());
        String::from_utf8_lossy(&console)
            .replace('\r', "")
            .trim()
            .to_owned()
    }
}

/// Starts carrying.
pub fn start(machine: &mut Running, streams: Streams, events: &Sender<Event>) -> io::Result<Relay> {
    let console = machine.console.try_clone()?;
    let console = std::thread::spawn(move || keep_end(console));
    let report = BufReader::new(machine.report.try_clone()?);
    let report_events = events.clone();
    std::thread::spawn(move || read_report(report, &report_events));

    let (stopped, stop) = rustix::pipe::pipe()?;
    let mut outputs = Vec::new();
    let (mut resizes, mut raw) = (None, None);
    let mut reads = true;
    match streams {
        Streams::Terminal => {
            raw = Some(terminal::Raw::enter()?);
            resizes = Some(follow_size(machine.report.try_clone()?)?);
            if let Some(wire) = &machine.input {
                outputs.push(carry_out(wire.try_clone()?, stdout()?, events.clone()));
            }
        }
        Streams::Pipes {
            input,
            output,
            error,
        } => {
            reads = input;
            if let Some((out, err)) = &machine.outputs {
                outputs.push(carry_out(out.try_clone()?, output, events.clone()));
                outputs.push(carry_out(err.try_clone()?, error, events.clone()));
            }
        }
    }
    if let Some(wire) = machine
        .input
        .as_ref()
        .map(UnixStream::try_clone)
        .transpose()?
    {
        if reads {
            let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
            std::thread::spawn(move || carry_in(input, wire, &stopped));
        } else {
            wire.shutdown(Shutdown::Write)?;
        }
    }
    Ok(Relay {
        outputs,
        console,
        _stop: stop,
        _resizes: resizes,
        _raw: raw,
    })
}

fn keep_end(mut wire: impl Read) -> VecDeque<u8> {
    let mut kept = VecDeque::new();
    let mut chunk = [0; 4096];
    // A wire that breaks ends like one that is closed: what was read is what there is.
    while let Ok(read @ 1..) = wire.read(&mut chunk) {
        kept.extend(chunk.iter().take(read));
        let surplus = kept.len().saturating_sub(CONSOLE_KEPT);
        kept.drain(..surplus);
    }
    kept
}

fn read_report(report: impl BufRead, events: &Sender<Event>) {
    for event in report
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| parse(&line))
    {
        if events.send(event).is_err() {
            return;
        }
    }
    // If nobody listens any more, nobody needs to know.
    let _ = events.send(Event::ReportClosed);
}

/// Lines as `start.sh` writes them.
fn parse(line: &str) -> Option<Event> {
    let mut words = line.split_whitespace();
    let kind = words.next()?;
    let status = if kind == "exit" {
        words.next()?.parse().ok()?
    } else {
        0
    };
    // A kernel without a timer list has no clock to tell.
    let clock = Duration::from_nanos(words.next().and_then(|word| word.parse().ok()).unwrap_or(0));
    match kind {
        "start" => Some(Event::Started { clock }),
        "exit" => Some(Event::Ended { status, clock }),
        _ => None,
    }
}

fn carry_out(mut wire: UnixStream, mut sink: Sink, events: Sender<Event>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut chunk = vec![0; 64 << 10];
        while let Ok(read @ 1..) = wire.read(&mut chunk) {
            if let Err(error) = sink.write_all(chunk.get(..read).unwrap_or_default()) {
                let _ = events.send(Event::OutputClosed(error));
                return;
            }
        }
        let _ = sink.flush();
    })
}

/// Carries our stdin to the lab until it ends, or until `stopped` is closed at its other end.
fn carry_in(mut input: File, mut wire: UnixStream, stopped: &OwnedFd) {
    let mut chunk = vec![0; 64 << 10];
    loop {
        let mut fds = [
            PollFd::new(&input, PollFlags::IN),
            PollFd::new(stopped, PollFlags::empty()),
        ];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        match input.read(&mut chunk) {
            Ok(read @ 1..) => {
                if wire
                    .write_all(chunk.get(..read).unwrap_or_default())
                    .is_err()
                {
                    return;
                }
            }
            // The end of our input, or a terminal that was hung up, is the end of the command's.
            Ok(0) | Err(_) => {
                let _ = wire.shutdown(Shutdown::Write);
                return;
            }
        }
    }
}

/// Tells the lab the terminal's size whenever it changes.
fn follow_size(mut report: UnixStream) -> io::Result<Resizes> {
    let mut signals = Signals::new([SIGWINCH])?;
    let handle = signals.handle();
    std::thread::spawn(move || {
        for _ in signals.forever() {
            let (rows, columns) = terminal::size();
            if writeln!(report, "{rows} {columns}").is_err() {
                return;
            }
        }
    });
    Ok(Resizes(handle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read() {
        assert!(matches!(
            parse("start 1500"),
            Some(Event::Started { clock }) if clock == Duration::from_nanos(1500)
        ));
        assert!(matches!(
            parse("exit 137 2000\r"),
            Some(Event::Ended { status: 137, clock }) if clock == Duration::from_nanos(2000)
        ));
        assert!(matches!(
            parse("exit 3 "),
            Some(Event::Ended { status: 3, .. })
        ));
        assert!(parse("exit 300 1").is_none());
        assert!(parse("").is_none());
        assert!(parse("something else").is_none());
    }

    #[test]
    fn the_console_keeps_its_end() {
        let mut text = vec![b'a'; CONSOLE_KEPT];
        text.extend_from_slice(b"the end");
        let kept = Vec::from(keep_end(text.as_slice()));
        assert_eq!(kept.len(), CONSOLE_KEPT);
        assert!(kept.ends_with(b"the end"));
    }
}
