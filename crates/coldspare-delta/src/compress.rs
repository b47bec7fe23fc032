//! Compression, where it pays.
//!
//! Decides from a sample whether a content is worth the work: packs, jars and images are not.
//!
//! Invariants: what is packed is never larger than what went in; unpacking gives exactly the length that was announced
//! and allocates no more than that.

/// LIMIT: bytes that one packed content may unpack to; more is refused before anything is allocated.
pub const UNPACKED_BYTES_MAX: usize = 64 << 20;

/// A content as it travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packed {
    /// As it is.
    Raw(Vec<u8>),
    /// One zstd frame.
    Zstd(Vec<u8>),
}

/// Why bytes from a peer don't unpack.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The announced length is over [`UNPACKED_BYTES_MAX`].
    #[error("a compressed content that announces {0} bytes, more than the limit")]
    TooLong(usize),
    /// Not a zstd frame, a damaged one, or one that holds more than was announced.
    #[error("a compressed content that is damaged or longer than announced")]
    Damaged(#[source] std::io::Error),
    /// The frame holds less than was announced.
    #[error("a compressed content of {actual} bytes that announces {announced}")]
    Length {
        /// Bytes that were announced.
        announced: usize,
        /// Bytes that it holds.
        actual: usize,
    },
}

/// Compresses `bytes` when that pays.
///
/// `level` is zstd's, 1 to 19 in practice. The result is at most as long as `bytes`, and `Raw` unless it is clearly
/// shorter.
///
/// Cost: for what doesn't compress, one pass of level 1 over a sample of 12 KiB and no copy of the whole; contents below
/// 24 KiB are tried without a sample.
pub fn pack(bytes: Vec<u8>, level: i32) -> Packed {
    if bytes.len() < WORTH_TRYING_BYTES_MIN || !sample_shrinks(&bytes) {
        return Packed::Raw(bytes);
    }
    match zstd::bulk::compress(&bytes, level) {
        Ok(packed) if is_below(packed.len(), bytes.len(), WHOLE_PERCENT) => Packed::Zstd(packed),
        // The library can only fail for want of memory: not compressing is then right too.
        _ => Packed::Raw(bytes),
    }
}

/// Unpacks the bytes of [`Packed::Zstd`] to exactly `raw_len` bytes.
///
/// Cost: one allocation of `raw_len`. The frame's own window costs nothing whatever it claims: decoding in one go has
/// the result itself for its window.
///
/// # Errors
/// [`UnpackError`]: over the limit, damaged, longer or shorter than announced.
pub fn unpack(bytes: &[u8], raw_len: usize) -> Result<Vec<u8>, UnpackError> {
    if raw_len > UNPACKED_BYTES_MAX {
        return Err(UnpackError::TooLong(raw_len));
    }
    let raw = zstd::bulk::decompress(bytes, raw_len).map_err(UnpackError::Damaged)?;
    if raw.len() != raw_len {
        return Err(UnpackError::Length { announced: raw_len, actual: raw.len() });
    }
    Ok(raw)
}

fn sample_shrinks(bytes: &[u8]) -> bool {
    let sample_bytes = SAMPLE_PLACES * SAMPLE_BYTES;
    if bytes.len() < 2 * sample_bytes {
        return true;
    }
    let mut sample = Vec::with_capacity(sample_bytes);
    for place in 0..SAMPLE_PLACES {
        let at = (bytes.len() - SAMPLE_BYTES) / (SAMPLE_PLACES - 1) * place;
        sample.extend_from_slice(&bytes[at..at + SAMPLE_BYTES]);
    }
    zstd::bulk::compress(&sample, 1).is_ok_and(|packed| is_below(packed.len(), sample.len(), SAMPLE_PERCENT))
}

fn is_below(part: usize, whole: usize, percent: usize) -> bool {
    part * 100 < whole * percent
}

/// Below this a frame's header eats the gain.
const WORTH_TRYING_BYTES_MIN: usize = 64;

const SAMPLE_PLACES: usize = 3;
const SAMPLE_BYTES: usize = 4 << 10;
const SAMPLE_PERCENT: usize = 90;
const WHOLE_PERCENT: usize = 95;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::noise::noise;

    #[derive(Debug, PartialEq)]
    enum Kind {
        Raw,
        Zstd,
    }

    fn check(bytes: Vec<u8>, expected: Kind) {
        let kind = match pack(bytes.clone(), 3) {
            Packed::Raw(raw) => {
                assert_eq!(raw, bytes);
                Kind::Raw
            }
            Packed::Zstd(packed) => {
                assert_eq!(unpack(&packed, bytes.len()).unwrap(), bytes);
                Kind::Zstd
            }
        };
        assert_eq!(kind, expected, "{} bytes", bytes.len());
    }

    #[test]
    fn only_what_shrinks_is_compressed() {
        check(Vec::new(), Kind::Raw);
        check(vec![7; 63], Kind::Raw);
        check(vec![7; 64], Kind::Zstd);
        check(b"commit refs/heads/main\n".repeat(50), Kind::Zstd);
        check(noise(1, 1000), Kind::Raw);
        check(noise(1, 1 << 20), Kind::Raw);
        // The sample finds noise; that the rest is zeros is not noticed. It costs bytes, not correctness.
        let mut hidden = vec![0; 1 << 20];
        for (seed, at) in [(1, 0), (2, (1 << 19) - 2048), (3, (1 << 20) - 4096)] {
            hidden[at..at + 4096].copy_from_slice(&noise(seed, 4096));
        }
        check(hidden, Kind::Raw);
    }

    #[test]
    fn a_bomb_is_refused_before_it_bursts() {
        let bomb = zstd::bulk::compress(&vec![0; 32 << 20], 19).unwrap();
        assert!(bomb.len() < 8 << 10);
        assert!(matches!(unpack(&bomb, 1 << 20), Err(UnpackError::Damaged(_))));
        assert!(matches!(unpack(&bomb, (32 << 20) - 1), Err(UnpackError::Damaged(_))));
        assert!(matches!(unpack(&bomb, (32 << 20) + 1), Err(UnpackError::Length { actual: 33_554_432, .. })));
        assert!(matches!(unpack(&bomb, UNPACKED_BYTES_MAX + 1), Err(UnpackError::TooLong(_))));
        assert!(matches!(unpack(&bomb, usize::MAX), Err(UnpackError::TooLong(_))));
    }

    #[test]
    fn a_frame_that_hides_its_length_gets_no_more_room() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
        encoder.include_contentsize(false).unwrap();
        encoder.window_log(27).unwrap();
        std::io::Write::write_all(&mut encoder, &vec![1; 4 << 20]).unwrap();
        let frame = encoder.finish().unwrap();
        assert!(matches!(unpack(&frame, 1000), Err(UnpackError::Damaged(_))));
        assert_eq!(unpack(&frame, 4 << 20).unwrap().capacity(), 4 << 20);
    }

    #[test]
    fn damage_is_an_error() {
        let Packed::Zstd(packed) = pack(b"ref: refs/heads/main\n".repeat(100), 3) else { panic!("text shrinks") };
        for len in 0..packed.len() {
            assert!(unpack(&packed[..len], 2100).is_err(), "{len} bytes");
        }
        assert!(unpack(b"nothing of the kind", 2100).is_err());
        assert!(unpack(b"", 1).is_err());
    }

    proptest! {
        #[test]
        fn packing_never_grows_and_unpacking_restores(seed in 1u64.., len in 0usize..60_000, mask in any::<u8>(), level in 1i32..6) {
            let bytes: Vec<u8> = noise(seed, len).iter().map(|b| b & mask).collect();
            match pack(bytes.clone(), level) {
                Packed::Raw(raw) => prop_assert_eq!(raw, bytes),
                Packed::Zstd(packed) => {
                    prop_assert!(packed.len() < bytes.len());
                    prop_assert_eq!(unpack(&packed, bytes.len()).unwrap(), bytes);
                }
            }
        }

        #[test]
        fn unpacking_anything_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..200), raw_len in 0usize..100_000) {
            let _ = unpack(&bytes, raw_len);
            bytes.splice(0..0, [0x28, 0xb5, 0x2f, 0xfd]);
            let _ = unpack(&bytes, raw_len);
        }
    }
}
