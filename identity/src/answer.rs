//! What the guest answers: `ok`, or `failed REASON`, and a newline.

use std::fmt;
use std::str::FromStr;

use crate::line::ParseError;

/// Most bytes of an answer, with its newline.
pub const MAX_ANSWER: usize = 256;

/// What the guest answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is who it was told to be.
    Done,
    /// It is not, for this reason: printable, and no longer than fits.
    Failed(String),
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Answer::Done => writeln!(f, "ok"),
            Answer::Failed(reason) => writeln!(f, "failed {}", printable(reason)),
        }
    }
}

fn printable(text: &str) -> String {
    // A character has no more than four bytes.
    let room = (MAX_ANSWER - "failed \n".len()) / 4;
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(room).map(clean).collect()
}

impl FromStr for Answer {
    type Err = ParseError;

    fn from_str(line: &str) -> Result<Self, ParseError> {
        if line.len() > MAX_ANSWER {
            return Err(ParseError::Long);
        }
        let line = line.strip_suffix('\n').ok_or(ParseError::Cut)?;
        match line.split_once(' ') {
            None if line == "ok" => Ok(Answer::Done),
            Some(("failed", reason)) => Ok(Answer::Failed(printable(reason))),
            _ => Err(ParseError::of("answer", line)),
        }
    }
}
