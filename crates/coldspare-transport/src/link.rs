//! Links: a connection between two hosts that have proven their keys, and what can go wrong with it.
//!
//! Decides how failures of QUIC are told to the caller and to an administrator. It knows no role: which side may open
//! what is in `docs/protocol.md` and in the method's names.
//!
//! Invariants: text from a peer is escaped and cut before it gets into an error.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use coldspare_core::path::escape;
use quinn::{ConnectionError, ReadError, TransportErrorCode, VarInt, WriteError};
use rustls::pki_types::CertificateDer;
use tokio::time::timeout;

use crate::buffer::SocketBuffers;
use crate::endpoint::{BULK_STREAMS, CONNECTION_WINDOW_BYTES, STREAMS_MAX, TuningError};
use crate::frame::FrameError;
use crate::identity::PeerKey;
use crate::message::{MessageError, ToActive, ToStandby};
use crate::rate::Limiter;
use crate::repeat::{Carried, REPEAT_EVERY, Repeater, Silence};
use crate::stream::{ControlReceiver, ControlSender, DataReceiver, DataSender};

/// A connection to a host whose key is known; clones are the same connection.
#[derive(Debug, Clone)]
pub struct Link {
    connection: quinn::Connection,
    peer_key: PeerKey,
    /// Of the active, whose endpoint and socket serve this connection alone.
    own: Option<Own>,
    _probing: Arc<Probing>,
}

/// The endpoint that serves one connection alone.
#[derive(Debug, Clone)]
pub(crate) struct Own {
    pub(crate) endpoint: quinn::Endpoint,
    pub(crate) limiter: Arc<Limiter>,
    pub(crate) buffers: SocketBuffers,
}

/// Ends with the last clone of a link, which then ends the connection.
#[derive(Debug)]
struct Probing(tokio::task::JoinHandle<()>);

/// What a link has carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkStats {
    /// Bytes of UDP sent, repeats included.
    pub bytes_sent: u64,
    /// Bytes of UDP received.
    pub bytes_received: u64,
    /// Estimate of the round trip.
    pub rtt: Duration,
    /// Packets sent and lost.
    pub lost_packets: u64,
}

/// Why there is no link, or no link any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answers.
    #[error("can't reach {address}: {detail}; check that `coldspare receive` runs there and that no firewall blocks UDP to this port")]
    Unreachable {
        /// The name, and the address behind it.
        address: String,
        /// What was seen.
        detail: String,
    },
    /// Somebody answers who isn't the standby.
    #[error(
        "{address} is not the paired standby: it has the key {}, expected is {}; if the standby was set up anew, pair the hosts anew",
        found.map_or("(none)".to_string(), |key| key.to_string()),
        expected.iter().map(PeerKey::to_string).collect::<Vec<_>>().join(" or ")
    )]
    WrongKey {
        /// The name, and the address behind it.
        address: String,
        /// The pinned keys.
        expected: Vec<PeerKey>,
        /// The key that was shown; `None` when it wasn't an Ed25519 key.
        found: Option<PeerKey>,
    },
    /// The name has no address.
    #[error("can't find the address of {address}: {source}")]
    Resolve {
        /// As configured.
        address: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The link has ended, on either side.
    #[error("the connection ended: {reason}")]
    Closed {
        /// In the words of the side that ended it, escaped.
        reason: String,
    },
    /// The peer took back, or doesn't take any more, this one stream; the link may live on.
    #[error("the stream was abandoned")]
    Abandoned,
    /// The peer says what this version doesn't understand, or this host was about to.
    #[error("the hosts don't understand each other: {0}; install the same coldspare on both")]
    Protocol(String),
    /// The peer is silent.
    #[error("timed out waiting for {waiting_for}")]
    Timeout {
        /// What didn't come.
        waiting_for: &'static str,
    },
    /// The settings don't go together.
    #[error(transparent)]
    Tuning(#[from] TuningError),
}

impl Link {
    pub(crate) fn new(connection: quinn::Connection, own: Option<Own>, repeater: Arc<Repeater>) -> Result<Link, LinkError> {
        let shown = connection.peer_identity().and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
        let key = shown.as_deref().and_then(|shown| match shown.as_slice() {
            [key] => PeerKey::from_spki(key),
            _ => None,
        });
        let peer_key = key.ok_or_else(|| LinkError::Protocol("the peer has shown no Ed25519 key".into()))?;
        let _probing = Arc::new(Probing(tokio::spawn(probe(connection.clone(), repeater))));
        Ok(Link { connection, peer_key, own, _probing })
    }

    /// The key that the peer has proven to hold.
    pub fn peer_key(&self) -> PeerKey {
        self.peer_key
    }

    /// Where the peer is at the moment.
    pub fn remote_addr(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    /// Active: opens the control stream, once per link. The standby notices with the first message.
    ///
    /// # Errors
    /// The link has ended.
    pub async fn open_control(&self) -> Result<(ControlSender<ToStandby>, ControlReceiver<ToActive>), LinkError> {
        let (send, receive) = self.connection.open_bi().await?;
        Ok((ControlSender::new(send), ControlReceiver::new(receive)))
    }

    /// Active: opens one more data stream; waits while the standby hasn't opened the gate ([`Link::accept_data`]) or
    /// has [`STREAMS_MAX`] streams open.
    ///
    /// # Errors
    /// The link has ended.
    pub async fn open_data(&self) -> Result<DataSender, LinkError> {
        Ok(DataSender::new(self.connection.open_uni().await?))
    }

    /// Active: as [`Link::open_data`], for bulk: what it carries waits for all other streams.
    ///
    /// # Errors
    /// The link has ended.
    pub async fn open_bulk(&self) -> Result<DataSender, LinkError> {
        Ok(DataSender::of_bulk(self.connection.open_uni().await?))
    }

    /// Standby: takes the control stream, once per link.
    ///
    /// # Errors
    /// `Timeout`: the active has said nothing within `within`. Else the link has ended.
    pub async fn accept_control(&self, within: Duration) -> Result<(ControlSender<ToActive>, ControlReceiver<ToStandby>), LinkError> {
        let accepted = timeout(within, self.connection.accept_bi()).await;
        let (send, receive) = accepted.map_err(|_| LinkError::Timeout { waiting_for: "the control stream" })??;
        Ok((ControlSender::new(send), ControlReceiver::new(receive)))
    }

    /// Standby: takes the next data stream. Can be cancelled without loss.
    ///
    /// The first call opens the gate: until then the active can't open data streams, and can make this host hold no more
    /// than 2 MiB. To be called for an active that was welcomed, and for nobody else.
    ///
    /// # Errors
    /// The link has ended.
    pub async fn accept_data(&self) -> Result<DataReceiver, LinkError> {
        self.connection.set_receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES));
        self.connection.set_max_concurrent_uni_streams(VarInt::from_u32((STREAMS_MAX + BULK_STREAMS).into()));
        Ok(DataReceiver::new(self.connection.accept_uni().await?))
    }

    /// Ends the link at once; the peer sees `Closed` with this reason, and may not see what was sent just before.
    ///
    /// For a last message that must arrive, [`ControlSender::finish`] comes first. Before the process ends,
    /// [`Link::drained`] or [`crate::Listener::shutdown`] comes after.
    pub fn close(&self, reason: &str) {
        self.connection.close(CLOSE_CODE, reason.as_bytes());
    }

    /// Active: waits until a closed link has told the peer so, some hundred milliseconds at most on a slow link.
    pub async fn drained(&self) {
        if let Some(own) = &self.own {
            own.endpoint.wait_idle().await;
        }
    }

    /// Active: sets how many bytes a second may be sent, of UDP's payload; `None`: any. Holds at once, until it is set anew.
    pub fn limit(&self, bytes_per_second: Option<u64>) {
        if let Some(own) = &self.own {
            own.limiter.set(bytes_per_second);
        }
    }

    /// Active: what the system granted of the socket's buffers.
    pub fn buffers(&self) -> Option<SocketBuffers> {
        self.own.as_ref().map(|own| own.buffers)
    }

    /// Waits until the link has ended and tells why.
    pub async fn closed(&self) -> LinkError {
        self.connection.closed().await.into()
    }

    /// What the link has carried up to now.
    pub fn stats(&self) -> LinkStats {
        let stats = self.connection.stats();
        LinkStats {
            bytes_sent: stats.udp_tx.bytes,
            bytes_received: stats.udp_rx.bytes,
            rtt: stats.path.rtt,
            lost_packets: stats.path.lost_packets,
        }
    }
}

impl Drop for Probing {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Sends the last datagram again while the peer owes an answer, until the connection ends.
async fn probe(connection: quinn::Connection, repeater: Arc<Repeater>) {
    let mut silence = Silence::default();
    while connection.close_reason().is_none() {
        // What is under way is no silence.
        tokio::time::sleep(REPEAT_EVERY.max(connection.rtt())).await;
        let stats = connection.stats();
        let sent = stats.frame_tx;
        let asked = sent.stream + sent.ping + sent.crypto + sent.max_data + sent.max_stream_data + sent.max_streams_uni;
        if silence.look(Carried { received: stats.udp_rx.datagrams, asked }) {
            repeater.repeat();
        }
    }
}

impl LinkError {
    /// Whether trying again can help without anybody doing something.
    pub fn is_retryable(&self) -> bool {
        match self {
            LinkError::Unreachable { .. }
            | LinkError::Resolve { .. }
            | LinkError::Closed { .. }
            | LinkError::Abandoned
            | LinkError::Timeout { .. } => true,
            LinkError::WrongKey { .. } | LinkError::Protocol(_) | LinkError::Tuning(_) => false,
        }
    }
}

impl From<ConnectionError> for LinkError {
    fn from(error: ConnectionError) -> LinkError {
        let closed = |reason: String| LinkError::Closed { reason };
        match error {
            ConnectionError::ApplicationClosed(close) if close.reason.is_empty() => closed("the peer gave no reason".into()),
            ConnectionError::ApplicationClosed(close) => closed(foreign(&close.reason)),
            ConnectionError::LocallyClosed => closed("by this host".into()),
            ConnectionError::Reset => closed("the peer has restarted".into()),
            ConnectionError::TimedOut => LinkError::Timeout { waiting_for: "a sign of life of the peer" },
            ConnectionError::ConnectionClosed(close) if close.error_code == TransportErrorCode::CONNECTION_REFUSED => {
                closed("the peer takes no connection at the moment".into())
            }
            ConnectionError::ConnectionClosed(close) if is_tls(close.error_code) => {
                LinkError::Protocol(format!("the peer refused the handshake: {} ({})", close.error_code, foreign(&close.reason)))
            }
            // QUIC ends a connection for reasons of its own, such as too many holes in a stream: the next one may live.
            ConnectionError::ConnectionClosed(close) => {
                closed(format!("by the peer's QUIC: {} ({})", close.error_code, foreign(&close.reason)))
            }
            ConnectionError::TransportError(error) if is_tls(error.code) => LinkError::Protocol(format!("handshake: {error}")),
            ConnectionError::TransportError(error) => closed(format!("by this host's QUIC: {error}")),
            ConnectionError::CidsExhausted => closed("no connection ids left".into()),
            ConnectionError::VersionMismatch => LinkError::Protocol("the peer speaks another version of QUIC".into()),
        }
    }
}

impl From<ReadError> for LinkError {
    fn from(error: ReadError) -> LinkError {
        match error {
            ReadError::ConnectionLost(error) => error.into(),
            ReadError::Reset(_) | ReadError::ClosedStream => LinkError::Abandoned,
            ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => unreachable!("reads are ordered and 0-RTT is off"),
        }
    }
}

impl From<WriteError> for LinkError {
    fn from(error: WriteError) -> LinkError {
        match error {
            WriteError::ConnectionLost(error) => error.into(),
            WriteError::Stopped(_) | WriteError::ClosedStream => LinkError::Abandoned,
            WriteError::ZeroRttRejected => unreachable!("0-RTT is off"),
        }
    }
}

impl From<FrameError> for LinkError {
    fn from(error: FrameError) -> LinkError {
        LinkError::Protocol(error.to_string())
    }
}

impl From<MessageError> for LinkError {
    fn from(error: MessageError) -> LinkError {
        LinkError::Protocol(error.to_string())
    }
}

/// TLS alerts, as QUIC carries them (RFC 9001 §4.8).
fn is_tls(code: TransportErrorCode) -> bool {
    (0x100..0x200).contains(&u64::from(code))
}

/// Text from a peer, safe to print.
fn foreign(text: &[u8]) -> String {
    escape(&text[..text.len().min(FOREIGN_BYTES_MAX)])
}

/// Closing tells its reason as text; the code says nothing.
pub(crate) const CLOSE_CODE: VarInt = VarInt::from_u32(0);

/// LIMIT: bytes of a peer's reason that are repeated.
const FOREIGN_BYTES_MAX: usize = 1024;

#[cfg(test)]
mod tests;
