//! What repacks of real repositories cost: packs written by git, described by the packs that git had before.

#![allow(clippy::unwrap_used)] // also in what several tests share

mod repositories;

use std::path::Path;
use std::process::Command;

use coldspare_delta::{
    Follows, PackBases, PackEncoded, PackEncoder, PackHash, PackIndexReader, PackOffsets, PackPiece, PackTable, PackWrite, Segment, digest,
    encode_pack_pieces, rebuild_pack,
};
use repositories::{PUSHES, git, grow, init, pack_names};

/// What a pack takes to be described.
#[derive(Debug, Default)]
struct Cost {
    pack_bytes: usize,
    literal_bytes: usize,
    coded_bytes: usize,
    copies: usize,
    base_entries: usize,
    memory_bytes: usize,
}

impl Cost {
    /// The share of the pack that travels, in percent.
    fn share(&self) -> f64 {
        100.0 * (self.literal_bytes + self.coded_bytes) as f64 / self.pack_bytes as f64
    }
}

/// A pack, and where its entries are by its index, as git wrote both.
fn read_pack(path: &Path, hash: PackHash) -> (Vec<u8>, PackOffsets) {
    let index = std::fs::read(path.with_extension("idx")).unwrap();
    let pack = std::fs::read(path).unwrap();
    let objects = u32::from_be_bytes(index[8 + 4 * 255..][..4].try_into().unwrap());
    let mut reader = PackIndexReader::new(objects, hash, index.len() as u64).unwrap();
    let range = reader.range();
    index[range.start as usize..range.end as usize].chunks(1001).for_each(|part| reader.push(part).unwrap());
    let offsets = reader.finish(pack.len() as u64).unwrap();
    (pack, offsets)
}

fn encode(pack: &[u8], offsets: PackOffsets, bases: &PackBases) -> (PackEncoded, Vec<Segment<PackPiece>>) {
    let mut encoder = PackEncoder::new(offsets, bases);
    let (mut at, mut segments) = (0, Vec::new());
    while at < pack.len() {
        let end = pack.len().min(at + (4 << 20));
        let follows = if end == pack.len() { Follows::Nothing } else { Follows::More };
        at += encoder.push(&pack[at..end], follows, &mut |segment| segments.push(segment));
    }
    (encoder.finish(), segments)
}

/// Describes the packs of `repository` that are not among `old`, and rebuilds them from the description.
fn cost_of_new(repository: &Path, old: &[(String, Vec<u8>, PackTable)], hash: PackHash) -> Cost {
    let bases = PackBases::new(old.iter().map(|(.., table)| PackTable::decode(&table.encode()).unwrap()), usize::MAX);
    let sizes: Vec<u64> = old.iter().map(|(_, pack, _)| pack.len() as u64).collect();
    let mut cost = Cost { base_entries: bases.entries(), memory_bytes: bases.memory_bytes(), ..Cost::default() };
    for name in pack_names(repository) {
        if old.iter().any(|(known, ..)| *known == name) {
            continue;
        }
        let (pack, offsets) = read_pack(&repository.join("objects/pack").join(name), hash);
        let (encoded, segments) = encode(&pack, offsets, &bases);
        let mut out = Vec::new();
        for Segment { offset, pieces, literal } in &segments {
            rebuild_pack::<()>(*offset, pieces, literal, encoded.size, &sizes, &mut |write| {
                match write {
                    PackWrite::Bytes { bytes, .. } => out.extend_from_slice(bytes),
                    PackWrite::Copy { source, from, len, .. } => {
                        out.extend_from_slice(&old[usize::from(source)].1[from as usize..][..len as usize]);
                    }
                }
                Ok(())
            })
            .unwrap();
            cost.literal_bytes += literal.len();
            cost.coded_bytes += encode_pack_pieces(pieces).len();
            cost.copies += pieces.iter().filter(|piece| matches!(piece, PackPiece::Copy { .. })).count();
        }
        assert!(out == pack && digest(&out) == encoded.digest, "the rebuilt pack differs");
        assert!(encoded.table.is_some());
        cost.pack_bytes += pack.len();
    }
    cost
}

fn read_all(repository: &Path, hash: PackHash) -> Vec<(String, Vec<u8>, PackTable)> {
    let read = |name: String| {
        let (pack, offsets) = read_pack(&repository.join("objects/pack").join(&name), hash);
        let table = encode(&pack, offsets, &PackBases::default()).0.table.unwrap();
        (name, pack, table)
    };
    pack_names(repository).into_iter().map(read).collect()
}

/// What `args` write into a bare repository that holds a pack for each of many pushes.
fn cost_of(name: &str, format: &str, args: &[&str]) -> Cost {
    let folder = tempfile::tempdir().unwrap();
    let bare = folder.path().join("bare");
    grow(&bare, format);
    let hash = if format == "sha256" { PackHash::Sha256 } else { PackHash::Sha1 };
    let old = read_all(&bare, hash);
    assert_eq!(old.len(), PUSHES, "a pack a push");
    let cost = cost_of_command(name, &bare, &old, hash, args);
    git(&bare, &["fsck", "--full"]);
    cost
}

fn cost_of_command(name: &str, bare: &Path, old: &[(String, Vec<u8>, PackTable)], hash: PackHash, args: &[&str]) -> Cost {
    git(bare, args);
    let cost = cost_of_new(bare, old, hash);
    println!(
        "{name}: {:.2} % of {:.1} MB travel: {} literal, {} coded; {} copies, {} entries of {} packs in {:.1} bytes of memory each",
        cost.share(),
        cost.pack_bytes as f64 / 1e6,
        cost.literal_bytes,
        cost.coded_bytes,
        cost.copies,
        cost.base_entries,
        old.len(),
        cost.memory_bytes as f64 / cost.base_entries as f64,
    );
    cost
}

#[test]
fn a_full_repack_travels_as_headers() {
    let cost = cost_of("repack -ad", "sha1", &["repack", "-q", "-a", "-d"]);
    assert!(cost.share() <= 10.0, "{cost:?}");
}

#[test]
fn a_geometric_repack_travels_as_headers() {
    let cost = cost_of("repack --geometric", "sha1", &["repack", "-q", "-d", "--geometric=2"]);
    assert!(cost.pack_bytes > 0 && cost.share() <= 10.0, "{cost:?}");
}

#[test]
fn a_repack_of_long_hashes_travels_as_headers() {
    let cost = cost_of("repack -ad of SHA-256", "sha256", &["repack", "-q", "-a", "-d"]);
    assert!(cost.share() <= 10.0, "{cost:?}");
}

#[test]
fn a_repack_that_names_bases_by_id_travels_as_headers() {
    let args = ["-c", "repack.useDeltaBaseOffset=false", "repack", "-q", "-a", "-d"];
    let cost = cost_of("repack -ad, bases by id", "sha1", &args);
    assert!(cost.share() <= 10.0, "{cost:?}");
}

/// `COLDSPARE_REPOSITORY=/some.git cargo test --release -p coldspare-delta -- --ignored --nocapture a_real_repository`
#[test]
#[ignore = "prints figures of a repository that is at hand"]
#[expect(clippy::disallowed_methods, reason = "which repository, and a stopwatch around pure work")]
fn a_real_repository() {
    let Ok(repository) = std::env::var("COLDSPARE_REPOSITORY") else { return };
    let folder = tempfile::tempdir().unwrap();
    let (bare, other) = (folder.path().join("bare"), folder.path().join("other"));
    init(&bare, "--bare", "sha1");
    let commits = git(Path::new(&repository), &["rev-list", "--reverse", "--first-parent", "HEAD"]);
    let commits: Vec<&str> = commits.lines().collect();
    for push in 1..=PUSHES {
        let commit = commits[commits.len() * push / PUSHES - 1];
        git(Path::new(&repository), &["push", "-q", bare.to_str().unwrap(), &format!("{commit}:refs/heads/main")]);
    }
    let old = read_all(&bare, PackHash::Sha1);
    let copy = |to: &Path| assert!(Command::new("cp").arg("-a").arg(&bare).arg(to).status().unwrap().success());
    copy(&other);
    let command = |name: &str, bare: &Path, args: &[&str]| cost_of_command(name, bare, &old, PackHash::Sha1, args);
    command("repack -d --geometric=2", &other, &["repack", "-q", "-d", "--geometric=2"]);
    command("repack -ad, bases by id", &other, &["-c", "repack.useDeltaBaseOffset=false", "repack", "-q", "-a", "-d"]);
    command("repack -ad", &bare, &["repack", "-q", "-a", "-d"]);
    for (name, bases) in [("all new", vec![]), ("known", old.into_iter().map(|(.., table)| table).collect())] {
        let bases = PackBases::new(bases, usize::MAX);
        let name_of = pack_names(&bare).remove(0);
        let (pack, offsets) = read_pack(&bare.join("objects/pack").join(name_of), PackHash::Sha1);
        let start = std::time::Instant::now();
        let (encoded, _) = encode(&pack, offsets, &bases);
        let rate = pack.len() as f64 / 1e6 / start.elapsed().as_secs_f64();
        let table = encoded.table.unwrap();
        println!(
            "{name}: {rate:.0} MB/s; {} entries of {:.1} bytes each",
            table.entries(),
            table.encode().len() as f64 / table.entries() as f64
        );
    }
}
