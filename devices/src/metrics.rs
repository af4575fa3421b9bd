//! Counters that devices keep and the VMM reports.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows. Shared between the thread that counts and the thread that reports.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`, wrapping at 2^64.
    pub fn add(&self, n: u64) {
        // Relaxed: a counter orders nothing.
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A named set of counters.
pub trait MetricGroup: Send + Sync {
    /// Calls `f` with each counter's name and value, in the order of declaration.
    fn visit(&self, f: &mut dyn FnMut(&'static str, u64));
}

/// Declares a struct of [`Counter`]s and its [`MetricGroup`]; the field names are the names reported.
#[macro_export]
macro_rules! counters {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* $field:ident),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Default)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $crate::metrics::Counter,)+
        }

        impl $crate::metrics::MetricGroup for $name {
            fn visit(&self, f: &mut dyn FnMut(&'static str, u64)) {
                $(f(stringify!($field), self.$field.get());)+
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::MetricGroup;

    counters! {
        /// Two counters.
        pub struct Two {
            /// First.
            first,
            /// Second.
            second,
        }
    }

    #[test]
    fn visits_in_order() {
        let two = Two::default();
        two.second.add(7);
        two.first.inc();
        let mut seen = Vec::new();
        two.visit(&mut |name, value| seen.push((name, value)));
        assert_eq!(seen, [("first", 1), ("second", 7)]);
    }
}
