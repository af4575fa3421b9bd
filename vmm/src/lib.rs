//! One process per virtual machine, on KVM.
//!
//! Data flows one way. A request: bytes -> `lepton_api` -> [`controller`] (policy, then [`config`] or [`machine`]) ->
//! reply. A guest's kick: eventfd -> [`events`] -> device -> interrupt. A register access: [`vcpu`] -> bus -> device.

pub mod arch;
pub mod cli;
pub mod clock;
pub mod clone;
pub mod config;
pub mod console;
pub mod controller;
pub mod events;
pub mod exit;
pub mod identity;
pub mod kvm;
pub mod later;
pub mod loader;
pub mod log;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod overlay;
pub mod process;
pub mod reach;
pub mod seccomp;
pub mod signal;
pub mod snapshot;
pub mod vcpu;
