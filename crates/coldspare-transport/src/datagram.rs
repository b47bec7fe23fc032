//! Datagrams: how large they may be. A large one costs hosts about as much as a small one.
//!
//! Decides from the route how far the search for the path's MTU goes; what the path really carries is found by QUIC
//! (RFC 9000, 14.3). A search that aims too high loses round trips, one that aims too low leaves jumbo frames unused.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// LIMIT: bytes of one: what jumbo frames of 9,000 bytes carry behind IP's and UDP's headers.
pub(crate) const BYTES_MAX: u16 = 9_000 - HEADER_BYTES;

/// Of IPv6 and UDP; IPv4's is shorter.
const HEADER_BYTES: u16 = 48;

/// What Ethernet carries.
pub(crate) const BYTES_USUAL: u16 = 1_500 - HEADER_BYTES;

/// What every path carries (RFC 9000, 14).
const BYTES_MIN: u16 = 1_200;

/// What the system gives, or takes, in one call: several datagrams that follow each other.
const JOINED_BYTES_MAX: usize = 65_507;

/// The largest datagram that the route to `address` may carry, as far as this host knows.
pub(crate) fn bytes_towards(address: SocketAddr) -> u16 {
    let mtu = || -> io::Result<u32> {
        let from: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((from, 0))?;
        socket.connect(address)?; // sends nothing
        let mtu = if address.is_ipv4() { rustix::net::sockopt::ip_mtu(&socket) } else { rustix::net::sockopt::ipv6_mtu(&socket) };
        Ok(mtu?)
    };
    mtu().map_or(BYTES_USUAL, bytes_of_mtu)
}

fn bytes_of_mtu(mtu: u32) -> u16 {
    let bytes = mtu.saturating_sub(HEADER_BYTES.into());
    u16::try_from(bytes).unwrap_or(u16::MAX).clamp(BYTES_MIN, BYTES_MAX)
}

/// How many datagrams of so many bytes may leave in one call.
pub(crate) fn joined_to_send(bytes: u16) -> usize {
    JOINED_BYTES_MAX / usize::from(bytes)
}

/// How many of the largest datagrams are as long as whatever may arrive in one call.
pub(crate) fn joined_to_receive() -> usize {
    JOINED_BYTES_MAX.div_ceil(usize::from(BYTES_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_fit_the_route_and_no_more_leave_at_once_than_the_system_takes() {
        for (mtu, bytes) in [(0, 1_200), (1_280, 1_232), (1_500, 1_452), (9_000, 8_952), (65_536, 8_952), (u32::MAX, 8_952)] {
            assert_eq!(bytes_of_mtu(mtu), bytes, "an MTU of {mtu}");
            assert!(joined_to_send(bytes) * usize::from(bytes) <= JOINED_BYTES_MAX);
        }
        assert!(joined_to_receive() * usize::from(BYTES_MAX) >= JOINED_BYTES_MAX);
        // Loopback carries more than any network.
        assert_eq!(bytes_towards("127.0.0.1:7".parse().unwrap()), BYTES_MAX);
    }
}
