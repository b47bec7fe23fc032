//! Forks borrow their parent's objects.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::git::{self, commit, git_ok, push, tip};
use crate::pair::Pair;

const PARENT: &str = "shared/data/repositories/1";
const FORK: &str = "shared/data/repositories/2";
const SECOND: &str = "shared/data/repositories/3";

struct Setting {
    pair: Pair,
}

impl Setting {
    fn here(&self, name: &str) -> PathBuf {
        self.pair.active.home.join(name)
    }

    fn there(&self, name: &str) -> PathBuf {
        self.pair.standby.home.join(name)
    }

    /// Makes a fork of the parent in place.
    fn fork(&self, name: &str) {
        git_ok(&self.here("."), &["clone", "-q", "--bare", "--shared", PARENT, name]);
        git::set_up(&self.here(name));
        // Both homes have other paths here: by a relative one each fork finds the parent beside it.
        fs::write(self.here(name).join("objects/info/alternates"), "../../1/objects\n").unwrap();
    }

    /// Makes a repository with a history that git packs.
    fn with_history(name: &str) -> Setting {
        let s = Setting { pair: Pair::following() };
        let clone = s.pair.dir.path().join("clone");
        git::init_bare(&s.here(name));
        git::clone(&s.here(name), &clone);
        (0..20).for_each(|n| drop(commit(&clone, "file", &format!("content {n}"))));
        push(&clone, &["HEAD:main"]);
        git_ok(&s.here(name), &["repack", "-q", "-ad"]);
        s.checkpoint(&[name]);
        s
    }

    #[track_caller]
    fn checkpoint(&self, repositories: &[&str]) {
        self.pair.checkpoint();
        for name in repositories {
            assert_eq!(git::references(&self.there(name)), git::references(&self.here(name)), "{name}");
            git::assert_clean(&self.there(name));
        }
        self.pair.assert_equal();
    }
}

#[test]
fn forks_stay_whole_while_their_parent_is_overwritten_and_collected() {
    let s = Setting { pair: Pair::following() };
    let (clone, of_fork) = (s.pair.dir.path().join("clone"), s.pair.dir.path().join("clone-of-fork"));
    git::init_bare(&s.here(PARENT));
    git::clone(&s.here(PARENT), &clone);
    commit(&clone, "file", "base");
    let borrowed = commit(&clone, "file", "borrowed");
    push(&clone, &["HEAD:main"]);
    s.fork(FORK);
    s.checkpoint(&[PARENT, FORK]);

    git::clone(&s.here(FORK), &of_fork);
    let forks = commit(&of_fork, "fork", "the fork's own");
    push(&of_fork, &["HEAD:refs/heads/topic"]);
    s.checkpoint(&[PARENT, FORK]);

    // The commit that the fork borrows is named by nothing in the parent any more.
    git_ok(&clone, &["reset", "-q", "--hard", "HEAD~1"]);
    commit(&clone, "file", "another");
    push(&clone, &["+HEAD:main"]);
    git_ok(&s.here(PARENT), &["gc", "-q"]);
    s.checkpoint(&[PARENT, FORK]);
    assert_eq!(tip(&s.there(FORK), "refs/heads/topic"), forks);
    assert_eq!(git_ok(&s.there(FORK), &["cat-file", "-t", &borrowed]).trim(), "commit");

    // A fork and a push to its parent that the fork needs arrive together; the first fork goes.
    commit(&clone, "file", "for the second fork");
    push(&clone, &["HEAD:main"]);
    s.fork(SECOND);
    fs::remove_dir_all(s.here(FORK)).unwrap();
    git_ok(&s.here(SECOND), &["repack", "-q", "-adl"]);
    s.checkpoint(&[PARENT, SECOND]);
    assert!(!s.there(FORK).exists());

    fs::remove_dir_all(s.here(SECOND)).unwrap();
    git_ok(&s.here(PARENT), &["repack", "-q", "-ad"]);
    git_ok(&s.here(PARENT), &["prune", "--expire=now"]);
    s.checkpoint(&[PARENT]);
    assert!(!s.there(SECOND).exists());
    assert_eq!(git::git(&s.there(PARENT), &["cat-file", "-e", &borrowed]).code, 1, "what nothing needs is gone on the standby too");
}

#[test]
fn a_clone_by_hard_links_arrives() {
    let s = Setting::with_history(PARENT);
    git_ok(&s.here("."), &["clone", "-q", "--bare", PARENT, FORK]);
    s.checkpoint(&[PARENT, FORK]);
    let links = fs::metadata(&git::packs(&s.here(FORK))[0]).unwrap().nlink();
    assert_eq!(links, 2, "git shares the pack");
    git_ok(&s.here(FORK), &["repack", "-q", "-adf"]);
    s.checkpoint(&[PARENT, FORK]);
    git_ok(&s.here("."), &["clone", "-q", "--bare", FORK, SECOND]);
    fs::remove_dir_all(s.here(FORK)).unwrap();
    s.checkpoint(&[PARENT, SECOND]);
}

/// A repository and one that shares its files come at once, the first with a reference to nothing.
#[test]
fn a_clone_by_hard_links_of_a_broken_repository_comes_whole_or_not_at_all() {
    for program in ["git", "cp"] {
        let s = Setting::with_history(SECOND);
        let frozen = s.pair.active.freeze();
        git_ok(&s.here("."), &["clone", "-q", "--bare", "--no-hardlinks", SECOND, PARENT]);
        let (from, to) = (s.here(PARENT), s.here(FORK));
        let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
        let copy: &[&str] = if program == "git" { &["clone", "-q", "--bare", from, to] } else { &["-al", from, to] };
        assert!(crate::pair::succeeds(program, copy));
        let bad = s.pair.active.write(&format!("{PARENT}/refs/heads/bad"), format!("{}\n", "12".repeat(20)));
        drop(frozen);
        for n in 0..3 {
            let unrelated = s.pair.active.write("shared/unrelated", n.to_string());
            let ran = s.pair.active.run(&["checkpoint", "--timeout", "60s"]).expect_code(1);
            assert!(ran.err.contains(FORK) || !git::references(&s.there(FORK)).is_empty(), "{ran:#?}");
            assert_eq!(fs::read(s.there("shared/unrelated")).unwrap(), fs::read(unrelated).unwrap());
            if s.there(FORK).join("HEAD").exists() {
                git::assert_clean(&s.there(FORK));
            }
        }
        fs::remove_file(bad).unwrap();
        s.checkpoint(&[PARENT, FORK, SECOND]);
    }
}
