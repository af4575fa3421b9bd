//! `cargo xtask`: the one entry point for people and CI. See [`cli`] for what it offers.

mod bench;
mod cache;
mod check;
mod cli;
mod doctor;
mod fuzz;
mod guest;
mod host;
mod lab;
mod packages;
mod programs;
mod progress;
mod run;
mod selftest;
mod terminal;
mod verify_unique;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = cli::Arguments::parse();
    if let Err(error) = terminal::restore_on_signals() {
        eprintln!("error: cannot handle signals: {error}");
        return ExitCode::FAILURE;
    }
    match cli::run(arguments) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            let from_lab = error.downcast_ref::<lab::LabError>();
            // Who closed the pipe knows: like any filter, we end without a word.
            if !from_lab.is_some_and(lab::LabError::is_broken_pipe) {
                eprintln!("error: {error:#}");
            }
            ExitCode::from(from_lab.map_or(1, lab::LabError::exit_status))
        }
    }
}
