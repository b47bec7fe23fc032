//! Nobody else writes on the standby: what does is noticed by a watch, compared with the manifest, told, and put right.
//!
//! A thread of its own. An event is a hint only: what counts is what differs from the manifest between two changesets. What
//! was written while nobody watched is found by a look at everything, at the start and when events were lost.
//!
//! Invariant: nothing is put right unless this host is a standby, and nobody makes it the active meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use coldspare_core::healing::Pauses;
use coldspare_core::{ClusterId, Problem, ProblemKind, RelPath, RootId};
use coldspare_scan::dirty::{Hint, Hints, Names};
use coldspare_scan::watch::{Process, Told, Watch, WatchError, WatchedRoot, now_ms};
use coldspare_standby::{Depth, Extent, Place};

use super::findings::{self, Findings, State};
use super::{Copy, lock};
use crate::application;
use crate::config::{Config, HookName};
use crate::watching::{self, HelperProcess};

/// How long hints gather, so that what belongs together is looked at together.
const GATHER: Duration = Duration::from_millis(100);
/// How long the thread sleeps when nothing wakes it.
const NAP: Duration = Duration::from_millis(500);
/// How often the active is asked again for what it didn't send.
const ASK_AGAIN_EVERY: Duration = Duration::from_secs(10);
/// How often it is looked whether somebody put right what is not put right here.
const LOOK_AGAIN_EVERY: Duration = Duration::from_secs(60);
/// Between two tries to watch at all.
const WATCH_AGAIN_EVERY: Duration = Duration::from_secs(5);
/// LIMIT: entries that are read byte by byte after one wake; of more, the metadata are compared.
const READ_MAX: usize = 1_000;
/// LIMIT: folders that inotify watches here: each takes kernel memory. Beyond, the scrub finds what was written.
const FOLDERS_MAX: u64 = 100_000;

/// Wakes the thread.
#[derive(Default)]
pub(super) struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn ring(&self) {
        *lock(&self.rung) = true;
        self.changed.notify_one();
    }

    fn wait(&self, limit: Duration) {
        let rung = lock(&self.rung);
        let (mut rung, _) = self.changed.wait_timeout_while(rung, limit, |rung| !*rung).unwrap_or_else(PoisonError::into_inner);
        *rung = false;
    }
}

/// Puts right what differs; says whether it did.
type Repair = dyn Fn(&Copy, &[Problem]) -> bool + Send;

/// What the thread is given.
pub(super) struct Keeper {
    pub(super) config: Config,
    pub(super) cluster: ClusterId,
    pub(super) findings: Arc<Mutex<Findings>>,
    /// The standby is closed for good.
    pub(super) is_over: Arc<AtomicBool>,
    /// Gives the standby, while it is open.
    pub(super) copy: Box<dyn Fn() -> Option<Arc<Copy>> + Send>,
    /// Puts right what differs, if this host may; says whether it did.
    pub(super) repair: Box<Repair>,
    /// Has the active told what is wanted.
    pub(super) ask: Box<dyn Fn() + Send>,
}

/// A path that differed when it was looked at last.
struct Open {
    problem: Problem,
    /// When it may be put right.
    due: Duration,
    /// Its content was asked for.
    is_asked: bool,
}

/// What the thread knows.
struct Work {
    keeper: Keeper,
    bell: Arc<Bell>,
    // Before its helper, whose end it would take for a loss.
    watch: Option<Watch>,
    helper: Result<HelperProcess, String>,
    watch_at: Instant,
    /// Why it isn't a better one.
    why: Option<String>,
    started: Instant,
    hints: Hints,
    processes: BTreeMap<(RootId, RelPath), Process>,
    pauses: Pauses,
    open: BTreeMap<(RootId, RelPath), Open>,
    asked_at: Option<Instant>,
    looked_at: Instant,
}

impl Keeper {
    /// Starts the thread; without a watch there is none. `helper` is that of fanotify, or why there is none.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn start(self, helper: Result<HelperProcess, String>) -> std::io::Result<()> {
        let now = Instant::now();
        let mut work = Work {
            keeper: self,
            bell: Arc::default(),
            helper,
            watch: None,
            watch_at: now,
            why: None,
            started: now,
            hints: Hints::default(),
            processes: BTreeMap::new(),
            pauses: Pauses::default(),
            open: BTreeMap::new(),
            asked_at: None,
            looked_at: now,
        };
        if work.keeper.config.hands_off.watch == crate::config::WatchMode::Scan {
            return Ok(());
        }
        work.watch();
        std::thread::Builder::new().name("hands-off".into()).spawn(move || work.run()).map(drop)
    }
}

impl Work {
    fn run(mut self) {
        while !self.keeper.is_over.load(Ordering::Relaxed) {
            self.bell.wait(NAP);
            if self.watch.is_none() && Instant::now() >= self.watch_at {
                self.watch();
            }
            let has_hints = self.watch.as_ref().is_some_and(|watch| !watch.dirty().is_empty());
            if has_hints {
                std::thread::sleep(GATHER);
            }
            self.take_hints();
            // Held for one round only: a standby in trouble has to be opened anew.
            if let Some(copy) = (self.keeper.copy)() {
                self.look(&copy);
                self.heal(&copy);
                self.settle(&copy);
            }
            self.show();
        }
    }

    /// Watches; what was written before is found by a look at everything.
    fn watch(&mut self) {
        self.watch_at = Instant::now() + WATCH_AGAIN_EVERY;
        let settings = &self.keeper.config.hands_off;
        let opened = self.watched_roots().and_then(|roots| {
            let bell = self.bell.clone();
            watching::open_watch(settings.watch, &roots, move || bell.ring(), &self.helper).map_err(|failure| failure.message)
        });
        (self.watch, self.why) = opened.unwrap_or_else(|why| (None, Some(why)));
        self.hints.everything = true;
        self.show();
    }

    fn watched_roots(&self) -> Result<Vec<WatchedRoot>, String> {
        let config = &self.keeper.config;
        let paths = crate::roots::resolve(config, self.keeper.cluster).map_err(|failure| failure.message)?;
        let root = |(root, path): (&crate::config::Root, _)| Ok(WatchedRoot { path, exclude: root.exclude()? });
        config.roots.iter().zip(paths).map(root).collect()
    }

    /// Takes what the watch reported; builds it anew when it lost something.
    fn take_hints(&mut self) {
        let Some(watch) = &self.watch else { return };
        if watch.is_stale() {
            match watch.rebuild() {
                Ok(()) => self.hints.everything = true,
                Err(e) => {
                    tracing::warn!(error = %e, "the watch on the standby is started anew");
                    self.watch = None;
                    if matches!(e, WatchError::Gone) {
                        let config = &self.keeper.config;
                        let started = watching::start_helper(config, self.keeper.cluster, config.hands_off.watch, Told::Processes);
                        self.helper = started.unwrap_or_else(|failure| Err(failure.message));
                    }
                    return self.watch();
                }
            }
        }
        let hints = watch.dirty().take();
        self.processes.extend(watch.take_processes());
        self.hints.merge(hints);
    }

    /// Compares what is hinted with the manifest.
    fn look(&mut self, copy: &Copy) {
        let mut places = places(&self.hints, copy.root_count());
        if self.looked_at.elapsed() > LOOK_AGAIN_EVERY {
            let itself = |(root, path): &(RootId, RelPath)| Place { root: *root, path: path.clone(), extent: Extent::Itself };
            places.extend(self.open.keys().map(itself));
        }
        if places.is_empty() {
            return;
        }
        self.cover(copy, &places);
        match self.verify(copy, &places) {
            Ok(Some(problems)) => {
                self.looked_at = Instant::now();
                self.hints = Hints::default();
                self.found(problems, &places);
                self.processes.clear();
            }
            Ok(None) => {} // once the changeset is in place
            Err(e) => tracing::warn!(error = %e, "what others wrote on the standby can't be told"),
        }
    }

    /// Every byte where the hints are somebody else's for certain; by inotify they are those of the receiver, too.
    fn verify(&self, copy: &Copy, places: &[Place]) -> Result<Option<Vec<Problem>>, coldspare_standby::StandbyError> {
        let is_foreign = self.watch.as_ref().is_some_and(|watch| watch.backend() == "fanotify");
        let depth = if is_foreign && places.len() <= READ_MAX { Depth::Deep } else { Depth::Quick };
        copy.verify_places(places, depth)
    }

    /// Has the folders at `places` watched before they are looked at; by fanotify all are.
    fn cover(&self, copy: &Copy, places: &[Place]) {
        let Some(watch) = self.watch.as_ref().filter(|watch| watch.backend() == "inotify") else { return };
        for Place { root, path, .. } in places.iter().filter(|place| place.extent == Extent::Below) {
            let covered = copy.for_each_folder(*root, path, |folder| {
                if watch.coverage().watched < FOLDERS_MAX {
                    watch.cover(*root, folder);
                }
            });
            if let Err(e) = covered {
                tracing::warn!(error = %e, "folders of the standby are not watched");
            }
        }
    }

    /// Takes note of what differs at `places`, and of what does no more.
    fn found(&mut self, problems: Vec<Problem>, places: &[Place]) {
        let (now, now_ms) = (self.started.elapsed(), now_ms());
        let differs: BTreeSet<_> = problems.iter().map(|p| (p.root, p.path.clone())).collect();
        for place in places {
            let key = (place.root, place.path.clone());
            if !differs.contains(&key) && self.open.remove(&key).is_some() {
                lock(&self.keeper.findings).set(place.root, &place.path, State::Right { since_ms: now_ms });
            }
        }
        // What changed in a folder shows in its time: that is no finding of its own, and is put right with the other.
        let within: BTreeSet<_> = problems.iter().filter_map(|p| Some((p.root, p.path.parent()?))).collect();
        let mut news = Vec::new();
        for problem in problems.into_iter().filter(|p| p.kind != ProblemKind::Time || !within.contains(&(p.root, p.path.clone()))) {
            let key = (problem.root, problem.path.clone());
            let by = findings::nearest(&self.processes, problem.root, &problem.path).cloned();
            // What is known to differ, and was not written again, is no news.
            if self.open.get(&key).is_some_and(|open| open.problem == problem || open.is_asked && by.is_none()) {
                continue;
            }
            let (times, due) = self.pauses.found(problem.root, &problem.path, now);
            lock(&self.keeper.findings).add(&problem, by.clone(), times, now_ms);
            self.open.insert(key, Open { problem: problem.clone(), due, is_asked: false });
            news.push((problem, by, times));
        }
        if !news.is_empty() {
            self.notify(findings::tell(&news));
        }
    }

    /// Puts right what is due.
    fn heal(&mut self, copy: &Copy) {
        let now = self.started.elapsed();
        let due: Vec<Problem> =
            self.open.values().filter(|open| !open.is_asked && open.due <= now).map(|open| open.problem.clone()).collect();
        if !self.keeper.config.hands_off.heal || due.is_empty() || !(self.keeper.repair)(copy, &due) {
            return;
        }
        for problem in &due {
            if let Some(open) = self.open.get_mut(&(problem.root, problem.path.clone())) {
                open.is_asked = true;
            }
        }
    }

    /// Looks at what was repaired; asks for what is still wanted.
    fn settle(&mut self, copy: &Copy) {
        if !self.open.values().any(|open| open.is_asked) {
            return;
        }
        let Ok(wanted) = copy.wanted() else { return };
        let wanted: BTreeSet<_> = wanted.into_iter().collect();
        if !wanted.is_empty() && self.asked_at.is_none_or(|at| at.elapsed() > ASK_AGAIN_EVERY) {
            self.asked_at = Some(Instant::now());
            (self.keeper.ask)();
        }
        // A folder is right when all in it is.
        let is_wanted = |(root, path): &(RootId, RelPath)| {
            let near = wanted.range((*root, path.clone())..);
            let mut near = near.take_while(|(r, inner)| r == root && inner.as_bytes().starts_with(path.as_bytes()));
            near.any(|(_, inner)| inner.is_within(path))
        };
        let (waiting, done): (Vec<_>, Vec<_>) =
            self.open.iter().filter(|(_, open)| open.is_asked).map(|(key, _)| key.clone()).partition(is_wanted);
        for (root, path) in waiting {
            lock(&self.keeper.findings).set(root, &path, State::Asked);
        }
        if done.is_empty() {
            return;
        }
        let places: Vec<_> = done.into_iter().map(|(root, path)| Place { root, path, extent: Extent::Below }).collect();
        match copy.verify_places(&places, if places.len() <= READ_MAX { Depth::Deep } else { Depth::Quick }) {
            Ok(Some(problems)) => {
                for problem in &problems {
                    self.open.remove(&(problem.root, problem.path.clone())); // found anew
                }
                self.found(problems, &places);
                if self.open.is_empty() {
                    self.asked_at = None;
                    tracing::info!("what others wrote on the standby is put right");
                }
            }
            Ok(None) => {}
            Err(e) => tracing::warn!(error = %e, "what was put right can't be told"),
        }
    }

    /// Tells people by the hook, beside the rest.
    fn notify(&self, message: String) {
        if !self.keeper.config.hooks.has(HookName::Notify) {
            return;
        }
        let config = self.keeper.config.clone();
        let told = std::thread::Builder::new().name("notify".into()).spawn(move || {
            let variables = [("COLDSPARE_EVENT".to_string(), "foreign-write".to_string()), ("COLDSPARE_MESSAGE".into(), message)];
            if let Err(error) = application::run_hook_of(&config, HookName::Notify, &variables) {
                tracing::error!(error, "people could not be told");
            }
        });
        if let Err(e) = told {
            tracing::error!(error = %e, "people could not be told");
        }
    }

    fn show(&self) {
        let Some(watch) = &self.watch else { return lock(&self.keeper.findings).watched(None, self.why.clone(), None) };
        let mut coverage = watch.coverage();
        if watch.backend() == "inotify" && coverage.watched >= FOLDERS_MAX {
            coverage.unwatched = coverage.unwatched.max(1);
        }
        lock(&self.keeper.findings).watched(Some(watch.backend()), self.why.clone(), Some(coverage));
    }
}

/// Where hints lead to.
fn places(hints: &Hints, roots: u8) -> Vec<Place> {
    let place = |root: RootId, path: RelPath, extent| Place { root, path, extent };
    if hints.everything {
        return (0..roots).map(|root| place(RootId(root), RelPath::root(), Extent::Below)).collect();
    }
    let mut out = Vec::new();
    for ((root, dir), names) in &hints.dirs {
        match names {
            Names::All => out.push(place(*root, dir.clone(), Extent::Below)),
            Names::Some(names) => {
                out.push(place(*root, dir.clone(), Extent::Itself));
                for (name, hint) in names {
                    let extent = if *hint == Hint::Replaced { Extent::Below } else { Extent::Itself };
                    out.extend(dir.join(name).ok().map(|path| place(*root, path, extent)));
                }
            }
        }
    }
    out
}
