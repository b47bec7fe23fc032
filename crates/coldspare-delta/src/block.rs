//! Blocks: which parts of a large file an interrupted try left on the standby.
//!
//! Both ends cut a file at the same multiples of [`block_bytes`]; the standby tells the digests of what it holds, the
//! active compares. A block that was never written, or was lost with the power, is another or a block of zeros.

use crate::digest::Hasher;

/// LIMIT: blocks of one file.
pub const BLOCKS_MAX: usize = 16_384;

/// The first half of a block's BLAKE3.
pub type BlockDigest = [u8; 16];

/// Bytes of the blocks of a file of `size` bytes: up to 1 GiB as small as a sixteenth of a segment.
pub fn block_bytes(size: u64) -> u64 {
    size.div_ceil(BLOCKS_MAX as u64).next_power_of_two().max(BLOCK_BYTES_MIN)
}

/// Digests of the blocks of a file that comes in parts; holds no content, whatever size the peer says that a file has.
#[derive(Debug)]
pub struct BlockHasher {
    block_bytes: u64,
    /// Bytes of the block that isn't whole yet.
    filled: u64,
    hasher: Hasher,
    digests: Vec<BlockDigest>,
}

impl BlockHasher {
    /// Nothing hashed yet of a file that is to have `size` bytes.
    pub fn new(size: u64) -> BlockHasher {
        BlockHasher { block_bytes: block_bytes(size), filled: 0, hasher: Hasher::new(), digests: Vec::new() }
    }

    /// Adds the next bytes, on the calling thread.
    pub fn update(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let missing = usize::try_from(self.block_bytes - self.filled).unwrap_or(usize::MAX);
            let (mine, others) = rest.split_at(missing.min(rest.len()));
            self.hasher.update(mine);
            self.filled += mine.len() as u64;
            if self.filled == self.block_bytes {
                self.end_block();
            }
            rest = others;
        }
    }

    /// The digests of all blocks, of which the last may be shorter.
    pub fn finish(mut self) -> Vec<BlockDigest> {
        if self.filled > 0 {
            self.end_block();
        }
        self.digests
    }

    fn end_block(&mut self) {
        let digest = std::mem::take(&mut self.hasher).finish();
        self.digests.push(*digest.first_chunk().expect("a digest is longer"));
        self.filled = 0;
    }
}

/// The blocks of a file that the standby holds as they are here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldBlocks {
    size: u64,
    block_bytes: u64,
    are_held: Vec<bool>,
}

impl HeldBlocks {
    /// Those of a file of `size` bytes whose digests are the same on both sides.
    pub fn new(size: u64, here: &[BlockDigest], there: &[BlockDigest]) -> HeldBlocks {
        let are_held = here.iter().zip(there).map(|(here, there)| here == there).collect();
        HeldBlocks { size, block_bytes: block_bytes(size), are_held }
    }

    /// Whether the standby holds all of the `len` bytes at `offset`.
    pub fn cover(&self, offset: u64, len: u64) -> bool {
        let Some(end) = offset.checked_add(len).filter(|&end| end <= self.size) else { return false };
        let blocks = offset / self.block_bytes..end.div_ceil(self.block_bytes);
        blocks.into_iter().all(|block| usize::try_from(block).is_ok_and(|block| self.are_held.get(block) == Some(&true)))
    }

    /// Bytes that the standby holds.
    pub fn bytes(&self) -> u64 {
        let bytes_of = |block: u64| self.block_bytes.min(self.size.saturating_sub(block * self.block_bytes));
        (0..).zip(&self.are_held).filter(|(_, is_held)| **is_held).map(|(block, _)| bytes_of(block)).sum()
    }
}

const BLOCK_BYTES_MIN: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::noise;

    #[test]
    fn a_file_has_few_blocks_of_a_round_size() {
        for (size, expected) in
            [(0, 64 << 10), (1 << 30, 64 << 10), ((1 << 30) + 1, 128 << 10), (10 << 30, 1 << 20), (1 << 44, 1 << 30), (u64::MAX, 1 << 50)]
        {
            assert_eq!(block_bytes(size), expected, "{size}");
            assert!(size.div_ceil(expected) <= BLOCKS_MAX as u64);
        }
    }

    #[test]
    fn what_is_the_same_on_both_sides_is_held() {
        let here = noise(1, (256 << 10) + 100);
        let mut there = here.clone();
        there[70_000] ^= 1; // in the second of five blocks
        let size = here.len() as u64;
        let digests = |bytes: &[u8]| {
            let hashed_in = |step: usize| {
                let mut hasher = BlockHasher::new(size);
                bytes.chunks(step).for_each(|part| hasher.update(part));
                hasher.finish()
            };
            assert_eq!(hashed_in(bytes.len()), hashed_in(999), "parts show");
            hashed_in(70_001)
        };
        let held = HeldBlocks::new(here.len() as u64, &digests(&here), &digests(&there));
        let block = 64 << 10;
        for (offset, len, expected) in [
            (0, block, true),
            (0, block + 1, false),
            (block, 1, false),
            (2 * block, 2 * block + 100, true),
            (2 * block, 2 * block + 101, false), // beyond the end
            (3 * block + 5, 10, true),
            (4 * block, 100, true),
            (u64::MAX, 1, false),
        ] {
            assert_eq!(held.cover(offset, len), expected, "{len} at {offset}");
        }
        assert_eq!(held.bytes(), 3 * block + 100);
        // A standby that has less, or more, than the file.
        let less = HeldBlocks::new(here.len() as u64, &digests(&here), &digests(&here[..100_000]));
        assert!(less.cover(0, block) && !less.cover(0, 100_000));
        let more = HeldBlocks::new(100_000, &digests(&here[..100_000]), &digests(&here));
        assert!(more.cover(0, block) && !more.cover(0, 100_000));
    }
}
