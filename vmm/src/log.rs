//! The log, in Firecracker's form: `TIME [ID:THREAD:LEVEL:FILE:LINE] MESSAGE`.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::SystemTime;

use lepton_api::types::Logger as Settings;
use log::{LevelFilter, Log, Metadata, Record};

/// A sink that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct SinkError {
    path: PathBuf,
    source: std::io::Error,
}

struct State {
    id: String,
    sink: Option<File>,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
}

struct Logger {
    state: RwLock<State>,
    missed: AtomicU64,
}

static LOGGER: Logger = Logger {
    state: RwLock::new(State {
        id: String::new(),
        sink: None,
        show_level: false,
        show_origin: false,
        module: None,
    }),
    missed: AtomicU64::new(0),
};

/// Where lines go, for whoever cannot wait for the logger: a handler of a signal.
static DESCRIPTOR: AtomicI32 = AtomicI32::new(libc::STDOUT_FILENO);

/// Where lines go: a descriptor that stays open.
pub fn descriptor() -> RawFd {
    DESCRIPTOR.load(Ordering::Relaxed)
}

/// Starts to log to the standard output at level Info, as machine `id`.
pub fn init(id: &str) {
    write_state(|state| state.id = id.to_owned());
    // The first logger stays; there is no second in this program.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Changes what `settings` names, and leaves the rest.
pub fn configure(settings: &Settings) -> Result<(), SinkError> {
    let sink = settings.log_path.as_deref().map(open_sink).transpose()?;
    write_state(|state| {
        if let Some(file) = sink {
            DESCRIPTOR.store(file.as_raw_fd(), Ordering::Relaxed);
            state.sink = Some(file);
        }
        state.show_level = settings.show_level.unwrap_or(state.show_level);
        state.show_origin = settings.show_log_origin.unwrap_or(state.show_origin);
        if settings.module.is_some() {
            state.module.clone_from(&settings.module);
        }
    });
    if let Some(level) = settings.level {
        log::set_max_level(level.into());
    }
    Ok(())
}

/// Lines that could not be written.
pub fn missed() -> u64 {
    LOGGER.missed.load(Ordering::Relaxed)
}

/// Opens a file or named pipe to append to. Without blocking: a pipe that nobody reads must not stop the machine.
pub fn open_sink(path: &Path) -> Result<File, SinkError> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options()
        .append(true)
        .read(true)
        .create(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(|source| SinkError {
            path: path.to_owned(),
            source,
        })
}

fn write_state(change: impl FnOnce(&mut State)) {
    change(&mut LOGGER.state.write().unwrap_or_else(PoisonError::into_inner));
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        match &state.module {
            Some(prefix) => metadata.target().starts_with(prefix.as_str()),
            None => true,
        }
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let line = format(&state, record);
        let written = match &state.sink {
            // Through a shared reference: lines of several threads go out whole, one write each.
            Some(file) => (&*file).write_all(line.as_bytes()),
            None => std::io::stdout().write_all(line.as_bytes()),
        };
        if written.is_err() {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

fn format(state: &State, record: &Record) -> String {
    let time = humantime::format_rfc3339_nanos(SystemTime::now()).to_string();
    let time = time.trim_end_matches('Z');
    let thread = std::thread::current();
    // All threads but the first are given a name.
    let thread = thread.name().unwrap_or("main");
    let level = if state.show_level {
        format!(":{}", record.level())
    } else {
        String::new()
    };
    let origin = if state.show_origin {
        let file = record.file().unwrap_or("unknown");
        format!(":{file}:{}", record.line().unwrap_or(0))
    } else {
        String::new()
    };
    let id = &state.id;
    format!("{time} [{id}:{thread}{level}{origin}] {}\n", record.args())
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::Level;

    fn line(show: bool) -> String {
        let state = State {
            id: "vm-1".into(),
            sink: None,
            show_level: show,
            show_origin: show,
            module: None,
        };
        let record = Record::builder()
            .args(format_args!("hello"))
            .level(Level::Warn)
            .file(Some("a.rs"))
            .line(Some(7))
            .build();
        format(&state, &record)
    }

    #[test]
    fn form_is_as_clients_parse_it() {
        let (time, rest) = line(true)
            .split_once(' ')
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .unwrap();
        assert_eq!(time.len(), "2018-11-07T05:34:25.180751152".len());
        assert!(rest.starts_with("[vm-1:"), "{rest}");
        assert!(rest.ends_with(":WARN:a.rs:7] hello\n"), "{rest}");
        assert!(!line(false).contains("WARN"));
    }

    #[test]
    fn a_sink_that_cannot_be_opened_is_named() {
        let error = open_sink(Path::new("/no/such/place")).unwrap_err();
        assert!(error.to_string().starts_with("/no/such/place: "));
    }
}
