//! Counts of tests, read from what libtest prints.

use std::fmt;
use std::ops::AddAssign;

/// How many tests ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Those that held.
    pub passed: u64,
    /// Those that did not, and programs that ended without saying.
    pub failed: u64,
    /// Those not run.
    pub skipped: u64,
}

impl Counts {
    /// One check that held, or did not.
    pub fn one(passed: bool) -> Self {
        Self {
            passed: u64::from(passed),
            failed: u64::from(!passed),
            skipped: 0,
        }
    }

    /// The sum of all result lines in `output`, of programs that together ended with `success`.
    ///
    /// A program that fails without a failed test (it crashed, or did not build) counts as one failure.
    pub fn of_output(output: &str, success: bool) -> Self {
        let mut sum = Self::default();
        for counts in output.lines().filter_map(parse) {
            sum += counts;
        }
        if !success && sum.failed == 0 {
            sum.failed = 1;
        }
        sum
    }
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`
fn parse(line: &str) -> Option<Counts> {
    let (_, results) = line
        .trim()
        .strip_prefix("test result: ")?
        .split_once(". ")?;
    let mut counts = Counts::default();
    for result in results.split("; ") {
        let Some((number, what)) = result.split_once(' ') else {
            continue;
        };
        let field = match what {
            "passed" => &mut counts.passed,
            "failed" => &mut counts.failed,
            "ignored" => &mut counts.skipped,
            _ => continue,
        };
        *field = number.parse().ok()?;
    }
    Some(counts)
}

impl AddAssign for Counts {
    fn add_assign(&mut self, more: Self) {
        self.passed += more.passed;
        self.failed += more.failed;
        self.skipped += more.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 2 tests
test a ... ok
test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 9 filtered out; finished in 1.00s
";

    #[test]
    fn results_are_summed() {
        let expected = Counts {
            passed: 5,
            failed: 2,
            skipped: 1,
        };
        assert_eq!(Counts::of_output(OUTPUT, false), expected);
        assert_eq!(Counts::of_output(OUTPUT, true), expected);
    }

    #[test]
    fn a_crash_is_a_failure() {
        assert_eq!(Counts::of_output("running 3 tests\n", false).failed, 1);
        assert_eq!(Counts::of_output("", true), Counts::default());
    }

    #[test]
    fn the_closing_line_has_its_form() {
        let counts = Counts {
            passed: 12,
            failed: 0,
            skipped: 3,
        };
        assert_eq!(counts.to_string(), "12 passed, 0 failed, 3 skipped");
    }
}
