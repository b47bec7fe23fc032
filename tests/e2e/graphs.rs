//! Commit graphs come, are merged and dropped while the standby is looked at.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::git::{self, git, git_ok};
use crate::pair::Pair;
use crate::seed::{Seed, number_from_env};

const SECONDS: u64 = 10;
/// How long a chain is left alone that does not come.
const CHAIN_LIMIT: Duration = Duration::from_secs(2);
/// How much longer it is looked, at most, on a host that is so slow that none was seen by then.
const MORE: Duration = Duration::from_secs(60);

#[test]
fn a_chain_of_commit_graphs_never_names_a_layer_that_is_missing() {
    let pair = Pair::following_unasked();
    let bare = pair.active.home.join("shared/data/repositories/1");
    git::init_bare(&bare);
    let clones = [0, 1].map(|n| pair.dir.path().join(format!("clone{n}")));
    for (n, clone) in clones.iter().enumerate() {
        git::clone(&bare, clone);
        git::commit(clone, &format!("file{n}"), "first");
        git::push(clone, &[&format!("HEAD:refs/heads/w{n}")]);
    }
    pair.checkpoint();

    let (there, done, mut seed) = (pair.standby.home.join("shared/data/repositories/1"), AtomicBool::new(false), Seed::from_env());
    let until = Instant::now() + Duration::from_secs(number_from_env("COLDSPARE_GRAPHS_SECONDS").unwrap_or(SECONDS));
    let (mut looks, mut chains) = (0, 0);
    let wrong = std::thread::scope(|scope| {
        for (n, clone) in clones.iter().enumerate() {
            let done = &done;
            scope.spawn(move || {
                for round in (0..).take_while(|_| !done.load(Ordering::Relaxed)) {
                    git::commit(clone, &format!("file{n}"), &format!("{round}"));
                    let _ = git(
                        clone,
                        &["push", "-q", "origin", &format!("HEAD:refs/heads/w{n}"), &format!("+HEAD:refs/heads/b{n}-{}", round % 3)],
                    );
                }
            });
        }
        scope.spawn(|| maintain(&bare, &there, &done));
        let mut wrong = None;
        while wrong.is_none() && (Instant::now() < until || chains == 0 && Instant::now() < until + MORE) {
            std::thread::sleep(Duration::from_millis(seed.below(30))); // any moment is to be hit
            let frozen = pair.standby.freeze();
            looks += 1;
            chains += usize::from(there.join(CHAIN).exists());
            wrong = missing_layers(&there).map(|names| format!("{names}; the active: {:?}", fs::read_to_string(bare.join(CHAIN))));
            drop(frozen);
        }
        done.store(true, Ordering::Relaxed);
        wrong
    });
    eprintln!("{looks} looks, {chains} chains");
    assert_eq!(wrong, None, "after {looks} looks");
    assert!(chains > 0, "no chain of commit graphs was seen in {looks} looks");
    pair.checkpoint();
    pair.assert_equal();
}

const CHAIN: &str = "objects/info/commit-graphs/commit-graph-chain";

/// The layers that the chain of a repository names, and that aren't there.
fn missing_layers(bare: &Path) -> Option<String> {
    let chain = fs::read_to_string(bare.join(CHAIN)).unwrap_or_default();
    let is_there = |layer: &&str| bare.join(format!("objects/info/commit-graphs/graph-{layer}.graph")).exists();
    let missing: Vec<&str> = chain.lines().filter(|layer| !is_there(layer)).collect();
    (!missing.is_empty()).then(|| format!("{} of {} layers are missing: {missing:?}", missing.len(), chain.lines().count()))
}

/// What a server does to its graphs and packs, as soon as the standby has a chain, or has been given the time for it.
fn maintain(bare: &Path, there: &Path, done: &AtomicBool) {
    let write = ["commit-graph", "write", "--reachable", "--split"];
    for round in (0..).take_while(|_| !done.load(Ordering::Relaxed)) {
        match round % 4 {
            0 | 1 => {
                git_ok(bare, &write);
                let given = Instant::now() + CHAIN_LIMIT;
                while Instant::now() < given && !there.join(CHAIN).exists() {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            2 => {
                // A graph that names what a repack drops is refused by fsck, on the active too.
                let dir = bare.join("objects/info/commit-graphs");
                fs::remove_file(dir.join("commit-graph-chain")).unwrap();
                fs::remove_dir_all(dir).unwrap();
            }
            _ => drop(git(bare, &["repack", "-q", "-ad"])),
        }
    }
}
