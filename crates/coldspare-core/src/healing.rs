//! When a path that somebody else changed on the standby is put right: at once, and with growing pauses when it happens
//! again and again, so that two who disagree don't keep each other busy.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::id::RootId;
use crate::path::RelPath;

/// The pause before a path is put right a second time; it doubles from then on.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// LIMIT: the longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(600);
/// A path that stayed right for so long counts as new.
const FORGET_AFTER: Duration = Duration::from_secs(900);
/// LIMIT: paths that are remembered. Beyond, a path is put right after the shortest pause.
const PATHS_MAX: usize = 10_000;

/// How often each path was found changed.
#[derive(Debug, Default)]
pub struct Pauses(BTreeMap<(RootId, RelPath), Pause>);

#[derive(Debug, Clone, Copy)]
struct Pause {
    times: u32,
    /// When it may be put right, by the caller's clock.
    until: Duration,
}

impl Pauses {
    /// Takes note that a path was found changed at `now`, anew or again after it had been put right; says how often that was,
    /// and when it may be put right.
    ///
    /// Cost: a pass over all paths when there are too many.
    pub fn found(&mut self, root: RootId, path: &RelPath, now: Duration) -> (u32, Duration) {
        let key = (root, path.clone());
        if self.0.len() >= PATHS_MAX && !self.0.contains_key(&key) {
            self.0.retain(|_, pause| now < pause.until + FORGET_AFTER);
            if self.0.len() >= PATHS_MAX {
                return (1, now + PAUSE_MIN);
            }
        }
        let known = self.0.entry(key).or_insert(Pause { times: 0, until: now });
        if now >= known.until + FORGET_AFTER {
            known.times = 0;
        }
        known.times = known.times.saturating_add(1);
        known.until = match known.times {
            1 => now,
            // The pause runs from when it was found again.
            n => now + PAUSE_MAX.min(PAUSE_MIN.saturating_mul(1 << (n - 2).min(30))),
        };
        (known.times, known.until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> RelPath {
        RelPath::new(name.as_bytes()).unwrap()
    }

    #[test]
    fn a_path_is_put_right_at_once_and_then_ever_later() {
        let mut pauses = Pauses::default();
        let mut now = Duration::from_secs(5);
        let mut waits = Vec::new();
        for _ in 0..14 {
            let (_, until) = pauses.found(RootId(0), &path("a"), now);
            waits.push((until - now).as_secs());
            now = until;
        }
        assert_eq!(waits, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600, 600]);
        assert_eq!(pauses.found(RootId(0), &path("b"), now), (1, now), "another path has nothing to do with it");
        assert_eq!(pauses.found(RootId(1), &path("a"), now), (1, now));
        let later = now + FORGET_AFTER + PAUSE_MAX;
        assert_eq!(pauses.found(RootId(0), &path("a"), later), (1, later), "long ago counts no more");
    }

    #[test]
    fn what_is_remembered_is_bounded_and_what_is_not_remembered_waits() {
        let mut pauses = Pauses::default();
        let now = Duration::from_secs(5);
        for n in 0..PATHS_MAX {
            pauses.found(RootId(0), &path(&n.to_string()), now);
        }
        assert_eq!(pauses.found(RootId(0), &path("more"), now), (1, now + PAUSE_MIN));
        assert_eq!(pauses.0.len(), PATHS_MAX);
        let later = now + FORGET_AFTER;
        assert_eq!(pauses.found(RootId(0), &path("more"), later), (1, later), "the old ones are forgotten");
        assert_eq!(pauses.0.len(), 1);
    }
}
