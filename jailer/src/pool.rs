//! `--pool`: VMMs that are jailed ahead of time, each waiting to become a copy of a machine (its `--adopt-fd`), and a socket
//! over which a VMM that clones its machine takes them.
//!
//! ```text
//!  who clones                              the pool
//!  take 3                 -------------->  waits until it has as many
//!                         <--------------  here, and descriptors: a connection to each; as often as needed
//!  done                   -------------->  they are machines now, whatever becomes of the pool
//!  (or its end)           -------------->  they are nobody's, and end
//! ```
//!
//! One message each, over a socket of type SOCK_SEQPACKET. Each VMM has a keeper ([`crate::keeper`]), which removes its jail
//! unless the VMM has become a machine: also when the pool is killed.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::exit;

use lepton_hostio::packet::{MAX_FILES, PacketListener, PacketSocket};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{WaitOptions, setsid, waitpid};
use rustix::stdio::dup2_stdin;

use crate::cli::{self, Cli};
use crate::clock::Clock;
use crate::error::JailError;
use crate::folder::{Folder, Owner};
use crate::jail;
use crate::keeper::{self, Decision, Fate};
use crate::plan::{ADOPT, Handed, Plan};
use crate::process::{self, HeldSignals, Side, Taken};
use crate::tree::{Program, Spare};

/// VMMs that are ready if nothing is said.
const SIZE: u16 = 4;
/// VMMs that are started at once if nothing is said.
const REFILL: u16 = 2;
/// Most VMMs for one who clones, as in PUT /clone.
const MAX_TAKEN: usize = 1000;
/// Clients at once.
const MAX_CLIENTS: usize = 64;
/// Most bytes of a message.
const MAX_MESSAGE: usize = 64;
/// Starts that fail one after the other until the pool gives up.
const MAX_FAILURES: u32 = 3;
/// What a VMM says when it can become a machine.
const READY: &[u8] = b"ready";
const HERE: &[u8] = b"here";
const DONE: &[u8] = b"done";

/// A VMM that nobody has taken.
struct Waiting {
    link: PacketSocket,
    decision: Decision,
}

/// Somebody who clones.
struct Client {
    socket: PacketSocket,
    /// VMMs it still waits for.
    wanted: usize,
    /// Those it has, of which it has not said that they are machines.
    given: Vec<Decision>,
}

/// See the module.
struct Pool {
    cli: Cli,
    handed: Vec<Handed>,
    /// Where jails are made, and as whom they run.
    base: Folder,
    owner: Owner,
    /// The folder of all jails.
    jails: PathBuf,
    size: usize,
    refill: usize,
    signals: HeldSignals,
    starting: Vec<Waiting>,
    ready: VecDeque<Waiting>,
    clients: Vec<Client>,
    /// The next VMM's copy of the program.
    spare: Option<Spare>,
    /// It was written for the next VMM, or could not be.
    is_ahead: bool,
    /// Number of the last VMM.
    last: u32,
    failures: u32,
}

/// Runs until somebody asks for the end. `handed` goes to each VMM.
pub fn run(cli: Cli, handed: Vec<Handed>) -> Result<u8, JailError> {
    let Some(path) = cli.pool.clone() else {
        return Ok(0);
    };
    // What is wrong with the command line is said once, and now.
    if cli::parse_id(&format!("{}-{}", cli.id, u32::MAX)).is_err() {
        return Err(JailError::PoolId(cli.id));
    }
    let plan = Plan::open(cli.clone(), handed)?;
    let failed = |source| JailError::PoolSocket {
        path: path.clone(),
        source,
    };
    // The path is looked up once. From then on it is a name in a folder that is held open.
    let name = path.file_name().unwrap_or_default();
    let folder = Folder::open(&folder_of(&path)).map_err(|error| failed(error.into()))?;
    let bound = PacketListener::bind(&folder.place(name));
    let (listener, _file) = bound.map_err(|error| failed(error.into()))?;
    let given = folder.give_socket(name, plan.owner);
    given.map_err(|error| failed(error.into()))?;
    // Many cannot read the same.
    let null = File::open("/dev/null").map_err(JailError::Null)?;
    dup2_stdin(null).map_err(|error| JailError::Null(error.into()))?;
    let mut pool = Pool {
        size: cli.pool_size.unwrap_or(SIZE).into(),
        refill: cli.pool_refill.unwrap_or(REFILL).into(),
        jails: plan.base.path().join(plan.program.name()),
        base: plan.base,
        owner: plan.owner,
        cli,
        handed: plan.handed,
        signals: HeldSignals::hold().map_err(JailError::Fork)?,
        starting: Vec::new(),
        ready: VecDeque::new(),
        clients: Vec::new(),
        spare: None,
        is_ahead: false,
        last: 0,
        failures: 0,
    };
    let asked = pool.signals.descriptor().map_err(JailError::Pool)?;
    loop {
        // In this order: who waits for a VMM need not wait for the next one's start.
        pool.give();
        pool.fill()?;
        pool.write_ahead();
        if pool.wait(&listener, &asked)? {
            return Ok(0);
        }
    }
}

/// The folder that a path is in.
fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

impl Pool {
    /// Gives what is ready to those who wait, in the order in which they came.
    fn give(&mut self) {
        for client in &mut self.clients {
            while client.wanted > 0 {
                let count = client.wanted.min(MAX_FILES).min(self.ready.len());
                if count == 0 {
                    return;
                }
                let taken: Vec<Waiting> = self.ready.drain(..count).collect();
                let links: Vec<_> = taken.iter().map(|waiting| waiting.link.as_fd()).collect();
                // Who is gone is noticed by its socket's end.
                if client.socket.send(HERE, &links).is_err() {
                    client.wanted = 0;
                    break;
                }
                client.wanted -= count;
                client
                    .given
                    .extend(taken.into_iter().map(|waiting| waiting.decision));
            }
        }
    }

    /// Starts what is lacking, some at once. While somebody clones, only what that one waits for: the processors are for
    /// the copies first.
    fn fill(&mut self) -> Result<(), JailError> {
        let cloning = self.clients.iter().any(|client| !client.given.is_empty());
        let spare = if cloning { 0 } else { self.size };
        let wanted: usize = self.clients.iter().map(|client| client.wanted).sum();
        let wanted = wanted.saturating_add(spare);
        while self.starting.len() < self.refill && self.ready.len() + self.starting.len() < wanted {
            let waiting = self.start()?;
            self.starting.push(waiting);
        }
        Ok(())
    }

    /// Writes the next VMM's copy of the program, once nothing else is to be done: it takes as long as all the rest of a jail.
    fn write_ahead(&mut self) {
        let is_busy = !(self.starting.is_empty() && self.clients.is_empty());
        if is_busy || self.is_ahead {
            return;
        }
        self.is_ahead = true;
        // What fails here is tried again when it is needed, and told then. The program may be another one by now.
        let program = Program::open(&self.cli.exec_file).ok();
        self.spare = program.and_then(|program| Spare::write(&self.base, program, self.owner).ok());
    }

    /// A number that no jail has, also none of another pool that has ended.
    fn next_id(&mut self) -> String {
        loop {
            self.last = self.last.wrapping_add(1);
            let id = format!("{}-{}", self.cli.id, self.last);
            if !self.jails.join(&id).exists() {
                return id;
            }
        }
    }

    /// A process that becomes a VMM in a jail.
    fn start(&mut self) -> Result<Waiting, JailError> {
        let id = self.next_id();
        let (link, other) = PacketSocket::pair().map_err(JailError::Pool)?;
        let (fate, decision) = keeper::fate().map_err(JailError::Pipe)?;
        let spare = self.spare.take();
        self.is_ahead = false;
        let clock = Clock::start().before_fork();
        match process::fork().map_err(JailError::Fork)? {
            Side::Parent(_) => Ok(Waiting { link, decision }),
            Side::Child => {
                // Else the pipe would not end with the pool.
                drop(decision);
                let result = self.become_vmm(id.clone(), other.into(), fate, spare, clock);
                if let Err(error) = result {
                    eprintln!("lepton-jailer: {id}: {error}");
                }
                exit(1)
            }
        }
    }

    /// In a new process, which has all descriptors of the pool until the VMM starts, and its keeper has closed them.
    fn become_vmm(
        &mut self,
        id: String,
        link: OwnedFd,
        fate: Fate,
        spare: Option<Spare>,
        clock: Clock,
    ) -> Result<u8, JailError> {
        // A terminal that ends the pool does not end copies.
        let _ = setsid();
        self.signals.release().map_err(JailError::Fork)?;
        let mut handed = std::mem::take(&mut self.handed);
        handed.push(Handed {
            option: ADOPT,
            fd: link,
        });
        let cli = Cli {
            id,
            ..self.cli.clone()
        };
        let mut plan = Plan::open(cli, handed)?;
        plan.fate = Some(fate);
        plan.spare = spare;
        jail::start(plan, clock, &mut None)
    }

    /// Waits until something happens, and takes note of it. True: somebody asks for the end.
    fn wait(&mut self, listener: &PacketListener, asked: &OwnedFd) -> Result<bool, JailError> {
        let links = self.starting.iter().chain(&self.ready);
        let links = links.map(|waiting| waiting.link.as_fd());
        let clients = self.clients.iter().map(|client| client.socket.as_fd());
        let mut polled: Vec<PollFd> = [asked.as_fd(), listener.as_fd()]
            .into_iter()
            .chain(links)
            .chain(clients)
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        // While there is room for no more, those who wait outside are not looked at again and again.
        if self.clients.len() >= MAX_CLIENTS
            && let Some(outside) = polled.get_mut(1)
        {
            *outside = PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::empty());
        }
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(JailError::Pool(error.into())),
        }
        let happened: Vec<bool> = polled.iter().map(|p| !p.revents().is_empty()).collect();
        let mut happened = happened.into_iter();
        let mut next = || happened.next().unwrap_or(false);
        let (signal, connection) = (next(), next());
        let starting: Vec<bool> = self.starting.iter().map(|_| next()).collect();
        // Whoever says something now has ended, or is no VMM of ours.
        self.ready.retain(|_| !next());
        let clients: Vec<bool> = self.clients.iter().map(|_| next()).collect();
        self.look_at_starting(&starting)?;
        self.hear(&clients);
        if connection {
            self.accept(listener);
        }
        match signal {
            true => self.take_signal(),
            false => Ok(false),
        }
    }

    fn look_at_starting(&mut self, changed: &[bool]) -> Result<(), JailError> {
        let all = std::mem::take(&mut self.starting);
        for (waiting, changed) in all.into_iter().zip(changed) {
            if !changed {
                self.starting.push(waiting);
                continue;
            }
            match waiting.link.receive(MAX_MESSAGE) {
                Ok(None) => self.starting.push(waiting),
                Ok(Some(packet)) if packet.bytes == READY => {
                    self.failures = 0;
                    self.ready.push_back(waiting);
                }
                // It has said why on the standard error.
                Ok(Some(_)) | Err(_) => self.failures += 1,
            }
        }
        match self.failures {
            MAX_FAILURES.. => Err(JailError::PoolFails(self.failures)),
            _ => Ok(()),
        }
    }

    fn hear(&mut self, changed: &[bool]) {
        let mut changed = changed.iter();
        // Dropped, it has ended, or has said what nobody says: then what it has been given ends.
        self.clients
            .retain_mut(|client| changed.next() != Some(&true) || client.hear());
    }

    fn accept(&mut self, listener: &PacketListener) {
        if let Ok(Some(socket)) = listener.accept() {
            let mut client = Client {
                socket,
                wanted: 0,
                given: Vec::new(),
            };
            // It has mostly said what it wants already.
            if client.hear() {
                self.clients.push(client);
            }
        }
    }

    fn take_signal(&self) -> Result<bool, JailError> {
        match self.signals.take().map_err(JailError::Pool)? {
            Taken::ChildEnded => {
                while let Ok(Some(_)) = waitpid(None, WaitOptions::NOHANG) {}
                Ok(false)
            }
            Taken::Asked(_) | Taken::FromTerminal => Ok(true),
        }
    }
}

impl Client {
    /// Whether it goes on.
    fn hear(&mut self) -> bool {
        match self.socket.receive(MAX_MESSAGE) {
            Ok(None) => true,
            Ok(Some(packet)) if packet.bytes == DONE && self.wanted == 0 => {
                self.given.drain(..).for_each(Decision::keep);
                true
            }
            Ok(Some(packet)) => match taken(&packet.bytes) {
                Some(count) if self.wanted == 0 && self.given.is_empty() => {
                    self.wanted = count;
                    true
                }
                _ => false,
            },
            Err(_) => false,
        }
    }
}

/// How many VMMs a message asks for.
fn taken(message: &[u8]) -> Option<usize> {
    let number = message.strip_prefix(b"take ")?;
    let number = std::str::from_utf8(number).ok()?;
    let count = number.parse().ok()?;
    (1..=MAX_TAKEN).contains(&count).then_some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_number_can_be_taken() {
        assert_eq!(taken(b"take 1"), Some(1));
        assert_eq!(taken(b"take 1000"), Some(1000));
        for bad in [
            &b"take 0"[..],
            b"take 1001",
            b"take -1",
            b"take",
            b"take x",
            b"take \xff",
            b"done",
            b"",
        ] {
            assert_eq!(taken(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_client_takes_once_and_is_done_once_it_has_all() {
        let (client, socket) = PacketSocket::pair().unwrap();
        let mut here = Client {
            socket,
            wanted: 0,
            given: Vec::new(),
        };
        assert!(here.hear());
        client.send(b"take 3", &[]).unwrap();
        assert!(here.hear());
        assert_eq!(here.wanted, 3);
        client.send(b"done", &[]).unwrap();
        assert!(!here.hear());
        client.send(b"take 3", &[]).unwrap();
        assert!(!here.hear());
        here.wanted = 0;
        client.send(b"done", &[]).unwrap();
        assert!(here.hear());
        drop(client);
        assert!(!here.hear());
    }
}
