//! Entries of a pack (`gitformat-pack(5)`): where their headers end, and how a pack is cut as it comes in windows.
//!
//! An entry is a header (type and size, then for a delta where its base is) and a body (a zlib stream). A repack moves
//! bodies as they are and writes new headers. A body of more than [`BODY_BYTES_MAX`] is cut at multiples of that, so
//! that no window has to hold it whole; each part counts as a body without a header.
//!
//! Invariants: what was cut follows each other without a gap; how the pack came in windows doesn't show in the cuts.

use crate::chunk::Follows;
use crate::pack_index::{PACK_HEADER_BYTES, PackHash, PackOffsets};

/// LIMIT: bytes of a body that are matched as one.
pub(crate) const BODY_BYTES_MAX: usize = 1 << 20;

/// LIMIT: bytes of an entry's header; the longest possible has 10 for type and size and 32 for a base.
pub(crate) const HEADER_BYTES_MAX: usize = 63;

/// What a pack consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The pack's header or trailer, or what the index doesn't know of.
    Between {
        /// Bytes.
        len: usize,
    },
    /// A header, unless this is a later part of a body, and the bytes after it.
    Entry {
        /// Bytes, at most [`HEADER_BYTES_MAX`]; 0 as well for an entry whose header is impossible.
        header_len: usize,
        /// Bytes, 1 to [`BODY_BYTES_MAX`].
        body_len: usize,
    },
}

/// Cuts a pack that comes in windows.
#[derive(Debug)]
pub(crate) struct Cutter {
    offsets: PackOffsets,
    /// The number of the entry that comes next or is being cut.
    next: usize,
    /// How much was cut.
    at: u64,
    /// Whether the pack ended within an entry.
    broken: bool,
}

impl Cut {
    /// Bytes of the pack.
    pub(crate) fn len(self) -> usize {
        match self {
            Cut::Between { len } => len,
            Cut::Entry { header_len, body_len } => header_len + body_len,
        }
    }
}

impl Cutter {
    pub(crate) fn new(offsets: PackOffsets) -> Cutter {
        Cutter { offsets, next: 0, at: 0, broken: false }
    }

    /// Cuts the front of `window`, which starts where the last cut ended: all of it when nothing follows, else what
    /// can be cut no other way.
    pub(crate) fn cut(&mut self, window: &[u8], follows: Follows) -> Vec<Cut> {
        let mut cuts = Vec::new();
        let mut rest = window;
        while !rest.is_empty() {
            let Some(cut) = self.next_cut(rest, follows) else { break };
            cuts.push(cut);
            rest = &rest[cut.len()..];
            self.at += cut.len() as u64;
            if self.offsets.entry(self.next).is_some_and(|entry| entry.end <= self.at) {
                self.next += 1;
            }
        }
        cuts
    }

    /// Whether all of the pack that the offsets are of was cut, each entry whole, and nothing besides.
    pub(crate) fn is_complete(&self) -> bool {
        !self.broken && self.at == self.offsets.pack_bytes() && self.next == self.offsets.entries()
    }

    /// `None`: it takes more bytes to know.
    fn next_cut(&mut self, rest: &[u8], follows: Follows) -> Option<Cut> {
        let entry = self.offsets.entry(self.next);
        let within = entry.as_ref().is_some_and(|entry| entry.start <= self.at);
        let end = match &entry {
            Some(entry) if within => entry.end,
            Some(entry) => entry.start,
            None => u64::MAX,
        };
        let left = usize::try_from(end - self.at).unwrap_or(usize::MAX);
        let enough = left.min(BODY_BYTES_MAX + if within { HEADER_BYTES_MAX } else { 0 });
        if rest.len() < enough {
            // A cut is made only with all at hand that it could depend on.
            return (follows == Follows::Nothing).then(|| self.last_cut(rest.len(), within));
        }
        if !within {
            return Some(Cut::Between { len: left.min(BODY_BYTES_MAX) });
        }
        let header_len = match entry {
            Some(entry) if entry.start == self.at => header_len(&rest[..left.min(HEADER_BYTES_MAX)], self.at, self.offsets.hash()),
            _ => None,
        };
        // A header without a body is none.
        let header_len = header_len.filter(|&len| len < left).unwrap_or(0);
        Some(Cut::Entry { header_len, body_len: (left - header_len).min(BODY_BYTES_MAX) })
    }

    /// What is left at the end of a file: the trailer, or less than the offsets promised.
    fn last_cut(&mut self, len: usize, within: bool) -> Cut {
        self.broken |= within;
        Cut::Between { len }
    }
}

/// Bytes of the header at the front of `bytes`, of an entry at `at` in a pack; `None` for an impossible one.
///
/// What the header says of the size is not compared with the body: a wrong header is copied as it is.
fn header_len(bytes: &[u8], at: u64, hash: PackHash) -> Option<usize> {
    let first = *bytes.first()?;
    let size_len = 1 + if first & 0x80 == 0 { 0 } else { continued_len(&bytes[1..])? };
    if size_len > SIZE_LEN_MAX {
        return None;
    }
    match first >> 4 & 7 {
        1..=4 => Some(size_len),
        OFS_DELTA => {
            let base_len = continued_len(&bytes[size_len..])?;
            let distance = base_distance(&bytes[size_len..][..base_len])?;
            let before = PACK_HEADER_BYTES..at;
            at.checked_sub(distance).filter(|base| before.contains(base)).map(|_| size_len + base_len)
        }
        REF_DELTA => Some(size_len + hash.bytes()).filter(|&len| len <= bytes.len()),
        _ => None,
    }
}

/// Bytes of a number whose last byte is the first one without its highest bit.
fn continued_len(bytes: &[u8]) -> Option<usize> {
    Some(1 + bytes.iter().position(|byte| byte & 0x80 == 0)?)
}

/// How far before an entry its base is; high bits first, and 1 is added at each further byte.
fn base_distance(bytes: &[u8]) -> Option<u64> {
    bytes.iter().enumerate().try_fold(0u64, |distance, (at, byte)| {
        let high = if at == 0 { 0 } else { distance.checked_add(1)?.checked_mul(128)? };
        high.checked_add(u64::from(byte & 0x7f))
    })
}

const OFS_DELTA: u8 = 6;
const REF_DELTA: u8 = 7;

/// 4 bits of size in the first byte, 7 in each further one: 64 bits end in the tenth.
const SIZE_LEN_MAX: usize = 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8], at: u64, expected: Option<usize>) {
        assert_eq!(header_len(bytes, at, PackHash::Sha1), expected, "{bytes:02x?} at {at}");
    }

    #[test]
    fn headers_end_before_the_body() {
        for kind in 1..=4u8 {
            check(&[kind << 4 | 15, 0x78], 12, Some(1));
        }
        check(&[0x95, 0x0a, 0x78, 0x9c], 12, Some(2));
        check(&[0xb5, 0x80, 0x80, 0x80, 0x80, 0x01, 0x78], 12, Some(6));
        check(&[&[0xbf][..], &[0xff; 8], &[0x7f, 0x78]].concat(), 12, Some(10));
        check(&[&[0xbf][..], &[0xff; 9], &[0x7f, 0x78]].concat(), 12, None);
        check(&[0xb0, 0x80, 0x80], 12, None);
        check(&[], 12, None);
        for kind in [0, 5u8] {
            check(&[kind << 4, 0x78, 0x9c], 12, None);
        }
    }

    #[test]
    fn a_delta_names_a_base_before_it() {
        check(&[0x61, 0x05, 0x78], 17, Some(2));
        check(&[0x61, 0x05, 0x78], 16, None);
        check(&[0x61, 0x00, 0x78], 500, None);
        // 0x80 0x00 is 128, 0xff 0x7f is 16,511, 0x80 0x80 0x00 is 16,512.
        check(&[0xe1, 0x01, 0x80, 0x00, 0x78], 12 + 128, Some(4));
        check(&[0xe1, 0x01, 0x80, 0x00, 0x78], 11 + 128, None);
        check(&[0x61, 0xff, 0x7f, 0x78], 12 + 16_511, Some(3));
        check(&[0x61, 0xff, 0x7f, 0x78], 11 + 16_511, None);
        check(&[0x61, 0x80, 0x80, 0x00, 0x78], 12 + 16_512, Some(4));
        check(&[0x61, 0x80, 0x80, 0x00, 0x78], 11 + 16_512, None);
        check(&[0x61, 0x80], 500, None);
        check(&[&[0x61][..], &[0xff; 9], &[0x7f, 0x78]].concat(), u64::MAX, None);
    }

    #[test]
    fn a_base_by_id_is_as_long_as_the_hash() {
        let header = [&[0xf1, 0x02][..], &[0xaa; 32]].concat();
        let len = |bytes: &[u8], hash| header_len(bytes, 12, hash);
        assert_eq!(len(&header, PackHash::Sha1), Some(22));
        assert_eq!(len(&header, PackHash::Sha256), Some(34));
        assert_eq!(len(&header[..22], PackHash::Sha1), Some(22));
        assert_eq!(len(&header[..21], PackHash::Sha1), None);
    }

    fn cuts(offsets: &[u64], pack: &[u8], pack_bytes: u64, windows: &[usize]) -> (Vec<Cut>, bool) {
        let mut cutter = Cutter::new(PackOffsets::new(offsets.to_vec(), pack_bytes, PackHash::Sha1).unwrap());
        let (mut at, mut all) = (0, Vec::new());
        for end in windows.iter().map(|&end| end.min(pack.len())).chain([pack.len()]) {
            let follows = if end == pack.len() { Follows::Nothing } else { Follows::More };
            let cuts = cutter.cut(&pack[at..end], follows);
            at += cuts.iter().map(|cut| cut.len()).sum::<usize>();
            all.extend(cuts);
        }
        assert_eq!(at, pack.len());
        (all, cutter.is_complete())
    }

    #[test]
    fn a_pack_is_cut_at_its_entries() {
        let mut pack = vec![0; 12];
        pack.extend([0x35, 1, 2, 3]);
        pack.extend([0x61, 0x04, 4, 5]);
        pack.extend([0x00, 6, 7]); // impossible
        pack.extend([0x33]); // a header alone
        pack.extend([0; 20]);
        let between = |len| Cut::Between { len };
        let entry = |header_len, body_len| Cut::Entry { header_len, body_len };
        let expected = [between(12), entry(1, 3), entry(2, 2), entry(0, 3), entry(0, 1), between(20)];
        let offsets = [12, 16, 20, 23];
        for end in 0..pack.len() {
            assert_eq!(cuts(&offsets, &pack, pack.len() as u64, &[end]), (expected.to_vec(), true));
        }
        // An index that knows less, a file that has more, one that breaks off.
        let short = [between(12), entry(1, 3), entry(2, 2 + 3 + 1), between(20)];
        assert_eq!(cuts(&offsets[..2], &pack, 44, &[]), (short.to_vec(), true));
        let late = [between(16), entry(2, 2 + 3 + 1), between(20)];
        assert_eq!(cuts(&offsets[1..2], &pack, 44, &[]), (late.to_vec(), true));
        let longer = [&pack[..], &[0]].concat();
        let with_more = [between(12), entry(1, 3), entry(2, 2), entry(0, 3), entry(0, 1), between(21)];
        assert_eq!(cuts(&offsets, &longer, 44, &[]), (with_more.to_vec(), false));
        let broken = [between(12), entry(1, 3), between(3)];
        assert_eq!(cuts(&offsets, &pack[..19], 44, &[]), (broken.to_vec(), false));
        assert!(!cuts(&offsets, &pack[..43], 44, &[]).1);
        assert_eq!(cuts(&[], &pack[..12], 32, &[]), (vec![between(12)], false));
    }

    #[test]
    fn a_large_body_is_cut_at_fixed_places() {
        let mut pack = vec![0; 12];
        pack.extend([0xb5, 0x80, 0x01]);
        pack.resize(pack.len() + (2 << 20) + 5, 7);
        pack.extend([0; 20]);
        let part = |header_len, body_len| Cut::Entry { header_len, body_len };
        let expected = vec![Cut::Between { len: 12 }, part(3, 1 << 20), part(0, 1 << 20), part(0, 5), Cut::Between { len: 20 }];
        let size = pack.len() as u64;
        for windows in [vec![], vec![1, 2, 3, 14, 1 << 20], vec![(1 << 20) + 14, (1 << 20) + 15, (1 << 20) + 200, 2 << 20, 3 << 20]] {
            assert_eq!(cuts(&[12], &pack, size, &windows), (expected.clone(), true));
        }
    }
}
