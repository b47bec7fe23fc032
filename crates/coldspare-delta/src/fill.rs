//! Filling: segments as they grow, of pieces of either kind.
//!
//! Invariants: segments follow each other without a gap; each keeps the limits that decoders check; a piece that
//! continues the one before it is joined to it.

use crate::piece::{PIECES_MAX, Piece, SEGMENT_BYTES_MAX, SEGMENT_SPAN_BYTES_MAX};

/// A stretch of a file as it travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment<P = Piece> {
    /// Where in the file it starts.
    pub offset: u64,
    /// What it consists of, front to back.
    pub pieces: Vec<P>,
    /// The bytes of all `Literal` pieces, joined.
    pub literal: Vec<u8>,
}

/// What a segment is filled with.
pub(crate) trait Fill: Copy {
    /// The piece of the next `len` literals.
    fn literal(len: u32) -> Self;

    /// Bytes of the file that the piece covers.
    fn len_bytes(self) -> u32;

    /// The one piece that this and `next` are, if `next` continues it.
    fn joined(self, next: Self) -> Option<Self>;
}

/// The segment that is being filled.
#[derive(Debug)]
pub(crate) struct Filling<P> {
    /// Where the segment starts.
    start: u64,
    /// Where it ends so far, which is how much of the file was seen.
    offset: u64,
    pieces: Vec<P>,
    literal: Vec<u8>,
    emitted: u32,
}

impl<P> Default for Filling<P> {
    fn default() -> Filling<P> {
        Filling { start: 0, offset: 0, pieces: Vec::new(), literal: Vec::new(), emitted: 0 }
    }
}

impl<P: Fill> Filling<P> {
    /// How much of the file was seen.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// How many segments were given away.
    pub(crate) fn emitted(&self) -> u32 {
        self.emitted
    }

    /// Whether nothing is left to be given away.
    pub(crate) fn is_flushed(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whether `piece` would be joined to the last one.
    pub(crate) fn continues(&self, piece: P) -> bool {
        self.pieces.last().is_some_and(|last| last.joined(piece).is_some())
    }

    pub(crate) fn add_literal(&mut self, mut bytes: &[u8], emit: &mut dyn FnMut(Segment<P>)) {
        while !bytes.is_empty() {
            if self.literal.len() == SEGMENT_BYTES_MAX {
                self.flush(emit);
            }
            let len = self.room_for(bytes.len().min(SEGMENT_BYTES_MAX - self.literal.len()), emit);
            let (now, rest) = bytes.split_at(len as usize);
            self.literal.extend_from_slice(now);
            self.join(P::literal(len));
            bytes = rest;
        }
    }

    /// Adds a stretch without literals; `piece` makes its part of a length that starts so far behind its front.
    pub(crate) fn add(&mut self, len_bytes: usize, piece: impl Fn(u64, u32) -> P, emit: &mut dyn FnMut(Segment<P>)) {
        let mut done = 0;
        while done < len_bytes {
            let len = self.room_for(len_bytes - done, emit);
            self.join(piece(done as u64, len));
            done += len as usize;
        }
    }

    pub(crate) fn flush(&mut self, emit: &mut dyn FnMut(Segment<P>)) {
        if self.pieces.is_empty() {
            return;
        }
        emit(Segment { offset: self.start, pieces: std::mem::take(&mut self.pieces), literal: std::mem::take(&mut self.literal) });
        self.start = self.offset;
        self.emitted += 1;
    }

    /// How many of `len_bytes` fit the segment, or the next one if this one is full; at least 1.
    fn room_for(&mut self, len_bytes: usize, emit: &mut dyn FnMut(Segment<P>)) -> u32 {
        if self.offset - self.start == SEGMENT_SPAN_BYTES_MAX || self.pieces.len() == PIECES_MAX {
            self.flush(emit);
        }
        let room = SEGMENT_SPAN_BYTES_MAX - (self.offset - self.start);
        u32::try_from(room.min(len_bytes as u64)).expect("a segment's span fits 32 bits")
    }

    /// Appends `piece`, or lengthens the last one when it continues that.
    fn join(&mut self, piece: P) {
        match self.pieces.last_mut() {
            Some(last) if let Some(joined) = last.joined(piece) => *last = joined,
            _ => self.pieces.push(piece),
        }
        self.offset += u64::from(piece.len_bytes());
    }
}

impl Fill for Piece {
    fn literal(len: u32) -> Piece {
        Piece::Literal { len }
    }

    fn len_bytes(self) -> u32 {
        Piece::len_bytes(self)
    }

    fn joined(self, next: Piece) -> Option<Piece> {
        match (self, next) {
            (Piece::Literal { len }, Piece::Literal { len: more }) => Some(Piece::Literal { len: len + more }),
            (Piece::Zeros { len }, Piece::Zeros { len: more }) => Some(Piece::Zeros { len: len + more }),
            (Piece::Copy { offset, len }, Piece::Copy { offset: next, len: more }) if offset + u64::from(len) == next => {
                Some(Piece::Copy { offset, len: len + more })
            }
            _ => None,
        }
    }
}
