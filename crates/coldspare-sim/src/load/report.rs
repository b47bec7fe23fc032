//! What a load did.

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

/// All that was done.
#[derive(Debug, Clone)]
pub struct Report {
    /// From the start to the end of the last of it.
    pub seconds: f64,
    /// Pushes, forks, collections, LFS uploads.
    pub kinds: [Kind; 4],
}

/// What was done of one kind.
#[derive(Debug, Clone)]
pub struct Kind {
    /// `pushes`, `forks`, `gcs` or `lfs`.
    pub what: &'static str,
    /// The rate that was asked for.
    pub asked_per_second: f64,
    /// Was due, and could not begin in time.
    pub missed: u64,
    /// Bytes of content; of a collection those of the packs that came of it.
    pub bytes: u64,
    /// How long each took, in milliseconds, the quickest first once reported.
    pub ms: Vec<f64>,
    /// By how much the latest began after it was due.
    pub late_ms_max: f64,
}

impl Report {
    pub(super) fn new(took: Duration, mut kinds: [Kind; 4]) -> Report {
        kinds.iter_mut().for_each(|kind| kind.ms.sort_by(f64::total_cmp));
        Report { seconds: took.as_secs_f64(), kinds }
    }

    /// What was done of the kind of this name.
    ///
    /// # Panics
    /// There is no such kind.
    pub fn of(&self, what: &str) -> &Kind {
        self.kinds.iter().find(|kind| kind.what == what).expect("a kind of load")
    }

    /// All of it as an object, by kind.
    pub fn json(&self) -> Value {
        let mut all = json!({"seconds": self.seconds});
        for kind in &self.kinds {
            let ms = |percent| (!kind.ms.is_empty()).then(|| percentile(&kind.ms, percent));
            all[kind.what] = json!({
                "asked_per_second": kind.asked_per_second, "done": kind.ms.len(), "missed": kind.missed, "bytes": kind.bytes,
                "p50_ms": ms(50), "p99_ms": ms(99), "highest_ms": ms(100), "late_ms_max": kind.late_ms_max,
            });
        }
        all
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [what, asked, done, missed, mb, p50, p99, highest, late] =
            ["", "asked/s", "done", "missed", "MB", "p50 ms", "p99 ms", "highest ms", "latest start ms"];
        writeln!(out, "{what:<8}{asked:>10}{done:>9}{missed:>8}{mb:>11}{p50:>10}{p99:>10}{highest:>12}{late:>17}")?;
        for kind in &self.kinds {
            let (what, asked, done, missed, mb) = (kind.what, kind.asked_per_second, kind.ms.len(), kind.missed, kind.bytes as f64 / 1e6);
            let [p50, p99, highest] = [50, 99, 100].map(|percent| match percentile(&kind.ms, percent) {
                ms if ms.is_nan() => "-".into(),
                ms => format!("{ms:.1}"),
            });
            writeln!(out, "{what:<8}{asked:>10.3}{done:>9}{missed:>8}{mb:>11.1}{p50:>10}{p99:>10}{highest:>12}{:>17.1}", kind.late_ms_max)?;
        }
        writeln!(out, "in {:.1} s", self.seconds)
    }
}

impl Kind {
    pub(super) fn new(what: &'static str, asked_per_second: f64) -> Kind {
        Kind { what, asked_per_second, missed: 0, bytes: 0, ms: Vec::new(), late_ms_max: 0.0 }
    }

    pub(super) fn add(&mut self, bytes: u64, took: Duration, late: Duration) {
        self.bytes += bytes;
        self.ms.push(took.as_secs_f64() * 1e3);
        self.late_ms_max = self.late_ms_max.max(late.as_secs_f64() * 1e3);
    }

    pub(super) fn miss(&mut self) {
        self.missed += 1;
    }
}

/// Of sorted values the lowest that `percent` of them don't exceed; not a number of none.
pub fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_tells_what_was_done_and_what_was_not() {
        let mut pushes = Kind::new("pushes", 2.0);
        (1..=100).rev().for_each(|ms| pushes.add(10, Duration::from_millis(ms), Duration::from_millis(ms / 2)));
        pushes.miss();
        let report = Report::new(Duration::from_secs(50), [pushes, Kind::new("forks", 0.0), Kind::new("gcs", 0.0), Kind::new("lfs", 0.0)]);
        let told = report.json();
        let told = |what: &str| told["pushes"][what].as_f64().unwrap();
        assert_eq!((told("done"), told("missed"), told("bytes")), (100.0, 1.0, 1_000.0));
        assert_eq!((told("p50_ms"), told("p99_ms"), told("highest_ms"), told("late_ms_max")), (50.0, 99.0, 100.0, 50.0));
        assert!(report.json()["forks"]["p50_ms"].is_null());
        assert!(report.to_string().contains("2.000      100       1"), "{report}");
    }
}
