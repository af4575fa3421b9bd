//! The bodies of requests and replies, exactly as they stand on the wire.
//!
//! The types check form only: names, JSON types and enumerations. Limits that depend on the host or on other
//! settings (memory size, number of vCPUs, paths) are checked where a machine is configured, by `TryFrom` there.
//! Every request body refuses unknown fields, so that a misspelt option is never silently ignored.

mod clone;
mod cpu;
mod device;
mod identity;
mod instance;
mod machine;
mod snapshot;
mod telemetry;

pub use clone::{
    CloneChild, CloneMachine, CloneOverlay, Cloned, ClonedChild, Divergence, DriveDivergence,
    Shares,
};
pub use cpu::{
    Bitmap32, Bitmap64, CpuConfig, CpuidLeafModifier, CpuidRegister, CpuidRegisterModifier,
    KvmCapability, MsrModifier,
};
pub use device::{
    CacheType, Drive, DriveOverlay, DrivePatch, IoEngine, MacAddr, NetworkInterface,
    NetworkInterfacePatch, RateLimiter, Serial, TokenBucket, Vsock,
};
pub use identity::{Identity, IdentityInterface};
pub use instance::{
    ActionType, InstanceAction, InstanceInfo, InstanceState, Version, VmState, VmStateChange,
};
pub use machine::{BootSource, CpuTemplate, HugePages, MachineConfig, MachineConfigPatch};
pub use snapshot::{
    DriveOverride, LoadHugePages, MemoryBackend, MemoryBackendType, NetworkOverride,
    SnapshotCreate, SnapshotLoad, SnapshotType, VsockOverride,
};
pub use telemetry::{LogLevel, Logger, MetricsTarget};

/// Serde glue for a type whose wire form is one JSON string: `Display` writes it, `FromStr` reads it.
macro_rules! string_on_the_wire {
    ($type:ty) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
use string_on_the_wire;

#[cfg(test)]
mod tests;
