//! Whether a device still works, for a driver that follows all rules.

use guest::arguments;
use guest::memory;
use guest::time::{Deadline, pause, ticks_per_second};
use guest::virtio::block::{Block, Operation, READ_ONLY, differences, write_pattern};
use guest::virtio::mmio::{Mmio, register};
use guest::virtio::net::{Address, HEADER, Net, write_udp};
use guest::virtio::vsock::{HOST, Header, STREAM, Vsock, operation};

/// The pattern's seed on a read-only drive.
const READ_ONLY_SEED: u64 = 7;
const SIZE: u64 = 4096;

/// Drives `device` as it should be driven. Err: what does not work.
pub fn works(device: Mmio, burst: u64) -> Result<(), &'static str> {
    memory::scope(|| {
        let result = match device.read(register::DEVICE_ID) {
            1 => net(device),
            2 => drive(device, burst),
            19 => vsock(device),
            _ => Ok(()),
        };
        // It forgets the memory that is given back now.
        device.reset();
        result
    })
}

fn drive(device: Mmio, burst: u64) -> Result<(), &'static str> {
    let read_only = device.offered() & READ_ONLY != 0;
    let seed = if read_only { READ_ONLY_SEED } else { burst };
    let mut block = Block::on(device, 1, SIZE);
    let places = block.sectors() / (SIZE / 512);
    let sector = burst.wrapping_mul(0x9e37_79b9) % places * (SIZE / 512);
    let data = block.data(0);
    if !read_only {
        write_pattern(data, seed, sector);
        match block.do_one(Operation::Write, sector, SIZE) {
            Some(0) => {}
            Some(_) => return Err("a write fails"),
            None => return Err("a write is not answered"),
        }
    }
    data.fill(0);
    match block.do_one(Operation::Read, sector, SIZE) {
        Some(0) => {}
        Some(_) => return Err("a read fails"),
        None => return Err("a read is not answered"),
    }
    if differences(data, seed, sector) != 0 {
        return Err("a read gives other data than was written");
    }
    if read_only {
        write_pattern(data, 0, sector);
        match block.do_one(Operation::Write, sector, SIZE) {
            Some(0) => return Err("a read-only drive is written to"),
            Some(_) => {}
            None => return Err("a write to a read-only drive is not answered"),
        }
    }
    Ok(())
}

fn net(device: Mmio) -> Result<(), &'static str> {
    let mut net = Net::on(device, 4, 1514);
    let to = Address {
        mac: [0x02, 0, 0, 0, 0, 0x99],
        ip: [172, 30, 1, 1],
        port: 9,
    };
    let Some((place, buffer)) = net.place() else {
        return Err("there is no buffer to send from");
    };
    let frame = buffer.part(0, HEADER + 100);
    write_udp(frame, &net.address, &to);
    net.offer(place, frame.len());
    net.publish();
    wait(|| net.sent().is_some().then_some(())).ok_or("a frame is not sent")
}

fn wait<T>(mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Deadline::after(ticks_per_second().saturating_mul(20));
    while !deadline.is_over() {
        if let Some(result) = done() {
            return Some(result);
        }
        pause();
    }
    None
}

/// The next packet of a connection.
fn answer(vsock: &mut Vsock, port: u32, data: &mut [u8]) -> Option<Header> {
    wait(|| {
        let mut found = None;
        vsock.receive(|_, header, bytes| {
            if header.dst_port == port {
                let len = bytes.len().min(data.len() as u64) as usize;
                bytes.copy_to(0, &mut data[..len]);
                found = Some(header);
            }
        });
        vsock.give_back();
        found
    })
}

/// Connects to a port where nobody listens, and must be refused; then to the one that sends all back, if there is one.
fn vsock(device: Mmio) -> Result<(), &'static str> {
    const PORT: u32 = 77;
    const NOBODY: u32 = 1;
    let mut vsock = Vsock::on(device, 4096);
    let packet = |vsock: &mut Vsock, dst_port: u32, operation: u16, data: &[u8]| {
        let header = Header {
            src_cid: vsock.cid(),
            dst_cid: HOST,
            src_port: PORT,
            dst_port,
            len: data.len() as u32,
            kind: STREAM,
            operation,
            flags: 0,
            buf_alloc: 65536,
            fwd_cnt: 0,
        };
        if let Some((place, room)) = vsock.place() {
            room.copy_from(0, data);
            vsock.offer(place, &header);
            vsock.publish();
        }
    };
    let mut data = [0; 16];
    packet(&mut vsock, NOBODY, operation::REQUEST, &[]);
    match answer(&mut vsock, PORT, &mut data) {
        Some(header) if header.operation == operation::RST => {}
        Some(_) => return Err("a port where nobody listens answers"),
        None => return Err("a connection is neither made nor refused"),
    }
    let echo = arguments::number("port", 0) as u32;
    if echo == 0 {
        return Ok(());
    }
    // After a flood, the host is busy for a while and refuses more.
    let patience = Deadline::after(ticks_per_second().saturating_mul(20));
    loop {
        packet(&mut vsock, echo, operation::REQUEST, &[]);
        match answer(&mut vsock, PORT, &mut data) {
            Some(header) if header.operation == operation::RESPONSE => break,
            Some(header) if header.operation == operation::RST && !patience.is_over() => {}
            _ => return Err("a connection is not made"),
        }
        while vsock.sent().is_some() {}
        let moment = Deadline::after(ticks_per_second() / 100);
        while !moment.is_over() {
            pause();
        }
    }
    packet(&mut vsock, echo, operation::RW, b"still here");
    loop {
        match answer(&mut vsock, PORT, &mut data) {
            Some(header) if header.operation == operation::RW => break,
            Some(header) if header.operation == operation::CREDIT_UPDATE => {}
            _ => return Err("a stream's data does not come back"),
        }
    }
    match &data[..10] == b"still here" {
        true => Ok(()),
        false => Err("a stream's data comes back changed"),
    }
}
