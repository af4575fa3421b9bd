//! The request that clones a machine, and the offer of one.

use std::path::Path;
use std::sync::mpsc::{RecvError, SyncSender, sync_channel};
use std::time::Instant;

use lepton_api::types::{CloneMachine, HugePages};
use lepton_api::{Action, Fault, Reply};

use super::dispatch::{Controller, Next, console_of, refused};
use super::held::{Held, Waiting};
use super::phase::Phase;
use super::policy::Stage;
use crate::clone::{self, AdoptError, Adoption, CloneError, Finished, HandOver, Heirs, NewFiles};
use crate::config::Configuration;
use crate::config::devices::sharing::SharedDrive;
use crate::config::saved::SavedConfig;
use crate::events::Loop;
use crate::exit::ExitCode;
use crate::identity::Telling;
use crate::kvm::Hypervisor;
use crate::machine::Paused;
use crate::machine::restore::{self, Restoration};
use crate::machine::state::MachineState;
use crate::memory;
use crate::memory::freeze::Frozen;
use crate::vcpu::Standby;
use crate::vcpu::state::Saveable;

fn fault(error: CloneError) -> Fault {
    refused(format!("Clone error: {error}"))
}

fn refuse(answer: &SyncSender<Result<Reply, Fault>>, fault: Fault) {
    log::warn!("request refused: {}", fault.message);
    // A client that is gone needs no answer.
    drop(answer.send(Err(fault)));
}

/// A machine that was offered, and is here.
struct Restored {
    paused: Paused,
    /// Whether it is to run at once.
    resume: bool,
    /// Whether there are no other copies.
    alone: bool,
    /// What was made for it.
    new_files: NewFiles,
    /// What its guest is to be told before it is a copy.
    telling: Option<Telling>,
}

impl Controller {
    /// PUT /clone. The copies get the machine from a thread of its own, which also answers: they may take their time, and
    /// this machine has its own life.
    pub(super) fn clone_machine(
        &mut self,
        request: &CloneMachine,
        answer: SyncSender<Result<Reply, Fault>>,
    ) {
        if let Err(fault) = self.admit(&Action::Clone(request.clone())) {
            return refuse(&answer, fault);
        }
        // Before the machine stands still. A thread that is started when it runs again may be put behind its vCPU, and
        // wait until that has been on its processor for a while.
        let (hand_overs, taken) = sync_channel(1);
        let spawned = std::thread::Builder::new()
            .name("clone".into())
            .stack_size(256 << 10)
            .spawn({
                let answer = answer.clone();
                move || {
                    let hand_over: HandOver = match taken.recv() {
                        Ok(hand_over) => hand_over,
                        // It was refused.
                        Err(RecvError) => return,
                    };
                    let Finished { result, leftovers } = hand_over.finish();
                    match result {
                        // A client that is gone needs no answer.
                        Ok(cloned) => drop(answer.send(Reply::json(&cloned))),
                        Err(error) => refuse(&answer, fault(error)),
                    }
                    drop(leftovers);
                }
            });
        if let Err(error) = spawned {
            return refuse(&answer, fault(CloneError::Host(error)));
        }
        match self.begin_clone(request) {
            // The thread waits for it.
            Ok(hand_over) => drop(hand_overs.send(hand_over)),
            Err(error) => refuse(&answer, fault(error)),
        }
    }

    /// The same, and waits for it.
    pub(super) fn clone_and_wait(&mut self, request: &CloneMachine) -> Result<Reply, Fault> {
        let (sender, answer) = std::sync::mpsc::sync_channel(1);
        self.clone_machine(request, sender);
        let gone = |_| refused("the thread that clones has ended");
        answer.recv().map_err(gone)?
    }

    /// What can be refused is refused first, then the machine stands still for as long as must be.
    fn begin_clone(&mut self, request: &CloneMachine) -> Result<HandOver, CloneError> {
        if let Phase::Template(template) = &self.phase {
            return template.hand_over(request);
        }
        let drives = clone::wanted_drives(request, self.configuration.devices.drives())?;
        let heirs = Heirs::ask(request)?;
        let saveable = match self.saveable.take() {
            Some(known) => known,
            None => Hypervisor::open()?.saveable()?,
        };
        let order = Order {
            saveable: &saveable,
            drives: &drives,
            scratch: &self.options.scratch(),
        };
        let configuration = &mut self.configuration;
        let parted = match &mut self.phase {
            Phase::Running(running) => running.part_memory(),
            _ => Vec::new(),
        };
        let started = Instant::now();
        let phase = std::mem::replace(&mut self.phase, Phase::Configuring);
        let (phase, taken) = match phase {
            Phase::Running(running) => {
                let (mut paused, result) = running.pause();
                let taken = match result {
                    Ok(()) => take(&mut paused, configuration, &order),
                    Err(error) => Err(CloneError::Pause(error)),
                };
                (Phase::Running(paused.resume()), taken)
            }
            Phase::Paused(mut paused) => {
                let taken = take(&mut paused, configuration, &order);
                (Phase::Paused(paused), taken)
            }
            // The policy has refused before.
            phase @ (Phase::Configuring | Phase::Template(_)) => (phase, Err(CloneError::Count(0))),
        };
        self.phase = phase;
        self.saveable = Some(saveable);
        let resumed = Instant::now();
        let pause = resumed - started;
        let (state, mut memory, drives) = taken?;
        memory.leftovers.extend(parted);
        log::info!(
            "machine cloned for {} processes; it stood still for {pause:?}, in which {} bytes of memory were copied",
            heirs.count(),
            memory.copied
        );
        Ok(HandOver {
            heirs,
            state,
            memory,
            drives,
            pause,
            resumed,
            track_dirty_pages: self.configuration.shape().track_dirty_pages,
        })
    }

    /// Takes the machine that is offered, or refuses it.
    pub(super) fn adopt_offer(&mut self, mut adoption: Adoption, events: &mut Loop) -> Next {
        let taken = match self.stage() {
            Stage::Fresh => self.restore_offer(&mut adoption, events),
            _ => Err(AdoptError::Taken),
        };
        let Restored {
            paused,
            resume,
            alone,
            mut new_files,
            telling,
        } = match taken {
            Ok(taken) => taken,
            Err(error) => {
                log::warn!("a machine that was offered is refused: {error}");
                adoption.refuse(&error);
                // What has a machine expects no other.
                if self.stage() == Stage::Fresh && self.hypervisor.is_none() {
                    self.expect_offers();
                }
                return Next::Continue;
            }
        };
        if let Some(telling) = telling {
            let waits = Waiting::Parent {
                adoption,
                alone,
                new_files,
            };
            self.hold(paused, telling, Held { resume, waits });
            self.let_go_of_code_soon(events);
            return Next::Continue;
        }
        if let Err(error) = adoption.ready(&self.options.id, alone) {
            log::error!("there is to be no copy of the machine: {error}");
            self.phase = Phase::Paused(paused);
            return Next::Exit(ExitCode::Failure);
        }
        new_files.keep();
        self.phase = match resume {
            true => Phase::Running(paused.resume()),
            false => Phase::Paused(paused),
        };
        self.let_go_of_code_soon(events);
        log::info!("this is a copy of a machine now");
        Next::Continue
    }

    fn restore_offer(
        &mut self,
        adoption: &mut Adoption,
        events: &mut Loop,
    ) -> Result<Restored, AdoptError> {
        // Most of what can be refused is refused while what is ready for the next offer is still ready: to let go of that
        // takes many grace periods of the host's kernel, a second each where the host is busy, and the answer waits.
        let mut adopted = adoption.take(&self.options.entropy)?;
        // If this fails it is lost: a machine's memory may lie where the next one's would.
        let hypervisor = match self.hypervisor.take() {
            Some(ready) => ready,
            None => Hypervisor::open()?,
        };
        let place = hypervisor.prepared_memory();
        let ram = clone::map(adopted.base, adopted.configuration.shape(), place)?;
        adopted.configuration.serial = self.configuration.serial.clone();
        let (console, room) = console_of(&adopted.configuration.serial)?;
        let restoration = Restoration {
            state: &adopted.state,
            vcpus: adopted.configuration.shape().topology.vcpus,
            ram,
            devices: adopted.configuration.devices.all(),
            console,
            clock_catches_up: true,
            generation: self.options.entropy.generation,
        };
        let built = restore::restore(&hypervisor, restoration, self.surroundings())?;
        self.configuration = adopted.configuration;
        self.give_up_files(self.reach())?;
        Ok(Restored {
            paused: self.adopt(built, room, events),
            resume: adopted.resume,
            alone: adopted.alone,
            new_files: adopted.new_files,
            telling: adopted.telling,
        })
    }

    /// Makes KVM ready for a machine that will be offered. What fails is tried again when it is needed, and told then.
    pub fn expect_offers(&mut self) {
        let Ok(hypervisor) = Hypervisor::open() else {
            return;
        };
        let size = self.options.adopt_memory;
        match size.and_then(|size| memory::allocate(size, HugePages::None).ok()) {
            Some(place) => hypervisor.prepare_with(place),
            None => hypervisor.prepare(),
        }
        self.hypervisor = Some(hypervisor);
        if self.standby.is_none() {
            let confine = self.options.confine_vcpu.clone();
            self.standby = Standby::start(0, move || confine()).ok();
        }
    }
}

/// What is to be taken of a machine.
struct Order<'a> {
    saveable: &'a Saveable,
    /// Drives that copies get.
    drives: &'a [String],
    /// Where files without a name are made, if nothing else says it.
    scratch: &'a Path,
}

/// Drives first: the saved configuration says what has become of them. Then the state: nothing of it may still change
/// memory.
fn take(
    paused: &mut Paused,
    configuration: &mut Configuration,
    order: &Order,
) -> Result<(MachineState, Frozen, Vec<SharedDrive>), CloneError> {
    let devices = &mut configuration.devices;
    let drives = order.drives.iter();
    let drives: Result<_, _> = drives
        .map(|id| devices.share_drive(id, order.scratch))
        .collect();
    let drives = drives?;
    let state = paused.save(order.saveable, SavedConfig::from(&*configuration))?;
    let memory = paused.ram_mut().freeze()?;
    Ok((state, memory, drives))
}
