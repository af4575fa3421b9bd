//! Which rules of the lists of system calls the tests come by. A rule that nothing uses is a gap without a use.
//!
//! Every VMM of the traced tests runs under strace. A rule that they need not come by has a comment that begins with
//! `Lab: ` (tests in the lab or the adversary do, which are too slow to trace) or `Rare: ` (another host would).

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::counts::Counts;
use super::lab_tests::Program;
use super::{Environment, counted};
use crate::packages;
use crate::programs::{c_library, workspace};
use crate::progress::Progress;

/// What this check is called on the command line.
pub const NAME: &str = "calls";

/// Test programs that start VMMs by the harness, need no particular user, and measure nothing.
const TRACED: [&str; 11] = [
    "native_api",
    "native_bad_input",
    "native_boot",
    "native_clone",
    "native_ends",
    "native_images",
    "native_overlay",
    "native_probe",
    "native_probe_streams",
    "native_snapshot",
    "native_telemetry",
];

/// The other test programs on this host's KVM, and why they are not traced.
const UNTRACED: [(&str, &str); 5] = [
    ("native_adversary", "millions of attacks, too slow"),
    ("native_confinement", "it looks at who may look into a VMM"),
    ("native_faults", "it kills VMMs at any moment"),
    ("native_floor", "it measures"),
    ("native_jail", "there is no strace in a jail"),
];

const NOT_SEEN_HERE: [&str; 2] = ["Lab: ", "Rare: "];

/// Runs the traced ones of `programs`, and fails for each rule that none of them uses.
pub fn run(progress: &Progress, programs: &[Program], environment: &Environment) -> Result<Counts> {
    let lacks = match File::options().read(true).write(true).open("/dev/kvm") {
        Err(error) => Some(format!("/dev/kvm: {error}")),
        Ok(_) if !rustix::process::geteuid().is_root() => Some("it needs root".to_owned()),
        Ok(_) => None,
    };
    if let Some(reason) = lacks {
        eprintln!("SKIPPED: {NAME}: {reason}");
        return Ok(Counts {
            skipped: 1,
            ..Counts::default()
        });
    }
    let unknown = unknown(programs.iter().map(|(name, _)| name.as_str()));
    if !unknown.is_empty() {
        bail!(
            "{}: to be traced or not? See {}",
            unknown.join(", "),
            file!()
        );
    }
    packages::ensure(progress, "tracing the VMM", &["strace"])?;
    let folder = tempfile::tempdir()?;
    let traces = folder.path().join("traces");
    fs::create_dir(&traces)?;
    let vmm = environment.get("LEPTON_VMM").context("no VMM was built")?;
    // Of the VMM's own name, which is that of its first thread.
    let traced_vmm = folder.path().join("lepton-vmm");
    fs::write(&traced_vmm, script(&traces, vmm))?;
    fs::set_permissions(&traced_vmm, Permissions::from_mode(0o755))?;
    for (name, path) in programs {
        if !TRACED.contains(&name.as_str()) {
            continue;
        }
        let mut command = Command::new(path);
        command
            .envs(environment)
            .env("LEPTON_VMM", &traced_vmm)
            .current_dir(workspace().join("tests"));
        if counted(progress, &format!("tracing {name}"), &mut command)?.failed > 0 {
            // Judged when it runs untraced: some tests depend on time. What it did not come to use shows below.
            eprintln!("{name}: not all tests hold when their VMMs are traced");
        }
    }
    let mut lists = Lists::read(c_library(progress))?;
    for entry in fs::read_dir(&traces)? {
        lists.follow(&String::from_utf8_lossy(&fs::read(entry?.path())?));
    }
    let (unused, excused) = lists.unused();
    eprintln!("{excused} rules marked Lab or Rare were not used by the traced tests");
    for rule in &unused {
        eprintln!("no traced test uses this rule: {rule}");
    }
    Ok(Counts::one(unused.is_empty()))
}

/// Programs of which nobody has said whether they are traced.
fn unknown<'a>(programs: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let is_known = |name: &str| {
        TRACED.contains(&name) || UNTRACED.iter().any(|(untraced, _)| *untraced == name)
    };
    programs
        .filter(|name| name.starts_with("native_") && !is_known(name))
        .collect()
}

/// The tracer goes to the background, so that the process that a test starts becomes the VMM.
fn script(traces: &Path, vmm: &Path) -> String {
    format!(
        "#!/bin/sh\nexec strace --daemonize --follow-forks --decode-pids=comm --quiet=all -e raw=all -e signal=none \
         --output='{}'/$$ '{}' \"$@\"\n",
        traces.display(),
        vmm.display()
    )
}

/// One rule: the call, and for an argument the bits that count and what they have to be.
struct Rule {
    text: String,
    call: String,
    conditions: Vec<(usize, u64, u64)>,
    excused: bool,
    used: bool,
}

impl Rule {
    fn parse(rule: &Value) -> Option<Self> {
        let mut conditions = Vec::new();
        for condition in rule["args"].as_array().into_iter().flatten() {
            let all = match condition["type"].as_str()? {
                "dword" => u64::from(u32::MAX),
                _ => u64::MAX,
            };
            let mask = match &condition["op"] {
                Value::String(op) if op == "eq" => all,
                op => op["masked_eq"].as_u64()? & all,
            };
            let index = usize::try_from(condition["index"].as_u64()?).ok()?;
            conditions.push((index, mask, condition["val"].as_u64()?));
        }
        let comment = rule["comment"].as_str()?;
        Some(Rule {
            text: rule.to_string(),
            call: rule["syscall"].as_str()?.to_owned(),
            conditions,
            excused: NOT_SEEN_HERE.iter().any(|mark| comment.starts_with(mark)),
            used: false,
        })
    }

    fn allows(&self, call: &str, arguments: &[u64]) -> bool {
        let holds = |(index, mask, value): &(usize, u64, u64)| {
            arguments
                .get(*index)
                .is_some_and(|argument| argument & mask == *value)
        };
        self.call == call && self.conditions.iter().all(holds)
    }
}

/// The lists by thread.
struct Lists(BTreeMap<&'static str, Vec<Rule>>);

impl Lists {
    /// Those of a VMM with this C library.
    fn read(c_library: &str) -> Result<Self> {
        let read = |name: &str| -> Result<Value> {
            let path = workspace().join(format!("resources/seccomp/x86_64/{name}.json"));
            Ok(serde_json::from_slice(&fs::read(&path)?)?)
        };
        let of_library = read(c_library)?;
        let mut lists = BTreeMap::new();
        for thread in ["api", "vmm", "vcpu"] {
            let list = &read(thread)?[thread]["filter"];
            let both = rules(list).zip(rules(&of_library[thread]));
            let (mut all, more) =
                both.with_context(|| format!("{thread}, {c_library}: a rule of an unknown form"))?;
            all.extend(more);
            lists.insert(thread, all);
        }
        Ok(Lists(lists))
    }

    /// Follows one VMM's trace: what a thread does once it has its filter counts for that filter and for those it
    /// inherited.
    fn follow(&mut self, trace: &str) {
        let mut confined: BTreeMap<u32, &[&str]> = BTreeMap::new();
        let mut first = None;
        for line in trace.lines() {
            let Some(event) = Event::parse(line) else {
                continue;
            };
            let first = *first.get_or_insert(event.thread);
            // A new thread has the filter of the event loop, which started it. The API's is older than that.
            let inherited: &[&str] = match confined.contains_key(&first) && event.name != "api" {
                true => &["vmm"],
                false => &[],
            };
            let filters = *confined.get(&event.thread).unwrap_or(&inherited);
            for thread in filters {
                for rule in self.0.get_mut(thread).into_iter().flatten() {
                    rule.used |= rule.allows(event.call, &event.arguments);
                }
            }
            if event.call == "seccomp" {
                let filters: &[&str] = match event.name {
                    "api" => &["api"],
                    name if name.starts_with("vcpu") => &["vcpu", "vmm"],
                    _ => &["vmm"],
                };
                confined.insert(event.thread, filters);
            }
        }
    }

    /// Rules that were not used and should have been, and how many were not and need not.
    fn unused(&self) -> (Vec<String>, usize) {
        let unused = self
            .0
            .iter()
            .flat_map(|(thread, rules)| rules.iter().map(move |rule| (thread, rule)))
            .filter(|(_, rule)| !rule.used);
        let (excused, faults): (Vec<_>, Vec<_>) = unused.partition(|(_, rule)| rule.excused);
        let faults = faults
            .iter()
            .map(|(thread, rule)| format!("{thread}: {}", rule.text));
        (faults.collect(), excused.len())
    }
}

fn rules(list: &Value) -> Option<Vec<Rule>> {
    list.as_array()?.iter().map(Rule::parse).collect()
}

/// A line of strace's: `123<vcpu 0> ioctl(0xc, 0xae80, 0) = 0`. The end of a call that was told before is none.
struct Event<'a> {
    thread: u32,
    name: &'a str,
    call: &'a str,
    arguments: Vec<u64>,
}

impl<'a> Event<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (thread, rest) = line.split_once('<')?;
        let (name, rest) = rest.split_once('>')?;
        let (call, rest) = rest.trim_start().split_once('(')?;
        // "<... ioctl resumed>" has no name of a call in front.
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if !call.chars().all(is_name) {
            return None;
        }
        let arguments = rest.split([')', '<']).next()?;
        Some(Event {
            thread: thread.trim().parse().ok()?,
            name,
            call,
            arguments: arguments.split(',').map_while(number).collect(),
        })
    }
}

fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TRACE: &str = "\
10<lepton-vmm> read(0x3, 0x7ffc, 0x340) = 0x340
10<lepton-vmm> seccomp(0x1, 0, 0x7ffc) = 0
11<lepton-vmm> rseq(0x7f, 0x20, 0, 0x53053053) = 0
11<vcpu 0> seccomp(0x1, 0, 0x7ffc <unfinished ...>
10<lepton-vmm> mmap(0, 0x1000, 0x3, 0x22, 0xffffffff, 0 <unfinished ...>
11<vcpu 0> <... seccomp resumed>) = 0
11<vcpu 0> ioctl(0xc, 0xae80, 0) = 0
";

    fn lists() -> Lists {
        let ioctl = |number: u64| {
            json!({
                "syscall": "ioctl", "comment": "for a reason",
                "args": [{ "index": 1, "type": "dword", "op": "eq", "val": number }],
            })
        };
        let plain = |call: &str, comment: &str| json!({ "syscall": call, "comment": comment });
        let mmap = json!({
            "syscall": "mmap", "comment": "x",
            "args": [{ "index": 2, "type": "dword", "op": { "masked_eq": 4 }, "val": 0 }],
        });
        let vmm = json!([
            ioctl(0xae80),
            plain("rseq", "x"),
            plain("seccomp", "x"),
            plain("read", "x"),
            plain("brk", "Rare: x"),
            mmap
        ]);
        let vcpu = json!([ioctl(0xae80), ioctl(0xae81)]);
        let lists = [("vmm", vmm), ("vcpu", vcpu), ("api", json!([]))];
        Lists(
            lists
                .map(|(thread, list)| (thread, rules(&list).unwrap()))
                .into(),
        )
    }

    #[test]
    fn a_rule_that_nothing_uses_is_found() {
        let mut lists = lists();
        lists.follow(TRACE);
        let (unused, excused) = lists.unused();
        // What came before the filter does not count, nor does another argument.
        assert_eq!(unused.len(), 2, "{unused:?}");
        assert!(unused[0].starts_with("vcpu: ") && unused[0].contains("44673"));
        assert!(unused[1].starts_with("vmm: ") && unused[1].contains("\"read\""));
        assert_eq!(excused, 1);
    }

    #[test]
    fn a_test_program_is_not_forgotten() {
        let manifest = fs::read_to_string(workspace().join("tests/Cargo.toml")).unwrap();
        let names = manifest.lines().filter_map(|line| {
            let name = line.strip_prefix("name = \"")?;
            name.strip_suffix('"')
        });
        assert_eq!(unknown(names), Vec::<&str>::new());
        assert_eq!(
            unknown(["native_new", "lab_new"].into_iter()),
            ["native_new"]
        );
    }

    #[test]
    fn what_strace_writes_is_understood() {
        let event = Event::parse("7<vcpu 12> ioctl(0xc, 0xae80, 0 <detached ...>").unwrap();
        assert_eq!(
            (event.thread, event.name, event.call),
            (7, "vcpu 12", "ioctl")
        );
        assert_eq!(event.arguments, [12, 0xae80, 0]);
        assert!(Event::parse("7<vcpu 0> <... ioctl resumed>) = 0").is_none());
        assert!(Event::parse("7<vcpu 0> +++ exited with 0 +++").is_none());
    }

    #[test]
    fn the_lists_can_be_read() {
        for c_library in ["gnu", "musl"] {
            assert!(Lists::read(c_library).unwrap().0["vmm"].len() > 50);
        }
    }
}
