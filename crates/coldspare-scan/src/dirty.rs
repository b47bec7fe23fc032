//! What the watch reported, until a cycle looks at it.
//!
//! Invariants: what is put in stays until `take`; past the limit the whole is replaced by "everything", never by less.

use std::collections::BTreeMap;

use coldspare_core::{RelPath, RootId};

use crate::waiting::Waiting;

/// What to look at in one directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Names {
    /// These entries of it, and the directory itself.
    Some(BTreeMap<Box<[u8]>, Hint>),
    /// All of it and all below it: what was replaced among so much is not known any more.
    All,
}

/// What is known of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hint {
    /// Its content or attributes changed.
    Changed,
    /// It came, went, or was exchanged: if it's a directory, all below it may be new.
    Replaced,
}

/// The set of hints.
#[derive(Debug, Default)]
pub struct Dirty {
    dirs: BTreeMap<(RootId, RelPath), Names>,
    names: usize,
    everything: bool,
    /// When the oldest of them was put in, in milliseconds since 1970.
    oldest_ms: Option<u64>,
    /// The same by repository.
    waiting: Waiting,
}

/// What one cycle looks at.
#[derive(Debug, Clone, Default)]
pub struct Hints {
    /// Whether everything is looked at.
    pub everything: bool,
    /// By directory.
    pub dirs: BTreeMap<(RootId, RelPath), Names>,
    /// When the oldest was reported, in milliseconds since 1970.
    pub oldest_ms: Option<u64>,
    /// The same by repository.
    pub waiting: Waiting,
}

/// LIMIT: names of one directory; more means all of them.
const NAMES_PER_DIR_MAX: usize = 256;
/// LIMIT: names altogether; more means everything.
const NAMES_MAX: usize = 200_000;

impl Dirty {
    /// Puts in that `name` in `dir` may have changed; an empty name is the directory itself.
    pub fn add(&mut self, root: RootId, dir: RelPath, name: &[u8], hint: Hint, now_ms: u64) {
        self.oldest_ms.get_or_insert(now_ms);
        if self.everything {
            return;
        }
        let waiting = &mut self.waiting;
        let key = (root, dir);
        let names = self.dirs.entry(key.clone()).or_insert_with(|| {
            self.names += 1;
            waiting.note(root, &key.1, name, now_ms);
            Names::Some(BTreeMap::new())
        });
        if let Names::Some(set) = names
            && !name.is_empty()
        {
            let known = set.entry(name.into()).or_insert_with(|| {
                self.names += 1;
                waiting.note(root, &key.1, name, now_ms);
                hint
            });
            *known = (*known).max(hint);
            // Which directories were replaced must not be forgotten; they are few.
            if set.len() > NAMES_PER_DIR_MAX && set.values().all(|h| *h == Hint::Changed) {
                self.names -= set.len();
                *names = Names::All;
            }
        }
        if self.names > NAMES_MAX {
            self.add_everything(now_ms);
        }
    }

    /// Puts in that anything may have changed.
    pub fn add_everything(&mut self, now_ms: u64) {
        self.oldest_ms.get_or_insert(now_ms);
        self.everything = true;
        self.dirs.clear();
        self.waiting = Waiting::default();
        self.names = 0;
    }

    /// Puts back what a failed cycle took.
    pub fn restore(&mut self, hints: Hints) {
        let at = hints.oldest_ms.unwrap_or_default();
        self.waiting.merge(hints.waiting);
        if hints.everything {
            self.everything = true;
            self.dirs.clear();
            self.names = 0;
        }
        let dirs = if self.everything { BTreeMap::new() } else { hints.dirs };
        if self.everything {
            self.waiting = Waiting::default();
        }
        for ((root, dir), names) in dirs {
            match names {
                Names::Some(set) => {
                    self.add(root, dir.clone(), b"", Hint::Changed, at);
                    for (name, hint) in set {
                        self.add(root, dir.clone(), &name, hint, at);
                    }
                }
                Names::All => match self.dirs.insert((root, dir), Names::All) {
                    Some(Names::Some(set)) => self.names -= set.len(),
                    Some(Names::All) => {}
                    None => self.names += 1,
                },
            }
        }
        if let Some(ms) = hints.oldest_ms {
            self.oldest_ms = Some(self.oldest_ms.map_or(ms, |mine| mine.min(ms)));
        }
    }

    /// Whether only a look at everything will do.
    pub fn is_everything(&self) -> bool {
        self.everything
    }

    /// Whether there is nothing to look at.
    pub fn is_empty(&self) -> bool {
        !self.everything && self.dirs.is_empty()
    }

    /// Whether `path` is hinted, or what is directly in it, or that a folder above it was replaced.
    pub fn knows(&self, root: RootId, path: &RelPath) -> bool {
        self.everything || know(&self.dirs, root, path)
    }

    /// When the oldest hint was put in, in milliseconds since 1970.
    pub fn oldest_ms(&self) -> Option<u64> {
        self.oldest_ms
    }

    /// Since when repositories wait; nothing while all of the home is to be looked at.
    pub fn waiting(&self) -> &Waiting {
        &self.waiting
    }

    /// Takes all of it; a cycle that looks at everything takes the hints too.
    pub fn take(&mut self) -> Hints {
        self.names = 0;
        let everything = std::mem::take(&mut self.everything);
        let waiting = std::mem::take(&mut self.waiting);
        Hints { everything, dirs: std::mem::take(&mut self.dirs), oldest_ms: self.oldest_ms.take(), waiting }
    }

    /// Takes the hints for which `wanted` says so, leaving the others: it is asked for each name in each folder, and
    /// with no name for a folder itself.
    pub fn take_where(&mut self, wanted: impl Fn(&RelPath, Option<&[u8]>) -> bool) -> Hints {
        let keys: Vec<_> = self.dirs.keys().cloned().collect();
        self.take_from(keys, wanted)
    }

    /// As [`Dirty::take_where`], of what is in `base` or is it; `wanted` is asked with paths below `base`.
    pub fn take_names(&mut self, root: RootId, base: &RelPath, wanted: impl Fn(&[u8]) -> bool) -> Hints {
        let keys = self.keys_within(root, base);
        self.take_from(keys, |dir, name| {
            let inside = dir.below(base).unwrap_or_default();
            match name {
                None => wanted(inside),
                Some(name) => wanted(&crate::discover::join(inside, name)),
            }
        })
    }

    /// Calls `each` with every hinted path in `base`, as its folder and its name; without a name where all of a folder
    /// is hinted.
    pub fn for_each_within(&self, root: RootId, base: &RelPath, mut each: impl FnMut(&RelPath, Option<(&[u8], Hint)>)) {
        for key in self.keys_within(root, base) {
            match &self.dirs[&key] {
                Names::All => each(&key.1, None),
                Names::Some(set) => set.iter().for_each(|(name, hint)| each(&key.1, Some((name, *hint)))),
            }
        }
    }

    fn keys_within(&self, root: RootId, base: &RelPath) -> Vec<(RootId, RelPath)> {
        let from = (root, base.clone());
        let near = self.dirs.range(from..).map(|(key, _)| key);
        let near = near.take_while(|(r, path)| *r == root && path.as_bytes().starts_with(base.as_bytes()));
        near.filter(|(_, path)| path.is_within(base)).cloned().collect()
    }

    fn take_from(&mut self, keys: Vec<(RootId, RelPath)>, wanted: impl Fn(&RelPath, Option<&[u8]>) -> bool) -> Hints {
        let mut dirs = BTreeMap::new();
        let mut waiting = Waiting::default();
        for key in keys {
            let Some(names) = self.dirs.remove(&key) else { continue };
            waiting.merge(self.waiting.around(key.0, &key.1));
            let is_wanted = wanted(&key.1, None);
            match names {
                Names::Some(set) => {
                    self.names -= set.len() + 1;
                    let (mine, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
                        set.into_iter().partition(|(name, _)| wanted(&key.1, Some(name)));
                    if !others.is_empty() || (mine.is_empty() && !is_wanted) {
                        self.names += others.len() + 1;
                        self.dirs.insert(key.clone(), Names::Some(others));
                    }
                    if !mine.is_empty() || is_wanted {
                        dirs.insert(key, Names::Some(mine));
                    }
                }
                Names::All if is_wanted => {
                    self.names -= 1;
                    dirs.insert(key, Names::All);
                }
                Names::All => drop(self.dirs.insert(key, Names::All)),
            }
        }
        for repository in waiting.repositories() {
            if self.keys_within(repository.0, &repository.1).is_empty() {
                self.waiting.forget(repository);
            }
        }
        let oldest_ms = self.oldest_ms;
        if self.is_empty() {
            self.oldest_ms = None;
        }
        Hints { everything: false, dirs, oldest_ms, waiting }
    }
}

/// Whether hints tell of `path` or of what is directly in it, or that a folder above it was replaced.
fn know(dirs: &BTreeMap<(RootId, RelPath), Names>, root: RootId, path: &RelPath) -> bool {
    let names = |dir: RelPath| dirs.get(&(root, dir));
    if names(path.clone()).is_some() {
        return true;
    }
    path.ancestors().any(|above| match names(above.clone()) {
        Some(Names::All) => true,
        Some(Names::Some(set)) => {
            let mut below = path.below(&above).unwrap_or_default().split(|&b| b == b'/');
            let hint = below.next().and_then(|first| set.get(first));
            // That a folder changed tells nothing of what is in it.
            hint.is_some_and(|hint| *hint == Hint::Replaced || below.next().is_none())
        }
        None => false,
    })
}

impl Hints {
    /// Whether they tell of `path` or of what is directly in it, or that a folder above it was replaced.
    pub(crate) fn know(&self, root: RootId, path: &RelPath) -> bool {
        know(&self.dirs, root, path)
    }

    /// Adds the hints of `late`.
    pub fn merge(&mut self, late: Hints) {
        self.everything |= late.everything;
        self.waiting.merge(late.waiting);
        self.oldest_ms = self.oldest_ms.into_iter().chain(late.oldest_ms.filter(|_| !late.dirs.is_empty())).min();
        for (key, names) in late.dirs {
            match (self.dirs.get_mut(&key), names) {
                (Some(Names::All), _) => {}
                (Some(Names::Some(mine)), Names::Some(more)) => {
                    for (name, hint) in more {
                        mine.entry(name).and_modify(|known| *known = hint.max(*known)).or_insert(hint);
                    }
                }
                (_, names) => drop(self.dirs.insert(key, names)),
            }
        }
    }

    /// Those of them that are in `base`, or are it.
    pub fn within(&self, root: RootId, base: &RelPath) -> Hints {
        let dirs = self.dirs.iter().filter(|((r, path), _)| *r == root && path.is_within(base));
        let dirs = dirs.map(|(key, names)| (key.clone(), names.clone())).collect();
        Hints { everything: false, dirs, oldest_ms: self.oldest_ms, waiting: self.waiting.within(root, base) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(s: &str) -> RelPath {
        RelPath::new(s.as_bytes()).unwrap()
    }

    #[test]
    fn too_many_names_mean_more_work_never_less() {
        let mut dirty = Dirty::default();
        for i in 0..=NAMES_PER_DIR_MAX {
            dirty.add(RootId(0), path("d"), format!("f{i}").as_bytes(), Hint::Changed, 5);
        }
        let hints = dirty.take();
        assert_eq!(hints.dirs[&(RootId(0), path("d"))], Names::All);
        assert_eq!(hints.oldest_ms, Some(5));
        assert!(dirty.is_empty());
        for i in 0..=NAMES_MAX {
            dirty.add(RootId(0), path(&format!("d{i}")), b"f", Hint::Changed, 7);
        }
        assert!(dirty.is_everything());
    }

    #[test]
    fn restored_hints_join_newer_ones() {
        let mut dirty = Dirty::default();
        dirty.add(RootId(0), path("d"), b"a", Hint::Replaced, 5);
        let hints = dirty.take();
        dirty.add(RootId(0), path("d"), b"a", Hint::Changed, 9);
        dirty.add(RootId(0), path("d"), b"b", Hint::Changed, 9);
        dirty.restore(hints);
        assert_eq!(dirty.oldest_ms(), Some(5));
        let Names::Some(names) = &dirty.take().dirs[&(RootId(0), path("d"))] else { panic!("names are few") };
        assert_eq!(names.iter().map(|(n, h)| (&n[..], *h)).collect::<Vec<_>>(), [(&b"a"[..], Hint::Replaced), (b"b", Hint::Changed)]);
    }

    #[test]
    fn a_failed_look_at_everything_is_still_due() {
        let mut dirty = Dirty::default();
        dirty.add_everything(5);
        let hints = dirty.take();
        assert!(hints.everything && dirty.is_empty());
        dirty.add(RootId(0), path("d"), b"a", Hint::Changed, 9);
        dirty.restore(hints);
        assert!(dirty.is_everything());
        assert_eq!(dirty.oldest_ms(), Some(5));
    }

    #[test]
    fn a_wider_hint_is_not_narrowed_by_restoring() {
        let mut dirty = Dirty::default();
        let all = Hints { dirs: [((RootId(0), path("d")), Names::All)].into(), oldest_ms: Some(1), ..Hints::default() };
        dirty.add(RootId(0), path("d"), b"a", Hint::Replaced, 9);
        dirty.restore(all);
        assert_eq!(dirty.take().dirs[&(RootId(0), path("d"))], Names::All);
    }

    #[test]
    fn each_repository_waits_since_its_own_first_change() {
        let of = |waiting: &Waiting| -> Vec<(String, u64)> {
            waiting.clone().longest_first().into_iter().map(|((_, path), ms)| (path.to_string(), ms)).collect()
        };
        let mut dirty = Dirty::default();
        dirty.add(RootId(0), path("r/objects/ab"), b"c", Hint::Changed, 1);
        dirty.add(RootId(0), path("r/refs"), b"x", Hint::Changed, 2);
        dirty.add(RootId(0), path("s"), b"packed-refs", Hint::Changed, 3);
        dirty.add(RootId(0), path("plain"), b"f", Hint::Changed, 4);
        assert_eq!(of(dirty.waiting()), [("r".to_string(), 1), ("s".to_string(), 3)]);
        let late = dirty.take_names(RootId(0), &path("r"), |inside| inside.starts_with(b"objects"));
        assert_eq!(of(&late.waiting), [("r".to_string(), 1)]);
        assert_eq!(of(dirty.waiting()), [("r".to_string(), 1), ("s".to_string(), 3)], "some of it is left");
        dirty.take_names(RootId(0), &path("r"), |_| true);
        assert_eq!(of(dirty.waiting()), [("s".to_string(), 3)]);
        dirty.restore(late);
        assert_eq!(of(dirty.waiting()), [("r".to_string(), 1), ("s".to_string(), 3)]);
        let taken = dirty.take();
        assert_eq!((of(&taken.waiting).len(), of(dirty.waiting()).len()), (2, 0));
        dirty.add_everything(9);
        dirty.restore(taken);
        assert_eq!(of(dirty.waiting()), []);
    }

    #[test]
    fn nothing_waits_once_the_last_part_was_taken() {
        let mut dirty = Dirty::default();
        dirty.add(RootId(0), path("r/objects/ab"), b"c", Hint::Changed, 1);
        dirty.add(RootId(0), path("r/refs"), b"x", Hint::Changed, 2);
        assert_eq!(dirty.take_names(RootId(0), &path("r"), |inside| inside.starts_with(b"objects")).oldest_ms, Some(1));
        assert_eq!(dirty.oldest_ms(), Some(1), "some of it is left");
        assert_eq!(dirty.take_names(RootId(0), &path("r"), |_| true).oldest_ms, Some(1));
        assert_eq!(dirty.oldest_ms(), None);
    }

    #[test]
    fn part_of_the_hints_can_be_taken() {
        let mut dirty = Dirty::default();
        dirty.add(RootId(0), path("r/objects/ab"), b"c", Hint::Changed, 1);
        dirty.add(RootId(0), path("r/refs"), b"x", Hint::Changed, 2);
        dirty.add(RootId(0), path("r"), b"HEAD", Hint::Changed, 2);
        dirty.add(RootId(0), path("r"), b"config", Hint::Changed, 2);
        dirty.add(RootId(0), path("r-2/objects/ab"), b"c", Hint::Changed, 1);
        let taken = dirty.take_names(RootId(0), &path("r"), |inside| inside.starts_with(b"objects") || inside == b"config");
        let dirs: Vec<String> = taken.dirs.keys().map(|(_, p)| p.to_string()).collect();
        assert_eq!(dirs, ["r", "r/objects/ab"]);
        let taken = dirty.take_where(|dir, _| dir.as_bytes().starts_with(b"r-2"));
        assert_eq!(taken.dirs.len(), 1);
        let left = dirty.take().dirs;
        assert_eq!(left.len(), 2, "{left:?}");
        let Names::Some(names) = &left[&(RootId(0), path("r"))] else { panic!("names are few") };
        assert_eq!(names.keys().map(|n| &n[..]).collect::<Vec<_>>(), [b"HEAD"]);
        assert_eq!(dirty.names, 0);
    }
}
