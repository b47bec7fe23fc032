//! Chunks: where a content is cut, and what the standby's version consists of.
//!
//! Boundaries follow the content (FastCDC, Xia et al. 2020), so an insertion moves them along instead of changing them.
//! They are part of the contract between two runs and two hosts: the library is pinned, the sizes of each class are
//! frozen, and [`CHUNKING_VERSION`] is compared in the handshake.
//!
//! Invariants: a list that was decoded has chunks of 1 byte to its class's maximum, at most [`CHUNKS_MAX`] of them.

use std::ops::Range;

use fastcdc::v2020::{FastCDC, Normalization};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::varint;

/// Version of everything that decides boundaries and chunk digests; hosts with different ones can't share chunk lists.
pub const CHUNKING_VERSION: u16 = 1;

/// LIMIT: chunks of one file. A file of more (400 GiB and up) has no list: each of its changes is sent whole.
pub const CHUNKS_MAX: usize = 400_000;

/// Bounds of a chunk's length in bytes; the last chunk of a file may be shorter than `min`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSizes {
    /// No boundary is looked for before this.
    pub min: u32,
    /// What the lengths gather around.
    pub avg: u32,
    /// A boundary is forced here.
    pub max: u32,
}

/// How finely a file is cut, by its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct ChunkClass(pub u8);

/// A byte that is no class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("chunk class {0} doesn't exist")]
pub struct UnknownClass(pub u8);

/// One chunk of a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Bytes.
    pub len: u32,
    /// The first 16 bytes of BLAKE3 of the chunk.
    pub digest: [u8; 16],
}

/// All chunks of a content, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkList {
    /// The class that the content was cut with.
    pub class: ChunkClass,
    /// The chunks; none for an empty content.
    pub chunks: Vec<Chunk>,
}

/// Why bytes are not a chunk list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkListError {
    /// The bytes end within a chunk, or there are none at all.
    #[error("a chunk list breaks off")]
    Truncated,
    /// The class doesn't exist.
    #[error(transparent)]
    Class(#[from] UnknownClass),
    /// A length of 0, over the class's maximum, or in an overlong coding.
    #[error("a chunk of impossible length")]
    Length,
    /// More than [`CHUNKS_MAX`].
    #[error("a chunk list over the limit")]
    TooMany,
}

impl ChunkClass {
    /// The class for a file of `bytes`.
    pub fn for_size(bytes: u64) -> ChunkClass {
        let class = CLASSES.iter().position(|class| bytes <= class.file_bytes_max).unwrap_or(CLASSES.len() - 1);
        ChunkClass(class as u8)
    }

    /// The bounds of this class; those of the coarsest for a class that doesn't exist, which then merely fails to match.
    pub fn sizes(self) -> ChunkSizes {
        CLASSES.get(usize::from(self.0)).unwrap_or(&CLASSES[CLASSES.len() - 1]).sizes
    }
}

impl TryFrom<u8> for ChunkClass {
    type Error = UnknownClass;

    fn try_from(class: u8) -> Result<ChunkClass, UnknownClass> {
        if usize::from(class) < CLASSES.len() { Ok(ChunkClass(class)) } else { Err(UnknownClass(class)) }
    }
}

impl From<ChunkClass> for u8 {
    fn from(class: ChunkClass) -> u8 {
        class.0
    }
}

impl Chunk {
    /// The chunk that `bytes` are, at most `u32::MAX` of them.
    pub(crate) fn of(bytes: &[u8]) -> Chunk {
        Chunk { len: u32::try_from(bytes.len()).expect("a chunk is at most its class's maximum"), digest: short_digest(bytes) }
    }
}

impl ChunkList {
    /// Bytes of the content.
    pub fn content_bytes(&self) -> u64 {
        self.chunks.iter().map(|chunk| u64::from(chunk.len)).sum()
    }

    /// The list as bytes: the class, then per chunk its length (LEB128) and its digest; about 19 bytes a chunk.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1 + self.chunks.len() * 19);
        out.push(self.class.0);
        for chunk in &self.chunks {
            varint::put(&mut out, u64::from(chunk.len));
            out.extend_from_slice(&chunk.digest);
        }
        out
    }

    /// Reads all of `bytes` as a list; allocates at most twice their length.
    ///
    /// # Errors
    /// [`ChunkListError`]: anything that [`ChunkList::encode`] doesn't produce of a content's list.
    pub fn decode(bytes: &[u8]) -> Result<ChunkList, ChunkListError> {
        let (&class, mut rest) = bytes.split_first().ok_or(ChunkListError::Truncated)?;
        let class = ChunkClass::try_from(class)?;
        let len_max = class.sizes().max;
        let mut chunks = Vec::with_capacity((rest.len() / CHUNK_CODE_BYTES_MIN).min(CHUNKS_MAX));
        while !rest.is_empty() {
            if chunks.len() == CHUNKS_MAX {
                return Err(ChunkListError::TooMany);
            }
            let len = varint::take(&mut rest).and_then(|len| u32::try_from(len).ok());
            let len = len.filter(|len| (1..=len_max).contains(len)).ok_or(ChunkListError::Length)?;
            let (digest, after) = rest.split_first_chunk().ok_or(ChunkListError::Truncated)?;
            chunks.push(Chunk { len, digest: *digest });
            rest = after;
        }
        Ok(ChunkList { class, chunks })
    }
}

/// The version that the standby holds, to be looked up by chunk.
#[derive(Debug, Clone)]
pub struct Base {
    class: ChunkClass,
    /// In the order of the content.
    chunks: Vec<Chunk>,
    /// Sorted by digest and length; of equal chunks only the first of the content.
    places: Vec<Place>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    // The order of the fields is the order of the places.
    digest: [u8; 16],
    len: u32,
    number: u32,
    offset: u64,
}

impl Base {
    /// Makes `list` searchable; 52 bytes a chunk.
    pub fn new(list: ChunkList) -> Base {
        let ChunkList { class, chunks } = list;
        let mut offset = 0;
        let mut places = Vec::with_capacity(chunks.len());
        for (number, &Chunk { len, digest }) in (0..).zip(&chunks) {
            places.push(Place { digest, len, number, offset });
            offset += u64::from(len);
        }
        places.sort_unstable();
        places.dedup_by_key(|place| (place.digest, place.len));
        Base { class, chunks, places }
    }

    /// The class that the version was cut with.
    pub fn class(&self) -> ChunkClass {
        self.class
    }

    /// Where the version has this chunk; the first place of several.
    pub(crate) fn find(&self, chunk: &Chunk) -> Option<u64> {
        self.place(chunk).map(|place| place.offset)
    }

    /// The number of the chunk that follows this one in the version.
    pub(crate) fn after(&self, chunk: &Chunk) -> Option<usize> {
        self.place(chunk).map(|place| place.number as usize + 1)
    }

    /// The chunks at the front of `bytes` that are those of the version from number `next` on, if `bytes` start at a
    /// boundary: just what [`cut`] would find, since a cut depends on nothing before it.
    ///
    /// Cost: a digest of what may be in them, on the rayon pool of the caller, and no look for boundaries.
    pub(crate) fn continued(&self, next: usize, bytes: &[u8], follows: Follows) -> Vec<Chunk> {
        let mut at = 0;
        let mut ranges = Vec::new();
        for chunk in self.chunks.get(next..).unwrap_or_default() {
            let end = at + chunk.len as usize;
            // The last one was cut by the end of the version: it is a chunk here only if it is at the end here, too.
            let is_last = next + ranges.len() + 1 == self.chunks.len();
            if end > bytes.len() || (is_last && (follows, end) != (Follows::Nothing, bytes.len())) {
                break;
            }
            ranges.push(at..end);
            at = end;
        }
        let known = |n: usize, range: &Range<usize>| Chunk::of(&bytes[range.clone()]) == self.chunks[next + n];
        if !ranges.first().is_some_and(|first| known(0, first)) {
            return Vec::new();
        }
        let others: Vec<bool> = ranges[1..].par_iter().enumerate().map(|(n, range)| known(n + 1, range)).collect();
        let count = 1 + others.iter().take_while(|is_known| **is_known).count();
        self.chunks[next..next + count].to_vec()
    }

    fn place(&self, chunk: &Chunk) -> Option<&Place> {
        let at = self.places.binary_search_by_key(&(chunk.digest, chunk.len), |place| (place.digest, place.len)).ok()?;
        self.places.get(at)
    }
}

/// Whether more of a content comes after the bytes at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follows {
    /// There is more.
    More,
    /// These are the last bytes.
    Nothing,
}

/// The chunks at the front of `bytes` whose ends can't move by what follows.
pub(crate) fn cut(class: ChunkClass, bytes: &[u8], follows: Follows) -> Vec<Range<usize>> {
    let ChunkSizes { min, avg, max } = class.sizes();
    let (min, avg, max) = (min as usize, avg as usize, max as usize);
    let cutter = FastCDC::with_level(bytes, min, avg, max, Normalization::Level2);
    let mut ranges = Vec::with_capacity(bytes.len() / avg + 1);
    let mut at = 0;
    // The cut looks at no more than `max` bytes, so with that many at hand it is final.
    while bytes.len() - at >= max || (follows == Follows::Nothing && at < bytes.len()) {
        let (_, end) = cutter.cut(at, bytes.len() - at);
        ranges.push(at..end);
        at = end;
    }
    ranges
}

/// The first 16 bytes of BLAKE3 of `bytes`.
pub(crate) fn short_digest(bytes: &[u8]) -> [u8; 16] {
    *blake3::hash(bytes).as_bytes().first_chunk().expect("BLAKE3 has 32 bytes")
}

struct ClassRow {
    /// Largest file, in bytes, that is cut this finely.
    file_bytes_max: u64,
    /// All even, as the library demands.
    sizes: ChunkSizes,
}

const CLASSES: [ClassRow; 4] = [
    ClassRow { file_bytes_max: 16 << 20, sizes: ChunkSizes { min: 4 << 10, avg: 16 << 10, max: 64 << 10 } },
    ClassRow { file_bytes_max: 1 << 30, sizes: ChunkSizes { min: 16 << 10, avg: 64 << 10, max: 256 << 10 } },
    ClassRow { file_bytes_max: 64 << 30, sizes: ChunkSizes { min: 64 << 10, avg: 256 << 10, max: 1 << 20 } },
    ClassRow { file_bytes_max: u64::MAX, sizes: ChunkSizes { min: 256 << 10, avg: 1 << 20, max: 2 << 20 } },
];

/// The shortest code of a chunk: one byte of length, 16 of digest.
const CHUNK_CODE_BYTES_MIN: usize = 17;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::noise;

    fn lens(class: u8, bytes: &[u8]) -> Vec<usize> {
        cut(ChunkClass(class), bytes, Follows::Nothing).iter().map(ExactSizeIterator::len).collect()
    }

    #[test]
    fn boundaries_are_frozen() {
        let bytes = noise(0x5eed, 8 << 20);
        assert_eq!(lens(0, &bytes[..1 << 20]), GOLDEN_0);
        assert_eq!(lens(1, &bytes[..1 << 20]), GOLDEN_1);
        assert_eq!(lens(2, &bytes), GOLDEN_2);
        assert_eq!(lens(3, &bytes), GOLDEN_3);
        assert_eq!(lens(0, &[0; 150_000]), [65_536, 65_536, 18_928]);
    }

    #[rustfmt::skip]
    const GOLDEN_0: &[usize] = &[
        10_558, 19_100, 16_595, 17_493, 5_924, 24_914, 11_518, 20_117, 17_721, 20_773, 16_092, 19_648,
        20_527, 26_296, 4_143, 27_263, 22_180, 16_598, 17_818, 24_687, 19_231, 19_199, 22_396, 22_336,
        17_514, 7_391, 41_785, 16_676, 17_602, 32_144, 29_828, 23_867, 21_677, 16_973, 20_381, 20_951,
        20_726, 20_431, 19_090, 18_128, 23_953, 20_993, 17_684, 18_230, 17_132, 20_445, 20_180, 24_834,
        18_004, 17_230, 17_300, 17_569, 17_842, 8_889,
    ];
    #[rustfmt::skip]
    const GOLDEN_1: &[usize] = &[
        69_491, 69_320, 41_994, 70_614, 66_041, 61_736, 88_836, 108_207, 90_473, 67_102, 36_349, 78_787,
        102_792, 67_571, 29_263,
    ];
    #[rustfmt::skip]
    const GOLDEN_2: &[usize] = &[
        143_940, 324_092, 302_131, 381_572, 126_624, 346_306, 329_991, 383_970, 137_016, 273_042, 407_779, 271_266,
        421_867, 304_450, 384_666, 270_354, 220_718, 290_305, 550_220, 311_611, 573_363, 369_393, 387_520, 132_665,
        170_164, 263_939, 309_644,
    ];
    #[rustfmt::skip]
    const GOLDEN_3: &[usize] = &[
        1_278_359, 705_867, 1_664_372, 1_296_930, 1_166_661, 1_146_247, 1_130_172,
    ];

    #[test]
    fn classes_are_frozen() {
        let check = |bytes: u64, class: u8, [min, avg, max]: [u32; 3]| {
            assert_eq!(ChunkClass::for_size(bytes), ChunkClass(class), "{bytes} bytes");
            assert_eq!(ChunkClass(class).sizes(), ChunkSizes { min, avg, max });
            assert!([min, avg, max].iter().all(|size| size.is_multiple_of(2)));
        };
        check(0, 0, [4_096, 16_384, 65_536]);
        check(16 << 20, 0, [4_096, 16_384, 65_536]);
        check((16 << 20) + 1, 1, [16_384, 65_536, 262_144]);
        check(1 << 30, 1, [16_384, 65_536, 262_144]);
        check((1 << 30) + 1, 2, [65_536, 262_144, 1_048_576]);
        check(64 << 30, 2, [65_536, 262_144, 1_048_576]);
        check((64 << 30) + 1, 3, [262_144, 1_048_576, 2_097_152]);
        check(u64::MAX, 3, [262_144, 1_048_576, 2_097_152]);
        assert_eq!(CHUNKING_VERSION, 1);
    }

    #[test]
    fn nothing_is_cut_that_could_still_move() {
        let cut = |len, follows| cut(ChunkClass(0), &noise(1, len), follows);
        assert_eq!(cut(65_535, Follows::More), []);
        let early = cut(200_000, Follows::More);
        assert!(early.last().unwrap().end > 200_000 - 65_536);
        assert_eq!(early, cut(400_000, Follows::Nothing)[..early.len()]);
    }

    fn check_list(bytes: &[u8], expected: Result<usize, ChunkListError>) {
        assert_eq!(ChunkList::decode(bytes).map(|list| list.chunks.len()), expected, "{bytes:02x?}");
    }

    #[test]
    fn lists_keep_their_bytes() {
        let chunks = vec![Chunk { len: 65_536, digest: [0xaa; 16] }, Chunk { len: 1, digest: [0xbb; 16] }];
        let list = ChunkList { class: ChunkClass(0), chunks };
        let mut golden = vec![0, 0x80, 0x80, 0x04];
        golden.extend([0xaa; 16]);
        golden.push(1);
        golden.extend([0xbb; 16]);
        assert_eq!(list.encode(), golden);
        assert_eq!(ChunkList::decode(&golden), Ok(list));
        check_list(&golden, Ok(2));
        check_list(&[3], Ok(0));
        for len in 2..golden.len() {
            assert_eq!(ChunkList::decode(&golden[..len]).is_ok(), len == 20, "{len} bytes");
        }
    }

    #[test]
    fn impossible_lists_are_refused() {
        let with_len = |class: u8, code: &[u8]| [&[class], code, &[0; 16]].concat();
        check_list(&[], Err(ChunkListError::Truncated));
        check_list(&[4], Err(ChunkListError::Class(UnknownClass(4))));
        check_list(&with_len(0, &[0]), Err(ChunkListError::Length));
        check_list(&with_len(0, &[0x81, 0x80, 0x04]), Err(ChunkListError::Length));
        check_list(&with_len(1, &[0x81, 0x80, 0x04]), Ok(1));
        check_list(&with_len(0, &[0x81, 0x00]), Err(ChunkListError::Length));
        check_list(&with_len(3, &[0xff; 10]), Err(ChunkListError::Length));
        let many = |count: usize| [&[0][..], &[1; 17].repeat(count)].concat();
        assert_eq!(ChunkList::decode(&many(CHUNKS_MAX)).map(|list| list.content_bytes()), Ok(400_000));
        assert_eq!(ChunkList::decode(&many(CHUNKS_MAX + 1)), Err(ChunkListError::TooMany));
        assert_eq!(ChunkList::decode(&many(CHUNKS_MAX * 3)), Err(ChunkListError::TooMany));
    }

    #[test]
    fn of_equal_chunks_the_first_is_found() {
        let chunk = |len, tag| Chunk { len, digest: [tag; 16] };
        let list = ChunkList { class: ChunkClass(1), chunks: vec![chunk(5, 1), chunk(7, 2), chunk(5, 1), chunk(6, 1)] };
        let base = Base::new(list);
        assert_eq!(base.class(), ChunkClass(1));
        assert_eq!(base.find(&chunk(5, 1)), Some(0));
        assert_eq!(base.find(&chunk(7, 2)), Some(5));
        assert_eq!(base.find(&chunk(6, 1)), Some(17));
        assert_eq!(base.find(&chunk(7, 1)), None);
    }
}
