//! Statistics of a series: quantiles, and the ratio of two sides measured in the same rounds.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use statrs::distribution::{Binomial, DiscreteCDF};
use statrs::statistics::{Data, Max, Min, OrderStatistics};

/// What a series of values comes to.
///
/// Quantiles are Hyndman and Fan's type 8, as the crate `statrs` has them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// How many values.
    pub rounds: usize,
    /// The least.
    pub min: f64,
    /// The median.
    pub p50: f64,
    /// Nine tenths are less.
    pub p90: f64,
    /// All but a hundredth are less.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Of `values`; `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        let mut data = Data::new(values.to_vec());
        Some(Self {
            rounds: values.len(),
            min: data.min(),
            p50: data.percentile(50),
            p90: data.percentile(90),
            p99: data.percentile(99),
            max: data.max(),
        })
    }
}

/// The ratio of ours to another side's, pair by pair.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ratio {
    /// Rounds in which both were measured.
    pub pairs: usize,
    /// The median of the rounds' ratios.
    pub median: f64,
    /// A confidence interval of the median; none if there are fewer than six pairs.
    pub interval: Option<Interval>,
}

/// An interval that has the true median with 95 % confidence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

impl Ratio {
    /// Of pairs (ours, theirs). Pairs without a finite ratio do not count.
    pub fn of(pairs: impl IntoIterator<Item = (f64, f64)>) -> Option<Self> {
        let mut ratios: Vec<f64> = pairs
            .into_iter()
            .map(|(ours, theirs)| ours / theirs)
            .filter(|ratio| ratio.is_finite())
            .collect();
        ratios.sort_by(f64::total_cmp);
        let median = Data::new(ratios.clone()).median();
        (!ratios.is_empty()).then(|| Self {
            pairs: ratios.len(),
            median,
            interval: interval(&ratios),
        })
    }
}

/// Between order statistics, which assumes nothing about the distribution: the number of values below the median is
/// binomial with p = 1/2.
fn interval(sorted: &[f64]) -> Option<Interval> {
    const TAIL: f64 = 0.025;
    let count = sorted.len();
    let below = Binomial::new(0.5, count.try_into().ok()?).ok()?;
    // The most values that can be left out at each end.
    let left_out = (0..count / 2)
        .take_while(|&k| below.cdf(k as u64) <= TAIL)
        .count();
    let first = left_out.checked_sub(1)?;
    Some(Interval {
        low: *sorted.get(first)?,
        high: *sorted.get(count - 1 - first)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_series() {
        let values: Vec<f64> = (1..=99).rev().map(f64::from).collect();
        let summary = Summary::of(&values).unwrap();
        assert_eq!((summary.rounds, summary.min, summary.max), (99, 1.0, 99.0));
        assert!((summary.p50 - 50.0).abs() < 1e-9, "{summary:?}");
        // Type 8: h = (n + 1/3) p + 1/3.
        assert!((summary.p90 - (99.0 + 1.0 / 3.0) * 0.9 - 1.0 / 3.0).abs() < 1e-6);
        assert!(summary.p99 > 98.0 && summary.p99 <= 99.0);
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn one_value_is_all_its_quantiles() {
        let summary = Summary::of(&[7.5]).unwrap();
        assert_eq!(
            [
                summary.min,
                summary.p50,
                summary.p90,
                summary.p99,
                summary.max
            ],
            [7.5; 5]
        );
    }

    /// The ranks of the 95 % interval of a median, from published tables of the sign test (for example Conover,
    /// Practical Nonparametric Statistics): n = 6: 1 and 6; n = 10: 2 and 9; n = 20: 6 and 15; n = 100: 40 and 61.
    #[test]
    fn the_interval_is_between_the_ranks_of_the_tables() {
        for (count, low, high) in [
            (6, 1.0, 6.0),
            (10, 2.0, 9.0),
            (20, 6.0, 15.0),
            (100, 40.0, 61.0),
        ] {
            let ratio = Ratio::of((1..=count).map(|n| (f64::from(n), 1.0))).unwrap();
            assert_eq!(ratio.interval, Some(Interval { low, high }), "{count}");
        }
        let five = Ratio::of((1..=5).map(|n| (f64::from(n), 1.0))).unwrap();
        assert_eq!((five.median, five.interval), (3.0, None));
    }

    #[test]
    fn ratios_are_of_pairs_not_of_medians() {
        let ratio = Ratio::of([(1.0, 2.0), (10.0, 20.0), (100.0, 200.0)]).unwrap();
        assert_eq!((ratio.pairs, ratio.median), (3, 0.5));
    }

    #[test]
    fn what_cannot_be_divided_does_not_count() {
        assert_eq!(Ratio::of([(1.0, 0.0), (0.0, 0.0)]), None);
        assert_eq!(Ratio::of([(1.0, 0.0), (3.0, 2.0)]).unwrap().pairs, 1);
    }
}
