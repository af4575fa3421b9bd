//! A driver that follows the rules, and what it may expect.

use std::time::{Duration, Instant};

use lepton_devices::virtio::device::Progress;
use lepton_devices::virtio::vsock::HOST_CID;

use super::Rig;
use super::host::{GUEST_CID, Host, Kind};

/// Uses a device that was just reset.
pub fn driver(rig: &mut Rig, kind: Kind) {
    match kind {
        Kind::Block(_) => blk(rig),
        Kind::Net => net(rig),
        Kind::Vsock => vsock(rig),
    }
}

fn kick(rig: &mut Rig, queue: usize) {
    for _ in 0..super::MAX_TURNS {
        let progress = rig.device().process_queue(queue).expect("a good driver");
        if progress == Progress::Done {
            return;
        }
    }
    panic!("the device works for ever");
}

/// How long requests may take on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);

/// Kicks the first queue and takes what it used, once that is so many chains.
fn complete(rig: &mut Rig, count: usize) -> Vec<(u16, u32)> {
    kick(rig, 0);
    let deadline = Instant::now() + PATIENCE;
    let mut used = rig.driver.queues[0].used();
    while used.len() < count {
        assert!(Instant::now() < deadline, "{count} requests do not end");
        // What is under way has an event when it ends, as in the event loop.
        let sources = rig.device().sources().len();
        for source in 0..sources {
            let _ = rig.device().process_source(source).expect("a good driver");
        }
        used.extend(rig.driver.queues[0].used());
        std::thread::yield_now();
    }
    used
}

/// Writes a sector, reads it again, and flushes.
fn blk(rig: &mut Rig) {
    let content: Vec<u8> = (0..512).map(|at| (at * 7) as u8).collect();
    let header = |kind: u8| {
        let mut header = [0; 16];
        header[0] = kind;
        header[8] = 5;
        header
    };
    let write = rig.driver.readable(&header(1));
    let data = rig.driver.readable(&content);
    let written = rig.driver.writable(1);
    rig.driver.queues[0].offer(&[write, data, written]);
    assert_eq!(complete(rig, 1).len(), 1);
    let read = rig.driver.readable(&header(0));
    let into = rig.driver.writable(512);
    let status = rig.driver.writable(1);
    rig.driver.queues[0].offer(&[read, into, status]);
    let flush = rig.driver.readable(&header(4));
    let flushed = rig.driver.writable(1);
    rig.driver.queues[0].offer(&[flush, flushed]);
    assert_eq!(complete(rig, 2).len(), 2);
    let answers = [written, status].map(|answer| rig.driver.bytes(answer));
    assert_eq!(answers, [[0], [0]]);
    assert!(rig.driver.bytes(into) == content, "another sector was read");
    // 2: a driver that has not taken the feature cannot flush.
    assert!(matches!(rig.driver.bytes(flushed)[..], [0 | 2]));
}

/// Sends a frame. Frames for it may have been waiting, so what it receives is not looked at.
fn net(rig: &mut Rig) {
    let mut frame = vec![0; 12];
    frame.extend((0..100).map(|at| at as u8));
    let buffer = rig.driver.readable(&frame);
    rig.driver.queues[1].offer(&[buffer]);
    kick(rig, 1);
    assert_eq!(rig.driver.queues[1].used().len(), 1);
    let Host::Net(wire) = &rig.host else {
        return;
    };
    let wire = wire
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    assert_eq!(wire.from_guest.last(), Some(&frame));
}

/// Asks for a connection to a port where nobody listens, which must be refused.
fn vsock(rig: &mut Rig) {
    let mut header = [0; 44];
    header[0] = GUEST_CID as u8;
    header[8] = HOST_CID as u8;
    header[16..20].copy_from_slice(&77u32.to_le_bytes());
    header[20..24].copy_from_slice(&7777u32.to_le_bytes());
    header[28] = 1;
    header[30] = 1;
    let request = rig.driver.readable(&header);
    let buffers: Vec<_> = (0..12).map(|_| rig.driver.writable(4096)).collect();
    for buffer in &buffers {
        rig.driver.queues[0].offer(&[*buffer]);
    }
    rig.driver.queues[1].offer(&[request]);
    kick(rig, 1);
    kick(rig, 0);
    assert_eq!(rig.driver.queues[1].used().len(), 1);
    // Clients of the host may have been waiting: theirs come, too.
    let used = rig.driver.queues[0].used();
    let answers: Vec<_> = buffers
        .iter()
        .map(|buffer| rig.driver.bytes(*buffer))
        .collect();
    let refusals = answers.iter().take(used.len()).filter(|answer| {
        answer[16..20] == 7777u32.to_le_bytes() && answer[20..24] == 77u32.to_le_bytes()
    });
    let operations: Vec<_> = refusals.map(|answer| answer[30]).collect();
    assert_eq!(operations, [3], "the request was not refused once");
}
