//! Brakes: how much a changeset takes from the standby, and from how much on a person is asked first (G5).
//!
//! A deletion of half a home arrives as many small changesets. So what counts is what was taken within the last while, a
//! ledger of minutes, together with the changeset at hand.
//!
//! Decides from counts and samples; it knows neither files nor clocks.
//!
//! Invariants: a changeset that takes nothing is never held back; what was accepted is not counted again.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::seeded_bug;

/// What is taken from one root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Toll {
    /// Files outside of repositories that go.
    pub removed_files: u64,
    /// Repositories that go, or lose what makes them one.
    pub removed_repositories: u64,
    /// Files outside of repositories whose new content looks encrypted, and whose old content did not.
    pub scrambled_files: u64,
    /// Whether nothing is left of the root.
    pub empties: bool,
}

impl Toll {
    /// What is taken beyond `other`.
    pub fn beyond(&self, other: &Toll) -> Toll {
        Toll {
            removed_files: self.removed_files.saturating_sub(other.removed_files),
            removed_repositories: self.removed_repositories.saturating_sub(other.removed_repositories),
            scrambled_files: self.scrambled_files.saturating_sub(other.scrambled_files),
            empties: self.empties && !other.empties,
        }
    }
}

/// From how much on a person is asked. Counts are of one root, within [`Limits::window_minutes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files that may go without a question.
    pub removed_files: u64,
    /// Of a small root, the share of its entries that may go, in percent; never fewer than [`FEW`] files.
    pub removed_percent: u64,
    /// Repositories that may go without a question.
    pub removed_repositories: u64,
    /// Files that may get content that looks encrypted.
    pub scrambled_files: u64,
    /// How far back what was taken counts.
    pub window_minutes: u64,
}

/// So many files may always go.
pub const FEW: u64 = 100;

impl Default for Limits {
    fn default() -> Limits {
        Limits { removed_files: 1_000, removed_percent: 10, removed_repositories: 10, scrambled_files: 100, window_minutes: 60 }
    }
}

impl Limits {
    /// How many entries a root must have for its share not to matter.
    pub fn entries_of_large_root(&self) -> u64 {
        self.removed_files.saturating_mul(100).div_ceil(self.removed_percent.max(1))
    }

    /// What is too much about taking `toll` from a root of `entries` entries, of which `before` was taken within the window;
    /// `None` when it is not.
    pub fn judge(&self, before: &Toll, toll: &Toll, entries: u64) -> Option<Excess> {
        let share = (entries.saturating_mul(self.removed_percent) / 100).max(FEW);
        let is_over = |now: u64, before: u64, limit: u64| now > 0 && now.saturating_add(before) > limit;
        let files_max = self.removed_files.min(share);
        let excess = Excess {
            files: is_over(toll.removed_files, before.removed_files, files_max).then_some(toll.removed_files),
            repositories: is_over(toll.removed_repositories, before.removed_repositories, self.removed_repositories)
                .then_some(toll.removed_repositories),
            scrambled: is_over(toll.scrambled_files, before.scrambled_files, self.scrambled_files).then_some(toll.scrambled_files),
            empties: toll.empties,
            before: *before,
            limits: Limits { removed_files: files_max, ..*self },
        };
        let is_none = excess.files.is_none() && excess.repositories.is_none() && excess.scrambled.is_none() && !excess.empties;
        (!is_none && !seeded_bug!(BrakesAreOff)).then_some(excess)
    }
}

/// What is too much about a changeset, in one root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Excess {
    files: Option<u64>,
    repositories: Option<u64>,
    scrambled: Option<u64>,
    empties: bool,
    before: Toll,
    /// With the share of this root taken into account.
    limits: Limits,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.empties {
            parts.push("nothing would be left of it".to_string());
        }
        let Limits { window_minutes, removed_files, removed_repositories, scrambled_files, .. } = self.limits;
        let mut part = |count: Option<u64>, [one, many]: [&str; 2], what: &str, before: u64, limit: u64| {
            let Some(count) = count else { return };
            let noun = if count == 1 { one } else { many };
            let earlier = if before > 0 { format!(", after {before} in the last {window_minutes} minutes") } else { String::new() };
            parts.push(format!("{count} {noun} would {what}{earlier} (limit {limit})"));
        };
        part(self.repositories, ["repository", "repositories"], "go", self.before.removed_repositories, removed_repositories);
        part(self.files, ["file", "files"], "go", self.before.removed_files, removed_files);
        let what = "get content that looks encrypted";
        part(self.scrambled, ["file", "files"], what, self.before.scrambled_files, scrambled_files);
        f.write_str(&parts.join("; "))
    }
}

/// What was taken from one root, by minute.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ledger {
    /// Minutes since 1970 on the standby's clock, ascending, and what was taken in each.
    minutes: Vec<(u64, Toll)>,
}

impl Ledger {
    /// What was taken within the last `window` minutes. A clock that was set back doesn't shorten anything's stay.
    pub fn within(&self, now: u64, window: u64) -> Toll {
        let mut sum = Toll::default();
        for (_, toll) in self.minutes.iter().filter(|(minute, _)| minute.saturating_add(window) > now) {
            sum.removed_files = sum.removed_files.saturating_add(toll.removed_files);
            sum.removed_repositories = sum.removed_repositories.saturating_add(toll.removed_repositories);
            sum.scrambled_files = sum.scrambled_files.saturating_add(toll.scrambled_files);
        }
        sum
    }

    /// Adds what is taken `now`, and forgets what is older than `window` minutes. Size: one entry a minute of the window.
    pub fn add(&mut self, now: u64, window: u64, toll: &Toll) {
        // What the clock put into the future counts from now on.
        self.minutes.iter_mut().for_each(|(minute, _)| *minute = (*minute).min(now));
        self.minutes.retain(|(minute, _)| minute.saturating_add(window) > now);
        let taken = Toll { empties: false, ..*toll };
        if taken == Toll::default() {
            return;
        }
        self.minutes.push((now, taken));
        self.minutes.sort_by_key(|(minute, _)| *minute);
        self.minutes.dedup_by(|later, earlier| {
            let is_same = later.0 == earlier.0;
            if is_same {
                earlier.1.removed_files = earlier.1.removed_files.saturating_add(later.1.removed_files);
                earlier.1.removed_repositories = earlier.1.removed_repositories.saturating_add(later.1.removed_repositories);
                earlier.1.scrambled_files = earlier.1.scrambled_files.saturating_add(later.1.scrambled_files);
            }
            is_same
        });
    }

    /// Forgets all: a person has seen it.
    pub fn clear(&mut self) {
        self.minutes.clear();
    }
}

/// Bytes from a file's beginning that its content is judged by.
pub const SAMPLE_BYTES: usize = 4096;
/// Samples shorter than this tell nothing.
const SAMPLE_BYTES_MIN: usize = 64;

/// Whether content that begins with `new` looks like an encrypted form of what began with `old`: it has neither structure
/// nor the beginning of a format that is compressed, and `old` had one of them.
pub fn looks_scrambled(old: &[u8], new: &[u8]) -> bool {
    const COMPRESSED: [&[u8]; 10] = [
        b"PK\x03\x04",         // zip, jar, office documents
        b"\x1f\x8b",           // gzip
        b"\x89PNG",            // PNG
        b"\xff\xd8\xff",       // JPEG
        b"GIF8",               // GIF
        b"RIFF",               // WebP
        b"\x28\xb5\x2f\xfd",   // zstd
        b"\xfd7zXZ",           // xz
        b"BZh",                // bzip2
        b"7z\xbc\xaf\x27\x1c", // 7-Zip
    ];
    let is_known = |sample: &[u8]| COMPRESSED.iter().any(|magic| sample.starts_with(magic));
    is_noise(new) && !is_known(new) && (!is_noise(old) || is_known(old))
}

/// Whether bytes are spread as evenly as those of a cipher.
fn is_noise(sample: &[u8]) -> bool {
    if sample.len() < SAMPLE_BYTES_MIN {
        return false;
    }
    let mut counts = [0u32; 256];
    sample.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
    let len = sample.len() as f64;
    let entropy: f64 = counts.iter().filter(|c| **c > 0).map(|c| f64::from(*c) / len).map(|share| -share * share.log2()).sum();
    let highest = len.min(256.0).log2();
    entropy > 0.88 * highest
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Toll = Toll { removed_files: 0, removed_repositories: 0, scrambled_files: 0, empties: false };

    #[track_caller]
    fn check(before: Toll, toll: Toll, entries: u64, expected: &str) {
        let found = Limits::default().judge(&before, &toll, entries).map(|excess| excess.to_string());
        assert_eq!(found.unwrap_or_default(), expected);
    }

    #[test]
    fn a_person_is_asked_from_the_limit_on() {
        let files = |removed_files| Toll { removed_files, ..NONE };
        let repositories = |removed_repositories| Toll { removed_repositories, ..NONE };
        let scrambled = |scrambled_files| Toll { scrambled_files, ..NONE };
        check(NONE, files(1_000), 1_000_000, "");
        check(NONE, files(1_001), 1_000_000, "1001 files would go (limit 1000)");
        check(files(990), files(11), 1_000_000, "11 files would go, after 990 in the last 60 minutes (limit 1000)");
        check(files(990), files(10), 1_000_000, "");
        check(NONE, files(100), 300, ""); // few enough, whatever the share
        check(NONE, files(101), 300, "101 files would go (limit 100)");
        check(NONE, files(300), 3_000, "");
        check(NONE, files(301), 3_000, "301 files would go (limit 300)");
        check(NONE, repositories(10), 50, "");
        check(repositories(7), repositories(4), 50, "4 repositories would go, after 7 in the last 60 minutes (limit 10)");
        check(repositories(10), repositories(1), 50, "1 repository would go, after 10 in the last 60 minutes (limit 10)");
        check(NONE, scrambled(101), 1_000_000, "101 files would get content that looks encrypted (limit 100)");
        check(NONE, Toll { empties: true, removed_files: 3, ..NONE }, 4, "nothing would be left of it");
    }

    #[test]
    fn a_changeset_that_takes_nothing_passes_whatever_went_before() {
        check(Toll { removed_files: 5_000, removed_repositories: 50, scrambled_files: 500, empties: false }, NONE, 10, "");
    }

    #[test]
    fn the_ledger_forgets_what_is_old() {
        let mut ledger = Ledger::default();
        let toll = Toll { removed_files: 3, scrambled_files: 1, ..NONE };
        ledger.add(100, 60, &toll);
        ledger.add(100, 60, &toll);
        ledger.add(150, 60, &toll);
        assert_eq!((ledger.within(150, 60).removed_files, ledger.minutes.len()), (9, 2));
        assert_eq!(ledger.within(159, 60).removed_files, 9);
        assert_eq!(ledger.within(160, 60).removed_files, 3);
        ledger.add(160, 60, &NONE);
        assert_eq!(ledger.minutes.len(), 1);
        ledger.clear();
        assert_eq!(ledger.within(160, 60), NONE);
    }

    #[test]
    fn a_clock_that_is_set_back_or_far_ahead_hides_nothing_for_long() {
        let mut ledger = Ledger::default();
        let toll = Toll { removed_files: 3, ..NONE };
        ledger.add(10_000, 60, &toll);
        assert_eq!(ledger.within(100, 60).removed_files, 3);
        ledger.add(100, 60, &toll);
        assert_eq!(ledger.within(100, 60).removed_files, 6);
        assert_eq!(ledger.within(160, 60), NONE);
    }

    #[test]
    fn content_that_becomes_noise_is_told_from_content_that_changes() {
        let text = b"The quick brown fox jumps over the lazy dog, again and again and again. ".repeat(60);
        let mut state = 9u64;
        let mut noise = |len: usize| -> Vec<u8> {
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            };
            (0..len).map(|_| next()).collect()
        };
        let png = |tail: Vec<u8>| [&b"\x89PNG"[..], &tail].concat();
        let zip = |tail: Vec<u8>| [&b"PK\x03\x04"[..], &tail].concat();
        assert!(looks_scrambled(&text, &noise(4096)));
        assert!(looks_scrambled(&text[..200], &noise(200)));
        assert!(looks_scrambled(&png(noise(4000)), &noise(4096)));
        assert!(!looks_scrambled(&png(noise(4000)), &zip(noise(4000))));
        assert!(!looks_scrambled(&text, &zip(noise(4000))));
        assert!(!looks_scrambled(&text, &text[5..]));
        assert!(!looks_scrambled(&noise(4096), &noise(4096))); // of an unknown format before, too
        assert!(!looks_scrambled(&text, &noise(40))); // too little to tell
        assert!(!looks_scrambled(&noise(4096), &text));
    }
}
