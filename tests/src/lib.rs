//! The harness of the tests of the whole system, which lie in `tests/tests/`.
//!
//! - [`suite`]: a test program's list of tests, and what each needs of the host. A test whose need is not met is
//!   skipped, says so on a line that begins with `SKIPPED:`, and counts as ignored.
//! - [`vmm`]: a `lepton-vmm` in a directory of its own, its API, its output, its end.
//! - [`jail`]: the same in a jail of `lepton-jailer`.
//! - [`groups`]: what becomes of the control groups of such a one, on whatever host.
//! - [`guest`]: kernels of a few instructions, made without an assembler. `native_*` tests run them on any KVM.
//! - [`metal`]: programs for bare metal, from `tests/guests/`. `native_*` tests run them on any KVM, too.
//! - [`origin`]: machines that boot, are loaded from a snapshot, or are clones, for the same tests.
//! - [`heir`]: a process that waits for a copy of it.
//! - [`reaper`]: what ends all of these if the test program is killed.
//! - [`small`]: a file system that is soon full.
//! - [`linux`]: our Linux guest with its agent. `lab_*` tests run it, on a KVM with nested paging.
//! - [`carried`]: programs of the host for that guest.
//!
//! Nothing sleeps to let something else happen: whoever waits, waits for an event, with a deadline.

pub mod api;
pub mod arp;
pub mod capture;
pub mod carried;
pub mod counting;
pub mod groups;
pub mod guest;
pub mod heir;
pub mod host_socket;
pub mod jail;
pub mod linux;
pub mod loop_device;
pub mod metal;
pub mod origin;
pub mod programs;
pub mod reaper;
pub mod small;
pub mod sparse;
pub mod suite;
pub mod tap;
pub mod vmm;

use std::time::Duration;

/// How long anything may take before a test fails. Long, because the machines that run tests are busy ones.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub use api::Api;
pub use vmm::{Ended, Vmm};
