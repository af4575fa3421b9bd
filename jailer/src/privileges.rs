//! What the VMM may do: nothing but what its user may.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use crate::folder::Owner;

/// A privilege that cannot be given up.
#[derive(Debug, thiserror::Error)]
#[error("cannot give up privileges: {call}: {source}")]
pub struct PrivilegeError {
    call: &'static str,
    source: io::Error,
}

fn call(call: &'static str) -> impl Fn(Errno) -> PrivilegeError {
    move |error| PrivilegeError {
        call,
        source: error.into(),
    }
}

/// Removes every capability from the bounding set, so that no program that is run can get one.
fn empty_bounding_set() -> Result<(), PrivilegeError> {
    for number in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // This kernel has no capability of this number, and none of a higher one.
            Err(Errno::INVAL) if number > 0 => break,
            Err(error) => return Err(call("PR_CAPBSET_DROP")(error)),
        }
    }
    Ok(())
}

/// Leaves this process only `kept` of what it has.
fn reduce_capabilities(kept: CapabilitySet) -> Result<(), PrivilegeError> {
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    clear_ambient_capability_set().map_err(call("PR_CAP_AMBIENT_CLEAR_ALL"))?;
    set_capabilities(None, sets).map_err(call("capset"))
}

/// Leaves this process only the right to remove groups. The root of a hierarchy cannot be written even by its owner.
pub fn keep_removal_of_groups() -> Result<(), PrivilegeError> {
    reduce_capabilities(CapabilitySet::DAC_OVERRIDE)
}

/// Becomes `owner` for good: no other groups, no capability in any set, and no way to any.
///
/// Without an owner, user and groups stay as they are: a user namespace has no other.
pub fn give_up(owner: Option<Owner>) -> Result<(), PrivilegeError> {
    empty_bounding_set()?;
    if let Some(Owner { uid, gid }) = owner {
        set_thread_groups(&[]).map_err(call("setgroups"))?;
        set_thread_res_gid(gid, gid, gid).map_err(call("setresgid"))?;
        set_thread_res_uid(uid, uid, uid).map_err(call("setresuid"))?;
    }
    // User 0 keeps its capabilities over setresuid.
    reduce_capabilities(CapabilitySet::empty())?;
    set_no_new_privs(true).map_err(call("PR_SET_NO_NEW_PRIVS"))
}
