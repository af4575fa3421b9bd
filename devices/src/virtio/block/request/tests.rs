use proptest::prelude::*;

use super::*;
use crate::virtio::testing::TestDriver;

const SECTORS: u64 = 100;
const ALL_FEATURES: u64 =
    1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
const RULES: Rules = Rules {
    sectors: SECTORS,
    read_only: false,
    features: ALL_FEATURES,
};

type Parsed = Result<Result<Request, Refusal>, QueueError>;

/// Parses a chain whose readable part is `out` and whose writable part has `room` bytes, both cut at `cuts`.
fn parse_cut(out: &[u8], room: usize, cuts: &[usize], rules: &Rules) -> Parsed {
    let mut driver = TestDriver::new(&[64]);
    let mut queue = driver.resources(0).queues.remove(0);
    let mut buffers = Vec::new();
    for (start, end) in pieces(out.len(), cuts) {
        buffers.push(driver.readable(&out[start..end]));
    }
    for (start, end) in pieces(room, cuts) {
        buffers.push(driver.writable(end - start));
    }
    driver.queues[0].offer(&buffers);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(chain.readable.len(), out.len() as u64);
    parse(&chain, &driver.memory, rules)
}

fn pieces(len: usize, cuts: &[usize]) -> Vec<(usize, usize)> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (len + 1)).collect();
    cuts.extend([0, len]);
    cuts.sort();
    cuts.windows(2).map(|pair| (pair[0], pair[1])).collect()
}

fn message(request_type: u32, sector: u64, rest: &[u8]) -> Vec<u8> {
    let mut bytes = request_type.to_le_bytes().to_vec();
    bytes.extend([0xff; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes.extend(rest);
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

fn parse_whole(
    request_type: u32,
    sector: u64,
    rest: &[u8],
    room: usize,
) -> Result<Request, Refusal> {
    parse_cut(&message(request_type, sector, rest), room, &[], &RULES).unwrap()
}

#[test]
fn reads_and_writes_lie_inside_the_disk() {
    let read = |sector, room| parse_whole(VIRTIO_BLK_T_IN, sector, &[], room);
    let len = 1024;
    assert_eq!(
        read(98, 1025),
        Ok(Request::Read {
            offset: 98 * 512,
            len
        })
    );
    assert_eq!(
        read(99, 1),
        Ok(Request::Read {
            offset: 99 * 512,
            len: 0
        })
    );
    let sectors = 2;
    assert_eq!(
        read(99, 1025),
        Err(Refusal::OutOfRange {
            sector: 99,
            sectors
        })
    );
    for sector in [u64::MAX, u64::MAX / 512, u64::MAX - 1, 1 << 55] {
        assert_eq!(
            read(sector, 1025),
            Err(Refusal::OutOfRange { sector, sectors })
        );
    }
    assert_eq!(read(0, 1026), Err(Refusal::PartialSector(1025)));

    let write = |sector, bytes: usize| parse_whole(VIRTIO_BLK_T_OUT, sector, &vec![1; bytes], 1);
    assert_eq!(
        write(98, 1024),
        Ok(Request::Write {
            offset: 98 * 512,
            len
        })
    );
    assert_eq!(
        write(99, 1024),
        Err(Refusal::OutOfRange {
            sector: 99,
            sectors
        })
    );
    assert_eq!(write(0, 1000), Err(Refusal::PartialSector(1000)));
}

#[test]
fn no_header_or_no_status_is_malformed() {
    let whole = message(VIRTIO_BLK_T_IN, 0, &[]);
    assert!(parse_cut(&whole[..15], 513, &[], &RULES).is_err());
    assert!(parse_cut(&[], 513, &[], &RULES).is_err());
    assert!(parse_cut(&whole, 0, &[], &RULES).is_err());
    assert!(parse_cut(&whole, 1, &[], &RULES).is_ok());
}

#[test]
fn ranges_to_discard_and_to_zero() {
    let discard = |bytes: &[u8]| parse_whole(VIRTIO_BLK_T_DISCARD, 7, bytes, 1);
    let zeroes = |bytes: &[u8]| parse_whole(VIRTIO_BLK_T_WRITE_ZEROES, 7, bytes, 1);
    let (offset, len) = (512, 1024);
    assert_eq!(
        discard(&range(1, 2, 0)),
        Ok(Request::Discard { offset, len })
    );
    assert_eq!(discard(&range(1, 2, 1)), Err(Refusal::Flags(1)));
    for unmap in [false, true] {
        let expected = Request::WriteZeroes { offset, len, unmap };
        assert_eq!(zeroes(&range(1, 2, unmap.into())), Ok(expected));
    }
    assert_eq!(zeroes(&range(1, 2, 2)), Err(Refusal::Flags(2)));
    for parse in [&discard as &dyn Fn(&[u8]) -> _, &zeroes] {
        assert!(matches!(
            parse(&range(99, 2, 0)),
            Err(Refusal::OutOfRange { .. })
        ));
        assert!(matches!(
            parse(&range(u64::MAX, 1, 0)),
            Err(Refusal::OutOfRange { .. })
        ));
        assert_eq!(
            parse(&range(0, u32::MAX, 0)),
            Err(Refusal::RangeTooLong(u32::MAX))
        );
        assert_eq!(parse(&[]), Err(Refusal::RangeSize(0)));
        assert_eq!(parse(&[0; 15]), Err(Refusal::RangeSize(15)));
        assert_eq!(parse(&[0; 32]), Err(Refusal::RangeSize(32)));
    }
}

#[test]
fn what_was_not_negotiated_is_unsupported() {
    let bare = Rules {
        features: 0,
        ..RULES
    };
    let bytes = range(0, 1, 0);
    for request_type in [
        VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_WRITE_ZEROES,
        VIRTIO_BLK_T_SECURE_ERASE,
        VIRTIO_BLK_T_SCSI_CMD,
        u32::MAX,
    ] {
        let out = message(request_type, 0, &bytes);
        let refusal = parse_cut(&out, 1, &[], &bare).unwrap().unwrap_err();
        assert_eq!(refusal, Refusal::Unsupported(request_type));
        assert_eq!(refusal.status(), status::UNSUPPORTED);
    }
}

#[test]
fn read_only_whatever_was_negotiated() {
    let rules = Rules {
        read_only: true,
        ..RULES
    };
    let refused = [
        message(VIRTIO_BLK_T_OUT, 0, &[1; 512]),
        message(VIRTIO_BLK_T_DISCARD, 0, &range(0, 1, 0)),
        message(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 1, 0)),
    ];
    for out in refused {
        let refusal = parse_cut(&out, 1, &[], &rules).unwrap().unwrap_err();
        assert_eq!(refusal, Refusal::ReadOnly);
        assert_eq!(refusal.status(), status::IO_ERROR);
    }
    let read = message(VIRTIO_BLK_T_IN, 0, &[]);
    assert!(parse_cut(&read, 513, &[], &rules).unwrap().is_ok());
}

#[test]
fn the_serial_number_needs_its_room() {
    let get = |room| parse_whole(VIRTIO_BLK_T_GET_ID, 0, &[], room);
    assert_eq!(get(20), Err(Refusal::NoRoomForId(19)));
    assert_eq!(get(21), Ok(Request::GetId));
    assert_eq!(get(600), Ok(Request::GetId));
}

fn any_type() -> impl Strategy<Value = u32> {
    prop_oneof![
        8 => prop::sample::select(vec![0u32, 1, 4, 8, 11, 13]),
        1 => any::<u32>(),
    ]
}

proptest! {
    /// How a message is cut into buffers means nothing.
    #[test]
    fn framing_means_nothing(
        request_type in any_type(),
        sector in prop_oneof![0..SECTORS + 2, any::<u64>()],
        rest in prop_oneof![
            (0u64..SECTORS, 0u32..40, 0u32..3).prop_map(|(s, n, f)| range(s, n, f)),
            (0usize..4).prop_map(|n| vec![3; n * 512]),
            prop::collection::vec(any::<u8>(), 0..40),
        ],
        room in prop_oneof![Just(1usize), Just(513), Just(21), 0usize..2000],
        cuts in prop::collection::vec(any::<usize>(), 0..10),
    ) {
        let out = message(request_type, sector, &rest);
        let whole = parse_cut(&out, room, &[], &RULES);
        let cut = parse_cut(&out, room, &cuts, &RULES);
        match (whole, cut) {
            (Ok(whole), Ok(cut)) => prop_assert_eq!(whole, cut),
            (whole, cut) => prop_assert!(whole.is_err() && cut.is_err() && room == 0),
        }
    }

    /// Whatever the bytes are, what is parsed lies inside the disk and the chain.
    #[test]
    fn any_bytes_are_understood_or_refused(
        out in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..48),
            (any_type(), 0..SECTORS * 2, prop::collection::vec(any::<u8>(), 0..40))
                .prop_map(|(t, s, rest)| message(t, s, &rest)),
        ],
        room in 0usize..3000,
    ) {
        let out_len = out.len() as u64;
        let (offset, len) = match parse_cut(&out, room, &[], &RULES) {
            Ok(Ok(Request::Read { offset, len })) => {
                prop_assert_eq!(len + 1, room as u64);
                (offset, len)
            }
            Ok(Ok(Request::Write { offset, len })) => {
                prop_assert_eq!(len + HEADER_SIZE, out_len);
                (offset, len)
            }
            Ok(Ok(Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. })) => {
                (offset, len)
            }
            Ok(Ok(Request::Flush | Request::GetId) | Err(_)) => (0, 0),
            Err(_) => {
                prop_assert!(room == 0 || out_len < HEADER_SIZE);
                (0, 0)
            }
        };
        prop_assert!(offset.checked_add(len).unwrap() <= SECTORS * 512);
        prop_assert_eq!(offset % 512 + len % 512, 0);
    }
}
