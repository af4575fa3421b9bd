//! `lepton-jailer`: not there yet. It says so, rather than start a machine that is thought to be confined and is not.

use std::process::ExitCode;

fn main() -> ExitCode {
    eprintln!(
        "lepton-jailer: this version has no jailer; start lepton-vmm itself, confined by other means"
    );
    ExitCode::FAILURE
}
