//! Sums and gauges as OpenMetrics text (OpenMetrics 1.0).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use lepton_api::types::{Divergence, Shares};

use super::Groups;

/// The media type.
pub const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The text, but for its end.
pub struct OpenMetrics {
    id: String,
    text: String,
}

impl OpenMetrics {
    /// The sums of `groups`, of the machine `id`.
    pub(super) fn new(id: &str, groups: Groups) -> Self {
        let mut families: BTreeMap<String, Vec<(String, u64)>> = BTreeMap::new();
        for (name, group) in groups {
            let (family, device) = match name.split_once('_') {
                Some((family @ ("block" | "net"), device)) => (family, device),
                _ => (name.as_str(), ""),
            };
            group.visit(&mut |metric, value| {
                families
                    .entry(format!("lepton_{family}_{metric}"))
                    .or_default()
                    .push((device.to_owned(), value));
            });
        }
        let mut text = String::new();
        for (family, samples) in families {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# TYPE {family} counter");
            for (device, value) in samples {
                let device = match device.as_str() {
                    "" => String::new(),
                    device => format!(",device=\"{device}\""),
                };
                let _ = writeln!(text, "{family}_total{{id=\"{id}\"{device}}} {value}");
            }
        }
        Self {
            id: id.to_owned(),
            text,
        }
    }

    /// With what of memory and drives is the machine's alone, and what it has in common with others.
    #[must_use]
    pub fn with(mut self, divergence: &Divergence) -> Self {
        let Divergence { memory, drives } = divergence;
        let Self { id, text } = &mut self;
        type Part = fn(&Shares) -> u64;
        let parts: [(&str, Part); 2] = [
            ("private", |shares| shares.private_bytes),
            ("shared", |shares| shares.shared_bytes),
        ];
        for (name, part) in parts {
            if let Some(shares) = memory {
                let family = format!("lepton_memory_{name}_bytes");
                // Writing to a String cannot fail.
                let _ = writeln!(text, "# TYPE {family} gauge\n# UNIT {family} bytes");
                let _ = writeln!(text, "{family}{{id=\"{id}\"}} {}", part(shares));
            }
            if !drives.is_empty() {
                let family = format!("lepton_block_{name}_bytes");
                let _ = writeln!(text, "# TYPE {family} gauge\n# UNIT {family} bytes");
            }
            for drive in drives {
                let device = &drive.drive_id;
                let value = part(&drive.shares);
                let _ = writeln!(
                    text,
                    "lepton_block_{name}_bytes{{id=\"{id}\",device=\"{device}\"}} {value}"
                );
            }
        }
        self
    }

    /// All of it.
    pub fn finish(self) -> String {
        self.text + "# EOF\n"
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lepton_api::types::DriveDivergence;
    use lepton_devices::counters;

    use super::*;

    counters! {
        /// A drive's.
        pub struct Drive {
            /// Reads.
            read_count,
        }
    }

    #[test]
    fn open_metrics_has_sums_one_family_a_metric() {
        let (a, b) = (Arc::new(Drive::default()), Arc::new(Drive::default()));
        let groups: Groups = vec![("block_a".into(), a.clone()), ("block_b".into(), b)];
        a.read_count.add(3);
        let shares = Shares {
            private_bytes: 4096,
            shared_bytes: 8192,
        };
        let divergence = Divergence {
            memory: Some(shares),
            drives: vec![DriveDivergence {
                drive_id: "a".into(),
                shares,
            }],
        };
        let text = OpenMetrics::new("vm", groups).with(&divergence).finish();
        assert!(text.contains("# TYPE lepton_memory_private_bytes gauge\n"));
        assert!(text.contains("lepton_memory_shared_bytes{id=\"vm\"} 8192\n"));
        assert!(text.contains("lepton_block_private_bytes{id=\"vm\",device=\"a\"} 4096\n"));
        let family = "lepton_block_read_count";
        assert_eq!(text.matches(&format!("# TYPE {family} counter")).count(), 1);
        assert!(text.contains(&format!("{family}_total{{id=\"vm\",device=\"a\"}} 3\n")));
        assert!(text.ends_with("# EOF\n"));
    }
}
