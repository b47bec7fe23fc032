//! Endpoints: how links come about, on both hosts.
//!
//! Decides QUIC's settings (windows, streams, timeouts, congestion control) and how an address becomes a link. Whose
//! key is trusted is an argument on the active and the caller's check on the standby.
//!
//! Invariants: a peer whose key isn't checked yet can make this host hold a few messages, never data; every phase of
//! connecting has a deadline.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, Runtime, TokioRuntime, TransportConfig, VarInt};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};
use tokio::time::{Instant, timeout, timeout_at};

use crate::buffer::SocketBuffers;
use crate::congestion::ModelFactory;
use crate::datagram;
use crate::identity::{Identity, PeerKey};
use crate::link::{CLOSE_CODE, Link, LinkError, Own};
use crate::rate::Limiter;
use crate::repeat::{REPEAT_EVERY, Repeater};
use crate::tls::{self, Pinned};

/// LIMIT: data streams of one connection; more wait until one ends. All of their windows together are less than the
/// connection's: content that waits for its changeset must not keep the one before from arriving.
pub const STREAMS_MAX: u16 = 12;

/// LIMIT: streams of bulk, besides; what is in them waits for nothing, and their windows, too, fit into the connection's.
pub const BULK_STREAMS: u16 = 2;

/// LIMIT: bytes in flight on one stream. quinn ends the whole connection when a stream collects 1,024 holes, which a
/// larger window allows on a link that loses packets: bandwidth comes from more streams, not from larger windows.
pub const STREAM_WINDOW_BYTES: u32 = 2 << 20;

/// LIMIT: bytes in flight on all streams of one connection: memory that a peer can make this host hold.
pub const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;

/// What may be set for a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuning {
    /// Data streams that the active opens: 1 to [`STREAMS_MAX`].
    pub streams: u16,
    /// How the sending rate is found.
    pub congestion: Congestion,
    /// A peer that is silent for this long is gone.
    pub idle_timeout: Duration,
    /// Silence after which a sign of life is sent; less than `idle_timeout`.
    pub keep_alive: Duration,
    /// Bytes of the socket's buffers to ask the system for, each way.
    pub socket_buffer_bytes: usize,
}

/// How the sending rate is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Congestion {
    /// Each loss halves it, or nearly: fair to others who do so, and slow where packets are lost by chance.
    #[default]
    Cubic,
    /// By a model of the path, its rate and its length; chance losses don't matter. Beside others who fill the queue it
    /// gets little.
    Bbr,
}

/// Why settings don't go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TuningError {
    /// Too few or too many streams.
    #[error("streams: {0} is not between 1 and {STREAMS_MAX}")]
    Streams(u16),
    /// A timeout that is too short or too long.
    #[error("idle timeout: {0:?} is not between 1 second and 1 hour")]
    IdleTimeout(Duration),
    /// The signs of life are too far apart.
    #[error("keep-alive: {keep_alive:?} has to be above zero and below the idle timeout of {idle_timeout:?}")]
    KeepAlive {
        /// Between signs of life.
        keep_alive: Duration,
        /// Until a peer is gone.
        idle_timeout: Duration,
    },
}

/// Why a standby can't listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process has the port.
    #[error("UDP {address} is in use by another process (`ss -ulpn` shows which); stop it or listen on another port")]
    InUse {
        /// The address.
        address: SocketAddr,
    },
    /// The system refuses the address.
    #[error("can't listen on UDP {address}: {source}")]
    Io {
        /// The address.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The settings don't go together.
    #[error(transparent)]
    Tuning(#[from] TuningError),
}

/// The standby's end: takes connections.
#[derive(Debug)]
pub struct Listener {
    endpoint: quinn::Endpoint,
    repeater: Arc<Repeater>,
    local_addr: SocketAddr,
    buffers: SocketBuffers,
}

/// A connection that begins; dropping it turns the peer away.
#[derive(Debug)]
pub struct Incoming {
    incoming: quinn::Incoming,
    repeater: Arc<Repeater>,
}

impl Default for Tuning {
    fn default() -> Tuning {
        Tuning {
            streams: 8,
            congestion: Congestion::default(),
            idle_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_secs(2),
            socket_buffer_bytes: 8 << 20,
        }
    }
}

impl Tuning {
    /// Checks that the settings go together.
    ///
    /// # Errors
    /// [`TuningError`]: the first rule that is broken.
    pub fn check(&self) -> Result<(), TuningError> {
        let Tuning { streams, idle_timeout, keep_alive, .. } = *self;
        if !(1..=STREAMS_MAX).contains(&streams) {
            return Err(TuningError::Streams(streams));
        }
        if idle_timeout < Duration::from_secs(1) || idle_timeout > Duration::from_secs(3600) {
            return Err(TuningError::IdleTimeout(idle_timeout));
        }
        if keep_alive.is_zero() || keep_alive >= idle_timeout {
            return Err(TuningError::KeepAlive { keep_alive, idle_timeout });
        }
        Ok(())
    }

    /// What both sides have in common, for datagrams of at most `datagram_bytes`; no peer may open a stream yet.
    fn transport(&self, datagram_bytes: u16) -> TransportConfig {
        let mut config = TransportConfig::default();
        let mut search = MtuDiscoveryConfig::default();
        search.upper_bound(datagram_bytes);
        config
            .mtu_discovery_config(Some(search))
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .max_concurrent_bidi_streams(VarInt::from_u32(0))
            .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
            .receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
            .send_window(CONNECTION_WINDOW_BYTES.into())
            .datagram_receive_buffer_size(None)
            .max_idle_timeout(Some(IdleTimeout::try_from(self.idle_timeout).expect("at most an hour: checked")))
            .keep_alive_interval(Some(self.keep_alive));
        match self.congestion {
            Congestion::Cubic => config.congestion_controller_factory(Arc::new(CubicConfig::default())),
            Congestion::Bbr => config.congestion_controller_factory(Arc::new(ModelFactory)),
        };
        config
    }
}

impl Listener {
    /// Listens for actives; to be called within a tokio runtime.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(addr: SocketAddr, identity: &Identity, tuning: &Tuning) -> Result<Listener, BindError> {
        tuning.check()?;
        let io_error = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse { address: addr },
            _ => BindError::Io { address: addr, source },
        };
        let (socket, buffers) = open_socket(addr, tuning).map_err(io_error)?;
        let mut transport = tuning.transport(datagram::BYTES_USUAL);
        transport.max_concurrent_bidi_streams(VarInt::from_u32(1));
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls::standby_config(identity)));
        config
            .transport_config(Arc::new(transport))
            .max_incoming(INCOMING_MAX)
            .incoming_buffer_size(INCOMING_BYTES_MAX)
            .incoming_buffer_size_total(INCOMING_BYTES_MAX * INCOMING_MAX as u64);
        let runtime = Arc::new(TokioRuntime);
        let reset_key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &identity.reset_key());
        let mut endpoint = EndpointConfig::new(Arc::new(reset_key));
        endpoint.cid_generator(|| Box::new(RandomCids));
        take_large_datagrams(&mut endpoint);
        // What goes back is little.
        let (_, repeater) = wrap(socket, datagram::BYTES_USUAL).map_err(io_error)?;
        let endpoint = quinn::Endpoint::new_with_abstract_socket(endpoint, Some(config), repeater.clone(), runtime).map_err(io_error)?;
        let local_addr = endpoint.local_addr().map_err(io_error)?;
        Ok(Listener { endpoint, repeater, local_addr, buffers })
    }

    /// Where it listens; with the port that the system chose if none was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// What the system granted of the buffers that were asked for.
    pub fn buffers(&self) -> SocketBuffers {
        self.buffers
    }

    /// Waits for the next connection; `None` after [`Listener::shutdown`]. Can be cancelled without loss.
    pub async fn accept(&self) -> Option<Incoming> {
        Some(Incoming { incoming: self.endpoint.accept().await?, repeater: self.repeater.clone() })
    }

    /// Ends all connections, tells the peers why, and waits until that is on its way.
    ///
    /// Cost: up to three probe timeouts, some hundred milliseconds on a slow link.
    pub async fn shutdown(&self, reason: &str) {
        self.endpoint.close(CLOSE_CODE, reason.as_bytes());
        self.endpoint.wait_idle().await;
    }
}

impl Incoming {
    /// Where the peer seems to be.
    pub fn remote_addr(&self) -> SocketAddr {
        self.incoming.remote_address()
    }

    /// Completes the handshake: afterwards the peer has proven [`Link::peer_key`].
    ///
    /// Whether that key is trusted is for the caller to decide before it reads more than one [`crate::Open`].
    ///
    /// # Errors
    /// `Timeout`: not within `within`. `Protocol`: no TLS 1.3 with a raw Ed25519 key, or another protocol.
    pub async fn handshake(self, within: Duration) -> Result<Link, LinkError> {
        let connecting = self.incoming.accept().map_err(LinkError::from)?;
        let connection = timeout(within, connecting).await.map_err(|_| LinkError::Timeout { waiting_for: "the handshake" })??;
        Link::new(connection, None, self.repeater)
    }
}

/// Opens a link to a standby that holds one of the `expected` keys; to be called within a tokio runtime.
///
/// All addresses of the name are tried one after the other, each with its share of the time.
///
/// # Errors
/// `Resolve`: the name has no address. `Unreachable`: nobody answers. `WrongKey`: somebody else answers. `Protocol`:
/// what answers isn't coldspare. `Closed`: the standby turns connections away.
pub async fn connect(addr: &str, identity: &Identity, expected: &[PeerKey], tuning: &Tuning, within: Duration) -> Result<Link, LinkError> {
    tuning.check()?;
    let deadline = Instant::now() + within;
    let addresses = resolve(addr, deadline).await?;
    let mut failure = None;
    for (tried, &address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len() - tried).expect("few addresses");
        match connect_to(addr, address, identity, expected, tuning, share).await {
            Ok(link) => return Ok(link),
            Err(error) => {
                tracing::debug!(%address, %error, "no link to this address");
                // A stranger behind one address says more than silence behind another.
                if !matches!(failure, Some(LinkError::WrongKey { .. })) {
                    failure = Some(error);
                }
            }
        }
    }
    Err(failure.expect("a name that resolves has an address"))
}

async fn resolve(addr: &str, deadline: Instant) -> Result<Vec<SocketAddr>, LinkError> {
    let resolve_error = |source| LinkError::Resolve { address: addr.into(), source };
    let found = timeout_at(deadline, tokio::net::lookup_host(addr)).await;
    let found = found.unwrap_or_else(|elapsed| Err(elapsed.into())).map_err(resolve_error)?;
    let mut addresses = Vec::new();
    for address in found.take(ADDRESSES_MAX) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() {
        return Err(resolve_error(io::Error::new(io::ErrorKind::NotFound, "the name has no address")));
    }
    Ok(addresses)
}

async fn connect_to(
    name: &str,
    address: SocketAddr,
    identity: &Identity,
    expected: &[PeerKey],
    tuning: &Tuning,
    within: Duration,
) -> Result<Link, LinkError> {
    let shown_address = if name == address.to_string() { name.to_string() } else { format!("{name} ({address})") };
    let unreachable = |detail: String| LinkError::Unreachable { address: shown_address.clone(), detail };
    let from: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let (socket, buffers) = open_socket(SocketAddr::new(from, 0), tuning).map_err(|e| unreachable(e.to_string()))?;
    let datagram_bytes = datagram::bytes_towards(address);
    let (limiter, repeater) = wrap(socket, datagram_bytes).map_err(|e| unreachable(e.to_string()))?;
    let mut own = EndpointConfig::default();
    take_large_datagrams(&mut own);
    let endpoint = quinn::Endpoint::new_with_abstract_socket(own, None, repeater.clone(), Arc::new(TokioRuntime))
        .map_err(|e| unreachable(e.to_string()))?;
    let pinned = Arc::new(Pinned::new(expected));
    let mut config = quinn::ClientConfig::new(Arc::new(tls::active_config(identity, pinned.clone())));
    config.transport_config(Arc::new(tuning.transport(datagram_bytes)));
    let connecting = endpoint.connect_with(config, address, TLS_NAME).map_err(|e| unreachable(e.to_string()))?;
    let no_answer = || unreachable(format!("no answer within {:.1} s", within.as_secs_f32()));
    let repeating = async {
        loop {
            tokio::time::sleep(REPEAT_EVERY * 2).await;
            repeater.repeat();
        }
    };
    let connected = tokio::select! {
        connected = timeout(within, connecting) => connected,
        () = repeating => unreachable!("it is repeated until the other ends"),
    };
    let error = match connected {
        Ok(Ok(connection)) => return Link::new(connection, Some(Own { endpoint, limiter, buffers }), repeater),
        Ok(Err(error)) => error,
        Err(_) => return Err(no_answer()),
    };
    if let Some(shown) = pinned.refused() {
        return Err(LinkError::WrongKey { address: shown_address, expected: expected.to_vec(), found: shown.0 });
    }
    match error {
        quinn::ConnectionError::TimedOut => Err(no_answer()),
        other => Err(other.into()),
    }
}

fn take_large_datagrams(endpoint: &mut EndpointConfig) {
    endpoint.max_udp_payload_size(datagram::BYTES_MAX).expect("more than the least that QUIC allows");
}

fn wrap(socket: UdpSocket, datagram_bytes: u16) -> io::Result<(Arc<Limiter>, Arc<Repeater>)> {
    let limiter = Arc::new(Limiter::new(TokioRuntime.wrap_udp_socket(socket)?, datagram_bytes));
    let repeater = Arc::new(Repeater::new(limiter.clone()));
    Ok((limiter, repeater))
}

fn open_socket(addr: SocketAddr, tuning: &Tuning) -> io::Result<(UdpSocket, SocketBuffers)> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, None)?;
    if addr.is_ipv6() {
        // `[::]` takes IPv4 too, whatever the system's default is.
        socket.set_only_v6(false)?;
    }
    let buffers = SocketBuffers::set((&socket).into(), tuning.socket_buffer_bytes)?;
    socket.bind(&addr.into())?;
    Ok((socket.into(), buffers))
}

/// LIMIT: connections whose handshake wasn't begun; more are turned away.
const INCOMING_MAX: usize = 16;

/// LIMIT: bytes held of one of them.
const INCOMING_BYTES_MAX: u64 = 64 << 10;

/// LIMIT: addresses of one name that are tried.
const ADDRESSES_MAX: usize = 8;

/// QUIC wants a name where keys are pinned; it isn't sent.
const TLS_NAME: &str = "coldspare";

/// Connection ids that say nothing about the endpoint that made them.
///
/// quinn's own can tell ids of an earlier run from its own, and drops packets of those in silence. Here they are
/// answered with a stateless reset, whose key is the same after a restart: an active learns at once, and not by the idle
/// timeout, that its connection is gone (RFC 9000, 10.3).
#[derive(Debug)]
struct RandomCids;

const CID_BYTES: usize = 8;

impl quinn::ConnectionIdGenerator for RandomCids {
    fn generate_cid(&mut self) -> quinn::ConnectionId {
        let mut bytes = [0; CID_BYTES];
        aws_lc_rs::rand::fill(&mut bytes).expect("the system's source of randomness works");
        quinn::ConnectionId::new(&bytes)
    }

    fn cid_len(&self) -> usize {
        CID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(tuning: Tuning, expected: Result<(), TuningError>) {
        assert_eq!(tuning.check(), expected, "{tuning:?}");
    }

    #[test]
    fn settings_that_do_not_go_together_are_refused() {
        let seconds = Duration::from_secs;
        let default = Tuning::default;
        check(default(), Ok(()));
        check(Tuning { streams: 12, ..default() }, Ok(()));
        check(Tuning { streams: 0, ..default() }, Err(TuningError::Streams(0)));
        check(Tuning { streams: 13, ..default() }, Err(TuningError::Streams(13)));
        check(Tuning { idle_timeout: Duration::ZERO, ..default() }, Err(TuningError::IdleTimeout(Duration::ZERO)));
        check(Tuning { idle_timeout: seconds(3601), ..default() }, Err(TuningError::IdleTimeout(seconds(3601))));
        let late = TuningError::KeepAlive { keep_alive: seconds(10), idle_timeout: seconds(10) };
        check(Tuning { keep_alive: seconds(10), ..default() }, Err(late));
    }

    #[tokio::test]
    async fn a_port_in_use_is_named() {
        let identity = Identity::generate();
        let first = Listener::bind("127.0.0.1:0".parse().unwrap(), &identity, &Tuning::default()).unwrap();
        match Listener::bind(first.local_addr(), &identity, &Tuning::default()) {
            Err(BindError::InUse { address }) => assert_eq!(address, first.local_addr()),
            other => panic!("{other:?}"),
        }
    }
}
