//! Repeating: a link that comes back after an outage is used at once.
//!
//! QUIC probes a silent peer with pauses that double (RFC 9002, 6.2): after some seconds without a link the next probe
//! comes as many seconds later. Here the last datagram is sent again at an even pace while the peer is silent. A network
//! may double any datagram, so nobody is misled: one that did arrive is dropped, one that didn't is acknowledged, and
//! with that QUIC goes on.
//!
//! Decides when a peer counts as silent. It doesn't know what is in a datagram.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

/// The shortest pause between two repetitions.
pub(crate) const REPEAT_EVERY: Duration = Duration::from_millis(250);

/// A socket that can send its last datagram once more.
pub(crate) struct Repeater {
    socket: Arc<dyn AsyncUdpSocket>,
    last: Mutex<[Option<Last>; 2]>,
}

/// Below this a datagram may be an acknowledgement, which nobody answers: the last one that isn't is repeated, too.
const SMALL_BYTES: usize = 200;

#[derive(Clone)]
struct Last {
    destination: SocketAddr,
    src_ip: Option<IpAddr>,
    contents: Vec<u8>,
}

/// What a connection has carried, as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Carried {
    /// Datagrams that came.
    pub(crate) received: u64,
    /// Frames sent that want an answer.
    pub(crate) asked: u64,
}

/// Whether a peer that was asked is silent.
#[derive(Debug, Default)]
pub(crate) struct Silence {
    heard: Carried,
    is_silent: bool,
}

impl Silence {
    /// Takes what was carried until now, a round trip or more after the last time; returns whether all that was sent
    /// since the peer was last heard of is without an answer, or may be: the first that comes after a silence may be what
    /// the peer has to say by itself.
    pub(crate) fn look(&mut self, now: Carried) -> bool {
        if now.received != self.heard.received {
            self.heard = now;
            return std::mem::take(&mut self.is_silent);
        }
        self.is_silent = now.asked > self.heard.asked;
        self.is_silent
    }
}

impl Repeater {
    pub(crate) fn new(socket: Arc<dyn AsyncUdpSocket>) -> Repeater {
        Repeater { socket, last: Mutex::default() }
    }

    /// Sends the last datagrams, a small and a larger one, once more, if any were sent; one that the system doesn't take is as good as lost.
    pub(crate) fn repeat(&self) {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for Last { destination, src_ip, contents } in last.into_iter().flatten() {
            let _ = self.socket.try_send(&Transmit { destination, ecn: None, contents: &contents, segment_size: None, src_ip });
        }
    }

    fn remember(&self, transmit: &Transmit<'_>) {
        let last = transmit.segment_size.map_or(transmit.contents, |size| transmit.contents.chunks(size).last().unwrap_or_default());
        let mut all = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = all[usize::from(last.len() >= SMALL_BYTES)].get_or_insert_with(|| Last {
            destination: transmit.destination,
            src_ip: transmit.src_ip,
            contents: Vec::with_capacity(1500),
        });
        (kept.destination, kept.src_ip) = (transmit.destination, transmit.src_ip);
        kept.contents.clear();
        kept.contents.extend_from_slice(last);
    }
}

impl AsyncUdpSocket for Repeater {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)?;
        self.remember(transmit);
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
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }
}

impl fmt::Debug for Repeater {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repeater").field("socket", &self.socket).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(looks: &[(u64, u64)], expected: &[bool]) {
        let mut silence = Silence::default();
        let found: Vec<bool> = looks.iter().map(|&(received, asked)| silence.look(Carried { received, asked })).collect();
        assert_eq!(found, expected, "{looks:?}");
    }

    #[test]
    fn a_peer_is_silent_when_it_was_asked_and_nothing_came() {
        check(&[(1, 1), (2, 9), (2, 9)], &[false, false, false]);
        check(&[(2, 9), (2, 10), (2, 10), (2, 12)], &[false, true, true, true]);
    }

    #[test]
    fn the_first_that_comes_after_a_silence_may_be_no_answer() {
        check(&[(2, 9), (2, 10), (3, 10), (3, 10), (4, 11), (5, 12)], &[false, true, true, false, false, false]);
    }

    #[test]
    fn who_only_answered_is_owed_nothing() {
        check(&[(5, 0), (5, 0), (5, 0)], &[false, false, false]);
    }
}
