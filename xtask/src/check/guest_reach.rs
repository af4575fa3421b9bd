//! How much there is to look at for who asks what a guest can do: `unsafe` code, which is in few places only, and the lines
//! of code that what a guest does comes by.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::counts::Counts;
use crate::programs::workspace;
use crate::progress::Progress;

/// What this check is called on the command line.
pub const NAME: &str = "unsafe";

/// Where `unsafe` may be, as ARCHITECTURE.md has it: files, or folders with all that is in them.
const ALLOWED: [&str; 15] = [
    "agent/src/identity/random.rs",
    "agent/src/service/terminal.rs",
    "benches/src/bin/calls",
    "benches/src/bin/floor",
    "benches/src/wire.rs",
    "hostio/src",
    "jailer/src/main.rs",
    "jailer/src/process.rs",
    "vmm/src/kvm",
    "vmm/src/main.rs",
    "vmm/src/memory",
    "vmm/src/process.rs",
    "vmm/src/signal.rs",
    "vmm/src/vcpu",
    // Guests, which have no operating system.
    "tests/guests/src",
];

/// What handles a guest's exits, registers, rings and requests.
const REACHED: [&str; 4] = [
    "devices/src",
    "hostio/src",
    "vmm/src/vcpu",
    "vmm/src/events.rs",
];

/// Where both numbers stand for people.
const DOCUMENT: &str = "docs/SECURITY.md";

/// Whose `unsafe` code is in no program that is shipped.
const NOT_SHIPPED: [&str; 2] = ["benches", "tests/guests"];

/// Counts, and fails for `unsafe` code elsewhere, or if the document has other numbers.
pub fn run(progress: &Progress) -> Result<Counts> {
    let step = progress.step("counting unsafe code");
    let mut blocks: BTreeMap<String, usize> = BTreeMap::new();
    let mut lines: BTreeMap<&str, usize> = BTreeMap::new();
    let mut faults = Vec::new();
    each_file(workspace(), "", &mut |path, text| {
        let code = without_tests(text);
        let found = code.lines().filter(|line| is_unsafe(line)).count();
        if found > 0 {
            if !ALLOWED.iter().any(|place| is_in(path, place)) {
                faults.push(path.to_owned());
            }
            let package = path.split_once("/src").map_or(path, |(package, _)| package);
            *blocks.entry(package.to_owned()).or_default() += found;
        }
        if let Some(place) = REACHED.iter().find(|place| is_in(path, place)) {
            *lines.entry(place).or_default() += code.lines().filter(|line| is_code(line)).count();
        }
    })?;
    for path in &faults {
        eprintln!(
            "{path} has unsafe code, which is for {} only",
            ALLOWED.join(", ")
        );
    }
    let document = fs::read_to_string(workspace().join(DOCUMENT)).context(DOCUMENT)?;
    let stale: Vec<String> = [lines_sentence(&lines), uses_sentence(&blocks)]
        .into_iter()
        .filter(|sentence| !has_words(&document, sentence))
        .collect();
    for sentence in &stale {
        eprintln!("{DOCUMENT} has other numbers, and should say: {sentence}");
    }
    let is_good = faults.is_empty() && stale.is_empty();
    match is_good {
        true => step.done(&format!("{} uses", blocks.values().sum::<usize>())),
        false => step.failed(),
    }
    eprintln!("uses of unsafe: {}", told(&blocks));
    eprintln!(
        "lines of code that what a guest does comes by: {}",
        told(&lines)
    );
    Ok(Counts::one(is_good))
}

fn told(counts: &BTreeMap<impl AsRef<str>, usize>) -> String {
    let each = counts
        .iter()
        .map(|(name, n)| format!("{} {n}", name.as_ref()));
    let sum: usize = counts.values().sum();
    format!("{}, in all {sum}", each.collect::<Vec<_>>().join(", "))
}

/// In hundreds, so that not every change has to touch the document.
fn lines_sentence(lines: &BTreeMap<&str, usize>) -> String {
    let about = |n: usize| in_thousands(n.saturating_add(50) / 100 * 100);
    let devices = lines.get("devices/src").copied().unwrap_or_default();
    format!(
        "about {} of them, {} in `devices`",
        about(lines.values().sum()),
        about(devices)
    )
}

fn uses_sentence(blocks: &BTreeMap<String, usize>) -> String {
    let mut shipped: Vec<(&str, usize)> = blocks
        .iter()
        .map(|(package, n)| (package.as_str(), *n))
        .filter(|(package, _)| !NOT_SHIPPED.contains(package))
        .collect();
    shipped.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let sum: usize = shipped.iter().map(|(_, n)| n).sum();
    let each: Vec<String> = shipped
        .iter()
        .map(|(package, n)| format!("{n} in `{package}`"))
        .collect();
    format!(
        "used {sum} times in the programs that are shipped: {}.",
        each.join(", ")
    )
}

fn in_thousands(n: usize) -> String {
    match n {
        0..1000 => n.to_string(),
        _ => format!("{},{:03}", n / 1000, n % 1000),
    }
}

/// Whether `text` has these words one after the other, wherever its lines end.
fn has_words(text: &str, words: &str) -> bool {
    let joined = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    joined(text).contains(&joined(words))
}

fn is_in(path: &str, place: &str) -> bool {
    path.strip_prefix(place)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Every source file below `folder` that is no test.
fn each_file(root: &Path, folder: &str, look: &mut impl FnMut(&str, &str)) -> Result<()> {
    let full = root.join(folder);
    let entries = fs::read_dir(&full).with_context(|| full.display().to_string())?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = match folder {
            "" => name.clone(),
            _ => format!("{folder}/{name}"),
        };
        let is_test = matches!(name.as_str(), "tests" | "tests.rs") && folder.contains("/src");
        if name.starts_with('.') || name == "target" || is_test {
            continue;
        }
        if entry.file_type()?.is_dir() {
            each_file(root, &path, look)?;
        } else if name.ends_with(".rs") && path.contains("/src/") {
            let text = fs::read_to_string(entry.path()).with_context(|| path.clone())?;
            look(&path, &text);
        }
    }
    Ok(())
}

/// A module of tests is the last thing in a file.
fn without_tests(text: &str) -> &str {
    let end = text.find("#[cfg(test)]\nmod tests {");
    text.get(..end.unwrap_or(text.len())).unwrap_or(text)
}

fn is_code(line: &str) -> bool {
    let line = line.trim();
    !line.is_empty() && !line.starts_with("//")
}

/// As rustfmt writes it, at the beginning or after other code: a block, a function, an implementation, an attribute or a foreign block.
fn is_unsafe(line: &str) -> bool {
    const FORMS: [&str; 5] = ["{", "fn", "impl", "extern", "trait"];
    let code = line.split("//").next().unwrap_or_default();
    // What stands in a text is no code.
    let code = code.split('"').next().unwrap_or_default();
    let mut words = code.split_whitespace().peekable();
    let mut is_found = code.contains("#[unsafe(");
    while let Some(word) = words.next() {
        is_found |= word.ends_with("unsafe")
            && words
                .peek()
                .is_some_and(|next| FORMS.iter().any(|form| next.starts_with(form)));
    }
    is_found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uses_are_told_from_words() {
        for line in [
            "    let x = unsafe { read(p) };",
            "unsafe impl Send for Flag {}",
            "pub unsafe fn map_over(",
            "#[unsafe(no_mangle)]",
        ] {
            assert!(is_unsafe(line), "{line}");
        }
        for line in [
            "#![allow(unsafe_code)] // ioctl",
            "// SAFETY: unsafe { } is fine",
            "unsafe_op_in_unsafe_fn = 1",
        ] {
            assert!(!is_unsafe(line), "{line}");
        }
    }

    #[test]
    fn tests_and_comments_are_no_code() {
        let text = "//! Words.\n\nfn f() {}\n\n#[cfg(test)]\nmod tests {\n    fn g() {}\n}\n";
        let code = without_tests(text);
        assert_eq!(code.lines().filter(|line| is_code(line)).count(), 1);
    }

    #[test]
    fn the_document_is_told_what_to_say() {
        let lines = BTreeMap::from([("devices/src", 9_512), ("vmm/src/vcpu", 700)]);
        let sentence = lines_sentence(&lines);
        assert_eq!(sentence, "about 10,200 of them, 9,500 in `devices`");
        let blocks = [("agent", 3), ("benches", 20), ("vmm", 49)];
        let blocks = blocks.map(|(package, n)| (package.to_owned(), n)).into();
        assert_eq!(
            uses_sentence(&blocks),
            "used 52 times in the programs that are shipped: 49 in `vmm`, 3 in `agent`."
        );
    }

    #[test]
    fn words_are_found_across_lines() {
        assert!(has_words("It is\nused 52\n times.", "used 52 times"));
        assert!(!has_words("It is used 152 times.", "used 52 times"));
        assert!(!has_words("It is used 52 times", "used 53 times"));
    }

    #[test]
    fn places_are_whole_names() {
        assert!(is_in("vmm/src/main.rs", "vmm/src/main.rs"));
        assert!(is_in("vmm/src/kvm/mod.rs", "vmm/src/kvm"));
        assert!(!is_in("vmm/src/kvmish.rs", "vmm/src/kvm"));
    }

    #[test]
    fn every_place_is_there() {
        for place in ALLOWED.iter().chain(&REACHED) {
            assert!(workspace().join(place).exists(), "{place}");
        }
    }
}
