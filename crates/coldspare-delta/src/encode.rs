//! Encode: from the bytes of a file to segments, in one pass and without a question to the other side.
//!
//! Decides which bytes travel as literals. It knows neither where the bytes come from nor where segments go.
//!
//! Invariants: segments follow each other without a gap and cover the content exactly; each keeps the limits that
//! [`crate::decode_pieces`] checks; two copies that continue each other are one piece. How the content was cut into
//! windows and how many threads worked doesn't show in the result.

use rayon::prelude::*;

use crate::chunk::{self, Base, CHUNKS_MAX, Chunk, ChunkClass, ChunkList, Follows};
use crate::digest::{Hasher, is_zero};
use crate::fill::{Filling, Segment};
use crate::piece::Piece;

/// The smallest window that [`FileEncoder::push`] is sure to consume something of: the longest possible chunk.
pub const WINDOW_BYTES_MIN: usize = 2 << 20;

/// Whether a file's chunks are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunking {
    /// The file is never changed in place, as a pack: no list, no copies, only aligned blocks of zeros are found.
    Whole,
    /// Chunks are cut, listed, and looked up in the base.
    Chunks,
}

/// What is known of a file once all of it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// BLAKE3 of all.
    pub digest: [u8; 32],
    /// Bytes that were pushed; the caller compares it with the size that it expected.
    pub size: u64,
    /// What the next version is encoded against; `None` for `Whole` and for more than [`CHUNKS_MAX`] chunks.
    pub chunks: Option<ChunkList>,
    /// How many segments were emitted.
    pub segments: u32,
}

/// Streaming encoder of one large file.
///
/// Call [`push`](FileEncoder::push) until it was told that nothing follows, then [`finish`](FileEncoder::finish).
/// Memory: the segment being filled (up to 1 MiB of literals), the base and the list (52 and 20 bytes a chunk).
#[derive(Debug)]
pub struct FileEncoder {
    hasher: Hasher,
    filling: Filling<Piece>,
    mode: Mode,
}

#[derive(Debug)]
enum Mode {
    Whole,
    Chunks {
        class: ChunkClass,
        base: Option<Base>,
        /// Which chunk of the base may come next: that behind the one that came last.
        next: Option<usize>,
        /// `None` once there were too many.
        listed: Option<Vec<Chunk>>,
    },
}

impl FileEncoder {
    /// An encoder for a file of about `size` bytes, which decides how finely it is cut.
    ///
    /// `base` is what the standby holds; its class is kept as long as it is at most one step from that of `size`, and
    /// it is of no use beyond. `Whole` has no use for a base either.
    pub fn new(size: u64, base: Option<Base>, chunking: Chunking) -> FileEncoder {
        let mode = match chunking {
            Chunking::Whole => Mode::Whole,
            Chunking::Chunks => {
                let fresh = ChunkClass::for_size(size);
                let base = base.filter(|base| base.class().0.abs_diff(fresh.0) <= 1);
                let class = base.as_ref().map_or(fresh, Base::class);
                Mode::Chunks { class, base, next: Some(0), listed: Some(Vec::new()) }
            }
        };
        FileEncoder { hasher: Hasher::new(), filling: Filling::default(), mode }
    }

    /// Takes bytes from the front of `window`, the part of the file not consumed yet, and gives `emit` each segment
    /// that became complete.
    ///
    /// Returns how many bytes it consumed: all when nothing follows, else all but less than [`WINDOW_BYTES_MIN`].
    /// Those come again, at the front of the next window. Windows of 4 MiB are the best trade.
    ///
    /// Cost: two passes for digests on the rayon pool of the caller, one for boundaries where the content isn't that of the
    /// base in the same order, one copy of each literal byte.
    pub fn push(&mut self, window: &[u8], follows: Follows, emit: &mut dyn FnMut(Segment)) -> usize {
        let consumed = match &mut self.mode {
            Mode::Whole => {
                let consumed = match follows {
                    Follows::More => window.len() - window.len() % BLOCK_BYTES,
                    Follows::Nothing => window.len(),
                };
                push_blocks(&mut self.hasher, &mut self.filling, &window[..consumed], emit);
                consumed
            }
            Mode::Chunks { class, base, next, listed } => {
                let known = |bytes: &[u8]| base.as_ref().zip(*next).map(|(base, next)| base.continued(next, bytes, follows));
                let cut = cut_and_digest(&mut self.hasher, *class, window, follows, known);
                if let Some(last) = cut.chunks.last() {
                    *next = base.as_ref().and_then(|base| base.after(last));
                }
                push_chunks(&mut self.filling, base.as_ref(), window, &cut, emit);
                list(listed, cut.chunks);
                cut.consumed
            }
        };
        if follows == Follows::Nothing {
            self.filling.flush(emit);
        }
        consumed
    }

    /// What is known of the file now that all of it was pushed.
    ///
    /// # Panics
    /// When the last push didn't say that nothing follows. A file without bytes needs no push.
    pub fn finish(self) -> Encoded {
        assert!(self.filling.is_flushed(), "the last push says that nothing follows");
        let chunks = match self.mode {
            Mode::Whole => None,
            Mode::Chunks { class, listed, .. } => listed.map(|chunks| ChunkList { class, chunks }),
        };
        Encoded { digest: self.hasher.finish(), size: self.filling.offset(), chunks, segments: self.filling.emitted() }
    }
}

/// The chunks at the front of a window.
struct Cut {
    consumed: usize,
    chunks: Vec<Chunk>,
}

/// Cuts a window, digests each chunk, and adds what is consumed to the digest of the whole; `known` finds the chunks at
/// the front of it that need no looking for boundaries.
fn cut_and_digest(
    hasher: &mut Hasher,
    class: ChunkClass,
    window: &[u8],
    follows: Follows,
    known: impl FnOnce(&[u8]) -> Option<Vec<Chunk>> + Send,
) -> Cut {
    // What is sure to be consumed can be hashed while boundaries are still being looked for.
    let sure = match follows {
        Follows::More => (window.len() + 1).saturating_sub(class.sizes().max as usize),
        Follows::Nothing => window.len(),
    };
    let find = || {
        let known = known(window).unwrap_or_default();
        let from = known.iter().map(|chunk| chunk.len as usize).sum();
        (known, from, chunk::cut(class, &window[from..], follows))
    };
    let ((mut chunks, from, ranges), ()) = rayon::join(find, || hasher.update(&window[..sure]));
    let rest = &window[from..];
    let consumed = from + ranges.last().map_or(0, |range| range.end);
    let digests = || ranges.par_iter().map(|range| Chunk::of(&rest[range.clone()])).collect::<Vec<_>>();
    let (mut found, ()) = rayon::join(digests, || hasher.update(&window[sure.min(consumed)..consumed]));
    chunks.append(&mut found);
    Cut { consumed, chunks }
}

fn push_chunks(filling: &mut Filling<Piece>, base: Option<&Base>, window: &[u8], cut: &Cut, emit: &mut dyn FnMut(Segment)) {
    let mut rest = window;
    for chunk in &cut.chunks {
        let (bytes, after) = rest.split_at(chunk.len as usize);
        rest = after;
        if is_zero(bytes) {
            filling.add(bytes.len(), |_, len| Piece::Zeros { len }, emit);
        } else if let Some(offset) = base.and_then(|base| base.find(chunk)) {
            filling.add(bytes.len(), |done, len| Piece::Copy { offset: offset + done, len }, emit);
        } else {
            filling.add_literal(bytes, emit);
        }
    }
}

/// Pushes what is cut at multiples of [`BLOCK_BYTES`] only.
fn push_blocks(hasher: &mut Hasher, filling: &mut Filling<Piece>, bytes: &[u8], emit: &mut dyn FnMut(Segment)) {
    hasher.update(bytes);
    let mut rest = bytes;
    while !rest.is_empty() {
        let zeros = rest.chunks(BLOCK_BYTES).take_while(|block| is_zero(block)).map(<[u8]>::len).sum();
        filling.add(zeros, |_, len| Piece::Zeros { len }, emit);
        rest = &rest[zeros..];
        let others = rest.chunks(BLOCK_BYTES).take_while(|block| !is_zero(block)).map(<[u8]>::len).sum();
        filling.add_literal(&rest[..others], emit);
        rest = &rest[others..];
    }
}

/// Keeps the list as long as it is within its limit.
fn list(listed: &mut Option<Vec<Chunk>>, chunks: Vec<Chunk>) {
    match listed {
        Some(all) if all.len() + chunks.len() <= CHUNKS_MAX => all.extend(chunks),
        _ => *listed = None,
    }
}

/// Zeros are looked for in blocks as filesystems store them.
const BLOCK_BYTES: usize = 4 << 10;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::noise::noise;
    use crate::piece::{SEGMENT_BYTES_MAX, SEGMENT_SPAN_BYTES_MAX};
    use crate::{Write, decode_pieces, digest, encode_pieces, rebuild};

    /// Pushes all of `bytes` in windows whose sizes follow from `seed`, growing a window that was too small.
    fn encode_in_windows(bytes: &[u8], base: Option<&ChunkList>, chunking: Chunking, seed: u64) -> (Encoded, Vec<Segment>) {
        let mut encoder = FileEncoder::new(bytes.len() as u64, base.cloned().map(Base::new), chunking);
        let mut segments = Vec::new();
        let mut sizes = noise(seed, 1 << 16).into_iter().cycle().map(|b| (usize::from(b) + 1) * 1500);
        let (mut at, mut window) = (0, 0);
        loop {
            window += sizes.next().unwrap();
            let end = bytes.len().min(at + window);
            let follows = if end == bytes.len() { Follows::Nothing } else { Follows::More };
            let consumed = encoder.push(&bytes[at..end], follows, &mut |segment| segments.push(segment));
            at += consumed;
            if follows == Follows::Nothing {
                assert_eq!(at, bytes.len());
                return (encoder.finish(), segments);
            }
            if consumed > 0 {
                window = 0;
            }
        }
    }

    fn encode(bytes: &[u8], base: Option<&ChunkList>, chunking: Chunking) -> (Encoded, Vec<Segment>) {
        encode_in_windows(bytes, base, chunking, 99)
    }

    fn list_of(bytes: &[u8]) -> ChunkList {
        encode(bytes, None, Chunking::Chunks).0.chunks.unwrap()
    }

    fn literal_bytes(segments: &[Segment]) -> usize {
        segments.iter().map(|segment| segment.literal.len()).sum()
    }

    /// What a standby that holds `base` makes of `segments`, over the wire's coding.
    fn rebuilt(base: &[u8], segments: &[Segment], size: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let mut at = 0;
        for Segment { offset, pieces, literal } in segments {
            assert_eq!(*offset, at, "segments follow each other");
            let pieces = decode_pieces(&encode_pieces(pieces)).unwrap();
            at = rebuild::<()>(*offset, &pieces, literal, size, &mut |write| {
                match write {
                    Write::Bytes { bytes, .. } => out.extend_from_slice(bytes),
                    Write::Copy { from, len, .. } => out.extend_from_slice(&base[from as usize..][..len as usize]),
                    Write::Zeros { len, .. } => out.resize(out.len() + len as usize, 0),
                    Write::Held { .. } => panic!("an encoder knows of no file that is held"),
                }
                Ok(())
            })
            .unwrap();
        }
        assert_eq!(at, size);
        out
    }

    /// Encodes `new` against `old` and rebuilds it; returns how many literal bytes that took.
    fn check(old: &[u8], new: &[u8], chunking: Chunking) -> usize {
        let base = list_of(old);
        let (encoded, segments) = encode(new, Some(&base), chunking);
        assert!(rebuilt(old, &segments, encoded.size) == new, "the rebuilt content differs");
        assert_eq!(encoded.digest, digest(new));
        assert_eq!(encoded.size, new.len() as u64);
        assert_eq!(encoded.segments as usize, segments.len());
        match (chunking, encoded.chunks) {
            (Chunking::Whole, chunks) => assert_eq!(chunks, None),
            (Chunking::Chunks, chunks) => {
                let chunks = chunks.unwrap();
                assert_eq!(chunks.content_bytes(), encoded.size);
                assert_eq!(ChunkList::decode(&chunks.encode()), Ok(chunks));
            }
        }
        literal_bytes(&segments)
    }

    #[test]
    fn the_smallest_files_are_files_too() {
        for chunking in [Chunking::Whole, Chunking::Chunks] {
            assert_eq!(check(b"", b"", chunking), 0);
            assert_eq!(check(b"", b"x", chunking), 1);
            assert_eq!(check(b"x", b"", chunking), 0);
            assert_eq!(check(b"", &[0], chunking), 0);
        }
        assert_eq!(check(b"x", b"x", Chunking::Chunks), 0);
        let untouched = FileEncoder::new(0, None, Chunking::Chunks).finish();
        assert_eq!((untouched.digest, untouched.size, untouched.segments), (digest(b""), 0, 0));
    }

    #[test]
    #[should_panic(expected = "nothing follows")]
    fn an_unfinished_file_has_no_digest() {
        let mut encoder = FileEncoder::new(8 << 20, None, Chunking::Whole);
        encoder.push(&noise(1, 8 << 10), Follows::More, &mut |_| ());
        encoder.finish();
    }

    #[test]
    fn a_change_in_the_middle_of_64_mib_travels_alone() {
        let old = noise(7, 64 << 20);
        let mut new = old.clone();
        new[30 << 20..31 << 20].copy_from_slice(&noise(8, 1 << 20));
        let (least, most) = (1 << 20, 2 << 20);
        let literals = check(&old, &new, Chunking::Chunks);
        assert!((least..most).contains(&literals), "{literals} bytes for a change");
        new = old.clone();
        new.splice(0..0, noise(9, 1 << 20));
        let literals = check(&old, &new, Chunking::Chunks);
        assert!((least..most).contains(&literals), "{literals} bytes for an insertion at the front");
        new = old.clone();
        new.extend(noise(9, 1 << 20));
        let literals = check(&old, &new, Chunking::Chunks);
        assert!((least..most).contains(&literals), "{literals} bytes for an append");
        assert_eq!(check(&old, &old, Chunking::Chunks), 0);
    }

    #[test]
    fn unchanged_content_is_a_few_pieces() {
        let old = noise(7, 10 << 20);
        let (_, segments) = encode(&old, Some(&list_of(&old)), Chunking::Chunks);
        assert_eq!(segments, [Segment { offset: 0, pieces: vec![Piece::Copy { offset: 0, len: 10 << 20 }], literal: Vec::new() }]);
    }

    #[test]
    fn only_copies_that_continue_each_other_are_one() {
        let (mut filling, mut segments) = (Filling::default(), Vec::new());
        let mut emit = |segment| segments.push(segment);
        for (offset, len) in [(0, 10), (10, 5), (16, 4), (19, 1), (3, 1)] {
            filling.add(len, |done, len| Piece::Copy { offset: offset + done, len }, &mut emit);
        }
        filling.flush(&mut emit);
        let copies = [(0, 15), (16, 4), (19, 1), (3, 1)].map(|(offset, len)| Piece::Copy { offset, len });
        assert_eq!(segments, [Segment { offset: 0, pieces: copies.into(), literal: Vec::new() }]);
    }

    #[test]
    fn segments_keep_their_limits() {
        let mut bytes = vec![0; 200 << 20];
        bytes[70 << 20..73 << 20].copy_from_slice(&noise(3, 3 << 20));
        for chunking in [Chunking::Whole, Chunking::Chunks] {
            let (encoded, segments) = encode(&bytes, None, chunking);
            assert!(rebuilt(b"", &segments, encoded.size) == bytes);
            assert!(segments.len() >= 5, "zeros, zeros and literals, literals, literals and zeros, zeros");
            for Segment { pieces, literal, .. } in &segments {
                let span: u64 = pieces.iter().map(|piece| u64::from(piece.len_bytes())).sum();
                assert!(span <= SEGMENT_SPAN_BYTES_MAX && literal.len() <= SEGMENT_BYTES_MAX);
            }
        }
    }

    #[test]
    fn whole_files_are_cut_at_fixed_places() {
        let mut bytes = noise(3, (2 << 20) + 5000);
        bytes[4000..13_000].fill(0);
        let (encoded, segments) = encode(&bytes, None, Chunking::Whole);
        let zeros = Piece::Zeros { len: 8192 };
        assert_eq!(segments[0].pieces, [Piece::Literal { len: 4096 }, zeros, Piece::Literal { len: (1 << 20) - 4096 }]);
        assert_eq!(segments.iter().map(|segment| segment.offset).collect::<Vec<_>>(), [0, (1 << 20) + 8192]);
        assert_eq!(encoded.segments, 2);
    }

    #[test]
    fn a_base_spares_work_and_changes_no_boundary() {
        let old = noise(7, 3 << 20);
        let base = list_of(&old);
        for new in
            [old.clone(), [&old[..], b"more"].concat(), old[..2 << 20].to_vec(), [&noise(8, 99_999), &old[..]].concat(), old.repeat(2)]
        {
            let (with, without) = (encode(&new, Some(&base), Chunking::Chunks).0, encode(&new, None, Chunking::Chunks).0);
            assert!(with.chunks == without.chunks, "of {} bytes", new.len());
        }
        let (all, base) = (base.chunks.clone(), Base::new(base));
        assert_eq!(base.continued(0, &old, Follows::Nothing), all);
        assert_eq!(base.continued(0, &old, Follows::More), all[..all.len() - 1], "the end of the version is no boundary");
        let first = all[0].len as usize;
        assert_eq!(base.continued(1, &old[first..2 << 20], Follows::More)[..20], all[1..21]);
        assert_eq!(base.continued(1, &old, Follows::Nothing), []);
        assert_eq!(base.continued(all.len(), &old, Follows::Nothing), []);
    }

    #[test]
    fn a_base_of_another_scale_is_let_go() {
        let old = noise(1, 1 << 20);
        let class = |size| {
            let base = Base::new(list_of(&old));
            let mut encoder = FileEncoder::new(size, Some(base), Chunking::Chunks);
            encoder.push(&old, Follows::Nothing, &mut |_| ());
            encoder.finish().chunks.unwrap().class
        };
        assert_eq!(class(17 << 20), ChunkClass(0));
        assert_eq!(class(2 << 30), ChunkClass(2));
    }

    #[test]
    fn too_many_chunks_have_no_list() {
        let chunk = Chunk { len: 1, digest: [0; 16] };
        let mut listed = Some(vec![chunk; CHUNKS_MAX - 1]);
        list(&mut listed, vec![chunk]);
        assert_eq!(listed.as_ref().map(Vec::len), Some(CHUNKS_MAX));
        list(&mut listed, vec![chunk]);
        assert_eq!(listed, None);
        list(&mut listed, Vec::new());
        assert_eq!(listed, None);
    }

    #[test]
    fn the_number_of_threads_does_not_show() {
        let (old, new) = (noise(1, 3 << 20), [noise(2, 500_000), noise(1, 2 << 20)].concat());
        let base = list_of(&old);
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| encode(&new, Some(&base), Chunking::Chunks))
        };
        assert!(with(1) == with(4), "the result differs");
    }

    #[derive(Debug, Clone)]
    enum Edit {
        Insert { at: usize, len: usize, seed: u64 },
        Change { at: usize, len: usize, seed: u64 },
        Remove { at: usize, len: usize },
        Append { len: usize, seed: u64 },
        Zero { at: usize, len: usize },
        Repeat { at: usize, len: usize },
    }

    fn apply(bytes: &mut Vec<u8>, edit: &Edit) {
        let range = |at: usize, len: usize, all: usize| {
            let start = at % (all + 1);
            start..all.min(start + len)
        };
        let all = bytes.len();
        match *edit {
            Edit::Insert { at, len, seed } => drop(bytes.splice(range(at, 0, all), noise(seed, len))),
            Edit::Change { at, len, seed } => {
                let range = range(at, len, all);
                let fresh = noise(seed, range.len());
                bytes[range].copy_from_slice(&fresh);
            }
            Edit::Remove { at, len } => drop(bytes.drain(range(at, len, all))),
            Edit::Append { len, seed } => bytes.extend(noise(seed, len)),
            Edit::Zero { at, len } => bytes[range(at, len, all)].fill(0),
            Edit::Repeat { at, len } => bytes.extend_from_within(range(at, len, all)),
        }
    }

    fn edits() -> impl Strategy<Value = Vec<Edit>> {
        let at = || prop_oneof![Just(0usize), any::<usize>()];
        let len = || prop_oneof![0usize..50, 0usize..200_000];
        let seed = 1u64..;
        let edit = prop_oneof![
            (at(), len(), seed.clone()).prop_map(|(at, len, seed)| Edit::Insert { at, len, seed }),
            (at(), len(), seed.clone()).prop_map(|(at, len, seed)| Edit::Change { at, len, seed }),
            (at(), len()).prop_map(|(at, len)| Edit::Remove { at, len }),
            (len(), seed).prop_map(|(len, seed)| Edit::Append { len, seed }),
            (at(), len()).prop_map(|(at, len)| Edit::Zero { at, len }),
            (at(), len()).prop_map(|(at, len)| Edit::Repeat { at, len }),
        ];
        prop::collection::vec(edit, 0..8)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn edits_of_a_base_are_rebuilt(seed in 1u64.., len in 0usize..1_000_000, edits in edits()) {
            let old = noise(seed, len);
            let mut new = old.clone();
            edits.iter().for_each(|edit| apply(&mut new, edit));
            let literals = check(&old, &new, Chunking::Chunks);
            prop_assert!(literals <= new.len());
            check(&old, &new, Chunking::Whole);
        }

        #[test]
        fn windows_do_not_show(seed in 1u64.., len in 0usize..3_000_000, edits in edits(), windows in (1u64.., 1u64..)) {
            let old = noise(seed, len);
            let mut new = old.clone();
            edits.iter().for_each(|edit| apply(&mut new, edit));
            let base = list_of(&old);
            for chunking in [Chunking::Whole, Chunking::Chunks] {
                let one = encode_in_windows(&new, Some(&base), chunking, windows.0);
                let other = encode_in_windows(&new, Some(&base), chunking, windows.1);
                prop_assert!(one == other, "the result differs");
            }
        }
    }

    /// `cargo test --release -p coldspare-delta -- --ignored --nocapture throughput`
    #[test]
    #[ignore = "prints figures, claims nothing"]
    #[expect(clippy::disallowed_methods, reason = "a stopwatch around pure work")]
    fn throughput() {
        let old = noise(1, 512 << 20);
        let base = list_of(&old);
        let run = |name: &str, base: Option<&ChunkList>, chunking| {
            let mut encoder = FileEncoder::new(old.len() as u64, base.cloned().map(Base::new), chunking);
            let start = std::time::Instant::now();
            let mut at = 0;
            while at < old.len() {
                let end = old.len().min(at + (4 << 20));
                let follows = if end == old.len() { Follows::Nothing } else { Follows::More };
                at += encoder.push(&old[at..end], follows, &mut |segment| drop(std::hint::black_box(segment)));
            }
            let encoded = encoder.finish();
            let seconds = start.elapsed().as_secs_f64();
            println!("{name}: {:.2} GiB/s, {} segments", 0.5 / seconds, encoded.segments);
        };
        for _ in 0..2 {
            run("whole", None, Chunking::Whole);
            run("chunks, all new", None, Chunking::Chunks);
            run("chunks, all known", Some(&base), Chunking::Chunks);
            let start = std::time::Instant::now();
            std::hint::black_box(digest(&old));
            println!("digest alone, one thread: {:.2} GiB/s", 0.5 / start.elapsed().as_secs_f64());
        }
    }
}
