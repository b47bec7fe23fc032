//! From what a home consists of, and what a rehearsal cost, to what to expect. Each figure names what it rests on.

use serde::Serialize;

use super::cycles::Cycles;
use super::model::{Costs, Day, MeasuredLink, memory_bytes, needed_link, one_day};
use super::report::amount as in_short;
use super::survey::{Amount, DAY, Survey};
use super::watch::Watched;
use crate::config::History;

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
    /// `None` where nothing is known.
    pub(crate) value: Option<f64>,
    pub(crate) unit: &'static str,
    /// What it rests on.
    pub(crate) basis: String,
}

/// All answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Forecast {
    pub(crate) figures: Vec<Figure>,
    pub(crate) days: Vec<Day>,
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
    let totals = Totals::of(survey, costs);
    let mut figures = Figures(Vec::new());
    figures.of_link(costs);
    figures.of_seed(survey, costs, &totals);
    figures.of_day(survey, costs, &totals);
    figures.of_nights(survey, costs, &totals);
    figures.of_lag(survey, costs, wishes);
    figures.of_disks(survey, costs, &totals);
    let Totals { seed_seconds, seed_bytes, repack_night_bytes, .. } = totals;
    let days = wishes.links.iter().map(|link| one_day(survey, costs, *link, seed_bytes, seed_seconds, repack_night_bytes)).collect();
    Forecast { figures: figures.0, days }
}

/// What several figures rest on.
struct Totals {
    all: Amount,
    day: Amount,
    busiest: Amount,
    seed_seconds: f64,
    /// On the wire.
    seed_bytes: f64,
    /// Of packs and loose objects.
    repacked: u64,
    repack_share: f64,
    /// On the wire.
    repack_night_bytes: f64,
}

impl Totals {
    fn of(survey: &Survey, costs: &Costs) -> Totals {
        let (all, repacked) = (survey.files(), survey.packs.bytes + survey.loose.bytes);
        let day = survey.minutes.iter().fold(Amount::default(), |sum, m| Amount { files: sum.files + m.files, bytes: sum.bytes + m.bytes });
        let repack_share = costs.sent_per_repacked_byte.unwrap_or(REPACK_SHARE_UNKNOWN);
        Totals {
            all,
            day,
            busiest: survey.minutes.iter().copied().max_by_key(|m| m.bytes).unwrap_or_default(),
            seed_seconds: costs.seconds_base + costs.seconds(all),
            seed_bytes: costs.sent(all.bytes),
            repacked,
            repack_share,
            repack_night_bytes: repacked as f64 * repack_share,
        }
    }
}

struct Figures(Vec<Figure>);

impl Figures {
    fn add(&mut self, what: &str, value: impl Into<Option<f64>>, unit: &'static str, basis: impl Into<String>) {
        let (value, mut basis) = (value.into(), basis.into());
        if value.is_none() {
            basis = "not seen from here: the standby is another host".into();
        }
        self.0.push(Figure { what: what.into(), value, unit, basis });
    }

    fn of_link(&mut self, costs: &Costs) {
        let Some(MeasuredLink { bytes_per_second, round_trip_seconds }) = costs.link else { return };
        let (value, basis) = match bytes_per_second {
            Some(bytes) => (Some(bytes * 8.0), "what travelled while large files went: link, both hosts and their disks"),
            None => (None, "the large files of this home are too few to tell it"),
        };
        self.0.push(Figure { what: "link to the peer".into(), value, unit: "bit/s", basis: basis.into() });
        if let Some(seconds) = round_trip_seconds {
            self.add("link to the peer, round trip", seconds, "s", "as the connection has it, in whole milliseconds");
        }
    }

    fn of_seed(&mut self, survey: &Survey, costs: &Costs, totals: &Totals) {
        let (what, basis) = match costs.link {
            None => ("seed, both hosts like this one", "rehearsal; both ends shared this host's cores, so two hosts are no slower"),
            Some(_) => ("seed, to this peer", "rehearsal with the peer: the link and the standby's disk are in it"),
        };
        self.add(what, totals.seed_seconds, "s", basis);
        self.add("seed, bytes on the wire", totals.seed_bytes, "B", "rehearsal with files of this home");
        self.add("seed, CPU of the active", costs.active_cpu.seed(totals.all), "s", "rehearsal");
        self.add("seed, CPU of the standby", costs.standby_cpu.map(|cpu| cpu.seed(totals.all)), "s", "rehearsal");
        let basis = "measured up to three million entries (docs/performance.md)";
        self.add("memory, each daemon, at most", memory_bytes(survey.entries), "B", basis);
    }

    fn of_day(&mut self, survey: &Survey, costs: &Costs, totals: &Totals) {
        let (written, basis) = what_a_day_rests_on(survey);
        self.add(written, totals.day.bytes as f64, "B", basis);
        self.add("busiest minute of it", totals.busiest.bytes as f64, "B", "as before");
        let basis = "as before, at the rehearsal's share; deltas of changed files make it less";
        self.add("a usual day, bytes on the wire", costs.sent(totals.day.bytes), "B", basis);
        self.add("a usual day, CPU of the active", costs.active_cpu.changes(totals.day), "s", "as before");
    }

    fn of_nights(&mut self, survey: &Survey, costs: &Costs, totals: &Totals) {
        let basis = match costs.sent_per_repacked_byte {
            Some(_) => "`git repack -ad` of a repository of this home, rehearsed; with `-f` all of it may travel",
            None => "no repository could be rehearsed: the share that one with many old deltas takes; with `-f` all of it may travel",
        };
        self.add("a night that repacks everything, bytes on the wire", totals.repack_night_bytes, "B", basis);
        let Cycles { last_day, last_seven_days } = survey.repacked;
        let basis = format!(
            "{} repositories with {} of packs, at least half of it written within the last day, and {} with {} within seven: the day's, or a \
             seventh of the week's; a new repository counts, too; at the share of a repack as before",
            last_day.repositories,
            in_short(last_day.bytes as f64, "B"),
            last_seven_days.repositories,
            in_short(last_seven_days.bytes as f64, "B"),
        );
        self.add("a usual night of gc, bytes on the wire", survey.repacked.bytes_a_night() * totals.repack_share, "B", basis);
    }

    fn of_lag(&mut self, survey: &Survey, costs: &Costs, wishes: &Wishes) {
        let needed = needed_link(survey, costs, wishes.lag_seconds);
        let basis = if survey.watched.is_some() { "the watched day, minute by minute" } else { "the last day, minute by minute" };
        let what = format!("link for a lag of {} s", wishes.lag_seconds);
        if costs.link.is_some() && needed.is_infinite() {
            let basis = "more than this peer's link and hosts gave; a faster one isn't seen from here".into();
            self.0.push(Figure { what, value: None, unit: "bit/s", basis });
        } else {
            self.add(&what, needed, "bit/s", basis);
        }
        self.add("lag of a lone change", costs.seconds_per_change, "s", "rehearsal, median");
    }

    fn of_disks(&mut self, survey: &Survey, costs: &Costs, totals: &Totals) {
        let entries = survey.entries as f64;
        self.add("disk, index on the active", entries * costs.index_bytes_per_entry, "B", "rehearsal, an entry");
        let manifest = costs.manifest_bytes_per_entry.map(|bytes| entries * bytes);
        self.add("disk, manifest on the standby", manifest, "B", "rehearsal, an entry");
        let staging = survey.largest_file_bytes.max(totals.busiest.bytes) as f64;
        let basis = "all files, and the largest of them or the busiest minute once more";
        self.add("disk, content and staging on the standby", totals.all.bytes as f64 + staging, "B", basis);
        let History { age_minutes, space_bytes, .. } = History::default();
        let of_history = totals.day.bytes as f64 * age_minutes as f64 / DAY as f64;
        let basis = format!(
            "{} are written in the {age_minutes} minutes of `history.age_minutes`, and all of it may replace something; \
             `history.space_bytes` is {}, and once above, the oldest points go: a night that repacks everything replaces {}",
            in_short(of_history, "B"),
            in_short(space_bytes as f64, "B"),
            in_short(totals.repacked as f64, "B"),
        );
        self.add("disk, history on the standby, at most", of_history.min(space_bytes as f64), "B", basis);
    }
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

#[cfg(test)]
mod tests {
    use super::super::model::tests::{costs, home};
    use super::*;

    fn figure(forecast: &Forecast, what: &str) -> f64 {
        forecast.figures.iter().find(|f| f.what.starts_with(what)).expect(what).value.expect(what)
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
    fn what_a_peer_does_not_show_is_not_made_up() {
        let link = Some(MeasuredLink { bytes_per_second: Some(1e6), round_trip_seconds: Some(0.05) });
        let costs = Costs { standby_cpu: None, manifest_bytes_per_entry: None, link, ..costs() };
        let forecast = forecast(&home(&[]), &costs, &Wishes { links: vec![], lag_seconds: 60.0 });
        assert_eq!((figure(&forecast, "link to the peer"), figure(&forecast, "seed, to this peer").round()), (8e6, 101.0));
        let unknown: Vec<&str> = forecast.figures.iter().filter(|f| f.value.is_none()).map(|f| f.what.as_str()).collect();
        assert_eq!(unknown, ["seed, CPU of the standby", "disk, manifest on the standby"]);
        // What this link and these hosts can't hold says nothing of another link.
        let costs = Costs { seconds_per_byte: 1e-3, ..costs };
        let forecast = super::forecast(&home(&[(10, 1_000_000)]), &costs, &Wishes { links: vec![], lag_seconds: 60.0 });
        let link = forecast.figures.iter().find(|f| f.what.starts_with("link for a lag")).unwrap();
        assert_eq!(link.value, None, "{link:?}");
    }
}
