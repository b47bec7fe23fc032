//! A line between two hosts that is as slow, long and lossy as a test wants it, for any program and any protocol.
//!
//! Each end is a network namespace of its own with one TUN device; what one end sends is read here, packet by packet,
//! and written to the other end when its time has come. Programs are started in an end ([`End::wrapper`]), or a test
//! works there itself ([`End::enter`]).
//!
//! - `way.rs`: when, and whether, a packet arrives; pure.
//! - `end.rs`: a namespace with its device.
//! - `carry.rs`: the threads between them.
//!
//! What is emulated: one bottleneck each way, with a queue that drops what doesn't fit, and beyond it the distance and
//! random loss. Needs root and `/dev/net/tun`, `ip` and `nsenter`; nothing of it is left when the [`Line`] is dropped,
//! or the process killed.

mod carry;
mod end;
mod way;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use end::End;

/// How a line is, in each direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quality {
    /// Bits a second of IP packets.
    pub bits_per_second: u64,
    /// There and back.
    pub round_trip: Duration,
    /// Of a million packets that passed the bottleneck, how many are lost.
    pub loss_ppm: u64,
    /// What waits for the bottleneck; beyond it packets are dropped. `None`: as much as is under way in a round trip.
    pub queue_bytes: Option<u64>,
    /// Longer packets vanish without a word, as behind a router that may not answer.
    pub mtu: u16,
    /// A firewall drops UDP, and nothing else.
    pub blocks_udp: bool,
}

/// What came of the packets of one direction.
#[derive(Debug, Default)]
pub struct Counts {
    /// Packets that arrived.
    pub arrived: AtomicU64,
    /// Their bytes, IP headers included.
    pub arrived_bytes: AtomicU64,
    /// Packets that were lost at random.
    pub lost: AtomicU64,
    /// Packets that found the queue full.
    pub overflowed: AtomicU64,
    /// Packets that were longer than the MTU.
    pub too_long: AtomicU64,
    /// Packets that a firewall or an outage took.
    pub blocked: AtomicU64,
}

/// A line that is up until it is dropped.
#[derive(Debug)]
pub struct Line {
    near: End,
    far: End,
    shared: Arc<Shared>,
}

/// What the threads of both directions look at.
#[derive(Debug)]
struct Shared {
    quality: Mutex<Quality>,
    is_cut: AtomicBool,
    ends: AtomicBool,
    /// From near to far, and back.
    counts: [Counts; 2],
}

impl Default for Quality {
    fn default() -> Quality {
        Quality {
            bits_per_second: 100_000_000,
            round_trip: Duration::from_millis(50),
            loss_ppm: 0,
            queue_bytes: None,
            mtu: 1500,
            blocks_udp: false,
        }
    }
}

impl Quality {
    /// Bytes that the queue before the bottleneck holds.
    pub fn queue_bytes(&self) -> u64 {
        let product = u128::from(self.bits_per_second) * self.round_trip.as_micros() / 8_000_000;
        // A line without length has a queue, too.
        self.queue_bytes.unwrap_or(u64::try_from(product).unwrap_or(u64::MAX).max(64 * u64::from(self.mtu)))
    }
}

impl Line {
    /// Whether this process may make lines here.
    pub fn is_possible() -> bool {
        rustix::process::geteuid().is_root() && std::path::Path::new("/dev/net/tun").exists()
    }

    /// Makes both ends and connects them; `seed` decides which packets are lost.
    ///
    /// # Errors
    /// What the system refuses, with the command where one failed.
    pub fn new(quality: Quality, seed: u64) -> io::Result<Line> {
        let (near, far) = (End::new(NEAR, FAR, quality.mtu)?, End::new(FAR, NEAR, quality.mtu)?);
        let (ends, is_cut) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { quality: Mutex::new(quality), is_cut, ends, counts: Default::default() });
        carry::start(&near, &far, &shared, 0, seed)?;
        carry::start(&far, &near, &shared, 1, !seed)?;
        Ok(Line { near, far, shared })
    }

    /// The end with the address [`NEAR`].
    pub fn near(&self) -> &End {
        &self.near
    }

    /// The end with the address [`FAR`].
    pub fn far(&self) -> &End {
        &self.far
    }

    /// Has nothing pass, or all again: what is under way when it is cut is gone.
    pub fn cut(&self, is_cut: bool) {
        self.shared.is_cut.store(is_cut, Ordering::Relaxed);
    }

    /// Changes how the line is; what is under way arrives as it would have. The MTU that the ends know of stays.
    pub fn change(&self, change: impl FnOnce(&mut Quality)) {
        change(&mut self.shared.quality());
    }

    /// What came of the packets from near to far.
    pub fn there(&self) -> &Counts {
        &self.shared.counts[0]
    }

    /// What came of the packets from far to near.
    pub fn back(&self) -> &Counts {
        &self.shared.counts[1]
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn quality(&self) -> std::sync::MutexGuard<'_, Quality> {
        self.quality.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Time of the carrying threads.
fn since(start: Instant) -> Duration {
    start.elapsed()
}

/// The address of the near end.
pub const NEAR: &str = "10.98.0.1";
/// The address of the far end.
pub const FAR: &str = "10.98.0.2";
