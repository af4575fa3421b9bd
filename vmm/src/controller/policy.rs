//! What is allowed when. Pure, so that it can be read and tested as a table.

use lepton_api::Action;

/// The phases of a machine, as far as they decide what is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Not started, and nothing of the machine set.
    Fresh,
    /// Not started.
    Configuring,
    /// Started, vCPUs running.
    Running,
    /// Started, vCPUs stopped.
    Paused,
    /// Restored, and its guest is to take on who it is before anything else.
    Held,
    /// Kept to be cloned: nothing of it ever runs here.
    Template,
}

/// Why an action is not allowed now. All texts but the last four are Firecracker's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Too early.
    #[error("The requested operation is not supported before starting the microVM.")]
    BeforeStart,
    /// Too late.
    #[error("The requested operation is not supported after starting the microVM.")]
    AfterStart,
    /// A machine is loaded into nothing.
    #[error(
        "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
    )]
    Configured,
    /// A machine that runs has no state to be saved.
    #[error("Create snapshot error: the microVM runs: PATCH /vm with the state Paused first.")]
    NotPaused,
    /// The guest is using it.
    #[error("The microVM runs and may be using the drive: PATCH /vm with the state Paused first.")]
    RunningDrive,
    /// The guest is still somebody else.
    #[error("The microVM is held until its guest has taken on its identity.")]
    Held,
    /// There is no machine here.
    #[error(
        "This process keeps a template, of which nothing runs here: PUT /clone makes running copies of it in other processes."
    )]
    Template,
}

/// Whether `action` is allowed in `stage`.
pub fn allow(stage: Stage, action: &Action) -> Result<(), Denied> {
    use Action::*;
    let started = !matches!(stage, Stage::Fresh | Stage::Configuring);
    match action {
        GetInstanceInfo | GetVersion | GetMachineConfig | GetVmConfig | GetMetrics => Ok(()),
        _ if stage == Stage::Held => Err(Denied::Held),
        FlushMetrics | Clone(_) if stage == Stage::Template => Ok(()),
        _ if stage == Stage::Template => Err(Denied::Template),
        InstanceStart
        | PutBootSource(_)
        | PutCpuConfig(_)
        | PutDrive(_)
        | PutLogger(_)
        | PutMachineConfig(_)
        | PatchMachineConfig(_)
        | PutMetrics(_)
        | PutNetworkInterface(_)
        | PutSerial(_)
        | PutVsock(_) => {
            if started {
                Err(Denied::AfterStart)
            } else {
                Ok(())
            }
        }
        SendCtrlAltDel
        | FlushMetrics
        | PatchDrive(_)
        | PatchNetworkInterface(_)
        | PatchVm(_)
        | GetDivergence
        | Clone(_) => {
            if started {
                Ok(())
            } else {
                Err(Denied::BeforeStart)
            }
        }
        ResetDrive(_) => match stage {
            Stage::Fresh | Stage::Configuring | Stage::Paused => Ok(()),
            Stage::Running | Stage::Held | Stage::Template => Err(Denied::RunningDrive),
        },
        CreateSnapshot(_) => match stage {
            Stage::Fresh | Stage::Configuring => Err(Denied::BeforeStart),
            Stage::Running | Stage::Held | Stage::Template => Err(Denied::NotPaused),
            Stage::Paused => Ok(()),
        },
        LoadSnapshot(_) => match stage {
            Stage::Fresh => Ok(()),
            Stage::Configuring => Err(Denied::Configured),
            Stage::Running | Stage::Paused | Stage::Held | Stage::Template => {
                Err(Denied::AfterStart)
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lepton_api::types::{VmState, VmStateChange};

    #[test]
    fn a_machine_that_is_held_can_only_be_read() {
        assert_eq!(allow(Stage::Held, &Action::GetVmConfig), Ok(()));
        for action in [Action::InstanceStart, Action::SendCtrlAltDel] {
            assert_eq!(allow(Stage::Held, &action), Err(Denied::Held));
        }
    }

    #[test]
    fn a_template_can_be_read_and_cloned() {
        for state in [VmState::Paused, VmState::Resumed] {
            let action = Action::PatchVm(VmStateChange { state });
            assert_eq!(allow(Stage::Template, &action), Err(Denied::Template));
        }
        for action in [Action::InstanceStart, Action::SendCtrlAltDel] {
            assert_eq!(allow(Stage::Template, &action), Err(Denied::Template));
        }
        for action in [Action::GetInstanceInfo, Action::FlushMetrics] {
            assert_eq!(allow(Stage::Template, &action), Ok(()));
        }
    }

    #[test]
    fn reading_is_always_allowed_and_writing_only_on_its_side_of_the_start() {
        let stages = [Stage::Configuring, Stage::Running, Stage::Paused];
        for stage in stages {
            assert_eq!(allow(stage, &Action::GetVmConfig), Ok(()));
            let pause = Action::PatchVm(VmStateChange {
                state: VmState::Paused,
            });
            let early = stage == Stage::Configuring;
            assert_eq!(allow(stage, &Action::InstanceStart).is_ok(), early);
            assert_eq!(allow(stage, &pause).is_ok(), !early);
        }
    }
}
