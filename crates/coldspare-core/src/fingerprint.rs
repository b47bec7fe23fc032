//! One digest for all entries of all roots, computed by both hosts from what each knows of the tree (R7).

use crate::codec;
use crate::entry::{Digest, Entry};

/// Takes the entries of a tree in the order of their keys.
#[derive(Debug, Default)]
pub struct Fingerprint {
    hasher: blake3::Hasher,
    /// Not hashed yet: many entries at once take less time.
    waiting: Vec<u8>,
}

/// How much is hashed at once: as many chunks as there are lanes in a vector.
const WAITING_BYTES: usize = 16 << 10;

impl Fingerprint {
    /// Takes one more entry: its key, which is above that of the one before, and what the tree says of it.
    pub fn add(&mut self, key: &[u8], entry: &Entry) {
        self.add_encoded(key, &codec::encode(entry));
    }

    /// As [`Fingerprint::add`], for an entry that is encoded already.
    pub fn add_encoded(&mut self, key: &[u8], entry: &[u8]) {
        for part in [key, entry] {
            self.waiting.extend_from_slice(&(part.len() as u64).to_le_bytes());
            self.waiting.extend_from_slice(part);
        }
        if self.waiting.len() >= WAITING_BYTES {
            self.hasher.update(&self.waiting);
            self.waiting.clear();
        }
    }

    /// The digest of all of them.
    pub fn finish(&self) -> Digest {
        Digest(*self.hasher.clone().update(&self.waiting).finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Body, Meta, Time};

    fn entry(mode: u16) -> Entry {
        Entry { meta: Meta { mode, uid: 1, gid: 2, mtime: Time { secs: 3, nanos: 4 }, xattrs: Vec::new() }, body: Body::Dir }
    }

    fn digest(entries: &[(&[u8], u16)]) -> Digest {
        let mut fingerprint = Fingerprint::default();
        entries.iter().for_each(|(key, mode)| fingerprint.add(key, &entry(*mode)));
        fingerprint.finish()
    }

    #[test]
    fn any_difference_of_two_trees_shows() {
        let tree = digest(&[(b"a", 0o755), (b"b", 0o700)]);
        assert_eq!(tree, digest(&[(b"a", 0o755), (b"b", 0o700)]));
        for other in [&[(&b"a"[..], 0o755)][..], &[(b"a", 0o755), (b"b", 0o701)], &[(b"a", 0o755), (b"c", 0o700)], &[]] {
            assert_ne!(tree, digest(other), "{other:?}");
        }
    }

    #[test]
    fn the_digest_of_a_tree_is_frozen() {
        assert_eq!(digest(&[(b"a", 0o755)]).to_string(), GOLDEN);
    }

    const GOLDEN: &str = "fe426406c8ea87ec49e804bfaaad77f3cd85df4175866782d48bb2e42977727d";
}
