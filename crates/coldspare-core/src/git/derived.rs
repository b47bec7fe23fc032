//! What files that git derives from others name: a multi-pack index its packs, a commit graph its commits.
//!
//! Both share one layout of chunks (`gitformat-chunk(5)`). They are rebuildable, so that a file which isn't understood
//! is treated as one that names something absent: dropping it is always safe.

use std::ops::Range;

use super::{Damage, SHA1_BYTES, SHA256_BYTES};

/// The names of the packs' indexes (`pack-….idx`) in a multi-pack index, from its whole content.
///
/// # Errors
/// [`Damage`]: not understood.
pub fn multi_pack_index_names(content: &[u8]) -> Result<Vec<Vec<u8>>, Damage> {
    let unknown = || Damage::new("the multi-pack index isn't understood");
    let head = content.get(..12).filter(|h| h.starts_with(b"MIDX") && h[4] == 1).ok_or_else(unknown)?;
    if head[7] != 0 {
        return Err(Damage::new("the multi-pack index builds on another one"));
    }
    let packs = u32::from_be_bytes([head[8], head[9], head[10], head[11]]) as usize;
    let range = chunk(content, 12, head[6], b"PNAM").ok_or_else(unknown)?;
    let names = content.get(range).ok_or_else(unknown)?;
    let names: Vec<Vec<u8>> = names.split(|&b| b == 0).filter(|n| !n.is_empty()).map(<[u8]>::to_vec).collect();
    if names.len() == packs { Ok(names) } else { Err(unknown()) }
}

/// What a commit graph, or a layer of one, names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitGraph {
    /// Where in the file the ids of its commits are, sorted.
    pub ids: Range<usize>,
    /// Bytes of one id.
    pub hash_bytes: usize,
    /// How many layers lie below it.
    pub layers_below: u8,
}

/// Reads what a commit graph names, from its whole content.
///
/// # Errors
/// [`Damage`]: not understood.
pub fn commit_graph(content: &[u8]) -> Result<CommitGraph, Damage> {
    let unknown = || Damage::new("the commit graph isn't understood");
    let head = content.get(..8).filter(|h| h.starts_with(b"CGPH") && h[4] == 1).ok_or_else(unknown)?;
    let hash_bytes = match head[5] {
        1 => SHA1_BYTES,
        2 => SHA256_BYTES,
        _ => return Err(unknown()),
    };
    let ids = chunk(content, 8, head[6], b"OIDL").ok_or_else(unknown)?;
    if !ids.len().is_multiple_of(hash_bytes) || content.get(ids.clone()).is_none() {
        return Err(unknown());
    }
    Ok(CommitGraph { ids, hash_bytes, layers_below: head[7] })
}

/// Where the chunk `id` is, by the table of `count` chunks at `at`.
fn chunk(content: &[u8], at: usize, count: u8, id: &[u8; 4]) -> Option<Range<usize>> {
    let entry = |n: usize| content.get(at + n * 12..at + n * 12 + 12);
    let offset = |e: &[u8]| usize::try_from(u64::from_be_bytes(e[4..12].try_into().ok()?)).ok();
    for n in 0..usize::from(count) {
        let this = entry(n)?;
        if this[..4] == *id {
            let (start, end) = (offset(this)?, offset(entry(n + 1)?)?);
            return (start <= end && end <= content.len()).then_some(start..end);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunked(head: &[u8], chunks: &[(&[u8; 4], &[u8])]) -> Vec<u8> {
        let mut out = head.to_vec();
        let mut offset = head.len() + 12 * (chunks.len() + 1);
        for (id, content) in chunks {
            out.extend_from_slice(*id);
            out.extend_from_slice(&(offset as u64).to_be_bytes());
            offset += content.len();
        }
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&(offset as u64).to_be_bytes());
        chunks.iter().for_each(|(_, content)| out.extend_from_slice(content));
        out.extend_from_slice(&[1; 20]);
        out
    }

    #[test]
    fn a_multi_pack_index_names_its_packs() {
        let head = *b"MIDX\x01\x01\x02\0\0\0\0\x02";
        let midx = chunked(&head, &[(b"OIDF", &[0; 8]), (b"PNAM", b"pack-a.idx\0pack-b.idx\0\0\0")]);
        assert_eq!(multi_pack_index_names(&midx).unwrap(), [b"pack-a.idx".to_vec(), b"pack-b.idx".to_vec()]);
        for cut in 0..midx.len() - 24 {
            assert!(multi_pack_index_names(&midx[..cut]).is_err(), "{cut}");
        }
        assert!(multi_pack_index_names(&chunked(b"MIDX\x01\x01\x01\0\0\0\0\x03", &[(b"PNAM", b"pack-a.idx\0")])).is_err());
    }

    #[test]
    fn a_commit_graph_names_its_commits() {
        let ids: Vec<u8> = [[3u8; 20], [4; 20]].concat();
        let graph = chunked(b"CGPH\x01\x01\x02\x01", &[(b"OIDF", &[0; 8]), (b"OIDL", &ids)]);
        let found = commit_graph(&graph).unwrap();
        assert_eq!((&graph[found.ids.clone()], found.hash_bytes, found.layers_below), (&ids[..], 20, 1));
        assert!(commit_graph(&graph[..40]).is_err() && commit_graph(b"").is_err());
    }
}
