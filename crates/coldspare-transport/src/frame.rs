//! Frames: how messages and content lie in a stream of bytes.
//!
//! A frame is a header of 16 bytes, a body (one message) and a payload (content, possibly compressed). This module
//! decides which headers may exist and puts frames together from bytes as they arrive. It knows no socket, no clock
//! and no message.
//!
//! Invariants: nothing is allocated on the word of a header that wasn't checked; a payload unpacks to exactly the
//! announced bytes or not at all; a reader takes frames of one kind only.

use bytes::Bytes;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;

/// LIMIT: bytes of a body; more is refused on both ends.
pub const BODY_BYTES_MAX: u32 = 1 << 20;

/// LIMIT: bytes of a payload, on the wire and unpacked: 4 MiB and a little for content that compression made longer.
pub const PAYLOAD_BYTES_MAX: u32 = (4 << 20) + (64 << 10);

/// What the body of a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A [`crate::ToStandby`].
    ToStandby = 1,
    /// A [`crate::ToActive`].
    ToActive = 2,
    /// A [`crate::Data`]; the only kind with a payload.
    Data = 3,
}

/// The first 16 bytes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the body is.
    pub kind: Kind,
    /// Whether the payload is one zstd frame.
    pub zstd: bool,
    /// Bytes of the body.
    pub body_len: u32,
    /// Bytes of the payload on the wire.
    pub payload_len: u32,
    /// Bytes of the payload unpacked.
    pub raw_len: u32,
}

/// Content beside a message; who compresses is decided by the sender.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Payload {
    /// As it travels.
    pub bytes: Bytes,
    /// Bytes after unpacking.
    pub raw_len: u32,
    /// Whether `bytes` are one zstd frame.
    pub zstd: bool,
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The kind is unknown, or not the one that belongs on this stream.
    #[error("a frame of kind {0} where none is expected")]
    Kind(u8),
    /// Flags that this version doesn't know.
    #[error("a frame with unknown flags {0:#04x}")]
    Flags(u8),
    /// The reserved bytes are not zero.
    #[error("a frame with reserved bytes in use")]
    Reserved,
    /// The body is over its limit.
    #[error("a body of {0} bytes is over the limit of {BODY_BYTES_MAX}")]
    BodyLen(u32),
    /// The payload is over its limit, packed or unpacked.
    #[error("a payload of {0} bytes is over the limit of {PAYLOAD_BYTES_MAX}")]
    PayloadLen(u32),
    /// A payload where none may be.
    #[error("a message on the control stream with a payload")]
    ControlPayload,
    /// The payload isn't compressed but its two lengths differ.
    #[error("an uncompressed payload of {payload_len} bytes that claims {raw_len}")]
    PlainLen {
        /// On the wire.
        payload_len: u32,
        /// Claimed.
        raw_len: u32,
    },
    /// The payload isn't exactly one zstd frame of the announced length.
    #[error("a compressed payload is damaged: {0}")]
    Zstd(String),
}

impl Payload {
    /// No content.
    pub fn none() -> Payload {
        Payload::default()
    }

    /// Content as it is.
    ///
    /// # Panics
    /// Over 4 GiB.
    pub fn plain(bytes: impl Into<Bytes>) -> Payload {
        let bytes = bytes.into();
        let raw_len = u32::try_from(bytes.len()).expect("a payload is at most 4 MiB");
        Payload { bytes, raw_len, zstd: false }
    }

    /// Content of `raw_len` bytes, compressed to one zstd frame.
    pub fn zstd(bytes: impl Into<Bytes>, raw_len: u32) -> Payload {
        Payload { bytes: bytes.into(), raw_len, zstd: true }
    }
}

impl Header {
    /// The bytes on the wire, little-endian.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[1] = if self.zstd { FLAG_ZSTD } else { 0 };
        bytes[4..8].copy_from_slice(&self.body_len.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[12..].copy_from_slice(&self.raw_len.to_le_bytes());
        bytes
    }

    /// Checks the limits; on what is sent as on what is received.
    ///
    /// # Errors
    /// All of [`FrameError`] but `Zstd`.
    pub fn check(&self) -> Result<(), FrameError> {
        let Header { kind, zstd, body_len, payload_len, raw_len } = *self;
        if body_len > BODY_BYTES_MAX {
            return Err(FrameError::BodyLen(body_len));
        }
        if payload_len.max(raw_len) > PAYLOAD_BYTES_MAX {
            return Err(FrameError::PayloadLen(payload_len.max(raw_len)));
        }
        if kind != Kind::Data && (zstd || payload_len != 0 || raw_len != 0) {
            return Err(FrameError::ControlPayload);
        }
        if !zstd && payload_len != raw_len {
            return Err(FrameError::PlainLen { payload_len, raw_len });
        }
        Ok(())
    }
}

/// Reads and checks a header.
///
/// # Errors
/// All of [`FrameError`] but `Zstd`.
pub fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
    let kind = match bytes[0] {
        1 => Kind::ToStandby,
        2 => Kind::ToActive,
        3 => Kind::Data,
        other => return Err(FrameError::Kind(other)),
    };
    if bytes[1] & !FLAG_ZSTD != 0 {
        return Err(FrameError::Flags(bytes[1]));
    }
    if bytes[2..4] != [0, 0] {
        return Err(FrameError::Reserved);
    }
    let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let zstd = bytes[1] & FLAG_ZSTD != 0;
    let header = Header { kind, zstd, body_len: u32_at(4), payload_len: u32_at(8), raw_len: u32_at(12) };
    header.check()?;
    Ok(header)
}

/// Turns a payload of the wire into content of exactly `raw_len` bytes.
///
/// Memory: at most `raw_len` bytes beside zstd's fixed tables. Everything is unpacked in one call, in which the output
/// is the window: a frame that asks for a large window gets none.
///
/// # Errors
/// `Zstd`: not exactly one zstd frame that unpacks to `raw_len` bytes.
pub fn unpack(header: &Header, payload: Vec<u8>) -> Result<Vec<u8>, FrameError> {
    if !header.zstd {
        return Ok(payload);
    }
    let frame_len = zstd::zstd_safe::find_frame_compressed_size(&payload)
        .map_err(|code| FrameError::Zstd(zstd::zstd_safe::get_error_name(code).into()))?;
    if frame_len != payload.len() {
        return Err(FrameError::Zstd(format!("{} bytes follow the zstd frame", payload.len() - frame_len)));
    }
    let raw_len = header.raw_len as usize;
    let raw = zstd::bulk::decompress(&payload, raw_len).map_err(|e| FrameError::Zstd(e.to_string()))?;
    if raw.len() != raw_len {
        return Err(FrameError::Zstd(format!("{} bytes instead of {raw_len}", raw.len())));
    }
    Ok(raw)
}

/// A frame whose bytes have all come; the body isn't decoded and the payload not unpacked.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    /// Checked.
    pub header: Header,
    /// `header.body_len` bytes.
    pub body: Vec<u8>,
    /// `header.payload_len` bytes.
    pub payload: Vec<u8>,
}

/// Puts one frame after the other together from bytes as they come.
///
/// Input: fill the front of [`Assembly::space`], then tell how much by [`Assembly::advance`]. Output:
/// [`Assembly::take`], to be polled before more is filled.
#[derive(Debug)]
pub struct Assembly {
    kind: Kind,
    head: [u8; HEADER_BYTES],
    header: Option<Header>,
    body: Vec<u8>,
    payload: Vec<u8>,
    filled: usize,
}

impl Assembly {
    /// An assembly of frames of this kind; others are refused.
    pub fn new(kind: Kind) -> Assembly {
        Assembly { kind, head: [0; HEADER_BYTES], header: None, body: Vec::new(), payload: Vec::new(), filled: 0 }
    }

    /// Where the next bytes go; empty when a frame waits to be taken.
    pub fn space(&mut self) -> &mut [u8] {
        if self.filled < HEADER_BYTES {
            return &mut self.head[self.filled..];
        }
        let at = self.filled - HEADER_BYTES;
        match at.checked_sub(self.body.len()) {
            None => &mut self.body[at..],
            Some(at) => &mut self.payload[at..],
        }
    }

    /// Whether no byte of a frame has come yet.
    pub fn is_idle(&self) -> bool {
        self.filled == 0
    }

    /// Takes note that the first `count` bytes of the space were filled.
    ///
    /// Memory: body and payload are allocated when their header is complete and correct.
    ///
    /// # Errors
    /// As [`decode_header`], and `Kind` for a frame of another kind. The assembly stays where it is: the stream is lost.
    pub fn advance(&mut self, count: usize) -> Result<(), FrameError> {
        assert!(count <= self.space().len(), "more bytes than there was space for");
        self.filled += count;
        if self.filled == HEADER_BYTES && self.header.is_none() {
            let header = decode_header(&self.head)?;
            if header.kind != self.kind {
                return Err(FrameError::Kind(header.kind as u8));
            }
            self.body = vec![0; header.body_len as usize];
            self.payload = vec![0; header.payload_len as usize];
            self.header = Some(header);
        }
        Ok(())
    }

    /// Hands out the frame when all of it has come.
    pub fn take(&mut self) -> Option<Frame> {
        if !self.space().is_empty() {
            return None;
        }
        let header = self.header.take()?;
        self.filled = 0;
        Some(Frame { header, body: std::mem::take(&mut self.body), payload: std::mem::take(&mut self.payload) })
    }
}

const FLAG_ZSTD: u8 = 1;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(bytes: [u8; HEADER_BYTES], expected: Result<Header, FrameError>) {
        assert_eq!(decode_header(&bytes), expected, "{bytes:?}");
    }

    const PACKED: Header = Header { kind: Kind::Data, zstd: true, body_len: 0x0102, payload_len: 0x0304, raw_len: 0x0005_0607 };
    const PACKED_BYTES: [u8; 16] = [3, 1, 0, 0, 2, 1, 0, 0, 4, 3, 0, 0, 7, 6, 5, 0];

    fn with(at: usize, byte: u8) -> [u8; 16] {
        let mut bytes = PACKED_BYTES;
        bytes[at] = byte;
        bytes
    }

    #[test]
    fn the_header_is_frozen() {
        assert_eq!(PACKED.encode(), PACKED_BYTES);
        check(PACKED_BYTES, Ok(PACKED));
        let message = Header { kind: Kind::ToActive, zstd: false, body_len: 1 << 20, payload_len: 0, raw_len: 0 };
        assert_eq!(message.encode(), [2, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        check(message.encode(), Ok(message));
    }

    #[test]
    fn headers_that_lie_are_refused() {
        check(with(0, 0), Err(FrameError::Kind(0)));
        check(with(0, 4), Err(FrameError::Kind(4)));
        check(with(1, 3), Err(FrameError::Flags(3)));
        check(with(2, 1), Err(FrameError::Reserved));
        check(with(3, 1), Err(FrameError::Reserved));
        check(with(7, 0xff), Err(FrameError::BodyLen(0xff00_0102)));
        check(with(6, 0x10), Err(FrameError::BodyLen(0x0010_0102)));
        check(with(11, 0xff), Err(FrameError::PayloadLen(0xff00_0304)));
        check(with(15, 0xff), Err(FrameError::PayloadLen(0xff05_0607)));
        check(with(0, 1), Err(FrameError::ControlPayload));
        check(with(1, 0), Err(FrameError::PlainLen { payload_len: 0x0304, raw_len: 0x0005_0607 }));
    }

    #[test]
    fn a_header_that_lies_allocates_nothing() {
        let mut assembly = Assembly::new(Kind::Data);
        assembly.space().copy_from_slice(&with(11, 0xff));
        assert!(matches!(assembly.advance(16), Err(FrameError::PayloadLen(_))));
        assert_eq!((assembly.body.capacity(), assembly.payload.capacity()), (0, 0));
        let mut other_stream = Assembly::new(Kind::ToStandby);
        other_stream.space().copy_from_slice(&PACKED_BYTES);
        assert_eq!(other_stream.advance(16), Err(FrameError::Kind(3)));
        assert_eq!((other_stream.body.capacity(), other_stream.payload.capacity()), (0, 0));
    }

    fn check_unpack(payload: &[u8], raw_len: u32, expected: Option<&[u8]>) {
        let payload_len = u32::try_from(payload.len()).unwrap();
        let header = Header { kind: Kind::Data, zstd: true, body_len: 1, payload_len, raw_len };
        assert_eq!(unpack(&header, payload.to_vec()).ok().as_deref(), expected, "raw_len {raw_len}");
    }

    #[test]
    fn a_payload_unpacks_to_the_announced_bytes_or_not_at_all() {
        let raw = b"coldspare ".repeat(1000);
        let packed = zstd::bulk::compress(&raw, 3).unwrap();
        check_unpack(&packed, 10_000, Some(&raw));
        check_unpack(&packed, 9_999, None);
        check_unpack(&packed, 10_001, None);
        check_unpack(&packed[..packed.len() - 1], 10_000, None);
        check_unpack(&[packed.as_slice(), &[0]].concat(), 10_000, None);
        check_unpack(&[packed.as_slice(), packed.as_slice()].concat(), 20_000, None);
        check_unpack(b"", 0, None);
        check_unpack(&raw, 10_000, None);
    }

    #[test]
    fn a_zstd_bomb_is_refused() {
        // 256 MiB of zeros in about 8 KiB; written as a stream so that the frame doesn't tell its size.
        let mut bomb = zstd::stream::Encoder::new(Vec::new(), 19).unwrap();
        for _ in 0..256 {
            std::io::Write::write_all(&mut bomb, &[0; 1 << 20]).unwrap();
        }
        let bomb = bomb.finish().unwrap();
        assert!(bomb.len() < 64 << 10, "{}", bomb.len());
        check_unpack(&bomb, 4 << 20, None);
        check_unpack(&bomb, 1, None);
    }

    proptest! {
        #[test]
        fn frames_come_whole_in_whatever_pieces(
            frames in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..40), prop::collection::vec(any::<u8>(), 0..40)), 1..5),
            steps in prop::collection::vec(1usize..20, 1..20),
        ) {
            let mut wire = Vec::new();
            for (body, payload) in &frames {
                let (body_len, payload_len) = (body.len() as u32, payload.len() as u32);
                let header = Header { kind: Kind::Data, zstd: false, body_len, payload_len, raw_len: payload_len };
                wire.extend_from_slice(&header.encode());
                wire.extend_from_slice(body);
                wire.extend_from_slice(payload);
            }
            let mut assembly = Assembly::new(Kind::Data);
            let mut seen = Vec::new();
            let mut rest = wire.as_slice();
            for step in steps.iter().cycle() {
                while let Some(frame) = assembly.take() {
                    seen.push((frame.body, frame.payload));
                }
                if rest.is_empty() {
                    break;
                }
                let count = assembly.space().len().min(*step).min(rest.len());
                assembly.space()[..count].copy_from_slice(&rest[..count]);
                assembly.advance(count).unwrap();
                rest = &rest[count..];
            }
            prop_assert_eq!(seen, frames);
            prop_assert!(assembly.is_idle());
        }

        #[test]
        fn any_bytes_are_a_header_or_an_error(bytes in any::<[u8; 16]>(), payload in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(header) = decode_header(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
            let header = Header { kind: Kind::Data, zstd: true, body_len: 0, payload_len: payload.len() as u32, raw_len: 100 };
            let _ = unpack(&header, payload);
        }
    }
}
