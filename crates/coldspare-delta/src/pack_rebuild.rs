//! Rebuild of a pack: from the pieces of a segment to writes and to copies from other packs.
//!
//! It knows nothing of files: it says what to write where, and only after all of the segment was checked.

use crate::pack_piece::PackPiece;
use crate::rebuild::RebuildError;

/// One thing to do to the pack that is being rebuilt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackWrite<'a> {
    /// These bytes go to `offset`.
    Bytes {
        /// Where in the new pack.
        offset: u64,
        /// What.
        bytes: &'a [u8],
    },
    /// `len` bytes of another pack go from `from` there to `to` here.
    Copy {
        /// The number of that pack.
        source: u16,
        /// Where in that pack, which is long enough.
        from: u64,
        /// Where in the new pack.
        to: u64,
        /// Bytes, at least 1.
        len: u32,
    },
}

/// Gives `write` what the segment at `offset` of a pack of `size` bytes consists of, front to back.
///
/// `sources` are the sizes of the packs that may be copied from, by their numbers. Returns the offset after the segment,
/// where the next one starts.
///
/// # Errors
/// [`RebuildError`]: the pieces don't fit their literals, the pack or the sources, or `write` failed.
pub fn rebuild_pack<E>(
    offset: u64,
    pieces: &[PackPiece],
    literal: &[u8],
    size: u64,
    sources: &[u64],
    write: &mut dyn FnMut(PackWrite<'_>) -> Result<(), E>,
) -> Result<u64, RebuildError<E>> {
    check(offset, pieces, literal, size, sources)?;
    let mut at = offset;
    let mut literal = literal;
    for &piece in pieces {
        let next = match piece {
            PackPiece::Literal { len } => {
                let (bytes, rest) = literal.split_at(len as usize);
                literal = rest;
                PackWrite::Bytes { offset: at, bytes }
            }
            PackPiece::Copy { source, offset, len } => PackWrite::Copy { source, from: offset, to: at, len },
        };
        write(next).map_err(RebuildError::Write)?;
        at += u64::from(piece.len_bytes());
    }
    Ok(at)
}

fn check<E>(offset: u64, pieces: &[PackPiece], literal: &[u8], size: u64, sources: &[u64]) -> Result<(), RebuildError<E>> {
    let mut needed = 0;
    let mut end = offset;
    for &piece in pieces {
        let len = u64::from(piece.len_bytes());
        end = end.checked_add(len).filter(|&end| end <= size).ok_or(RebuildError::Size { offset, size })?;
        if len == 0 {
            return Err(RebuildError::Piece);
        }
        match piece {
            PackPiece::Literal { .. } => needed += len,
            PackPiece::Copy { source, offset, .. } => {
                let within = |&&bytes: &&u64| offset.checked_add(len).is_some_and(|end| end <= bytes);
                sources.get(usize::from(source)).filter(within).ok_or(RebuildError::Source { pack: source, offset })?;
            }
        }
    }
    if needed != literal.len() as u64 {
        return Err(RebuildError::Literal { needed, actual: literal.len() as u64 });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use PackPiece::{Copy, Literal};

    fn check_end(offset: u64, pieces: &[PackPiece], literal: &[u8], size: u64, expected: Result<u64, RebuildError<()>>) {
        let mut writes = 0;
        let end = rebuild_pack(offset, pieces, literal, size, &[50, 12, u64::MAX], &mut |_| {
            writes += 1;
            Ok(())
        });
        assert_eq!(end, expected, "{pieces:?}");
        assert_eq!(writes, if end.is_ok() { pieces.len() } else { 0 }, "a refused segment writes nothing");
    }

    #[test]
    fn segments_that_do_not_fit_write_nothing() {
        let all = [Literal { len: 2 }, Copy { source: 1, offset: 9, len: 3 }, Literal { len: 1 }];
        check_end(0, &[], b"", 0, Ok(0));
        check_end(10, &all, b"abc", 16, Ok(16));
        check_end(10, &all, b"abc", 15, Err(RebuildError::Size { offset: 10, size: 15 }));
        check_end(10, &all, b"ab", 16, Err(RebuildError::Literal { needed: 3, actual: 2 }));
        check_end(10, &all, b"abcd", 16, Err(RebuildError::Literal { needed: 3, actual: 4 }));
        let refuse = |source, offset, len, error| check_end(0, &[Copy { source, offset, len }], b"", 99, Err(error));
        refuse(1, 9, 4, RebuildError::Source { pack: 1, offset: 9 });
        refuse(3, 0, 1, RebuildError::Source { pack: 3, offset: 0 });
        refuse(2, u64::MAX, 1, RebuildError::Source { pack: 2, offset: u64::MAX });
        refuse(0, 0, 0, RebuildError::Piece);
        check_end(u64::MAX, &[Literal { len: 1 }], b"a", u64::MAX, Err(RebuildError::Size { offset: u64::MAX, size: u64::MAX }));
    }

    #[test]
    fn writes_follow_each_other() {
        let mut seen = Vec::new();
        let pieces = [Literal { len: 2 }, Copy { source: 1, offset: 9, len: 3 }, Literal { len: 1 }];
        let end = rebuild_pack::<()>(10, &pieces, b"abc", 99, &[0, 12], &mut |write| {
            seen.push(match write {
                PackWrite::Bytes { offset, bytes } => (offset, bytes.to_vec()),
                PackWrite::Copy { source, from, to, len } => (to, vec![source as u8, from as u8, len as u8]),
            });
            Ok(())
        });
        assert_eq!(seen, [(10, b"ab".to_vec()), (12, vec![1, 9, 3]), (15, b"c".to_vec())]);
        assert_eq!(end, Ok(16));
        let end = rebuild_pack(10, &pieces, b"abc", 99, &[0, 12], &mut |_| Err("full"));
        assert_eq!(end, Err(RebuildError::Write("full")));
    }
}
