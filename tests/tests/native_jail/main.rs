//! The jail: what the VMM in it is, has and leaves, and what the jailer refuses.

mod attack;
mod family;
mod kill;
mod pool;
mod refused;
mod root;
mod traced;
mod user;

use std::process::ExitCode;

use lepton_tests::groups::*;
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::test;

use attack::*;
use family::*;
use kill::*;
use pool::*;
use refused::*;
use root::*;
use traced::*;
use user::*;

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        // Both are static programs then: no other runs in a jail.
        &[Need::File("LEPTON_JAILER"), Need::File("LEPTON_VMM")],
        [
            test!(version_and_help),
            test!(what_the_command_line_cannot_mean),
            test!(what_is_not_there).needs(Need::Root),
            test!(a_jail_that_is_there_already).needs(Need::Root),
            test!(a_full_disk_leaves_nothing).needs(Need::Root),
            test!(a_program_that_cannot_be_run_leaves_nothing).needs(Need::Root),
            test!(a_session_from_outside_is_no_surprise).needs(Need::Root),
            test!(a_group_that_cannot_be_leaves_nothing).needs(Need::Root),
            test!(a_guest_boots_through_the_api)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(arguments_are_passed_on)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(the_folder_is_laid_out_as_documented).needs(Need::Root),
            test!(the_vmm_has_no_privileges).needs(Need::Root),
            test!(nothing_is_inherited).needs(Need::Root),
            test!(limits_are_set).needs(Need::Root),
            test!(groups_of_version_1_have_their_values_and_go_with_the_vmm).needs(Need::Root),
            test!(groups_of_version_2_have_their_values_and_go_with_the_vmm).needs(Need::Root),
            test!(a_group_of_version_2_is_joined).needs(Need::Root),
            test!(a_daemon_has_no_terminal).needs(Need::Root),
            test!(a_killed_test_leaves_no_daemon).needs(Need::Root),
            test!(a_pid_namespace_of_its_own).needs(Need::Root),
            test!(a_daemon_with_both).needs(Need::Root),
            test!(a_given_network)
                .needs(Need::Root)
                .needs(Need::Program("ip")),
            test!(copies_come_from_a_pool_of_jails)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(without_root_copies_come_from_a_pool_of_jails)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(copies_with_process_ids_of_their_own_come_from_a_pool)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(the_next_copy_of_the_program_is_written_ahead)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(copies_of_a_template_come_from_a_pool_of_jails)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(what_a_pool_is_asked_for_is_checked)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(a_pool_that_is_killed_leaves_nothing)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(a_pool_that_cannot_start_says_why).needs(Need::Root),
            test!(a_jailed_machine_has_jailed_copies)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(a_jailed_machine_lets_go_of_memory_while_its_guest_writes)
                .needs(Need::Root)
                .needs(Need::Kvm)
                .needs(Need::File("LEPTON_PROBE")),
            test!(without_root_a_guest_boots)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(without_root_the_vmm_is_alone)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(without_root_the_jailer_passes_on_what_happens)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(without_root_a_guest_has_a_network)
                .needs(Need::Root)
                .needs(Need::Kvm)
                .needs(Need::File("LEPTON_PROBE")),
            test!(without_root_what_cannot_be_is_told)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(killed_at_any_moment_it_leaves_nothing_in_the_way)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(without_root_killed_at_any_moment_nobody_stays)
                .needs(Need::Root)
                .needs(Need::Kvm),
            test!(no_path_is_looked_up_twice)
                .needs(Need::Root)
                .needs(Need::Program("strace")),
            test!(cve_2026_1386_symlink_in_the_jailers_way).needs(Need::Root),
            test!(cve_2026_1386_hard_link_in_the_programs_place).needs(Need::Root),
            test!(cve_2026_1386_symlink_swapped_in_under_the_jailer).needs(Need::Root),
        ],
    )
}
