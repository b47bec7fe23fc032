//! A fast hash of states, for telling equal ones apart from others within one run; no adversary chooses them.

/// Folds `value` into `seed`.
pub(super) fn mix(seed: u64, value: u64) -> u64 {
    let product = u128::from(seed ^ 0x9E37_79B9_7F4A_7C15) * u128::from(value ^ 0xD1B5_4A32_D192_ED03);
    (product as u64) ^ ((product >> 64) as u64).wrapping_add(value.rotate_left(29))
}

/// Of a byte string.
pub(super) fn bytes(bytes: &[u8]) -> u64 {
    let mut chunks = bytes.chunks_exact(8);
    let mut hash = 0x51_7C_C1_B7_27_22_0A_95;
    for chunk in &mut chunks {
        hash = mix(hash, u64::from_le_bytes(chunk.try_into().expect("eight bytes")));
    }
    let mut last = [0; 8];
    last[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    mix(mix(hash, u64::from_le_bytes(last)), bytes.len() as u64)
}
