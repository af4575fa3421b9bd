//! The benchmark harness: ours and its peers, measured in turn in one run.
//!
//! [`catalogue`] lists the benchmarks; [`measure`] does them; [`side`] drives each VMM by its own command line and API;
//! [`load`] is work for a guest and its host; [`schedule`] does the rounds; [`results`] is what comes out, [`report`] shows it to a person.

pub mod bars;
pub mod catalogue;
pub mod guest;
pub mod host;
pub mod init;
pub mod interrupt;
pub mod load;
pub mod machine;
pub mod measure;
pub mod pages;
pub mod process;
pub mod report;
pub mod results;
pub mod schedule;
pub mod side;
pub mod stats;
pub mod tap;
pub mod text;
pub mod wire;

/// A number with about four digits, as a person reads it.
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => 0,
        size if size >= 1000.0 => 0,
        size if size >= 100.0 => 1,
        size if size >= 10.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}
