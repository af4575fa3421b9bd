//! Debian as it is: its own kernel, an initial RAM disk with its modules, its own root file system.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::Instant;

use lepton_agent::client::connect_vsock;
use lepton_tests::host_socket::HostSocket;
use lepton_tests::linux::file;
use lepton_tests::origin::of_config;
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::tap::Tap;
use lepton_tests::{PATIENCE, Vmm, test};
use serde_json::json;

fn main() -> ExitCode {
    suite::run(
        Order::OneByOne,
        &[
            Need::HardwareKvm,
            Need::Root,
            Need::Program("ip"),
            Need::File("LEPTON_DEBIAN_KERNEL"),
            Need::File("LEPTON_DEBIAN_INITRD"),
            Need::File("LEPTON_DEBIAN_ROOT"),
        ],
        [test!(debian_boots_to_a_login_and_talks_to_its_host).of_every_origin()],
    )
}

const HOST: &str = "172.30.78.1";
const GUEST: &str = "172.30.78.2";

/// A VMM whose serial console is a pair of pipes, and a shell on it.
struct Console {
    vmm: Vmm,
    commands: u32,
}

impl Console {
    /// Types a line.
    fn types(&mut self, line: &str) {
        self.vmm.types(&format!("{line}\n"));
    }

    /// Runs a command and waits for it, which must succeed.
    #[track_caller]
    fn runs(&mut self, command: &str) {
        self.commands += 1;
        let number = self.commands;
        // What is typed is echoed: only the result has the numbers together.
        self.types(&format!("{command}; echo status=$? of=$((1000+{number}))"));
        self.vmm.stdout.wait_for(&format!(" of={}", 1000 + number));
        let text = self.vmm.stdout.text();
        let done = format!("status=0 of={}", 1000 + number);
        assert!(text.contains(&done), "{command} failed:\n{text}");
    }
}

fn debian_boots_to_a_login_and_talks_to_its_host() {
    let tap = Tap::new(Some("172.30.78.1/24"));
    let builder = Vmm::builder().with_input();
    let root = builder.directory().join("root.ext4");
    fs::copy(file("LEPTON_DEBIAN_ROOT"), &root).expect("the root drive can be copied");
    let uds_path = builder.directory().join("v.sock");
    let config = json!({
        "logger": { "log_path": builder.directory().join("log") },
        "boot-source": {
            "kernel_image_path": file("LEPTON_DEBIAN_KERNEL"),
            "initrd_path": file("LEPTON_DEBIAN_INITRD"),
            "boot_args": format!("console=ttyS0 reboot=k panic=-1 ip={GUEST}::{HOST}:255.255.255.0::eth0:off"),
        },
        "machine-config": { "vcpu_count": 2, "mem_size_mib": 512 },
        "drives": [{ "drive_id": "root", "path_on_host": root, "is_root_device": true }],
        "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": tap.name() }],
        "vsock": { "guest_cid": 3, "uds_path": uds_path },
    });
    let (vmm, api) = of_config(builder, &config, |vmm, _| {
        vmm.stdout.wait_for_within("login: ", PATIENCE * 4);
    });
    let mut console = Console { vmm, commands: 0 };
    console.types("root");
    console.vmm.stdout.wait_for("~# ");
    // Devices are found by the ACPI tables as well as by the command line.
    console.runs("test -d /sys/firmware/acpi/tables && test $(nproc) = 2");
    console.runs(&format!("ping -c 2 -W 10 {HOST}"));

    // TCP from the guest to the host.
    let listener = TcpListener::bind((HOST, 0)).expect("the tap has that address");
    let port = listener.local_addr().expect("an address").port();
    let receiver = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a connection");
        received(stream)
    });
    console.runs(&format!(
        "head -c 1000000 /dev/zero | socat -u - TCP:{HOST}:{port}"
    ));
    let bytes = receiver.join().expect("the receiver does not panic");
    assert_eq!(bytes, vec![0; 1_000_000]);

    // TCP from the host to the guest.
    console.types("socat -u TCP-LISTEN:5000 CREATE:/tmp/tcp &");
    let deadline = Instant::now() + PATIENCE;
    let mut stream = loop {
        match TcpStream::connect((GUEST, 5000)) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    };
    stream
        .write_all(&[b'x'; 1_000_000])
        .expect("the guest takes it");
    drop(stream);
    console
        .runs("wait; test $(tr -d x < /tmp/tcp | wc -c) = 0 && test $(wc -c < /tmp/tcp) = 1000000");

    // vsock, from each side.
    let listener = HostSocket::of_vsock(&uds_path, 6000);
    console.runs("echo from the guest | socat -u - VSOCK-CONNECT:2:6000");
    let mut text = String::new();
    listener
        .accept()
        .read_to_string(&mut text)
        .expect("all of it");
    assert_eq!(text, "from the guest\n");
    drop(listener);
    // By itself socat waits half a second for the other direction once one has ended: too short here.
    console.types("socat -t 60 VSOCK-LISTEN:6001 EXEC:cat & echo");
    let deadline = Instant::now() + PATIENCE;
    let mut stream = loop {
        match connect_vsock(&uds_path, 6001) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    };
    stream
        .write_all(b"from the host")
        .expect("the guest takes it");
    stream
        .shutdown(std::net::Shutdown::Write)
        .expect("a socket can be half closed");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("all of it");
    assert_eq!(text, "from the host");

    console.types("sync; reboot -f");
    drop(api);
    let ended = console.vmm.wait().expect_code(0);
    let log = fs::read_to_string(ended.directory.path().join("log"));
    let log = log.expect("the log is there");
    assert!(log.contains("the guest reset itself"), "{log}");
}

fn received(mut stream: TcpStream) -> Vec<u8> {
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("a socket has timeouts");
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("all of it");
    bytes
}
