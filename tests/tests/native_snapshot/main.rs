//! Machines that are saved, and loaded by another process.

mod chunks;
mod differences;
mod files;
mod going_on;
mod place;
mod served;

use std::process::ExitCode;

use lepton_tests::suite::{self, Need, Order};
use lepton_tests::test;

use chunks::*;
use differences::*;
use files::*;
use going_on::*;
use served::*;

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[Need::Kvm],
        [
            test!(a_guest_goes_on_where_it_was).of_every_origin(),
            test!(a_guest_goes_on_in_a_process_that_expects_one),
            test!(a_guest_goes_on_in_the_process_that_saved_it).of_every_origin(),
            test!(a_saved_machine_has_its_devices).of_every_origin(),
            test!(interfaces_get_other_taps).needs(Need::Root),
            test!(devices_can_be_elsewhere),
            test!(what_is_allowed_when),
            test!(files_that_are_not_what_was_saved_are_refused),
            test!(a_mixture_of_two_snapshots_is_refused),
            test!(a_writer_that_was_killed_leaves_the_old_snapshot_or_the_new),
            test!(places_that_cannot_be_written_leave_what_was_there).of_every_origin(),
            test!(untouched_memory_takes_no_room).of_every_origin(),
            test!(a_damaged_chunk_is_named_and_never_seen).needs(Need::Root),
            test!(a_damaged_chunk_that_nobody_touches_does_no_harm).needs(Need::Root),
            test!(a_file_that_is_cut_under_a_machine_ends_it).needs(Need::Root),
            test!(differences_make_the_next_snapshot)
                .needs(Need::Root)
                .of_every_origin(),
            test!(differences_behind_the_hole_are_in_their_place)
                .needs(Need::Root)
                .needs(Need::File("LEPTON_PROBE")),
            test!(differences_without_a_record_are_all_that_was_touched).of_every_origin(),
            test!(another_process_serves_memory)
                .needs(Need::Root)
                .needs(Need::Program("python3")),
        ],
    )
}
