//! Both directions of the agent's protocol. Nothing is started: what a request asks for is only parsed.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use arbitrary::{Arbitrary, Unstructured};
use lepton_agent::client::{Client, Exec, Output};
use lepton_agent::protocol as proto;
use lepton_agent::ready::Ready;
use lepton_agent::service::request::Exec as ParsedExec;
use lepton_agent::service::user::resolve;
use lepton_identity::{Answer, Identity, MAX_ANSWER};
use protobuf::Message;

/// ttrpc: the length of what follows, the stream, the type, flags.
const FRAME_HEADER: usize = 10;
const RESPONSE: u8 = 2;

/// The first byte chooses what it is, the rest is the message.
pub fn service(data: &[u8]) {
    let Some((&choice, rest)) = data.split_first() else {
        return;
    };
    match choice % 10 {
        0 => {
            if let Ok(request) = proto::ExecRequest::parse_from_bytes(rest)
                && let Ok(exec) = ParsedExec::parse(request)
            {
                assert!(!exec.program.is_empty());
                drop(exec.command());
            }
        }
        1 => again::<proto::WriteStdinRequest>(rest),
        2 => again::<proto::ReadRequest>(rest),
        3 => again::<proto::ResizeRequest>(rest),
        4 => again::<proto::SignalRequest>(rest),
        5 => again::<proto::WaitRequest>(rest),
        6 => again::<proto::ExecResponse>(rest),
        7 => again::<proto::WaitResponse>(rest),
        8 => {
            // The line by which an agent tells that it is up: what is taken is what is told.
            if let Ok(ready) = Ready::read_from(rest) {
                let line = format!("{ready}\n");
                assert_eq!(
                    Ready::read_from(line.as_bytes()).expect("our own line"),
                    ready
                );
            }
        }
        _ => {
            let text = String::from_utf8_lossy(rest);
            let mut parts = text.splitn(3, '\0').map(str::to_owned);
            let mut part = || parts.next().unwrap_or_default();
            drop(resolve(&part(), &part(), &part()));
        }
    }
}

/// What was understood can be said again, and is understood as the same.
fn again<M: Message>(bytes: &[u8]) {
    if let Ok(message) = M::parse_from_bytes(bytes) {
        let written = message.write_to_bytes().expect("a message");
        assert!(M::parse_from_bytes(&written).expect("our own message") == message);
    }
}

/// What an agent sends, whatever it was asked.
#[derive(Arbitrary, Debug)]
enum Piece<'a> {
    /// An answer on the stream of the n-th call.
    Answer(u8, &'a [u8]),
    /// Any frame.
    Frame(u32, u8, u8, &'a [u8]),
    /// Bytes.
    Bytes(&'a [u8]),
}

/// A guest's agent answers a host's client.
pub fn client(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut answers = Vec::new();
    while let Ok(piece) = Piece::arbitrary(&mut input) {
        if input.is_empty() {
            break;
        }
        match piece {
            Piece::Answer(call, body) => {
                // Calls of a client have odd numbers (ttrpc's protocol).
                frame(&mut answers, u32::from(call % 4) * 2 + 1, RESPONSE, 0, body);
            }
            Piece::Frame(stream, kind, flags, body) => {
                frame(&mut answers, stream, kind, flags, body);
            }
            Piece::Bytes(bytes) => answers.extend(bytes),
        }
    }
    let (host, mut guest) = UnixStream::pair().expect("a pair of sockets");
    let peer = std::thread::spawn(move || {
        // A call first: an answer to none is dropped.
        let mut request = [0; FRAME_HEADER];
        if guest.read_exact(&mut request).is_err() {
            return;
        }
        // The client may have hung up.
        let _ = guest.write_all(&answers);
    });
    let Ok(client) = Client::from_stream(host) else {
        return;
    };
    if let Ok(info) = client.info() {
        let texts = [info.agent_version, info.kernel_release, info.hostname];
        assert!(texts.iter().all(|text| !text.contains(char::is_control)));
    }
    let exec = Exec {
        argv: vec!["true".into()],
        ..Exec::default()
    };
    if let Ok(process) = client.exec(&exec) {
        let _ = process.wait();
        let _ = process.read(Output::Stdout);
    }
    drop(client);
    peer.join().expect("the peer");
}

/// Who a copy is told to be, and what its guest answers. What is taken is what is told, and shows on one line of a log.
pub fn identity(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(identity) = text.parse::<Identity>() {
        let told = identity.to_string();
        assert!(Identity::is_whole(told.as_bytes()));
        assert_eq!(told.parse(), Ok(identity));
    }
    match text.parse::<Answer>() {
        Ok(answer) => {
            let told = answer.to_string();
            assert!(told.len() <= MAX_ANSWER);
            assert_eq!(told.matches(char::is_control).count(), 1, "{told:?}");
            assert_eq!(told.parse(), Ok(answer));
        }
        Err(error) => assert!(!error.to_string().contains(char::is_control)),
    }
}

fn frame(to: &mut Vec<u8>, stream: u32, kind: u8, flags: u8, body: &[u8]) {
    to.extend((body.len() as u32).to_be_bytes());
    to.extend(stream.to_be_bytes());
    to.extend([kind, flags]);
    to.extend(body);
}
