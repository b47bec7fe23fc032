//! What a rehearsal cost, and what follows from it for a day of changes over a link. Decides from numbers alone.

use serde::Serialize;

use super::survey::{Amount, DAY, Survey};

/// What a rehearsal cost: with both ends on this host, or over a link.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Costs {
    /// Seconds of any seed, whatever is in it.
    pub(crate) seconds_base: f64,
    /// Seconds a file of a seed, beside those of its bytes.
    pub(crate) seconds_per_file: f64,
    /// Seconds a byte of a seed.
    pub(crate) seconds_per_byte: f64,
    /// CPU seconds of the sender.
    pub(crate) active_cpu: Cpu,
    /// CPU seconds of the receiver, where it is a process of this host.
    pub(crate) standby_cpu: Option<Cpu>,
    /// Bytes sent a byte of content.
    pub(crate) sent_per_byte: f64,
    /// Bytes of the sender's index and, where it is on this host, of the receiver's manifest an entry.
    pub(crate) index_bytes_per_entry: f64,
    pub(crate) manifest_bytes_per_entry: Option<f64>,
    /// Seconds until one small change is durable on the standby.
    pub(crate) seconds_per_change: f64,
    /// Bytes sent a byte that `git repack -ad` wrote; `None` when no repository was rehearsed.
    pub(crate) sent_per_repacked_byte: Option<f64>,
    /// What it went over; `None` with both ends on this host.
    pub(crate) link: Option<MeasuredLink>,
}

/// A link to a peer, as the rehearsal had it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct MeasuredLink {
    /// While large files went, with what both ends did to them; `None` when there were none.
    pub(crate) bytes_per_second: Option<f64>,
    pub(crate) round_trip_seconds: Option<f64>,
}

/// A cost of files and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct PerUnit {
    pub(crate) file: f64,
    pub(crate) byte: f64,
}

/// CPU seconds of one end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Cpu {
    /// Of its start, with nothing to do.
    pub(crate) base: f64,
    #[serde(flatten)]
    pub(crate) each: PerUnit,
}

impl Cpu {
    pub(super) fn seed(&self, amount: Amount) -> f64 {
        self.base + self.changes(amount)
    }

    pub(super) fn changes(&self, amount: Amount) -> f64 {
        amount.files as f64 * self.each.file + amount.bytes as f64 * self.each.byte
    }
}

/// What one link does over the day.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Day {
    pub(crate) bits_per_second: f64,
    pub(crate) seed_seconds: f64,
    pub(crate) repack_night_seconds: f64,
    pub(crate) lag_median_seconds: f64,
    pub(crate) lag_highest_seconds: f64,
    /// Bytes that were written and aren't on the standby while the lag is highest: what a failover then loses.
    pub(crate) lag_highest_bytes: f64,
    /// Seconds of lag at the end of each minute of the day, the earliest first.
    pub(crate) lag_seconds: Vec<f64>,
}

/// What waits at the end of a minute.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Waiting {
    pub(crate) lag_seconds: f64,
    /// Of the home.
    pub(crate) bytes: f64,
}

impl Costs {
    /// Solves two seeds, of small files and of large ones, for the cost of a file and of a byte.
    ///
    /// `small` and `large` are what was seeded with the cost of each; costs are never below zero.
    pub(crate) fn per_unit(small: (Amount, f64), large: (Amount, f64)) -> PerUnit {
        let [(f1, b1, c1), (f2, b2, c2)] = [small, large].map(|(amount, cost)| (amount.files as f64, amount.bytes as f64, cost.max(0.0)));
        let determinant = f1 * b2 - f2 * b1;
        if determinant.abs() < f64::EPSILON {
            return PerUnit { file: 0.0, byte: if b1 > 0.0 { c1 / b1 } else { 0.0 } };
        }
        let (file, byte) = ((c1 * b2 - c2 * b1) / determinant, (f1 * c2 - f2 * c1) / determinant);
        // One that comes out below zero is noise: the other carries all.
        match (file < 0.0, byte < 0.0) {
            (true, _) => PerUnit { file: 0.0, byte: c2 / b2.max(1.0) },
            (_, true) => PerUnit { file: c1 / f1.max(1.0), byte: 0.0 },
            _ => PerUnit { file, byte },
        }
    }

    pub(super) fn sent(&self, bytes: u64) -> f64 {
        bytes as f64 * self.sent_per_byte
    }

    /// Seconds that both ends take for so much, without a link's limit.
    pub(crate) fn seconds(&self, amount: Amount) -> f64 {
        amount.files as f64 * self.seconds_per_file + amount.bytes as f64 * self.seconds_per_byte
    }
}

/// What a link does over the day; `sent` and `repack_night` are bytes.
pub(super) fn one_day(survey: &Survey, costs: &Costs, bits_per_second: f64, sent: f64, seed: f64, repack_night: f64) -> Day {
    let waiting = waiting_of_day(survey, costs, bits_per_second);
    let mut sorted = waiting.clone();
    sorted.sort_by(|a, b| a.lag_seconds.total_cmp(&b.lag_seconds).then(a.bytes.total_cmp(&b.bytes)));
    let highest = sorted.last().copied().unwrap_or_default();
    Day {
        bits_per_second,
        seed_seconds: seed.max(sent * 8.0 / bits_per_second),
        repack_night_seconds: repack_night * 8.0 / bits_per_second,
        lag_median_seconds: sorted.get(sorted.len() / 2).copied().unwrap_or_default().lag_seconds,
        lag_highest_seconds: highest.lag_seconds,
        lag_highest_bytes: highest.bytes,
        lag_seconds: waiting.iter().map(|w| w.lag_seconds).collect(),
    }
}

/// What waits at the end of each minute of the day: what was written and isn't sent yet, in seconds of the link, and no less
/// than both ends take for it.
pub(crate) fn waiting_of_day(survey: &Survey, costs: &Costs, bits_per_second: f64) -> Vec<Waiting> {
    let bytes_per_second = bits_per_second / 8.0;
    let (mut backlog, mut backlog_bytes) = (0.0, 0.0);
    let mut all = Vec::with_capacity(DAY);
    for minute in survey.minutes.iter().rev() {
        let bytes = minute.bytes as f64;
        let work = (costs.sent(minute.bytes) / bytes_per_second).max(costs.seconds(*minute));
        // Old and new are taken as equally dear a byte.
        let due = backlog + work;
        backlog = f64::max(due - 60.0, 0.0);
        backlog_bytes = if due > 0.0 { (backlog_bytes + bytes) * backlog / due } else { 0.0 };
        // What is written at once waits as long as it takes.
        let (at_once, at_once_bytes) = if work > 60.0 { (60.0, bytes * 60.0 / work) } else { (work, bytes) };
        let (lag, waits) = if backlog > at_once { (backlog, backlog_bytes) } else { (at_once, at_once_bytes) };
        all.push(Waiting { lag_seconds: costs.seconds_per_change + lag, bytes: waits });
    }
    all
}

/// The slowest link, in bits a second, with which the lag never exceeds `lag_seconds`; infinite when this host is the limit.
pub(crate) fn needed_link(survey: &Survey, costs: &Costs, lag_seconds: f64) -> f64 {
    let holds = |link: f64| waiting_of_day(survey, costs, link).into_iter().all(|waiting| waiting.lag_seconds <= lag_seconds);
    let (mut low, mut high) = (1e3, 1e12);
    if !holds(high) {
        return f64::INFINITY;
    }
    while high / low > 1.01 {
        let middle = f64::sqrt(low * high);
        if holds(middle) { high = middle } else { low = middle }
    }
    high
}

/// Resident memory: a floor, and caches that grow with the home up to their limits.
pub(super) fn memory_bytes(entries: u64) -> f64 {
    let million = entries as f64 / 1e6;
    (40.0 + 10.0 * million.min(3.0)) * f64::from(1 << 20)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn costs() -> Costs {
        Costs {
            seconds_base: 0.5,
            seconds_per_file: 1e-4,
            seconds_per_byte: 1e-8,
            active_cpu: Cpu { base: 0.1, each: PerUnit { file: 1e-5, byte: 1e-9 } },
            standby_cpu: Some(Cpu { base: 0.1, each: PerUnit { file: 1e-5, byte: 1e-9 } }),
            sent_per_byte: 1.0,
            index_bytes_per_entry: 100.0,
            manifest_bytes_per_entry: Some(100.0),
            seconds_per_change: 0.02,
            sent_per_repacked_byte: Some(0.05),
            link: None,
        }
    }

    pub(crate) fn home(minutes: &[(usize, u64)]) -> Survey {
        let mut survey = Survey { minutes: vec![Amount::default(); DAY], ..Survey::default() };
        survey.packs = Amount { files: 100, bytes: 10_000_000_000 };
        minutes.iter().for_each(|(ago, bytes)| survey.minutes[*ago] = Amount { files: 1, bytes: *bytes });
        survey
    }

    #[test]
    fn two_seeds_tell_the_cost_of_a_file_and_of_a_byte() {
        let of = |files: u64, bytes: u64| (Amount { files, bytes }, files as f64 * 1e-3 + bytes as f64 * 1e-8);
        let found = Costs::per_unit(of(2_000, 4_000_000), of(4, 100_000_000));
        assert!((found.file - 1e-3).abs() < 1e-9 && (found.byte - 1e-8).abs() < 1e-14, "{found:?}");
        // Noise that would make one of them negative.
        let noisy = Costs::per_unit((Amount { files: 10, bytes: 1_000_000 }, 0.001), (Amount { files: 1, bytes: 1_000_000 }, 0.01));
        assert!(noisy.file >= 0.0 && noisy.byte >= 0.0, "{noisy:?}");
    }

    #[test]
    fn what_a_link_cannot_carry_in_its_minute_waits_for_the_next() {
        // 150 MB in one minute over 8 Mbit/s take 150 s.
        let waiting = waiting_of_day(&home(&[(10, 150_000_000)]), &costs(), 8e6);
        let busy = waiting.iter().map(|w| (w.lag_seconds.round(), w.bytes.round())).filter(|w| w.0 > 0.0);
        assert_eq!(busy.collect::<Vec<_>>(), [(90.0, 90e6), (30.0, 30e6)]);
        assert_eq!(waiting.len(), DAY);
    }

    #[test]
    fn the_needed_link_is_the_slowest_that_will_do() {
        let home = home(&[(10, 150_000_000)]);
        let needed = needed_link(&home, &costs(), 90.1);
        assert!((7.8e6..8.2e6).contains(&needed), "{needed}");
        assert!(needed_link(&home, &costs(), 0.001).is_infinite());
    }
}
