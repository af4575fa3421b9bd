//! Copies of a machine, as many as `LEPTON_UNIQUE_CLONES` says: nothing that must differ is the same in two of them.
//! `cargo xtask verify-unique` runs it with many.

use std::collections::BTreeMap;
use std::process::ExitCode;

use lepton_tests::heir::{Heir, UNIQUE, clone, unique_things};
use lepton_tests::linux::{self, Linux};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::tap::Tap;
use lepton_tests::test;
use serde_json::{Value, json};

/// Copies that live at the same time.
const BATCH: usize = 4;
/// Copies unless another number is asked for.
const FEW: usize = 4;

fn main() -> ExitCode {
    suite::run(
        Order::OneByOne,
        &linux::NEEDS,
        [test!(no_two_copies_have_anything_in_common)
            .needs(Need::Root)
            .needs(Need::Program("ip"))],
    )
}

/// The request for copy number `number`, with an address and a name of its own; the kernel and the VMM choose the rest.
fn child(heir: &Heir, number: usize, tap: &Tap) -> Value {
    let [.., high, low] = number.to_be_bytes();
    let mut child = heir.child();
    child["network_overrides"] = json!([{ "iface_id": "eth0", "host_dev_name": tap.name() }]);
    child["identity"] = json!({
        "hostname": format!("copy-{number}"), "timeout_ms": 50_000,
        "interfaces": [{
            "iface_id": "eth0", "guest_mac": format!("06:00:ac:1f:{high:02x}:{low:02x}"),
            "address": format!("172.31.{high}.{low}/16"),
        }],
    });
    child
}

fn no_two_copies_have_anything_in_common() {
    let asked = std::env::var("LEPTON_UNIQUE_CLONES").ok();
    let copies = asked.map_or(FEW, |number| number.parse().expect("a number"));
    let taps: Vec<Tap> = (0..=BATCH).map(|_| Tap::new(None)).collect();
    let mut guest = Linux::boot(
        "quiet ip=172.31.255.1:::255.255.0.0::eth0:off",
        |_, config| {
            config["machine-config"]["clonable"] = true.into();
            config["network-interfaces"] = json!([{
                "iface_id": "eth0", "host_dev_name": taps[BATCH].name(), "guest_mac": "06:00:ac:1f:ff:ff",
            }]);
        },
    );
    guest.sh("echo 0123456789abcdef0123456789abcdef > /etc/machine-id");
    let mut seen = vec![unique_things(&guest)];
    let numbers: Vec<usize> = (1..=copies).collect();
    for batch in numbers.chunks(BATCH) {
        let heirs: Vec<Heir> = batch.iter().map(|_| Heir::new()).collect();
        let children: Vec<Value> = (batch.iter().zip(&heirs).zip(&taps))
            .map(|((number, heir), tap)| child(heir, *number, tap))
            .collect();
        clone(&mut guest, &children);
        for heir in heirs {
            seen.push(unique_things(&heir.linux()));
        }
        println!("{} of {copies} copies", seen.len() - 1);
    }
    let mut repeats = BTreeMap::new();
    for (kind, name) in UNIQUE.iter().enumerate() {
        let mut all: Vec<&String> = seen.iter().map(|things| &things[kind]).collect();
        all.sort();
        all.dedup();
        repeats.insert(name, seen.len() - all.len());
    }
    for (name, count) in &repeats {
        println!(
            "verify-unique: {count} repeated {name} among {} machines",
            seen.len()
        );
    }
    assert!(repeats.values().all(|count| *count == 0), "{repeats:?}");
}
