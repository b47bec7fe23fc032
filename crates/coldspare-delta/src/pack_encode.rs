//! Encode of a pack: from its bytes and the places of its entries to segments, in one pass.
//!
//! Decides which entries are copied from which of the packs that the standby has. An entry goes by its body; its header
//! is compared too, and copied along where it is the same, so that what a repack left as it was is one piece.
//!
//! Invariants: segments follow each other without a gap and cover the pack exactly; each keeps the limits that
//! [`crate::decode_pack_pieces`] checks. How the pack came in windows and how many threads worked doesn't show.

use rayon::prelude::*;

use crate::chunk::{Follows, short_digest};
use crate::digest::Hasher;
use crate::fill::{Filling, Segment};
use crate::pack_base::{Found, PackBases, Place};
use crate::pack_entry::{Cut, Cutter};
use crate::pack_index::PackOffsets;
use crate::pack_piece::PackPiece;
use crate::pack_table::{KeptHeader, PackTable, PackTableBuilder};

/// What is known of a pack once all of it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackEncoded {
    /// BLAKE3 of all.
    pub digest: [u8; 32],
    /// Bytes that were pushed; the caller compares it with the size that it expected.
    pub size: u64,
    /// What later packs are described by; `None` for a pack that isn't as its index says, and for more than
    /// [`crate::PACK_ENTRIES_MAX`] entries.
    pub table: Option<PackTable>,
    /// How many segments were emitted.
    pub segments: u32,
}

/// Streaming encoder of one pack.
///
/// Call [`push`](PackEncoder::push) until it was told that nothing follows, then [`finish`](PackEncoder::finish).
/// Memory besides the bases: the segment being filled, 8 bytes an entry for the offsets, about 23 for the new table.
#[derive(Debug)]
pub struct PackEncoder<'a> {
    bases: &'a PackBases,
    hasher: Hasher,
    cutter: Cutter,
    table: PackTableBuilder,
    filling: Filling<PackPiece>,
    /// Behind the entry that was found last.
    expected: Option<Place>,
}

impl<'a> PackEncoder<'a> {
    /// An encoder for the pack that `offsets` are of. Without bases it emits literals only.
    pub fn new(offsets: PackOffsets, bases: &'a PackBases) -> PackEncoder<'a> {
        PackEncoder {
            bases,
            hasher: Hasher::new(),
            cutter: Cutter::new(offsets),
            table: PackTableBuilder::default(),
            filling: Filling::default(),
            expected: None,
        }
    }

    /// Takes bytes from the front of `window`, the part of the pack not consumed yet, and gives `emit` each segment
    /// that became complete.
    ///
    /// Returns how many bytes it consumed: all when nothing follows, else all but less than
    /// [`crate::WINDOW_BYTES_MIN`]. Those come again, at the front of the next window.
    ///
    /// Cost: two passes for digests on the rayon pool of the caller, a search per entry unless it follows the last one
    /// in its pack too, one copy of each literal byte.
    pub fn push(&mut self, window: &[u8], follows: Follows, emit: &mut dyn FnMut(Segment<PackPiece>)) -> usize {
        let cuts = self.cutter.cut(window, follows);
        let mut entries = Vec::with_capacity(cuts.len());
        let mut rest = window;
        for &cut in &cuts {
            let (bytes, after) = rest.split_at(cut.len());
            entries.push(Part::of(cut, bytes));
            rest = after;
        }
        let consumed = window.len() - rest.len();
        let digests = || entries.par_iter().with_min_len(ENTRIES_PER_TASK).map(|part| short_digest(part.body)).collect();
        let (digests, ()): (Vec<_>, _) = rayon::join(digests, || self.hasher.update(&window[..consumed]));
        for (part, digest) in entries.iter().zip(digests) {
            self.take(part, digest, emit);
        }
        if follows == Follows::Nothing {
            self.filling.flush(emit);
        }
        consumed
    }

    /// What is known of the pack now that all of it was pushed.
    ///
    /// # Panics
    /// When the last push didn't say that nothing follows. A file without bytes needs no push.
    pub fn finish(self) -> PackEncoded {
        assert!(self.filling.is_flushed(), "the last push says that nothing follows");
        let table = if self.cutter.is_complete() { self.table.finish() } else { None };
        PackEncoded { digest: self.hasher.finish(), size: self.filling.offset(), table, segments: self.filling.emitted() }
    }

    /// Adds the next part of the pack, whose body has this digest, to the segment and to the table.
    fn take(&mut self, part: &Part<'_>, digest: [u8; 16], emit: &mut dyn FnMut(Segment<PackPiece>)) {
        let Part { bytes, body } = *part;
        if body.is_empty() {
            self.filling.add_literal(bytes, emit);
            return;
        }
        let header = &bytes[..bytes.len() - body.len()];
        let kept = KeptHeader::of(header);
        self.table.push(self.filling.offset(), kept, body.len(), digest);
        let Some(found) = self.find(body.len(), digest) else {
            self.filling.add_literal(bytes, emit);
            return;
        };
        self.expected = Some(found.next());
        let offset = found.entry.offset;
        if found.entry.header == kept {
            self.copy(found.source, offset, bytes, emit);
        } else {
            self.filling.add_literal(header, emit);
            self.copy(found.source, offset + found.entry.header.len_bytes() as u64, body, emit);
        }
    }

    /// The entry with this body that follows the last one found, else the first in any pack.
    fn find(&self, body_len: usize, digest: [u8; 16]) -> Option<Found> {
        let follows = self.expected.and_then(|place| self.bases.at(place));
        follows
            .filter(|found| found.entry.body_len == body_len && found.entry.digest == digest)
            .or_else(|| self.bases.find(body_len, digest))
    }

    /// Copies `bytes`, which `source` has at `offset`, unless it is cheaper to send them.
    fn copy(&mut self, source: u16, offset: u64, bytes: &[u8], emit: &mut dyn FnMut(Segment<PackPiece>)) {
        let piece = |done, len| PackPiece::Copy { source, offset: offset + done, len };
        if bytes.len() >= COPY_BYTES_MIN || self.filling.continues(piece(0, 0)) {
            self.filling.add(bytes.len(), piece, emit);
        } else {
            self.filling.add_literal(bytes, emit);
        }
    }
}

/// The bytes of a cut.
#[derive(Clone, Copy)]
struct Part<'a> {
    bytes: &'a [u8],
    /// The end of `bytes`; empty between entries.
    body: &'a [u8],
}

impl<'a> Part<'a> {
    fn of(cut: Cut, bytes: &'a [u8]) -> Part<'a> {
        let body = match cut {
            Cut::Between { .. } => &[],
            Cut::Entry { header_len, .. } => &bytes[header_len..],
        };
        Part { bytes, body }
    }
}

/// A copy takes up to seven bytes, parts a literal in two, and costs the receiver a system call.
const COPY_BYTES_MIN: usize = 16;

/// Fewer digests are not worth the way to another thread.
const ENTRIES_PER_TASK: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::noise::noise;
    use crate::pack_entry::HEADER_BYTES_MAX;
    use crate::piece::{SEGMENT_BYTES_MAX, SEGMENT_SPAN_BYTES_MAX};
    use crate::{PackHash, PackWrite, decode_pack_pieces, digest, encode_pack_pieces, rebuild_pack};

    /// What an entry of a synthetic pack is made of: its body by a seed, its header by a kind and a base.
    #[derive(Debug, Clone, Copy)]
    struct Object {
        seed: u64,
        body_len: usize,
        kind: u8,
        /// Among the entries before it, of a delta.
        base: usize,
    }

    struct Pack {
        bytes: Vec<u8>,
        offsets: Vec<u64>,
        hash: PackHash,
    }

    fn pack(objects: &[Object], hash: PackHash) -> Pack {
        let mut bytes = b"PACK\0\0\0\x02".to_vec();
        bytes.extend((objects.len() as u32).to_be_bytes());
        let mut offsets: Vec<u64> = Vec::new();
        for object in objects {
            let at = bytes.len() as u64;
            let kind = if object.kind == 6 && offsets.is_empty() { 3 } else { object.kind };
            put_size(&mut bytes, kind, object.body_len as u64 * 3);
            match kind {
                6 => put_distance(&mut bytes, at - offsets[object.base % offsets.len()]),
                7 => bytes.extend(noise(object.base as u64 + 1, hash.bytes())),
                _ => {}
            }
            bytes.extend(noise(object.seed, object.body_len));
            offsets.push(at);
        }
        bytes.extend(&digest(&bytes)[..hash.bytes()]);
        Pack { bytes, offsets, hash }
    }

    fn put_size(out: &mut Vec<u8>, kind: u8, size: u64) {
        let mut rest = size >> 4;
        out.push(kind << 4 | (size & 15) as u8 | if rest > 0 { 0x80 } else { 0 });
        while rest > 0 {
            out.push((rest & 0x7f) as u8 | if rest > 0x7f { 0x80 } else { 0 });
            rest >>= 7;
        }
    }

    fn put_distance(out: &mut Vec<u8>, distance: u64) {
        let mut bytes = vec![(distance & 0x7f) as u8];
        let mut rest = distance >> 7;
        while rest > 0 {
            rest -= 1;
            bytes.push(0x80 | (rest & 0x7f) as u8);
            rest >>= 7;
        }
        out.extend(bytes.iter().rev());
    }

    impl Pack {
        fn offsets(&self) -> PackOffsets {
            PackOffsets::new(self.offsets.clone(), self.bytes.len() as u64, self.hash).unwrap()
        }

        /// Pushes the pack in windows whose sizes follow from `seed`, growing a window that was too small.
        fn encode(&self, bases: &PackBases, seed: u64) -> (PackEncoded, Vec<Segment<PackPiece>>) {
            let mut encoder = PackEncoder::new(self.offsets(), bases);
            let mut segments = Vec::new();
            let scale = 1 + self.bytes.len() / 700;
            let mut sizes = noise(seed, 1 << 10).into_iter().cycle().map(|b| (usize::from(b) + 1) * scale);
            let (mut at, mut window) = (0, 0);
            loop {
                window += sizes.next().unwrap();
                let end = self.bytes.len().min(at + window);
                let follows = if end == self.bytes.len() { Follows::Nothing } else { Follows::More };
                let consumed = encoder.push(&self.bytes[at..end], follows, &mut |segment| segments.push(segment));
                at += consumed;
                if follows == Follows::Nothing {
                    assert_eq!(at, self.bytes.len());
                    return (encoder.finish(), segments);
                }
                assert!(end - at < crate::WINDOW_BYTES_MIN);
                if consumed > 0 {
                    window = 0;
                }
            }
        }

        fn table(&self) -> PackTable {
            let table = self.encode(&PackBases::default(), 1).0.table.unwrap();
            assert_eq!(PackTable::decode(&table.encode()).as_ref(), Ok(&table));
            table
        }
    }

    /// What a standby that holds `sources` makes of `segments`, over the wire's coding.
    fn rebuilt(sources: &[&Pack], segments: &[Segment<PackPiece>], size: u64) -> Vec<u8> {
        let sizes: Vec<u64> = sources.iter().map(|source| source.bytes.len() as u64).collect();
        let (mut out, mut at) = (Vec::new(), 0);
        for Segment { offset, pieces, literal } in segments {
            assert_eq!(*offset, at, "segments follow each other");
            let pieces = decode_pack_pieces(&encode_pack_pieces(pieces)).unwrap();
            at = rebuild_pack::<()>(*offset, &pieces, literal, size, &sizes, &mut |write| {
                match write {
                    PackWrite::Bytes { bytes, .. } => out.extend_from_slice(bytes),
                    PackWrite::Copy { source, from, len, .. } => {
                        out.extend_from_slice(&sources[usize::from(source)].bytes[from as usize..][..len as usize]);
                    }
                }
                Ok(())
            })
            .unwrap();
        }
        assert_eq!(at, size);
        out
    }

    /// Encodes `new` against `old` and rebuilds it; returns the literal bytes and the pieces that took.
    fn check(old: &[&Pack], new: &Pack) -> (usize, Vec<PackPiece>) {
        let bases = PackBases::new(old.iter().map(|old| old.table()), usize::MAX);
        let (encoded, segments) = new.encode(&bases, 99);
        assert!(rebuilt(old, &segments, encoded.size) == new.bytes, "the rebuilt pack differs");
        assert_eq!((encoded.digest, encoded.size), (digest(&new.bytes), new.bytes.len() as u64));
        assert_eq!(encoded.segments as usize, segments.len());
        assert_eq!(encoded.table, Some(new.table()));
        let literal_bytes = segments.iter().map(|segment| segment.literal.len()).sum();
        (literal_bytes, segments.into_iter().flat_map(|segment| segment.pieces).collect())
    }

    fn blob(seed: u64, body_len: usize) -> Object {
        Object { seed, body_len, kind: 3, base: 0 }
    }

    fn delta(seed: u64, body_len: usize, base: usize) -> Object {
        Object { seed, body_len, kind: 6, base }
    }

    fn header_len(pack: &Pack, number: usize, body_len: usize) -> usize {
        (pack.offsets().entry(number).unwrap().end - pack.offsets[number]) as usize - body_len
    }

    const SHA1: PackHash = PackHash::Sha1;

    #[test]
    fn cuts_and_digests_are_frozen() {
        let objects = [blob(1, 500), delta(2, 20, 0), Object { seed: 3, body_len: 40, kind: 7, base: 9 }, blob(4, 3 << 20), blob(5, 1)];
        let table = pack(&objects, SHA1).table();
        assert_eq!(table.entries(), 7, "a part for each MiB");
        assert_eq!(digest(&table.encode())[..8], [7, 166, 27, 18, 147, 189, 99, 74]);
        assert_eq!(crate::PACK_TABLE_VERSION, 1);
    }

    #[test]
    fn runs_that_were_left_as_they_were_are_one_piece() {
        let objects = [blob(1, 500), delta(2, 20, 0), blob(3, 5), delta(4, 300, 1), blob(5, 3 << 20)];
        let old = pack(&objects, SHA1);
        let body_bytes = (old.bytes.len() - 32) as u32;
        let (literals, pieces) = check(&[&old], &old);
        assert_eq!(literals, 32);
        let copy = PackPiece::Copy { source: 0, offset: 12, len: body_bytes };
        assert_eq!(pieces, [PackPiece::Literal { len: 12 }, copy, PackPiece::Literal { len: 20 }]);
        // Behind another entry the run is as it was, for it names bases within itself.
        let new = pack(&[&[blob(6, 77)], &objects[..1], &objects[1..3]].concat(), SHA1);
        assert!(check(&[&old], &new).1.len() >= 3);
        let moved = [blob(6, 77), objects[0], Object { base: 1, ..objects[1] }, objects[2], Object { base: 2, ..objects[3] }, objects[4]];
        let (literals, pieces) = check(&[&old], &pack(&moved, SHA1));
        assert_eq!((literals, pieces.len()), (32 + 77 + 2, 3));
    }

    #[test]
    fn only_headers_travel_of_entries_whose_bases_moved() {
        let old = pack(&[blob(1, 500), delta(2, 400, 0), blob(3, 600)], SHA1);
        let new = pack(&[blob(1, 500), blob(3, 600), delta(2, 400, 0)], SHA1);
        let (literals, pieces) = check(&[&old], &new);
        assert_eq!(literals, 32 + header_len(&new, 2, 400));
        assert_eq!(pieces.len(), 6, "{pieces:?}");
    }

    #[test]
    fn the_pack_that_goes_on_is_preferred() {
        let first = pack(&[blob(1, 100), blob(2, 100)], SHA1);
        let second = pack(&[blob(9, 100), blob(1, 100), blob(8, 100)], SHA1);
        let (_, pieces) = check(&[&first, &second], &pack(&[blob(9, 100), blob(1, 100), blob(8, 100)], SHA1));
        assert_eq!(pieces.len(), 3, "{pieces:?}");
        assert!(matches!(pieces[1], PackPiece::Copy { source: 1, offset: 12, .. }));
        // What is new between them doesn't end the run.
        let (_, pieces) = check(&[&first, &second], &pack(&[blob(9, 100), blob(7, 100), blob(1, 100)], SHA1));
        assert!(matches!(pieces[3], PackPiece::Copy { source: 1, .. }), "{pieces:?}");
    }

    #[test]
    fn small_bodies_are_sent_unless_they_continue_a_copy() {
        let old = pack(&[blob(1, 100), blob(2, 3), blob(3, 4)], SHA1);
        let (literals, pieces) = check(&[&old], &old);
        assert_eq!((literals, pieces.len()), (32, 3));
        let (literals, pieces) = check(&[&old], &pack(&[blob(3, 4), blob(2, 3)], SHA1));
        assert_eq!((literals, pieces.len()), (32 + 9, 1));
    }

    #[test]
    fn packs_of_impossible_entries_are_rebuilt() {
        let odd = |kind| Object { seed: 5, body_len: 200, kind, base: 0 };
        for kind in [0, 5, 7] {
            for hash in [SHA1, PackHash::Sha256] {
                let old = pack(&[odd(kind), blob(1, 100)], hash);
                let (literals, pieces) = check(&[&old], &old);
                assert_eq!((literals, pieces.len()), (12 + hash.bytes(), 3), "kind {kind}");
            }
        }
        let empty = pack(&[], SHA1);
        assert_eq!(check(&[&empty], &empty).0, 32);
    }

    #[test]
    fn a_pack_that_is_not_as_its_index_says_has_no_table() {
        let whole = pack(&[blob(1, 100), blob(2, 100)], SHA1);
        let bases = PackBases::new([whole.table()], 1000);
        for (len, more) in [(whole.bytes.len() - 1, 0), (whole.bytes.len(), 1), (50, 0), (0, 0)] {
            let bytes = [&whole.bytes[..len], &vec![1; more]].concat();
            let mut encoder = PackEncoder::new(whole.offsets(), &bases);
            let mut segments = Vec::new();
            encoder.push(&bytes, Follows::Nothing, &mut |segment| segments.push(segment));
            let encoded = encoder.finish();
            assert_eq!((encoded.table, encoded.digest), (None, digest(&bytes)));
            assert!(rebuilt(&[&whole], &segments, encoded.size) == bytes);
        }
    }

    #[test]
    #[should_panic(expected = "nothing follows")]
    fn an_unfinished_pack_has_no_digest() {
        let bases = PackBases::default();
        let whole = pack(&[blob(1, 100), blob(2, 100)], SHA1);
        let mut encoder = PackEncoder::new(whole.offsets(), &bases);
        encoder.push(&whole.bytes[..150], Follows::More, &mut |_| ());
        encoder.finish();
    }

    #[test]
    fn segments_keep_their_limits() {
        let objects: Vec<Object> = (1..=90_000).map(|n| delta(n, 17 + n as usize % 9, n as usize / 2)).collect();
        let old = pack(&[&objects[..], &[blob(5, 70 << 20)]].concat(), SHA1);
        let new = pack(&[&objects[40_000..], &objects[..40_000], &[blob(5, 70 << 20), blob(6, 2 << 20)]].concat(), SHA1);
        let bases = PackBases::new([old.table()], usize::MAX);
        let (encoded, segments) = new.encode(&bases, 7);
        assert!(rebuilt(&[&old], &segments, encoded.size) == new.bytes);
        assert!(segments.len() >= 5);
        for Segment { pieces, literal, .. } in &segments {
            let span: u64 = pieces.iter().map(|piece| u64::from(piece.len_bytes())).sum();
            assert!(span <= SEGMENT_SPAN_BYTES_MAX && literal.len() <= SEGMENT_BYTES_MAX);
        }
    }

    #[test]
    fn the_number_of_threads_does_not_show() {
        let objects: Vec<Object> = (1..=3000).map(|n| delta(n, n as usize % 700 + 1, n as usize / 3)).collect();
        let (old, new) = (pack(&objects[500..], SHA1), pack(&objects, SHA1));
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| new.encode(&PackBases::new([old.table()], usize::MAX), 3))
        };
        assert!(with(1) == with(4), "the result differs");
    }

    fn objects() -> impl Strategy<Value = Vec<Object>> {
        let body_len = prop_oneof![20 => 1usize..60, 20 => 1usize..3000, 1 => 1_000_000usize..2_200_000];
        let kind = prop_oneof![4 => Just(3u8), 4 => Just(6u8), 1 => 0u8..8];
        // Few seeds, so that packs have much in common.
        let object = (1u64..60, body_len, kind, 0usize..100);
        prop::collection::vec(object.prop_map(|(seed, body_len, kind, base)| Object { seed, body_len, kind, base }), 0..60)
    }

    /// Packs made of the same objects, each of some runs of them.
    fn packs() -> impl Strategy<Value = Vec<Vec<Object>>> {
        objects().prop_flat_map(|all| {
            let len = all.len();
            let runs = prop::collection::vec((0..=len, 0usize..20), 0..6);
            prop::collection::vec(runs, 1..5).prop_map(move |packs| {
                let run = |&(start, len): &(usize, usize)| all[start..all.len().min(start + len)].to_vec();
                packs.iter().map(|runs| runs.iter().flat_map(run).collect()).collect()
            })
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn packs_are_rebuilt_and_windows_do_not_show(packs in packs(), windows in (1u64.., 1u64..), sha256: bool) {
            let hash = if sha256 { PackHash::Sha256 } else { SHA1 };
            let packs: Vec<Pack> = packs.iter().map(|objects| pack(objects, hash)).collect();
            let (new, old) = packs.split_first().unwrap();
            let old: Vec<&Pack> = old.iter().collect();
            let (literals, _) = check(&old, new);
            prop_assert!(literals <= new.bytes.len());
            let bases = PackBases::new(old.iter().map(|old| old.table()), usize::MAX);
            prop_assert!(new.encode(&bases, windows.0) == new.encode(&bases, windows.1), "the result differs");
            // A pack that is itself a base travels as headers and what is too small for a copy, at most.
            let of_all = [&[new][..], &old].concat();
            let most = 12 + hash.bytes() + new.offsets.len() * (HEADER_BYTES_MAX + COPY_BYTES_MIN);
            prop_assert!(check(&of_all, new).0 <= most);
        }

        #[test]
        fn any_offsets_describe_any_bytes(bytes in prop::collection::vec(any::<u8>(), 40..400), offsets in prop::collection::btree_set(12u64..380, 0..40)) {
            let hash = SHA1;
            let end = bytes.len() as u64 - 20;
            let offsets = offsets.into_iter().filter(|&offset| offset < end).collect();
            let odd = Pack { bytes, offsets, hash };
            check(&[], &odd);
            check(&[&odd], &odd);
        }
    }

    /// `cargo test --release -p coldspare-delta -- --ignored --nocapture packs_throughput`
    #[test]
    #[ignore = "prints figures, claims nothing"]
    #[expect(clippy::disallowed_methods, reason = "a stopwatch around pure work")]
    fn packs_throughput() {
        let objects: Vec<Object> = (1..=400_000u64).map(|n| delta(n, (n * n % 2000) as usize + 30, n as usize / 2)).collect();
        let old = pack(&objects, SHA1);
        let new = pack(&[&objects[100_000..], &objects[..100_000]].concat(), SHA1);
        let run = |name: &str, bases: &PackBases, pack: &Pack| {
            let mut encoder = PackEncoder::new(pack.offsets(), bases);
            let start = std::time::Instant::now();
            let mut at = 0;
            while at < pack.bytes.len() {
                let end = pack.bytes.len().min(at + (4 << 20));
                let follows = if end == pack.bytes.len() { Follows::Nothing } else { Follows::More };
                at += encoder.push(&pack.bytes[at..end], follows, &mut |segment| drop(std::hint::black_box(segment)));
            }
            let encoded = encoder.finish();
            let megabytes = pack.bytes.len() as f64 / 1e6;
            println!("{name}: {:.0} MB/s of {megabytes:.0} MB", megabytes / start.elapsed().as_secs_f64());
            encoded.table.unwrap()
        };
        for _ in 0..3 {
            let table = run("all new", &PackBases::default(), &old);
            let (entries, bytes) = (table.entries(), table.encode());
            let start = std::time::Instant::now();
            let table = PackTable::decode(&bytes).unwrap();
            let decoded = start.elapsed();
            let bases = PackBases::new([table], usize::MAX);
            let per_entry = |bytes: usize| bytes as f64 / entries as f64;
            println!(
                "{entries} entries: {:.1} bytes each as bytes, {:.1} in memory; decoded in {decoded:.0?}, searchable after {:.0?}",
                per_entry(bytes.len()),
                per_entry(bases.memory_bytes()),
                start.elapsed(),
            );
            run("all known", &bases, &new);
        }
    }
}
