//! A request to start a process, parsed into what can be started.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use rustix::termios::Winsize;

use super::terminal;
use super::user::{self, Identity, UserError};
use crate::protocol::{ExecFailure, ExecFailureReason, ExecRequest};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error("no program to execute was given")]
    NoProgram,
    #[error("environment entry {0:?} has no '='")]
    Environment(OsString),
    #[error(transparent)]
    User(#[from] UserError),
    #[error("{0:?}: no such directory to work in")]
    WorkingDirectory(PathBuf),
    #[error("{0:?}: not found")]
    NotFound(OsString),
    #[error("{program:?}: {source}")]
    NotExecutable {
        program: OsString,
        source: std::io::Error,
    },
    #[error("cannot make a terminal or pipe: {0}")]
    Channel(std::io::Error),
}

impl From<ExecError> for ExecFailure {
    fn from(error: ExecError) -> Self {
        let reason = match &error {
            ExecError::NoProgram | ExecError::Environment(_) => {
                ExecFailureReason::EXEC_FAILURE_REASON_INVALID
            }
            ExecError::User(_) => ExecFailureReason::EXEC_FAILURE_REASON_USER,
            ExecError::WorkingDirectory(_) => {
                ExecFailureReason::EXEC_FAILURE_REASON_WORKING_DIRECTORY
            }
            ExecError::NotFound(_) => ExecFailureReason::EXEC_FAILURE_REASON_NOT_FOUND,
            ExecError::NotExecutable { .. } | ExecError::Channel(_) => {
                ExecFailureReason::EXEC_FAILURE_REASON_NOT_EXECUTABLE
            }
        };
        ExecFailure {
            reason: reason.into(),
            message: error.to_string(),
            ..Default::default()
        }
    }
}

/// What is to be started.
pub struct Exec {
    pub program: OsString,
    arguments: Vec<OsString>,
    environment: BTreeMap<OsString, OsString>,
    working_directory: PathBuf,
    /// The agent's own identity when `None`.
    identity: Option<Identity>,
    pub terminal: Option<Winsize>,
}

impl Exec {
    pub fn parse(request: ExecRequest) -> Result<Self, ExecError> {
        let mut argv = request.argv.into_iter().map(OsString::from_vec);
        let program = argv
            .next()
            .filter(|program| !program.is_empty())
            .ok_or(ExecError::NoProgram)?;
        let identity = match request.user.as_str() {
            "" => None,
            spec => Some(user::resolve(
                spec,
                &std::fs::read_to_string("/etc/passwd").unwrap_or_default(),
                &std::fs::read_to_string("/etc/group").unwrap_or_default(),
            )?),
        };
        let home = match &identity {
            None => "/root",
            Some(identity) => identity.home.as_deref().unwrap_or("/"),
        };
        let mut environment = BTreeMap::from([
            ("PATH".into(), DEFAULT_PATH.into()),
            ("HOME".into(), OsString::from(home)),
        ]);
        for entry in request.env {
            match entry.iter().position(|&byte| byte == b'=') {
                // An empty name cannot be set.
                None | Some(0) => {
                    return Err(ExecError::Environment(OsString::from_vec(entry)));
                }
                Some(equals) => {
                    let mut name = entry;
                    let value = name.split_off(equals + 1);
                    name.truncate(equals);
                    environment.insert(OsString::from_vec(name), OsString::from_vec(value));
                }
            }
        }
        let working_directory = match request.working_directory {
            none if none.is_empty() => PathBuf::from("/"),
            path => PathBuf::from(OsString::from_vec(path)),
        };
        Ok(Self {
            program,
            arguments: argv.collect(),
            environment,
            working_directory,
            identity,
            terminal: request.terminal.as_ref().map(terminal::size),
        })
    }

    /// The command, all but its standard streams.
    pub fn command(&self) -> Result<Command, ExecError> {
        // The error of a failed start does not say whether the program or the directory is missing.
        if !self.working_directory.is_dir() {
            return Err(ExecError::WorkingDirectory(self.working_directory.clone()));
        }
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env_clear()
            .envs(&self.environment)
            .current_dir(&self.working_directory);
        if let Some(identity) = &self.identity {
            command.uid(identity.uid).gid(identity.gid);
        }
        Ok(command)
    }

    /// The user and group that own the process, if they are not the agent's own.
    pub fn owner(&self) -> Option<(u32, u32)> {
        self.identity.as_ref().map(|id| (id.uid, id.gid))
    }

    pub fn failure(&self, source: std::io::Error) -> ExecError {
        let program = self.program.clone();
        match source.kind() {
            std::io::ErrorKind::NotFound => ExecError::NotFound(program),
            _ => ExecError::NotExecutable { program, source },
        }
    }
}
