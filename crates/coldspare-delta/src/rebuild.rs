//! Rebuild: from the pieces of a segment to writes into a file.
//!
//! It knows nothing of files: it says what to write where, and only after all of the segment was checked.

use crate::piece::Piece;

/// One thing to do to the file that is being rebuilt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write<'a> {
    /// These bytes go to `offset`.
    Bytes {
        /// Where in the new file.
        offset: u64,
        /// What.
        bytes: &'a [u8],
    },
    /// `len` bytes of the version that the standby holds go from `from` there to `to` here.
    Copy {
        /// Where in the held version; whether it is that long is for the writer to see.
        from: u64,
        /// Where in the new file.
        to: u64,
        /// Bytes, at least 1.
        len: u32,
    },
    /// `len` zeros go to `offset`.
    Zeros {
        /// Where in the new file.
        offset: u64,
        /// Bytes, at least 1.
        len: u32,
    },
    /// `len` bytes at `offset` are there already.
    Held {
        /// Where in the new file.
        offset: u64,
        /// Bytes, at least 1.
        len: u32,
    },
}

/// Why a segment was not rebuilt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RebuildError<E> {
    /// The pieces need more literals, or fewer, than came with them; nothing was written.
    #[error("pieces that need {needed} literal bytes came with {actual}")]
    Literal {
        /// Bytes that the pieces need.
        needed: u64,
        /// Bytes that came.
        actual: u64,
    },
    /// The segment ends beyond the file; nothing was written.
    #[error("a segment at {offset} passes the end of a file of {size} bytes")]
    Size {
        /// Where the segment starts.
        offset: u64,
        /// Bytes of the file.
        size: u64,
    },
    /// A piece without bytes, or a copy from beyond 2⁶⁴; nothing was written.
    #[error("an impossible piece")]
    Piece,
    /// A copy from a pack that there isn't, or from beyond its end; nothing was written.
    #[error("a copy from {offset} of pack {pack}, which isn't that long")]
    Source {
        /// The number of the pack.
        pack: u16,
        /// Where the copy starts.
        offset: u64,
    },
    /// The writer failed; what it was given before is written.
    #[error("writing a rebuilt file failed")]
    Write(#[source] E),
}

/// Gives `write` what the segment at `offset` of a file of `size` bytes consists of, front to back.
///
/// Returns the offset after the segment, where the next one starts.
///
/// # Errors
/// [`RebuildError`]: the pieces don't fit their literals or the file, or `write` failed.
pub fn rebuild<E>(
    offset: u64,
    pieces: &[Piece],
    literal: &[u8],
    size: u64,
    write: &mut dyn FnMut(Write<'_>) -> Result<(), E>,
) -> Result<u64, RebuildError<E>> {
    check(offset, pieces, literal, size)?;
    let mut at = offset;
    let mut literal = literal;
    for &piece in pieces {
        let next = match piece {
            Piece::Literal { len } => {
                let (bytes, rest) = literal.split_at(len as usize);
                literal = rest;
                Write::Bytes { offset: at, bytes }
            }
            Piece::Copy { offset, len } => Write::Copy { from: offset, to: at, len },
            Piece::Zeros { len } => Write::Zeros { offset: at, len },
            Piece::Held { len } => Write::Held { offset: at, len },
        };
        write(next).map_err(RebuildError::Write)?;
        at += u64::from(piece.len_bytes());
    }
    Ok(at)
}

fn check<E>(offset: u64, pieces: &[Piece], literal: &[u8], size: u64) -> Result<(), RebuildError<E>> {
    let mut needed = 0;
    let mut end = offset;
    for &piece in pieces {
        let len = u64::from(piece.len_bytes());
        end = end.checked_add(len).filter(|&end| end <= size).ok_or(RebuildError::Size { offset, size })?;
        match piece {
            _ if len == 0 => return Err(RebuildError::Piece),
            Piece::Literal { .. } => needed += len,
            Piece::Copy { offset, .. } if offset.checked_add(len).is_none() => return Err(RebuildError::Piece),
            Piece::Copy { .. } | Piece::Zeros { .. } | Piece::Held { .. } => {}
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
    use Piece::{Copy, Literal, Zeros};

    fn check_end(offset: u64, pieces: &[Piece], literal: &[u8], size: u64, expected: Result<u64, RebuildError<()>>) {
        let mut writes = 0;
        let end = rebuild(offset, pieces, literal, size, &mut |_| {
            writes += 1;
            Ok(())
        });
        assert_eq!(end, expected, "{pieces:?}");
        assert_eq!(writes, if end.is_ok() { pieces.len() } else { 0 }, "a refused segment writes nothing");
    }

    #[test]
    fn segments_that_do_not_fit_write_nothing() {
        let all = [Literal { len: 2 }, Copy { offset: 9, len: 3 }, Zeros { len: 4 }, Literal { len: 1 }];
        check_end(0, &[], b"", 0, Ok(0));
        check_end(10, &all, b"abc", 20, Ok(20));
        check_end(10, &all, b"abc", 19, Err(RebuildError::Size { offset: 10, size: 19 }));
        check_end(10, &all, b"ab", 20, Err(RebuildError::Literal { needed: 3, actual: 2 }));
        check_end(10, &all, b"abcd", 20, Err(RebuildError::Literal { needed: 3, actual: 4 }));
        check_end(u64::MAX, &[Zeros { len: 1 }], b"", u64::MAX, Err(RebuildError::Size { offset: u64::MAX, size: u64::MAX }));
        check_end(0, &[Zeros { len: 0 }], b"", 9, Err(RebuildError::Piece));
        check_end(0, &[Copy { offset: u64::MAX, len: 1 }], b"", 9, Err(RebuildError::Piece));
    }

    #[test]
    fn writes_follow_each_other() {
        let mut seen = Vec::new();
        let pieces = [Literal { len: 2 }, Copy { offset: 9, len: 3 }, Zeros { len: 4 }, Literal { len: 1 }];
        let end = rebuild::<()>(10, &pieces, b"abc", 99, &mut |write| {
            seen.push(match write {
                Write::Bytes { offset, bytes } => (offset, bytes.to_vec()),
                Write::Copy { from, to, len } => (to, vec![from as u8, len as u8]),
                Write::Zeros { offset, len } | Write::Held { offset, len } => (offset, vec![0; len as usize]),
            });
            Ok(())
        });
        assert_eq!(seen, [(10, b"ab".to_vec()), (12, vec![9, 3]), (15, vec![0; 4]), (19, b"c".to_vec())]);
        assert_eq!(end, Ok(20));
    }

    #[test]
    fn a_failed_write_stops_the_rest() {
        let mut writes = 0;
        let end = rebuild(0, &[Zeros { len: 1 }, Zeros { len: 1 }], b"", 2, &mut |_| {
            writes += 1;
            Err("full")
        });
        assert_eq!((end, writes), (Err(RebuildError::Write("full")), 1));
    }
}
