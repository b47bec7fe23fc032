//! Indexes and reverse indexes that git wrote, made anew from the indexes that it had before, and from the pack.

#![allow(clippy::unwrap_used)] // also in what several tests share

mod repositories;

use std::fs;
use std::path::Path;

use coldspare_delta::{IndexFile, IndexFileError, IndexRebuild, IndexRecipe, NameBases, NameTable};
use repositories::{git, git_with_input, grow, pack_names};

/// What indexes take to be described.
#[derive(Debug, Default)]
struct Cost {
    indexes: usize,
    index_bytes: usize,
    recipe_bytes: usize,
}

impl Cost {
    /// The share that travels, in percent.
    fn share(&self) -> f64 {
        100.0 * self.recipe_bytes as f64 / self.index_bytes as f64
    }
}

/// The indexes of a repository, and what is kept of each.
fn indexes_of(repository: &Path) -> Vec<(String, Vec<u8>)> {
    let read = |name: String| {
        let bytes = fs::read(repository.join("objects/pack").join(&name).with_extension("idx")).unwrap();
        (name, bytes)
    };
    pack_names(repository).into_iter().map(read).collect()
}

fn collected(give: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<(), ()>) -> Result<(), ()>) -> Vec<u8> {
    let mut out = Vec::new();
    give(&mut |part| {
        out.extend_from_slice(part);
        Ok(())
    })
    .unwrap();
    out
}

/// Describes the index of `pack` by `old`, makes it from that and compares it, and the reverse index where there is one.
fn check_one(pack: &Path, old: &[(String, Vec<u8>)], cost: &mut Cost) {
    let (pack_bytes, bytes) = (fs::read(pack).unwrap(), fs::read(pack.with_extension("idx")).unwrap());
    let index = IndexFile::parse(&bytes).unwrap();
    assert!(index.is_as_written(), "git writes another index");
    let table = |bytes: &Vec<u8>| NameTable::of(&IndexFile::parse(bytes).unwrap()).unwrap().encode();
    let bases = NameBases::new(old.iter().map(|(_, bytes)| NameTable::decode(&table(bytes)).unwrap()), index.hash(), usize::MAX);
    let (recipe, used) = IndexRecipe::of(&index, &bases).unwrap();
    let recipe = recipe.encode();
    let mut rebuild = IndexRebuild::new(IndexRecipe::decode(&recipe).unwrap());
    for (number, &base) in (0..).zip(&used) {
        rebuild.take_base(number, &IndexFile::parse(&old[usize::from(base)].1).unwrap()).unwrap();
    }
    let mut walk = rebuild.walk(pack_bytes.len() as u64).unwrap();
    pack_bytes.chunks(10_007).for_each(|part| walk.push(part));
    let made = walk.finish().unwrap();
    assert!(collected(|write| made.write(write)) == bytes, "another index than git's");
    cost.indexes += 1;
    cost.index_bytes += bytes.len();
    cost.recipe_bytes += recipe.len();
    if let Ok(reverse) = fs::read(pack.with_extension("rev")) {
        assert!(collected(|write| index.write_reverse(write)) == reverse, "another reverse index than git's");
    }
}

/// Repacks a repository of many pushes, and describes what is new.
fn cost_of(name: &str, format: &str, args: &[&str]) -> Cost {
    let folder = tempfile::tempdir().unwrap();
    let bare = folder.path().join("bare");
    grow(&bare, format);
    git(&bare, &["config", "pack.writeReverseIndex", "true"]);
    let old = indexes_of(&bare);
    git(&bare, args);
    let mut cost = Cost::default();
    let packs = bare.join("objects/pack");
    for name in pack_names(&bare).iter().filter(|name| old.iter().all(|(known, _)| known != *name)) {
        assert!(packs.join(name).with_extension("rev").exists());
        check_one(&packs.join(name), &old, &mut cost);
    }
    println!("{name}: {:.1} % of {} bytes travel, of {} indexes by {}", cost.share(), cost.index_bytes, cost.indexes, old.len());
    assert!(cost.indexes > 0);
    cost
}

#[test]
fn the_index_of_a_full_repack_is_made_of_those_before() {
    for (format, bitmap) in [("sha1", "--write-bitmap-index"), ("sha256", "--no-write-bitmap-index")] {
        let cost = cost_of(format, format, &["repack", "-q", "-a", "-d", bitmap]);
        assert!(cost.share() < 15.0, "{cost:?}");
    }
}

#[test]
fn the_index_of_a_geometric_repack_is_made_of_those_before() {
    let cost = cost_of("repack --geometric", "sha1", &["repack", "-q", "-d", "--geometric=2"]);
    assert!(cost.share() < 15.0, "{cost:?}");
}

#[test]
fn the_index_of_a_pack_that_names_bases_by_id_is_made_of_those_before() {
    let args = ["-c", "repack.useDeltaBaseOffset=false", "repack", "-q", "-a", "-d"];
    let cost = cost_of("repack -ad, bases by id", "sha1", &args);
    assert!(cost.share() < 20.0, "{cost:?}");
}

#[test]
fn the_index_of_deltas_that_are_computed_anew_is_made_of_those_before() {
    let cost = cost_of("repack -adf", "sha1", &["repack", "-q", "-a", "-d", "-f"]);
    assert!(cost.share() < 40.0, "{cost:?}");
}

#[test]
fn the_index_of_any_objects_is_made_of_those_before() {
    let folder = tempfile::tempdir().unwrap();
    let bare = folder.path().join("bare");
    grow(&bare, "sha1");
    let all = indexes_of(&bare);
    let listed = git(&bare, &["rev-list", "--objects", "--all"]);
    let names: Vec<&str> = listed.lines().map(|line| line.split(' ').next().unwrap()).collect();
    let mut state = 0x5eed_u64;
    let mut below = |end: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) % end
    };
    for round in 0..12 {
        // Some of the objects, described by some of the indexes.
        let (share, known) = (1 + below(100), 1 + below(100));
        let input: String = names.iter().filter(|_| below(100) < share).map(|name| format!("{name}\n")).collect();
        let old: Vec<_> = all.iter().filter(|_| below(100) < known).cloned().collect();
        let out = folder.path().join(format!("{round}"));
        let offsets = if round % 3 == 0 { &["--delta-base-offset"][..] } else { &[] };
        let args = [&["-c", "pack.writeReverseIndex=true", "pack-objects", "-q"][..], offsets, &[out.to_str().unwrap()]].concat();
        let made = git_with_input(&bare, &args, &input);
        let pack = folder.path().join(format!("{round}-{}.pack", made.trim()));
        let mut cost = Cost::default();
        check_one(&pack, &old, &mut cost);
        println!("{share} % of the objects, {known} % of the indexes: {:.1} % travel", cost.share());
    }
}

#[test]
fn an_index_of_another_form_travels_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let bare = folder.path().join("bare");
    grow(&bare, "sha1");
    let pack = bare.join("objects/pack").join(pack_names(&bare).remove(0));
    let again = |version: &str| {
        let out = folder.path().join("other.idx");
        let _ = fs::remove_file(&out);
        let args = ["index-pack", &format!("--index-version={version}"), "-o", out.to_str().unwrap(), pack.to_str().unwrap()];
        git(&bare, &args);
        fs::read(&out).unwrap()
    };
    assert_eq!(again("2"), fs::read(pack.with_extension("idx")).unwrap());
    assert_eq!(IndexFile::parse(&again("1")).err(), Some(IndexFileError::Form));
    let large = again("2,0x40");
    let index = IndexFile::parse(&large).unwrap();
    assert!(!index.is_as_written(), "offsets of 8 bytes where 4 do");
    assert_eq!(index.objects(), IndexFile::parse(&again("2")).unwrap().objects());
}
