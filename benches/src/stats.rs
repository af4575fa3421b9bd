//! Figures of a series of durations.

use std::time::Duration;

/// Durations of one thing, round by round.
#[derive(Default)]
pub struct Series {
    samples: Vec<Duration>,
}

impl Series {
    /// Adds one round's.
    pub fn push(&mut self, sample: Duration) {
        self.samples.push(sample);
    }

    /// The value below which `percent` of the samples lie (nearest rank), in milliseconds.
    pub fn percentile(&self, percent: u64) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort();
        let rank = (sorted.len() as u64 * percent).div_ceil(100).max(1);
        let index = usize::try_from(rank - 1).unwrap_or(usize::MAX);
        let sample = sorted.get(index.min(sorted.len().saturating_sub(1)));
        sample.map_or(f64::NAN, |s| s.as_secs_f64() * 1e3)
    }

    /// One line: rounds, min, p50, p90, p99, max in milliseconds.
    pub fn line(&self, name: &str) -> String {
        format!(
            "{name:<34} {:>6} {:>9.3} {:>9.3} {:>9.3} {:>9.3} {:>9.3}",
            self.samples.len(),
            self.percentile(0),
            self.percentile(50),
            self.percentile(90),
            self.percentile(99),
            self.percentile(100),
        )
    }

    /// What [`Series::line`] has in its columns.
    pub fn header() -> String {
        format!(
            "{:<34} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "milliseconds", "rounds", "min", "p50", "p90", "p99", "max"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let mut series = Series::default();
        for ms in (1..=100).rev() {
            series.push(Duration::from_millis(ms));
        }
        let all = [0, 1, 50, 90, 99, 100].map(|p| series.percentile(p).round() as u64);
        assert_eq!(all, [1, 1, 50, 90, 99, 100]);
        assert!(Series::default().percentile(50).is_nan());
    }
}
