//! Against the host's own taps. What needs them says SKIPPED where they are missing.

use std::process::Command;

use std::os::fd::FromRawFd;

use super::*;

/// Runs `test` in a network namespace of its own, on a thread of its own.
fn in_namespace(name: &str, test: impl FnOnce() + Send) {
    let run = || {
        // SAFETY: unshare takes an integer; with CLONE_NEWNET it concerns this thread alone.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
            let error = io::Error::last_os_error();
            println!("SKIPPED: {name}: no network namespace: {error}");
        } else if let Err(TapError::OpenTun(error)) = Tap::open("probe0") {
            println!("SKIPPED: {name}: cannot open /dev/net/tun: {error}");
        } else {
            test();
        }
    };
    std::thread::scope(|scope| scope.spawn(run).join()).unwrap();
}

fn ip(arguments: &str) {
    // A child of this thread is in its namespace.
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.unwrap();
    let reason = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "ip {arguments}: {reason}");
}

/// All frames that cross the interface `name`, from a packet socket.
fn packets(name: &str) -> OwnedFd {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: socket takes integers; the new descriptor is owned by nobody else.
    let socket = unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let fd = libc::socket(libc::AF_PACKET, kind, protocol.into());
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: sockaddr_ll is plain data; bind reads one of the length given; the name is a C string.
    unsafe {
        let mut address: libc::sockaddr_ll = zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        let bound = libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len);
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    }
    socket
}

const HEADER: [u8; VNET_HEADER_LEN] = [0; VNET_HEADER_LEN];

/// A frame of a protocol that nobody speaks (IEEE 802, local experimental 1).
fn frame(len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|i| i as u8).collect();
    frame[..14].copy_from_slice(&[
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 9, 0x88, 0xb5,
    ]);
    frame
}

fn is_ours(frame: &[u8]) -> bool {
    frame.len() > 14 && frame[12..14] == [0x88, 0xb5]
}

#[test]
fn names_that_no_interface_has_are_refused() {
    for name in [
        "",
        ".",
        "..",
        "a/b",
        "tap%d",
        "a b",
        "a:b",
        "tap\0",
        "a\tb",
        "sixteen-bytes-ab",
    ] {
        let error = Tap::open(name).unwrap_err();
        assert!(matches!(&error, TapError::Name { name: n, .. } if n == name));
        assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
    }
    assert!(check_name("fifteen-bytes-a").is_ok());
}

#[test]
fn errors_tell_what_to_do() {
    let of = |errno| attach_error("tap7", io::Error::from_raw_os_error(errno)).to_string();
    assert_eq!(of(libc::EBUSY), "tap tap7 is in use by another process");
    assert!(of(libc::EPERM).contains("sudo ip tuntap add dev tap7 mode tap user $(id -un)"));
    assert_eq!(
        of(libc::EINVAL),
        "interface tap7 is not a tap with one queue"
    );
    assert!(of(libc::ENOMEM).starts_with("tap tap7: TUNSETIFF: "));
}

#[test]
fn a_tap_is_made_or_found_and_has_one_user() {
    in_namespace("a_tap_is_made_or_found_and_has_one_user", || {
        let made = Tap::open("made0").unwrap();
        assert_eq!(made.name(), "made0");
        assert_eq!(made.supported_offloads(), Offloads::ALL);
        assert!(matches!(Tap::open("made0"), Err(TapError::Busy { .. })));
        drop(made);
        ip("tuntap add dev found0 mode tap");
        drop(Tap::open("found0").unwrap());
        drop(Tap::open("found0").unwrap());
        ip("link show found0");
        ip("tuntap add dev tun0 mode tun");
        for other in ["tun0", "lo"] {
            assert!(matches!(Tap::open(other), Err(TapError::NotATap { .. })));
        }
    });
}

#[test]
fn a_tap_that_was_handed_in_is_found_by_its_name() {
    in_namespace("a_tap_that_was_handed_in_is_found_by_its_name", || {
        let tap = Tap::open("inherited0").unwrap();
        assert!(matches!(
            Tap::open("inherited0"),
            Err(TapError::Busy { .. })
        ));
        Tap::hand_in(tap.as_raw_fd()).unwrap();
        drop(tap);
        // As often as wanted: an interface can be replaced.
        for _ in 0..2 {
            assert_eq!(Tap::open("inherited0").unwrap().name(), "inherited0");
        }
        let no_tap = File::open("/dev/null").unwrap();
        let refused = Tap::hand_in(no_tap.as_raw_fd()).unwrap_err();
        assert!(refused.to_string().contains("not a tap"), "{refused}");
        assert!(Tap::hand_in(i32::MAX).is_err());
    });
}

#[test]
fn a_tap_can_be_handed_over() {
    in_namespace("a_tap_can_be_handed_over", || {
        let tap = Tap::open("handed0").unwrap();
        let fd = tap.as_fd().try_clone_to_owned().unwrap();
        drop(tap);
        let mut tap = Tap::from_fd(fd).unwrap();
        assert_eq!(tap.name(), "handed0");
        ip("link set handed0 up");
        // What the host sends by itself comes first.
        let mut rest = [0; 2000];
        while tap.read_frame(&[], &mut rest).is_ok() {}
        let kind = tap.read_frame(&[], &mut rest).unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::WouldBlock);
    });
    let other = File::open("/dev/null").unwrap();
    let error = Tap::from_fd(other.into()).unwrap_err();
    assert!(matches!(error, TapError::NotATap { .. }));
}

#[test]
fn a_packet_socket_sees_what_was_written() {
    in_namespace("a_packet_socket_sees_what_was_written", || {
        let mut tap = Tap::open("seen0").unwrap();
        let mut sent = frame(500);
        let error = {
            let (a, b) = sent.split_at_mut(100);
            tap.write_frame(&HEADER, &[a.into(), b.into()]).unwrap_err()
        };
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "it is down");
        ip("link set seen0 up");
        let socket = packets("seen0");
        {
            let (a, b) = sent.split_at_mut(100);
            tap.write_frame(&HEADER, &[a.into(), b.into()]).unwrap();
        }
        let mut file = File::from(socket);
        let mut bytes = [0; 2000];
        let seen = loop {
            let len = io::Read::read(&mut file, &mut bytes).unwrap();
            if is_ours(&bytes[..len]) {
                break bytes[..len].to_vec();
            }
        };
        assert_eq!(seen, sent);
        let too_many: Vec<VolatileSlice<'_>> = Vec::from_iter(
            bytes
                .chunks_mut(1)
                .map(VolatileSlice::from)
                .take(MAX_SLICES + 1),
        );
        let kind = tap.write_frame(&HEADER, &too_many).unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::InvalidInput);
    });
}

#[test]
fn what_does_not_fit_is_found_in_the_rest() {
    in_namespace("what_does_not_fit_is_found_in_the_rest", || {
        let mut tap = Tap::open("rest0").unwrap();
        ip("link set rest0 up");
        let sent = frame(500);
        let mut socket = File::from(packets("rest0"));
        for (split, room) in [(12, 2000), (100, 2000), (512, 2000), (1000, 0)] {
            io::Write::write_all(&mut socket, &sent).unwrap();
            let mut guest = vec![0; split];
            let mut rest = vec![0; room];
            loop {
                let (a, b) = guest.split_at_mut(split / 2);
                // The host's frame is there before the write returns.
                let len = tap.read_frame(&[a.into(), b.into()], &mut rest).unwrap();
                let all = [&guest[..len.min(split)], &rest[..len.saturating_sub(split)]].concat();
                if is_ours(&all[VNET_HEADER_LEN..]) {
                    assert_eq!(all[VNET_HEADER_LEN..], sent);
                    break;
                }
            }
        }
    });
}

#[test]
fn more_slices_than_one_read_takes_are_not_used() {
    in_namespace("more_slices_than_one_read_takes_are_not_used", || {
        let mut tap = Tap::open("many0").unwrap();
        ip("link set many0 up");
        let sent = frame(1400);
        let mut socket = File::from(packets("many0"));
        io::Write::write_all(&mut socket, &sent).unwrap();
        let mut guest = vec![0; MAX_SLICES + 100];
        let mut rest = vec![0; 2000];
        loop {
            let slices: Vec<_> = guest.chunks_mut(1).map(VolatileSlice::from).collect();
            let len = tap.read_frame(&slices, &mut rest).unwrap();
            if is_ours(&guest[VNET_HEADER_LEN..]) {
                assert_eq!(len, VNET_HEADER_LEN + sent.len());
                let all = [&guest[..MAX_SLICES], &rest[..len - MAX_SLICES]].concat();
                assert_eq!(all[VNET_HEADER_LEN..], sent);
                assert!(guest[MAX_SLICES..].iter().all(|byte| *byte == 0));
                break;
            }
        }
    });
}
