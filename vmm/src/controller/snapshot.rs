//! The requests that save a machine and load one.

use std::path::Path;

use lepton_api::Fault;
use lepton_api::types::{SnapshotCreate, SnapshotLoad, SnapshotType};

use super::dispatch::{Controller, console_of, refused};
use super::held::{Held, Waiting};
use super::mailbox::Message;
use super::phase::Phase;
use super::policy::Denied;
use crate::clone::{Template, TemplateError};
use crate::config::saved::{Overrides, SavedConfig};
use crate::events::Loop;
use crate::identity::{Identity, Wanted};
use crate::machine::restore::{self, Restoration};
use crate::memory::pager::PageError;
use crate::reach::folder_of;
use crate::snapshot::{self, Backend, Extent, LoadError, Saved};
use crate::vcpu::Stop;

impl From<&SnapshotLoad> for Overrides {
    fn from(load: &SnapshotLoad) -> Self {
        let taps = load.network_overrides.iter();
        let images = load.drive_overrides.iter();
        Overrides {
            taps: taps
                .map(|tap| (tap.iface_id.clone(), tap.host_dev_name.clone()))
                .collect(),
            images: images.cloned().collect(),
            socket: load.vsock_override.as_ref().map(|o| o.uds_path.clone()),
            huge_pages: load.huge_pages,
            track_dirty_pages: load.track_dirty_pages || load.enable_diff_snapshots,
        }
    }
}

impl Controller {
    /// PUT /snapshot/create.
    pub(super) fn create_snapshot(&mut self, request: &SnapshotCreate) -> Result<(), Fault> {
        let Phase::Paused(paused) = &mut self.phase else {
            return Err(refused(Denied::NotPaused));
        };
        let extent = match request.snapshot_type {
            SnapshotType::Full => Extent::Full,
            SnapshotType::Diff => Extent::Diff,
        };
        if let Some(drive) = self.configuration.devices.fleeting_drive() {
            return Err(refused(format!(
                "Create snapshot error: drive {drive}: what was written to it has no name and goes with this process: name \
                 a file by overlays when the machine is cloned"
            )));
        }
        let config = SavedConfig::from(&self.configuration);
        let started = std::time::Instant::now();
        snapshot::create(
            paused,
            config,
            extent,
            &request.snapshot_path,
            &request.mem_file_path,
        )
        .map_err(|error| {
            let fault = self.outside(error);
            refused(format!("Create snapshot error: {}", fault.message))
        })?;
        let path = request.snapshot_path.display();
        log::info!("machine saved in {path} after {:?}", started.elapsed());
        Ok(())
    }

    /// PUT /snapshot/load.
    pub(super) fn load_snapshot(
        &mut self,
        request: &SnapshotLoad,
        events: &mut Loop,
    ) -> Result<(), Fault> {
        self.load(request, events)
            .map_err(|error| refused(format!("Load snapshot error: {error}")))
    }

    /// `--template`: keeps a saved machine to be cloned.
    pub fn keep_template(&mut self, state: &Path, memory: &Path) -> Result<(), TemplateError> {
        let (template, configuration) = Template::open(state, memory)?;
        self.configuration = configuration;
        let mut reach = self.reach();
        template.reach(&mut reach);
        self.give_up_files(reach).map_err(LoadError::from)?;
        self.phase = Phase::Template(Box::new(template));
        Ok(())
    }

    fn load(&mut self, request: &SnapshotLoad, events: &mut Loop) -> Result<(), LoadError> {
        let mut saved = Saved::open(&request.snapshot_path)?;
        log::debug!("state read");
        let telling = match &request.identity {
            None => None,
            Some(identity) => {
                let identity = Identity::try_from(Wanted::from(identity))?;
                Some(identity.put_into(&mut saved.state, &self.options.entropy)?)
            }
        };
        let mut configuration = saved.configure(&Overrides::from(request))?;
        log::debug!("devices made");
        let mailbox = self.mailbox.clone();
        let failed = move |error: PageError| {
            mailbox.send(Message::Stopped(Stop::Failed(error.to_string())));
        };
        let backend = Backend::try_from(request)?;
        let (state, ram) = saved.map(&backend, &configuration, self.place(), failed)?;
        log::debug!("memory mapped");
        configuration.serial = self.configuration.serial.clone();
        let (console, room) = console_of(&configuration.serial)?;
        let restoration = Restoration {
            state: &state,
            vcpus: configuration.shape().topology.vcpus,
            ram,
            devices: configuration.devices.all(),
            console,
            // A machine that lives a second time lives now.
            clock_catches_up: request.clock_realtime || telling.is_some(),
            generation: self.options.entropy.generation,
        };
        self.check_processor(&state)?;
        let hypervisor = self.take_hypervisor()?;
        let built = restore::restore(&hypervisor, restoration, self.surroundings())?;
        self.configuration = configuration;
        let mut reach = self.reach();
        // The next snapshot, as a rule.
        reach.files(&folder_of(&request.snapshot_path));
        self.give_up_files(reach)?;
        let paused = self.adopt(built, room, events);
        if let Some(telling) = telling {
            let held = Held {
                resume: request.resume_vm,
                waits: Waiting::Nobody,
            };
            self.hold(paused, telling, held);
            self.let_go_of_code_soon(events);
            return Ok(());
        }
        self.phase = match request.resume_vm {
            true => Phase::Running(paused.resume()),
            false => Phase::Paused(paused),
        };
        self.let_go_of_code_soon(events);
        Ok(())
    }
}
