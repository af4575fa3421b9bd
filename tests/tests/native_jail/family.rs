//! A machine in a jail whose copies are in jails of their own.

use std::fs;

use lepton_tests::Api;
use lepton_tests::counting::{check_counts, check_tail, let_run};
use lepton_tests::guest::{Entry, Program};
use lepton_tests::jail::{Jail, Jailed};
use lepton_tests::linux;
use serde_json::{Value, json};

use crate::pool::wait_until;

/// A jailed VMM whose console is the file `console` in its root, which has this `kernel`, too.
#[track_caller]
fn started(id: &str, kernel: &[u8], arguments: &[&str]) -> (Jailed, Api) {
    let jail = Jail::as_another_user().id(id).vmm(arguments);
    jail.file("console", b"");
    jail.file("log", b"");
    jail.file("kernel", kernel);
    let vmm = jail.spawn();
    let mut api = vmm.api();
    api.put("/logger", &json!({ "log_path": "/log" }));
    api.put("/serial", &json!({ "serial_out_path": "/console" }));
    (vmm, api)
}

fn said(vmm: &Jailed) -> Vec<u8> {
    fs::read(vmm.jail.root().join("console")).expect("a console")
}

/// Clones a jailed machine to a jail called `id`.
#[track_caller]
fn clone(parent: &Jailed, api: &mut Api, id: &str) -> (Jailed, Api, Value) {
    let (copy, copy_api) = started(id, b"", &["--adopt", "/adopt.sock"]);
    let link = format!("{id}.sock");
    // The machine's jail has no other way to the socket.
    fs::hard_link(
        copy.jail.root().join("adopt.sock"),
        parent.jail.root().join(&link),
    )
    .expect("one file system");
    let request = json!({ "children": [{ "adopt_socket": format!("/{link}") }] });
    let (status, reply) = api.request("PUT", "/clone", &request.to_string());
    assert_eq!(status, 200, "{reply}");
    let reply = serde_json::from_str(&reply).expect("JSON");
    (copy, copy_api, reply)
}

/// It needs to know which pages were written for it, and has no /proc.
pub fn a_jailed_machine_lets_go_of_memory_while_its_guest_writes() {
    let kernel = fs::read(linux::file("LEPTON_PROBE")).expect("a program");
    // Nothing is copied if memory is let go when the machine stands still. Otherwise what the guest writes meanwhile is, which
    // may be nothing if it has no processor then.
    let something = (0..20).any(|_| {
        let (parent, mut api) = started("vm-1", &kernel, &[]);
        let boot = json!({
            "kernel_image_path": "/kernel",
            "boot_args": "probe.mode=churn probe.mib=100 probe.kib=64",
        });
        api.put("/boot-source", &boot);
        let shape = json!({ "vcpu_count": 1, "mem_size_mib": 128, "clonable": true });
        api.put("/machine-config", &shape);
        api.start();
        wait_until("memory is written", || {
            String::from_utf8_lossy(&said(&parent)).contains("churn")
        });
        let (_copy, _, reply) = clone(&parent, &mut api, "copy");
        let copied = reply["copied_bytes"].as_u64().expect("a number of bytes");
        assert!(copied < 1 << 20, "{copied}");
        copied > 0
    });
    assert!(something);
}

pub fn a_jailed_machine_has_jailed_copies() {
    let kernel = Program::count().elf(Entry::Pvh);
    let (parent, mut api) = started("vm-1", &kernel, &[]);
    api.put("/boot-source", &json!({ "kernel_image_path": "/kernel" }));
    let shape = json!({ "vcpu_count": 1, "mem_size_mib": 16, "clonable": true });
    api.put("/machine-config", &shape);
    api.start();
    let_run(&mut api);
    for number in 1..=3 {
        let id = format!("copy-{number}");
        let (copy, mut copy_api, reply) = clone(&parent, &mut api, &id);
        assert_eq!(reply["children"][0]["id"], id);
        // By the way in which they are told, too, what was written since the last time is found the next time.
        for told in [&mut api, &mut copy_api].map(|api| api.get("/vm/divergence")) {
            assert!(told["memory"].is_object(), "{told}");
        }
        let_run(&mut copy_api);
        let_run(&mut api);
        copy_api.reach("Paused");
        check_tail(&said(&copy));
    }
    api.reach("Paused");
    assert!(check_counts(&said(&parent)) > 20);
}
