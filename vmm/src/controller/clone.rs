//! The request that clones a machine, and the offer of one.

use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use lepton_api::types::CloneMachine;
use lepton_api::{Action, Fault, Reply};

use super::dispatch::{Controller, Next, console_of, refused};
use super::held::{Held, Waiting};
use super::phase::Phase;
use super::policy::Stage;
use crate::clone::{
    self, AdoptError, Adoption, CloneError, Finished, HandOver, Named, NewFiles, Offered, Pause,
};
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
use crate::memory::freeze::Frozen;
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
        if let Err(error) = self.begin_clone(request, &answer) {
            refuse(&answer, fault(error));
        }
    }

    /// The same, and waits for it.
    pub(super) fn clone_and_wait(&mut self, request: &CloneMachine) -> Result<Reply, Fault> {
        let (sender, answer) = std::sync::mpsc::sync_channel(1);
        self.clone_machine(request, sender);
        let gone = |_| refused("the thread that clones has ended");
        answer.recv().map_err(gone)?
    }

    /// What can be refused is refused first, then the machine stands still for as long as must be. Without an error the
    /// answer comes from elsewhere.
    fn begin_clone(
        &mut self,
        request: &CloneMachine,
        answer: &SyncSender<Result<Reply, Fault>>,
    ) -> Result<(), CloneError> {
        if let Phase::Template(template) = &self.phase {
            let hand_over = template.hand_over(request)?;
            Courier::start(Errand::Offer(Box::new(hand_over)), answer.clone())?.tell(Pause::none());
            return Ok(());
        }
        let drives = clone::wanted_drives(request, self.configuration.devices.drives())?;
        let named = Named::of(request)?;
        let early = match named.are_scattered() {
            true => Some(named.connect()?),
            false => None,
        };
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
        // What takes no longer than the vCPUs need to come out of the guest is done meanwhile.
        let connect = || early.map_or_else(|| named.connect(), Ok);
        let (mut paused, links, runs) = match phase {
            Phase::Running(running) => {
                let stopping = running.stop();
                let links = connect();
                let (paused, still) = stopping.wait();
                (paused, still.map_err(CloneError::Pause).and(links), true)
            }
            Phase::Paused(paused) => (paused, connect(), false),
            // The policy has refused before.
            phase @ (Phase::Configuring | Phase::Template(_)) => {
                self.phase = phase;
                return Err(CloneError::Count(0));
            }
        };
        let taken = links.and_then(|links| {
            let heirs = named.with(links);
            let (state, mut memory, drives) = take(&mut paused, configuration, &order)?;
            memory.leftovers.extend(parted);
            let copies = heirs.count();
            let copied = memory.copied;
            let hand_over = HandOver {
                heirs,
                state,
                memory,
                drives,
                has_run_here: true,
                track_dirty_pages: configuration.shape().track_dirty_pages,
            };
            // A copy that has the machine before it before the vCPUs run again comes to a processor before they do. To hand it
            // to another thread first takes longer than to give it to one copy. That thread, too, is started before they run: after
            // it, it may be put behind one of them, and wait until that has been on its processor for a while.
            let courier = match hand_over.heirs.is_one_at_hand() {
                true => Courier::start(Errand::Finish(hand_over.offer()), answer.clone())?,
                false => {
                    let courier =
                        Courier::start(Errand::Offer(Box::new(hand_over)), answer.clone())?;
                    if runs {
                        courier.wait_until_offered();
                    }
                    courier
                }
            };
            Ok((courier, copies, copied))
        });
        self.phase = match runs {
            true => Phase::Running(paused.resume()),
            false => Phase::Paused(paused),
        };
        let pause = Pause::since(started);
        self.saveable = Some(saveable);
        let (courier, copies, copied) = taken?;
        log::info!(
            "machine cloned for {copies} processes; it stood still for {:?}, in which {copied} bytes of memory were copied",
            pause.length
        );
        courier.tell(pause);
        Ok(())
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
                    self.expect_machine(events);
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
        let go_on = |paused: Paused| match resume {
            true => Phase::Running(paused.resume()),
            false => Phase::Paused(paused),
        };
        let id = &self.options.id;
        // Alone, it waits for no word, and runs before it says so: who hears that may take the processor from it.
        let agreed = match alone {
            true => adoption.is_awaited().and_then(|()| {
                self.phase = go_on(paused);
                adoption.ready(id, alone)
            }),
            false => {
                let agreed = adoption.ready(id, alone);
                self.phase = match agreed {
                    Ok(()) => go_on(paused),
                    Err(_) => Phase::Paused(paused),
                };
                agreed
            }
        };
        if let Err(error) = agreed {
            log::error!("there is to be no copy of the machine: {error}");
            return Next::Exit(ExitCode::Failure);
        }
        new_files.keep();
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
        // To ask takes as long as all the rest on a host that is itself a guest. KVM takes any CPUID: if it is not true that the
        // machine has run here, it is the guest that fails.
        if !adopted.has_run_here {
            self.check_processor(&adopted.state)?;
        }
        let place = self.place();
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
        // If this fails it is lost: a machine's memory may lie where the next one's would.
        let hypervisor = self.take_hypervisor()?;
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
}

/// A thread that brings a machine to its copies, and waits for their answers.
struct Courier {
    pauses: SyncSender<Pause>,
    offered: Receiver<()>,
}

enum Errand {
    /// Nobody has the machine before them yet.
    Offer(Box<HandOver>),
    /// All have.
    Finish(Offered),
}

/// How much longer a machine stands still at most so that its copies come to a processor before its vCPUs do, which may
/// keep it for the rest of a tick of the host's clock: 4 ms where there are 250 in a second. Where processors are free the offer
/// takes less.
const HEAD_START: Duration = Duration::from_micros(250);

impl Courier {
    /// Sends it off. It tells `answer` what came of it.
    fn start(errand: Errand, answer: SyncSender<Result<Reply, Fault>>) -> Result<Self, CloneError> {
        let (pauses, told) = sync_channel(1);
        let (offers, offered) = sync_channel(1);
        std::thread::Builder::new()
            .name("clone".into())
            .stack_size(256 << 10)
            .spawn(move || {
                let offered = match errand {
                    Errand::Finish(offered) => offered,
                    Errand::Offer(hand_over) => {
                        let offered = hand_over.offer();
                        // Who waited may be busy with something else by now.
                        let _ = offers.try_send(());
                        offered
                    }
                };
                let Finished { result, leftovers } = offered.finish(&told);
                match result {
                    // A client that is gone needs no answer.
                    Ok(cloned) => drop(answer.send(Reply::json(&cloned))),
                    Err(error) => refuse(&answer, fault(error)),
                }
                drop(leftovers);
            })?;
        Ok(Courier { pauses, offered })
    }

    /// Waits until the copies have the machine before them, if that does not take long: a pool may have to start them.
    fn wait_until_offered(&self) {
        // If it has failed it will say so.
        let _ = self.offered.recv_timeout(HEAD_START);
    }

    /// Lets it know how long the machine stood still.
    fn tell(self, pause: Pause) {
        // It may have failed by now, and have said so.
        let _ = self.pauses.send(pause);
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
