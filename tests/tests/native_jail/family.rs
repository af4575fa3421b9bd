//! A machine in a jail whose copies are in jails of their own.

use std::fs;

use lepton_tests::Api;
use lepton_tests::counting::{check_counts, check_tail, let_run};
use lepton_tests::guest::{Entry, Program};
use lepton_tests::jail::{Jail, Jailed};
use serde_json::json;

/// A jailed VMM whose console is the file `console` in its root.
#[track_caller]
fn started(id: &str, arguments: &[&str]) -> (Jailed, Api) {
    let jail = Jail::as_another_user().id(id).vmm(arguments);
    jail.file("console", b"");
    jail.file("log", b"");
    jail.file("kernel", &Program::count().elf(Entry::Pvh));
    let vmm = jail.spawn();
    let mut api = vmm.api();
    api.put("/logger", &json!({ "log_path": "/log" }));
    api.put("/serial", &json!({ "serial_out_path": "/console" }));
    (vmm, api)
}

fn said(vmm: &Jailed) -> Vec<u8> {
    fs::read(vmm.jail.root().join("console")).expect("a console")
}

pub fn a_jailed_machine_has_jailed_copies() {
    let (parent, mut api) = started("vm-1", &[]);
    api.put("/boot-source", &json!({ "kernel_image_path": "/kernel" }));
    let shape = json!({ "vcpu_count": 1, "mem_size_mib": 16, "clonable": true });
    api.put("/machine-config", &shape);
    api.start();
    let_run(&mut api);
    // The second time, what was written since is found without /proc.
    for number in 1..=3 {
        let id = format!("copy-{number}");
        let (copy, mut copy_api) = started(&id, &["--adopt", "/adopt.sock"]);
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
        assert!(reply.contains(&id), "{reply}");
        let_run(&mut copy_api);
        let_run(&mut api);
        copy_api.reach("Paused");
        check_tail(&said(&copy));
    }
    api.reach("Paused");
    assert!(check_counts(&said(&parent)) > 20);
}
