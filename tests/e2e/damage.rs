//! What is damaged on the active never replaces the good copy: it is held back, said, and sent once it is repaired.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::everything::flip_byte;
use crate::git::{self, commit, git_ok, loose_object, packs, push, tip};
use crate::pair::{Pair, Ran, until};

const REPOSITORY: &str = "shared/data/repositories/1";
const OTHER: &str = "shared/data/repositories/2";
/// Its name is the SHA-256 of its content.
const LARGE: &str = "shared/data/git-lfs/storage/4a0d8d9be8ddd7a0d3c6/49/454600e4de1f591a5df59aa53d41264e8cb3f98d9ca4eeaa221e0228aa997c";
const LARGE_CONTENT: &str = "hello, large file\n";
const NOWHERE: &str = "1234567890123456789012345678901234567890";

/// A pair that follows, with two repositories and their clones, and a large file.
struct Setting {
    pair: Pair,
    clone: PathBuf,
    other_clone: PathBuf,
}

impl Setting {
    fn new() -> Setting {
        let pair = Pair::following();
        let at = |name: &str| pair.dir.path().join(name);
        let (clone, other_clone) = (at("clone"), at("other-clone"));
        for (name, clone) in [(REPOSITORY, &clone), (OTHER, &other_clone)] {
            let bare = pair.active.home.join(name);
            git::init_bare(&bare);
            git::clone(&bare, clone);
            commit(clone, "packed", &format!("packed in {name}\n").repeat(99));
            push(clone, &["HEAD:main"]);
            git_ok(&bare, &["repack", "-q", "-ad"]);
            commit(clone, "loose", &format!("loose in {name}"));
            push(clone, &["HEAD:main"]);
        }
        pair.active.write(LARGE, LARGE_CONTENT);
        pair.checkpoint();
        pair.assert_equal();
        Setting { pair, clone, other_clone }
    }

    fn here(&self, name: &str) -> PathBuf {
        self.pair.active.home.join(name)
    }

    fn there(&self, name: &str) -> PathBuf {
        self.pair.standby.home.join(name)
    }

    /// A new commit in the other repository arrives, though something is held back: exit code 1.
    #[track_caller]
    fn others_go_on(&self, what: &str) -> Ran {
        let id = commit(&self.other_clone, "file", what);
        push(&self.other_clone, &["HEAD:main"]);
        let ran = self.pair.active.run(&["checkpoint", "--timeout", "60s"]).expect_code(1);
        assert_eq!(tip(&self.there(OTHER), "main"), id);
        ran
    }

    /// `path`, or something in it, is held back as `kind`, and every way to ask says so.
    #[track_caller]
    fn assert_held_back(&mut self, path: &str, kind: &str) {
        let ran = self.others_go_on(path);
        assert!(ran.err.contains(&format!("held back: {path}")) && ran.err.contains(kind), "{ran:#?}");
        let status = self.pair.active.status();
        let held = status["held_back"].as_array().unwrap();
        let is_it = |p: &serde_json::Value| {
            Path::new(p["path"].as_str().unwrap()).starts_with(path) && p["kind"] == kind && !p["detail"].as_str().unwrap().is_empty()
        };
        assert!(held.len() == 1 && is_it(&held[0]), "{path} as {kind}: {held:#?}");
        // It is told beside the changeset, which may be confirmed before.
        until("the standby is told", || {
            self.pair.standby.status()["held_back"].as_array().is_some_and(|held| held.len() == 1 && is_it(&held[0]))
        });
        let verified = self.pair.standby.run(&["verify", "--deep", "--json"]).expect_code(0).json();
        assert_eq!(verified["verdict"], "consistent");
        let listed = verified["held_back"].as_array().unwrap_or_else(|| panic!("no held_back in {verified}"));
        assert!(listed.len() == 1 && is_it(&listed[0]), "{listed:#?}");
        git::assert_clean(&self.there(REPOSITORY));
        git::assert_clean(&self.there(OTHER));
        // Neither does a restart, or a look at everything, let it through.
        self.pair.active.kill();
        self.pair.active.run(&["send", "--once"]).expect(1, &format!("held back: {path}"));
        self.pair.active.start();
        git::assert_clean(&self.there(REPOSITORY));
    }

    #[track_caller]
    fn assert_repaired(&self) {
        self.pair.checkpoint();
        assert_eq!(self.pair.active.status()["held_back"], serde_json::json!([]));
        let verify = || self.pair.standby.run(&["verify", "--deep", "--json"]).expect_code(0).json();
        until("the standby is told", || verify()["held_back"] == serde_json::json!([]));
        self.pair.assert_equal();
        git::assert_clean(&self.there(REPOSITORY));
    }

    /// Damages a file that is on both sides, and repairs it.
    #[track_caller]
    fn check(&mut self, path: &str, damage: impl FnOnce(&Path)) {
        let (here, there) = (self.here(path), self.there(path));
        let good = fs::read(&here).unwrap();
        damage(&here);
        assert_ne!(fs::read(&here).unwrap(), good);
        self.assert_held_back(path, "damaged");
        assert!(fs::read(&there).unwrap() == good, "{path}: the good copy is gone");
        fs::write(&here, &good).unwrap();
        self.assert_repaired();
    }

    fn relative(&self, path: &Path) -> String {
        path.strip_prefix(&self.pair.active.home).unwrap().to_string_lossy().into_owned()
    }

    /// The loose object of the last commit.
    fn loose_commit(&self) -> String {
        self.relative(&loose_object(&self.here(REPOSITORY), &tip(&self.clone, "HEAD")))
    }
}

#[test]
fn an_empty_reference_does_not_replace_a_good_one() {
    Setting::new().check(&format!("{REPOSITORY}/refs/heads/main"), |path| drop(File::create(path).unwrap()));
}

#[test]
fn a_reference_that_is_no_reference_does_not_replace_a_good_one() {
    Setting::new().check(&format!("{REPOSITORY}/refs/heads/main"), |path| fs::write(path, "\0".repeat(41)).unwrap());
}

#[test]
fn an_empty_reference_that_is_new_is_not_sent() {
    let mut s = Setting::new();
    let planted = format!("{REPOSITORY}/refs/heads/planted");
    s.pair.active.write(&planted, "");
    s.assert_held_back(&planted, "damaged");
    assert!(!s.there(&planted).exists());
    fs::remove_file(s.here(&planted)).unwrap();
    s.assert_repaired();
}

#[test]
fn an_empty_pull_requests_reference_does_not_replace_a_good_one() {
    let mut s = Setting::new();
    let name = format!("{REPOSITORY}/stash-refs/pull-requests/1/from");
    s.pair.active.write(&name, format!("{}\n", tip(&s.clone, "HEAD")));
    s.pair.checkpoint();
    s.check(&name, |path| drop(File::create(path).unwrap()));
}

#[test]
fn an_empty_object_does_not_replace_a_good_one() {
    let mut s = Setting::new();
    s.check(&s.loose_commit(), |path| drop(File::create(path).unwrap()));
}

#[test]
fn an_object_cut_short_does_not_replace_a_good_one() {
    let mut s = Setting::new();
    s.check(&s.loose_commit(), |path| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    });
}

#[test]
fn an_object_changed_under_its_name_does_not_replace_the_good_one() {
    let mut s = Setting::new();
    // Another good object: only its name is wrong.
    let another = fs::read(loose_object(&s.here(REPOSITORY), &tip(&s.clone, "HEAD^{tree}"))).unwrap();
    s.check(&s.loose_commit(), |path| fs::write(path, another).unwrap());
}

#[test]
fn a_pack_changed_under_its_name_does_not_replace_the_good_one() {
    let mut s = Setting::new();
    let pack = s.relative(&packs(&s.here(REPOSITORY))[0]);
    s.check(&pack, |path| flip_byte(path, 40));
}

#[test]
fn a_damaged_object_does_not_replace_a_good_one_by_another_of_its_names() {
    let s = Setting::new();
    let object = s.loose_commit();
    let other = s.pair.active.home.join("aaa");
    fs::hard_link(s.here(&object), &other).unwrap();
    s.pair.checkpoint();
    let good = fs::read(&other).unwrap();
    fs::write(&other, "damaged").unwrap();
    s.others_go_on("a damaged object with two names");
    assert!(fs::read(s.there(&object)).unwrap() == good, "the good copy is gone");
    git::assert_clean(&s.there(REPOSITORY));
    fs::write(&other, good).unwrap();
    s.assert_repaired();
}

#[test]
fn a_pack_index_that_is_not_what_its_hash_says_does_not_replace_the_good_one() {
    let mut s = Setting::new();
    let index = s.relative(&packs(&s.here(REPOSITORY))[0].with_extension("idx"));
    s.check(&index, |path| flip_byte(path, 8 + 256 * 4 + 3 * 20 + 1));
}

#[test]
fn packed_references_that_were_emptied_do_not_replace_good_ones() {
    let mut s = Setting::new();
    git_ok(&s.here(REPOSITORY), &["pack-refs", "--all"]);
    s.pair.checkpoint();
    s.check(&format!("{REPOSITORY}/packed-refs"), |path| drop(File::create(path).unwrap()));
}

#[test]
fn a_damaged_repository_that_is_removed_is_held_back_no_longer() {
    let mut s = Setting::new();
    let object = s.loose_commit();
    File::create(s.here(&object)).unwrap();
    s.assert_held_back(&object, "damaged");
    // At once: one of which only a part is gone is another matter.
    let frozen = s.pair.active.freeze();
    fs::remove_dir_all(s.here(REPOSITORY)).unwrap();
    drop(frozen);
    s.pair.checkpoint();
    assert_eq!(s.pair.active.status()["held_back"], serde_json::json!([]));
    assert!(!s.there(REPOSITORY).exists());
    s.pair.assert_equal();
}

#[test]
fn a_large_file_whose_name_is_not_its_digest_does_not_replace_the_good_one() {
    Setting::new().check(LARGE, |path| fs::write(path, "hello, large filE\n").unwrap());
}

#[test]
fn a_large_file_whose_name_is_not_its_digest_is_not_sent() {
    let mut s = Setting::new();
    let wrong = LARGE.replace("/49/", "/48/");
    s.pair.active.write(&wrong, LARGE_CONTENT);
    s.assert_held_back(&wrong, "damaged");
    assert!(!s.there(&wrong).exists());
    fs::remove_file(s.here(&wrong)).unwrap();
    s.assert_repaired();
}

#[test]
fn a_repository_with_a_reference_to_nothing_stays_as_it_was() {
    let mut s = Setting::new();
    let before = git::references(&s.there(REPOSITORY));
    let dangling = format!("{REPOSITORY}/refs/heads/dangling");
    // Both at once: a push to a repository that is in this state is refused by git.
    let frozen = s.pair.active.freeze();
    let pushed = commit(&s.clone, "file", "not yet on the standby");
    push(&s.clone, &["HEAD:refs/heads/topic"]);
    s.pair.active.write(&dangling, format!("{NOWHERE}\n"));
    drop(frozen);
    s.assert_held_back(REPOSITORY, "incomplete");
    assert_eq!(git::references(&s.there(REPOSITORY)), before);

    fs::remove_file(s.here(&dangling)).unwrap();
    s.assert_repaired();
    assert_eq!(tip(&s.there(REPOSITORY), "refs/heads/topic"), pushed);
}

/// Takes away a file of the repository; the standby keeps all of it until the file is back.
#[track_caller]
fn check_loss(s: &mut Setting, lost: &str) {
    let good = fs::read(s.here(lost)).unwrap();
    fs::remove_file(s.here(lost)).unwrap();
    s.assert_held_back(REPOSITORY, "incomplete");
    assert!(fs::read(s.there(lost)).unwrap() == good, "{lost}: the good copy is gone");
    fs::write(s.here(lost), good).unwrap();
    s.assert_repaired();
}

#[test]
fn an_object_that_a_branch_names_does_not_go_with_the_active() {
    let mut s = Setting::new();
    let object = s.loose_commit();
    check_loss(&mut s, &object);
}

#[test]
fn a_pack_that_a_branch_needs_does_not_go_with_the_active() {
    let mut s = Setting::new();
    git_ok(&s.here(REPOSITORY), &["repack", "-q", "-ad"]);
    let pack = s.relative(&packs(&s.here(REPOSITORY))[0]);
    s.pair.checkpoint();
    check_loss(&mut s, &pack);
}

#[test]
fn an_index_that_a_branch_needs_does_not_go_with_the_active() {
    let mut s = Setting::new();
    git_ok(&s.here(REPOSITORY), &["repack", "-q", "-ad"]);
    let index = s.relative(&packs(&s.here(REPOSITORY))[0].with_extension("idx"));
    s.pair.checkpoint();
    check_loss(&mut s, &index);
}

/// A fork of the repository that borrows its objects.
fn fork(s: &Setting) -> &'static str {
    const FORK: &str = "shared/data/repositories/3";
    // At once: as git makes it, it borrows by a path that is another one on the standby.
    let frozen = s.pair.active.freeze();
    git_ok(&s.here(REPOSITORY), &["clone", "-q", "--bare", "--shared", ".", s.here(FORK).to_str().unwrap()]);
    fs::write(s.here(FORK).join("objects/info/alternates"), "../../1/objects\n").unwrap();
    drop(frozen);
    s.pair.checkpoint();
    git::assert_clean(&s.there(FORK));
    FORK
}

#[test]
fn a_fork_does_not_lose_the_way_to_what_it_borrows_with_the_active() {
    let s = Setting::new();
    let fork = fork(&s);
    let alternates = format!("{fork}/objects/info/alternates");
    let good = fs::read(s.here(&alternates)).unwrap();
    fs::remove_file(s.here(&alternates)).unwrap();
    let ran = s.others_go_on("without alternates");
    assert!(ran.err.contains(&format!("held back: {fork}")) && ran.err.contains("incomplete"), "{ran:#?}");
    git::assert_clean(&s.there(fork));
    fs::write(s.here(&alternates), good).unwrap();
    s.assert_repaired();
}

#[test]
fn a_fork_that_needs_nothing_of_its_parent_lets_it_go() {
    let s = Setting::new();
    let fork = fork(&s);
    // All that it borrowed is its own now; who unties it forgets the file.
    git_ok(&s.here(fork), &["repack", "-q", "-ad"]);
    s.pair.checkpoint();
    // At once: one of which only a part is gone is another matter.
    let frozen = s.pair.active.freeze();
    fs::remove_dir_all(s.here(REPOSITORY)).unwrap();
    drop(frozen);
    git_ok(&s.here(fork), &["update-ref", "refs/heads/again", "HEAD"]);
    s.pair.checkpoint();
    assert!(!s.there(REPOSITORY).exists());
    s.pair.assert_equal();
}

#[test]
fn a_fork_that_waits_for_its_parent_comes_when_the_parent_is_mended() {
    let s = Setting::new();
    let fork = fork(&s);
    let object = s.loose_commit();
    let good = fs::read(s.here(&object)).unwrap();
    // Both in one changeset.
    let frozen = s.pair.active.freeze();
    git_ok(&s.here(fork), &["update-ref", "refs/heads/topic", "HEAD~"]);
    fs::remove_file(s.here(&object)).unwrap();
    drop(frozen);
    let ran = s.others_go_on("while both wait");
    assert!(ran.err.contains(&format!("held back: {fork}")), "{ran:#?}");
    fs::write(s.here(&object), good).unwrap();
    let topic = || s.there(fork).join("refs/heads/topic").exists();
    until("the fork comes by itself", topic);
    until("nothing is held back", || s.pair.active.status()["held_back"] == serde_json::json!([]));
    s.assert_repaired();
}

/// What a fork lost on the active, while the repository that it borrows from lives on and is pruned.
#[track_caller]
fn check_held_fork(lost: impl FnOnce(&Setting, &str) -> PathBuf) {
    let s = Setting::new();
    let (parent, bare) = (REPOSITORY, s.here(REPOSITORY));
    git_ok(&bare, &["update-ref", "refs/heads/shared", &commit_to(&bare, "shared")]);
    let fork = fork(&s);
    git_ok(&s.here(fork), &["update-ref", "refs/heads/own", &commit_to(&s.here(fork), "own")]);
    s.pair.checkpoint();
    let lost = lost(&s, fork);
    let good = fs::read(&lost).unwrap();
    fs::remove_file(&lost).unwrap();
    let held = s.others_go_on("after the loss");
    assert!(held.err.contains(&format!("held back: {fork}")), "{held:#?}");
    // Neither needs the branch any more, but the standby's copy of the fork, which is kept, has it.
    git_ok(&s.here(fork), &["update-ref", "-d", "refs/heads/shared"]);
    s.others_go_on("without the branch in the fork");
    git_ok(&bare, &["update-ref", "-d", "refs/heads/shared"]);
    s.others_go_on("without the branch in the parent");
    git_ok(&bare, &["prune", "--expire=now"]);
    s.others_go_on("after the prune");
    git::assert_clean(&s.there(fork));
    git::assert_clean(&s.there(parent));
    fs::write(&lost, good).unwrap();
    until("nothing is held back", || s.pair.active.status()["held_back"] == serde_json::json!([]));
    s.assert_repaired();
    git::assert_clean(&s.there(fork));
}

/// A commit that nothing names yet.
fn commit_to(bare: &Path, message: &str) -> String {
    let tree = git_ok(bare, &["rev-parse", "HEAD^{tree}"]).trim().to_string();
    git_ok(bare, &["commit-tree", &tree, "-m", message]).trim().into()
}

#[test]
fn a_prune_does_not_take_what_the_kept_copy_of_a_fork_without_an_object_borrows() {
    check_held_fork(|s, fork| loose_object(&s.here(fork), &tip(&s.here(fork), "refs/heads/own")));
}

#[test]
fn a_prune_does_not_take_what_the_kept_copy_of_a_fork_without_its_alternates_borrows() {
    check_held_fork(|s, fork| s.here(fork).join("objects/info/alternates"));
}
