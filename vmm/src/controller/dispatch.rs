//! From an action to the call that does it, and its answer.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use event_manager::SubscriberOps;
use lepton_api::types::{
    ActionType, HugePages, InstanceInfo, InstanceState, Logger, Version, VmState,
};
use lepton_api::{Action, Fault, Reply};
use vmm_sys_util::eventfd::EventFd;

use super::held::Held;
use super::mailbox::{Mailbox, Message};
use super::phase::Phase;
use super::policy::{self, Stage};
use crate::config::{ConfigError, Configuration, SerialSettings};
use crate::console::{self, ConsoleInput, RawTerminal};
use crate::events::Loop;
use crate::exit::ExitCode;
use crate::identity::Entropy;
use crate::kvm::{self, Hypervisor};
use crate::later::Later;
use crate::machine::Paused;
use crate::machine::build::{self, Blueprint, BuildError, Built, Console, Surroundings};
use crate::memory::MemorySize;
use crate::memory::small_pages::{self, SmallPages};
use crate::metrics::{Counted, Metrics};
use crate::process;
use crate::reach::{Reach, ReachError, Within};
use crate::vcpu::state::Saveable;
use crate::vcpu::{Standby, Stop};

/// The version of Firecracker's API that is spoken; clients ask for it by GET /version.
const API_VERSION: &str = "1.17.0";
/// What this program calls itself in GET /. Firecracker's clients look at the state beside it, not at this.
const APP_NAME: &str = "Lepton";

/// What the command line says of the machine.
pub struct Options {
    /// Its id.
    pub id: String,
    /// `--boot-timer`.
    pub boot_timer: bool,
    /// Runs first on each vCPU thread: its confinement.
    pub confine_vcpu: Arc<dyn Fn() -> io::Result<()> + Send + Sync>,
    /// For a guest that is to be another than it was.
    pub entropy: Entropy,
    /// Where requests may open files once the machine was started: `--allow-path`.
    pub allow_path: Vec<PathBuf>,
    /// Memory of the machine that this process will be offered, if that is known: `--adopt-mem-mib`.
    pub expected_memory: Option<MemorySize>,
    /// The process's own sockets: the API's, and that of `--adopt`.
    pub sockets: Vec<PathBuf>,
}

impl Options {
    /// Where files without a name are made that have no other place: where requests may make files, and the current
    /// folder if they may everywhere.
    pub(super) fn scratch(&self) -> PathBuf {
        match self.allow_path.first() {
            Some(path) if path != Path::new("/") => path.clone(),
            _ => ".".into(),
        }
    }
}

/// Whether the process goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// It does.
    Continue,
    /// It ends with this status.
    Exit(ExitCode),
}

/// The one owner of the machine and its configuration.
pub struct Controller {
    pub(super) options: Options,
    pub(super) mailbox: Mailbox,
    /// Dropped before the configuration: a machine uses its devices.
    pub(super) phase: Phase,
    pub(super) configuration: Configuration,
    /// The machine runs and is held, until its guest has taken on who it is.
    pub(super) held: Option<Held>,
    /// Made ready ahead of the start, which takes it.
    pub(super) hypervisor: Option<Hypervisor>,
    /// The first vCPU's thread, if this process waits for offers.
    pub(super) standby: Option<Standby>,
    /// What KVM can save of a vCPU here, once it was asked.
    pub(super) saveable: Option<Saveable>,
    pub(super) metrics: Metrics,
    terminal: Option<RawTerminal>,
    /// Where files can be opened, once the machine was started.
    within: Option<Within>,
}

pub(super) fn refused(error: impl std::fmt::Display) -> Fault {
    Fault::bad_request(error.to_string())
}

/// How long a machine that came from elsewhere runs before the code that made it is let go. Its vCPUs need code on their way
/// into the guest, and would have to map it again.
const UNDER_WAY: Duration = Duration::from_millis(100);

impl Controller {
    /// A controller of a machine about which nothing is known yet. Without a `hypervisor` KVM is opened when it is needed.
    pub fn new(
        options: Options,
        mailbox: Mailbox,
        hypervisor: Option<Hypervisor>,
    ) -> Result<Self, ConfigError> {
        Ok(Controller {
            options,
            mailbox,
            phase: Phase::Configuring,
            configuration: Configuration::new()?,
            held: None,
            hypervisor,
            standby: None,
            saveable: None,
            metrics: Metrics::default(),
            terminal: None,
            within: None,
        })
    }

    /// Metrics of the process.
    pub fn metrics_mut(&mut self) -> &mut Metrics {
        &mut self.metrics
    }

    /// Takes one message.
    pub fn handle(&mut self, message: Message, events: &mut Loop) -> Next {
        match message {
            Message::Request {
                action: Action::Clone(request),
                reply,
            } => {
                self.clone_machine(&request, reply);
                Next::Continue
            }
            Message::Request {
                action: Action::LoadSnapshot(request),
                reply,
            } if request.identity.is_some() => {
                self.load_as_another(&request, reply, events);
                Next::Continue
            }
            Message::Request {
                action: action @ (Action::GetMetrics | Action::GetDivergence),
                reply,
            } => {
                self.tell(&action, reply);
                Next::Continue
            }
            Message::Identified(result) => self.identified(result),
            Message::Offer(adoption) => self.adopt_offer(adoption, events),
            Message::Request { action, reply } => {
                let result = self.execute(action, events);
                // A client that is gone needs no answer.
                drop(reply.send(result));
                self.prepare();
                Next::Continue
            }
            Message::Stopped(stop) => Next::Exit(self.report(&stop)),
            Message::End(code) => {
                log::info!("ending on a signal, exit status {}", code as u8);
                Next::Exit(code)
            }
            Message::MetricsDue => {
                self.flush_metrics();
                Next::Continue
            }
            Message::NothingYet => {
                self.prepare();
                Next::Continue
            }
        }
    }

    /// Writes the last metrics, gives the terminal back and removes the machine's sockets. To be followed by the end
    /// of the process, which takes the machine with it: stopping its threads one by one would only delay that.
    pub fn finish(mut self) {
        self.flush_metrics();
        if let Err(error) = self.configuration.devices.write_back() {
            log::error!("{error}");
        }
        let Controller {
            phase,
            configuration,
            terminal,
            ..
        } = self;
        std::mem::forget(phase);
        drop(terminal);
        drop(configuration);
    }

    fn report(&self, stop: &Stop) -> ExitCode {
        let code = ExitCode::from(stop);
        match stop {
            Stop::Reset => log::info!("the guest reset itself"),
            Stop::PowerOff => log::info!("the guest powered off"),
            Stop::TripleFault => log::warn!("the guest had a triple fault"),
            Stop::Failed(reason) => log::error!("the machine failed: {reason}"),
        }
        log::info!("exit status {}", code as u8);
        code
    }

    /// Does one action.
    pub fn execute(&mut self, action: Action, events: &mut Loop) -> Result<Reply, Fault> {
        let counted = Counted::from(&action);
        let sets_machine = action.sets_machine();
        let result = self.admit(&action).and_then(|()| self.act(action, events));
        if sets_machine && result.is_ok() {
            self.configuration.touch();
        }
        if let Err(fault) = &result {
            log::warn!("request refused: {}", fault.message);
        }
        self.metrics.api.count(counted, result.is_err());
        result
    }

    /// What holds for every request: whether it is allowed now, and whether it should be made at all.
    pub(super) fn admit(&mut self, action: &Action) -> Result<(), Fault> {
        if let Some(field) = action.deprecated_field() {
            log::warn!("a request uses the deprecated field {field}");
            self.metrics.api.count_deprecated();
        }
        policy::allow(self.stage(), action).map_err(refused)
    }

    pub(super) fn stage(&self) -> Stage {
        match self.phase.stage() {
            _ if self.held.is_some() => Stage::Held,
            Stage::Configuring if !self.configuration.is_touched() => Stage::Fresh,
            stage => stage,
        }
    }

    fn act(&mut self, action: Action, events: &mut Loop) -> Result<Reply, Fault> {
        let done = |()| Reply::NoContent;
        let configuration = &mut self.configuration;
        match action {
            Action::GetInstanceInfo => Reply::json(&self.instance_info()),
            Action::GetVersion => Reply::json(&Version {
                firecracker_version: API_VERSION.into(),
            }),
            Action::GetMachineConfig => Reply::json(configuration.machine()),
            Action::GetVmConfig => Reply::json(&configuration.full()),
            Action::GetMetrics | Action::GetDivergence => self.report_of(&action).finish(),
            Action::InstanceStart => self.start(events).map(done).map_err(refused),
            Action::SendCtrlAltDel => self.ctrl_alt_del().map(done),
            Action::FlushMetrics => self.flush_on_request().map(done),
            Action::PutBootSource(boot) => configuration
                .set_boot_source(boot)
                .map(done)
                .map_err(refused),
            Action::PutCpuConfig(cpu) => configuration.set_cpu(cpu).map(done).map_err(refused),
            Action::PutDrive(drive) => configuration
                .devices
                .put_drive(drive)
                .map(done)
                .map_err(refused),
            Action::PatchDrive(patch) => {
                let patched = configuration.devices.patch_drive(&patch);
                patched.map(done).map_err(|error| self.outside(error))
            }
            Action::ResetDrive(id) => configuration
                .devices
                .reset_drive(&id)
                .map(done)
                .map_err(refused),
            Action::PutLogger(logger) => configure_log(&logger).map(done),
            Action::PutMachineConfig(machine) => configuration
                .set_machine(machine)
                .map(done)
                .map_err(refused),
            Action::PatchMachineConfig(patch) => configuration
                .patch_machine(patch)
                .map(done)
                .map_err(refused),
            Action::PutMetrics(target) => {
                self.metrics.set_target(target).map_err(refused)?;
                self.start_metrics_timer(events).map(done).map_err(refused)
            }
            Action::PutNetworkInterface(interface) => configuration
                .devices
                .put_interface(interface)
                .map(done)
                .map_err(refused),
            Action::PatchNetworkInterface(patch) => configuration
                .devices
                .patch_interface(&patch)
                .map(done)
                .map_err(refused),
            Action::PutSerial(serial) => {
                configuration.set_serial(serial).map(done).map_err(refused)
            }
            Action::Clone(request) => self.clone_and_wait(&request),
            Action::CreateSnapshot(request) => self.create_snapshot(&request).map(done),
            Action::LoadSnapshot(request) => self.load_snapshot(&request, events).map(done),
            Action::PatchVm(change) => self.change_state(change.state).map(done),
            Action::PutVsock(vsock) => configuration
                .devices
                .put_vsock(vsock)
                .map(done)
                .map_err(refused),
        }
    }

    fn instance_info(&self) -> InstanceInfo {
        InstanceInfo {
            id: self.options.id.clone(),
            state: match self.phase.stage() {
                Stage::Fresh | Stage::Configuring => InstanceState::NotStarted,
                Stage::Running | Stage::Held => InstanceState::Running,
                Stage::Paused | Stage::Template => InstanceState::Paused,
            },
            vmm_version: env!("CARGO_PKG_VERSION").into(),
            app_name: APP_NAME.into(),
            template: self.phase.stage() == Stage::Template,
        }
    }

    /// Builds the machine and lets it run.
    fn start(&mut self, events: &mut Loop) -> Result<(), StartError> {
        let (console, room) = console_of(&self.configuration.serial)?;
        let shape = self.configuration.shape();
        let (boot, cpu, devices) = self.configuration.to_boot()?;
        let hypervisor = match self.hypervisor.take() {
            Some(ready) => ready,
            None => Hypervisor::open().map_err(BuildError::from)?,
        };
        let blueprint = Blueprint {
            shape,
            cpu,
            boot,
            device_arguments: devices.kernel_arguments(),
            devices: devices.all(),
            console,
            generation: self.options.entropy.generation,
        };
        let mailbox = self.mailbox.clone();
        let around = surroundings(&self.options, self.standby.take(), mailbox);
        let small_pages = match shape.huge_pages {
            HugePages::None => SmallPages::begin()?,
            HugePages::Hugetlbfs2M | HugePages::Transparent => None,
        };
        let built = build::build(&hypervisor, blueprint, around)?;
        self.give_up_files(self.reach())?;
        if let Some(small_pages) = small_pages {
            let boot_is_over = Later::after(small_pages::BOOT, move || drop(small_pages))?;
            events.add_subscriber(Box::new(boot_is_over));
        }
        let paused = self.adopt(built, room, events);
        self.phase = Phase::Running(paused.resume());
        // The first clone is not to ask for it while the machine stands still.
        self.saveable = hypervisor.saveable().ok();
        process::let_go_of_code();
        // Asked only now: CPUID is slow on a host that is itself a guest.
        if !kvm::is_hardware_virtualized() {
            log::warn!(
                "this host's processor has neither SVM nor VMX for guests: KVM emulates the guest's kernel, and Linux \
                 takes minutes to boot"
            );
        }
        Ok(())
    }

    /// Lets go of the code that made a machine of another one, once it runs. It may be paused: what runs again is mapped again.
    pub(super) fn let_go_of_code_soon(&self, events: &mut Loop) {
        match Later::after(UNDER_WAY, process::let_go_of_code) {
            Ok(soon) => drop(events.add_subscriber(Box::new(soon))),
            Err(error) => log::warn!("code stays in memory: {error}"),
        }
    }

    /// What stays in reach of a machine that was configured as this one is.
    pub(super) fn reach(&self) -> Reach {
        let mut reach = Reach::new(&self.options.allow_path);
        let devices = &self.configuration.devices;
        devices.reach(&mut reach);
        let vsock = devices.vsock().map(|vsock| Path::new(&vsock.uds_path));
        let own = self.options.sockets.iter().map(PathBuf::as_path);
        vsock
            .into_iter()
            .chain(own)
            .for_each(|path| reach.socket(path));
        reach
    }

    /// Gives up all other files, before the guest runs.
    pub(super) fn give_up_files(&mut self, reach: Reach) -> Result<(), ReachError> {
        self.within = Some(reach.confine()?);
        Ok(())
    }

    /// An error, and if it may be so that what was named is out of reach.
    pub(super) fn outside(&self, error: impl std::error::Error + 'static) -> Fault {
        let hint = self.within.as_ref().and_then(|within| within.hint(&error));
        match hint {
            Some(hint) => refused(format!("{error}; {hint}")),
            None => refused(error),
        }
    }

    /// What surrounds a machine of this process.
    pub(super) fn surroundings(&mut self) -> Surroundings {
        surroundings(&self.options, self.standby.take(), self.mailbox.clone())
    }

    /// Connects a new machine to the event loop and to the terminal.
    pub(super) fn adopt(
        &mut self,
        built: Built,
        room: Option<EventFd>,
        events: &mut Loop,
    ) -> Paused {
        for device in built.events {
            events.add_subscriber(Box::new(device));
        }
        if let Some(room) = room {
            self.terminal = RawTerminal::enter();
            let serial = built.machine.machine().bus().serial.clone();
            events.add_subscriber(Box::new(ConsoleInput::new(serial, room)));
        }
        built.machine
    }

    fn ctrl_alt_del(&mut self) -> Result<(), Fault> {
        match self.phase.machine() {
            Some(machine) if machine.ctrl_alt_del() => Ok(()),
            Some(_) => Err(refused(format!(
                "{:?}: the guest does not read its keyboard",
                ActionType::SendCtrlAltDel
            ))),
            None => Err(refused(policy::Denied::BeforeStart)),
        }
    }

    fn change_state(&mut self, wanted: VmState) -> Result<(), Fault> {
        let phase = std::mem::replace(&mut self.phase, Phase::Configuring);
        let (phase, result) = match (phase, wanted) {
            (Phase::Running(running), VmState::Paused) => {
                let (paused, result) = running.pause();
                // What a guest has written is in its drives' files while it stands still.
                let devices = &self.configuration.devices;
                let written = devices.write_back().map_err(refused);
                (Phase::Paused(paused), result.map_err(refused).and(written))
            }
            (Phase::Paused(paused), VmState::Resumed) => (Phase::Running(paused.resume()), Ok(())),
            // What is so already is no error.
            (phase, _) => (phase, Ok(())),
        };
        self.phase = phase;
        result
    }
}

/// Why a machine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It is not configured, or not well.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Files could not be given up.
    #[error(transparent)]
    Files(#[from] ReachError),
    /// The host refused something.
    #[error("host: {0}")]
    Host(#[from] io::Error),
}

fn configure_log(logger: &Logger) -> Result<(), Fault> {
    crate::log::configure(logger).map_err(|e| refused(format!("log_path {e}")))
}

fn surroundings(options: &Options, standby: Option<Standby>, mailbox: Mailbox) -> Surroundings {
    Surroundings {
        standby,
        stopped: Arc::new(move |stop| mailbox.send(Message::Stopped(stop))),
        confine_vcpu: options.confine_vcpu.clone(),
        boot_timer: options.boot_timer,
    }
}

/// The console, and for one on the standard streams what fires when it has room for input.
pub(super) fn console_of(settings: &SerialSettings) -> io::Result<(Console, Option<EventFd>)> {
    let mut console = Console {
        out: console::output(settings.path.as_deref())?,
        limit: settings.limit,
        room: None,
    };
    if settings.path.is_some() {
        return Ok((console, None));
    }
    let room = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    console.room = Some(room.try_clone()?);
    Ok((console, Some(room)))
}
