//! `lepton-vmm`: wiring only.
#![no_main] // see `process`

use std::ffi::{OsString, c_char, c_int};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use clap::Parser;
use clap::error::ErrorKind;
use dlmalloc::GlobalDlmalloc;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use lepton_api::types::{Logger, MetricsTarget};
use lepton_api::{Action, Server, StopHandle, config_file};
use lepton_hostio::arguments;
use lepton_hostio::inherited;
use lepton_hostio::listener::{self, BindError, SocketFile};
use lepton_hostio::scheduler::ask_for_usual_slices;
use lepton_hostio::tap::Tap;
use lepton_vmm::cli::Cli;
use lepton_vmm::clock::time_on;
use lepton_vmm::clone::{Adopter, Source};
use lepton_vmm::controller::{Controller, Inbox, Mailbox, Message, Next, Options, mailbox};
use lepton_vmm::events::{self, Loop};
use lepton_vmm::exit::ExitCode;
use lepton_vmm::identity::Entropy;
use lepton_vmm::kvm::{self, Hypervisor};
use lepton_vmm::machine::generation::Generation;
use lepton_vmm::memory::{self, present};
use lepton_vmm::overlay::{self, OverlayFailure};
use lepton_vmm::process;
use lepton_vmm::reach;
use lepton_vmm::seccomp::{Filters, Thread};
use lepton_vmm::signal::{self, OrderlyEnds};
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::time::ClockId;

/// An end before the machine could run: what to say, and with which status.
struct Failure {
    code: ExitCode,
    message: String,
}

fn failure<E: std::fmt::Display>(code: ExitCode, what: &str) -> impl FnOnce(E) -> Failure {
    let what = what.to_owned();
    move |error| Failure {
        code,
        message: if what.is_empty() {
            error.to_string()
        } else {
            format!("{what}: {error}")
        },
    }
}

/// One heap for all threads, by which few pages are touched and few calls made. musl's own asks the kernel for each few pages, and
/// glibc's has one for each thread.
#[global_allocator]
static HEAP: GlobalDlmalloc = GlobalDlmalloc;

/// What the C library's start-up calls.
#[allow(unsafe_code)] // the name, and its arguments
#[unsafe(no_mangle)]
extern "C" fn main(count: c_int, first: *const *const c_char) -> c_int {
    // SAFETY: they are `main`'s own.
    let arguments = unsafe { arguments::from_main(count, first) };
    process::start(arguments.first());
    signal::end_on_panic();
    if arguments.get(1).is_some_and(|word| word == overlay::WORD) {
        std::process::exit(on_overlay(arguments) as i32);
    }
    let code = match Cli::try_parse_from(arguments) {
        Ok(cli) => match run(cli) {
            Ok(code) => code,
            Err(failure) => {
                eprintln!("lepton-vmm: {}", failure.message);
                failure.code
            }
        },
        Err(error) => {
            // Nothing is left to do if the message cannot be written.
            drop(error.print());
            match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::Success,
                _ => ExitCode::BadArguments,
            }
        }
    };
    // Threads that still serve clients end here with the process.
    std::process::exit(code as i32);
}

/// `lepton-vmm overlay ...`: no machine, and nothing of a guest's.
fn on_overlay(arguments: Vec<OsString>) -> ExitCode {
    process::close_to_others();
    match overlay::run(arguments.into_iter().skip(1)) {
        Ok(text) => {
            print!("{text}");
            ExitCode::Success
        }
        Err(OverlayFailure::Arguments(error)) => {
            drop(error.print());
            match error.use_stderr() {
                true => ExitCode::BadArguments,
                false => ExitCode::Success,
            }
        }
        Err(OverlayFailure::Overlay(error)) => {
            eprintln!("lepton-vmm: {error}");
            ExitCode::Failure
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let inherited = take_descriptors(&cli)?;
    process::close_to_others();
    let filters = match &cli.seccomp_filter {
        _ if cli.no_seccomp => Filters::none(),
        None => Filters::built_in(),
        Some(path) => {
            Filters::from_file(path).map_err(failure(ExitCode::Failure, "--seccomp-filter"))?
        }
    };
    let filters = Arc::new(filters);
    if cli.no_landlock {
        reach::keep_files();
    }
    let host = |what| failure::<io::Error>(ExitCode::Failure, what);
    let hypervisor = match &cli.config_file {
        // A machine will be started at once: what takes longest of it begins first. If it fails, it fails again when the machine is made,
        // and is told then.
        Some(_) => Hypervisor::open().ok(),
        None => None,
    };
    if let Some(hypervisor) = &hypervisor {
        let filters = filters.clone();
        hypervisor.begin_to_ask_for_cpuid(move || filters.confine(Thread::Vmm).is_ok());
    }
    let allow_path = allowed_paths(&cli)?;
    // The log first: what the API's thread says is to go where the command line says.
    lepton_vmm::log::init(cli.id());
    lepton_vmm::log::configure(&log_settings(&cli))
        .map_err(failure(ExitCode::Failure, "log_path"))?;
    signal::install().map_err(host("signal handlers"))?;
    let ends = signal::orderly_ends().map_err(host("signalfd"))?;

    let (mailbox, inbox) = mailbox().map_err(host("mailbox"))?;
    // The socket comes early: a client waits for it, and can wait in it.
    let api = match cli.no_api {
        true => None,
        false => Some(Api::serve(&cli, mailbox.clone(), filters.clone())?),
    };
    let mut events = events::new_loop().map_err(failure(ExitCode::Failure, "event loop"))?;
    events.add_subscriber(inbox.waker());
    events.add_subscriber(Box::new(Ends {
        ends,
        mailbox: mailbox.clone(),
    }));
    let (source, adopt_socket) = offers(&cli, inherited)?;
    let adopter = source.map(|source| Adopter::new(source, mailbox.clone()));
    let of_vcpu = filters.clone();
    let options = Options {
        id: cli.id().to_owned(),
        entropy: entropy().map_err(host("getrandom"))?,
        boot_timer: cli.boot_timer,
        confine_vcpu: Arc::new(move || {
            reach::give_up_files().map_err(io::Error::other)?;
            ask_for_usual_slices();
            of_vcpu.confine(Thread::Vcpu).map_err(io::Error::other)
        }),
        allow_path,
        expected_memory: cli.expect_mem_mib,
        sockets: (cli.adopt.iter().cloned())
            .chain((!cli.no_api).then(|| cli.api_socket().to_owned()))
            .collect(),
    };
    let mut controller = Controller::new(options, mailbox, hypervisor)
        .map_err(failure(ExitCode::Failure, "defaults"))?;
    // Before the filter: the first look at the clock asks the kernel where it is.
    time_on(ClockId::Monotonic);
    memory::measure_host();
    controller.metrics_mut().startup_us = startup(&cli);
    // From here on come files and requests that are not ours.
    filters
        .confine(Thread::Vmm)
        .map_err(failure(ExitCode::Failure, "seccomp"))?;
    configure(&cli, &mut controller, &mut events)?;
    if let Some(adopter) = adopter {
        controller.expect_machine(&mut events);
        adopter.say_ready();
        events.add_subscriber(Box::new(adopter));
    } else if api.is_some() {
        controller.expect_load(&mut events);
    }
    let code = attend(&mut controller, &inbox, &mut events)?;
    // Requests that wait for an answer get one.
    drop(inbox);
    controller.finish();
    drop(adopt_socket);
    if let Some(api) = api {
        api.finish();
    }
    // Its descriptors are closed by the end of the process.
    std::mem::forget(events);
    Ok(code)
}

/// Drawn before the filter, which allows no drawing: one machine a process needs it once.
fn entropy() -> io::Result<Entropy> {
    let mut entropy = Entropy {
        seed: [0; 64],
        machine_id: [0; 16],
        generation: Generation([0; 16]),
    };
    getrandom(&mut entropy.seed, GetRandomFlags::empty())?;
    getrandom(&mut entropy.machine_id, GetRandomFlags::empty())?;
    getrandom(&mut entropy.generation.0, GetRandomFlags::empty())?;
    Ok(entropy)
}

/// Where machines are offered to this process, and what removes the socket in the end.
fn offers(
    cli: &Cli,
    inherited: Option<Source>,
) -> Result<(Option<Source>, Option<SocketFile>), Failure> {
    let Some(path) = &cli.adopt else {
        return Ok((inherited, None));
    };
    let (source, file) = Source::bind(path).map_err(failure(ExitCode::Failure, "--adopt"))?;
    Ok((Some(source), Some(file)))
}

/// Where requests may open files after the start.
fn allowed_paths(cli: &Cli) -> Result<Vec<PathBuf>, Failure> {
    for path in &cli.allow_path {
        let named = format!("--allow-path {}", path.display());
        std::fs::metadata(path).map_err(failure(ExitCode::BadArguments, &named))?;
    }
    Ok(cli.allowed_paths())
}

/// Takes what this process was started with, before any other descriptor is opened.
fn take_descriptors(cli: &Cli) -> Result<Option<Source>, Failure> {
    if let Some(number) = cli.kvm_fd {
        kvm::use_descriptor(number).map_err(failure(ExitCode::BadArguments, ""))?;
    }
    for number in &cli.tap_fd {
        Tap::hand_in(*number).map_err(failure(ExitCode::BadArguments, "--tap-fd"))?;
    }
    let source = cli.adopt_fd.map(Source::inherited).transpose();
    let source = source.map_err(failure(ExitCode::BadArguments, "--adopt-fd"))?;
    let process = cli.proc_fd.map(inherited::take).transpose();
    let process = process.map_err(failure(ExitCode::BadArguments, "--proc-fd"))?;
    // Only a machine that requests reach, or that came from another process, is ever asked which of its pages are there.
    if !cli.no_api || source.is_some() || cli.adopt.is_some() {
        present::prepare(process);
    }
    Ok(source)
}

fn log_settings(cli: &Cli) -> Logger {
    Logger {
        log_path: cli.log_path.clone(),
        level: cli.level,
        show_level: cli.show_level.then_some(true),
        show_log_origin: cli.show_log_origin.then_some(true),
        module: cli.module.clone(),
    }
}

/// Microseconds from this process's start, as its parent gave it, until now: wall clock and CPU.
fn startup(cli: &Cli) -> (u64, u64) {
    let since = |clock, start: Option<u64>| {
        let now = || u64::try_from(time_on(clock).as_micros()).unwrap_or(u64::MAX);
        start.map_or(0, |start| now().saturating_sub(start))
    };
    let cpu = since(ClockId::ProcessCPUTime, cli.start_time_cpu_us);
    (
        since(ClockId::Monotonic, cli.start_time_us),
        cpu.saturating_add(cli.parent_cpu_time_us.unwrap_or(0)),
    )
}

/// Applies the command line's settings and the configuration file, and starts what the latter describes.
fn configure(cli: &Cli, controller: &mut Controller, events: &mut Loop) -> Result<(), Failure> {
    let mut apply = |action: Action, code| {
        let applied = controller.execute(action, events);
        applied.map(drop).map_err(failure(code, ""))
    };
    if let Some(path) = &cli.metrics_path {
        let target = MetricsTarget {
            metrics_path: path.clone(),
            emit_id: false,
            properties: None,
        };
        apply(Action::PutMetrics(target), ExitCode::Failure)?;
    }
    if let (Some(state), Some(memory)) = (&cli.template, &cli.template_memory) {
        let kept = controller.keep_template(state, memory);
        return kept.map_err(failure(ExitCode::Failure, "--template"));
    }
    if let Some(path) = &cli.config_file {
        let bad = ExitCode::BadConfiguration;
        let file = path.display().to_string();
        let actions = config_file::load(path).map_err(failure(bad, &file))?;
        for action in actions.into_iter().chain([Action::InstanceStart]) {
            let named = |failure: Failure| Failure {
                message: format!("{file}: {}", failure.message),
                ..failure
            };
            apply(action, bad).map_err(named)?;
        }
    }
    Ok(())
}

/// Handles events until the process is to end.
fn attend(
    controller: &mut Controller,
    inbox: &Inbox,
    events: &mut Loop,
) -> Result<ExitCode, Failure> {
    loop {
        while let Some(message) = inbox.next() {
            if let Next::Exit(code) = controller.handle(message, events) {
                return Ok(code);
            }
        }
        events
            .run()
            .map_err(failure(ExitCode::Failure, "event loop"))?;
    }
}

/// The API as it is served from a thread of its own.
struct Api {
    thread: JoinHandle<()>,
    stop: StopHandle,
    /// Removes the socket's file when dropped.
    _socket: SocketFile,
}

impl Api {
    /// Binds the socket and serves it.
    fn serve(cli: &Cli, mailbox: Mailbox, filters: Arc<Filters>) -> Result<Self, Failure> {
        let path = cli.api_socket();
        let cannot = |why: String| Failure {
            code: ExitCode::Failure,
            message: format!("Failed to open the API socket at: {why}"),
        };
        let (listener, socket) = listener::bind(path).map_err(|error| match error {
            // Word for word what Firecracker's clients know.
            BindError::Exists(path) => cannot(format!(
                "{}. Check that it is not already used.",
                path.display()
            )),
            other => cannot(other.to_string()),
        })?;
        let mut server = Server::from_listener(listener)
            .map_err(|error| cannot(format!("{}: {error}", path.display())))?;
        server.set_max_payload(cli.max_payload());
        let stop = server
            .stop_handle()
            .map_err(failure(ExitCode::Failure, "API"))?;
        let thread = thread::Builder::new()
            .name("api".into())
            .stack_size(512 << 10)
            .spawn(move || {
                let without_files = reach::give_up_files().map_err(io::Error::other);
                let confined = without_files
                    .and_then(|()| filters.confine(Thread::Api).map_err(io::Error::other));
                if let Err(error) = confined {
                    log::error!("the API cannot be confined: {error}");
                    return mailbox.send(Message::End(ExitCode::Failure));
                }
                if let Err(error) = server.serve(|action| mailbox.request(action)) {
                    log::error!("the API cannot be served any more: {error}");
                    mailbox.send(Message::End(ExitCode::Failure));
                }
            })
            .map_err(failure(ExitCode::Failure, "API thread"))?;
        Ok(Api {
            thread,
            stop,
            _socket: socket,
        })
    }

    /// Lets the answers that are on their way out reach their clients, then ends.
    fn finish(self) {
        // Without the event the thread would not end; then the process ends without it.
        if self.stop.stop().is_ok() {
            drop(self.thread.join());
        }
    }
}

/// Turns signals into messages.
struct Ends {
    ends: OrderlyEnds,
    mailbox: Mailbox,
}

impl MutEventSubscriber for Ends {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        while let Some(code) = self.ends.take() {
            self.mailbox.send(Message::End(code));
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let signals = Events::with_data_raw(self.ends.0.as_raw_fd(), 0, EventSet::IN);
        if let Err(error) = ops.add(signals) {
            log::error!("cannot watch for signals: {error}");
        }
    }
}
