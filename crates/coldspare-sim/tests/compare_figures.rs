//! How long it takes to compare both hosts' trees when nothing differs; no claim.
//!
//! `cargo test --release --workspace --test compare_figures -- --ignored --nocapture`; `COLDSPARE_ENTRIES=n`: of so many
//! entries (1,000,000).

#![allow(clippy::unwrap_used)]

use std::time::Instant;

use coldspare_core::compare::{Comparison, answer};
use coldspare_core::control::Applied;
use coldspare_core::exclude::Exclude;
use coldspare_core::{Body, Digest, Entry, Meta, RelPath, RootId, Seq, SessionId, Time};
use coldspare_os::{FileKind, RealDisk, Stat};
use coldspare_scan::index::Index;
use coldspare_scan::inherit::Heir;
use coldspare_standby::{ManifestRow, OpenError, RootSetup, Standby, Store};

fn entry(n: u64) -> (RelPath, Entry) {
    let meta = Meta { mode: 0o640, uid: 2003, gid: 2003, mtime: Time { secs: 1_700_000_000, nanos: n as u32 }, xattrs: Vec::new() };
    let folder = format!("shared/data/repositories/{}/objects/{:02x}", n / 4096, n / 16 % 256);
    let (name, body) = match n % 16 {
        0 => (folder, Body::Dir),
        _ => (format!("{folder}/{n:038x}"), Body::File { size: n, digest: Digest([n as u8; 32]), sparse: false }),
    };
    (RelPath::new(name.as_bytes()).unwrap(), Entry { meta, body })
}

#[test]
#[ignore = "figures"]
fn how_long_a_comparison_takes() {
    let count: u64 = std::env::var("COLDSPARE_ENTRIES").map_or(1_000_000, |v| v.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let (manifest, root) = (dir.path().join("manifest.redb"), dir.path().join("root"));
    std::fs::create_dir_all(root.join(".coldspare")).unwrap();
    let applied = Applied { session: SessionId([1; 16]), seq: Seq(1), as_of_ms: 0 };
    let rows = (0..count).map(|n| {
        let (path, entry) = entry(n);
        Ok::<_, OpenError>((RootId(0), path, ManifestRow { entry, ino: n }))
    });
    Store::make_of(&manifest, Some(applied), rows).unwrap();
    let index = Index::open(&dir.path().join("index.redb")).unwrap();
    let mut heir = Heir::new(&index, Seq(1), u64::MAX / 2);
    let stat = Stat {
        kind: FileKind::File,
        mode: 0o640,
        uid: 2003,
        gid: 2003,
        size: 0,
        blocks: 0,
        nlink: 1,
        dev: 1,
        ino: 1,
        mtime: (1, 0),
        ctime: (1, 0),
    };
    (0..count).for_each(|n| {
        let (path, entry) = entry(n);
        heir.add(RootId(0), &path, entry, &stat).unwrap();
    });
    heir.finish().unwrap();
    let setup = RootSetup { path: root, way: None, exclude: Exclude::new::<&str>([]).unwrap() };
    let standby = Standby::open(RealDisk::staying(), Store::open(&manifest).unwrap(), vec![setup]).unwrap();
    for _ in 0..3 {
        let begin = Instant::now();
        let mut there = index.sent(Seq(1)).unwrap();
        let mut here = standby.held_at(applied.session, Seq(1)).unwrap().unwrap();
        let (cut, left_out) = std::thread::scope(|scope| {
            let cut = scope.spawn(|| here.cut_ahead(|| true));
            let left_out = there.leave_out();
            (cut.join().unwrap(), left_out)
        });
        cut.unwrap();
        here.leave_out(&left_out.unwrap());
        let left_out = begin.elapsed();
        let mut comparison = Comparison::default();
        let spans = comparison.ask().unwrap().to_vec();
        let cuts = answer(&there, &spans).unwrap();
        let answered = begin.elapsed();
        comparison.answered(&here, &cuts).unwrap();
        assert!(comparison.ask().is_none());
        let found = comparison.finish();
        assert_eq!((found.entries, found.differences.len()), (count, 0));
        println!("{count} entries: {:?}; {left_out:?} until it was known what is left out, {answered:?} until the answer", begin.elapsed());
    }
}
