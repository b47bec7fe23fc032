//! Chunk lists from the index: one coding each, limits kept, searchable.

#![no_main]

use coldspare_delta::{Base, CHUNKS_MAX, ChunkList};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(list) = ChunkList::decode(bytes) else { return };
    assert_eq!(list.encode(), bytes);
    assert!(list.chunks.len() <= CHUNKS_MAX);
    let max = list.class.sizes().max;
    assert!(list.chunks.iter().all(|chunk| (1..=max).contains(&chunk.len)));
    assert_eq!(Base::new(list.clone()).class(), list.class);
});
