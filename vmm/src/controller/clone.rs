//! The request that clones a machine, and the offer of one.

use std::path::Path;
use std::sync::mpsc::{RecvError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use lepton_api::types::{CloneMachine, HugePages};
use lepton_api::{Action, Fault, Reply};

use super::dispatch::{Controller, Next, console_of, refused};
use super::held::{Held, Waiting};
use super::mailbox::Message;
use super::phase::Phase;
use super::policy::{self, Stage};
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

/// A clone whose copies have a process each, and which the machine is to be given to.
pub struct Cloning {
    request: CloneMachine,
    /// To the thread that gives it to them, and answers.
    hand_overs: SyncSender<Result<HandOver, Fault>>,
}

/// How long a machine stands still at most until its only copy is there. Such a copy takes half of that where it does not have
/// to wait for a processor, and is as good as there otherwise.
const FIRST_THE_COPY: Duration = Duration::from_micros(600);

impl Controller {
    /// PUT /clone. The copies get the machine from a thread of its own, which also answers: they may take their time, and
    /// this machine has its own life.
    pub(super) fn clone_machine(
        &mut self,
        request: &CloneMachine,
        answer: SyncSender<Result<Reply, Fault>>,
    ) {
        let asked = self.admit(&Action::Clone(request.clone()));
        let heirs = match asked.and_then(|()| self.ask_heirs(request).map_err(fault)) {
            Ok(heirs) => heirs,
            Err(fault) => return refuse(&answer, fault),
        };
        let (hand_overs, taken) = sync_channel(1);
        let cloning = Cloning {
            request: request.clone(),
            hand_overs,
        };
        // Only a pool has to be waited for.
        let (at_once, in_time) = match heirs.are_here() {
            true => (Some(cloning), None),
            false => (None, Some((self.mailbox.clone(), cloning))),
        };
        // Before the machine stands still. A thread that is started when it runs again may be put behind its vCPU, and
        // wait until that has been on its processor for a while.
        let spawned = std::thread::Builder::new()
            .name("clone".into())
            .stack_size(256 << 10)
            .spawn({
                let answer = answer.clone();
                move || {
                    let heirs = match heirs.gather() {
                        Ok(heirs) => heirs,
                        Err(error) => return refuse(&answer, fault(error)),
                    };
                    if let Some((mailbox, cloning)) = in_time {
                        mailbox.send(Message::Cloning(cloning));
                    }
                    let Finished { result, leftovers } = match taken.recv() {
                        Ok(Ok(hand_over)) => hand_over.finish(heirs),
                        Ok(Err(fault)) => return refuse(&answer, fault),
                        // The process is ending.
                        Err(RecvError) => return,
                    };
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
        if let Some(cloning) = at_once {
            self.hand_over(&cloning);
        }
    }

    /// Goes on with a clone whose copies had to be waited for. The machine may be another than it was.
    pub(super) fn go_on_cloning(&mut self, cloning: &Cloning) {
        match policy::allow(self.stage(), &Action::Clone(cloning.request.clone())) {
            Ok(()) => self.hand_over(cloning),
            Err(error) => drop(cloning.hand_overs.send(Err(refused(error)))),
        }
    }

    /// Refuses what can be refused before anybody is asked for a process, and asks.
    fn ask_heirs(&self, request: &CloneMachine) -> Result<Heirs, CloneError> {
        self.wanted_drives(request)?;
        Heirs::ask(request)
    }

    fn wanted_drives(&self, request: &CloneMachine) -> Result<Vec<String>, CloneError> {
        match &self.phase {
            Phase::Template(template) => template.wanted_drives(request),
            _ => clone::wanted_drives(request, self.configuration.devices.drives()),
        }
    }

    fn hand_over(&mut self, cloning: &Cloning) {
        if let Err(error) = self.try_hand_over(cloning) {
            drop(cloning.hand_overs.send(Err(fault(error))));
        }
    }

    /// The machine stands still for as long as must be, and goes on when it is on its way.
    fn try_hand_over(&mut self, cloning: &Cloning) -> Result<(), CloneError> {
        let Cloning {
            request,
            hand_overs,
        } = cloning;
        if let Phase::Template(template) = &self.phase {
            let hand_over = template.hand_over(request)?;
            // The thread waits for it.
            drop(hand_overs.send(Ok(hand_over)));
            return Ok(());
        }
        let drives = self.wanted_drives(request)?;
        let saveable = match self.saveable.take() {
            Some(known) => known,
            None => Hypervisor::open()?.saveable()?,
        };
        let order = Order {
            saveable: &saveable,
            drives: &drives,
            scratch: &self.options.scratch(),
        };
        let track_dirty_pages = self.configuration.shape().track_dirty_pages;
        let patience = self.patience_for(request);
        let parted = match &mut self.phase {
            Phase::Running(running) => running.part_memory(),
            _ => Vec::new(),
        };
        let since = Instant::now();
        let configuration = &mut self.configuration;
        let (under_way, there) = sync_channel(0);
        let (pauses, pause) = sync_channel(1);
        let give = |paused: &mut Paused| {
            let (state, mut memory, drives) = take(paused, configuration, &order)?;
            memory.leftovers.extend(parted);
            let hand_over = HandOver {
                state,
                memory,
                drives,
                track_dirty_pages,
                since,
                under_way,
                pause,
            };
            // The thread waits for it.
            drop(hand_overs.send(Ok(hand_over)));
            Ok(())
        };
        let phase = std::mem::replace(&mut self.phase, Phase::Configuring);
        let (phase, given) = match phase {
            Phase::Running(running) => {
                let (mut paused, result) = running.pause();
                let given = result.map_err(CloneError::Pause);
                let given = given.and_then(|()| give(&mut paused));
                if given.is_ok() {
                    // Nothing comes by this channel: it is closed.
                    let _ = there.recv_timeout(patience);
                }
                (Phase::Running(paused.resume()), given)
            }
            Phase::Paused(mut paused) => {
                let given = give(&mut paused);
                (Phase::Paused(paused), given)
            }
            // The policy has refused before.
            phase @ (Phase::Configuring | Phase::Template(_)) => (phase, Err(CloneError::Count(0))),
        };
        self.phase = phase;
        self.saveable = Some(saveable);
        given?;
        let pause = since.elapsed();
        // The thread needs it for its answer.
        let _ = pauses.send(pause);
        let count = request.children.len();
        log::info!("machine cloned for {count} processes; it stood still for {pause:?}");
        Ok(())
    }

    /// How long the machine may wait for its copies before it goes on. Where its vCPUs and the copy's keep all processors
    /// busy, what is to be done for the copy would wait for one until the scheduler's next tick, milliseconds later. Many
    /// copies, or one whose guest is to be told who it is, take too long.
    fn patience_for(&self, request: &CloneMachine) -> Duration {
        let vcpus = usize::from(self.configuration.shape().topology.vcpus);
        match &*request.children {
            [only] if only.identity.is_none() && 2 * vcpus >= self.options.processors => {
                FIRST_THE_COPY
            }
            _ => Duration::ZERO,
        }
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
