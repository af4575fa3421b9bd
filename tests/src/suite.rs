//! A test program: its tests, and what they need of the host.

use std::path::Path;
use std::process::ExitCode;

use landlock::{AccessFs, Ruleset, RulesetAttr, RulesetStatus};
use libtest_mimic::{Arguments, Trial};

use crate::origin::Origin;
use crate::{programs, reaper};

/// What a test needs and a host may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// A `/dev/kvm` that can be opened; an emulated one will do.
    Kvm,
    /// KVM with the processor's help, on which Linux boots in useful time.
    HardwareKvm,
    /// The right to make network devices.
    Root,
    /// A kernel that lets a process give up files.
    Landlock,
    /// A kernel that lets a thread ask for shorter slices (Linux 6.12), and tells of them in /proc.
    Slices,
    /// A program in the `PATH`.
    Program(&'static str),
    /// An environment variable with the path of an existing file, such as a kernel.
    File(&'static str),
}

impl Need {
    /// Why the need is not met, if it is not.
    pub fn missing(self) -> Option<String> {
        match self {
            Need::Kvm => programs::kvm().err(),
            Need::HardwareKvm => programs::hardware_kvm().err(),
            Need::Root => (!rustix::process::geteuid().is_root()).then(|| "needs root".to_owned()),
            Need::Landlock => (!has_landlock()).then(|| "the kernel has no Landlock".to_owned()),
            Need::Slices => {
                (!has_slices()).then(|| "the kernel has no slices to ask for".to_owned())
            }
            Need::Program(name) => {
                (!programs::is_in_path(name)).then(|| format!("there is no program {name}"))
            }
            Need::File(variable) => match std::env::var_os(variable) {
                None => Some(format!("{variable} is not set")),
                Some(path) if Path::new(&path).is_file() => None,
                Some(path) => Some(format!("{variable}: there is no file {}", path.display())),
            },
        }
    }
}

fn has_slices() -> bool {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let version = (numbers.next(), numbers.next());
    let tells =
        std::fs::read_to_string("/proc/self/sched").is_ok_and(|text| text.contains("se.slice"));
    tells
        && matches!(version, (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (6u32, 12u32))
}

/// On a thread of its own, which gives up files to see.
fn has_landlock() -> bool {
    let restrict = || {
        let ruleset = Ruleset::default().handle_access(AccessFs::ReadFile)?;
        ruleset.create()?.restrict_self()
    };
    let status = std::thread::spawn(restrict).join();
    matches!(status, Ok(Ok(status)) if status.ruleset != RulesetStatus::NotEnforced)
}

/// One test.
pub struct Test {
    name: &'static str,
    needs: Vec<Need>,
    origins: &'static [Origin],
    run: fn(),
}

impl Test {
    /// A test that fails by a panic. [`test!`](crate::test) names it after its function.
    pub fn new(name: &'static str, run: fn()) -> Self {
        Self {
            name,
            needs: Vec::new(),
            origins: &[Origin::Booted],
            run,
        }
    }

    /// Adds a need.
    #[must_use]
    pub fn needs(mut self, need: Need) -> Self {
        self.needs.push(need);
        self
    }

    /// Lets the test run three times: on a machine that boots, on one that was saved and loaded, and on a clone.
    #[must_use]
    pub fn of_every_origin(mut self) -> Self {
        self.origins = &Origin::ALL;
        self
    }

    fn trials(&self, common: &[Need]) -> impl Iterator<Item = Trial> {
        let trial = |origin: &Origin| self.trial(*origin, common);
        self.origins.iter().map(trial)
    }

    fn trial(&self, origin: Origin, common: &[Need]) -> Trial {
        let run = self.run;
        let name = format!("{}{}", self.name, origin.suffix());
        let trial = Trial::test(name.clone(), move || {
            origin.set();
            run();
            Ok(())
        });
        let missing = common
            .iter()
            .chain(&self.needs)
            .find_map(|need| need.missing());
        match missing {
            None => trial,
            Some(reason) => {
                eprintln!("SKIPPED: {name}: {reason}");
                trial.with_ignored_flag(true)
            }
        }
    }
}

/// A test of a function's name.
#[macro_export]
macro_rules! test {
    ($function:ident) => {
        $crate::suite::Test::new(stringify!($function), $function)
    };
}

/// How many tests run at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As many as the machine has processors.
    Together,
    /// One after the other: for tests that compare times.
    OneByOne,
}

/// Runs `tests`, all of which need `common`, as libtest would.
pub fn run<const N: usize>(order: Order, common: &[Need], tests: [Test; N]) -> ExitCode {
    if reaper::serves() {
        return ExitCode::SUCCESS;
    }
    let mut arguments = Arguments::from_args();
    if order == Order::OneByOne && arguments.test_threads.is_none() {
        arguments.test_threads = Some(1);
    }
    // To list tests is not to skip any.
    let common = if arguments.list { &[] } else { common };
    let trials = tests.iter().flat_map(|test| test.trials(common)).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let missing = |need: Need| need.missing().unwrap_or_default();
        assert_eq!(missing(Need::Program("sh")), "");
        assert!(missing(Need::Program("no-such-program")).contains("no-such-program"));
        assert!(missing(Need::File("NO_SUCH_VARIABLE")).contains("NO_SUCH_VARIABLE"));
    }

    #[test]
    fn a_test_whose_need_is_not_met_is_not_run() {
        fn fails() {
            panic!("it was run");
        }
        let need = Need::Program("no-such-program");
        let skipped = test!(fails).needs(need).trial(Origin::Booted, &[]);
        assert!(skipped.has_ignored_flag());
        let every = test!(fails).of_every_origin();
        let skipped: Vec<Trial> = every.trials(&[need]).collect();
        assert_eq!(skipped.len(), 3);
        assert!(skipped.iter().all(Trial::has_ignored_flag));
        assert!(every.trials(&[]).all(|trial| !trial.has_ignored_flag()));
    }
}
