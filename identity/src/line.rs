//! What is on the lines.

use std::fmt::{self, Write};
use std::str::FromStr;

/// Why a text is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// It has more bytes than are allowed.
    #[error("the message is too long")]
    Long,
    /// Its end is missing, or something follows it.
    #[error("the message does not end where it should")]
    Cut,
    /// A line that must be there is not.
    #[error("there is no {0}")]
    Missing(&'static str),
    /// A line or a word that may be there once is there again.
    #[error("{0} is there twice")]
    Twice(String),
    /// A word is not what it should be.
    #[error("{text:?} is no {what}")]
    Word {
        /// What it should be.
        what: &'static str,
        /// The beginning of it.
        text: String,
    },
}

impl ParseError {
    pub(crate) fn of(what: &'static str, text: &str) -> Self {
        ParseError::Word {
            what,
            text: text.chars().take(40).collect(),
        }
    }
}

/// Sets `field` to what `value` says, if it was not set before.
pub(crate) fn once<T: FromStr>(
    field: &mut Option<T>,
    key: &str,
    value: &str,
) -> Result<(), ParseError> {
    let parsed = value
        .parse()
        .map_err(|_| ParseError::of("value of that line", value))?;
    match field.replace(parsed) {
        None => Ok(()),
        Some(_) => Err(ParseError::Twice(key.to_owned())),
    }
}

/// So many bytes, in hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hex<const N: usize>(pub [u8; N]);

impl<const N: usize> fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<const N: usize> FromStr for Hex<N> {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let failed = || ParseError::of("row of hexadecimal digits of that length", text);
        if text.len() != 2 * N {
            return Err(failed());
        }
        let mut bytes = [0; N];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = pair_of(pair).ok_or_else(failed)?;
        }
        Ok(Hex(bytes))
    }
}

/// The byte that two digits are.
fn pair_of(pair: &[u8]) -> Option<u8> {
    let digit = |digit: &u8| char::from(*digit).to_digit(16);
    let [high, low] = pair else {
        return None;
    };
    u8::try_from(digit(high)? << 4 | digit(low)?).ok()
}

/// An interface's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_char(':')?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for Mac {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let failed = || ParseError::of("MAC address", text);
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().ok_or_else(failed)?;
            *byte = pair_of(pair.as_bytes()).ok_or_else(failed)?;
        }
        match pairs.next() {
            None => Ok(Mac(bytes)),
            Some(_) => Err(failed()),
        }
    }
}
