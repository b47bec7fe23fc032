//! A limit of the sending rate: every datagram of an endpoint counts, repeats and acknowledgements too.
//!
//! What waits, waits in QUIC, which still decides what goes first: a limit costs an urgent stream no more than the bucket.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::datagram;

/// A bucket that fills at the rate; pure, time is a `Duration` since any fixed moment.
///
/// It may go into debt by one transmission, so that none is too large for it. Over any time no more leaves than the rate
/// allows, and [`BURST`] and one transmission.
#[derive(Debug)]
struct Bucket {
    /// `None`: no limit.
    bytes_per_second: Option<u64>,
    /// Bytes that may leave; negative: that left too early.
    balance: f64,
    as_of: Duration,
}

/// How much time's worth of bytes may leave at once after a silence.
const BURST: Duration = Duration::from_millis(20);

impl Bucket {
    fn new() -> Bucket {
        Bucket { bytes_per_second: None, balance: 0.0, as_of: Duration::ZERO }
    }

    /// Sets the rate from `now` on; a debt stays, and is paid at the new rate.
    fn set(&mut self, now: Duration, bytes_per_second: Option<u64>) {
        self.fill(now);
        self.bytes_per_second = bytes_per_second.map(|rate| rate.max(1));
    }

    /// Counts what leaves.
    fn take(&mut self, now: Duration, bytes: usize) {
        self.fill(now);
        if self.bytes_per_second.is_some() {
            self.balance -= bytes as f64;
        }
    }

    /// When something may leave; `None`: now.
    fn next(&mut self, now: Duration) -> Option<Duration> {
        self.fill(now);
        let rate = self.bytes_per_second? as f64;
        // A little more than what is owed, or rounding would ask again at once.
        (self.balance < 0.0).then(|| now + Duration::from_secs_f64(-self.balance / rate) + Duration::from_micros(10))
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.as_of).as_secs_f64();
        self.as_of = self.as_of.max(now);
        match self.bytes_per_second {
            Some(rate) => self.balance = (self.balance + passed * rate as f64).min(BURST.as_secs_f64() * rate as f64),
            None => self.balance = 0.0,
        }
    }
}

/// A socket that sends no faster than it is told.
pub(crate) struct Limiter {
    socket: Arc<dyn AsyncUdpSocket>,
    bucket: Mutex<Bucket>,
    start: Instant,
    /// LIMIT: datagrams of one transmission.
    joined_max: usize,
}

impl Limiter {
    /// Without a limit at first; no datagram is larger than `datagram_bytes`.
    pub(crate) fn new(socket: Arc<dyn AsyncUdpSocket>, datagram_bytes: u16) -> Limiter {
        let joined_max = datagram::joined_to_send(datagram_bytes).min(socket.max_transmit_segments());
        Limiter { socket, bucket: Mutex::new(Bucket::new()), start: Instant::now(), joined_max }
    }

    /// Sets bytes a second of UDP payload that may leave; `None`: any.
    ///
    /// What waits by the old limit waits for it once more, at most a transmission's worth.
    pub(crate) fn set(&self, bytes_per_second: Option<u64>) {
        self.bucket().set(self.start.elapsed(), bytes_per_second);
    }

    /// When something may leave; `None`: now.
    fn next(&self) -> Option<Instant> {
        let next = self.bucket().next(self.start.elapsed());
        next.map(|next| self.start + next)
    }

    fn bucket(&self) -> std::sync::MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsyncUdpSocket for Limiter {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        let socket = self.socket.clone().create_io_poller();
        Box::pin(Poller { limiter: self, socket, pause: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.next().is_some() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.socket.try_send(transmit)?;
        self.bucket().take(self.start.elapsed(), transmit.contents.len());
        Ok(())
    }

    fn poll_recv(&self, cx: &mut Context<'_>, bufs: &mut [io::IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }

    fn max_transmit_segments(&self) -> usize {
        self.joined_max
    }

    fn max_receive_segments(&self) -> usize {
        // quinn multiplies it by the largest datagram.
        self.socket.max_receive_segments().min(datagram::joined_to_receive())
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limiter").field("socket", &self.socket).field("bucket", &self.bucket).finish_non_exhaustive()
    }
}

/// Waits for the limit, then for the socket.
struct Poller {
    limiter: Arc<Limiter>,
    socket: Pin<Box<dyn UdpPoller>>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl UdpPoller for Poller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(at) = self.limiter.next() {
            let pause = self.pause.get_or_insert_with(|| Box::pin(sleep_until(at)));
            pause.as_mut().reset(at);
            ready!(pause.as_mut().poll(cx));
        }
        self.socket.as_mut().poll_writable(cx)
    }
}

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Poller").field("limiter", &self.limiter).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Bytes that leave between two moments, in datagrams of 1,000, by whoever sends as soon as it may.
    fn sent(bucket: &mut Bucket, from: Duration, to: Duration) -> u64 {
        let (mut now, mut sent) = (from, 0);
        while now < to {
            match bucket.next(now) {
                Some(at) => {
                    assert!(at > now, "time goes on");
                    now = at;
                }
                None => {
                    bucket.take(now, 1000);
                    sent += 1000;
                }
            }
        }
        sent
    }

    #[test]
    fn over_any_time_no_more_leaves_than_the_rate_allows() {
        let mut bucket = Bucket::new();
        bucket.set(ms(5), Some(1_000_000));
        let first = sent(&mut bucket, ms(5), ms(1005));
        assert!((980_000..=1_001_000).contains(&first), "{first}");
        // After a silence of ten seconds: one burst more.
        let second = sent(&mut bucket, ms(11_005), ms(12_005));
        assert!((980_000..=1_021_000).contains(&second), "{second}");
    }

    #[test]
    fn a_new_limit_holds_at_once() {
        let mut bucket = Bucket::new();
        assert_eq!(bucket.next(ms(0)), None);
        bucket.take(ms(0), 1 << 30);
        bucket.set(ms(0), Some(1_000_000));
        sent(&mut bucket, ms(0), ms(500));
        bucket.set(ms(500), Some(10_000_000));
        let more = sent(&mut bucket, ms(500), ms(1000));
        assert!((4_900_000..=5_201_000).contains(&more), "{more}");
        bucket.set(ms(1000), Some(100_000));
        let less = sent(&mut bucket, ms(1000), ms(2000));
        assert!((90_000..=103_000).contains(&less), "{less}");
        bucket.set(ms(2000), None);
        assert_eq!(bucket.next(ms(2000)), None);
    }

    #[test]
    fn a_clock_that_stands_or_goes_back_gives_nothing_away() {
        let mut bucket = Bucket::new();
        bucket.set(ms(1000), Some(1_000_000));
        bucket.take(ms(1000), 500_000);
        let due = bucket.next(ms(1000)).unwrap();
        assert!(bucket.next(ms(0)).is_some());
        assert!(bucket.next(ms(1000)).unwrap() <= due && bucket.next(ms(1400)).is_some());
        assert_eq!(bucket.next(ms(1501)), None);
    }
}
