//! What a standby is driven through while every instant is kept at which it could crash.

#![allow(clippy::unwrap_used)] // also in what several tests share

use coldspare_core::changeset::Recipe;
use coldspare_core::{RelPath, RootId};
use coldspare_delta::{IndexFile, IndexRecipe, NameBases, NameTable};
use coldspare_sim::model::{Draft, Kind, Part, Rehearsal};
use sha1::{Digest, Sha1};

/// A name and what drives the standby.
pub(crate) type Workload = (&'static str, fn(&mut Rehearsal));

pub(crate) const WORKLOADS: [Workload; 15] = [
    ("seed", seed),
    ("push", push),
    ("new folders", new_folders),
    ("replace and delete", replace_and_delete),
    ("file and folder change places", file_and_folder),
    ("renamed folders", renamed_folders),
    ("hard links", hard_links),
    ("attributes", attributes),
    ("many", many),
    ("segments", segments),
    ("rebuilt", rebuilt),
    ("resume", resume),
    ("unnamed", unnamed),
    ("recovery", recovery),
    ("one after another", one_after_another),
];

/// A small home with a repository.
pub(crate) fn seed(r: &mut Rehearsal) {
    r.changeset(Kind::Full, |c| {
        c.dir("repo");
        c.file("repo/HEAD", b"ref: refs/heads/main\n");
        c.dir("repo/objects");
        c.dir("repo/objects/ab");
        c.file("repo/objects/ab/cdef", b"an object");
        c.dir("repo/refs");
        c.dir("repo/refs/heads");
        c.file("repo/refs/heads/main", b"0123\n");
        c.file("config", b"a = 1\n");
        c.symlink("current", "repo");
    });
}

pub(crate) fn push(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    for n in 0..2 {
        r.changeset(Kind::Delta, |c| {
            c.file(&format!("repo/objects/ab/new{n}"), format!("object {n}").as_bytes());
            c.file("repo/refs/heads/main", format!("{n}\n").as_bytes());
        });
    }
}

/// Once with each folder and file synced by itself, once with a symlink, for which the filesystem is.
pub(crate) fn new_folders(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.dir("other");
        c.dir("other/objects");
        c.file("other/objects/x", b"x");
        c.dir("other/empty");
        c.dir("repo/objects/cd");
        c.file("repo/refs/heads/main", b"4567\n");
    });
    r.changeset(Kind::Delta, |c| {
        c.dir("third");
        c.symlink("third/link", "objects/x");
        c.file("third/f", b"in a new folder");
    });
}

pub(crate) fn replace_and_delete(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.file("config", b"a = 2\n");
        c.delete("repo/objects");
        c.delete("current");
        c.file("HEAD", b"new\n");
    });
    r.changeset(Kind::Delta, |c| {
        c.delete("repo");
        c.file("config", b"a = 3\n");
    });
}

pub(crate) fn file_and_folder(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.file("repo", b"a file now");
        c.dir("config");
        c.file("config/inner", b"1");
    });
    r.changeset(Kind::Delta, |c| {
        c.dir("repo");
        c.file("repo/HEAD", b"again\n");
        c.symlink("config", "repo/HEAD");
    });
}

/// To another name, into a folder that is as new, and what stood in the renamed ones is changed.
pub(crate) fn renamed_folders(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.dir("plain");
        c.dir("plain/in");
        c.file("plain/in/a", b"a");
        c.file("plain/b", b"b");
        c.dir("other");
        c.file("other/c", b"c");
    });
    r.changeset(Kind::Delta, |c| {
        c.rename("plain", "moved");
        c.dir("new");
        c.dir("new/deep");
        c.rename("other", "new/deep/other");
    });
    r.changeset(Kind::Delta, |c| {
        c.file("moved/in/a", b"changed");
        c.delete("new/deep/other/c");
        c.dir("plain");
        c.file("plain/b", b"another");
    });
    r.changeset(Kind::Delta, |c| c.rename("moved/in", "in"));
}

pub(crate) fn hard_links(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.hardlink("linked", "config");
        c.file("one", b"one");
        c.hardlink("two", "one");
        c.dir("folder");
        c.hardlink("folder/three", "one");
    });
    r.changeset(Kind::Delta, |c| {
        c.file("one", b"other");
        c.hardlink("two", "one");
        c.hardlink("folder/three", "one");
        c.delete("linked");
    });
    r.changeset(Kind::Delta, |c| c.hardlink("only", "config"));
}

pub(crate) fn attributes(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.attributes("config", 0o600);
        c.attributes("repo/refs/heads", 0o700);
        c.attributes("repo/HEAD", 0o444);
    });
}

/// More than is synced one by one, staged and applied.
pub(crate) fn many(r: &mut Rehearsal) {
    r.changeset(Kind::Full, |c| {
        for n in 0..70 {
            c.dir(&format!("d{n}"));
        }
        c.file("first", b"1");
    });
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        for n in 0..69 {
            c.file(&format!("d{n}/f"), format!("{n}").as_bytes());
        }
        c.file("first", b"2");
        c.delete("d69");
    });
}

pub(crate) fn segments(r: &mut Rehearsal) {
    let old: Vec<u8> = (0..20_000u32).map(|n| (n % 251) as u8).collect();
    r.changeset(Kind::Full, |c| {
        c.file("pack", &old);
        c.sparse("holes", &[&[1; 10][..], &[0; 9000], &[2; 10]].concat());
    });
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.segments("pack", &[Part::Copy { from: 4096, len: 8000 }, Part::Bytes(b"new bytes"), Part::Zeros { len: 5000 }]);
        c.segments("fresh", &[Part::Bytes(&[7; 5000]), Part::Bytes(&[8; 100])]);
    });
}

/// A repack: the standby makes the index of the new pack, and its reverse index, from the index of the old one. At first the
/// changeset is cut off before the new pack has come.
pub(crate) fn rebuilt(r: &mut Rehearsal) {
    let objects: Vec<(u8, usize)> = (0..30).map(|no| (no, 20 + usize::from(no))).collect();
    let (old, new) = (pack_and_index(&objects[3..]), pack_and_index(&objects[5..]));
    let at = |name: &str| format!("repo/objects/pack/pack-{name}");
    seed(r);
    r.changeset(Kind::Delta, |c| {
        c.dir("repo/objects/pack");
        c.file(&at("1.pack"), &old.0);
        c.file(&at("1.idx"), &old.1);
    });
    r.disk().settle();
    let known = IndexFile::parse(&old.1).unwrap();
    let bases = NameBases::new(NameTable::of(&known), known.hash(), usize::MAX);
    let made = IndexFile::parse(&new.1).unwrap();
    let entries = IndexRecipe::of(&made, &bases).unwrap().0.encode();
    let sources = vec![(RootId(0), RelPath::new(at("1.idx").into_bytes()).unwrap())];
    let mut reverse = Vec::new();
    made.write_reverse(&mut |part| -> Result<(), ()> {
        reverse.extend_from_slice(part);
        Ok(())
    })
    .unwrap();
    let make = |c: &mut Draft| {
        c.rebuilt(&at("2.rev"), &Recipe::ReverseIndex, &reverse);
        c.rebuilt(&at("2.idx"), &Recipe::PackIndex { sources: sources.clone(), entries: entries.clone() }, &new.1);
        c.asked(&at("2.pack"), &new.0);
        ["1.pack", "1.idx"].iter().for_each(|name| c.delete(&at(name)));
    };
    r.cut_off(Kind::Delta, 3, make);
    r.cut_off(Kind::Delta, 4, make);
    r.changeset(Kind::Delta, make);
}

/// A pack of these objects, each a number and how long its entry is, and its index. What is in an entry nobody looks at.
pub(crate) fn pack_and_index(objects: &[(u8, usize)]) -> (Vec<u8>, Vec<u8>) {
    let mut pack = b"PACK\0\0\0\x02".to_vec();
    pack.extend((objects.len() as u32).to_be_bytes());
    let mut rows = Vec::new();
    for &(no, len) in objects {
        let at = pack.len() as u32;
        pack.push(0x30);
        pack.extend(Sha1::digest([no; 3]).iter().cycle().take(len));
        let mut crc = flate2::Crc::new();
        crc.update(&pack[at as usize..]);
        rows.push((<[u8; 20]>::from(Sha1::digest([no])), crc.sum(), at));
    }
    let checksum = Sha1::digest(&pack);
    pack.extend(checksum);
    rows.sort_unstable();
    let mut index = b"\xfftOc\0\0\0\x02".to_vec();
    for first in 0..=255u8 {
        index.extend((rows.iter().filter(|(id, ..)| id[0] <= first).count() as u32).to_be_bytes());
    }
    rows.iter().for_each(|(id, ..)| index.extend(id));
    rows.iter().for_each(|(_, crc, _)| index.extend(crc.to_be_bytes()));
    rows.iter().for_each(|(.., at)| index.extend(at.to_be_bytes()));
    index.extend(checksum);
    let own = Sha1::digest(&index);
    index.extend(own);
    (pack, index)
}

/// An interrupted changeset leaves content; the next one takes it.
pub(crate) fn resume(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    let make = |c: &mut Draft| {
        c.asked("a", b"content of a");
        c.asked("b", b"content of b");
        c.asked("again", b"content of a");
        c.dir("deep");
        c.asked("deep/c", b"content of c");
        c.asked("config", b"a = 1\n");
        c.file("last", b"last");
    };
    r.cut_off(Kind::Delta, 6, make);
    r.restart();
    r.cut_off(Kind::Delta, 3, make);
    r.changeset(Kind::Delta, make);
}

pub(crate) fn unnamed(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Full, |c| {
        c.keep("repo/refs");
        c.dir("repo");
        c.asked("repo/HEAD", b"ref: refs/heads/main\n");
        c.file("config", b"a = 9\n");
    });
    r.changeset(Kind::Full, |c| c.asked("config", b"a = 9\n"));
}

/// The power goes a second time while a changeset that was committed before is applied.
pub(crate) fn recovery(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    let make = |c: &mut Draft| {
        c.file("config", b"a = 2\n");
        c.delete("repo/objects");
        c.dir("new");
        c.file("new/f", b"f");
        c.hardlink("new/g", "new/f");
        c.attributes("repo/HEAD", 0o400);
    };
    for back in [1, 4, 8, 12] {
        r.changeset(Kind::Delta, make);
        r.recover_from(back);
        r.changeset(Kind::Full, |c| {
            c.dir("repo");
            c.asked("repo/HEAD", b"ref: refs/heads/main\n");
            c.dir("repo/objects");
            c.file("repo/objects/x", b"x");
            c.asked("config", b"a = 1\n");
        });
        r.disk().settle();
    }
}

/// Without anybody else who syncs in between.
pub(crate) fn one_after_another(r: &mut Rehearsal) {
    seed(r);
    for n in 0..3 {
        r.changeset(Kind::Delta, |c| {
            c.file("repo/refs/heads/main", format!("{n}\n").as_bytes());
            c.dir(&format!("repo/objects/{n}"));
            c.file(&format!("repo/objects/{n}/o"), b"object");
            c.symlink("current", &format!("repo{n}"));
            if n > 0 {
                c.delete(&format!("repo/objects/{}", n - 1));
            }
        });
    }
}
