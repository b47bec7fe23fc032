//! Pieces from a peer: one coding each, limits kept, and rebuilding writes the segment front to back without a gap.

#![no_main]

use coldspare_delta::{Piece, SEGMENT_BYTES_MAX, SEGMENT_SPAN_BYTES_MAX, Write, decode_pieces, encode_pieces, rebuild};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(pieces) = decode_pieces(bytes) else { return };
    assert_eq!(encode_pieces(&pieces), bytes);
    let span: u64 = pieces.iter().map(|piece| u64::from(piece.len_bytes())).sum();
    let literal_bytes: usize = pieces.iter().map(|&piece| if let Piece::Literal { len } = piece { len as usize } else { 0 }).sum();
    assert!(span <= SEGMENT_SPAN_BYTES_MAX && literal_bytes <= SEGMENT_BYTES_MAX);

    let start = bytes.len() as u64;
    let literal = vec![1; literal_bytes];
    let mut at = start;
    let end = rebuild::<()>(start, &pieces, &literal, start + span, &mut |write| {
        let (offset, len) = match write {
            Write::Bytes { offset, bytes } => (offset, bytes.len() as u64),
            Write::Copy { to, from, len } => {
                assert!(from.checked_add(u64::from(len)).is_some());
                (to, u64::from(len))
            }
            Write::Zeros { offset, len } | Write::Held { offset, len } => (offset, u64::from(len)),
        };
        assert!(offset == at && len > 0);
        at += len;
        Ok(())
    });
    assert_eq!((end, at), (Ok(start + span), start + span));

    let refuse = |literal: &[u8], size| {
        let end = rebuild::<()>(start, &pieces, literal, size, &mut |_| panic!("a refused segment writes nothing"));
        assert!(end.is_err());
    };
    refuse(&[&literal[..], &[1]].concat(), start + span);
    if span > 0 {
        refuse(&literal, start + span - 1);
    }
});
