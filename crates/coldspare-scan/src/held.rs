//! What is held back.
//!
//! Invariants: what is reported stays so until it is captured after all, or goes, or a look at everything no longer meets
//! it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use coldspare_core::git::CapturePass;
use coldspare_core::git::family::Repository;
use coldspare_core::{Problem, RelPath, RootId, Seq};

/// What is held back: not sent, the standby's copy kept, reported until it is captured after all.
#[derive(Debug, Default)]
pub struct HeldBack {
    problems: Mutex<BTreeMap<(RootId, RelPath), (Problem, u64)>>,
    cycle: AtomicU64,
    /// Problems beyond the limit.
    unlisted: AtomicU64,
    /// Repositories that are held back as a whole.
    repositories: Mutex<BTreeSet<Repository>>,
    /// Repositories that wait for one of those, since they share objects with it.
    tied: Mutex<BTreeSet<Repository>>,
    /// Repositories that the standby found incomplete: how often, and in which changeset they were sent since.
    incomplete: Mutex<BTreeMap<Repository, (u32, Option<Seq>)>>,
    /// Repositories of which objects went that the standby keeps for a reference that is held back.
    owed: Mutex<BTreeSet<Repository>>,
    /// How often in a row a repository could not be captured whole.
    again: Mutex<BTreeMap<Repository, u32>>,
}

/// LIMIT: problems that are listed; more are counted.
const HELD_MAX: usize = 10_000;

impl HeldBack {
    /// The problems that are listed, by path, and how many more there are.
    pub fn list(&self) -> (Vec<Problem>, u64) {
        (self.lock().values().map(|(p, _)| p.clone()).collect(), self.unlisted.load(Ordering::Relaxed))
    }

    pub(crate) fn hold(&self, problem: Problem) {
        let mut problems = self.lock();
        let key = (problem.root, problem.path.clone());
        if problems.len() >= HELD_MAX && !problems.contains_key(&key) {
            self.unlisted.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if !problems.contains_key(&key) {
            tracing::warn!(path = %problem.path, kind = problem.kind.word(), detail = problem.detail, "held back");
        }
        problems.insert(key, (problem, self.cycle.load(Ordering::Relaxed)));
    }

    /// A path was captured: it is no problem any more, unless it is a repository that is held back as a whole.
    pub(crate) fn release(&self, root: RootId, path: &RelPath) {
        let key = (root, path.clone());
        if self.lock().is_empty() || self.is_held(&key) {
            return;
        }
        self.lock().remove(&key);
    }

    /// Whether a reference of a repository is held back: objects that only it needs stay.
    pub(crate) fn holds_reference_of(&self, (root, repository): &Repository) -> bool {
        let is_reference = |inside: &[u8]| CapturePass::of(inside) == CapturePass::References;
        let problems = self.lock();
        let near = problems.range((*root, repository.clone())..).map(|(key, _)| key);
        let mut near = near.take_while(|(r, at)| r == root && at.as_bytes().starts_with(repository.as_bytes()));
        near.any(|(_, at)| at.below(repository).is_some_and(is_reference))
    }

    /// Whether a path is held back, or something that it is in or that is in it.
    pub fn covers(&self, root: RootId, path: &RelPath) -> bool {
        let is_it = |(r, at): &(RootId, RelPath)| *r == root && (path.is_within(at) || at.is_within(path));
        self.lock().keys().any(is_it) || self.repositories().iter().any(is_it) || self.tied().iter().any(is_it)
    }

    /// Whether a path is held back, or something that it is in: what is above of that isn't.
    pub fn holds(&self, root: RootId, path: &RelPath) -> bool {
        let is_in = |(r, at): &(RootId, RelPath)| *r == root && path.is_within(at);
        self.lock().keys().any(is_in) || self.repositories().iter().any(is_in) || self.tied().iter().any(is_in)
    }

    /// A path went, with all below it: nothing there is a problem any more.
    pub(crate) fn forget_within(&self, root: RootId, path: &RelPath) {
        let is_there = |(r, at): &(RootId, RelPath)| *r != root || !at.is_within(path);
        self.incomplete.lock().unwrap_or_else(PoisonError::into_inner).retain(|at, _| is_there(at));
        self.again.lock().unwrap_or_else(PoisonError::into_inner).retain(|at, _| is_there(at));
        self.lock().retain(|at, _| is_there(at));
    }

    /// Repositories that are held back as a whole.
    pub(crate) fn repositories(&self) -> std::sync::MutexGuard<'_, BTreeSet<Repository>> {
        self.repositories.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Repositories that are held back since one that they share objects with is.
    pub(crate) fn tied(&self) -> std::sync::MutexGuard<'_, BTreeSet<Repository>> {
        self.tied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a repository is held back, for its own sake or for another's, so that all of it has to be looked at.
    pub(crate) fn is_held(&self, at: &Repository) -> bool {
        self.repositories().contains(at) || self.tied().contains(at) || self.is_incomplete(at)
    }

    /// Counts one more time that the standby found a repository incomplete.
    pub(crate) fn note_incomplete(&self, at: &Repository) -> u32 {
        let mut incomplete = self.incomplete.lock().unwrap_or_else(PoisonError::into_inner);
        let (tries, sent) = incomplete.entry(at.clone()).or_default();
        *tries += 1;
        *sent = None;
        *tries
    }

    /// A repository is in the changeset under way: if the standby doesn't say otherwise, it is complete from then on. Of
    /// several that follow each other the first one counts.
    pub(crate) fn note_sent(&self, at: &Repository, seq: Seq) {
        let mut incomplete = self.incomplete.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, sent)) = incomplete.get_mut(at) {
            sent.get_or_insert(seq);
        }
    }

    /// The changeset `seq` was given up: what it had of incomplete repositories counts as not sent.
    pub fn given_up(&self, seq: Seq) {
        let mut incomplete = self.incomplete.lock().unwrap_or_else(PoisonError::into_inner);
        incomplete.values_mut().filter(|(_, sent)| *sent == Some(seq)).for_each(|(_, sent)| *sent = None);
    }

    pub(crate) fn is_incomplete(&self, at: &Repository) -> bool {
        self.incomplete.lock().unwrap_or_else(PoisonError::into_inner).contains_key(at)
    }

    /// The changeset `seq` was acknowledged, after all that the standby had to say of it; says whether a repository is
    /// complete again by it.
    pub fn acknowledged(&self, seq: Seq) -> bool {
        let done: Vec<Repository> = {
            let mut incomplete = self.incomplete.lock().unwrap_or_else(PoisonError::into_inner);
            let is_done = |sent: &Option<Seq>| sent.is_some_and(|sent| sent <= seq);
            let done = incomplete.iter().filter(|(_, (_, sent))| is_done(sent)).map(|(at, _)| at.clone()).collect();
            incomplete.retain(|_, (_, sent)| !is_done(sent));
            done
        };
        done.iter().for_each(|(root, path)| self.release(*root, path));
        !done.is_empty()
    }

    /// Whether the standby found any repository incomplete.
    pub fn has_incomplete(&self) -> bool {
        !self.incomplete.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// The repositories that the standby found incomplete.
    pub(crate) fn incomplete(&self) -> Vec<Repository> {
        self.incomplete.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Objects of a repository stay on the standby only for a reference that is held back.
    pub(crate) fn owe(&self, at: &Repository) {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner).insert(at.clone());
    }

    /// The repository is held back no longer; says whether objects of it wait for that.
    pub(crate) fn settle(&self, at: &Repository) -> bool {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner).remove(at)
    }

    /// Counts one more try that failed.
    pub(crate) fn note_again(&self, at: &Repository) -> u32 {
        let mut again = self.again.lock().unwrap_or_else(PoisonError::into_inner);
        let tries = again.entry(at.clone()).or_insert(0);
        *tries += 1;
        *tries
    }

    pub(crate) fn tries_of(&self, at: &Repository) -> u32 {
        self.again.lock().unwrap_or_else(PoisonError::into_inner).get(at).copied().unwrap_or(0)
    }

    pub(crate) fn forget_again(&self, at: &Repository) {
        self.again.lock().unwrap_or_else(PoisonError::into_inner).remove(at);
    }

    pub(crate) fn begin(&self) {
        self.cycle.fetch_add(1, Ordering::Relaxed);
    }

    /// After a look at everything: what was not met again is no longer a problem.
    pub(crate) fn forget_older(&self) {
        let cycle = self.cycle.load(Ordering::Relaxed);
        let mut problems = self.lock();
        problems.retain(|key, (_, at)| *at == cycle || self.is_incomplete(key));
        if problems.len() < HELD_MAX {
            self.unlisted.store(0, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(RootId, RelPath), (Problem, u64)>> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
