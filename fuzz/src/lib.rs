//! Hostile input: one function for each way by which bytes come in that somebody else has made.
//!
//! A function takes any bytes, and must return: what is refused is refused by a typed error, and a property that does
//! not hold is a panic. libFuzzer looks for bytes that break it (`cargo xtask fuzz`), from the seeds in `seeds/TARGET`;
//! the tests run the seeds alone, and need no C++ compiler for that. A seed whose name tells of a defect is the input
//! that showed it.

mod agent;
mod api;
mod clone;
mod kernel;
mod overlay;
mod registers;
mod scratch;
mod seccomp;
mod snapshot;
mod virtio;
mod vsock_model;

/// A function for libFuzzer.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, and that of the folder with its seeds.
    pub name: &'static str,
    /// Runs it on an input. A panic is a finding.
    pub run: fn(&[u8]),
}

/// All of them, as `targets.txt` lists them.
pub const TARGETS: [Target; 20] = [
    target("http", api::http),
    target("body", api::body),
    target("config-file", api::config_file),
    target("kernel", kernel::kernel),
    target("blk", virtio::blk),
    target("blk-async", virtio::blk_async),
    target("blk-overlay", virtio::blk_overlay),
    target("net", virtio::net),
    target("vsock", virtio::vsock),
    target("registers", registers::registers),
    target("vsock-model", vsock_model::vsock_model),
    target("overlay", overlay::overlay),
    target("state-file", snapshot::state_file),
    target("memory-file", snapshot::memory_file),
    target("device-state", registers::device_state),
    target("clone-message", clone::clone_message),
    target("agent-service", agent::service),
    target("agent-client", agent::client),
    target("identity", agent::identity),
    target("seccomp", seccomp::seccomp),
];

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run }
}

/// The target of this name.
pub fn find(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}

#[cfg(test)]
mod tests;
