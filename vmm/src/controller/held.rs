//! A machine that was restored as another one: it runs, held, until its guest has said that it is who it is to be.

use std::sync::mpsc::SyncSender;

use lepton_api::types::SnapshotLoad;
use lepton_api::{Action, Fault, Reply};

use super::dispatch::{Controller, Next, refused};
use super::phase::Phase;
use crate::clone::{AdoptError, Adoption, NewFiles};
use crate::events::Loop;
use crate::exit::ExitCode;
use crate::identity::{IdentityError, Telling};
use crate::machine::Paused;

/// What is to happen once the guest has answered.
pub struct Held {
    /// Whether the machine is to run then.
    pub resume: bool,
    /// Who waits for it.
    pub waits: Waiting,
}

/// Who waits for a guest's answer.
pub enum Waiting {
    /// The process that offered the machine, and whether it has no other copies to wait for.
    Parent {
        adoption: Adoption,
        alone: bool,
        /// What was made for the copy.
        new_files: NewFiles,
    },
    /// The client that has asked for the load.
    Client(SyncSender<Result<Reply, Fault>>),
    /// Nobody any more: it has failed.
    Nobody,
}

impl Controller {
    /// Lets a machine run for its guest's answer alone.
    pub(super) fn hold(&mut self, paused: Paused, telling: Telling, held: Held) {
        let exchange = telling.exchange(self.mailbox.clone());
        self.configuration.devices.hold(exchange);
        self.phase = Phase::Running(paused.resume());
        self.held = Some(held);
    }

    /// The guest has answered, or there is no answer.
    pub(super) fn identified(&mut self, result: Result<(), IdentityError>) -> Next {
        let Some(Held { resume, waits }) = self.held.take() else {
            return Next::Continue;
        };
        match (waits, result) {
            (
                Waiting::Parent {
                    adoption,
                    alone,
                    mut new_files,
                },
                Ok(()),
            ) => {
                if let Err(error) = adoption.ready(&self.options.id, alone) {
                    log::error!("there is to be no copy of the machine: {error}");
                    return Next::Exit(ExitCode::Failure);
                }
                new_files.keep();
                self.let_go(resume);
                log::info!("this is a copy of a machine now, and another one");
            }
            (Waiting::Parent { adoption, .. }, Err(error)) => {
                log::error!("there is to be no copy of the machine: {error}");
                adoption.refuse(&AdoptError::Identity(error));
                return Next::Exit(ExitCode::Failure);
            }
            (Waiting::Client(client), Ok(())) => {
                self.let_go(resume);
                log::info!("the machine is another one now");
                // A client that is gone needs no answer.
                drop(client.send(Ok(Reply::NoContent)));
            }
            (Waiting::Client(client), Err(error)) => {
                let fault = refused(format!("Load snapshot error: {error}"));
                log::error!(
                    "request refused: {}; the machine stands still",
                    fault.message
                );
                self.stand_still();
                self.held = Some(Held {
                    resume: false,
                    waits: Waiting::Nobody,
                });
                drop(client.send(Err(fault)));
            }
            (Waiting::Nobody, _) => {}
        }
        Next::Continue
    }

    /// Lets the machine talk to everybody.
    fn let_go(&mut self, resume: bool) {
        if !resume {
            self.stand_still();
        }
        self.configuration.devices.release();
        if let Some(machine) = self.phase.machine() {
            machine.wake_devices();
        }
    }

    fn stand_still(&mut self) {
        let phase = std::mem::replace(&mut self.phase, Phase::Configuring);
        self.phase = match phase {
            Phase::Running(running) => {
                let (paused, result) = running.pause();
                if let Err(error) = result {
                    log::error!("{error}");
                }
                Phase::Paused(paused)
            }
            phase => phase,
        };
    }

    /// PUT /snapshot/load of a machine that is to be another one. It is answered when the guest has answered.
    pub(super) fn load_as_another(
        &mut self,
        request: &SnapshotLoad,
        answer: SyncSender<Result<Reply, Fault>>,
        events: &mut Loop,
    ) {
        let loaded = self
            .admit(&Action::LoadSnapshot(request.clone()))
            .and_then(|()| self.load_snapshot(request, events));
        match loaded {
            Ok(()) => {
                if let Some(held) = &mut self.held {
                    held.waits = Waiting::Client(answer);
                }
            }
            Err(fault) => {
                log::warn!("request refused: {}", fault.message);
                drop(answer.send(Err(fault)));
            }
        }
    }
}
