//! The pure parts: headers and credit.

use proptest::prelude::*;

use crate::virtio::testing::TestDriver;
use crate::virtio::vsock::credit::*;
use crate::virtio::vsock::packet::*;

proptest! {
    #[test]
    fn a_header_survives(bytes: [u8; 32], rest: [u8; 12]) {
        let mut all = [0; 44];
        all[..32].copy_from_slice(&bytes);
        all[32..].copy_from_slice(&rest);
        let header = Header::parse(&all);
        if header.op.is_none() {
            // An operation that does not exist is not remembered.
            all[30..32].fill(0);
        }
        prop_assert_eq!(header.to_bytes(), all);
    }

    #[test]
    fn a_packet_is_found_however_it_is_split(
        cuts in proptest::collection::btree_set(1usize..144, 0..12),
        data in proptest::collection::vec(any::<u8>(), 100),
        surplus in 0usize..=100,
    ) {
        let mut driver = TestDriver::new(&[16]);
        let header = Header { len: (100 - surplus) as u32, ..super::driver::packet(Op::Rw, 1, 2) };
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend(&data);
        let mut buffers = Vec::new();
        let mut from = 0;
        for cut in cuts.into_iter().chain([144]) {
            buffers.push(driver.readable(&bytes[from..cut]));
            from = cut;
        }
        driver.queues[0].offer(&buffers);
        let chain = driver.resources(0).queues[0].pop().unwrap().unwrap();
        let packet = TxPacket::parse(&driver.memory, &chain).unwrap();
        prop_assert_eq!(packet.header, header);
        let mut found = Vec::new();
        for slice in packet.data(&driver.memory).unwrap() {
            let mut part = vec![0; slice.len()];
            slice.copy_to(&mut part);
            found.extend(part);
        }
        prop_assert_eq!(&found, &data[..100 - surplus]);
    }

    /// Against counters that do not wrap.
    #[test]
    fn credit_to_the_guest(steps in proptest::collection::vec((any::<u32>(), any::<u32>(), any::<u32>()), 1..60)) {
        let mut credit = SendCredit::default();
        let (mut sent, mut forwarded) = (0u64, 0u64);
        for (a, b, c) in steps {
            let to = forwarded + u64::from(a) % (sent - forwarded + 1);
            credit.update(b, to as u32).unwrap();
            forwarded = to;
            let available = u64::from(b).min(1 << 30).saturating_sub(sent - forwarded);
            prop_assert_eq!(u64::from(credit.available()), available);
            let len = u64::from(c) % (available + 1);
            credit.sent(len as u32);
            sent += len;
            // One byte more than was sent is a lie.
            let ahead = CreditError::Unsent { ahead: 1 };
            prop_assert_eq!(credit.update(b, (sent as u32).wrapping_add(1)), Err(ahead));
        }
    }

    #[test]
    fn credit_from_the_guest(steps in proptest::collection::vec((0u32..=1 << 20, 0u32..=1 << 20, any::<bool>(), 0u32..4), 1..60)) {
        const SIZE: u64 = 1 << 20;
        let mut credit = ReceiveCredit::new(SIZE as u32);
        let (mut received, mut forwarded, mut told) = (0u64, 0u64, 0u64);
        for (a, b, tell, window) in steps {
            let window = SIZE >> (2 * window);
            credit.set_window(window as u32);
            let room = SIZE - (received - forwarded);
            prop_assert_eq!(credit.receive(a).is_ok(), u64::from(a) <= room);
            if u64::from(a) <= room {
                received += u64::from(a);
            }
            let out = u64::from(b) % (received - forwarded + 1);
            credit.forward(out as u32);
            forwarded += out;
            prop_assert_eq!(u64::from(credit.held()), received - forwarded);
            let free = SIZE.saturating_sub(received - told);
            let tellable = forwarded.saturating_sub(SIZE - window).max(told);
            let is_due = free < window / 2 && tellable - told >= window / 4;
            prop_assert_eq!(credit.update_due(), is_due);
            // A guest without credit hears of some once all it has sent is gone.
            prop_assert!(is_due || forwarded < received || free > 0);
            if tell || credit.update_due() {
                prop_assert_eq!(credit.tell(), (SIZE as u32, tellable as u32));
                told = tellable;
                // More than the window only if it was told before.
                let now_free = SIZE.saturating_sub(received - told);
                prop_assert!(now_free <= free.max(window - window.min(credit.held().into())));
            }
        }
    }
}

#[test]
fn an_older_state_does_not_undo_a_newer() {
    let mut credit = SendCredit::default();
    credit.update(1000, 0).unwrap();
    credit.sent(1000);
    credit.update(1000, 700).unwrap();
    credit.update(50, 300).unwrap();
    assert_eq!(credit.available(), 700);
}

#[test]
fn both_counters_wrap() {
    let mut send = SendCredit::default();
    let mut receive = ReceiveCredit::new(1 << 30);
    for step in 1..=9u32 {
        send.update(1 << 30, (step - 1) << 30).unwrap();
        assert_eq!(send.available(), 1 << 30);
        send.sent(1 << 30);
        assert_eq!(send.available(), 0);
        receive.receive(1 << 30).unwrap();
        assert!(receive.receive(1).is_err());
        receive.forward(1 << 30);
        assert_eq!(receive.tell(), (1 << 30, step << 30));
    }
}

#[test]
fn short_and_lying_packets() {
    let mut driver = TestDriver::new(&[16]);
    let short = driver.readable(&[0; 43]);
    driver.queues[0].offer(&[short]);
    let header = Header {
        len: 11,
        ..super::driver::packet(Op::Rw, 1, 2)
    };
    let (head, data) = (
        driver.readable(&header.to_bytes()),
        driver.readable(&[0; 10]),
    );
    driver.queues[0].offer(&[head, data]);
    let huge = Header {
        len: u32::MAX,
        ..header
    };
    let head = driver.readable(&huge.to_bytes());
    driver.queues[0].offer(&[head, data]);
    let room = driver.writable(100);
    driver.queues[0].offer(&[room]);

    let mut queue = driver.resources(0).queues.remove(0);
    let mut parse = || {
        let chain = queue.pop().unwrap().unwrap();
        TxPacket::parse(&driver.memory, &chain).map(|p| p.header)
    };
    assert!(matches!(parse(), Err(PacketError::NoHeader(43))));
    assert!(matches!(parse(), Err(PacketError::Length { header: h, room: 10 }) if h == header));
    assert!(matches!(parse(), Err(PacketError::Length { header: h, room: 10 }) if h == huge));
    // Writable bytes are not a packet.
    assert!(matches!(parse(), Err(PacketError::NoHeader(0))));
}

#[test]
fn room_for_the_guest() {
    let mut driver = TestDriver::new(&[16]);
    for len in [44, 45, 30, 44 + 4096] {
        let buffer = driver.writable(len);
        driver.queues[0].offer(&[buffer]);
    }
    let mut queue = driver.resources(0).queues.remove(0);
    let rooms: Vec<_> = (0..4)
        .map(|_| rx_room(&queue.pop().unwrap().unwrap()))
        .collect();
    assert_eq!(rooms, [None, Some(1), None, Some(4096)]);
}
