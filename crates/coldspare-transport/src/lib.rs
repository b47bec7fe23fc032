//! What the two hosts say to each other, and how: identity, invitation, messages, frames, QUIC.
//!
//! [`message`] and [`frame`] are the wire format and know no socket; [`endpoint`] opens links between hosts whose keys
//! are pinned; [`link`] carries messages over them. What a message means for a tree, and who may be served, is decided
//! elsewhere. `docs/protocol.md` describes the whole for another implementation.
//!
//! Architecture invariant: bytes from a peer are limited before they are allocated, decoded from complete frames only,
//! and checked before they leave this crate.

#![forbid(unsafe_code)]

mod base32;
mod buffer;
mod congestion;
mod datagram;
pub mod endpoint;
pub mod frame;
pub mod identity;
pub mod invite;
pub mod link;
pub mod message;
mod rate;
mod repeat;
pub mod stream;
mod tls;

pub use buffer::SocketBuffers;
pub use endpoint::{BULK_STREAMS, BindError, Congestion, Incoming, Listener, Tuning, TuningError, connect};
pub use frame::{FrameError, Payload};
pub use identity::{Identity, IdentityError, PeerKey, PeerKeyError};
pub use invite::{Invitation, InviteError, Secret};
pub use link::{Link, LinkError, LinkStats};
pub use message::{Data, Failure, Open, RootInfo, ToActive, ToStandby, VersionRange, Welcome};
pub use stream::{ControlReceiver, ControlSender, DataReceiver, DataSender};

/// The version of the protocol that this build speaks; `docs/protocol.md` says when it grows.
pub const PROTOCOL_VERSION: u16 = 4;

/// The name under which TLS agrees on this protocol; changes only when [`Open`], [`Welcome`] or a refusal has to.
pub const ALPN: &[u8] = b"coldspare/1";
