//! What repacks of real repositories cost: packs written by git, described by the packs that git had before.

#![allow(clippy::unwrap_used)] // also in what several tests share

use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use coldspare_delta::{
    Follows, PackBases, PackEncoded, PackEncoder, PackHash, PackIndexReader, PackOffsets, PackPiece, PackTable, PackWrite, Segment, digest,
    encode_pack_pieces, rebuild_pack,
};

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

fn git(dir: &Path, args: &[&str]) -> String {
    git_with_input(dir, args, "")
}

fn git_with_input(dir: &Path, args: &[&str], input: &str) -> String {
    let mut command = Command::new("git");
    command.arg("-C").arg(dir).args(["-c", "gc.auto=0", "-c", "pack.threads=1"]).args(args);
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").env("LC_ALL", "C");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
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

fn pack_names(repository: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(repository.join("objects/pack")).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.ends_with(".pack"));
    names.sort();
    names
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
    let (work, bare) = (folder.path().join("work"), folder.path().join("bare"));
    init(&work, "--quiet", format);
    init(&bare, "--bare", format);
    let mut texts = Texts::new();
    for push in 0..PUSHES {
        git_with_input(&work, &["fast-import", "--quiet"], &texts.commit(push));
        git(&work, &["push", "-q", bare.to_str().unwrap(), "main"]);
    }
    let hash = if format == "sha256" { PackHash::Sha256 } else { PackHash::Sha1 };
    let old = read_all(&bare, hash);
    assert_eq!(old.len(), PUSHES, "a pack a push");
    let cost = cost_of_command(name, &bare, &old, hash, args);
    git(&bare, &["fsck", "--full"]);
    cost
}

fn init(repository: &Path, kind: &str, format: &str) {
    git(Path::new("/"), &["init", "-q", kind, "--object-format", format, "-b", "main", repository.to_str().unwrap()]);
    // A push of few objects would be unpacked.
    git(repository, &["config", "receive.unpackLimit", "1"]);
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

/// Files of words that change a little with each push.
struct Texts {
    state: u64,
    files: Vec<Vec<String>>,
}

impl Texts {
    fn new() -> Texts {
        Texts { state: 0x5eed, files: Vec::new() }
    }

    fn below(&mut self, end: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 16) as usize % end
    }

    fn line(&mut self) -> String {
        (0..8).fold(String::new(), |mut line, _| {
            write!(line, "{:x} ", self.below(30_000)).unwrap();
            line
        })
    }

    /// The next commit, for `git fast-import`.
    fn commit(&mut self, number: usize) -> String {
        let first = self.files.len();
        for _ in 0..if first == 0 { 60 } else { 4 } {
            let lines = 20 + self.below(300);
            let file = (0..lines).map(|_| self.line()).collect();
            self.files.push(file);
        }
        let mut changed: Vec<usize> = (first..self.files.len()).collect();
        for _ in 0..12 {
            let file = self.below(self.files.len());
            let (at, line) = (self.below(self.files[file].len()), self.line());
            self.files[file][at] = line;
            let line = self.line();
            self.files[file].push(line);
            changed.push(file);
        }
        let mut out = format!("commit refs/heads/main\ncommitter T <t@example.com> {} +0000\ndata 1\nx\n", 1_700_000_000 + number);
        if number > 0 {
            out.push_str("from refs/heads/main^0\n");
        }
        for file in changed {
            let text = self.files[file].join("\n");
            writeln!(out, "M 100644 inline folder{}/file{file}\ndata {}\n{text}", file % 7, text.len()).unwrap();
        }
        out
    }
}

const PUSHES: usize = 40;

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
