//! How often repositories are repacked, as far as times of their packs tell.

use serde::Serialize;

/// The packs of one repository, by age.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PackAges {
    all: u64,
    day: u64,
    week: u64,
}

/// Repositories most of whose packs are young.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Repacked {
    pub(crate) repositories: u64,
    /// Of all their packs.
    pub(crate) bytes: u64,
}

/// The same of a day and of a week.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Cycles {
    pub(crate) last_day: Repacked,
    pub(crate) last_seven_days: Repacked,
}

/// Seconds of a day.
const DAY_S: i64 = 86_400;

impl PackAges {
    /// Adds a file of `objects/pack` that was written so many seconds ago.
    pub(crate) fn add(&mut self, age_s: i64, bytes: u64) {
        self.all += bytes;
        self.day += if (0..DAY_S).contains(&age_s) { bytes } else { 0 };
        self.week += if (0..7 * DAY_S).contains(&age_s) { bytes } else { 0 };
    }

    /// What this repository adds to both.
    pub(crate) fn cycles(&self) -> Cycles {
        let of = |young: u64| {
            let is_repacked = self.all > 0 && young * 2 >= self.all;
            if is_repacked { Repacked { repositories: 1, bytes: self.all } } else { Repacked::default() }
        };
        Cycles { last_day: of(self.day), last_seven_days: of(self.week) }
    }
}

impl Repacked {
    /// Both together.
    pub(crate) fn and(self, other: Repacked) -> Repacked {
        Repacked { repositories: self.repositories + other.repositories, bytes: self.bytes + other.bytes }
    }

    /// So many times as many.
    pub(crate) fn scaled(self, factor: f64) -> Repacked {
        let times = |n: u64| (n as f64 * factor).round() as u64;
        Repacked { repositories: times(self.repositories), bytes: times(self.bytes) }
    }
}

impl Cycles {
    /// Both together.
    pub(crate) fn and(self, other: Cycles) -> Cycles {
        Cycles { last_day: self.last_day.and(other.last_day), last_seven_days: self.last_seven_days.and(other.last_seven_days) }
    }

    /// So many times as many.
    pub(crate) fn scaled(self, factor: f64) -> Cycles {
        Cycles { last_day: self.last_day.scaled(factor), last_seven_days: self.last_seven_days.scaled(factor) }
    }

    /// Bytes of packs that a usual night writes anew: of the last day, or a seventh of the last week, whichever is more.
    ///
    /// One that is repacked each night is in both; of one whose turn comes once a week the day may show nothing.
    pub(crate) fn bytes_a_night(&self) -> f64 {
        f64::max(self.last_day.bytes as f64, self.last_seven_days.bytes as f64 / 7.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(packs: &[(i64, u64)], day: u64, week: u64) {
        let mut ages = PackAges::default();
        packs.iter().for_each(|(age, bytes)| ages.add(*age, *bytes));
        let of = |bytes| Repacked { repositories: u64::from(bytes > 0), bytes };
        assert_eq!(ages.cycles(), Cycles { last_day: of(day), last_seven_days: of(week) }, "{packs:?}");
    }

    #[test]
    fn a_repository_is_repacked_when_half_of_its_packs_are_young() {
        check(&[], 0, 0);
        check(&[(60, 100)], 100, 100);
        check(&[(60, 50), (90 * DAY_S, 50)], 100, 100);
        check(&[(60, 49), (90 * DAY_S, 51)], 0, 0);
        check(&[(60, 20), (6 * DAY_S, 40), (90 * DAY_S, 60)], 0, 120);
        // A clock that was ahead: nothing is known.
        check(&[(-60, 100)], 0, 0);
    }

    #[test]
    fn a_usual_night_is_the_last_one_or_a_seventh_of_the_week() {
        let of = |day, week| Cycles {
            last_day: Repacked { repositories: 1, bytes: day },
            last_seven_days: Repacked { repositories: 1, bytes: week },
        };
        assert_eq!(of(100, 140).bytes_a_night(), 100.0);
        assert_eq!(of(0, 700).bytes_a_night(), 100.0);
        assert_eq!(of(0, 700).and(of(7, 0)).scaled(2.0).bytes_a_night(), 200.0);
    }
}
