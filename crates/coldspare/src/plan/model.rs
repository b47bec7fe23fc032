//! From what a home consists of, and what a rehearsal cost on this host, to what to expect.
//!
//! Decides from numbers alone. Each figure names what it rests on.

use serde::Serialize;

use super::cycles::Cycles;
use super::report::amount as in_short;
use super::survey::{Amount, DAY, Survey};
use super::watch::Watched;
use crate::config::History;

/// What a rehearsal cost, with both ends on this host.
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
    /// CPU seconds of the receiver.
    pub(crate) standby_cpu: Cpu,
    /// Bytes sent a byte of content.
    pub(crate) sent_per_byte: f64,
    /// Bytes of the sender's index and of the receiver's manifest an entry.
    pub(crate) index_bytes_per_entry: f64,
    pub(crate) manifest_bytes_per_entry: f64,
    /// Seconds until one small change is durable on the standby.
    pub(crate) seconds_per_change: f64,
    /// Bytes sent a byte that `git repack -ad` wrote; `None` when no repository was rehearsed.
    pub(crate) sent_per_repacked_byte: Option<f64>,
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
    fn seed(&self, amount: Amount) -> f64 {
        self.base + self.changes(amount)
    }

    fn changes(&self, amount: Amount) -> f64 {
        amount.files as f64 * self.each.file + amount.bytes as f64 * self.each.byte
    }
}

/// What somebody wants to know.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Wishes {
    /// Links, in bits a second.
    pub(crate) links: Vec<f64>,
    /// Seconds of lag that are acceptable.
    pub(crate) lag_seconds: f64,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figure {
    pub(crate) what: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// What it rests on.
    pub(crate) basis: String,
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

/// All answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Forecast {
    pub(crate) figures: Vec<Figure>,
    pub(crate) days: Vec<Day>,
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

    fn sent(&self, bytes: u64) -> f64 {
        bytes as f64 * self.sent_per_byte
    }

    /// Seconds that both ends take for so much, without a link's limit.
    pub(crate) fn seconds(&self, amount: Amount) -> f64 {
        amount.files as f64 * self.seconds_per_file + amount.bytes as f64 * self.seconds_per_byte
    }
}

/// How far predictions were off, at most: docs/performance.md, three homes.
pub(crate) const ERROR_SHARE: f64 = 0.30;

/// How far off all of it may be.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct ModelError {
    pub(crate) share: f64,
    /// By how much the home was scaled.
    pub(crate) scaled_by: f64,
    pub(crate) rests_on: String,
}

impl ModelError {
    /// Of a forecast for a home that was scaled by so much.
    pub(crate) fn new(scaled_by: f64) -> ModelError {
        let mut rests_on = String::from(
            "predictions for three homes, of seed time, CPU, bytes of a seed and bytes of a repack, beside what then happened, both ends on one \
             host (docs/performance.md); what is rewritten or deleted in a day is as the survey saw it, and no error of that is known",
        );
        if scaled_by != 1.0 {
            rests_on += &format!(
                "; scaling by {scaled_by:.2} assumes a home of the same kind, with as many files, bytes and changes a repository, and one \
                 that is no slower for its size: nothing of that was measured here"
            );
        }
        ModelError { share: ERROR_SHARE, scaled_by, rests_on }
    }
}

/// What to expect of `survey` at `costs`.
pub(crate) fn forecast(survey: &Survey, costs: &Costs, wishes: &Wishes) -> Forecast {
    let all = survey.files();
    let seed = costs.seconds_base + costs.seconds(all);
    let sent = costs.sent(all.bytes);
    let day: Amount =
        survey.minutes.iter().fold(Amount::default(), |sum, m| Amount { files: sum.files + m.files, bytes: sum.bytes + m.bytes });
    let busiest = survey.minutes.iter().copied().max_by_key(|m| m.bytes).unwrap_or_default();
    let repacked = survey.packs.bytes + survey.loose.bytes;
    let share = costs.sent_per_repacked_byte.unwrap_or(REPACK_SHARE_UNKNOWN);
    let repack_night = repacked as f64 * share;
    let mut figures = Vec::new();
    let mut add =
        |what: &str, value: f64, unit: &'static str, basis: String| figures.push(Figure { what: what.into(), value, unit, basis });

    add("seed, both hosts like this one", seed, "s", "rehearsal; both ends shared this host's cores, so two hosts are no slower".into());
    add("seed, bytes on the wire", sent, "B", "rehearsal with files of this home".into());
    add("seed, CPU of the active", costs.active_cpu.seed(all), "s", "rehearsal".into());
    add("seed, CPU of the standby", costs.standby_cpu.seed(all), "s", "rehearsal".into());
    let (written, basis) = what_a_day_rests_on(survey);
    add(written, day.bytes as f64, "B", basis);
    add("busiest minute of it", busiest.bytes as f64, "B", "as before".into());
    add(
        "a usual day, bytes on the wire",
        costs.sent(day.bytes),
        "B",
        "as before, at the rehearsal's share; deltas of changed files make it less".into(),
    );
    add("a usual day, CPU of the active", costs.active_cpu.changes(day), "s", "as before".into());
    let basis = match costs.sent_per_repacked_byte {
        Some(_) => "`git repack -ad` of a repository of this home, rehearsed; with `-f` all of it may travel",
        None => "no repository could be rehearsed: the share that one with many old deltas takes; with `-f` all of it may travel",
    };
    add("a night that repacks everything, bytes on the wire", repack_night, "B", basis.into());
    let Cycles { last_day, last_seven_days } = survey.repacked;
    add(
        "a usual night of gc, bytes on the wire",
        survey.repacked.bytes_a_night() * share,
        "B",
        format!(
            "{} repositories with {} of packs, at least half of it written within the last day, and {} with {} within seven: the day's, or a \
             seventh of the week's; a new repository counts, too; at the share of a repack as before",
            last_day.repositories,
            in_short(last_day.bytes as f64, "B"),
            last_seven_days.repositories,
            in_short(last_seven_days.bytes as f64, "B"),
        ),
    );
    let needed = needed_link(survey, costs, wishes.lag_seconds);
    let basis = if survey.watched.is_some() { "the watched day, minute by minute" } else { "the last day, minute by minute" };
    add(&format!("link for a lag of {} s", wishes.lag_seconds), needed, "bit/s", basis.into());
    add("lag of a lone change", costs.seconds_per_change, "s", "rehearsal, median".into());
    add(
        "memory, each daemon, at most",
        memory_bytes(survey.entries),
        "B",
        "measured up to three million entries (docs/performance.md)".into(),
    );
    add("disk, index on the active", survey.entries as f64 * costs.index_bytes_per_entry, "B", "rehearsal, an entry".into());
    add("disk, manifest on the standby", survey.entries as f64 * costs.manifest_bytes_per_entry, "B", "rehearsal, an entry".into());
    let staging = survey.largest_file_bytes.max(busiest.bytes) as f64;
    add(
        "disk, content and staging on the standby",
        all.bytes as f64 + staging,
        "B",
        "all files, and the largest of them or the busiest minute once more".into(),
    );
    let History { age_minutes, space_bytes, .. } = History::default();
    let of_history = day.bytes as f64 * age_minutes as f64 / DAY as f64;
    add(
        "disk, history on the standby, at most",
        of_history.min(space_bytes as f64),
        "B",
        format!(
            "{} are written in the {age_minutes} minutes of `history.age_minutes`, and all of it may replace something; `history.space_bytes` is \
             {}, and once above, the oldest points go: a night that repacks everything replaces {}",
            in_short(of_history, "B"),
            in_short(space_bytes as f64, "B"),
            in_short(repacked as f64, "B"),
        ),
    );
    let days = wishes.links.iter().map(|link| one_day(survey, costs, *link, sent, seed, repack_night)).collect();
    Forecast { figures, days }
}

/// What the bytes of a day are called, and how they are known.
fn what_a_day_rests_on(survey: &Survey) -> (&'static str, String) {
    let Some(watched) = &survey.watched else {
        let basis = "times of files: each counts once, at its last change; what was deleted since isn't seen (--watch sees it)";
        return ("written in the last day", basis.into());
    };
    let Watched { seconds, backend, written, rewritten, removed, overflows, unwatched, .. } = watched;
    let mut basis = format!(
        "watched for {seconds:.0} s by {backend}: {} changes, {rewritten} of them again, and {removed} removals; as if all of the day were \
         so, its busiest minute once",
        written.files
    );
    if *overflows > 0 || *unwatched > 0 {
        basis += &format!("; it is more: the kernel lost events {overflows} times, and {unwatched} folders could not be watched");
    }
    ("written in a day", basis)
}

/// The share of what is repacked that travels, where none was measured: of a history with many deltas computed anew.
const REPACK_SHARE_UNKNOWN: f64 = 0.20;

fn one_day(survey: &Survey, costs: &Costs, bits_per_second: f64, sent: f64, seed: f64, repack_night: f64) -> Day {
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
fn memory_bytes(entries: u64) -> f64 {
    let million = entries as f64 / 1e6;
    (40.0 + 10.0 * million.min(3.0)) * f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs() -> Costs {
        Costs {
            seconds_base: 0.5,
            seconds_per_file: 1e-4,
            seconds_per_byte: 1e-8,
            active_cpu: Cpu { base: 0.1, each: PerUnit { file: 1e-5, byte: 1e-9 } },
            standby_cpu: Cpu { base: 0.1, each: PerUnit { file: 1e-5, byte: 1e-9 } },
            sent_per_byte: 1.0,
            index_bytes_per_entry: 100.0,
            manifest_bytes_per_entry: 100.0,
            seconds_per_change: 0.02,
            sent_per_repacked_byte: Some(0.05),
        }
    }

    fn home(minutes: &[(usize, u64)]) -> Survey {
        let mut survey = Survey { minutes: vec![Amount::default(); DAY], ..Survey::default() };
        survey.packs = Amount { files: 100, bytes: 10_000_000_000 };
        minutes.iter().for_each(|(ago, bytes)| survey.minutes[*ago] = Amount { files: 1, bytes: *bytes });
        survey
    }

    fn figure(forecast: &Forecast, what: &str) -> f64 {
        forecast.figures.iter().find(|f| f.what.starts_with(what)).expect(what).value
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
    fn a_seed_takes_what_the_slower_of_hosts_and_link_takes() {
        let wishes = Wishes { links: vec![1e8, 1e10], lag_seconds: 60.0 };
        let forecast = forecast(&home(&[]), &costs(), &wishes);
        assert_eq!(figure(&forecast, "seed, both hosts").round(), 101.0);
        assert_eq!(format!("{:.3}", figure(&forecast, "seed, CPU of the active")), "10.101");
        assert_eq!(forecast.days.iter().map(|d| d.seed_seconds.round()).collect::<Vec<_>>(), [800.0, 101.0]);
        assert_eq!(figure(&forecast, "a night").round(), 500_000_000.0);
    }

    #[test]
    fn the_error_is_stated_with_what_scaling_assumes() {
        assert!(!ModelError::new(1.0).rests_on.contains("same kind"));
        assert!(ModelError::new(10.0).rests_on.contains("scaling by 10.00 assumes a home of the same kind"));
    }

    #[test]
    fn a_usual_night_is_what_was_repacked_of_late() {
        let mut home = home(&[]);
        home.repacked.last_day.bytes = 1_000_000_000;
        let forecast = forecast(&home, &costs(), &Wishes { links: vec![], lag_seconds: 60.0 });
        assert_eq!(figure(&forecast, "a usual night of gc").round(), 50_000_000.0);
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
    fn a_failover_loses_what_waits_while_the_lag_is_highest() {
        let of = |minutes: &[(usize, u64)], link: f64| {
            let wishes = Wishes { links: vec![link], lag_seconds: 60.0 };
            let day = forecast(&home(minutes), &costs(), &wishes).days.remove(0);
            (day.lag_median_seconds, day.lag_highest_seconds.round(), day.lag_highest_bytes.round())
        };
        assert_eq!(of(&[(10, 150_000_000)], 8e6), (0.02, 90.0, 90e6));
        // The second burst comes before the first is through.
        assert_eq!(of(&[(10, 150_000_000), (9, 150_000_000)], 8e6), (0.02, 180.0, 180e6));
        // A link that carries its minute: all of what came at once.
        assert_eq!(of(&[(10, 30_000_000)], 8e6), (0.02, 30.0, 30e6));
        assert_eq!(of(&[], 8e6), (0.02, 0.0, 0.0));
    }

    #[test]
    fn history_takes_what_a_day_writes_and_no_more_than_its_limit() {
        let history =
            |bytes| figure(&forecast(&home(&[(10, bytes)]), &costs(), &Wishes { links: vec![], lag_seconds: 60.0 }), "disk, history");
        assert_eq!(history(5_000_000_000), 5e9);
        assert_eq!(history(50_000_000_000), History::default().space_bytes as f64);
    }

    #[test]
    fn the_needed_link_is_the_slowest_that_will_do() {
        let home = home(&[(10, 150_000_000)]);
        let needed = needed_link(&home, &costs(), 90.1);
        assert!((7.8e6..8.2e6).contains(&needed), "{needed}");
        assert!(needed_link(&home, &costs(), 0.001).is_infinite());
    }
}
