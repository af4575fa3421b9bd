//! Memory that another process serves.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::place::{Place, let_run, refusal, saved};
use lepton_tests::Vmm;

/// Serves page faults from a memory file by Firecracker's protocol.
const HANDLER: &str = r#"
import ctypes, fcntl, json, os, socket, struct, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
stream, _ = listener.accept()
message, fds, _, _ = socket.recv_fds(stream, 65536, 1)
mappings = json.loads(message)
memory = open(sys.argv[2], "rb")
assert sum(m["size"] for m in mappings) == 128 << 20, mappings
assert all(m["page_size"] == 4096 for m in mappings), mappings
os.set_blocking(fds[0], True)
served = 0
while True:
    event = os.read(fds[0], 32)
    address = struct.unpack_from("<Q", event, 16)[0] & ~4095
    for m in mappings:
        base = m["base_host_virt_addr"]
        if base <= address < base + m["size"]:
            memory.seek(m["offset"] + address - base)
            page = ctypes.create_string_buffer(memory.read(4096), 4096)
            copy = bytearray(struct.pack("<QQQQq", address, ctypes.addressof(page), 4096, 0, 0))
            fcntl.ioctl(fds[0], 0xc028aa03, copy)
            served += 1
            print("served", served, flush=True)
"#;

pub fn another_process_serves_memory() {
    let place = Place::new();
    saved(&place);
    let socket = place.path("handler.sock");
    let mut request = place.load();
    request["mem_backend"] = json!({ "backend_type": "Uffd", "backend_path": socket });
    let message = refusal(&request);
    assert!(message.contains("handler.sock"), "{message}");
    let mut handler = Command::new("python3")
        .args(["-c", HANDLER])
        .args([&socket, &place.memory()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 starts");
    let lines = BufReader::new(handler.stdout.take().expect("a pipe")).lines();
    let mut lines = lines.map_while(Result::ok);
    assert_eq!(lines.next().as_deref(), Some("ready"));
    let (vmm, mut api) = Vmm::quiet();
    api.put("/snapshot/load", &request);
    let_run(&mut api);
    assert_eq!(lines.next().as_deref(), Some("served 1"));
    vmm.terminate();
    handler.kill().expect("a child");
    handler.wait().expect("a child");
}
