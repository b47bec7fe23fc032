//! When what is due, at an even rate.

use std::time::Duration;

/// An even rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    per_second: f64,
}

impl Pace {
    /// So often a second; 0 and below is never.
    pub fn new(per_second: f64) -> Pace {
        Pace { per_second }
    }

    /// When the one of this number is due after the start: in the middle of its part of the time, so that of any duration
    /// that many are due, rounded; `None`: never.
    pub fn due(self, no: u64) -> Option<Duration> {
        let seconds = (no as f64 + 0.5) / self.per_second;
        if self.per_second > 0.0 { Duration::try_from_secs_f64(seconds).ok() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_due_as_the_rate_says() {
        let check = |per_second: f64, seconds: f64, expected: usize| {
            let pace = Pace::new(per_second);
            let due = (0..).map_while(|no| pace.due(no).filter(|due| due.as_secs_f64() < seconds));
            assert_eq!(due.count(), expected, "{per_second} a second for {seconds} s");
        };
        check(20.0, 3.0, 60);
        check(0.5, 3.0, 1);
        check(0.5, 3.1, 2);
        check(1.0 / 3_600.0, 60.0, 0);
        check(60.0 / 3_600.0, 60.0, 1);
        check(0.0, 60.0, 0);
        check(-1.0, 60.0, 0);
        check(1e-300, 60.0, 0);
    }
}
