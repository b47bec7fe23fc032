//! Folders that were renamed: the standby renames them too, and nothing of what is in them is sent.
//!
//! They travel in a changeset of their own, with nothing but the new folders above their new places. What else was
//! hinted, and what is new in them, comes with the changeset that follows.
//!
//! Only folders that have nothing to do with git are renamed on the standby: what is captured of a repository is captured
//! in git's order, under the name that it has.
//!
//! Invariants: a folder counts as renamed only if all that the index has of it stands unchanged at the new path, at least
//! one file among it, and the changeset that this one starts from has all of it: each file is then what the active had under
//! its new name (G2). Any other is captured as what is new, and what is gone.

use std::collections::{BTreeMap, BTreeSet};

use coldspare_core::git::{self, Part};
use coldspare_core::{Baseline, Body, Op, RelPath, RootId, seeded_bug};
use coldspare_os::{Disk, FileKind, Stat};

use crate::batch::Builder;
use crate::capture::{CaptureError, Certainty, Work};
use crate::dirty::{Hint, Hints, Names};
use crate::index::{Row, State};
use crate::run::Run;
use crate::visit::{Candidate, Standing, is_as_before};
use crate::writer::Change;

/// LIMIT: new folders in which renamed ones are looked for.
const NEW_FOLDERS_MAX: usize = 1_000;

/// A folder, and where it is now.
struct Renamed {
    root: RootId,
    from: RelPath,
    to: RelPath,
}

impl<D: Disk> Run<'_, D> {
    /// Hands over the folders among the hints that were renamed; says whether there were any.
    ///
    /// Cost: a look-up for each hinted entry that is not git's; for a renamed folder, one listing with metadata of each
    /// folder in it.
    pub(crate) fn renames(&self, hints: &Hints) -> Result<bool, CaptureError> {
        let cycle = self.cycle;
        // What was captured for a changeset that was given up must not be left to the next one: by its numbers it would
        // count as acknowledged with this one.
        let owes_nothing = cycle.baseline == Baseline::Delta(self.acked) && cycle.seq == self.acked.next();
        if cycle.work != Work::Hinted || cycle.certainty != Certainty::Sure || !owes_nothing && !seeded_bug!(RenamesLeaveWhatIsOwed) {
            return Ok(false);
        }
        let mut builder = Builder::default();
        let mut taken: BTreeSet<(RootId, RelPath)> = BTreeSet::new();
        for Renamed { root, from, to } in self.likely_renames(hints)? {
            if is_near(&taken, root, &from)
                || is_near(&taken, root, &to)
                || is_in_motion(hints, root, &[&from, &to])
                || !self.is_renamed(root, &from, &to)?
                || !self.has_place(root, &to, &mut builder)?
            {
                continue;
            }
            tracing::debug!(%from, %to, "renamed");
            taken.extend([(root, from.clone()), (root, to.clone())]);
            builder.change(Change::Renamed { root, from: from.clone(), to: to.clone(), version: cycle.seq });
            self.push(&mut builder, Op::Rename { root, from, to })?;
        }
        self.flush(&mut builder)?;
        Ok(!taken.is_empty())
    }

    /// Folders of the index that are not where they were, and are at a hinted path, or below it, as their inodes say.
    fn likely_renames(&self, hints: &Hints) -> Result<Vec<Renamed>, CaptureError> {
        let mut known: BTreeMap<(RootId, u64), RelPath> = BTreeMap::new();
        let mut new: Vec<(RootId, RelPath)> = Vec::new();
        for ((root, dir), names) in &hints.dirs {
            let Names::Some(names) = names else { continue };
            for name in names.iter().filter(|(_, hint)| **hint == Hint::Replaced).map(|(name, _)| name) {
                let Ok(path) = dir.join(name) else { continue };
                if git::part(&path) != Part::Other {
                    continue;
                }
                match self.snapshot.row(*root, &path)? {
                    Some(row) if row.is_dir() => drop(row.ino().and_then(|ino| known.insert((*root, ino), path))),
                    Some(Row { state: State::Present { .. }, .. }) => {}
                    Some(_) | None => new.push((*root, path)),
                }
            }
        }
        if known.is_empty() {
            return Ok(Vec::new());
        }
        let mut renamed = Vec::new();
        let mut dirs: Vec<(RootId, RelPath, Stat)> = Vec::new();
        for (root, to) in new {
            dirs.extend(self.stat_at(root, &to).filter(|stat| stat.kind == FileKind::Dir).map(|stat| (root, to, stat)));
        }
        let mut looked = 0;
        while let Some((root, to, stat)) = dirs.pop() {
            if let Some(from) = known.remove(&(root, stat.ino)) {
                renamed.push(Renamed { root, from, to });
                continue;
            }
            // A new folder may be one that it went into; where each folder has a watch of its own, nothing told of that.
            looked += 1;
            if looked > NEW_FOLDERS_MAX || known.is_empty() {
                continue;
            }
            let inside = self.list_at(root, &to).into_iter().flatten().filter(|(_, stat)| stat.kind == FileKind::Dir);
            dirs.extend(inside.filter_map(|(name, stat)| Some((root, to.join(&name).ok()?, stat))));
        }
        Ok(renamed)
    }

    /// Whether all that the index has at `from` is at `to` now, and may be renamed on the standby.
    fn is_renamed(&self, root: RootId, from: &RelPath, to: &RelPath) -> Result<bool, CaptureError> {
        let held = &self.capture.held;
        let is_in_repository = |path: &RelPath| path.ancestors().any(|above| self.is_repository(root, &above));
        if from.is_within(to) || to.is_within(from) || is_in_repository(from) || is_in_repository(to) {
            return Ok(false);
        }
        if held.covers(root, from) || held.covers(root, to) {
            return Ok(false); // what is held back may be in another state on the standby
        }
        let Some(stat) = self.stat_at(root, to) else { return Ok(false) };
        // The new path may be left out of replication.
        let parent = to.parent().unwrap_or_else(RelPath::root);
        let is_carried = self.carried(root, &parent, to.name(), &stat).is_some();
        let was = self.snapshot.row(root, from)?;
        if !is_carried || was.is_none_or(|row| row.version > self.acked || row.ino() != Some(stat.ino)) {
            return Ok(false);
        }
        let has_links = self.snapshot.has_links()?;
        let mut has_file = false;
        let mut dirs = vec![(from.clone(), to.clone())];
        while let Some((from, to)) = dirs.pop() {
            let Some(found) = self.list_at(root, &to) else { return Ok(false) };
            let rows = self.snapshot.children(root, &from)?;
            // What looks like one was one, or will be.
            let is_repository = |names: &mut dyn Iterator<Item = &[u8]>| git::is_repository(names.map(|name| (name, git::Kind::Other)));
            if is_repository(&mut rows.iter().map(|(name, _)| &name[..])) || is_repository(&mut found.keys().map(|name| &name[..])) {
                return Ok(false);
            }
            for (name, row) in rows {
                let State::Present { entry, .. } = &row.state else {
                    if row.version > self.acked {
                        return Ok(false); // the standby may still have it
                    }
                    continue;
                };
                let Some(stat) = found.get(&name).filter(|stat| row.version <= self.acked && row.ino() == Some(stat.ino)) else {
                    return Ok(false);
                };
                let is_one_of_several = matches!(entry.body, Body::Hardlink { .. }) || stat.kind == FileKind::File && stat.nlink > 1;
                if is_one_of_several || has_links && !row.is_dir() && !self.snapshot.names_of(stat.dev, stat.ino)?.is_empty() {
                    return Ok(false);
                }
                let (Ok(from), Ok(to)) = (from.join(&name), to.join(&name)) else { return Ok(false) }; // too long, there
                match (row.is_dir(), stat.kind == FileKind::Dir) {
                    (true, true) => dirs.push((from, to)),
                    // A removed folder's inode may be another's now; one with the same file in it is the same.
                    (false, false) if is_as_before(&row, stat) => has_file = true,
                    _ => return Ok(false),
                }
            }
        }
        Ok(has_file)
    }

    /// Whether the standby has the folder of `to`, or will have it with what is handed over here.
    fn has_place(&self, root: RootId, to: &RelPath, builder: &mut Builder) -> Result<bool, CaptureError> {
        for above in to.ancestors().filter(|above| !above.is_root()) {
            let row = self.snapshot.row(root, &above)?;
            if row.as_ref().is_some_and(|row| row.is_dir() && row.version <= self.acked) {
                continue;
            }
            let at_ms = self.capture.disk.now_ms();
            let parent = above.parent().unwrap_or_else(RelPath::root);
            let Some(stat) = self.stat_at(root, &above).filter(|stat| stat.kind == FileKind::Dir) else { return Ok(false) };
            let is_new = !row.as_ref().is_some_and(|row| matches!(row.state, State::Present { .. }));
            if !is_new || self.carried(root, &parent, above.name(), &stat).is_none() || self.capture.held.covers(root, &above) {
                return Ok(false);
            }
            let own = Candidate { root, path: above, stat, at_ms, row };
            if self.consider_dir(own, None, builder)? == Standing::Unknown {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn stat_at(&self, root: RootId, path: &RelPath) -> Option<Stat> {
        let disk = &self.capture.disk;
        disk.open_dir(&self.root(root).dir, path.parent_bytes()).and_then(|dir| disk.stat(&dir, path.name())).ok()
    }

    /// What is in a folder; `None` when that can't be told.
    fn list_at(&self, root: RootId, path: &RelPath) -> Option<BTreeMap<Box<[u8]>, Stat>> {
        let disk = &self.capture.disk;
        let listed = disk.open_dir(&self.root(root).dir, path.as_bytes()).and_then(|dir| disk.list_stat(&dir)).ok()?;
        Some(listed.into_iter().collect())
    }
}

/// Whether something in one of these folders was hinted: it may have changed within a tick of the clock that its row was
/// made in.
fn is_in_motion(hints: &Hints, root: RootId, folders: &[&RelPath]) -> bool {
    let has_names = |names: &Names| !matches!(names, Names::Some(set) if set.is_empty());
    folders.iter().any(|folder| {
        let near = hints.dirs.range((root, (*folder).clone())..);
        let mut near = near.take_while(|((r, dir), _)| *r == root && dir.as_bytes().starts_with(folder.as_bytes()));
        near.any(|((_, dir), names)| dir.is_within(folder) && has_names(names))
    })
}

/// Whether `path` is one of these, or in one, or has one in it.
fn is_near(paths: &BTreeSet<(RootId, RelPath)>, root: RootId, path: &RelPath) -> bool {
    let mut near = paths.range((root, path.clone())..).take_while(|(r, at)| *r == root && at.as_bytes().starts_with(path.as_bytes()));
    near.any(|(_, at)| at.is_within(path)) || path.ancestors().any(|above| paths.contains(&(root, above)))
}
