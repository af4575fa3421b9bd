//! Checks of the lab: what the tests in it, and the measurements, rely on. That of the counted lab is where boots are counted.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::captured::Captured;
use super::counts::Counts;
use crate::cache::Cache;
use crate::lab::{Lab, LabError, Outcome, Place, Share, Streams};
use crate::progress::Progress;

/// A boot takes seconds; a machine under load may take many times that.
const TIMEOUT: Duration = Duration::from_secs(300);

/// Runs all of them.
pub fn run(progress: &Progress) -> Result<Counts> {
    let cache = Cache::open()?;
    let mut counts = Counts::default();
    for (what, check) in [
        (
            "checking the lab: status, streams, files",
            passes_through as fn(&Cache) -> Result<()>,
        ),
        ("checking the lab: a crash and a timeout", ends),
    ] {
        let step = progress.step(what);
        match check(&cache) {
            Ok(()) => counts += Counts::one(true),
            Err(error) => {
                step.failed();
                eprintln!("{error:#}");
                counts += Counts::one(false);
            }
        }
    }
    Ok(counts)
}

struct Ran {
    result: Result<Outcome, LabError>,
    output: String,
    error: String,
}

fn in_lab(cache: &Cache, place: Place, timeout: Duration, command: &[&str]) -> Ran {
    let (output, error) = (Captured::default(), Captured::default());
    let lab = Lab {
        command: command.iter().map(OsString::from).collect(),
        environment: vec![("LAB_TEST".into(), "it's \"quoted\" $HOME".into())],
        place,
        memory_mib: 1024,
        timeout: Some(timeout),
    };
    let streams = Streams::Pipes {
        input: false,
        output: Box::new(output.clone()),
        error: Box::new(error.clone()),
    };
    Ran {
        result: lab.run(cache, &Progress::new(), streams),
        output: output.text(),
        error: error.text(),
    }
}

fn host(directory: &Path, shares: Vec<Share>) -> Place {
    Place::Host {
        directory: directory.to_path_buf(),
        shares,
        cpus: 2,
    }
}

fn passes_through(cache: &Cache) -> Result<()> {
    const SCRIPT: &str = "
        pwd; printf '%s\\n' \"$LAB_TEST\"; cat
        echo error >/dev/stderr
        test -c /dev/kvm && grep -q svm /proc/cpuinfo && echo kvm
        grep -o 'Cpus_allowed_list.*' /proc/self/status
        cat /proc/sys/kernel/softlockup_panic /proc/sys/kernel/watchdog_thresh
        ls -l /proc/[0-9]*/fd 2>/dev/null | grep -c kvm-vcpu:
        echo kept >kept/file; echo lost >lost; cat lost
        (echo x >seen/file) 2>/dev/null || echo read-only
        sleep 1000 &
        exit 42";
    let folder = tempfile::tempdir()?;
    let path = fs::canonicalize(folder.path())?;
    let mut shares = Vec::new();
    for (name, writable) in [("kept", true), ("seen", false)] {
        fs::create_dir(path.join(name))?;
        shares.push(Share {
            folder: path.join(name),
            writable,
        });
    }
    let ran = in_lab(cache, host(&path, shares), TIMEOUT, &["sh", "-c", SCRIPT]);
    let status = ran.result?.status;
    ensure!(
        status == 42,
        "the exit status is not 42 but {status}: {:?} {:?}",
        ran.output,
        ran.error
    );
    let expected = format!(
        "{}\nit's \"quoted\" $HOME\nkvm\nCpus_allowed_list:\t1-2\n1\n30\n1\nlost\nread-only\n",
        path.display()
    );
    ensure!(ran.output == expected, "stdout: {:?}", ran.output);
    ensure!(ran.error == "error\n", "stderr: {:?}", ran.error);
    ensure!(
        fs::read(path.join("kept/file"))? == b"kept\n",
        "a writable share kept nothing"
    );
    ensure!(
        !path.join("lost").exists(),
        "the overlay let a write through"
    );
    Ok(())
}

fn ends(cache: &Cache) -> Result<()> {
    let place = || host(Path::new("/"), Vec::new());
    let crash = "echo last words; echo c >/proc/sysrq-trigger";
    let ran = in_lab(cache, place(), TIMEOUT, &["sh", "-c", crash]);
    match ran.result {
        Err(LabError::Crashed { console, .. }) => {
            ensure!(console.contains("Kernel panic"), "console: {console}");
            ensure!(ran.output == "last words\n", "stdout: {:?}", ran.output);
        }
        other => anyhow::bail!("a crash gave {other:?}"),
    }
    let ran = in_lab(cache, place(), Duration::from_millis(300), &["true"]);
    ensure!(
        matches!(ran.result, Err(LabError::TimedOut { .. })),
        "a timeout gave {:?}",
        ran.result
    );
    Ok(())
}
