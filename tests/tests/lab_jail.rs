//! The jailer on a host that has version 2 of control groups with all its controllers, and an older kernel.

use std::process::ExitCode;

use lepton_tests::groups::*;
use lepton_tests::jail::Jail;
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::test;

fn main() -> ExitCode {
    suite::run(
        Order::OneByOne,
        &[
            Need::File("LEPTON_JAILER"),
            Need::File("LEPTON_VMM"),
            Need::Root,
        ],
        [
            test!(groups_of_version_2_have_their_values_and_go_with_the_vmm),
            test!(a_group_of_version_2_is_joined),
            test!(the_vmm_has_the_programs_name),
        ],
    )
}

/// Kernels before 6.14 name a program that is run by a descriptor after the descriptor's number.
fn the_vmm_has_the_programs_name() {
    let vmm = Jail::as_another_user().spawn();
    assert_eq!(vmm.api().state(), "Not started");
    assert_eq!(vmm.status("Name"), "lepton-vmm");
}
