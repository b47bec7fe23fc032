//! Pieces: how a stretch of a file comes about, and their coding.
//!
//! Each piece is a number `len << 2 | kind` (LEB128; kind 0 literal, 1 copy, 2 zeros, 3 held). A copy is followed by how far its
//! source is from where it would be had nothing moved since the last copy (zigzag, LEB128): 0 for a change in place.
//!
//! Invariants: pieces that were decoded are at most [`PIECES_MAX`], none is empty, no copy passes 2⁶⁴, and all stay
//! within a segment's limits. Equal pieces are equal bytes.

use crate::varint;

/// LIMIT: pieces of one segment.
pub const PIECES_MAX: usize = 65_536;

/// LIMIT: literal bytes of one segment, what a receiver holds in memory for it.
pub const SEGMENT_BYTES_MAX: usize = 1 << 20;

/// LIMIT: bytes of the file that one segment covers, which bounds what a receiver does for one message.
pub const SEGMENT_SPAN_BYTES_MAX: u64 = 64 << 20;

/// How the next bytes of a file come about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// They are the next of the segment's literals.
    Literal {
        /// Bytes.
        len: u32,
    },
    /// The standby's version has them.
    Copy {
        /// Where in that version.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// They are all 0.
    Zeros {
        /// Bytes.
        len: u32,
    },
    /// The file that an interrupted try left has them, where they belong.
    Held {
        /// Bytes.
        len: u32,
    },
}

/// Why pieces from a peer are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PieceError {
    /// The bytes end within a piece, or a number has an overlong coding.
    #[error("a list of pieces breaks off or is malformed")]
    Malformed,
    /// A kind that doesn't exist.
    #[error("a piece of unknown kind")]
    Kind,
    /// A piece without bytes.
    #[error("an empty piece")]
    Empty,
    /// A copy that ends beyond 2⁶⁴, or a length beyond 2³².
    #[error("a piece of impossible length")]
    Length,
    /// A pack beyond [`crate::SOURCES_MAX`].
    #[error("a copy from a pack of impossible number")]
    Source,
    /// More than [`PIECES_MAX`], [`SEGMENT_BYTES_MAX`] or [`SEGMENT_SPAN_BYTES_MAX`].
    #[error("pieces over a segment's limits")]
    TooMany,
}

impl Piece {
    /// Bytes of the file that the piece covers.
    pub fn len_bytes(self) -> u32 {
        match self {
            Piece::Literal { len } | Piece::Copy { len, .. } | Piece::Zeros { len } | Piece::Held { len } => len,
        }
    }
}

/// The pieces as bytes; 2 to 4 for a typical one.
///
/// # Panics
/// When `pieces` break a rule that [`decode_pieces`] checks: a segment of [`crate::FileEncoder`] never does.
pub fn encode_pieces(pieces: &[Piece]) -> Vec<u8> {
    check_pieces(pieces).expect("a segment keeps its limits");
    let mut out = Vec::with_capacity(pieces.len() * 4);
    let mut expected = 0u64;
    for &piece in pieces {
        let kind = match piece {
            Piece::Literal { .. } => KIND_LITERAL,
            Piece::Copy { .. } => KIND_COPY,
            Piece::Zeros { .. } => KIND_ZEROS,
            Piece::Held { .. } => KIND_HELD,
        };
        varint::put(&mut out, u64::from(piece.len_bytes()) << KIND_BITS | kind);
        if let Piece::Copy { offset, .. } = piece {
            varint::put(&mut out, varint::zigzag(offset.wrapping_sub(expected).cast_signed()));
            expected = offset;
        }
        expected = expected.wrapping_add(u64::from(piece.len_bytes()));
    }
    out
}

/// Reads all of `bytes` as pieces; [`PIECES_MAX`] bounds what is allocated, 24 bytes a piece.
///
/// # Errors
/// [`PieceError`]: anything that [`encode_pieces`] doesn't produce.
pub fn decode_pieces(bytes: &[u8]) -> Result<Vec<Piece>, PieceError> {
    let mut rest = bytes;
    let mut pieces = Vec::with_capacity(bytes.len().min(PIECES_MAX) / 2);
    let mut expected = 0u64;
    while !rest.is_empty() {
        if pieces.len() == PIECES_MAX {
            return Err(PieceError::TooMany);
        }
        let head = varint::take(&mut rest).ok_or(PieceError::Malformed)?;
        let len = u32::try_from(head >> KIND_BITS).map_err(|_| PieceError::Length)?;
        let piece = match head & ((1 << KIND_BITS) - 1) {
            KIND_LITERAL => Piece::Literal { len },
            KIND_COPY => {
                let moved = varint::take(&mut rest).map(varint::unzigzag).ok_or(PieceError::Malformed)?;
                expected = expected.wrapping_add_signed(moved);
                Piece::Copy { offset: expected, len }
            }
            KIND_ZEROS => Piece::Zeros { len },
            _ => Piece::Held { len },
        };
        expected = expected.wrapping_add(u64::from(len));
        pieces.push(piece);
    }
    check_pieces(&pieces)?;
    Ok(pieces)
}

/// Checks what the types don't say.
fn check_pieces(pieces: &[Piece]) -> Result<(), PieceError> {
    let mut literal_bytes = 0;
    let mut span_bytes = 0;
    for &piece in pieces {
        let len = u64::from(piece.len_bytes());
        if len == 0 {
            return Err(PieceError::Empty);
        }
        span_bytes += len;
        match piece {
            Piece::Literal { .. } => literal_bytes += len,
            Piece::Copy { offset, .. } if offset.checked_add(len).is_none() => return Err(PieceError::Length),
            Piece::Copy { .. } | Piece::Zeros { .. } | Piece::Held { .. } => {}
        }
    }
    if pieces.len() > PIECES_MAX || literal_bytes > SEGMENT_BYTES_MAX as u64 || span_bytes > SEGMENT_SPAN_BYTES_MAX {
        return Err(PieceError::TooMany);
    }
    Ok(())
}

const KIND_BITS: u32 = 2;
const KIND_LITERAL: u64 = 0;
const KIND_COPY: u64 = 1;
const KIND_ZEROS: u64 = 2;
const KIND_HELD: u64 = 3;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use Piece::{Copy, Held, Literal, Zeros};

    fn check(bytes: &[u8], expected: Result<Vec<Piece>, PieceError>) {
        assert_eq!(decode_pieces(bytes), expected, "{bytes:02x?}");
        if let Ok(pieces) = expected {
            assert_eq!(encode_pieces(&pieces), bytes);
        }
    }

    #[test]
    fn pieces_keep_their_bytes() {
        check(&[], Ok(vec![]));
        check(&[0x04], Ok(vec![Literal { len: 1 }]));
        check(&[0x82, 0x80, 0x01], Ok(vec![Zeros { len: 4096 }]));
        check(&[0x83, 0x80, 0x01], Ok(vec![Held { len: 4096 }]));
        check(&[0x05, 0x00], Ok(vec![Copy { offset: 0, len: 1 }]));
        // A change in place: the copy goes on where it would be.
        check(&[0x29, 0x00, 0x14, 0x29, 0x00], Ok(vec![Copy { offset: 0, len: 10 }, Literal { len: 5 }, Copy { offset: 15, len: 10 }]));
        // An insertion of 5, then a piece from before.
        let moved = vec![Copy { offset: 0, len: 10 }, Literal { len: 5 }, Copy { offset: 10, len: 10 }, Copy { offset: 3, len: 1 }];
        check(&[0x29, 0x00, 0x14, 0x29, 0x09, 0x05, 0x21], Ok(moved));
        check(&[0x05, 0x03], Ok(vec![Copy { offset: u64::MAX - 1, len: 1 }]));
    }

    #[test]
    fn hostile_pieces_are_refused() {
        check(&[0x00], Err(PieceError::Empty));
        check(&[0x01, 0x00], Err(PieceError::Empty));
        check(&[0x02], Err(PieceError::Empty));
        check(&[0x03], Err(PieceError::Empty));
        check(&[0x05], Err(PieceError::Malformed));
        check(&[0x84], Err(PieceError::Malformed));
        check(&[0x84, 0x00], Err(PieceError::Malformed));
        check(&[0x05, 0x01], Err(PieceError::Length));
        check(&[0x82, 0x80, 0x80, 0x80, 0x40], Err(PieceError::Length));
        check(&[0x04; PIECES_MAX + 1], Err(PieceError::TooMany));
        assert_eq!(decode_pieces(&[0x04; PIECES_MAX]).map(|pieces| pieces.len()), Ok(PIECES_MAX));
        // One byte of literals and one byte of span over the limit.
        check(&[0x80, 0x80, 0x80, 0x02], Ok(vec![Literal { len: 1 << 20 }]));
        check(&[0x80, 0x80, 0x80, 0x02, 0x04], Err(PieceError::TooMany));
        check(&[0x82, 0x80, 0x80, 0x80, 0x01], Ok(vec![Zeros { len: 64 << 20 }]));
        check(&[0x82, 0x80, 0x80, 0x80, 0x01, 0x06], Err(PieceError::TooMany));
    }

    #[test]
    #[should_panic(expected = "keeps its limits")]
    fn an_encoder_that_breaks_a_limit_is_stopped() {
        encode_pieces(&[Literal { len: 0 }]);
    }

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(pieces) = decode_pieces(&bytes) {
                prop_assert_eq!(encode_pieces(&pieces), bytes);
            }
        }

        #[test]
        fn pieces_come_back(pieces in prop::collection::vec((0u8..4, any::<u64>(), 1u32..9000), 0..100)) {
            let pieces: Vec<Piece> = pieces.into_iter().map(|(kind, offset, len)| match kind {
                0 => Literal { len },
                1 => Copy { offset: offset >> 1, len },
                2 => Held { len },
                _ => Zeros { len },
            }).collect();
            prop_assert_eq!(decode_pieces(&encode_pieces(&pieces)), Ok(pieces));
        }
    }
}
