//! What a process makes ready of KVM before it is asked for a machine.

use std::time::Duration;

use event_manager::SubscriberOps;

use super::dispatch::Controller;
use super::mailbox::Message;
use super::policy::Stage;
use crate::events::Loop;
use crate::kvm::{self, Hypervisor, KvmError};
use crate::later::Later;
use crate::machine::restore::{self, RestoreMachineError};
use crate::machine::state::MachineState;
use crate::memory::place::Place;
use crate::vcpu::Standby;

/// How long a process that waits for a machine does nothing else: if it was started for one that is there already, it gets that
/// before.
const A_WHILE: Duration = Duration::from_millis(5);

impl Controller {
    /// Makes KVM ready while the client prepares its next request: for a cold boot, if one is to come, or for whatever comes. A KVM
    /// that cannot be had is an error of the start.
    pub(super) fn prepare(&mut self) {
        match self.stage() {
            Stage::Fresh => self.prepare_more(),
            Stage::Configuring if self.configuration.has_boot_source() => {
                if self.hypervisor.is_none() {
                    self.hypervisor = Hypervisor::open().ok();
                }
                self.hypervisor.iter().for_each(Hypervisor::prepare);
            }
            _ => {}
        }
    }

    /// Where a machine's memory is to be, if something is ready for it.
    pub(super) fn place(&self) -> Option<Place> {
        self.hypervisor.as_ref()?.prepared_place()
    }

    /// KVM with all that was made ready, for a machine.
    pub(super) fn take_hypervisor(&mut self) -> Result<Hypervisor, KvmError> {
        self.hypervisor.take().map_or_else(Hypervisor::open, Ok)
    }

    /// Whether this host's processor has what a machine needs.
    pub(super) fn check_processor(&self, state: &MachineState) -> Result<(), RestoreMachineError> {
        match &self.hypervisor {
            Some(ready) => restore::check_processor(ready, state),
            None => restore::check_processor(&Hypervisor::open()?, state),
        }
    }

    /// Makes KVM ready for a machine that will be offered or loaded: at once as far as any machine needs it, and with what it is
    /// likely to need once there was nothing to do for a while. What fails is tried again when it is needed, and told then.
    pub fn expect_machine(&mut self, events: &mut Loop) {
        let Ok(hypervisor) = Hypervisor::open() else {
            return;
        };
        if self.standby.is_none() {
            let confine = self.options.confine_vcpu.clone();
            self.standby = Standby::start(0, move || confine()).ok();
        }
        let size = self.options.expected_memory;
        match size.and_then(|size| Place::find(size).ok()) {
            Some(place) => hypervisor.prepare_with(place, |vcpu| match &self.standby {
                Some(standby) => standby.enter(vcpu),
                None => Some(vcpu),
            }),
            None => hypervisor.prepare(),
        }
        self.hypervisor = Some(hypervisor);
        self.prepare_later(events);
    }

    /// The same, if it is known how much memory the machine will have, and none is there.
    pub fn expect_load(&mut self, events: &mut Loop) {
        if self.stage() == Stage::Fresh && self.options.expected_memory.is_some() {
            self.expect_machine(events);
        }
    }

    fn prepare_later(&self, events: &mut Loop) {
        let mailbox = self.mailbox.clone();
        if let Ok(later) = Later::after(A_WHILE, move || mailbox.send(Message::NothingYet)) {
            events.add_subscriber(Box::new(later));
        }
    }

    /// Makes ready what most machines need.
    fn prepare_more(&mut self) {
        match &self.hypervisor {
            Some(hypervisor) => hypervisor.prepare_vcpu(),
            None => kvm::ask_for_cpuid(),
        }
    }
}
