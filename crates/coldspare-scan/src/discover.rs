//! Finds the repositories that a cycle has to look at: below whole folders, and around hints.
//!
//! It says which repositories there are and nothing else: what it lists is no truth about any entry. A repository that
//! appears after it looked is left to the next cycle.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use coldspare_core::exclude::IsDir;
use coldspare_core::git::{self, CapturePass, family::Repository};
use coldspare_core::{RelPath, RootId, seeded_bug};
use coldspare_os::{Disk, FileKind, Listed};

use crate::capture::CaptureError;
use crate::dirty::{Hint, Names};
use crate::index::{Row, State};
use crate::run::Run;
use crate::unit::{Extent, IsMore, Unit};
use crate::visit::{Visit, What};

/// Hints, by the folder that they are in.
type ByFolder = BTreeMap<(RootId, RelPath), Names>;

impl<D: Disk> Run<'_, D> {
    /// Registers every repository below `dir`, or at it.
    ///
    /// Cost: one `getdents` pass over what is outside of repositories.
    pub(crate) fn discover<'s>(&'s self, scope: &rayon::Scope<'s>, root: RootId, dir: RelPath) {
        let disk = &self.capture.disk;
        // What can't be listed is reported by the pass that has to read it.
        let Ok(listed) = disk.open_dir(&self.root(root).dir, dir.as_bytes()).and_then(|open| disk.list(&open)) else { return };
        if git::is_repository(listed.iter().map(|l| (&l.name[..], kind_of(l.kind)))) {
            return self.register_full((root, dir));
        }
        for Listed { name, kind } in listed {
            let Ok(child) = dir.join(&name) else { continue };
            let is_dir = match kind {
                FileKind::Dir => true,
                FileKind::Unknown => self.is_dir(root, &child),
                _ => false,
            };
            if is_dir && !self.root(root).exclude.matches(&child, IsDir::Yes) {
                scope.spawn(move |scope| self.discover(scope, root, child));
            }
        }
    }

    /// Registers a repository of which everything is looked at.
    pub(crate) fn register_full(&self, at: Repository) {
        let (unit, is_more) = self.register(at, Extent::Full);
        if is_more == IsMore::No {
            return;
        }
        let (root, path) = unit.at.clone();
        let names = git::REFERENCE_NAMES.iter().map(|name| ((*name).into(), Hint::Replaced)).collect();
        let references = Visit { root, path: path.clone(), what: What::Names(names) };
        self.defer(CapturePass::References, references);
        let names = git::MENTIONING_NAMES.iter().map(|name| ((*name).into(), Hint::Replaced)).collect();
        self.defer(CapturePass::Mentions, Visit { root, path: path.clone(), what: What::Names(names) });
        if let Ok(objects) = path.join(b"objects") {
            self.defer(CapturePass::LooseObjects, Visit { root, path: objects, what: What::Deep });
        }
    }

    /// Brings hints to their passes and registers the repositories that they are in.
    ///
    /// Late ones, which come after references were read, hold none; a repository that only they know of is left to the
    /// next cycle by whoever meets it.
    pub(crate) fn route(&self, hints: &ByFolder, when: When) -> Result<(), CaptureError> {
        // Where not every folder is watched, a hint tells nothing of the other references.
        let is_covered = self.capture.watch.as_ref().is_none_or(|watch| watch.coverage().unwatched == 0);
        for ((root, dir), names) in self.with_unknown_folders(hints)?.iter() {
            let unit = self.units.of(*root, dir).map(|u| u.at.1.clone()).or_else(|| self.repository_around(*root, dir));
            let visit = Visit::hinted(*root, dir.clone(), names);
            let Some(unit) = unit else {
                if when == When::First {
                    self.discover_new(&visit);
                }
                self.defer(CapturePass::Rest, visit);
                continue;
            };
            let at = (*root, unit);
            let is_new = self.units.at(&at).is_none() && !self.was_repository(&at)?;
            if is_new && when == When::Late {
                // RACE: it became one since references were read. Worst case: it comes with the next changeset.
                self.keep(*root, &at.1);
                self.again(*root, &at.1);
                continue;
            }
            if when == When::First && (is_new || self.capture.held.is_held(&at) || self.capture.held.holds_reference_of(&at)) {
                // What was held back with it, or came before it was a repository, is found only by looking at all of it.
                self.register_full(at.clone());
                self.defer(CapturePass::Rest, Visit::deep(*root, at.1.clone()));
            } else if when == When::First && !is_covered {
                self.register_full(at.clone());
            } else {
                self.register(at.clone(), Extent::Hinted);
            }
            self.route_inside(&at, visit, when);
        }
        Ok(())
    }

    /// The hints, with the topmost folder that the index doesn't have in place of those in folders below it: a watch may
    /// tell of these before it tells that the folder was moved there, and nothing goes to the standby without the folder
    /// it is in. Hints in the topmost one stay: they tell of what came and went there.
    ///
    /// Cost: one look-up in the index a folder.
    fn with_unknown_folders<'h>(&self, hints: &'h ByFolder) -> Result<Cow<'h, ByFolder>, CaptureError> {
        let mut out = Cow::Borrowed(hints);
        for (root, dir) in hints.keys().filter(|(_, dir)| !dir.is_root()) {
            let is_known = |dir: &RelPath| Ok::<_, CaptureError>(self.is_claimed(*root, dir) || self.has_folder(*root, dir)?);
            if is_known(dir)? || seeded_bug!(UnknownFoldersAreLeftOut) {
                continue;
            }
            let mut top = dir.clone();
            while let Some(above) = top.parent().filter(|above| !above.is_root()) {
                if is_known(&above)? {
                    break;
                }
                top = above;
            }
            let is_excluded = self.root(*root).exclude.matches(&top, IsDir::Yes);
            let is_left_out = is_excluded || git::looks_transient(top.name()) && self.is_transient(*root, &top);
            if top == *dir && !is_left_out {
                continue;
            }
            let above = top.parent().unwrap_or_else(RelPath::root);
            let hints = out.to_mut();
            hints.remove(&(*root, dir.clone()));
            if is_left_out {
                continue;
            }
            match hints.entry((*root, above)).or_insert_with(|| Names::Some(BTreeMap::new())) {
                Names::All => {}
                Names::Some(names) => drop(names.insert(top.name().into(), Hint::Replaced)),
            }
        }
        Ok(out)
    }

    /// A hinted folder of a repository: each of its entries has a pass of its own.
    fn route_inside(&self, at: &Repository, visit: Visit, when: When) {
        let inside = visit.path.below(&at.1).unwrap_or_default().to_vec();
        let What::Names(names) = &visit.what else {
            let pass = CapturePass::of(&inside);
            if inside.is_empty() && when == When::First {
                self.register_full(at.clone());
            }
            return self.defer(pass, visit);
        };
        let mut by_pass: BTreeMap<CapturePass, BTreeMap<Box<[u8]>, Hint>> = BTreeMap::new();
        by_pass.insert(CapturePass::of(&inside), BTreeMap::new()); // the folder itself
        for (name, hint) in names {
            by_pass.entry(CapturePass::of(&join(&inside, name))).or_default().insert(name.clone(), *hint);
        }
        for (pass, names) in by_pass {
            self.defer(pass, Visit { what: What::Names(names), ..visit.clone() });
        }
    }

    /// The repository that `dir` is in, or is; asks the disk whether what looks like one is one.
    pub(crate) fn repository_around(&self, root: RootId, dir: &RelPath) -> Option<RelPath> {
        git::possible_repositories(dir).into_iter().find(|base| self.is_repository(root, base))
    }

    /// Whether the standby has a folder, as far as the index knows.
    pub(crate) fn has_folder(&self, root: RootId, dir: &RelPath) -> Result<bool, CaptureError> {
        Ok(dir.is_root() || self.snapshot.row(root, dir)?.is_some_and(|row| row.is_dir() && row.version != Row::UNSENT))
    }

    /// Whether the index has it as a repository.
    fn was_repository(&self, (root, path): &Repository) -> Result<bool, CaptureError> {
        let head = path.join(b"HEAD").ok().map(|head| self.snapshot.row(*root, &head)).transpose()?.flatten();
        Ok(head.is_some_and(|row| matches!(row.state, State::Present { .. })))
    }

    pub(crate) fn is_repository(&self, root: RootId, base: &RelPath) -> bool {
        let disk = &self.capture.disk;
        let Ok(dir) = disk.open_dir(&self.root(root).dir, base.as_bytes()) else { return false };
        let kind = |name: &'static [u8]| disk.stat(&dir, name).ok().map(|stat| (name, kind_of(stat.kind)));
        git::is_repository([&b"HEAD"[..], b"objects", b"refs"].into_iter().filter_map(kind))
    }

    /// Folders that may have come with a hint hold repositories that nobody was told of.
    fn discover_new(&self, visit: &Visit) {
        let Visit { root, path, what } = visit;
        let new: Vec<RelPath> = match what {
            What::Deep => vec![path.clone()],
            What::Names(names) => {
                let joined = names.iter().filter_map(|(name, hint)| Some((path.join(name).ok()?, *hint)));
                let is_new = |child: &RelPath, hint| hint == Hint::Replaced || !matches!(self.snapshot.row(*root, child), Ok(Some(_)));
                joined.filter(|(child, hint)| is_new(child, *hint) && self.is_dir(*root, child)).map(|(child, _)| child).collect()
            }
        };
        if !new.is_empty() {
            self.capture.pool.scope(|scope| {
                for dir in new {
                    scope.spawn(move |scope| self.discover(scope, *root, dir));
                }
            });
        }
    }

    /// Adds a repository; which directory it is, is looked up once.
    fn register(&self, at: Repository, extent: Extent) -> (Arc<Unit>, IsMore) {
        let ino = if self.units.at(&at).is_none() { self.ino_of(&at) } else { None };
        let waits = self.bulk.is_some_and(|bulk| bulk.is_parked(&at));
        let (unit, is_more) = self.units.add(at, extent, ino);
        if waits {
            unit.wait();
        }
        (unit, is_more)
    }

    /// The inode of a repository's directory.
    pub(crate) fn ino_of(&self, (root, path): &Repository) -> Option<u64> {
        let disk = &self.capture.disk;
        let dir = disk.open_dir(&self.root(*root).dir, path.as_bytes()).ok()?;
        disk.stat_dir(&dir).ok().map(|stat| stat.ino)
    }

    fn is_dir(&self, root: RootId, path: &RelPath) -> bool {
        let disk = &self.capture.disk;
        let dir = disk.open_dir(&self.root(root).dir, path.parent_bytes());
        dir.and_then(|dir| disk.stat(&dir, path.name())).is_ok_and(|stat| stat.kind == FileKind::Dir)
    }
}

/// As git's rules ask for it.
pub(crate) fn kind_of(kind: FileKind) -> git::Kind {
    match kind {
        FileKind::Dir => git::Kind::Folder,
        FileKind::File => git::Kind::File,
        _ => git::Kind::Other,
    }
}

/// When in a cycle hints are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// Before references are read.
    First,
    /// After that.
    Late,
}

/// `inside` with `name` below it.
pub(crate) fn join(inside: &[u8], name: &[u8]) -> Vec<u8> {
    if inside.is_empty() { name.to_vec() } else { [inside, b"/", name].concat() }
}
