//! Pieces of a pack: literals and copies from several packs, and their coding.
//!
//! Each piece is a number `len << 2 | kind` (LEB128). Kind 0 is a literal; 1 a copy from the pack that the last copy was
//! from, at first pack 0; 2 a copy from another, followed by how far its number is from the last one's (zigzag, LEB128).
//! A copy ends with how far its source is from where the last copy from that pack ended, and the literals since then if
//! no copy from elsewhere came between (zigzag, LEB128).
//!
//! Invariants: pieces that were decoded are at most [`PIECES_MAX`], none is empty, no copy passes 2⁶⁴ or is from a pack
//! beyond [`SOURCES_MAX`], and all stay within a segment's limits. Equal pieces are equal bytes.

use crate::fill::Fill;
use crate::pack_base::SOURCES_MAX;
use crate::piece::{PIECES_MAX, PieceError, SEGMENT_BYTES_MAX, SEGMENT_SPAN_BYTES_MAX};
use crate::varint;

/// How the next bytes of a pack come about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackPiece {
    /// They are the next of the segment's literals.
    Literal {
        /// Bytes.
        len: u32,
    },
    /// A pack that the standby has has them.
    Copy {
        /// The number of that pack among the bases.
        source: u16,
        /// Where in that pack.
        offset: u64,
        /// Bytes.
        len: u32,
    },
}

impl PackPiece {
    /// Bytes of the pack that the piece covers.
    pub fn len_bytes(self) -> u32 {
        match self {
            PackPiece::Literal { len } | PackPiece::Copy { len, .. } => len,
        }
    }
}

impl Fill for PackPiece {
    fn literal(len: u32) -> PackPiece {
        PackPiece::Literal { len }
    }

    fn len_bytes(self) -> u32 {
        PackPiece::len_bytes(self)
    }

    fn joined(self, next: PackPiece) -> Option<PackPiece> {
        match (self, next) {
            (PackPiece::Literal { len }, PackPiece::Literal { len: more }) => Some(PackPiece::Literal { len: len + more }),
            (PackPiece::Copy { source, offset, len }, PackPiece::Copy { source: next_source, offset: next, len: more })
                if source == next_source && offset + u64::from(len) == next =>
            {
                Some(PackPiece::Copy { source, offset, len: len + more })
            }
            _ => None,
        }
    }
}

/// The pieces as bytes; 1 for a typical literal, 4 to 7 for a copy.
///
/// # Panics
/// When `pieces` break a rule that [`decode_pack_pieces`] checks: a segment of [`crate::PackEncoder`] never does.
pub fn encode_pack_pieces(pieces: &[PackPiece]) -> Vec<u8> {
    check_pieces(pieces).expect("a segment keeps its limits");
    let mut out = Vec::with_capacity(pieces.len() * 4);
    let mut expected = Expected::default();
    for &piece in pieces {
        let len = u64::from(piece.len_bytes()) << KIND_BITS;
        match piece {
            PackPiece::Literal { .. } => varint::put(&mut out, len | KIND_LITERAL),
            PackPiece::Copy { source, offset, .. } => {
                let away = i64::from(source) - i64::from(expected.source);
                varint::put(&mut out, len | if away == 0 { KIND_SAME } else { KIND_OTHER });
                if away != 0 {
                    varint::put(&mut out, varint::zigzag(away));
                }
                let from = expected.from(source);
                varint::put(&mut out, varint::zigzag(offset.wrapping_sub(*from).cast_signed()));
                *from = offset;
            }
        }
        expected.pass(piece.len_bytes());
    }
    out
}

/// Reads all of `bytes` as pieces; [`PIECES_MAX`] bounds what is allocated, 24 bytes a piece.
///
/// # Errors
/// [`PieceError`]: anything that [`encode_pack_pieces`] doesn't produce.
pub fn decode_pack_pieces(bytes: &[u8]) -> Result<Vec<PackPiece>, PieceError> {
    let mut rest = bytes;
    let mut pieces = Vec::with_capacity(bytes.len().min(PIECES_MAX) / 2);
    let mut expected = Expected::default();
    while !rest.is_empty() {
        if pieces.len() == PIECES_MAX {
            return Err(PieceError::TooMany);
        }
        let head = varint::take(&mut rest).ok_or(PieceError::Malformed)?;
        let len = u32::try_from(head >> KIND_BITS).map_err(|_| PieceError::Length)?;
        let mut number = || varint::take(&mut rest).map(varint::unzigzag).ok_or(PieceError::Malformed);
        let away = match head & ((1 << KIND_BITS) - 1) {
            KIND_LITERAL => None,
            KIND_SAME => Some(0),
            KIND_OTHER => Some(number()?).filter(|&away| away != 0).ok_or(PieceError::Malformed).map(Some)?,
            _ => return Err(PieceError::Kind),
        };
        pieces.push(match away {
            None => PackPiece::Literal { len },
            Some(away) => {
                let source = i64::from(expected.source).checked_add(away).and_then(|source| u16::try_from(source).ok());
                let source = source.filter(|&source| usize::from(source) < SOURCES_MAX).ok_or(PieceError::Source)?;
                let from = expected.from(source);
                *from = from.wrapping_add_signed(number()?);
                PackPiece::Copy { source, offset: *from, len }
            }
        });
        expected.pass(len);
    }
    check_pieces(&pieces)?;
    Ok(pieces)
}

/// Where the next copy would be from, had nothing moved.
#[derive(Default)]
struct Expected {
    /// The pack that the last copy was from.
    source: u16,
    /// By pack; at most [`SOURCES_MAX`].
    offsets: Vec<u64>,
}

impl Expected {
    /// The offset expected of `source`, which is the pack of the last copy from now on.
    fn from(&mut self, source: u16) -> &mut u64 {
        self.source = source;
        let source = usize::from(source);
        if self.offsets.len() <= source {
            self.offsets.resize(source + 1, 0);
        }
        &mut self.offsets[source]
    }

    /// Goes on by a piece of `len`.
    fn pass(&mut self, len: u32) {
        let from = self.from(self.source);
        *from = from.wrapping_add(u64::from(len));
    }
}

/// Checks what the types don't say.
fn check_pieces(pieces: &[PackPiece]) -> Result<(), PieceError> {
    let mut literal_bytes = 0;
    let mut span_bytes = 0;
    for &piece in pieces {
        let len = u64::from(piece.len_bytes());
        if len == 0 {
            return Err(PieceError::Empty);
        }
        span_bytes += len;
        match piece {
            PackPiece::Literal { .. } => literal_bytes += len,
            PackPiece::Copy { source, .. } if usize::from(source) >= SOURCES_MAX => return Err(PieceError::Source),
            PackPiece::Copy { offset, .. } if offset.checked_add(len).is_none() => return Err(PieceError::Length),
            PackPiece::Copy { .. } => {}
        }
    }
    if pieces.len() > PIECES_MAX || literal_bytes > SEGMENT_BYTES_MAX as u64 || span_bytes > SEGMENT_SPAN_BYTES_MAX {
        return Err(PieceError::TooMany);
    }
    Ok(())
}

const KIND_BITS: u32 = 2;
const KIND_LITERAL: u64 = 0;
const KIND_SAME: u64 = 1;
const KIND_OTHER: u64 = 2;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use PackPiece::{Copy, Literal};

    fn check(bytes: &[u8], expected: Result<Vec<PackPiece>, PieceError>) {
        assert_eq!(decode_pack_pieces(bytes), expected, "{bytes:02x?}");
        if let Ok(pieces) = expected {
            assert_eq!(encode_pack_pieces(&pieces), bytes);
        }
    }

    fn copy(source: u16, offset: u64, len: u32) -> PackPiece {
        Copy { source, offset, len }
    }

    #[test]
    fn pieces_keep_their_bytes() {
        check(&[], Ok(vec![]));
        check(&[0x04], Ok(vec![Literal { len: 1 }]));
        check(&[0x05, 0x00], Ok(vec![copy(0, 0, 1)]));
        // A header that differs, of the same length: the copy goes on where it would be.
        check(&[0x0c, 0x29, 0x00, 0x14, 0x29, 0x00], Ok(vec![Literal { len: 3 }, copy(0, 3, 10), Literal { len: 5 }, copy(0, 18, 10)]));
        // Two packs by turns, each going on where it was, then a gap.
        let turns = vec![copy(2, 12, 10), copy(1, 12, 10), copy(2, 22, 10), copy(1, 22, 10), copy(1, 33, 1)];
        check(&[0x2a, 0x04, 0x18, 0x2a, 0x01, 0x18, 0x2a, 0x02, 0x00, 0x2a, 0x01, 0x00, 0x05, 0x02], Ok(turns));
        check(&[0x05, 0x03], Ok(vec![copy(0, u64::MAX - 1, 1)]));
        check(&[0x06, 0xfe, 0x3f, 0x00], Ok(vec![copy(4095, 0, 1)]));
    }

    #[test]
    fn hostile_pieces_are_refused() {
        check(&[0x00], Err(PieceError::Empty));
        check(&[0x01, 0x00], Err(PieceError::Empty));
        check(&[0x07], Err(PieceError::Kind));
        check(&[0x05], Err(PieceError::Malformed));
        check(&[0x06, 0x02], Err(PieceError::Malformed));
        check(&[0x06, 0x00, 0x00], Err(PieceError::Malformed));
        check(&[0x84, 0x00], Err(PieceError::Malformed));
        check(&[0x06, 0x01, 0x00], Err(PieceError::Source));
        check(&[0x06, 0x80, 0x40, 0x00], Err(PieceError::Source));
        check(&[&[0x06][..], &[0xff; 9], &[0x01, 0x00]].concat(), Err(PieceError::Source));
        check(&[0x05, 0x01], Err(PieceError::Length));
        check(&[0x84, 0x80, 0x80, 0x80, 0x40], Err(PieceError::Length));
        check(&[0x04; PIECES_MAX + 1], Err(PieceError::TooMany));
        assert_eq!(decode_pack_pieces(&[0x04; PIECES_MAX]).map(|pieces| pieces.len()), Ok(PIECES_MAX));
        // One byte of literals and one byte of span over the limit.
        check(&[0x80, 0x80, 0x80, 0x02], Ok(vec![Literal { len: 1 << 20 }]));
        check(&[0x80, 0x80, 0x80, 0x02, 0x04], Err(PieceError::TooMany));
        check(&[0x81, 0x80, 0x80, 0x80, 0x01, 0x00], Ok(vec![copy(0, 0, 64 << 20)]));
        check(&[0x81, 0x80, 0x80, 0x80, 0x01, 0x00, 0x04], Err(PieceError::TooMany));
    }

    #[test]
    #[should_panic(expected = "keeps its limits")]
    fn an_encoder_that_breaks_a_limit_is_stopped() {
        encode_pack_pieces(&[copy(4096, 0, 1)]);
    }

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0u8..40], 0..40)) {
            if let Ok(pieces) = decode_pack_pieces(&bytes) {
                prop_assert_eq!(encode_pack_pieces(&pieces), bytes);
            }
        }

        #[test]
        fn pieces_come_back(pieces in prop::collection::vec((0u16..9, any::<u64>(), 1u32..9000), 0..100)) {
            let pieces: Vec<PackPiece> = pieces.into_iter().map(|(source, offset, len)| match source {
                0 => Literal { len },
                _ => copy(source * source * 50, offset >> 1, len),
            }).collect();
            prop_assert_eq!(decode_pack_pieces(&encode_pack_pieces(&pieces)), Ok(pieces));
        }
    }
}
