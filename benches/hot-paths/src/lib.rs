//! The paths that every request takes, each with a fixed input: for Criterion, which measures their time, and for
//! callgrind, which counts their instructions.
//!
//! The driver's side is that of the devices' tests; what it does is part of each figure.

mod devices;

use std::hint::black_box;

use lepton_api::http::parse_request;

/// A path.
#[derive(Clone, Copy)]
pub struct Path {
    /// Its name.
    pub name: &'static str,
    /// Makes what is needed; the value takes the path once.
    pub prepare: fn() -> Box<dyn FnMut()>,
}

/// All of them.
pub const PATHS: &[Path] = &[
    Path {
        name: "http-parse",
        prepare: http_parse,
    },
    Path {
        name: "queue-drain",
        prepare: devices::queue_drain,
    },
    Path {
        name: "blk-read",
        prepare: devices::blk_read,
    },
    Path {
        name: "net-transmit",
        prepare: devices::net_transmit,
    },
    Path {
        name: "net-receive",
        prepare: devices::net_receive,
    },
    Path {
        name: "vsock-packet",
        prepare: devices::vsock_packet,
    },
];

/// A request to configure a drive, as curl sends it.
fn http_parse() -> Box<dyn FnMut()> {
    const BODY: &str = r#"{"drive_id":"rootfs","path_on_host":"/srv/root.img","is_root_device":true,"is_read_only":true}"#;
    let request = format!(
        "PUT /drives/rootfs HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{BODY}",
        BODY.len()
    );
    Box::new(move || {
        let parsed = parse_request(black_box(request.as_bytes()), 51200);
        let request = parsed.expect("a good request").expect("a whole request");
        black_box(request);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_can_be_taken_again_and_again() {
        for path in PATHS {
            let mut run = (path.prepare)();
            for _ in 0..300 {
                run();
            }
        }
    }
}
