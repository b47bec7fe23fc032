//! How many bytes a second the active may send, by the day and the hour; pure but for the clock that it asks.

use jiff::civil::{DateTime, Time, Weekday};
use serde::{Deserialize, Serialize};

/// Bytes a second; written as `"20 MB/s"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bandwidth(u64);

/// A time of each week in which another limit holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Period {
    /// When it begins, local time.
    pub from: Clock,
    /// When it ends, local time, itself not in it; not after `from`: on the next day.
    pub to: Clock,
    /// The days on which it begins; none: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weekdays: Vec<Day>,
    /// The limit; without one there is none in this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,
}

/// A time of the day; written as `"18:00"` or `"18:00:30"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Clock(Time);

/// A day of the week.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // they are what they are
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

/// What holds when.
#[derive(Debug, Clone)]
pub(crate) struct Schedule {
    otherwise: Option<Bandwidth>,
    periods: Vec<Period>,
}

/// LIMIT: below this many bytes a second signs of life and acknowledgements would be late.
const MIN: u64 = 10_000;
/// LIMIT: above, a limit is a slip of the pen.
const MAX: u64 = 1_000_000_000_000;

impl Schedule {
    /// The first of `periods` that holds decides, and where none does, `otherwise`.
    pub(crate) fn new(otherwise: Option<Bandwidth>, periods: Vec<Period>) -> Schedule {
        Schedule { otherwise, periods }
    }

    /// What holds now; `None`: no limit.
    pub(crate) fn now(&self) -> Option<u64> {
        self.at(jiff::Zoned::now().datetime())
    }

    /// Whether the limit changes with time.
    pub(crate) fn changes(&self) -> bool {
        !self.periods.is_empty()
    }

    fn at(&self, local: DateTime) -> Option<u64> {
        let holds = self.periods.iter().find(|period| period.holds(local));
        holds.map_or(self.otherwise, |period| period.bandwidth).map(|bandwidth| bandwidth.0)
    }
}

impl Period {
    fn holds(&self, local: DateTime) -> bool {
        let (from, to, time) = (self.from.0, self.to.0, local.time());
        let today = local.date().weekday();
        let began = |weekday: Weekday| self.weekdays.is_empty() || self.weekdays.iter().any(|day| day.weekday() == weekday);
        if from < to {
            return began(today) && from <= time && time < to;
        }
        // Over midnight, or a whole day.
        (began(today) && from <= time) || (began(today.previous()) && time < to)
    }
}

impl Day {
    fn weekday(self) -> Weekday {
        match self {
            Day::Mon => Weekday::Monday,
            Day::Tue => Weekday::Tuesday,
            Day::Wed => Weekday::Wednesday,
            Day::Thu => Weekday::Thursday,
            Day::Fri => Weekday::Friday,
            Day::Sat => Weekday::Saturday,
            Day::Sun => Weekday::Sunday,
        }
    }
}

/// Decimal and binary units; bits would be taken for bytes, or the reverse, and so aren't there.
const UNITS: [(&str, u64); 7] =
    [("B/s", 1), ("kB/s", 1_000), ("MB/s", 1_000_000), ("GB/s", 1_000_000_000), ("KiB/s", 1 << 10), ("MiB/s", 1 << 20), ("GiB/s", 1 << 30)];

impl TryFrom<String> for Bandwidth {
    type Error = String;

    fn try_from(text: String) -> Result<Bandwidth, String> {
        let error = || {
            let units = UNITS.map(|(unit, _)| unit).join(", ");
            format!("bandwidth {text:?} is not a number with a unit, such as \"20 MB/s\"; units: {units}")
        };
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(error)?;
        let (number, unit) = text.split_at(digits);
        let number: f64 = number.parse().map_err(|_| error())?;
        let (_, factor) = UNITS.into_iter().find(|(name, _)| *name == unit.trim_start()).ok_or_else(error)?;
        let bytes = (number * factor as f64) as u64; // saturates
        if !(MIN..=MAX).contains(&bytes) {
            return Err(format!("bandwidth {text:?} is not between {MIN} B/s and {MAX} B/s"));
        }
        Ok(Bandwidth(bytes))
    }
}

impl From<Bandwidth> for String {
    fn from(bandwidth: Bandwidth) -> String {
        format!("{} B/s", bandwidth.0)
    }
}

impl TryFrom<String> for Clock {
    type Error = String;

    fn try_from(text: String) -> Result<Clock, String> {
        text.parse().map(Clock).map_err(|_| format!("{text:?} is not a time of the day, such as \"18:00\""))
    }
}

impl From<Clock> for String {
    fn from(clock: Clock) -> String {
        clock.0.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bandwidth(text: &str) -> Result<u64, String> {
        Bandwidth::try_from(text.to_string()).map(|b| b.0)
    }

    #[test]
    fn a_bandwidth_is_a_number_with_a_unit() {
        assert_eq!(bandwidth("20 MB/s"), Ok(20_000_000));
        assert_eq!(bandwidth("2.5MiB/s"), Ok(5 << 19));
        assert_eq!(bandwidth("12345 B/s"), Ok(12_345));
        for wrong in ["", "20", "MB/s", "20 Mb/s", "20 Mbit/s", "1.2.3 MB/s", "-1 MB/s", "20 MB", "１ MB/s"] {
            assert!(bandwidth(wrong).unwrap_err().contains("such as"), "{wrong}");
        }
        assert!(bandwidth("1 B/s").unwrap_err().contains("between"));
        assert!(bandwidth("99999999999999999999 GB/s").unwrap_err().contains("between"));
    }

    #[derive(Deserialize)]
    struct Link {
        bandwidth: Option<Bandwidth>,
        schedule: Vec<Period>,
    }

    fn check(expected: &[(&str, Option<u64>)]) {
        let text = r#"
            bandwidth = "20 MB/s"
            [[schedule]]
            from = "12:00"
            to = "12:30:15"
            [[schedule]]
            from = "08:00"
            to = "18:00"
            weekdays = ["mon", "fri"]
            bandwidth = "5 MB/s"
            [[schedule]]
            from = "22:00"
            to = "06:00"
            weekdays = ["fri"]
            bandwidth = "90 MB/s"
        "#;
        let link: Link = toml::from_str(text).unwrap();
        let schedule = Schedule::new(link.bandwidth, link.schedule);
        for (at, limit) in expected {
            assert_eq!(schedule.at(at.parse().unwrap()), limit.map(|mb| mb * 1_000_000), "{at}");
        }
    }

    #[test]
    fn the_first_period_that_holds_decides() {
        // 2026-11-27 is a Friday.
        check(&[("2026-11-27T07:59:59", Some(20)), ("2026-11-27T08:00", Some(5)), ("2026-11-27T17:59:59", Some(5))]);
        check(&[("2026-11-27T18:00", Some(20)), ("2026-11-26T08:00", Some(20)), ("2026-11-30T08:00", Some(5))]);
        check(&[("2026-11-27T12:00", None), ("2026-11-27T12:30:14", None), ("2026-11-27T12:30:15", Some(5)), ("2026-11-26T12:00", None)]);
    }

    #[test]
    fn a_period_over_midnight_belongs_to_the_day_on_which_it_begins() {
        check(&[("2026-11-27T22:00", Some(90)), ("2026-11-28T05:59:59", Some(90)), ("2026-11-28T06:00", Some(20))]);
        check(&[("2026-11-27T05:00", Some(20)), ("2026-11-28T22:00", Some(20))]);
    }
}
