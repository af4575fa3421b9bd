use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::compile::compile;
use super::lists::assemble;
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

/// With the C libraries that it can be built with.
const C_LIBRARIES: [&str; 2] = ["gnu", "musl"];

fn all_lists(c_library: &str, is_debug: bool) -> Value {
    let read = |name: &str| Ok::<_, Infallible>(read(name));
    assemble(&THREADS, c_library, is_debug, read).unwrap()
}

fn list(thread: &str, c_library: &str) -> Vec<Value> {
    let lists = all_lists(c_library, false);
    let filter = &lists[thread];
    assert_eq!(filter["default_action"], "trap", "{thread}");
    assert_eq!(filter["filter_action"], "allow", "{thread}");
    filter["filter"].as_array().unwrap().clone()
}

fn each() -> impl Iterator<Item = (&'static str, &'static str)> {
    THREADS
        .into_iter()
        .flat_map(|thread| C_LIBRARIES.map(|c_library| (thread, c_library)))
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
    for c_library in C_LIBRARIES {
        assert!(list("vcpu", c_library).len() <= MAX_VCPU_RULES);
        let calls: BTreeSet<String> = THREADS
            .iter()
            .flat_map(|thread| list(thread, c_library))
            .map(|rule| call(&rule))
            .collect();
        assert!(calls.len() <= MAX_CALLS, "{}: {calls:?}", calls.len());
    }
}

fn calls(rules: &[Value]) -> usize {
    rules.iter().map(call).collect::<BTreeSet<_>>().len()
}

#[test]
fn the_document_has_the_numbers_of_rules_and_calls() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/SECURITY.md");
    let document = std::fs::read_to_string(path).unwrap();
    // The table's columns: the list, the thread, rules and calls with musl, the same with glibc, Firecracker's.
    let row = |name: &str| -> Vec<&str> {
        let start = format!("| {name} |");
        let row = document.lines().find(|line| line.starts_with(&start));
        let row = row.unwrap_or_else(|| panic!("{name} is not in the table"));
        row.split('|').skip(3).map(str::trim).collect()
    };
    let counts = |c_library: &str| {
        let mut all = Vec::new();
        let mut counts = BTreeMap::new();
        for thread in THREADS {
            let rules = list(thread, c_library);
            let numbers = [rules.len().to_string(), calls(&rules).to_string()];
            counts.insert(format!("`{thread}.json`"), numbers);
            all.extend(rules);
        }
        counts.insert("all".to_owned(), [String::new(), calls(&all).to_string()]);
        counts
    };
    let (musl, glibc) = (counts("musl"), counts("gnu"));
    for (name, musl) in &musl {
        let wanted = [&musl[..], &glibc[name][..]].concat();
        assert_eq!(row(name)[..4], wanted[..], "docs/SECURITY.md, {name}");
    }
}

#[test]
fn every_rule_has_a_reason() {
    for (thread, c_library) in each() {
        for rule in list(thread, c_library) {
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
    for (thread, c_library) in each() {
        for rule in list(thread, c_library) {
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
    for c_library in C_LIBRARIES {
        let vmm = list("vmm", c_library);
        for rule in list("vcpu", c_library) {
            let covers = |other: &Value| {
                call(other) == call(&rule)
                    && (other.get("args").is_none() || other["args"] == rule["args"])
            };
            assert!(vmm.iter().any(covers), "{rule}");
        }
    }
}

#[test]
fn the_lists_together_are_a_file_of_the_users() {
    let c_library = match cfg!(target_env = "musl") {
        true => "musl",
        false => "gnu",
    };
    let document = all_lists(c_library, cfg!(debug_assertions));
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
