//! `--daemonize` and `--new-pid-ns`: the jailer goes on in another process, and this one ends once the VMM runs.

use std::process::exit;

use rustix::process::{WaitOptions, setsid, waitpid};

use crate::clock::Clock;
use crate::error::JailError;
use crate::process::{self, Side};
use crate::report::{self, Reporter};

/// Whether the process goes into a session without a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Session {
    /// It does.
    New,
    /// Only if the end of this process would end its session.
    Same,
}

/// Does `work` in another process, and waits until that has reported success or failure.
pub fn elsewhere(
    session: Session,
    clock: Clock,
    work: impl FnOnce(Clock, &mut Option<Reporter>) -> Result<u8, JailError>,
) -> Result<u8, JailError> {
    let (reporter, outcome) = report::pair().map_err(JailError::Pipe)?;
    let leads_session = process::leads_session();
    match process::fork().map_err(JailError::Fork)? {
        Side::Parent(child) => {
            drop(reporter);
            let result = outcome.wait().map_err(JailError::Inside);
            if session == Session::New {
                // It has ended, or is about to; what it did is in the report.
                let _ = waitpid(Some(child), WaitOptions::empty());
            }
            result.map(|()| 0)
        }
        Side::Child => {
            drop(outcome);
            if session == Session::New || leads_session {
                // Cannot fail: a new child leads no group.
                let _ = setsid();
            }
            if session == Session::New {
                // Who leads a session can get a terminal again; its child cannot.
                match process::fork() {
                    Ok(Side::Child) => {}
                    Ok(Side::Parent(_)) => exit(0),
                    Err(error) => report_and_exit(reporter, &JailError::Fork(error)),
                }
            }
            let mut waiting = Some(reporter);
            if let Err(error) = work(clock, &mut waiting)
                && let Some(waiting) = waiting
            {
                report_and_exit(waiting, &error);
            }
            exit(1)
        }
    }
}

fn report_and_exit(reporter: Reporter, error: &JailError) -> ! {
    reporter.failed(&error.to_string());
    exit(1)
}
