//! A TCP connection of a Linux guest, through a tap, that goes on while the guest is cloned.

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use lepton_agent::client::{ExitStatus, Output};
use lepton_tests::heir::{Heir, clone};
use lepton_tests::linux::{self, Linux};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::tap::Tap;
use lepton_tests::{PATIENCE, test};
use serde_json::json;

fn main() -> ExitCode {
    suite::run(
        Order::OneByOne,
        &linux::NEEDS,
        [test!(a_transfer_survives_clones)
            .needs(Need::Root)
            .needs(Need::Program("ip"))],
    )
}

/// The host's end of a connection on which both sides count, each on and on.
#[derive(Default)]
struct Counting {
    state: Mutex<Counted>,
    changed: Condvar,
}

#[derive(Default)]
struct Counted {
    /// Numbers that the guest has sent, all of them right.
    heard: u64,
    /// The host is to say no more.
    enough: bool,
}

/// How far the host may count ahead of the guest: what is on its way when it ends has to arrive.
const AHEAD: u64 = 2000;

impl Counting {
    fn change(&self, change: impl FnOnce(&mut Counted)) {
        change(&mut self.state.lock().expect("nobody has failed"));
        self.changed.notify_all();
    }

    /// Waits until `done`, for as long as anything may take.
    #[track_caller]
    fn wait(&self, done: impl Fn(&Counted) -> bool) -> MutexGuard<'_, Counted> {
        let state = self.state.lock().expect("nobody has failed");
        let waited = (self.changed).wait_timeout_while(state, PATIENCE, |state| !done(state));
        let (state, result) = waited.expect("nobody has failed");
        let heard = state.heard;
        assert!(!result.timed_out(), "the transfer stands still at {heard}");
        state
    }

    /// Checks what the guest counts until it leaves, and returns how far it came.
    fn listen(&self, stream: TcpStream) -> u64 {
        let mut stream = BufReader::new(stream);
        for number in 1.. {
            let mut line = String::new();
            // At the end the guest may leave in the midst of a line.
            if stream.read_line(&mut line).is_err() || !line.ends_with('\n') {
                break;
            }
            assert_eq!(line.trim_end(), number.to_string());
            self.change(|state| state.heard = number);
        }
        self.wait(|_| true).heard
    }

    /// Counts until it is enough, and returns how far.
    fn speak(&self, mut stream: TcpStream) -> u64 {
        let mut said = 0;
        while !self
            .wait(|state| state.enough || said < state.heard + AHEAD)
            .enough
        {
            let text: String = (said + 1..=said + 100).map(|n| format!("{n}\n")).collect();
            stream
                .write_all(text.as_bytes())
                .expect("the guest listens");
            said += 100;
        }
        stream.shutdown(Shutdown::Write).expect("a connection");
        said
    }

    #[track_caller]
    fn wait_for_more(&self) {
        let before = self.wait(|_| true).heard;
        drop(self.wait(|state| state.heard > before + AHEAD));
    }
}

fn a_transfer_survives_clones() {
    const HOST: &str = "172.30.86.1";
    let taps = [Tap::new(Some(&format!("{HOST}/24"))), Tap::new(None)];
    let mut guest = Linux::boot(
        "quiet ip=172.30.86.2::172.30.86.1:255.255.255.0::eth0:off",
        |_, config| {
            config["machine-config"]["clonable"] = true.into();
            config["network-interfaces"] =
                json!([{ "iface_id": "eth0", "host_dev_name": taps[0].name() }]);
        },
    );
    let listener = TcpListener::bind((HOST, 0)).expect("the tap has that address");
    let port = listener.local_addr().expect("an address").port();
    // The guest checks what it hears, as the host does.
    let talk = guest.start(&format!(
        "seq 1 1000000000 | nc {HOST} {port} | awk '$1 != NR {{ print \"wrong:\", $0; exit 1 }} END {{ print NR }}'"
    ));
    let (stream, _) = listener.accept().expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
    let counting = Arc::new(Counting::default());
    let spawn = |run: fn(&Counting, TcpStream) -> u64| {
        let (counting, stream) = (counting.clone(), stream.try_clone().expect("a socket"));
        thread::spawn(move || run(&counting, stream))
    };
    let listener = spawn(Counting::listen);
    let speaker = spawn(Counting::speak);
    drop(stream);
    counting.wait_for_more();
    for number in 0..3 {
        let heir = Heir::new();
        let mut child = heir.child();
        child["network_overrides"] =
            json!([{ "iface_id": "eth0", "host_dev_name": taps[1].name() }]);
        // Another address: the same one twice on a host would be no fair play.
        child["identity"] = json!({
            "timeout_ms": 50_000,
            "interfaces": [{ "iface_id": "eth0", "address": "172.30.87.2/24" }],
        });
        clone(&mut guest.api, &[child]);
        counting.wait_for_more();
        let copy = heir.linux();
        assert_eq!(copy.sh(&format!("echo {number}")), number.to_string());
        copy.shut_down();
        counting.wait_for_more();
    }
    counting.change(|state| state.enough = true);
    let said = speaker.join().expect("the guest hears all");
    let mut heard = Vec::new();
    loop {
        let more = talk.read(Output::Stdout).expect("the agent listens");
        if more.is_empty() {
            break;
        }
        heard.extend(more);
    }
    assert_eq!(String::from_utf8_lossy(&heard).trim(), said.to_string());
    assert_eq!(
        talk.wait().expect("the agent listens"),
        ExitStatus::Exited(0)
    );
    assert!(listener.join().expect("the guest counts") > 7 * AHEAD);
    guest.shut_down();
}
