//! Instructions of a Linux guest's whole life, counted in the lab: those of the VMM, and of the guest's kernel and agent in it, for
//! `lepton run -- true`.
//!
//! In the counted lab an instruction is a nanosecond, and the lab's kernel keeps the processor time of a cgroup, KVM's part and
//! the guest's in it. Neither the host nor its load has a share in that. Nor has what is waited for: where the timer's tick
//! falls changes the waits by milliseconds with every build.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::captured::Captured;
use super::instructions::{Counted, version};
use crate::cache::Cache;
use crate::lab::{Kernel, Lab, Place, Streams};
use crate::programs::{Profile, Programs, target};
use crate::progress::Progress;
use crate::run::Built;

/// A boot takes seconds; a machine under load may take many times that.
const TIMEOUT: Duration = Duration::from_secs(600);

/// The guests, by their memory in MiB.
const GUESTS: [(&str, &str); 2] = [("boot-128m", "128"), ("boot-512m", "512")];

/// Boots a guest with as much memory as each argument says, and writes the microseconds of each. The command line tool is not in
/// them: the VMM joins its group by itself.
const SCRIPT: &str = r#"
cat >vmm <<'end'
#!/bin/sh
echo $$ >"$group/cgroup.procs" && exec lepton-vmm "$@"
end
busybox chmod +x vmm
boot() {
	export group=/sys/fs/cgroup/$1
	mkdir "$group"
	lepton run --vmm ./vmm --kernel vmlinux --image root.erofs --memory "$2" -- true || exit
}
# The first boots after the lab's own depend on how its kernel has laid its memory out, by some percent; the fourth by some in a
# hundred thousand.
for time in 1 2 3; do
	boot "before-$time" 128
done
for memory; do
	boot "$memory" "$memory"
	sed -n 's/^usage_usec //p' "$group/cpu.stat"
done
"#;

/// Debian packages that the counts depend on: the processor, the guest's programs, source and compiler of its kernel.
const PACKAGES: [&str; 4] = [
    "qemu-system-x86",
    "busybox-static",
    "linux-source-6.1",
    "gcc",
];

/// Counts, twice: two labs that do not give the same can guard nothing.
pub fn count(progress: &Progress) -> Result<Counted> {
    let cache = Cache::open()?;
    // The tool as the tests have it, which is built anyway; the VMM as it is shipped.
    let built = Built::get(progress, Profile::Dev)?;
    let shipped = Programs::build(progress, Profile::Release, &["lepton-vmm"])?;
    let folder = tempfile::tempdir()?;
    let script = folder.path().join("boots");
    fs::write(&script, SCRIPT)?;
    let payload = vec![
        built.programs.path("lepton")?.to_owned(),
        shipped.path("lepton-vmm")?.to_owned(),
        built.kernel.vmlinux,
        built.image,
        script,
    ];
    let mut tools = tools(&Kernel::get(&cache, progress)?)?;
    tools.push(target(progress).to_owned());
    let step = progress.step("counting instructions of a boot");
    // Side by side: each has one processor.
    let (first, second) = thread::scope(|scope| {
        let second = scope.spawn(|| in_lab(&cache, &payload));
        (in_lab(&cache, &payload), second.join())
    });
    let (first, second) = (
        first?,
        second.map_err(|_| anyhow!("a lab's thread panicked"))??,
    );
    ensure!(
        first == second,
        "the counted lab is not the same in each run: microseconds of the same boots were {first:?} and {second:?}"
    );
    step.done("done");
    Ok(Counted {
        tools,
        instructions: by_name(&first)?,
    })
}

fn tools(kernel: &Kernel) -> Result<Vec<String>> {
    let shown = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${Version}\\n"])
        .args(PACKAGES)
        .output()
        .context("cannot start dpkg-query")?;
    let release = kernel.modules.file_name().unwrap_or_default();
    let mut tools = vec![
        version("rustc")?,
        format!("the lab's kernel {}", release.display()),
    ];
    let shown = String::from_utf8(shown.stdout)?;
    tools.extend(shown.lines().map(str::to_owned));
    Ok(tools)
}

/// Boots the guests in a new lab, and returns the microseconds of each.
fn in_lab(cache: &Cache, payload: &[PathBuf]) -> Result<Vec<u64>> {
    let mut command: Vec<OsString> = vec!["sh".into(), "boots".into()];
    command.extend(GUESTS.map(|(_, memory)| memory.into()));
    let (output, error) = (Captured::default(), Captured::default());
    let lab = Lab {
        command,
        environment: Vec::new(),
        place: Place::Counted {
            payload: payload.to_vec(),
        },
        memory_mib: 2048,
        timeout: Some(TIMEOUT),
    };
    let streams = Streams::Pipes {
        input: false,
        output: Box::new(output.clone()),
        error: Box::new(error.clone()),
    };
    let outcome = lab.run(cache, &Progress::new(), streams)?;
    let (output, error) = (output.text(), error.text());
    if outcome.status != 0 {
        bail!(
            "a boot in the counted lab ended with status {}:\n{output}{error}",
            outcome.status
        );
    }
    let numbers = output.lines().map(str::parse).collect::<Result<_, _>>();
    numbers.map_err(|_| anyhow!("no microseconds: {output:?}\n{error}"))
}

/// Instructions of microseconds, by the guests' names.
///
/// # Errors
/// If the guest with more memory, whose kernel has more to do, did not take more than a growth that is let pass: then the numbers
/// are not what they are thought to be, and would guard nothing.
fn by_name(microseconds: &[u64]) -> Result<BTreeMap<String, u64>> {
    let [small, large] = *microseconds else {
        bail!("counts of other than two guests: {microseconds:?}");
    };
    ensure!(
        small > 1000 && large * 100 > small * 110,
        "a boot took {small} microseconds and one with four times the memory {large}: that is not counted"
    );
    let names = GUESTS.map(|(name, _)| name.to_owned());
    Ok(names
        .into_iter()
        .zip([small * 1000, large * 1000])
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn microseconds_of_the_counted_clock_are_thousands_of_instructions() {
        let counts = by_name(&[94_346, 123_060]).unwrap();
        assert_eq!(counts["boot-128m"], 94_346_000);
        assert_eq!(counts["boot-512m"], 123_060_000);
    }

    #[test]
    fn a_count_that_does_not_see_what_the_guest_does_is_refused() {
        for useless in [&[94_346, 94_400][..], &[0, 0], &[94_346], &[]] {
            assert!(by_name(useless).is_err(), "{useless:?}");
        }
    }
}
