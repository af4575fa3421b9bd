//! Where the log and the metrics go.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::string_on_the_wire;

/// Body of `PUT /logger`: what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// File or named pipe for the log.
    pub log_path: Option<PathBuf>,
    /// Least severe level that is still written.
    pub level: Option<LogLevel>,
    /// Write the level on each line.
    pub show_level: Option<bool>,
    /// Write the source file and line on each line.
    pub show_log_origin: Option<bool>,
    /// Write only what modules under this path say.
    pub module: Option<String>,
}

/// A log level. Read without regard to case; `Warn` and `Warning` are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Nothing is written.
    Off,
    /// Errors only.
    Error,
    /// And warnings.
    Warn,
    /// And what the VMM does at each request.
    Info,
    /// And details for finding defects.
    Debug,
    /// And everything else.
    Trace,
}

impl LogLevel {
    const NAMES: [(&'static str, LogLevel); 7] = [
        ("Off", LogLevel::Off),
        ("Error", LogLevel::Error),
        ("Warn", LogLevel::Warn),
        ("Warning", LogLevel::Warn),
        ("Info", LogLevel::Info),
        ("Debug", LogLevel::Debug),
        ("Trace", LogLevel::Trace),
    ];
}

/// A text that is no log level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid log level {0:?}, expected one of Off, Error, Warning, Info, Debug, Trace")]
pub struct LogLevelError(String);

impl FromStr for LogLevel {
    type Err = LogLevelError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::NAMES
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(text))
            .map(|(_, level)| *level)
            .ok_or_else(|| LogLevelError(text.to_owned()))
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

string_on_the_wire!(LogLevel);

impl From<LogLevel> for log::LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Off => Self::Off,
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
            LogLevel::Trace => Self::Trace,
        }
    }
}

/// Body of `PUT /metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsTarget {
    /// File or named pipe that receives a line of JSON at each flush.
    pub metrics_path: PathBuf,
    /// Put the machine's id on each line as `id`.
    #[serde(default)]
    pub emit_id: bool,
    /// Put these pairs on each line as `properties`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}
