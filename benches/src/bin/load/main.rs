//! `lepton-load WORK [TARGET]`: does a kind of work for a moment, in a guest or on its host, and prints its rate.

use std::process::ExitCode;

use lepton_benches::load::{self, WORKS};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (work, target) = match &words[..] {
        [work] => (work, ""),
        [work, target] => (work, target.as_str()),
        _ => return usage(),
    };
    let Some(work) = load::find(work) else {
        return usage();
    };
    match load::run(work, target) {
        Ok(rate) => {
            println!("{rate}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("lepton-load: {} {target}: {error}", work.name);
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    let names: Vec<&str> = WORKS.iter().map(|work| work.name).collect();
    eprintln!(
        "usage: lepton-load WORK [TARGET]; works are {}",
        names.join(", ")
    );
    ExitCode::FAILURE
}
