//! References that move from loose to packed, and names that are a branch now and a folder then.

use std::path::PathBuf;

use crate::git::{self, Stash, commit, git_ok, push, tip};
use crate::pair::Pair;

const REPOSITORY: &str = "shared/data/repositories/1";

/// A pair that follows, with a repository on both sides and a clone of it.
struct Setting {
    pair: Pair,
    here: PathBuf,
    there: PathBuf,
    clone: PathBuf,
}

impl Setting {
    fn new() -> Setting {
        let pair = Pair::following();
        let (here, there) = (pair.active.home.join(REPOSITORY), pair.standby.home.join(REPOSITORY));
        let clone = pair.dir.path().join("clone");
        git::init_bare(&here);
        git::clone(&here, &clone);
        Setting { pair, here, there, clone }
    }

    /// Confirmed: both sides equal, clean, and in the same state.
    #[track_caller]
    fn checkpoint(&self) {
        self.pair.checkpoint();
        assert_eq!(git::references(&self.there), git::references(&self.here));
        git::assert_clean(&self.there);
        self.pair.assert_equal();
        assert_eq!(git::leftovers(&self.pair.standby.home), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_loose_reference_that_was_packed_does_not_shadow_the_newer_tip() {
    let s = Setting::new();
    commit(&s.clone, "file", "first");
    push(&s.clone, &["HEAD:main"]);
    s.checkpoint();
    assert!(s.there.join("refs/heads/main").exists());

    let second = commit(&s.clone, "file", "second");
    push(&s.clone, &["HEAD:main"]);
    git_ok(&s.here, &["pack-refs", "--all"]);
    s.checkpoint();
    assert!(!s.there.join("refs/heads/main").exists(), "the loose file shadows packed-refs");
    assert_eq!(tip(&s.there, "main"), second);
}

#[test]
fn a_pull_requests_reference_that_was_packed_does_not_shadow_the_newer_one() {
    const FROM: &str = "stash-refs/pull-requests/1/from";
    let s = Setting::new();
    let (here, there) = (Stash::of(&s.here), Stash::of(&s.there));
    let first = commit(&s.clone, "file", "first");
    push(&s.clone, &["HEAD:main"]);
    here.write(FROM, &first);
    s.checkpoint();
    assert!(there.loose(FROM).exists());

    let second = commit(&s.clone, "file", "second");
    push(&s.clone, &["HEAD:main"]);
    here.write(FROM, &second);
    here.pack();
    s.checkpoint();
    assert!(!there.loose(FROM).exists(), "the loose file shadows stash-packed-refs");
    assert_eq!(there.references().get(FROM), Some(&second));

    let third = commit(&s.clone, "file", "third");
    push(&s.clone, &["HEAD:main"]);
    here.write(FROM, &third);
    s.checkpoint();
    assert_eq!(there.references().get(FROM), Some(&third));
    here.remove(FROM);
    s.checkpoint();
    assert_eq!(there.references().get(FROM), None);
}

#[test]
fn a_packed_value_that_a_loose_reference_shadows_needs_no_object() {
    let mut s = Setting::new();
    commit(&s.clone, "file", "kept");
    push(&s.clone, &["HEAD:main"]);
    s.checkpoint();
    s.pair.active.kill();
    let packed = commit(&s.clone, "file", "packed, and overwritten");
    push(&s.clone, &["HEAD:refs/heads/x"]);
    git_ok(&s.here, &["pack-refs", "--all"]);
    git_ok(&s.clone, &["reset", "-q", "--hard", "HEAD~1"]);
    let loose = commit(&s.clone, "file", "loose");
    push(&s.clone, &["+HEAD:refs/heads/x"]);
    git_ok(&s.here, &["prune", "--expire=now"]);
    assert!(!git::git(&s.here, &["cat-file", "-e", &packed]).code.eq(&0), "git keeps what only packed-refs names");
    s.pair.active.start();
    s.checkpoint();
    assert_eq!(tip(&s.there, "refs/heads/x"), loose);
}

#[test]
fn a_branch_becomes_a_folder_of_branches_and_a_branch_again() {
    let s = Setting::new();
    commit(&s.clone, "file", "first");
    push(&s.clone, &["HEAD:main", "HEAD:refs/heads/a"]);
    s.checkpoint();
    for round in 0..3 {
        let packs = round == 1;
        let deep = commit(&s.clone, "file", &format!("deep {round}"));
        push(&s.clone, &[":refs/heads/a"]);
        push(&s.clone, &["HEAD:refs/heads/a/b", "HEAD:refs/heads/a/c/d"]);
        packs.then(|| git_ok(&s.here, &["pack-refs", "--all"]));
        s.checkpoint();
        assert_eq!(tip(&s.there, "refs/heads/a/c/d"), deep);

        let flat = commit(&s.clone, "file", &format!("flat {round}"));
        push(&s.clone, &[":refs/heads/a/b", ":refs/heads/a/c/d"]);
        push(&s.clone, &["HEAD:refs/heads/a"]);
        packs.then(|| git_ok(&s.here, &["pack-refs", "--all"]));
        s.checkpoint();
        assert_eq!(tip(&s.there, "refs/heads/a"), flat);
    }
}

#[test]
fn a_repository_with_reftable_arrives() {
    let pair = Pair::following();
    let (here, there) = (pair.active.home.join(REPOSITORY), pair.standby.home.join(REPOSITORY));
    std::fs::create_dir_all(&here).unwrap();
    if git::git(&here, &["init", "-q", "--bare", "-b", "main", "--ref-format=reftable"]).code != 0 {
        return println!("skipped: this git knows no reftable");
    }
    let clone = pair.dir.path().join("clone");
    git::clone(&here, &clone);
    for n in 0..3 {
        let pushed = commit(&clone, "file", &format!("content {n}"));
        push(&clone, &["HEAD:main", &format!("HEAD:refs/heads/topic{n}")]);
        pair.checkpoint();
        assert_eq!(tip(&there, "main"), pushed);
        assert_eq!(git::references(&there), git::references(&here));
        git::assert_clean(&there);
    }
    git_ok(&here, &["pack-refs", "--all"]);
    pair.checkpoint();
    pair.assert_equal();
    git::assert_clean(&there);

    // One that was cut off never replaces a good one, nor does a list that names what isn't there.
    let before = git::references(&there);
    let table = std::fs::read_dir(here.join("reftable")).unwrap().map(|e| e.unwrap().path());
    let table = table.into_iter().find(|path| path.extension().is_some_and(|e| e == "ref")).unwrap();
    let list = here.join("reftable/tables.list");
    for (path, cut) in [(table, true), (list, false)] {
        let good = std::fs::read(&path).unwrap();
        let bad = if cut { good[..good.len() - 5].to_vec() } else { [&good[..], b"0x000000000001-0x000000000001-00000000.ref\n"].concat() };
        // An empty list, as it is while it is written, would be that of a repository without references.
        let frozen = pair.active.freeze();
        std::fs::write(&path, bad).unwrap();
        drop(frozen);
        pair.active.run(&["checkpoint", "--timeout", "60s"]).expect(1, "held back");
        assert_eq!(git::references(&there), before);
        git::assert_clean(&there);
        std::fs::write(&path, &good).unwrap();
        pair.checkpoint();
        pair.assert_equal();
    }
}
