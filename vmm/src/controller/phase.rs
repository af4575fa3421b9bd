//! The phase a machine is in, each with only its own data.

use super::policy::Stage;
use crate::clone::Template;
use crate::machine::{Machine, Paused, Running};
use crate::memory::Ram;

/// Where the machine is in its life.
pub enum Phase {
    /// It does not exist yet.
    Configuring,
    /// It runs.
    Running(Running),
    /// It stands still.
    Paused(Paused),
    /// There is none, only what copies of it are made from.
    Template(Box<Template>),
}

impl Phase {
    /// As the policy sees it.
    pub fn stage(&self) -> Stage {
        match self {
            Phase::Configuring => Stage::Configuring,
            Phase::Running(_) => Stage::Running,
            Phase::Paused(_) => Stage::Paused,
            Phase::Template(_) => Stage::Template,
        }
    }

    /// Its memory, once there is a machine.
    pub fn ram(&self) -> Option<&Ram> {
        match self {
            Phase::Configuring | Phase::Template(_) => None,
            Phase::Running(running) => Some(running.ram()),
            Phase::Paused(paused) => Some(paused.ram()),
        }
    }

    /// The machine, once there is one.
    pub fn machine(&self) -> Option<&Machine> {
        match self {
            Phase::Configuring | Phase::Template(_) => None,
            Phase::Running(running) => Some(running.machine()),
            Phase::Paused(paused) => Some(paused.machine()),
        }
    }
}
