//! A repack writes what old packs have into a new one: little of it travels, and what arrives is whole.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::git::{self, git_ok};
use crate::pair::{Host, Pair};
use crate::seed::{Seed, number_from_env};

const REPOSITORY: &str = "shared/data/repositories/1";
const FORK: &str = "shared/data/repositories/2";
/// Pushes, each a pack, unless `COLDSPARE_REPACK_PUSHES` says more.
const PUSHES: u64 = 12;

#[test]
fn a_repack_costs_a_fraction_of_the_new_pack() {
    for (format, kind) in [("sha1", "-a"), ("sha256", "-a"), ("sha1", "--geometric=2")] {
        let pair = Pair::following();
        let mut seed = Seed::from_env();
        let here = repository(&pair, format, &mut seed);
        let (sent, packs) = sent_by(&pair, || drop(git_ok(&here, &["repack", "-q", "-d", kind, "--no-write-bitmap-index"])), 4);
        println!("{format}, {kind}: a repack sent {sent} bytes for packs of {packs}");
        // With deltas computed anew little is left to find, and nothing is worse than sending it.
        sent_by(&pair, || drop(git_ok(&here, &["repack", "-q", "-a", "-d", "-f", "--no-write-bitmap-index"])), 1);
        git::assert_clean(&pair.standby.home.join(REPOSITORY));
        pair.standby.run(&["verify", "--deep"]).expect_code(0);
    }
}

#[test]
fn a_fork_that_takes_its_objects_to_itself_costs_little() {
    let pair = Pair::following();
    let mut seed = Seed::from_env();
    let here = repository(&pair, "sha1", &mut seed);
    let fork = pair.active.home.join(FORK);
    git_ok(Path::new("/"), &["clone", "-q", "--bare", "--shared", &here.to_string_lossy(), &fork.to_string_lossy()]);
    fs::write(fork.join("objects/info/alternates"), "../../1/objects\n").unwrap();
    pair.checkpoint();
    git::assert_clean(&pair.standby.home.join(FORK));
    // What it borrows is in packs of its parent; now it has a pack of its own with the same.
    let bytes = |host: &Host| git::packs(&host.home.join(FORK)).iter().map(|p| fs::metadata(p).unwrap().len()).sum::<u64>();
    let sent = pair.sent_by(|| {
        let _frozen = pair.active.freeze();
        git_ok(&fork, &["repack", "-q", "-a", "-d", "--no-write-bitmap-index"]);
    });
    assert!(bytes(&pair.active) > 4 * sent, "{sent} bytes were sent for {}", bytes(&pair.active));
    assert_eq!(bytes(&pair.active), bytes(&pair.standby));
    fs::remove_file(fork.join("objects/info/alternates")).unwrap();
    pair.checkpoint();
    git::assert_clean(&pair.standby.home.join(FORK));
    pair.assert_equal();
}

/// git puts the index beside a pack a moment after the pack; here the moment is longer.
#[test]
fn a_pack_is_known_by_an_index_that_comes_a_moment_later() {
    let is_known = || {
        let pair = Pair::following();
        let here = repository(&pair, "sha1", &mut Seed::from_env());
        let aside = pair.dir.path().join("aside.git");
        git_ok(Path::new("/"), &["clone", "-q", "--bare", "--no-local", &here.to_string_lossy(), &aside.to_string_lossy()]);
        let [pack] = &git::packs(&aside)[..] else { panic!("one pack") };
        let to = here.join("objects/pack").join(pack.file_name().unwrap());
        let bytes = fs::metadata(pack).unwrap().len();
        let sent = pair.sent_by(|| {
            fs::copy(pack, to.with_file_name("tmp_pack_1")).unwrap();
            fs::rename(to.with_file_name("tmp_pack_1"), &to).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            fs::copy(pack.with_extension("idx"), to.with_file_name("tmp_idx_1")).unwrap();
            fs::rename(to.with_file_name("tmp_idx_1"), to.with_extension("idx")).unwrap();
        });
        println!("{sent} bytes were sent for a pack of {bytes}");
        pair.assert_equal();
        git::assert_clean(&pair.standby.home.join(REPOSITORY));
        4 * sent < bytes
    };
    // On a host that stands still for long the index comes too late.
    assert!((0..3).any(|_| is_known()), "it travelled whole each time");
}

#[test]
fn a_pack_that_somebody_damaged_on_the_standby_makes_no_wrong_one() {
    let pair = Pair::following();
    let mut seed = Seed::from_env();
    let here = repository(&pair, "sha1", &mut seed);
    let there = pair.standby.home.join(REPOSITORY);
    // The standby's own watch is not to put the first right while the others are being damaged.
    let frozen = pair.standby.freeze();
    for (n, pack) in git::packs(&there).into_iter().enumerate() {
        fs::set_permissions(&pack, fs::Permissions::from_mode(0o644)).unwrap();
        if n == 0 {
            fs::remove_file(&pack).unwrap();
            continue;
        }
        let mut bytes = fs::read(&pack).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&pack, bytes).unwrap();
    }
    drop(frozen);
    git_ok(&here, &["repack", "-q", "-a", "-d", "--no-write-bitmap-index"]);
    pair.checkpoint();
    // By the changeset that was to copy from it, or by the standby's own watch before that.
    let log = pair.active.log();
    assert!(log.contains("is not on the standby what the changeset starts from") || log.contains("asked for again"), "{log}");
    git::assert_clean(&there);
    pair.assert_equal();
}

/// Many small objects: a new index is more than all else that a repack brings, and the standby makes it, and the reverse index.
#[test]
fn the_index_of_a_repack_is_not_sent() {
    for (format, kind) in [("sha1", "-a"), ("sha256", "-a"), ("sha1", "--geometric=2")] {
        let pair = Pair::following();
        let here = many_objects(&pair, format, &mut Seed::from_env());
        git_ok(&here, &["config", "pack.writeReverseIndex", "true"]);
        let before = git::packs(&here);
        let sent = pair.sent_by(|| {
            let _frozen = pair.active.freeze();
            git_ok(&here, &["repack", "-q", "-d", kind, "--no-write-bitmap-index"]);
        });
        let new: Vec<PathBuf> = git::packs(&here).into_iter().filter(|pack| !before.contains(pack)).collect();
        let bytes = |ending: &str| new.iter().map(|pack| fs::metadata(pack.with_extension(ending)).unwrap().len()).sum::<u64>();
        let (index, reverse) = (bytes("idx"), bytes("rev"));
        println!("{format}, {kind}: {sent} bytes were sent for {index} of indexes, {reverse} of reverse ones");
        assert!(index > 128 << 10 && sent < index, "{sent} bytes were sent, the indexes alone are {index}");
        pair.assert_equal();
        check_packs(&pair.standby.home.join(REPOSITORY));
        // What was made here serves the next one.
        let again = pair.sent_by(|| {
            let _frozen = pair.active.freeze();
            git_ok(&here, &["repack", "-q", "-a", "-d", "-F", "--depth=3", "--no-write-bitmap-index"]);
        });
        println!("{format}, -F: {again} bytes");
        pair.assert_equal();
        check_packs(&pair.standby.home.join(REPOSITORY));
        pair.standby.run(&["verify", "--deep"]).expect_code(0);
    }
}

#[test]
fn an_index_that_somebody_damaged_on_the_standby_makes_no_wrong_one() {
    let pair = Pair::following();
    let here = many_objects(&pair, "sha1", &mut Seed::from_env());
    let there = pair.standby.home.join(REPOSITORY);
    // The standby's own watch is not to put the first right while the others are being damaged.
    let frozen = pair.standby.freeze();
    for (n, pack) in git::packs(&there).into_iter().enumerate() {
        let index = pack.with_extension("idx");
        fs::set_permissions(&index, fs::Permissions::from_mode(0o644)).unwrap();
        match n {
            0 => fs::remove_file(&index).unwrap(),
            1 => fs::write(&index, b"").unwrap(),
            _ => {
                let mut bytes = fs::read(&index).unwrap();
                // A name, and where an entry is.
                let middle = bytes.len() / 2;
                bytes[8 + 4 * 256 + 15] ^= 1;
                bytes[middle] ^= 1;
                fs::write(&index, bytes).unwrap();
            }
        }
    }
    drop(frozen);
    git_ok(&here, &["repack", "-q", "-a", "-d", "--no-write-bitmap-index"]);
    pair.checkpoint();
    // By the changeset that was to be made from them, or by the standby's own watch before that.
    let log = pair.active.log();
    assert!(log.contains("is not on the standby what the changeset starts from") || log.contains("asked for again"), "{log}");
    check_packs(&there);
    pair.assert_equal();
}

/// git takes the packs, their indexes and their reverse indexes for whole.
fn check_packs(repository: &Path) {
    git::assert_clean(repository);
    for pack in git::packs(repository) {
        git_ok(repository, &["verify-pack", &pack.with_extension("idx").to_string_lossy()]);
    }
}

/// A repository of 5,000 small objects that grew by pushes, each of which is a pack on both hosts.
fn many_objects(pair: &Pair, format: &str, seed: &mut Seed) -> PathBuf {
    let here = pair.active.home.join(REPOSITORY);
    fs::create_dir_all(here.parent().unwrap()).unwrap();
    let source = pair.dir.path().join("source");
    for at in [&here, &source] {
        git_ok(Path::new("/"), &["init", "-q", "--bare", "-b", "main", "--object-format", format, &at.to_string_lossy()]);
    }
    git::set_up(&here);
    git_ok(&here, &["config", "transfer.unpackLimit", "1"]);
    for push in 0..PUSHES {
        let mut stream = format!("commit refs/heads/main\ncommitter T <t@example.com> {} +0000\ndata 1\nx\n", 1_700_000_000 + push);
        if push > 0 {
            stream += "from refs/heads/main^0\n";
        }
        for n in 0..450 {
            let text = format!("{n} of {push}: {:x}\n", seed.next());
            stream += &format!("M 100644 inline folder{}/{push}-{n}\ndata {}\n{text}\n", n % 9, text.len());
        }
        let import = pair.dir.path().join("import");
        fs::write(&import, stream).unwrap();
        let ran = git::command(&source, &["fast-import", "--quiet"]).stdin(fs::File::open(&import).unwrap()).status().unwrap();
        assert!(ran.success());
        // A pack that is seen before its index is not known by what is in it.
        let _frozen = pair.active.freeze();
        git_ok(&source, &["push", "-q", &here.to_string_lossy(), "refs/heads/main"]);
    }
    pair.checkpoint();
    here
}

/// A repository that grew by pushes, each of which is a pack on both hosts.
fn repository(pair: &Pair, format: &str, seed: &mut Seed) -> PathBuf {
    let here = pair.active.home.join(REPOSITORY);
    fs::create_dir_all(here.parent().unwrap()).unwrap();
    git_ok(Path::new("/"), &["init", "-q", "--bare", "-b", "main", "--object-format", format, &here.to_string_lossy()]);
    git::set_up(&here);
    git_ok(&here, &["config", "transfer.unpackLimit", "1"]);
    let work = pair.dir.path().join(format!("work-{format}"));
    git_ok(Path::new("/"), &["clone", "-q", &here.to_string_lossy(), &work.to_string_lossy()]);
    git_ok(&work, &["checkout", "-q", "-b", "main"]);
    for push in 0..number_from_env("COLDSPARE_REPACK_PUSHES").unwrap_or(PUSHES) {
        for n in 0..40 {
            // Text that changes in places, and bytes that don't shrink.
            let lines: String =
                (0..60).map(|line| format!("{} {line} {}\n", n, if line % 7 == push % 7 { seed.next() } else { line })).collect();
            fs::write(work.join(format!("text{n}")), lines).unwrap();
        }
        let noise: Vec<u8> = (0..20_000).flat_map(|_| seed.next().to_le_bytes()).collect();
        fs::write(work.join(format!("noise{push}")), noise).unwrap();
        git_ok(&work, &["add", "-A"]);
        git_ok(&work, &["commit", "-q", "-m", &format!("{push}")]);
        // A pack that is seen before its index is not known by what is in it.
        let _frozen = pair.active.freeze();
        git_ok(&work, &["push", "-q", "origin", "HEAD:refs/heads/main"]);
    }
    pair.checkpoint();
    here
}

/// Bytes that the link took for what `repack` did, and bytes of all packs; at most the `share`th part of them is sent.
fn sent_by(pair: &Pair, repack: impl FnOnce(), share: u64) -> (u64, u64) {
    // One look at all of it: a pack whose index comes late travels whole.
    let sent = pair.sent_by(|| {
        let _frozen = pair.active.freeze();
        repack();
    });
    let all: u64 = git::packs(&pair.active.home.join(REPOSITORY)).iter().map(|p| fs::metadata(p).unwrap().len()).sum();
    assert!(share * sent < all + all / 5, "{sent} bytes were sent for packs of {all}");
    pair.assert_equal();
    (sent, all)
}
