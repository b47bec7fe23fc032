//! Looks at directories, in parallel, and finds what differs from the index.
//!
//! Invariants:
//! - a directory is watched before it is read;
//! - what belongs to another pass is left to it;
//! - what can't be read is never taken for gone.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use coldspare_core::exclude::IsDir;
use coldspare_core::git::{self, CapturePass};
use coldspare_core::{Baseline, Body, Op, PathError, Problem, ProblemKind, RelPath, RootId, seeded_bug};
use coldspare_os::{Disk, FileKind, Stat};

use crate::batch::Builder;
use crate::bulk::FILE_BYTES_MAX;
use crate::capture::{CaptureError, Work};
use crate::dirty::{Hint, Names};
use crate::discover::{join, kind_of};
use crate::graphs::{self, GraphFolder};
use crate::index::{Row, State, Witness};
use crate::links::is_linked;
use crate::read::{Outcome, is_racy};
use crate::run::{Claim, Met, Run, Seen, lock};
use crate::unit::{Extent, Fate, Unit};
use crate::writer::Change;

/// A directory to look at.
#[derive(Debug, Clone)]
pub(crate) struct Visit {
    pub(crate) root: RootId,
    pub(crate) path: RelPath,
    pub(crate) what: What,
}

/// What to look at in a directory.
#[derive(Debug, Clone)]
pub(crate) enum What {
    /// All of it and all below it.
    Deep,
    /// These entries of it, and what is new below.
    Names(BTreeMap<Box<[u8]>, Hint>),
}

/// Whether the standby has a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It has, or will have.
    Known,
    /// It may not.
    Unknown,
}

/// A path that may have changed.
pub(crate) struct Candidate {
    pub(crate) root: RootId,
    pub(crate) path: RelPath,
    pub(crate) stat: Stat,
    /// When it was examined at the earliest, in milliseconds since 1970.
    pub(crate) at_ms: u64,
    pub(crate) row: Option<Row>,
}

/// The directory that is being looked at.
struct Place<'v> {
    root: RootId,
    path: &'v RelPath,
    dev: u64,
    at_ms: u64,
    unit: Option<Arc<Unit>>,
    /// Its path below the repository that it is in.
    inside: Vec<u8>,
    pass: CapturePass,
}

/// How many directories are opened before the watch is waited for.
const PACE: u64 = 512;
/// How often a folder of packs is listed before its repository is left to the next cycle.
const PACK_LISTS: usize = 8;

impl Visit {
    pub(crate) fn deep(root: RootId, path: RelPath) -> Visit {
        Visit { root, path, what: What::Deep }
    }

    pub(crate) fn hinted(root: RootId, path: RelPath, names: &Names) -> Visit {
        let what = match names {
            Names::All => What::Deep,
            Names::Some(set) => What::Names(set.clone()),
        };
        Visit { root, path, what }
    }
}

impl Place<'_> {
    /// When an entry of this directory is captured.
    fn pass_of(&self, name: &[u8]) -> CapturePass {
        if self.unit.is_some() { CapturePass::of(&join(&self.inside, name)) } else { CapturePass::Rest }
    }

    fn is_of_objects(&self) -> bool {
        matches!(self.pass, CapturePass::LooseObjects | CapturePass::Packs)
    }

    /// An entry that was seen, or hinted, is gone.
    fn note_vanished(&self, name: &[u8]) {
        if self.is_of_objects()
            && !git::looks_transient(name)
            && let (Some(unit), Ok(path)) = (&self.unit, self.path.join(name))
        {
            unit.note_vanished(path);
        }
    }
}

impl<D: Disk> Run<'_, D> {
    pub(crate) fn visit<'s>(&'s self, scope: &rayon::Scope<'s>, visit: Visit, pass: CapturePass) {
        if self.is_stopped() {
            return;
        }
        let mut builder = lock(&self.builders).pop().unwrap_or_default();
        let result = self.look(visit, pass, &mut builder, &mut |more| scope.spawn(move |scope| self.visit(scope, more, pass)));
        lock(&self.builders).push(builder);
        if let Err(e) = result {
            self.fail(e);
        }
    }

    /// Looks at one directory in a pass; `more` is called with directories below it that belong to the same pass.
    pub(crate) fn look(
        &self,
        visit: Visit,
        pass: CapturePass,
        builder: &mut Builder,
        more: &mut dyn FnMut(Visit),
    ) -> Result<(), CaptureError> {
        let Visit { root, path, what } = visit;
        tracing::trace!(?pass, %path, ?what, "look");
        let disk = &self.capture.disk;
        self.cover(root, &path);
        let at_ms = disk.now_ms();
        let dir = match disk.open_dir(&self.root(root).dir, path.as_bytes()) {
            Ok(dir) => dir,
            // Gone, or no directory any more: the directory above it, which changed with it, is looked at too.
            Err(e) if is_vanished(&e) => {
                self.note_vanished_dir(root, &path, &what);
                return Ok(());
            }
            Err(e) => {
                self.hold(root, &path, ProblemKind::Unreadable, format!("the folder can't be opened: {e}"));
                return Ok(());
            }
        };
        let examined = disk.stat_dir(&dir).and_then(|stat| match what {
            What::Names(_) => Ok((stat, Vec::new())),
            What::Deep => Ok((stat, disk.list_stat(&dir)?)),
        });
        let (stat, listed) = match examined {
            Ok(all) => all,
            // Removed since it was opened.
            Err(e) if is_vanished(&e) => {
                self.note_vanished_dir(root, &path, &what);
                return Ok(());
            }
            Err(e) => {
                self.hold(root, &path, ProblemKind::Unreadable, format!("the folder can't be examined: {e}"));
                return Ok(());
            }
        };
        let unit = self.units.of(root, &path);
        let is_repository = || match &what {
            What::Deep => git::is_repository(listed.iter().map(|(name, stat)| (&name[..], kind_of(stat.kind)))),
            // Whoever hinted it looked for one around it; who found it by looking did that before references were read.
            What::Names(_) => self.cycle.work == Work::Everything && self.is_repository(root, &path),
        };
        if unit.is_none() && is_repository() {
            // RACE: a repository that appeared since they were looked for; its references were not read before its
            // objects. Worst case: it comes with the next changeset.
            self.keep(root, &path);
            self.again(root, &path);
            return Ok(());
        }
        let inside = unit.as_ref().and_then(|u| path.below(&u.at.1)).unwrap_or_default().to_vec();
        let place = Place { root, path: &path, dev: stat.dev, at_ms, unit, inside, pass };
        if !self.meet(root, &path, Met::There) {
            // RACE: it came back since it was met as gone. Worst case: it comes with the next changeset.
            self.again(root, &path);
            return Ok(());
        }
        let row = self.snapshot.row(root, &path)?;
        let own = Candidate { root, path: path.clone(), stat, at_ms, row };
        if self.consider_dir(own, place.unit.as_deref(), builder)? == Standing::Unknown {
            return Ok(()); // what is below has no place on the standby
        }
        if place.unit.is_some() && place.inside == graphs::FOLDER {
            let dev = place.dev;
            lock(&self.graphs).insert(GraphFolder { root, path, dev });
            return Ok(());
        }
        match what {
            What::Names(names) => {
                let (found, known) = self.hinted_entries(&dir, &place, &names)?;
                self.look_at_entries(&place, found, known, Some(&names), builder, more)
            }
            What::Deep if place.inside == b"objects/pack" => self.look_at_packs(&dir, &place, listed, builder, more),
            What::Deep => {
                if place.pass == CapturePass::LooseObjects
                    && let Some(unit) = place.unit.as_ref().filter(|unit| *lock(&unit.extent) == Extent::Hinted)
                {
                    unit.note_folder_met();
                }
                let known = self.snapshot.children(root, &path)?.into_iter().collect();
                self.look_at_entries(&place, listed, known, None, builder, more)
            }
        }
    }

    /// Has a directory watched that is about to be opened.
    pub(crate) fn cover(&self, root: RootId, path: &RelPath) {
        let Some(watch) = &self.capture.watch else { return };
        watch.cover(root, path);
        if self.opened.fetch_add(1, Ordering::Relaxed) % PACE == PACE - 1 {
            watch.catch_up();
        }
    }

    /// A directory that was found or hinted is gone: with folders of objects went what references may need.
    fn note_vanished_dir(&self, root: RootId, path: &RelPath, what: &What) {
        let Some(unit) = self.units.of(root, path) else { return };
        let inside = path.below(&unit.at.1).unwrap_or_default();
        match (inside, what) {
            (b"objects" | b"objects/pack", _) => unit.again("its objects went while it was read"),
            (_, What::Names(names)) if inside.starts_with(b"objects/") => {
                names
                    .keys()
                    .filter(|name| !git::looks_transient(name))
                    .for_each(|name| path.join(name).into_iter().for_each(|p| unit.note_vanished(p)));
            }
            (_, What::Deep) if inside.starts_with(b"objects/") => unit.note_vanished(path.clone()), // nobody knows what was in it
            _ => {}
        }
    }

    /// What is there of the hinted entries, and what the index knows of them.
    #[allow(clippy::type_complexity)] // names with what is known of each
    fn hinted_entries(
        &self,
        dir: &D::Dir,
        place: &Place<'_>,
        names: &BTreeMap<Box<[u8]>, Hint>,
    ) -> Result<(Vec<(Box<[u8]>, Stat)>, BTreeMap<Box<[u8]>, Row>), CaptureError> {
        let (mut found, mut known) = (Vec::new(), BTreeMap::new());
        for name in names.keys() {
            match self.capture.disk.stat(dir, name) {
                Ok(stat) => found.push((name.clone(), stat)),
                Err(e) if is_vanished(&e) => {}
                Err(e) => {
                    self.hold_name(place.root, place.path, name, format!("can't be examined: {e}"));
                    continue;
                }
            }
            let is_there = found.last().is_some_and(|(last, _)| last == name);
            if let Ok(below) = place.path.join(name)
                && let Some(row) = self.snapshot.row(place.root, &below)?
            {
                known.insert(name.clone(), row);
            } else if !is_there {
                place.note_vanished(name); // it came and went
                if let Ok(path) = place.path.join(name) {
                    if self.is_claimed(place.root, &path) {
                        self.again(place.root, &path); // but was handed over before it went
                    }
                    self.capture.held.forget_within(place.root, &path);
                }
            }
        }
        Ok((found, known))
    }

    /// A folder of packs is listed again after it was read, until nothing more goes: a repack may put a pack where the
    /// listing has passed and remove another before it gets there.
    fn look_at_packs(
        &self,
        dir: &D::Dir,
        place: &Place<'_>,
        listed: Vec<(Box<[u8]>, Stat)>,
        builder: &mut Builder,
        more: &mut dyn FnMut(Visit),
    ) -> Result<(), CaptureError> {
        let mut known: BTreeMap<_, _> = self.snapshot.children(place.root, place.path)?.into_iter().collect();
        let losses = || place.unit.as_ref().map_or(0, |unit| unit.losses());
        let mut seen: BTreeSet<Box<[u8]>> = BTreeSet::new();
        let mut found = listed;
        for round in 0..PACK_LISTS {
            let before = losses();
            // Packs under way come and go.
            let lasting = found.iter().filter(|(name, _)| !git::looks_transient(name));
            let now: BTreeSet<Box<[u8]>> = lasting.map(|(name, _)| name.clone()).collect();
            let has_lost = seen.iter().any(|name| !now.contains(name));
            found.retain(|(name, _)| !seen.contains(name));
            seen = now;
            let mine = found.iter().filter_map(|(name, _)| known.remove_entry(name)).collect();
            self.look_at_entries(place, found, mine, None, builder, more)?;
            if round > 0 && !has_lost && losses() == before {
                // What the index knows and no listing had is gone.
                return self.look_at_entries(place, Vec::new(), known, None, builder, more);
            }
            found = match self.capture.disk.list_stat(dir) {
                Ok(again) => again,
                Err(e) if is_vanished(&e) => break,
                Err(e) => {
                    self.hold(place.root, place.path, ProblemKind::Unreadable, format!("the folder can't be examined: {e}"));
                    return Ok(());
                }
            };
        }
        if let Some(unit) = &place.unit {
            unit.again("its packs kept changing while they were read");
        }
        Ok(())
    }

    /// Compares entries of a directory with what the index knows of them; `known` that isn't found is gone.
    fn look_at_entries(
        &self,
        place: &Place<'_>,
        mut found: Vec<(Box<[u8]>, Stat)>,
        mut known: BTreeMap<Box<[u8]>, Row>,
        hints: Option<&BTreeMap<Box<[u8]>, Hint>>,
        builder: &mut Builder,
        more: &mut dyn FnMut(Visit),
    ) -> Result<(), CaptureError> {
        let (root, path) = (place.root, place.path);
        self.counters.entries.fetch_add(found.len() as u64, Ordering::Relaxed);
        // A pack's index comes after all that belongs to the pack.
        found.sort_by(|a, b| (is_pack_index(&a.0), &a.0).cmp(&(is_pack_index(&b.0), &b.0)));
        let mut missing_packs = BTreeSet::new();
        let mut later: BTreeMap<CapturePass, BTreeMap<Box<[u8]>, Hint>> = BTreeMap::new();
        let is_partly = place.unit.as_ref().is_some_and(|unit| *lock(&unit.extent) == Extent::Hinted);
        let mut is_mine = |name: &[u8]| {
            let pass = place.pass_of(name);
            if pass > place.pass {
                let hint = hints.and_then(|h| h.get(name)).copied().unwrap_or(Hint::Replaced);
                later.entry(pass).or_default().insert(name.into(), hint);
            }
            if pass < place.pass
                && (hints.is_some() || is_partly)
                && let Ok(path) = path.join(name)
            {
                // It was not known to be a repository's when its pass was.
                self.again(root, &path);
            }
            pass == place.pass
        };
        for (name, stat) in found {
            let row = known.remove(&name);
            if !is_mine(&name) {
                continue;
            }
            let Some(child) = self.carried(root, path, &name, &stat) else {
                if let Some(row) = row {
                    self.gone(place, &name, row, builder)?;
                }
                continue;
            };
            let candidate = Candidate { root, path: child, stat, at_ms: place.at_ms, row };
            self.leave_links(place.dev, &candidate)?;
            if stat.kind == FileKind::Dir {
                more(self.below(candidate, hints, &name));
                continue;
            }
            if is_pack_index(&name) && missing_packs.contains(stem(&name)) {
                self.keep(root, &candidate.path); // without its pack it would be no use, and harm
                continue;
            }
            let outcome = self.consider(candidate, place.unit.as_deref(), builder)?;
            if outcome == Some(Outcome::Vanished) {
                place.note_vanished(&name);
            }
            if matches!(outcome, Some(Outcome::Held | Outcome::Vanished)) && name.ends_with(b".pack") {
                missing_packs.insert(stem(&name).to_vec());
            }
        }
        for (name, row) in known {
            if is_mine(&name) {
                self.gone(place, &name, row, builder)?;
            }
        }
        for (pass, names) in later {
            self.defer(pass, Visit { root, path: path.clone(), what: What::Names(names) });
        }
        Ok(())
    }

    /// The path of an entry, when it is replicated at all.
    pub(crate) fn carried(&self, root: RootId, dir_path: &RelPath, name: &[u8], stat: &Stat) -> Option<RelPath> {
        let path = match dir_path.join(name) {
            Ok(path) => path,
            Err(PathError::Control) => return None,
            Err(e) => {
                self.hold_name(root, dir_path, name, e.to_string());
                return None;
            }
        };
        let is_dir = if stat.kind == FileKind::Dir { IsDir::Yes } else { IsDir::No };
        if self.root(root).exclude.matches(&path, is_dir) {
            return None;
        }
        if git::looks_transient(name) && self.is_transient(root, &path) {
            return None;
        }
        match stat.kind {
            FileKind::File | FileKind::Dir | FileKind::Symlink => Some(path),
            FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice | FileKind::Unknown => {
                self.counters.special.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }

    /// Whether git never means `path` to last: asks which of the directories above it is a repository.
    pub(crate) fn is_transient(&self, root: RootId, path: &RelPath) -> bool {
        let ancestors: Vec<_> = path.ancestors().collect();
        let repository = ancestors.iter().rev().find(|base| self.is_repository(root, base));
        repository.is_some_and(|base| path.below(base).is_some_and(git::never_carried))
    }

    /// What to look at in a directory that was found.
    fn below(&self, child: Candidate, hints: Option<&BTreeMap<Box<[u8]>, Hint>>, name: &[u8]) -> Visit {
        let Candidate { root, path, stat, row, .. } = child;
        let known = row.is_some_and(|row| row.is_dir() && row.ino() == Some(stat.ino));
        let what = match hints {
            Some(names) if known && names.get(name) != Some(&Hint::Replaced) => What::Names(BTreeMap::new()), // itself
            Some(_) | None => What::Deep,
        };
        Visit { root, path, what }
    }

    /// An entry that the index has and the directory doesn't.
    fn gone(&self, place: &Place<'_>, name: &[u8], row: Row, builder: &mut Builder) -> Result<(), CaptureError> {
        let (root, unit) = (place.root, place.unit.as_deref());
        let Ok(path) = place.path.join(name) else { return Ok(()) };
        tracing::trace!(%path, version = %row.version, "gone");
        let is_news = matches!(row.state, State::Present { .. }) || row.version == Row::UNSENT;
        if !is_news && row.version <= self.acked {
            return Ok(());
        }
        if let Some(unit) = unit.filter(|unit| place.is_of_objects() && unit.fate() == Fate::ReferenceHeld) {
            self.capture.held.owe(&unit.at);
            self.keep(root, &path); // the reference that is held back may need it
            return Ok(());
        }
        let claim = if self.meet(root, &path, Met::Gone) { self.claim_entry(root, &path, &Seen::Gone, builder) } else { Claim::Other };
        match claim {
            Claim::Mine => {}
            Claim::Same => return Ok(()),
            Claim::Other => {
                self.again(root, &path);
                return Ok(());
            }
        }
        self.leave_links_of(root, place.dev, &path, &row)?;
        self.capture.held.forget_within(root, &path);
        if let Some(unit) = unit {
            unit.count_op();
            if place.is_of_objects() {
                unit.note_removed(path.clone());
            }
        }
        self.remove(root, path, is_news, builder)
    }

    /// Hands over that `path` is gone on the standby.
    pub(crate) fn remove(&self, root: RootId, path: RelPath, is_news: bool, builder: &mut Builder) -> Result<(), CaptureError> {
        if is_news {
            builder.change(Change::Gone { root, path: path.clone(), version: self.cycle.seq });
        }
        // A changeset that names everything needs no removals.
        if self.cycle.baseline != Baseline::Full {
            self.push(builder, Op::Delete { root, path })?;
        }
        Ok(())
    }

    /// A directory that is looked at: whether the standby has it, or will have it with this changeset.
    pub(crate) fn consider_dir(&self, own: Candidate, unit: Option<&Unit>, builder: &mut Builder) -> Result<Standing, CaptureError> {
        let key = (own.root, own.path.clone());
        if let Some(row) = &own.row
            && row.version <= self.acked
            && is_unchanged(row, &own.stat)
        {
            return Ok(Standing::Known);
        }
        let claim = self.claim(own.root, &own.path, &Seen::from(&own.stat), builder);
        let is_held = if claim == Claim::Mine {
            unit.inspect(|unit| unit.count_op());
            matches!(self.capture_one(own, builder)?, Outcome::Held | Outcome::Vanished)
        } else {
            if claim == Claim::Other {
                self.again(own.root, &own.path); // it changed since it was handed over
            }
            lock(&self.kept).contains(&key)
        };
        Ok(if is_held { Standing::Unknown } else { Standing::Known })
    }

    /// An entry that is there: nothing to do, or it is captured; `None` for nothing to do, or later.
    fn consider(&self, candidate: Candidate, unit: Option<&Unit>, builder: &mut Builder) -> Result<Option<Outcome>, CaptureError> {
        let derived_from =
            unit.filter(|unit| CapturePass::of(candidate.path.below(&unit.at.1).unwrap_or_default()) == CapturePass::Derived);
        let must_look = derived_from.is_some_and(|unit| unit.has_removed());
        if !must_look && candidate.row.as_ref().is_some_and(|row| self.has(row, &candidate.stat)) {
            return Ok(None);
        }
        if unit.is_some_and(|unit| unit.waits() && candidate.stat.size <= FILE_BYTES_MAX) {
            return Ok(None); // it is kept as the standby has it; what else is to be sent as bulk is found now
        }
        let Candidate { root, path, stat, .. } = &candidate;
        let is_free = self.meet(*root, path, Met::NoDirectory);
        match if is_free { self.claim_entry(*root, path, &Seen::from(stat), builder) } else { Claim::Other } {
            Claim::Mine => {}
            // It may have changed once more within a tick of the clock.
            Claim::Same if !is_racy(candidate.stat.ctime, candidate.at_ms) => return Ok(None),
            Claim::Same | Claim::Other => {
                self.again(candidate.root, &candidate.path);
                return Ok(None);
            }
        }
        unit.inspect(|unit| {
            unit.count_op();
            if CapturePass::of(candidate.path.below(&unit.at.1).unwrap_or_default()) == CapturePass::Packs {
                unit.has_new_packs.store(true, Ordering::Relaxed);
            }
        });
        if is_linked(&candidate.stat, candidate.row.as_ref()) {
            lock(&self.linked).push(candidate);
            return Ok(None);
        }
        if let Some(unit) = derived_from {
            return self.capture_derived(unit, candidate, builder).map(Some);
        }
        self.capture_one(candidate, builder).map(Some)
    }

    fn hold_name(&self, root: RootId, dir: &RelPath, name: &[u8], detail: String) {
        match dir.join(name) {
            Ok(path) => self.hold(root, &path, ProblemKind::Unreadable, detail),
            // No copy of a path that can't be named is anywhere: the folder stands for it in the report only.
            Err(_) => {
                let detail = format!("{:?} in it: {detail}", coldspare_core::path::escape(name));
                self.capture.held.hold(Problem { root, path: dir.clone(), kind: ProblemKind::Unsupported, detail });
            }
        }
    }
}

fn is_pack_index(name: &[u8]) -> bool {
    name.ends_with(b".idx")
}

/// `pack-1` of `pack-1.idx`.
fn stem(name: &[u8]) -> &[u8] {
    name.iter().rposition(|&b| b == b'.').map_or(name, |at| &name[..at])
}

/// Whether an error says that the path is no longer what the caller saw.
pub(crate) fn is_vanished(e: &std::io::Error) -> bool {
    // A symlink or a file where a directory was: ELOOP, ENOTDIR.
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) || e.raw_os_error() == Some(ELOOP) || seeded_bug!(UnreadableIsGone)
}

const ELOOP: i32 = 40;

/// Whether the row still tells the truth, as far as metadata can say.
pub(crate) fn is_unchanged(row: &Row, stat: &Stat) -> bool {
    is_as_before(row, stat) && !matches!(row.state, State::Present { witness: Witness { racy: true, .. }, .. })
}

/// Whether the metadata are those of the row.
pub(crate) fn is_as_before(row: &Row, stat: &Stat) -> bool {
    let State::Present { entry, witness } = &row.state else { return false };
    let same_kind = match &entry.body {
        Body::Dir => stat.kind == FileKind::Dir,
        Body::File { size, .. } => stat.kind == FileKind::File && *size == stat.size,
        Body::Hardlink { .. } => stat.kind == FileKind::File && stat.nlink > 1,
        Body::Symlink { .. } => stat.kind == FileKind::Symlink,
    };
    let (mtime, ctime) = (entry.meta.mtime, witness.ctime);
    same_kind
        && witness.ino == stat.ino
        && (ctime.secs, ctime.nanos) == stat.ctime
        && (mtime.secs, mtime.nanos) == stat.mtime
        && (entry.meta.uid, entry.meta.gid) == (stat.uid, stat.gid)
}

#[cfg(test)]
mod tests {
    use coldspare_core::{Digest, Entry, Meta, Seq, Time};

    use super::*;

    const STAT: Stat = Stat {
        kind: FileKind::File,
        mode: 0o644,
        uid: 1,
        gid: 2,
        size: 3,
        blocks: 8,
        nlink: 1,
        dev: 4,
        ino: 5,
        mtime: (6, 7),
        ctime: (8, 9),
    };

    fn check(witness: Witness, stat: Stat, expected: bool) {
        let meta = Meta { mode: 0o644, uid: 1, gid: 2, mtime: Time { secs: 6, nanos: 7 }, xattrs: Vec::new() };
        let body = Body::File { size: 3, digest: Digest([0; 32]), sparse: false };
        let row = Row { version: Seq(1), state: State::Present { entry: Entry { meta, body }, witness } };
        assert_eq!(is_unchanged(&row, &stat), expected, "{witness:?} {stat:?}");
    }

    #[test]
    fn a_row_is_trusted_only_when_nothing_differs_and_its_time_tells() {
        let witness = Witness { ino: 5, ctime: Time { secs: 8, nanos: 9 }, racy: false };
        check(witness, STAT, true);
        check(Witness { racy: true, ..witness }, STAT, false);
        check(witness, Stat { ctime: (8, 10), ..STAT }, false);
        check(witness, Stat { mtime: (6, 8), ..STAT }, false);
        check(witness, Stat { ino: 6, ..STAT }, false);
        check(witness, Stat { size: 4, ..STAT }, false);
        check(witness, Stat { uid: 2, ..STAT }, false);
        check(witness, Stat { kind: FileKind::Dir, ..STAT }, false);
    }
}
