//! What the machine as a whole is asked to do, and what it answers about itself.

use serde::{Deserialize, Serialize};

/// Body of `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceAction {
    /// What to do.
    pub action_type: ActionType,
}

/// The actions of `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Write the metrics to the configured target now.
    FlushMetrics,
    /// Boot the machine.
    InstanceStart,
    /// Press Ctrl+Alt+Del on the guest's keyboard controller.
    SendCtrlAltDel,
}

/// Body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmStateChange {
    /// The state to reach.
    pub state: VmState,
}

/// The states a client may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// All vCPUs stopped, devices quiet.
    Paused,
    /// Running again after a pause.
    Resumed,
}

/// Reply of `GET /`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// The id given with `--id`.
    pub id: String,
    /// Where the machine is in its life.
    pub state: InstanceState,
    /// Version of the VMM.
    pub vmm_version: String,
    /// Name of the VMM.
    pub app_name: String,
    /// Whether this is a saved machine that is kept to be cloned by `PUT /clone`, and never runs (our addition).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub template: bool,
}

/// Where the machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InstanceState {
    /// Being configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Started and stopped by `PATCH /vm`.
    Paused,
    /// Started.
    Running,
}

/// Reply of `GET /version`. The field keeps the name that clients look for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Version of the VMM.
    pub firecracker_version: String,
}
