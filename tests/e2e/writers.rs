//! Writers push, and maintenance never rests, while the standby is looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use crate::git::{self, Stash, git, git_ok};
use crate::pair::{Host, Pair, Ran};
use crate::recorder::{NONE, Recorder};
use crate::sampler::{Sample, Tally, Watched, sample};
use crate::seed::{Seed, number_from_env};

/// To which repository each writer pushes.
const WRITERS: [usize; 8] = [0, 0, 0, 1, 1, 2, 3, 3];
const REPOSITORIES: usize = 4;
/// The repository that has forks: nothing is ever pruned in it.
const PARENT: usize = 3;
const SECONDS: u64 = 30;
/// How much longer it goes on, at most, on a host that is so slow that it wasn't a load by then.
const MORE: Duration = Duration::from_secs(120);
const RED_MAX: usize = 8;
const SAMPLES_MIN: usize = 10;

struct Load<'a> {
    active: &'a Host,
    standby: &'a Host,
    dir: PathBuf,
    recorder: Recorder,
    /// A prune takes what a push has brought and no reference names yet; nobody may push meanwhile.
    prune: [RwLock<()>; REPOSITORIES],
    /// All that was recorded before has been acknowledged.
    acknowledged: AtomicU64,
    fork: Mutex<Option<usize>>,
    done: AtomicBool,
}

#[test]
fn the_standby_is_clean_and_true_at_every_moment_under_eight_writers_and_maintenance() {
    let pair = Pair::following_unasked();
    let load = Load {
        active: &pair.active,
        standby: &pair.standby,
        dir: pair.dir.path().into(),
        recorder: Recorder::new(pair.dir.path()),
        prune: Default::default(),
        acknowledged: AtomicU64::new(0),
        fork: Mutex::new(None),
        done: AtomicBool::new(false),
    };
    load.set_up();
    pair.checkpoint();
    let mut seed = Seed::from_env();
    let (samples, longest) = load.run(&mut seed);

    let history = load.recorder.history();
    for n in 0..REPOSITORIES {
        // What was recorded is what there is; else nothing below means anything.
        let now = load.recorder.now();
        history.check_together(&Load::name(n), &git::references(&load.bare(n)), now, now).unwrap();
        git::assert_clean(&load.bare(n));
    }
    let (mut tally, wrong) = Tally::judge(&samples, &history);
    tally.longest = longest;
    eprintln!("{} updates; {tally:?}", history.updates());
    assert!(wrong.is_empty(), "{} of {} samples are wrong\n{}", wrong.len(), tally.samples, wrong[..wrong.len().min(RED_MAX)].join("\n"));
    assert!(history.updates() > 50 && tally.samples > SAMPLES_MIN && tally.between > 0, "the load was no load");
    assert!(load.acknowledged.load(Ordering::Relaxed) > 0, "no checkpoint was confirmed under load");

    pair.checkpoint();
    for n in 0..REPOSITORIES {
        let (here, there) = (load.bare(n), load.watched(n).path);
        assert_eq!(git::references(&there), git::references(&here));
        git::assert_clean(&there);
    }
    pair.assert_equal();
    assert_eq!(git::leftovers(&pair.standby.home), Vec::<PathBuf>::new());
}

impl Load<'_> {
    fn name(n: usize) -> String {
        format!("shared/data/repositories/{}", n + 1)
    }

    fn bare(&self, n: usize) -> PathBuf {
        self.active.home.join(Self::name(n))
    }

    fn watched(&self, n: usize) -> Watched {
        let name = Self::name(n);
        Watched { path: self.standby.home.join(&name), name }
    }

    fn set_up(&self) {
        for n in 0..REPOSITORIES {
            git::init_bare(&self.bare(n));
            self.recorder.install(&self.bare(n), &Self::name(n));
            // Pushes are unpacked in some, and kept as packs in others.
            git_ok(&self.bare(n), &["config", "receive.unpackLimit", if n % 2 == 0 { "100" } else { "1" }]);
        }
        for (k, n) in WRITERS.into_iter().enumerate() {
            git::clone(&self.bare(n), &self.clone_of(k));
            // No two writers have a commit, a tree or a blob in common.
            git::commit(&self.clone_of(k), &format!("writer{k}"), &format!("writer {k}"));
            git::push(&self.clone_of(k), &[&format!("HEAD:refs/heads/w{k}"), "+HEAD:refs/heads/main"]);
        }
    }

    fn clone_of(&self, k: usize) -> PathBuf {
        self.dir.join(format!("clone{k}"))
    }

    /// All of it until time is up; what was seen, and the longest stop.
    fn run(&self, seed: &mut Seed) -> (Vec<Sample>, Duration) {
        let until = Instant::now() + Duration::from_secs(number_from_env("COLDSPARE_WRITERS_SECONDS").unwrap_or(SECONDS));
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for k in 0..WRITERS.len() {
                threads.push(scope.spawn(move || self.guarded(|| self.write(k))));
            }
            threads.push(scope.spawn(|| self.guarded(|| self.maintain())));
            threads.push(scope.spawn(|| self.guarded(|| self.pull_requests())));
            threads.push(scope.spawn(|| self.guarded(|| self.forks())));
            threads.push(scope.spawn(|| self.guarded(|| self.checkpoints())));
            let (mut samples, mut longest) = (Vec::new(), Duration::ZERO);
            self.guarded(|| {
                let goes_on = |samples: &[Sample]| Instant::now() < until || !self.is_load(samples) && Instant::now() < until + MORE;
                while goes_on(&samples) && !self.done.load(Ordering::Relaxed) {
                    let (new, took) = self.look(seed);
                    samples.extend(new);
                    longest = longest.max(took);
                }
            });
            for thread in threads {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            }
            (samples, longest)
        })
    }

    /// Whether enough was seen.
    fn is_load(&self, samples: &[Sample]) -> bool {
        samples.len() > SAMPLES_MIN && samples.iter().any(Sample::is_between) && self.acknowledged.load(Ordering::Relaxed) > 0
    }

    /// Whoever ends, ends all.
    fn guarded(&self, work: impl FnOnce()) {
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        self.done.store(true, Ordering::Relaxed);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }

    fn rounds(&self) -> impl Iterator<Item = usize> {
        (1..).take_while(|_| !self.done.load(Ordering::Relaxed))
    }

    /// One repository by chance, and the newest fork with its parent.
    fn look(&self, seed: &mut Seed) -> (Vec<Sample>, Duration) {
        let n = seed.below(REPOSITORIES as u64) as usize;
        let mut of = vec![self.watched(n)];
        if n == PARENT
            && let Some(fork) = *self.fork.lock().unwrap()
        {
            of.push(self.watched(fork));
        }
        let acknowledged = self.acknowledged.load(Ordering::Relaxed);
        sample(self.standby, &self.recorder, acknowledged, Duration::from_millis(seed.below(60)), &of)
    }

    /// Confirmations, as a floor for what may be seen.
    fn checkpoints(&self) {
        for _ in self.rounds() {
            let now = self.recorder.now();
            if self.active.run(&["checkpoint", "--timeout", "60s"]).code == 0 {
                self.acknowledged.store(now, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(500)); // the load, not a wait
        }
    }

    /// The branch `w<k>` keeps all of the writer's history; other branches come, change and go.
    fn write(&self, k: usize) {
        let (clone, n) = (self.clone_of(k), WRITERS[k]);
        let mut branches = BTreeSet::new();
        for round in self.rounds() {
            let _pushing = self.prune[n].read().unwrap();
            let own = format!("HEAD:refs/heads/w{k}");
            let content = format!("{k} {round}\n").repeat(50);
            let branch = format!("b{k}-{}", round % 3);
            match round % 6 {
                0 | 3 => {
                    git::commit(&clone, &format!("file{}", round % 4), &content);
                    let pushed = push(&clone, &["--atomic", &own, &format!("+HEAD:refs/heads/{branch}")]);
                    pushed.then(|| branches.insert(branch));
                }
                1 => {
                    git::commit(&clone, "file", &content);
                    push(&clone, &["--atomic", &own, "+HEAD:refs/heads/main"]);
                }
                2 => {
                    // Nothing names it once the branch is overwritten, and it is never pushed again.
                    git::commit(&clone, "thrown-away", &content);
                    push(&clone, &[&format!("+HEAD:refs/heads/x{k}")]);
                    git_ok(&clone, &["reset", "-q", "--hard", "HEAD~1"]);
                }
                4 => exchange(&clone, k, &mut branches),
                _ => {
                    if let Some(branch) = branches.iter().find(|b| b.starts_with('b')).cloned()
                        && push(&clone, &[&format!(":refs/heads/{branch}")])
                    {
                        branches.remove(&branch);
                    }
                }
            }
        }
    }

    fn maintain(&self) {
        for round in self.rounds() {
            let n = round % REPOSITORIES;
            let bare = self.bare(n);
            let all: &str = if n == PARENT { "-adk" } else { "-ad" };
            match (round / REPOSITORIES) % 8 {
                0 | 5 => pack_references(&bare),
                1 => {
                    drop_graph(&bare);
                    repack(&bare, &[all, "-b"]);
                }
                2 | 6 => drop(git_ok(&bare, &["commit-graph", "write", "--reachable", "--split"])),
                3 => {
                    drop_graph(&bare);
                    repack(&bare, &[all, "--write-midx"]);
                }
                4 if n != PARENT => {
                    let _alone = self.prune[n].write().unwrap();
                    drop_graph(&bare);
                    git_ok(&bare, &["prune", "--expire=now"]);
                }
                _ => drop(git_ok(&bare, &["multi-pack-index", "write"])),
            }
        }
    }

    /// References of pull requests, which come, move, are packed and go.
    fn pull_requests(&self) {
        for round in self.rounds() {
            let k = round % WRITERS.len();
            let (bare, name) = (self.bare(WRITERS[k]), Self::name(WRITERS[k]));
            let stash = Stash::of(&bare);
            let reference = format!("stash-refs/pull-requests/{}/from", round % 11);
            match round % 9 {
                4 => stash.pack(),
                7 if stash.references().contains_key(&reference) => {
                    self.recorder.around(&name, &BTreeMap::from([(reference.clone(), NONE.into())]), || stash.remove(&reference));
                }
                _ => {
                    let id = git::tip(&bare, &format!("refs/heads/w{k}"));
                    self.recorder.around(&name, &BTreeMap::from([(reference.clone(), id.clone())]), || stash.write(&reference, &id));
                }
            }
            std::thread::sleep(Duration::from_millis(20)); // the load, not a wait
        }
    }

    /// Forks of the parent are made, pushed to, repacked and deleted.
    fn forks(&self) {
        let parent = self.bare(PARENT);
        for round in self.rounds() {
            let n = 100 + round;
            let (fork, name) = (self.bare(n), Self::name(n));
            let (made, clone) = (self.dir.join("made"), self.dir.join("clone-of-fork"));
            git_ok(Path::new("/"), &["clone", "-q", "--bare", "--shared", &parent.to_string_lossy(), &made.to_string_lossy()]);
            git::set_up(&made);
            git_ok(&made, &["pack-refs", "--all"]);
            self.recorder.install(&made, &name);
            let references = git::references(&made);
            // Both homes have other paths here: by a relative one each fork finds the parent beside it.
            fs::write(made.join("objects/info/alternates"), format!("../../{}/objects\n", PARENT + 1)).unwrap();
            self.recorder.around(&name, &references, || fs::rename(&made, &fork).unwrap());
            *self.fork.lock().unwrap() = Some(n);

            git::clone(&fork, &clone);
            for step in 0..3 {
                git::commit(&clone, "fork", &format!("{round} {step}"));
                push(&clone, &["HEAD:refs/heads/fork", &format!("HEAD:refs/heads/f{step}")]);
            }
            repack(&fork, &["-adl"]);
            pack_references(&fork);
            push(&clone, &[":refs/heads/f0"]);

            let gone = git::references(&fork).into_keys().map(|name| (name, NONE.to_string())).collect();
            self.recorder.around(&name, &gone, || fs::rename(&fork, &made).unwrap());
            fs::remove_dir_all(&made).unwrap();
            fs::remove_dir_all(&clone).unwrap();
        }
    }
}

/// A repack beside pushes, there or to the parent: git may look for an object of one where it no longer is, and leaves all as it was.
fn repack(bare: &Path, how: &[&str]) {
    let ran = git(bare, &[&["repack", "-q"], how].concat());
    assert!(ran.code == 0 || ran.err.contains("bad object"), "{ran:#?}");
}

/// The branch `a<k>` becomes `a<k>/b`, or the reverse.
fn exchange(clone: &Path, k: usize, branches: &mut BTreeSet<String>) {
    let (flat, deep) = (format!("a{k}"), format!("a{k}/b"));
    let (old, new) = if branches.contains(&flat) { (flat, deep) } else { (deep, flat) };
    if branches.contains(&old) && !push(clone, &[&format!(":refs/heads/{old}")]) {
        return;
    }
    branches.remove(&old);
    if push(clone, &[&format!("HEAD:refs/heads/{new}")]) {
        branches.insert(new);
    }
}

/// Whether a push succeeded.
fn push(clone: &Path, args: &[&str]) -> bool {
    let mut all = vec!["push", "-q", "origin"];
    all.extend(args);
    let ran = git(clone, &all);
    let is_pushed = ran.code == 0;
    if !is_pushed {
        may_lose_a_race(ran);
    }
    is_pushed
}

/// Packs references without the hook: git reports a removal for each loose file, though no value changes.
fn pack_references(bare: &Path) {
    may_lose_a_race(git(bare, &["-c", "core.hooksPath=/dev/null", "pack-refs", "--all"]));
}

/// Somebody else holds the lock, or a repack removes the empty folder into which a push is about to move its objects.
#[track_caller]
fn may_lose_a_race(ran: Ran) {
    let is_lost = ["lock", "unable to migrate objects"].iter().any(|why| ran.err.contains(why));
    assert!(ran.code == 0 || is_lost, "{ran:#?}");
}

/// A commit graph that names what a prune or a repack drops is refused by fsck, on the active too.
fn drop_graph(bare: &Path) {
    let dir = bare.join("objects/info/commit-graphs");
    if dir.exists() {
        let _ = fs::remove_file(dir.join("commit-graph-chain"));
        fs::remove_dir_all(dir).unwrap();
    }
}
