//! How fast a verification may read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Lets whoever reads wait until what was read is no more than a rate allows; shared by the threads that read.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    began: Instant,
    bytes: AtomicU64,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace::new(0)
    }
}

impl Pace {
    /// At most so many bytes a second, from now on and on average; 0: as many as there are.
    pub fn new(bytes_per_second: u64) -> Pace {
        Pace { bytes_per_second, began: Instant::now(), bytes: AtomicU64::new(0) }
    }

    /// Takes note that bytes were read, and sleeps while that was too fast.
    pub(crate) fn read(&self, bytes: u64) {
        if self.bytes_per_second == 0 {
            return;
        }
        let all = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let due = Duration::from_secs_f64(all as f64 / self.bytes_per_second as f64);
        if let Some(early) = due.checked_sub(self.began.elapsed()) {
            std::thread::sleep(early);
        }
    }
}
