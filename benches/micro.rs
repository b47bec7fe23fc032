//! The parts, one by one: how long each takes, or how many instructions.
//!
//! `cargo bench --bench micro [NAME]` times them. `benches/instructions BASE` counts what two commits need, by callgrind:
//! it runs this program with `--instructions NAME`, and once more with `--setup NAME`, which does all but the part.

#![allow(clippy::unwrap_used)] // nothing is handled here

use std::fs;

use coldspare_core::{Body, ContentRef, Digest, Entry, Meta, Op, RelPath, RootId, Time, codec, key};
use coldspare_delta::{Base, ChunkList, Chunking, FileEncoder, Follows, PackBases, PackEncoder, PackHash, PackOffsets};
use coldspare_scan::capture::Work;
use coldspare_sim::world::{Options, run};
use coldspare_sim::{Chance, Pair, Setup};
use coldspare_standby::Depth;

/// What is measured, once everything that it needs is there.
type Part = Box<dyn FnMut()>;

/// Makes a part.
type Make = fn() -> Part;

/// The parts, and what makes each.
const PARTS: [(&str, Make); 12] = [
    ("hash-4-MiB", hash),
    ("chunk-8-MiB-new", chunk_new),
    ("chunk-8-MiB-changed", chunk_changed),
    ("pack-20k-entries-new", pack_new),
    ("pack-20k-entries-known", pack_known),
    ("codec-10k-operations", codec),
    ("keys-10k-paths", keys),
    ("both-ends-in-memory", both_ends),
    ("seed-1k-files", seed),
    ("look-at-everything-1k-files", rescan),
    ("change-one-file-and-follow", follow),
    ("verify-quick-1k-files", verify),
];

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let part = |name: &String| PARTS.iter().find(|(known, _)| known == name).expect("a part of that name").1();
    match &args[1..] {
        [what] if what == "--names" => PARTS.iter().for_each(|(name, _)| println!("{name}")),
        [what, name] if what == "--setup" => drop(part(name)),
        [what, name] if what == "--instructions" => part(name)(),
        _ => divan::main(),
    }
}

#[divan::bench(args = PARTS.map(|(name, _)| name))]
fn micro(bencher: divan::Bencher<'_, '_>, name: &str) {
    bencher.bench_local(PARTS.iter().find(|(known, _)| *known == name).unwrap().1());
}

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut chance = Chance::new(seed);
    (0..bytes.div_ceil(8)).flat_map(|_| chance.below(u64::MAX).to_le_bytes()).collect()
}

fn hash() -> Part {
    let content = noise(1, 4 << 20);
    Box::new(move || _ = std::hint::black_box(coldspare_delta::digest(&content)))
}

/// Encodes a file in windows of 4 MiB; its chunks.
fn encode(content: &[u8], base: Option<&ChunkList>) -> ChunkList {
    let mut encoder = FileEncoder::new(content.len() as u64, base.cloned().map(Base::new), Chunking::Chunks);
    let mut done = 0;
    while done < content.len() {
        let end = content.len().min(done + (4 << 20));
        let follows = if end == content.len() { Follows::Nothing } else { Follows::More };
        done += encoder.push(&content[done..end], follows, &mut |segment| drop(std::hint::black_box(segment)));
    }
    encoder.finish().chunks.unwrap()
}

fn chunk_new() -> Part {
    let content = noise(2, 8 << 20);
    Box::new(move || drop(encode(&content, None)))
}

fn chunk_changed() -> Part {
    let mut content = noise(3, 8 << 20);
    let base = encode(&content, None);
    content.splice(3_000_000..3_000_000, *b"inserted");
    Box::new(move || drop(encode(&content, Some(&base))))
}

/// What an encoder takes for a pack: entries of a byte for the header and some for the body.
fn pack(seed: u64) -> (Vec<u8>, Vec<u64>) {
    let (mut content, mut offsets) = (b"PACK\0\0\0\x02\0\0\x4e\x20".to_vec(), Vec::new());
    let (mut chance, bodies) = (Chance::new(seed), noise(7, 1 << 20));
    for _ in 0..20_000 {
        offsets.push(content.len() as u64);
        let (len, at) = (40 + chance.below(400) as usize, chance.below(1 << 19) as usize);
        content.push(0x35);
        content.extend_from_slice(&bodies[at..at + len]);
    }
    content.extend_from_slice(&[0; 20]);
    (content, offsets)
}

fn encode_pack((content, offsets): &(Vec<u8>, Vec<u64>), bases: &PackBases) -> Option<coldspare_delta::PackTable> {
    let offsets = PackOffsets::new(offsets.clone(), content.len() as u64, PackHash::Sha1).unwrap();
    let mut encoder = PackEncoder::new(offsets, bases);
    encoder.push(content, Follows::Nothing, &mut |segment| drop(std::hint::black_box(segment)));
    encoder.finish().table
}

fn pack_new() -> Part {
    let pack = pack(4);
    Box::new(move || drop(encode_pack(&pack, &PackBases::new([], 0))))
}

fn pack_known() -> Part {
    let pack = pack(4);
    let table = encode_pack(&pack, &PackBases::new([], 0)).unwrap();
    let bases = PackBases::new([table], 1 << 20);
    Box::new(move || drop(encode_pack(&pack, &bases)))
}

fn path(no: u64) -> RelPath {
    RelPath::new(format!("shared/data/repositories/{}/objects/{:02x}/{no:038x}", no % 100, no % 256).into_bytes()).unwrap()
}

fn codec() -> Part {
    let meta = Meta { mode: 0o444, uid: 2003, gid: 2003, mtime: Time { secs: 1_700_000_000, nanos: 5 }, xattrs: Vec::new() };
    let entry = |no: u64| Entry { meta: meta.clone(), body: Body::File { size: no, digest: Digest([no as u8; 32]), sparse: false } };
    let put = |no: u64| Op::Put { root: RootId(0), path: path(no), entry: entry(no), content: ContentRef::Inline };
    let ops: Vec<Op> = (0..10_000).map(put).collect();
    Box::new(move || {
        for op in &ops {
            std::hint::black_box(codec::decode::<Op>(&codec::encode(op)).unwrap());
        }
    })
}

fn keys() -> Part {
    let paths: Vec<RelPath> = (0..10_000).map(path).collect();
    Box::new(move || {
        for path in &paths {
            std::hint::black_box(key::decode(&key::encode(RootId(0), path)).unwrap());
        }
    })
}

/// Some seeds of the world that the tests run: capture, index, staging and apply, without a system call.
fn both_ends() -> Part {
    Box::new(|| {
        for seed in 0..10 {
            run(seed, Options::default()).unwrap();
        }
    })
}

/// Both ends, with a home of 1,000 small files that the standby doesn't have yet.
fn unseeded() -> Pair {
    let pair = Pair::new(Setup::Watched, &coldspare_sim::pair::place(1));
    let mut chance = Chance::new(5);
    for no in 0..1_000u64 {
        let at = pair.active_root().join(std::ffi::OsStr::new(std::str::from_utf8(path(no).as_bytes()).unwrap()));
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::write(at, noise(no, 50 + chance.below(4_000) as usize)).unwrap();
    }
    pair
}

fn seeded() -> Pair {
    let mut pair = unseeded();
    pair.follow(Work::Everything).unwrap();
    pair
}

fn seed() -> Part {
    let mut pair = Some(unseeded());
    Box::new(move || _ = pair.take().unwrap_or_else(unseeded).follow(Work::Everything).unwrap())
}

fn rescan() -> Part {
    let mut pair = seeded();
    Box::new(move || _ = pair.follow(Work::Everything).unwrap())
}

fn follow() -> Part {
    let (mut pair, mut no) = (seeded(), 0);
    Box::new(move || {
        no += 1;
        fs::write(pair.active_root().join("shared/file"), format!("{no}")).unwrap();
        pair.follow(Work::Hinted).unwrap();
    })
}

fn verify() -> Part {
    let pair = seeded();
    Box::new(move || assert!(pair.verify(Depth::Quick).problems.is_empty()))
}
