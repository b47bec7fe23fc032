//! Recipes of a pack's index from a peer, indexes and tables of names from a disk: one coding each, and whatever a recipe makes of a
//! pack is an index that is written as it is read.

#![no_main]

use coldspare_core::changeset::Recipe;
use coldspare_core::codec;
use coldspare_delta::{IndexFile, IndexRebuild, IndexRecipe, NameTable};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(recipe) = codec::decode::<Recipe>(bytes) {
        // A number may come in more bytes than it needs.
        assert_eq!(codec::decode::<Recipe>(&codec::encode(&recipe)).unwrap(), recipe);
    }
    if let Ok(table) = NameTable::decode(bytes) {
        assert_eq!(table.encode(), bytes);
    }
    if let Ok(index) = IndexFile::parse(bytes) {
        let _ = (index.is_as_written(), NameTable::of(&index));
        index.write_reverse::<()>(&mut |_| Ok(())).unwrap();
    }
    let Ok(recipe) = IndexRecipe::decode(bytes) else { return };
    assert_eq!(recipe.encode(), bytes);
    let (sources, objects, hash) = (recipe.sources(), recipe.objects(), recipe.hash());
    let rebuild = IndexRebuild::new(recipe);
    // Any pack will do, as long as the entries fit into it.
    let pack_bytes = 12 + 300 * (bytes.len() as u64 + 1);
    let Ok(mut walk) = rebuild.walk(pack_bytes) else { return };
    assert_eq!(sources, 0, "names of an index that wasn't given");
    (0..pack_bytes).step_by(1 << 16).for_each(|at| walk.push(&vec![3; (pack_bytes - at).min(1 << 16) as usize]));
    let made = walk.finish().expect("all of the pack came");
    let mut index = Vec::new();
    made.write::<()>(&mut |part| {
        index.extend_from_slice(part);
        Ok(())
    })
    .unwrap();
    // Names may be there twice.
    if let Ok(parsed) = IndexFile::parse(&index) {
        assert!(parsed.is_as_written() && parsed.objects() == objects && parsed.hash() == hash);
    }
});
