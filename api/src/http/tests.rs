use proptest::prelude::*;

use super::parse::ParseError;
use super::*;

const LIMIT: usize = 1000;

fn parse(text: &str) -> Result<Option<(Request<'_>, usize)>, ParseError> {
    parse_request(text.as_bytes(), LIMIT)
}

fn request(text: &str) -> Request<'_> {
    let (request, length) = parse(text).unwrap().unwrap();
    assert_eq!(length, text.len());
    request
}

fn error(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn a_request_and_what_follows() {
    let text = "PUT /vsock HTTP/1.1\r\ncontent-LENGTH: 3\r\n\r\nabcGET / HTTP/1.1\r\n\r\n";
    let (first, length) = parse(text).unwrap().unwrap();
    assert_eq!(
        first,
        Request {
            method: "PUT",
            target: "/vsock",
            body: b"abc",
            keep_alive: true,
        }
    );
    assert_eq!(request(&text[length..]).target, "/");
    for end in 0..length {
        assert_eq!(parse(&text[..end]), Ok(None), "{end}");
    }
}

#[test]
fn connections_stay_open_as_the_version_and_the_header_say() {
    for (version, header, expected) in [
        ("1.1", "", true),
        ("1.0", "", false),
        ("1.1", "Connection: close\r\n", false),
        ("1.1", "Connection: Keep-Alive, CLOSE\r\n", false),
        ("1.0", "Connection: keep-alive\r\n", true),
        ("1.1", "Connection: upgrade\r\n", true),
    ] {
        let text = format!("GET / HTTP/{version}\r\n{header}\r\n");
        assert_eq!(request(&text).keep_alive, expected, "{text}");
    }
}

#[test]
fn errors_name_the_header() {
    let with = |header: &str| error(&format!("PUT / HTTP/1.1\r\n{header}\r\n\r\n"));
    for bad in ["x", "-1", "+1", "", "1 2", "18446744073709551616", "0x10"] {
        assert_eq!(
            with(&format!("Content-Length: {bad}")),
            format!("Invalid Content-Length: {bad:?}.")
        );
    }
    assert_eq!(
        with("Content-Length: 1\r\nContent-Length: 1"),
        "More than one Content-Length."
    );
    assert!(with("Transfer-Encoding: chunked").contains("\"chunked\""));
    assert_eq!(
        with("Content-Length: 1001"),
        "Request payload with size 1001 is larger than the limit of 1000 allowed by server."
    );
    assert!(with(&format!("Content-Length: {}", u64::MAX)).contains("18446744073709551615"));
    for bad in [
        "GET / HTTP/2.0\r\n\r\n",
        "GET /\r\n\r\n",
        "\0",
        "G\u{e9}T / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nno colon\r\n\r\n",
    ] {
        assert!(error(bad).starts_with("Invalid HTTP request: "), "{bad:?}");
    }
    assert!(
        request("PUT / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n")
            .body
            .is_empty()
    );
}

#[test]
fn heads_are_bounded() {
    let long = |length: usize| format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(length));
    let frame = long(0).len();
    assert!(parse(&long(MAX_HEAD - frame)).unwrap().is_some());
    for length in [MAX_HEAD - frame + 1, 2 * MAX_HEAD] {
        assert_eq!(parse(&long(length)), Err(ParseError::HeadTooLarge));
    }
    let many = |count: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "A: a\r\n".repeat(count));
    assert!(parse(&many(MAX_HEADERS)).unwrap().is_some());
    assert!(
        error(&many(MAX_HEADERS + 1)).contains("too many headers"),
        "{}",
        error(&many(MAX_HEADERS + 1))
    );
}

/// Feeds a server's end of a connection in these pieces. Returns what it asked for and what it answered.
fn feed(pieces: &[&[u8]]) -> (Vec<crate::Action>, Vec<u8>) {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use vmm_sys_util::epoll::EventSet;

    let (mut client, server) = UnixStream::pair().unwrap();
    server.set_nonblocking(true).unwrap();
    client.set_nonblocking(true).unwrap();
    let mut connection = connection::Connection::new(server);
    let (mut actions, mut answer) = (Vec::new(), Vec::new());
    let mut scratch = [0; 512];
    let mut handler = |action| {
        actions.push(action);
        Ok(crate::Reply::NoContent)
    };
    'pieces: for piece in pieces {
        let mut left = *piece;
        while !left.is_empty() {
            // Once refused, the server may have shut its end.
            left = match client.write(&left[..left.len().min(scratch.len())]) {
                Ok(length) => &left[length..],
                Err(_) => break 'pieces,
            };
            let verdict = connection.turn(EventSet::IN, &mut scratch, LIMIT, &mut handler);
            let _ = client.read_to_end(&mut answer);
            if verdict == connection::Verdict::Drop {
                break 'pieces;
            }
        }
    }
    (actions, answer)
}

fn requests() -> impl Strategy<Value = Vec<u8>> {
    let one = prop_oneof![
        Just("GET /version HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()),
        Just("GET /nothing HTTP/1.1\r\n\r\n".to_owned()),
        Just("\r\nGET / HTTP/1.1\nA: b\n\n".to_owned()),
        Just("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".to_owned()),
        Just("GET / HTTP/1.1\r\nConnection: close\r\n\r\n".to_owned()),
        Just("PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n".to_owned()),
        Just("PUT /vm HTTP/1.1\r\nContent-Length: 1001\r\n\r\n".to_owned()),
        "[ -~]{1,40}".prop_map(|noise| noise + "\r\n\r\n"),
        "[a-z \r\n]{0,900}".prop_map(|body| format!(
            "PUT /logger HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )),
        "/[a-z]{1,8}".prop_map(|path| {
            let body = format!(r#"{{"guest_cid": 3, "uds_path": "{path}"}}"#);
            format!(
                "PUT /vsock HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
        }),
    ];
    prop::collection::vec(one, 0..8).prop_map(|all| all.concat().into_bytes())
}

proptest! {
    #[test]
    fn any_bytes_parse_or_fail(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(Some((request, length))) = parse_request(&bytes, LIMIT) {
            prop_assert!(length <= bytes.len());
            prop_assert!(bytes[..length].ends_with(request.body));
        }
    }

    #[test]
    fn more_bytes_never_change_a_request(bytes in requests(), cut in any::<prop::sample::Index>()) {
        // A prefix is read as the whole is, or wants more.
        let cut = cut.index(bytes.len() + 1);
        let whole = parse_request(&bytes, LIMIT);
        match parse_request(&bytes[..cut], LIMIT) {
            Ok(None) => {}
            other => prop_assert_eq!(other, whole),
        }
    }

    #[test]
    fn the_split_of_the_bytes_makes_no_difference(
        bytes in requests(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces: Vec<_> = cuts.windows(2).map(|ends| &bytes[ends[0]..ends[1]]).collect();
        prop_assert_eq!(feed(&pieces), feed(&[&bytes]));
    }

    #[test]
    fn a_connection_survives_any_bytes(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..6)) {
        let pieces: Vec<_> = pieces.iter().map(Vec::as_slice).collect();
        feed(&pieces);
    }
}

#[test]
fn one_byte_at_a_time() {
    let text = b"PUT /vsock HTTP/1.1\r\nContent-Length: 34\r\n\r\n{\"guest_cid\": 3, \"uds_path\": \"/v\"}GET / HTTP/1.1\r\n\r\n";
    let pieces: Vec<_> = text.chunks(1).collect();
    let (actions, _) = feed(&pieces);
    assert_eq!(actions.len(), 2);
    assert_eq!(actions[1], crate::Action::GetInstanceInfo);
}
