//! Results, and how long to go on for them.

use guest::statistics::Times;
use guest::time::{Deadline, ticks_per_second};
use guest::{arguments, boot, say};

/// When to stop: after a number of operations, or after a time.
pub struct Bound {
    count: u64,
    deadline: Option<Deadline>,
}

impl Bound {
    /// What the command line says; else `count` operations.
    pub fn from_arguments(count: u64) -> Self {
        let seconds = arguments::number("seconds", 0);
        let deadline =
            (seconds > 0).then(|| Deadline::after(seconds.saturating_mul(ticks_per_second())));
        let default = if deadline.is_some() { u64::MAX } else { count };
        Self {
            count: arguments::number("count", default),
            deadline,
        }
    }

    /// Whether to go on after `done` operations.
    pub fn allows(&self, done: u64) -> bool {
        done < self.count && !self.deadline.is_some_and(Deadline::is_over)
    }
}

/// What is told of a run.
pub struct Run<'a> {
    /// The mode.
    pub mode: &'a str,
    /// Ticks from the first to the last operation.
    pub ticks: u64,
    /// Bytes moved by all operations.
    pub bytes: u64,
    /// Operations that failed, and data that was not what it should be.
    pub errors: u64,
    /// Ticks of each operation.
    pub times: &'a Times,
}

impl Run<'_> {
    /// Tells it. `more` is further members of the JSON object, each with a comma before it.
    pub fn tell(&self, more: core::fmt::Arguments<'_>) {
        let times = self.times;
        say!(
            "PROBE {{\"mode\":\"{}\",\"ops\":{},\"bytes\":{},\"errors\":{},\"ticks\":{},\"min\":{},\"p50\":{},\
             \"p90\":{},\"p99\":{},\"max\":{}{more}}}",
            self.mode,
            times.count(),
            self.bytes,
            self.errors,
            self.ticks,
            times.min(),
            times.percentile(50),
            times.percentile(90),
            times.percentile(99),
            times.max()
        );
    }
}

/// Says what is wrong with the command line or the machine, and ends.
pub fn refuse(why: &str) -> ! {
    say!("PROBE {{\"error\":\"{why}\"}}");
    boot::reset()
}
