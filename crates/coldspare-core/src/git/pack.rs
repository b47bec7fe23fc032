//! Object ids in a pack index of version 2 (`gitformat-pack(5)`), read by ranges: nobody has to hold an index whole.
//!
//! Invariants: a fan-out that was parsed grows from first to last; ranges stay within the file that it is of.

use std::ops::Range;

use super::{Damage, ObjectId, SHA1_BYTES, SHA256_BYTES};

/// The first part of an index: how many objects have a first byte up to each value.
#[derive(Debug, Clone)]
pub struct Fanout([u32; 256]);

/// Bytes of magic, version and fan-out.
pub const FANOUT_BYTES: usize = 8 + 4 * 256;

impl Fanout {
    /// Reads the first [`FANOUT_BYTES`] of an index.
    ///
    /// # Errors
    /// [`Damage`]: another version, cut off, or counts that fall.
    pub fn parse(head: &[u8]) -> Result<Fanout, Damage> {
        if !head.starts_with(b"\xfftOc\0\0\0\x02") || head.len() < FANOUT_BYTES {
            return Err(Damage::new("the pack index doesn't begin as one of version 2"));
        }
        let mut counts = [0; 256];
        for (count, bytes) in counts.iter_mut().zip(head[8..FANOUT_BYTES].chunks_exact(4)) {
            *count = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        if !counts.is_sorted() {
            return Err(Damage::new("the pack index has a fan-out that falls"));
        }
        Ok(Fanout(counts))
    }

    /// How many objects the pack has.
    pub fn objects(&self) -> u32 {
        self.0[255]
    }

    /// Where in the index the ids with this first byte are, sorted, each of `hash_bytes`.
    pub fn bucket(&self, first: u8, hash_bytes: usize) -> Range<u64> {
        let low = if first == 0 { 0 } else { self.0[usize::from(first) - 1] };
        let at = |count: u32| FANOUT_BYTES as u64 + u64::from(count) * hash_bytes as u64;
        at(low)..at(self.0[usize::from(first)])
    }
}

/// The length of the hashes in an index of so many objects and bytes; `None` when nothing fits.
pub fn hash_bytes(objects: u32, size: u64) -> Option<usize> {
    let fits = |hash: usize| {
        let least = FANOUT_BYTES as u64 + u64::from(objects) * (hash as u64 + 8) + 2 * hash as u64;
        // Offsets of 8 bytes for packs above 2 GiB follow the table.
        size >= least && (size - least).is_multiple_of(8) && (size - least) / 8 <= u64::from(objects)
    };
    // An index of SHA-1 with many large offsets could have the size of one of SHA-256: the smaller fits first, and such
    // packs hold more than 2 GiB in few objects.
    [SHA1_BYTES, SHA256_BYTES].into_iter().find(|hash| fits(*hash))
}

/// Whether a bucket, as its bytes, holds `id`.
pub fn bucket_holds(bucket: &[u8], id: &ObjectId) -> bool {
    let wanted = id.as_bytes();
    let count = bucket.len() / wanted.len();
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        match bucket[middle * wanted.len()..][..wanted.len()].cmp(wanted) {
            std::cmp::Ordering::Equal => return true,
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(ids: &[[u8; 20]]) -> Vec<u8> {
        let mut out = b"\xfftOc\0\0\0\x02".to_vec();
        for first in 0..=255u8 {
            let count = ids.iter().filter(|id| id[0] <= first).count() as u32;
            out.extend_from_slice(&count.to_be_bytes());
        }
        ids.iter().for_each(|id| out.extend_from_slice(id));
        out.extend_from_slice(&vec![0; ids.len() * 8]);
        out.extend_from_slice(&[5; 20]);
        out.extend_from_slice(&[6; 20]);
        out
    }

    #[test]
    fn every_object_is_found_and_no_other() {
        let mut ids: Vec<[u8; 20]> = (0..1000u32).map(|n| blake3::hash(&n.to_le_bytes()).as_bytes()[..20].try_into().unwrap()).collect();
        ids.sort();
        let bytes = index(&ids);
        let fanout = Fanout::parse(&bytes).unwrap();
        assert_eq!((fanout.objects(), hash_bytes(1000, bytes.len() as u64)), (1000, Some(20)));
        let holds = |id: &[u8; 20]| {
            let range = fanout.bucket(id[0], 20);
            bucket_holds(&bytes[range.start as usize..range.end as usize], &ObjectId::new(id).unwrap())
        };
        assert!(ids.iter().all(holds));
        for id in &ids {
            let mut other = *id;
            other[19] ^= 1;
            assert!(!holds(&other));
        }
        assert_eq!(hash_bytes(1000, bytes.len() as u64 - 1), None);
        assert!(Fanout::parse(&bytes[..1000]).is_err() && Fanout::parse(&[0; 2000]).is_err());
    }
}
