//! How long things took.

/// Times in ticks, kept in buckets no wider than a sixteenth of what is in them.
pub struct Times {
    buckets: [u32; Self::BUCKETS],
    count: u64,
    sum: u64,
    min: u64,
    max: u64,
}

impl Times {
    /// 16 for each power of two.
    const BUCKETS: usize = 61 * 16;

    /// No times.
    pub const fn new() -> Self {
        Self {
            buckets: [0; Self::BUCKETS],
            count: 0,
            sum: 0,
            min: u64::MAX,
            max: 0,
        }
    }

    fn bucket(ticks: u64) -> usize {
        let Some(octave) = ticks.max(1).ilog2().checked_sub(4) else {
            return ticks as usize;
        };
        ((octave as usize + 1) << 4) + ((ticks >> octave) & 15) as usize
    }

    /// The lowest time in a bucket.
    fn floor(bucket: usize) -> u64 {
        match (bucket >> 4).checked_sub(1) {
            None => bucket as u64,
            Some(octave) => (16 + (bucket as u64 & 15)) << octave,
        }
    }

    /// Adds one.
    pub fn add(&mut self, ticks: u64) {
        self.buckets[Self::bucket(ticks)] += 1;
        self.count += 1;
        self.sum = self.sum.saturating_add(ticks);
        self.min = self.min.min(ticks);
        self.max = self.max.max(ticks);
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// All of them together.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// The shortest, 0 if there is none.
    pub fn min(&self) -> u64 {
        if self.count == 0 { 0 } else { self.min }
    }

    /// The longest.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The time that `percent` of them do not exceed by more than a sixteenth.
    pub fn percentile(&self, percent: u64) -> u64 {
        let mut left = (self.count * percent).div_ceil(100).max(1);
        for (bucket, &count) in self.buckets.iter().enumerate() {
            let count = u64::from(count);
            if count >= left {
                return Self::floor(bucket).clamp(self.min(), self.max);
            }
            left -= count;
        }
        self.max
    }
}

impl Default for Times {
    fn default() -> Self {
        Self::new()
    }
}
