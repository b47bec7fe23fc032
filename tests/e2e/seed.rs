//! Chance that can be repeated: `COLDSPARE_SEED` decides.

use std::time::{SystemTime, UNIX_EPOCH};

/// A generator (splitmix64); its seed is said on standard error, which a failing test shows.
pub(crate) struct Seed(u64);

impl Seed {
    /// From `COLDSPARE_SEED`, else from the clock.
    pub(crate) fn from_env() -> Seed {
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64;
        let seed = number_from_env("COLDSPARE_SEED").unwrap_or_else(clock);
        eprintln!("COLDSPARE_SEED={seed}");
        Seed(seed)
    }

    pub(crate) fn new(seed: u64) -> Seed {
        Seed(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Bytes that don't shrink.
    pub(crate) fn noise(&mut self, len: usize) -> Vec<u8> {
        std::iter::repeat_with(|| (self.next() >> 56) as u8).take(len).collect()
    }
}

/// A setting of a test.
pub(crate) fn number_from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}
