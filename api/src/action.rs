//! What can be asked of a VMM, and how it answers.

use serde::Serialize;

use crate::types::{
    BootSource, CloneMachine, CpuConfig, Drive, DrivePatch, Logger, MachineConfig,
    MachineConfigPatch, MetricsTarget, NetworkInterface, NetworkInterfacePatch, Serial,
    SnapshotCreate, SnapshotLoad, VmStateChange, Vsock,
};

/// Everything that can be asked of a VMM through its API or its configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Action {
    GetInstanceInfo,
    GetVersion,
    GetMachineConfig,
    GetVmConfig,
    /// What the machine has of its own, and in common with others.
    GetDivergence,
    GetMetrics,
    InstanceStart,
    SendCtrlAltDel,
    FlushMetrics,
    PutBootSource(BootSource),
    PutCpuConfig(CpuConfig),
    PutDrive(Drive),
    PatchDrive(DrivePatch),
    /// The drive of this name.
    ResetDrive(String),
    PutLogger(Logger),
    PutMachineConfig(MachineConfig),
    PatchMachineConfig(MachineConfigPatch),
    PutMetrics(MetricsTarget),
    PutNetworkInterface(NetworkInterface),
    PatchNetworkInterface(NetworkInterfacePatch),
    PutSerial(Serial),
    PatchVm(VmStateChange),
    PutVsock(Vsock),
    CreateSnapshot(SnapshotCreate),
    LoadSnapshot(SnapshotLoad),
    Clone(CloneMachine),
}

impl Action {
    /// Whether it sets something of a machine that is not started yet. A saved machine can be loaded before any of
    /// these, not after.
    pub fn sets_machine(&self) -> bool {
        matches!(
            self,
            Self::PutBootSource(_)
                | Self::PutCpuConfig(_)
                | Self::PutDrive(_)
                | Self::PutMachineConfig(_)
                | Self::PatchMachineConfig(_)
                | Self::PutNetworkInterface(_)
                | Self::PutVsock(_)
        )
    }

    /// The deprecated field the request uses, if any. The server then says so in a `Deprecation` header.
    pub fn deprecated_field(&self) -> Option<&'static str> {
        match self {
            Self::PutMachineConfig(config) => config.cpu_template.map(|_| "cpu_template"),
            Self::PatchMachineConfig(patch) => patch.cpu_template.map(|_| "cpu_template"),
            Self::PutVsock(vsock) => vsock.vsock_id.as_ref().map(|_| "vsock_id"),
            Self::LoadSnapshot(load) if load.mem_file_path.is_some() => Some("mem_file_path"),
            Self::LoadSnapshot(load) if load.enable_diff_snapshots => Some("enable_diff_snapshots"),
            _ => None,
        }
    }
}

/// The answer to an action that was carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// 204, without a body.
    NoContent,
    /// 200 with a body that is JSON already.
    Json(String),
    /// 200 with a body of another type.
    Text {
        /// Value of the `Content-Type` header.
        content_type: &'static str,
        /// The body.
        body: String,
    },
}

impl Reply {
    /// A value as JSON. A value that cannot be written as JSON, such as a map whose keys are no strings, is a fault of
    /// status 500.
    pub fn json<T: Serialize>(value: &T) -> Result<Self, Fault> {
        serde_json::to_string(value)
            .map(Self::Json)
            .map_err(|error| Fault {
                status: 500,
                message: format!("The reply cannot be written as JSON: {error}"),
            })
    }
}

/// The answer to an action that was refused or failed: an HTTP status and a text for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// HTTP status, 400 for everything a client can mend.
    pub status: u16,
    /// Names the value at fault.
    pub message: String,
}

impl Fault {
    /// A fault of status 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self {
            status: 400,
            message: message.into(),
        }
    }

    /// The body of the reply: `{"fault_message": "..."}`.
    pub fn to_json(&self) -> String {
        #[derive(Serialize)]
        struct Body<'a> {
            fault_message: &'a str,
        }
        // A struct of one string always serialises; the fallback keeps this free of a panic all the same.
        serde_json::to_string(&Body {
            fault_message: &self.message,
        })
        .unwrap_or_else(|_| r#"{"fault_message":""}"#.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_body_is_json_whatever_the_message() {
        let fault = Fault::bad_request("no \"such\"\nfile: \u{1}");
        let body: serde_json::Value = serde_json::from_str(&fault.to_json()).unwrap();
        assert_eq!(body["fault_message"], "no \"such\"\nfile: \u{1}");
    }

    #[test]
    fn unserialisable_reply_is_a_fault_not_a_panic() {
        let map = std::collections::BTreeMap::from([(vec![1], 1)]);
        assert_eq!(Reply::json(&map).unwrap_err().status, 500);
    }
}
