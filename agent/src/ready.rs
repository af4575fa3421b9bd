//! The one line by which the agent says that it is up.
//!
//! `lepton-agent 0.1.0 protocol=1 start_us=41000 ready_us=43500`, ended by a newline.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::str::FromStr;

/// The longest line accepted, newline included, in bytes.
pub const MAX_LINE: usize = 256;

/// What the line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// The agent's version: letters, digits, `.`, `-` and `+` only.
    pub version: String,
    /// The protocol it speaks, see [`crate::PROTOCOL_VERSION`].
    pub protocol: u32,
    /// Microseconds from the start of the guest's kernel to the start of the agent.
    pub start_us: u64,
    /// Microseconds from the start of the guest's kernel to this line.
    pub ready_us: u64,
}

/// Why a line is not a [`Ready`].
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    #[error("the agent's ready line did not come: {0}")]
    Read(#[from] std::io::Error),
    #[error("the agent's ready line is longer than {MAX_LINE} bytes or was cut off")]
    Length,
    #[error("the agent's ready line is malformed at its field {0:?}")]
    Field(&'static str),
}

impl Ready {
    /// Reads one line from `source`, never more than [`MAX_LINE`] bytes.
    ///
    /// # Errors
    /// [`ReadyError`], also when `source` ends or times out before the newline.
    pub fn read_from(source: impl Read) -> Result<Self, ReadyError> {
        let mut line = Vec::new();
        BufReader::with_capacity(MAX_LINE, source.take(MAX_LINE as u64))
            .read_until(b'\n', &mut line)?;
        let line = line.strip_suffix(b"\n").ok_or(ReadyError::Length)?;
        std::str::from_utf8(line)
            .map_err(|_| ReadyError::Field("version"))?
            .parse()
    }
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            version,
            protocol,
            start_us,
            ready_us,
        } = self;
        write!(
            f,
            "lepton-agent {version} protocol={protocol} start_us={start_us} ready_us={ready_us}"
        )
    }
}

impl FromStr for Ready {
    type Err = ReadyError;

    fn from_str(line: &str) -> Result<Self, ReadyError> {
        if line.len() >= MAX_LINE {
            return Err(ReadyError::Length);
        }
        let mut words = line.split(' ');
        if words.next() != Some("lepton-agent") {
            return Err(ReadyError::Field("lepton-agent"));
        }
        let version = words.next().unwrap_or_default();
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+');
        if version.is_empty() || !version.chars().all(plain) {
            return Err(ReadyError::Field("version"));
        }
        // Words that a newer agent adds are not ours to refuse.
        let rest: Vec<&str> = words.collect();
        Ok(Self {
            version: version.to_owned(),
            protocol: number(&rest, "protocol")?,
            start_us: number(&rest, "start_us")?,
            ready_us: number(&rest, "ready_us")?,
        })
    }
}

fn number<T: FromStr>(words: &[&str], key: &'static str) -> Result<T, ReadyError> {
    words
        .iter()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        .and_then(|value| value.parse().ok())
        .ok_or(ReadyError::Field(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_that_never_ends_is_refused() {
        let endless = std::io::repeat(b'a');
        assert!(matches!(Ready::read_from(endless), Err(ReadyError::Length)));
    }

    #[test]
    fn a_cut_off_line_is_refused() {
        assert!(matches!(
            Ready::read_from(&b"lepton-agent 0.1.0 protocol=1"[..]),
            Err(ReadyError::Length)
        ));
    }

    #[test]
    fn a_version_cannot_carry_terminal_escapes() {
        let line = "lepton-agent \x1b[2J protocol=1 start_us=1 ready_us=2";
        assert!(matches!(
            line.parse::<Ready>(),
            Err(ReadyError::Field("version"))
        ));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            version in "[a-z0-9.+-]{1,40}", protocol: u32, start_us: u64, ready_us: u64
        ) {
            let ready = Ready { version, protocol, start_us, ready_us };
            let line = format!("{ready} later=7\nrest");
            prop_assert_eq!(Ready::read_from(line.as_bytes()).unwrap(), ready);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Ready::read_from(&bytes[..]);
        }

        #[test]
        fn almost_right_lines_are_read_or_refused(
            line in "lepton-agent [ -~]{0,20}( (protocol|start_us|ready_us)=[0-9]{0,25}){0,4}\n"
        ) {
            if let Ok(ready) = Ready::read_from(line.as_bytes()) {
                prop_assert!(ready.version.len() < MAX_LINE);
            }
        }
    }
}
