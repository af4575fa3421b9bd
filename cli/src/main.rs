//! `lepton`: a command in a microVM.
//!
//! `lepton run` starts a VMM, boots a guest, runs one command in it and shuts it down again;
//! `lepton exec` runs a command in a guest that is there already. Both end with the command's exit
//! status. A failure of our own is status 125, a command that cannot be executed 126, and one that
//! is not found 127.

mod arguments;
mod host_signals;
mod run;
mod session;
mod terminal;

use std::process::ExitCode;

use clap::Parser;
use lepton_agent::client::Client;

use arguments::{Arguments, Subcommand};
use host_signals::HostSignals;
use session::{Session, SessionError};

/// The exit status for failures of our own, as other tools that run commands elsewhere have it.
const OWN_FAILURE: u8 = 125;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Of no use to report: there is nobody to read it.
            let _ = error.print();
            // Help and version are successes.
            return ExitCode::from(if error.use_stderr() { OWN_FAILURE } else { 0 });
        }
    };
    let result = match arguments.subcommand {
        Subcommand::Run(arguments) => run::run(&arguments).map_err(Failure::from),
        Subcommand::Exec(arguments) => exec(&arguments),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("lepton: {failure}");
            ExitCode::from(failure.status())
        }
    }
}

/// Why there is no exit status of the command.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Run(#[from] run::RunError),
    #[error(transparent)]
    Connect(#[from] lepton_agent::client::ConnectError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("cannot take the signals: {0}")]
    Signals(std::io::Error),
}

impl Failure {
    fn status(&self) -> u8 {
        match self {
            Self::Run(run::RunError::Session(error)) | Self::Session(error) => error.status(),
            _ => OWN_FAILURE,
        }
    }
}

fn exec(arguments: &arguments::Exec) -> Result<u8, Failure> {
    let signals = HostSignals::take().map_err(Failure::Signals)?;
    let client = Client::connect(&arguments.vsock)?;
    let session = Session {
        client: &client,
        signals: &signals,
        vmm: None,
    };
    Ok(session.run(&arguments.command)?)
}
