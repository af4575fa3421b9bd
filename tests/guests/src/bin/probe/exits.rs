//! How long it takes to leave the guest and to come back.

use guest::statistics::Times;
use guest::time::ticks;
use guest::virtio::find;
use guest::virtio::mmio::{Mmio, register};
use guest::{arguments, copied, port};

use crate::report::{Bound, Run, refuse};

/// POST codes: nothing is behind it.
const POST: u64 = 0x80;

fn device() -> Mmio {
    match find::devices()[0] {
        Some(device) => device,
        None => refuse("the machine has no device"),
    }
}

pub fn run(mode: &str) {
    let port = arguments::number("port", POST) as u16;
    match mode {
        "port_write" => repeat(mode, || port::write(port, 0)),
        "port_read" => repeat(mode, || {
            port::read(port);
        }),
        _ => {
            let device = device();
            match mode {
                "mmio_write" => repeat(mode, || device.write(register::QUEUE_SEL, 0)),
                "mmio_read" => repeat(mode, || {
                    device.read(register::MAGIC);
                }),
                // The device is not active: what is measured is the way of the kick alone.
                _ => repeat(mode, || device.write(register::QUEUE_NOTIFY, 0)),
            }
        }
    }
}

fn repeat(mode: &str, mut exit: impl FnMut()) {
    copied::wait();
    let mut times = Times::new();
    let bound = Bound::from_arguments(10_000);
    let start = ticks();
    let mut before = start;
    while bound.allows(times.count()) {
        exit();
        let now = ticks();
        times.add(now - before);
        before = now;
    }
    let run = Run {
        mode,
        ticks: before - start,
        bytes: 0,
        errors: 0,
        times: &times,
    };
    run.tell(format_args!(""));
}
