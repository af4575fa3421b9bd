//! A guest that is held, and asked something.

use std::io::Write;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::driver::{Rig, data_packet, packet};
use crate::virtio::device::VirtioDevice;
use crate::virtio::vsock::packet::Op;
use crate::virtio::vsock::{Exchange, ExchangeError};

const PORT: u32 = 1026;

/// Holds the guest and asks it. What comes of it comes back.
fn ask(rig: &mut Rig, patience: Duration) -> Receiver<Result<Vec<u8>, ExchangeError>> {
    let (sender, answer) = channel();
    rig.device.hold(true);
    rig.device.ask(Exchange {
        port: PORT,
        patience,
        question: Box::new(|| b"who are you?\n".to_vec()),
        answered: Box::new(move |result| sender.send(result).unwrap()),
    });
    rig.run();
    answer
}

/// The guest takes the connection and the question. The port at our end comes back.
fn asked(rig: &mut Rig) -> u32 {
    let (request, _) = rig.expect(Op::Request);
    assert_eq!(request.dst_port, PORT);
    rig.send(&packet(Op::Response, PORT, request.src_port), b"");
    rig.run();
    assert_eq!(rig.expect(Op::Rw).1, b"who are you?\n");
    request.src_port
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_held_guest_is_asked_and_talks_to_nobody_else() {
    let mut rig = Rig::new();
    let _listener = rig.serve(52);
    let answer = ask(&mut rig, LONG);
    let mut client = rig.client();
    client.write_all(b"CONNECT 9\n").unwrap();
    let port = asked(&mut rig);
    assert!(rig.inbox.is_empty(), "{:?}", rig.inbox);
    // Nor does it reach the host.
    rig.send(&packet(Op::Request, 1000, 52), b"");
    rig.run();
    rig.expect(Op::Rst);
    // The answer comes in pieces.
    for piece in [&b"no"[..], b"body\nand more"] {
        assert!(answer.try_recv().is_err());
        rig.send(&data_packet(PORT, port, piece.len()), piece);
        rig.run();
    }
    assert_eq!(answer.try_recv(), Ok(Ok(b"nobody\n".to_vec())));
    rig.device.hold(false);
    rig.run();
    rig.expect(Op::Rst);
    assert_eq!(rig.expect(Op::Request).0.dst_port, 9);
}

#[test]
fn a_guest_that_does_not_answer_is_told_of() {
    // Nobody listens.
    let mut rig = Rig::new();
    let answer = ask(&mut rig, LONG);
    let (request, _) = rig.expect(Op::Request);
    rig.send(&packet(Op::Rst, PORT, request.src_port), b"");
    assert_eq!(answer.try_recv(), Ok(Err(ExchangeError::Ended(PORT))));
    // Who listens says too much.
    let mut rig = Rig::new();
    let answer = ask(&mut rig, LONG);
    let port = asked(&mut rig);
    rig.send(&data_packet(PORT, port, 300), &[b'a'; 300]);
    assert_eq!(answer.try_recv(), Ok(Err(ExchangeError::Long(PORT))));
    // There is no driver any more.
    let mut rig = Rig::new();
    let answer = ask(&mut rig, LONG);
    asked(&mut rig);
    rig.device.reset();
    assert_eq!(answer.try_recv(), Ok(Err(ExchangeError::Ended(PORT))));
}

#[test]
fn no_answer_is_awaited_for_ever() {
    let patience = Duration::from_millis(50);
    let late = Err(ExchangeError::TimedOut {
        port: PORT,
        patience,
    });
    // With a driver that does nothing; one that has not read the news; none at all.
    for step in 0..3 {
        let mut rig = Rig::new();
        let wait = super::sockets::edges(&rig);
        if step == 1 {
            rig.device.transport_reset().unwrap();
        } else if step == 2 {
            rig.device.reset();
        }
        let answer = ask(&mut rig, patience);
        let result = loop {
            if let Ok(result) = answer.try_recv() {
                break result;
            }
            assert!(wait(10_000) > 0);
            let _ = rig.device.process_source(0).unwrap();
        };
        assert_eq!(result, late, "{step}");
    }
}
