//! Content for tests that does not compress, from a seed.

/// `len` bytes of xorshift64 started at `seed`, which is not 0. Golden tests depend on every byte.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    assert_ne!(seed, 0, "xorshift never leaves 0");
    let mut state = seed;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}
