//! What goes wrong on a host: processes that are killed, storage that is full, a network that goes away, crowds.

mod clients;
mod kill;
mod network;
mod storage;

use std::process::ExitCode;

use lepton_tests::suite::{self, Need, Order};
use lepton_tests::test;

use clients::a_thousand_clients_at_once;
use kill::killed_at_any_moment_it_keeps_what_was_flushed;
use network::a_tap_that_goes_down_and_comes_back;
use storage::{
    a_full_file_system_is_an_error_to_the_guest_and_no_more,
    an_image_that_is_cut_is_an_error_to_the_guest_and_no_more,
};

fn main() -> ExitCode {
    suite::run(
        Order::OneByOne,
        &[Need::Kvm, Need::File("LEPTON_PROBE")],
        [
            test!(killed_at_any_moment_it_keeps_what_was_flushed),
            test!(a_full_file_system_is_an_error_to_the_guest_and_no_more)
                .needs(Need::Root)
                .needs(Need::Program("mount"))
                .of_every_origin(),
            test!(an_image_that_is_cut_is_an_error_to_the_guest_and_no_more).of_every_origin(),
            test!(a_tap_that_goes_down_and_comes_back)
                .needs(Need::Root)
                .of_every_origin(),
            test!(a_thousand_clients_at_once),
        ],
    )
}
