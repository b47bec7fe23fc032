//! Digests of contents, and the test for zeros.

/// BLAKE3 of a whole content that lies in memory, on the calling thread.
pub fn digest(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

/// BLAKE3 of a content that comes in parts.
#[derive(Debug, Clone, Default)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// Nothing hashed yet.
    pub fn new() -> Hasher {
        Hasher::default()
    }

    /// Adds the next bytes, on the calling thread; parts of 16 KiB and more are the fastest.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes added so far.
    pub fn finish(&self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}

/// Whether every byte is 0; so is each byte of nothing.
///
/// Cost: content other than zeros is mostly recognised by its first 256 bytes.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Without an early exit inside, the compiler ORs whole vectors.
    bytes.chunks(STRIDE_BYTES).all(|stride| stride.iter().fold(0, |any, &b| any | b) == 0)
}

const STRIDE_BYTES: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::noise;

    #[test]
    fn parts_have_the_digest_of_the_whole() {
        let bytes = noise(1, 100_000);
        let mut hasher = Hasher::new();
        for part in bytes.chunks(777) {
            hasher.update(part);
        }
        assert_eq!(hasher.finish(), digest(&bytes));
        assert_eq!(Hasher::new().finish(), digest(b""));
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        let mut bytes = vec![0; 700];
        assert!(is_zero(&bytes));
        assert!(is_zero(&[]));
        for at in 0..bytes.len() {
            bytes[at] = 0x10;
            assert!(!is_zero(&bytes), "byte {at}");
            bytes[at] = 0;
        }
    }
}
