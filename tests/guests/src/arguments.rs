//! The kernel command line: words with spaces between them. Those meant for a guest program have the form
//! `program.name=value`.

use crate::boot;

/// The words.
pub fn words() -> impl Iterator<Item = &'static str> {
    boot::command_line()
        .split(' ')
        .filter(|word| !word.is_empty())
}

/// The value of the last word `program.name=value`, whatever the program: only one runs.
pub fn text(name: &str) -> Option<&'static str> {
    words()
        .filter_map(|word| {
            let (_, word) = word.split_once('.')?;
            word.strip_prefix(name)?.strip_prefix('=')
        })
        .last()
}

/// The number given for `name`, or else `default`.
///
/// # Panics
/// If what is given is no number.
pub fn number(name: &str, default: u64) -> u64 {
    match text(name) {
        None => default,
        Some(value) => match parse_number(value) {
            Some(number) => number,
            None => panic!("{name}: {value} is not a number"),
        },
    }
}

/// A number, decimal or hexadecimal after `0x`.
pub fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}
