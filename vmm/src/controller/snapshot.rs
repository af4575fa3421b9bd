//! The requests that save a machine and load one.

use lepton_api::Fault;
use lepton_api::types::{MemoryBackendType, SnapshotCreate, SnapshotLoad, SnapshotType};

use super::dispatch::{Controller, console_of, refused};
use super::phase::Phase;
use super::policy::Denied;
use crate::config::saved::{Overrides, SavedConfig};
use crate::events::Loop;
use crate::kvm::Hypervisor;
use crate::machine::restore::{self, Restoration};
use crate::snapshot::{self, LoadError, Saved};

impl From<&SnapshotLoad> for Overrides {
    fn from(load: &SnapshotLoad) -> Self {
        let taps = load.network_overrides.iter();
        let images = load.drive_overrides.iter();
        Overrides {
            taps: taps
                .map(|tap| (tap.iface_id.clone(), tap.host_dev_name.clone()))
                .collect(),
            images: images
                .map(|image| (image.drive_id.clone(), image.path_on_host.clone()))
                .collect(),
            socket: load.vsock_override.as_ref().map(|o| o.uds_path.clone()),
            huge_pages: load.huge_pages,
            track_dirty_pages: load.track_dirty_pages || load.enable_diff_snapshots,
        }
    }
}

impl Controller {
    /// PUT /snapshot/create.
    pub(super) fn create_snapshot(&mut self, request: &SnapshotCreate) -> Result<(), Fault> {
        let Phase::Paused(paused) = &self.phase else {
            return Err(refused(Denied::NotPaused));
        };
        if request.snapshot_type == SnapshotType::Diff {
            return Err(refused("snapshot_type Diff: not part of this version"));
        }
        let config = SavedConfig::from(&self.configuration);
        let started = std::time::Instant::now();
        snapshot::create(
            paused,
            config,
            &request.snapshot_path,
            &request.mem_file_path,
        )
        .map_err(|error| refused(format!("Create snapshot error: {error}")))?;
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

    fn load(&mut self, request: &SnapshotLoad, events: &mut Loop) -> Result<(), LoadError> {
        let mut saved = Saved::open(&request.snapshot_path)?;
        log::debug!("state read");
        let mut configuration = saved.configure(&Overrides::from(request))?;
        log::debug!("devices made");
        let path = match (&request.mem_backend, &request.mem_file_path) {
            (Some(backend), _) if backend.backend_type == MemoryBackendType::File => {
                &backend.backend_path
            }
            (_, Some(path)) => path,
            _ => return Err(LoadError::Uffd),
        };
        let ram = saved.map(path, &configuration)?;
        log::debug!("memory mapped");
        configuration.serial = self.configuration.serial.clone();
        let (console, room) = console_of(&configuration.serial)?;
        let restoration = Restoration {
            state: &saved.state,
            vcpus: configuration.shape().topology.vcpus,
            ram,
            devices: configuration.devices.all(),
            console,
            clock_catches_up: request.clock_realtime,
        };
        let built = restore::restore(&Hypervisor::open()?, restoration, self.surroundings())?;
        self.configuration = configuration;
        let paused = self.adopt(built, room, events);
        self.phase = match request.resume_vm {
            true => Phase::Running(paused.resume()),
            false => Phase::Paused(paused),
        };
        Ok(())
    }
}
