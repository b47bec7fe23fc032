//! How fast a verification may read.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::standby::lock;

/// Lets whoever reads wait until what was read is no more than a rate allows; shared by the threads that read.
///
/// Invariant: time in which nothing was read is no credit for later.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    /// When what was read so far is paid for.
    paid_at: Mutex<Instant>,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace::new(0)
    }
}

impl Pace {
    /// At most so many bytes a second; 0: as many as there are.
    pub fn new(bytes_per_second: u64) -> Pace {
        Pace { bytes_per_second, paid_at: Mutex::new(Instant::now()) }
    }

    /// Takes note that bytes were read, and sleeps while that was too fast.
    pub(crate) fn read(&self, bytes: u64) {
        if self.bytes_per_second == 0 {
            return;
        }
        let now = Instant::now();
        std::thread::sleep(self.wait(now, bytes));
    }

    /// How long `bytes` that were read just before `now` have to be waited for.
    fn wait(&self, now: Instant, bytes: u64) -> Duration {
        let mut paid_at = lock(&self.paid_at);
        *paid_at = (*paid_at).max(now) + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        *paid_at - now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_reading_is_no_credit() {
        let pace = Pace::new(1000);
        let start = *lock(&pace.paid_at);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(pace.wait(at(0), 500), Duration::from_millis(500));
        assert_eq!(pace.wait(at(0), 500), Duration::from_secs(1), "another thread waits behind the first");
        assert_eq!(pace.wait(at(600), 2000), Duration::from_secs(2));
    }
}
