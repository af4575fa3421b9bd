//! `lepton-hot-paths`: lists the paths; `lepton-hot-paths NAME TIMES` takes one that often, for whoever counts its
//! instructions.

use std::process::ExitCode;

use lepton_hot_paths::PATHS;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.is_empty() {
        for path in PATHS {
            println!("{}", path.name);
        }
        return ExitCode::SUCCESS;
    }
    let path = words
        .first()
        .and_then(|name| PATHS.iter().find(|path| path.name == name));
    let times = words.get(1).and_then(|times| times.parse::<u32>().ok());
    let (Some(path), Some(times)) = (path, times) else {
        eprintln!("usage: lepton-hot-paths [NAME TIMES]");
        return ExitCode::FAILURE;
    };
    let mut run = (path.prepare)();
    for _ in 0..times {
        run();
    }
    ExitCode::SUCCESS
}
