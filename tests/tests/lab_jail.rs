//! The jailer on a host that has version 2 of control groups with all its controllers.

use std::process::ExitCode;

use lepton_tests::groups::*;
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
        ],
    )
}
