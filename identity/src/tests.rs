use std::net::Ipv4Addr;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn identity() -> Identity {
    Identity {
        seed: Hex([7; 64]),
        time: 1_795_333_766_123_456_789,
        machine_id: Hex([0xa5; 16]),
        hostname: Some("web-7".parse().unwrap()),
        interfaces: vec![Interface {
            was: "06:00:ac:1e:4d:02".parse().unwrap(),
            mac: Some("06:00:ac:1e:4d:07".parse().unwrap()),
            address: Some("10.0.0.7/24".parse().unwrap()),
            gateway: Some(Ipv4Addr::new(10, 0, 0, 1).into()),
        }],
    }
}

#[test]
fn lines_that_are_missing_twice_or_unknown_are_refused() {
    let text = identity().to_string();
    assert!(Identity::is_whole(text.as_bytes()));
    for line in text.lines() {
        let without = text.replacen(&format!("{line}\n"), "", 1);
        let is_optional = line.starts_with("hostname") || line.starts_with("interface");
        let parsed = without.parse::<Identity>();
        assert_eq!(parsed.is_ok(), is_optional, "{line}: {parsed:?}");
        let twice = text.replacen(&format!("{line}\n"), &format!("{line}\n{line}\n"), 1);
        let parsed = twice.parse::<Identity>();
        assert_eq!(
            parsed.is_ok(),
            line.starts_with("interface"),
            "{line}: {parsed:?}"
        );
    }
    let more = text.replace("end\n", "colour blue\nend\n");
    assert!(more.parse::<Identity>().is_err());
    let other = text.replace("lepton-identity 1", "lepton-identity 2");
    assert!(other.parse::<Identity>().is_err());
}

#[test]
fn words_that_are_not_what_they_should_be_are_refused() {
    for bad in [
        "10.0.0.7",
        "10.0.0.7/33",
        "0.0.0.0/8",
        "224.0.0.1/4",
        "::1/129",
        "x/8",
    ] {
        assert!(bad.parse::<Network>().is_err(), "{bad}");
    }
    for bad in ["", "a b", "a\nb", "a/b", &"a".repeat(65)] {
        assert!(bad.parse::<Hostname>().is_err(), "{bad}");
    }
    for bad in [
        "06:00:ac:1e:4d",
        "06:00:ac:1e:4d:+2",
        "06:00:ac:1e:4d:02:03",
    ] {
        assert!(bad.parse::<Mac>().is_err(), "{bad}");
    }
    let far = "06:00:ac:1e:4d:02 address=10.0.0.7/24 gateway=fe80::1";
    assert!(far.parse::<Interface>().is_err());
    assert!(
        "06:00:ac:1e:4d:02 gateway=10.0.0.1"
            .parse::<Interface>()
            .is_err()
    );
}

#[test]
fn the_longest_answer_fits() {
    let answer = Answer::Failed("\u{10ffff}\n".repeat(1000));
    let text = answer.to_string();
    assert!(text.len() <= MAX_ANSWER);
    assert!(matches!(text.parse(), Ok(Answer::Failed(_))));
    assert_eq!(Answer::Done.to_string().parse(), Ok(Answer::Done));
}

fn interface() -> impl Strategy<Value = Interface> {
    let address = (any::<Ipv4Addr>(), 0u8..=32)
        .prop_filter_map("a host", |(a, p)| format!("{a}/{p}").parse().ok());
    (
        any::<[u8; 6]>(),
        any::<Option<[u8; 6]>>(),
        proptest::option::of((address, any::<Option<Ipv4Addr>>())),
    )
        .prop_map(|(was, mac, address)| Interface {
            was: Mac(was),
            mac: mac.map(Mac),
            address: address.map(|(address, _)| address),
            gateway: address.and_then(|(_, gateway)| gateway.map(IpAddr::from)),
        })
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        seed in vec(any::<u8>(), 64), time: u64, machine_id: [u8; 16],
        hostname in proptest::option::of("[a-z0-9.-]{1,64}"), interfaces in vec(interface(), 0..8),
    ) {
        let identity = Identity {
            seed: Hex(seed.try_into().unwrap()),
            time,
            machine_id: Hex(machine_id),
            hostname: hostname.map(|name| name.parse().unwrap()),
            interfaces,
        };
        let text = identity.to_string();
        prop_assert!(text.len() <= MAX_MESSAGE && Identity::is_whole(text.as_bytes()));
        prop_assert_eq!(text.parse(), Ok(identity));
        // Half of it is nothing.
        prop_assert!(text[..text.len() / 2].parse::<Identity>().is_err());
    }

    #[test]
    fn any_text_is_read_or_refused(text in "(lepton-identity 1\n)?([a-z-]{0,12}( [ -~]{0,40})?\n){0,6}(end\n)?") {
        let _ = text.parse::<Identity>();
        let _ = text.parse::<Answer>();
    }

    #[test]
    fn answers_are_printable(text in "\\PC{0,300}|.{0,300}\n|failed .{0,300}\n") {
        if let Ok(Answer::Failed(reason)) = text.parse() {
            prop_assert!(!reason.chars().any(char::is_control));
        }
    }
}
