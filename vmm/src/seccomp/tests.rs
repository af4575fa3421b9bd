use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::compile::compile;
use super::*;

/// Most rules that the list of a vCPU's thread may have.
const MAX_VCPU_RULES: usize = 20;
/// Most system calls that there may be on all lists together.
const MAX_CALLS: usize = 70;

fn read(name: &str) -> Value {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/seccomp/x86_64");
    let text = std::fs::read(format!("{folder}/{name}.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn list(thread: &str) -> Vec<Value> {
    let list = read(thread);
    let filter = &list[thread];
    assert_eq!(filter["default_action"], "trap", "{thread}");
    assert_eq!(filter["filter_action"], "allow", "{thread}");
    filter["filter"].as_array().unwrap().clone()
}

fn call(rule: &Value) -> String {
    rule["syscall"].as_str().unwrap().to_owned()
}

/// A document that can be compiled, in which each thread may do only what `rules` say.
fn document(rules: Value) -> Value {
    let filter = json!({ "default_action": "trap", "filter_action": "allow", "filter": rules });
    json!({ "api": filter, "vmm": filter, "vcpu": filter })
}

fn refusal(document: &Value) -> String {
    compile(document.to_string().as_bytes())
        .unwrap_err()
        .to_string()
}

#[test]
fn the_lists_stay_within_their_bounds() {
    assert!(list("vcpu").len() <= MAX_VCPU_RULES);
    let calls: BTreeSet<String> = THREADS
        .iter()
        .flat_map(|t| list(t))
        .map(|r| call(&r))
        .collect();
    assert!(calls.len() <= MAX_CALLS, "{}: {calls:?}", calls.len());
}

#[test]
fn every_rule_has_a_reason() {
    for thread in THREADS {
        for rule in list(thread) {
            let reason = rule["comment"].as_str().unwrap_or_default();
            assert!(reason.len() > 3, "{thread}: {rule}");
            for condition in rule["args"].as_array().into_iter().flatten() {
                assert!(condition["comment"].is_string(), "{thread}: {rule}");
            }
        }
    }
}

#[test]
fn no_list_has_calls_that_would_undo_the_others() {
    let never = [
        "execve",
        "execveat",
        "fork",
        "vfork",
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "bpf",
        "mount",
        "setns",
        "unshare",
        "chroot",
        "pivot_root",
        "init_module",
        "kexec_load",
        "setuid",
        "perf_event_open",
    ];
    let alone_too_wide = [
        "ioctl", "mmap", "mprotect", "socket", "prctl", "fcntl", "madvise", "futex",
    ];
    for thread in THREADS {
        for rule in list(thread) {
            let call = call(&rule);
            assert!(!never.contains(&call.as_str()), "{thread}: {rule}");
            let narrowed = rule.get("args").is_some();
            assert!(
                narrowed || !alone_too_wide.contains(&call.as_str()),
                "{thread}: {rule}"
            );
        }
    }
}

/// A vCPU's thread is started by the event loop's and inherits its filter.
#[test]
fn what_a_vcpu_may_do_the_event_loop_may_do() {
    let vmm = list("vmm");
    for rule in list("vcpu") {
        let covers = |other: &Value| {
            call(other) == call(&rule)
                && (other.get("args").is_none() || other["args"] == rule["args"])
        };
        assert!(vmm.iter().any(covers), "{rule}");
    }
}

#[test]
fn the_lists_together_are_a_file_of_the_users() {
    let mut document = json!({});
    for thread in THREADS {
        let mut rules = list(thread);
        if cfg!(debug_assertions) {
            rules.extend(read("debug").as_array().unwrap().clone());
        }
        document[thread] = json!({
            "default_action": "trap", "filter_action": "allow", "filter": rules,
        });
    }
    let [api, vmm, vcpu] = compile(document.to_string().as_bytes()).unwrap();
    let built_in = Filters::built_in();
    assert_eq!(built_in.api[..], api[..]);
    assert_eq!(built_in.vmm[..], vmm[..]);
    assert_eq!(built_in.vcpu[..], vcpu[..]);
}

#[test]
fn what_is_at_fault_is_named() {
    let good = document(json!([{ "syscall": "read" }]));
    compile(good.to_string().as_bytes()).unwrap();
    let mut missing = good.clone();
    missing.as_object_mut().unwrap().remove("vcpu");
    assert!(refusal(&missing).contains("no filter for the thread vcpu"));
    let mut unknown = good.clone();
    unknown["disk"] = json!({});
    assert!(refusal(&unknown).contains("\"disk\""));
    let condition = json!({ "index": 9, "type": "dword", "op": "eq", "val": 1 });
    for rule in [
        json!({ "syscall": "no_such_call" }),
        json!({ "syscall": "mmap", "args": [condition] }),
        json!({ "syscall": "mmap", "args": 7 }),
        json!({ "syscall": "mmap", "arguments": [] }),
    ] {
        let text = refusal(&document(json!([{ "syscall": "read" }, rule])));
        let name = rule["syscall"].as_str().unwrap();
        assert!(
            text.starts_with(&format!("thread api, rule 2 ({name}): ")),
            "{text}"
        );
    }
    let mut action = good.clone();
    action["vmm"]["default_action"] = json!("explode");
    assert!(refusal(&action).starts_with("thread vmm: "));
    let args = json!([{ "index": 1, "type": "dword", "op": "eq", "val": 1 }]);
    let both = json!([{ "syscall": "mmap", "args": args }, { "syscall": "mmap" }]);
    assert!(refusal(&document(both)).contains("rule 1 (mmap): another rule"));
    let compiled = compile(b"\x03vcpu\x10").unwrap_err().to_string();
    assert!(compiled.contains("seccompiler-bin"), "{compiled}");
}

#[test]
fn a_file_that_cannot_be_used_is_named() {
    let none = Filters::from_file(Path::new("/no/such/file")).unwrap_err();
    assert!(none.to_string().starts_with("/no/such/file: "));
    let endless = Filters::from_file(Path::new("/dev/zero")).unwrap_err();
    assert!(matches!(endless, FilterError::Size(_)));
}

proptest! {
    #[test]
    fn no_bytes_make_the_compiler_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(compile(&bytes).is_err());
    }
}
