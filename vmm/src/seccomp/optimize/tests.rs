use std::collections::BTreeMap;

use proptest::prelude::*;
use seccompiler::TargetArch;
use serde_json::{Value, json};

use super::*;
use crate::seccomp::THREADS;
use crate::seccomp::lists::assemble;

/// AUDIT_ARCH_X86_64 of linux/audit.h.
const X86_64: u32 = 0xc000_003e;
/// AUDIT_ARCH_I386.
const I386: u32 = 0x4000_0003;

/// `struct seccomp_data` in its 32-bit words.
type Data = [u32; 16];

/// Runs a program as the kernel does: the action, and how many steps it took.
fn run(program: &[sock_filter], data: &Data) -> (u32, usize) {
    let (mut accumulator, mut at, mut taken) = (0_u32, 0_usize, 0);
    loop {
        let step = &program[at];
        (at, taken) = (at + 1, taken + 1);
        let branch = |holds| usize::from(if holds { step.jt } else { step.jf });
        match step.code {
            LOAD => accumulator = data[step.k as usize / 4],
            AND => accumulator &= step.k,
            JUMP => at += step.k as usize,
            IF_EQUAL => at += branch(accumulator == step.k),
            IF_GREATER => at += branch(accumulator > step.k),
            IF_NOT_LESS => at += branch(accumulator >= step.k),
            RETURN => return (step.k, taken),
            code => panic!("step {code:#x}"),
        }
    }
}

fn data(arch: u32, call: u32, arguments: [u64; 6]) -> Data {
    let mut data = [0; 16];
    (data[0], data[1]) = (call, arch);
    for (n, argument) in arguments.into_iter().enumerate() {
        data[4 + 2 * n] = argument as u32;
        data[5 + 2 * n] = (argument >> 32) as u32;
    }
    data
}

fn seccompile(filter: &Value) -> Vec<sock_filter> {
    let text = json!({ "thread": filter }).to_string();
    let compiled = seccompiler::compile_from_json(text.as_bytes(), TargetArch::x86_64);
    compiled.unwrap().remove("thread").unwrap()
}

/// The filter of each thread, as seccompiler makes it.
fn built_in() -> impl Iterator<Item = (&'static str, Vec<sock_filter>)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/seccomp/x86_64");
    let read = |name: &str| -> Result<Value, serde_json::Error> {
        serde_json::from_slice(&std::fs::read(format!("{folder}/{name}.json")).unwrap())
    };
    let lists = assemble(&THREADS, "musl", false, read).unwrap();
    THREADS
        .into_iter()
        .map(move |thread| (thread, seccompile(&lists[thread])))
}

/// Each word that the program compares, with each operand, one less and one more.
fn edges(program: &[sock_filter]) -> BTreeMap<u32, BTreeSet<u32>> {
    let mut edges: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    let mut offset = 0;
    for step in program {
        match step.code {
            LOAD => offset = step.k,
            IF_EQUAL | IF_GREATER | IF_NOT_LESS => {
                let near = [step.k.wrapping_sub(1), step.k, step.k.wrapping_add(1)];
                edges.entry(offset).or_default().extend(near);
            }
            _ => {}
        }
    }
    edges
}

/// Where the two programs differ.
fn difference(one: &[sock_filter], other: &[sock_filter], data: &Data) -> Option<String> {
    let (expected, got) = (run(one, data).0, run(other, data).0);
    (expected != got).then(|| format!("{expected:#x} and {got:#x} for {data:?}"))
}

/// All call numbers with, one or two at a time, all the values of arguments at which some rule changes its mind.
#[test]
fn the_built_in_filters_decide_as_seccompiler_says() {
    for (thread, original) in built_in() {
        let optimized = optimize(original.clone());
        let mut values: Vec<(usize, u32)> = vec![(2, 0)];
        for (offset, operands) in edges(&original) {
            if offset >= 16 {
                values.extend(operands.iter().map(|v| (offset as usize / 4, *v)));
                values.extend(operands.iter().map(|v| (offset as usize / 4, v ^ 1 << 31)));
            }
        }
        let calls = (0..600).chain([u32::MAX, 1 << 31]);
        for call in calls.clone().chain(calls.map(|call| call ^ 1 << 30)) {
            for (word, value) in &values {
                let mut data = data(X86_64, call, [0; 6]);
                data[*word] = *value;
                assert_eq!(difference(&original, &optimized, &data), None, "{thread}");
                // `socket` and `accept4` compare two arguments.
                for (second, value) in values
                    .iter()
                    .filter(|(second, _)| second > word && call < 300)
                {
                    if [41, 288].contains(&call) {
                        let mut data = data;
                        data[*second] = *value;
                        assert_eq!(difference(&original, &optimized, &data), None, "{thread}");
                    }
                }
            }
            assert_eq!(
                run(&optimized, &data(I386, call, [0; 6])).0,
                libc::SECCOMP_RET_KILL_PROCESS
            );
        }
    }
}

/// What a filter costs: its steps when it is taken, and those of the way of each call number, which the kernel goes
/// then, too.
#[test]
fn the_built_in_filters_are_short() {
    for (thread, original) in built_in() {
        let optimized = optimize(original.clone());
        let ways = |program: &[sock_filter]| -> usize {
            (0..470)
                .map(|call| run(program, &data(X86_64, call, [0; 6])).1)
                .sum()
        };
        println!(
            "{thread}: {} steps of {}, ways of all calls {} of {}",
            optimized.len(),
            original.len(),
            ways(&optimized),
            ways(&original)
        );
        assert!(
            optimized.len() * 2 <= original.len(),
            "{thread}: {}",
            optimized.len()
        );
        assert!(
            ways(&optimized) <= 470 * 14,
            "{thread}: {}",
            ways(&optimized)
        );
    }
}

#[test]
fn what_is_not_understood_stays_as_it_is() {
    let step = |code, k| sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    };
    // BPF_LD | BPF_IMM, a jump past the end, a comparison of nothing.
    for program in [
        vec![step(0, 1), step(RETURN, 1)],
        vec![step(JUMP, 7), step(RETURN, 1)],
        vec![step(JUMP, u32::MAX), step(RETURN, 1)],
        vec![step(IF_EQUAL, 7), step(RETURN, 1)],
        vec![step(AND, 7), step(RETURN, 1)],
        vec![step(LOAD, 0)],
        vec![],
    ] {
        assert_eq!(optimize(program.clone()), program);
    }
}

/// Ranges of six arguments multiply: the work is bounded.
#[test]
fn a_filter_that_would_grow_stays_as_it_is() {
    let rules: Vec<Value> = (0..48_u32)
        .map(|n| {
            let condition = |index: u32| {
                json!({ "index": index, "type": "qword", "op": "gt", "val": (n * 7919 + index * 104_729) % 1_000_003 })
            };
            json!({ "syscall": "mmap", "args": (0..6).map(condition).collect::<Vec<_>>() })
        })
        .collect();
    let filter = json!({ "default_action": "trap", "filter_action": "allow", "filter": rules });
    let original = seccompile(&filter);
    let optimized = optimize(original.clone());
    assert!(optimized.len() <= original.len());
}

fn condition() -> impl Strategy<Value = Value> {
    let op = prop_oneof![
        Just(json!("eq")),
        Just(json!("ne")),
        Just(json!("ge")),
        Just(json!("gt")),
        Just(json!("le")),
        Just(json!("lt")),
        prop_oneof![0..16_u64, any::<u64>()].prop_map(|mask| json!({ "masked_eq": mask })),
    ];
    let value = prop_oneof![0..8_u64, (0..4_u64).prop_map(|v| v << 31), any::<u64>()];
    (0..6_u8, prop::bool::ANY, op, value).prop_map(|(index, is_dword, op, value)| {
        let size = if is_dword { "dword" } else { "qword" };
        json!({ "index": index, "type": size, "op": op, "val": value })
    })
}

fn filter() -> impl Strategy<Value = Value> {
    let calls = prop::sample::select(vec![
        "read", "write", "open", "close", "ioctl", "mmap", "clone3",
    ]);
    let rule =
        (calls, prop::collection::vec(condition(), 0..3)).prop_map(|(call, args)| {
            match args.is_empty() {
                true => json!({ "syscall": call }),
                false => json!({ "syscall": call, "args": args }),
            }
        });
    prop::collection::vec(rule, 0..40).prop_map(|rules| {
        json!({ "default_action": "trap", "filter_action": { "errno": 7 }, "filter": rules })
    })
}

proptest! {
    #[test]
    fn any_filter_decides_as_seccompiler_says(
        filter in filter(),
        inputs in prop::collection::vec((0..20_u32, prop::array::uniform6(any::<(u8, u64)>())), 64),
    ) {
        let original = seccompile(&filter);
        let optimized = optimize(original.clone());
        prop_assert!(optimized.len() <= original.len());
        let edges = edges(&original);
        for (call, arguments) in inputs {
            let call = if call == 19 { 435 } else { call };
            let mut data = data(X86_64, call, arguments.map(|(_, value)| value));
            // Most arguments are near what the rules compare them with.
            for (n, (kind, value)) in arguments.into_iter().enumerate() {
                for (word, pick) in [(4 + 2 * n, value), (5 + 2 * n, value >> 32)] {
                    if let (Some(near), 0..200) = (edges.get(&(4 * word as u32)), kind) {
                        data[word] = *near.iter().nth(pick as usize % near.len()).unwrap();
                    }
                }
            }
            prop_assert_eq!(difference(&original, &optimized, &data), None);
        }
    }
}
