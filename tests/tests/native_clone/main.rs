//! Machines that are cloned while they run.

mod apart;
mod drives;
mod family;
mod faults;
mod generation;
mod going_on;
mod identity;
mod refused;
mod template;
mod work;

use std::process::ExitCode;

use lepton_tests::suite::{self, Need, Order};
use lepton_tests::test;

use apart::*;
use drives::*;
use faults::*;
use generation::*;
use going_on::*;
use identity::*;
use refused::*;
use template::*;
use work::*;

const PROBE: Need = Need::File("LEPTON_PROBE");

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[Need::Kvm],
        [
            test!(a_copy_goes_on_where_the_machine_was),
            test!(who_expects_a_size_takes_any),
            test!(who_expects_a_copy_may_boot),
            test!(twenty_copies_of_a_machine_that_runs),
            test!(a_machine_is_cloned_again_and_again),
            test!(copies_of_copies),
            test!(a_clone_copies_what_was_written_since).needs(PROBE),
            test!(much_memory_is_let_go_while_the_guest_writes).needs(PROBE),
            test!(copies_wait_if_they_are_to),
            test!(a_copy_can_be_saved),
            test!(whoever_is_killed_the_others_go_on),
            test!(devices_of_copies_are_elsewhere).needs(Need::Root),
            test!(a_copy_has_the_drive_as_it_was).needs(PROBE),
            test!(twenty_copies_of_a_guest_that_writes).needs(PROBE),
            test!(drives_of_those_who_are_left_go_on).needs(PROBE),
            test!(drives_of_copies_of_copies).needs(PROBE),
            test!(drives_of_many_layers_are_cloned).needs(PROBE),
            test!(clones_that_fail_leave_no_files).needs(PROBE),
            test!(what_is_whose_is_told).needs(PROBE),
            test!(every_machine_is_a_generation_of_its_own),
            test!(a_guest_that_does_not_confirm_is_no_copy),
            test!(identities_that_are_none_are_named),
            test!(a_machine_is_not_loaded_as_another_unless_its_guest_confirms),
            test!(a_template_is_cloned_again_and_again),
            test!(what_a_template_is_not_asked_for),
            test!(a_damaged_memory_is_no_template),
            test!(a_machine_of_another_processor_does_not_run),
            test!(copies_of_a_template_have_drives_of_their_own).needs(PROBE),
            test!(copies_of_a_template_are_told_who_they_are).needs(PROBE),
            test!(a_template_that_is_asked_to_end_leaves_nothing),
            test!(a_copys_full_disk_is_an_error_to_it_alone)
                .needs(Need::Root)
                .needs(PROBE),
            test!(an_image_that_is_cut_is_an_error_to_all_copies).needs(PROBE),
            test!(all_children_or_none),
            test!(what_cannot_be_cloned_is_named),
            test!(who_is_silent_holds_nobody_up),
            test!(who_is_given_up_does_not_run),
            test!(bytes_of_anybody_are_refused),
        ],
    )
}
