//! Since when each repository waits for a cycle: the lag of one among many.
//!
//! Invariants: a time is never later than the oldest change of its repository that is not yet taken.

use std::collections::BTreeMap;

use coldspare_core::git::{self, Part, family::Repository};
use coldspare_core::{RelPath, RootId};

/// Milliseconds since 1970, by repository.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Waiting(BTreeMap<Repository, u64>);

impl Waiting {
    /// Takes note of a change of `name` in `dir`, if that is in a repository by its shape.
    pub(crate) fn note(&mut self, root: RootId, dir: &RelPath, name: &[u8], ms: u64) {
        if let Some(base) = repository_of(dir, name) {
            self.0.entry((root, base)).or_insert(ms);
        }
    }

    /// Adds those of another, of two times the earlier.
    pub fn merge(&mut self, other: Waiting) {
        for (repository, ms) in other.0 {
            self.0.entry(repository).and_modify(|mine| *mine = ms.min(*mine)).or_insert(ms);
        }
    }

    /// Those of the repository that `dir` is, or is in.
    pub(crate) fn around(&self, root: RootId, dir: &RelPath) -> Waiting {
        let bases = dir.ancestors().chain([dir.clone()]);
        Waiting(bases.filter_map(|base| self.0.get_key_value(&(root, base)).map(|(k, ms)| (k.clone(), *ms))).collect())
    }

    /// Those of the repositories in `base`.
    pub(crate) fn within(&self, root: RootId, base: &RelPath) -> Waiting {
        let mine = self.0.iter().filter(|((r, path), _)| *r == root && (path.is_within(base) || base.is_within(path)));
        Waiting(mine.map(|(repository, ms)| (repository.clone(), *ms)).collect())
    }

    pub(crate) fn forget(&mut self, repository: &Repository) {
        self.0.remove(repository);
    }

    /// Each repository and its time, the earliest first.
    pub fn longest_first(self) -> Vec<(Repository, u64)> {
        let mut all: Vec<_> = self.0.into_iter().collect();
        all.sort_by_key(|(_, ms)| *ms);
        all
    }

    pub(crate) fn repositories(&self) -> impl Iterator<Item = &Repository> {
        self.0.keys()
    }
}

/// The repository that `name` in `dir` is of, by its shape.
fn repository_of(dir: &RelPath, name: &[u8]) -> Option<RelPath> {
    if let Some(base) = git::possible_repositories(dir).into_iter().next().filter(|base| base != dir) {
        return Some(base);
    }
    // `info/refs` is what git writes for servers that know nothing of git.
    let is_info = dir.name() == b"info" && name == b"refs";
    let is_of_its_own = !is_info && matches!(name, b"objects" | b"refs" | b"stash-refs" | b"reftable")
        || dir.join(name).is_ok_and(|path| matches!(git::part(&path), Part::PackedRefs | Part::Head));
    is_of_its_own.then(|| dir.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(s: &str) -> RelPath {
        RelPath::new(s.as_bytes()).unwrap()
    }

    #[test]
    fn a_change_is_of_the_repository_that_it_is_in() {
        let of = |dir: &str, name: &str| repository_of(&path(dir), name.as_bytes()).map(|base| base.to_string());
        assert_eq!(of("a/1/objects/ab", "cd"), Some("a/1".into()));
        assert_eq!(of("a/1/refs", ""), Some("a/1".into()));
        assert_eq!(of("a/1", "packed-refs"), Some("a/1".into()));
        assert_eq!(of("a/1", "HEAD"), Some("a/1".into()));
        assert_eq!(of("a/1", "refs"), Some("a/1".into()));
        assert_eq!(of("a/1", "config"), None);
        assert_eq!(of("a/1/info", "refs"), None);
        assert_eq!(of("a/1/objects/info", "packs"), Some("a/1".into()));
        assert_eq!(of("a", "1"), None);
    }

    #[test]
    fn of_two_times_the_earlier_counts() {
        let mut waiting = Waiting::default();
        waiting.note(RootId(0), &path("a/1/refs"), b"x", 5);
        waiting.note(RootId(0), &path("a/1/refs"), b"y", 9);
        waiting.note(RootId(0), &path("a/2/refs"), b"x", 7);
        let mut other = Waiting::default();
        other.note(RootId(0), &path("a/2/refs"), b"x", 3);
        waiting.merge(other);
        let order: Vec<_> = waiting.longest_first().into_iter().map(|((_, path), ms)| (path.to_string(), ms)).collect();
        assert_eq!(order, [("a/2".to_string(), 3), ("a/1".to_string(), 5)]);
    }
}
