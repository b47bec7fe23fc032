//! Files with several names: one of them carries the content, the others are links to it.
//!
//! They are handled after all passes, in one thread, so that all names met in the cycle are known.
//!
//! The kernel reports a change of such a file under one of its names only, and says nothing of the others when a name
//! is added or removed: the others are found through the index.
//!
//! Invariants: a link is handed over only when the name that it points to was taken, or is as the standby has it; all
//! names of a file are handed over with the same metadata.

use std::collections::{BTreeMap, BTreeSet};

use coldspare_core::{Body, ContentRef, Entry, Op, ProblemKind, RelPath, RootId, Seq};
use coldspare_os::{Disk, FileKind, Stat};

use crate::batch::Builder;
use crate::capture::{CaptureError, Work};
use crate::index::{IndexError, Row};
use crate::inspect::Inspect;
use crate::read::Outcome;
use crate::run::{Claim, Met, Run, Seen, lock};
use crate::visit::Candidate;
use crate::writer::{Change, Chunks};

/// One file of several names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Inode {
    root: RootId,
    dev: u64,
    ino: u64,
}

type Names = BTreeMap<RelPath, Candidate>;

/// A file whose carrier was captured.
struct Carried {
    inode: Inode,
    /// The name that carries the content.
    first: RelPath,
    outcome: Outcome,
    /// The others.
    names: Names,
}

impl<D: Disk> Run<'_, D> {
    /// Captures the files with several names that were met in this cycle.
    pub(crate) fn capture_linked(&self) -> Result<(), CaptureError> {
        let mut groups: BTreeMap<Inode, Names> = BTreeMap::new();
        for candidate in std::mem::take(&mut *lock(&self.linked)) {
            let inode = Inode { root: candidate.root, dev: candidate.stat.dev, ino: candidate.stat.ino };
            groups.entry(inode).or_default().insert(candidate.path.clone(), candidate);
        }
        self.add_unmet_names(&mut groups)?;
        let mut builder = Builder::default();
        let mut carried = Vec::new();
        for (inode, names) in groups {
            carried.extend(self.capture_carrier(inode, names, &mut builder)?);
        }
        // Only then it is known which carriers were taken.
        self.resolve_unsure(&mut builder)?;
        for group in carried {
            self.hand_over_links(group, &mut builder)?;
        }
        self.flush(&mut builder)
    }

    /// A path that is there, but no longer the file that the index has there: the other names of that file may have lost
    /// their carrier.
    pub(crate) fn leave_links(&self, dev: u64, candidate: &Candidate) -> Result<(), CaptureError> {
        match &candidate.row {
            Some(row) if row.ino().is_some_and(|ino| ino != candidate.stat.ino) || row.is_dir() && candidate.stat.kind != FileKind::Dir => {
                self.leave_links_of(candidate.root, dev, &candidate.path, row)
            }
            _ => Ok(()),
        }
    }

    /// As [`Run::leave_links`], for what is gone: the path, and all below it.
    pub(crate) fn leave_links_of(&self, root: RootId, dev: u64, path: &RelPath, row: &Row) -> Result<(), CaptureError> {
        // Nothing tells of the other names' trouble when a folder above this one was renamed to where it is left out.
        if !self.snapshot.has_links()? {
            return Ok(());
        }
        let mut inodes = Vec::new();
        // A name that carried no content counts too: the file may have been changed through it before it went.
        let mut note = |row: &Row| inodes.extend(row.ino().filter(|_| !row.is_dir()));
        note(row);
        if row.is_dir() {
            self.snapshot.for_each_below(root, path, |_, row| {
                note(&row);
                Ok(())
            })?;
        }
        for ino in inodes {
            let inode = Inode { root, dev, ino };
            for (other_root, other) in self.snapshot.names_of(dev, ino)? {
                if other_root == root
                    && !other.is_within(path)
                    && let Some(candidate) = self.other_name(inode, other)?
                {
                    // Once `path` is gone from the index, a repetition of this cycle would not come by here.
                    self.writer.send(vec![Change::Unsent { root, path: candidate.path.clone(), acked: Seq(0) }]);
                    self.again(root, &candidate.path);
                    lock(&self.linked).push(candidate);
                }
            }
        }
        Ok(())
    }

    /// Adds the names of each file that the cycle did not meet.
    ///
    /// Cost: a few look-ups a file; one pass over the index when a file has more names than are known.
    fn add_unmet_names(&self, groups: &mut BTreeMap<Inode, Names>) -> Result<(), CaptureError> {
        let mut wanted: BTreeSet<(RootId, u64)> = BTreeSet::new();
        for (inode, names) in groups.iter_mut() {
            for (root, path) in self.snapshot.names_of(inode.dev, inode.ino)? {
                if root == inode.root
                    && !names.contains_key(&path)
                    && let Some(candidate) = self.other_name(*inode, path)?
                {
                    names.insert(candidate.path.clone(), candidate);
                }
            }
            if names.values().any(|c| c.stat.nlink as usize > names.len()) {
                wanted.insert((inode.root, inode.ino));
            }
        }
        let roots: BTreeSet<RootId> = wanted.iter().map(|(root, _)| *root).collect();
        let mut found = Vec::new();
        for root in roots {
            self.snapshot.for_each_below(root, &RelPath::root(), |path, row| {
                found.extend(row.ino().filter(|ino| wanted.contains(&(root, *ino))).map(|_| path));
                Ok::<(), IndexError>(())
            })?;
            for path in std::mem::take(&mut found) {
                let Some(stat) = self.examine(root, &path) else { continue };
                let inode = Inode { root, dev: stat.dev, ino: stat.ino };
                if let Some(names) = groups.get_mut(&inode)
                    && !names.contains_key(&path)
                    && let Some(candidate) = self.other_name(inode, path)?
                {
                    names.insert(candidate.path.clone(), candidate);
                }
            }
        }
        Ok(())
    }

    /// `path`, when it is a name of `inode` and wasn't handed over in this cycle.
    fn other_name(&self, inode: Inode, path: RelPath) -> Result<Option<Candidate>, CaptureError> {
        let root = inode.root;
        let at_ms = self.capture.disk.now_ms();
        let Some(stat) = self.examine(root, &path).filter(|stat| (stat.dev, stat.ino) == (inode.dev, inode.ino)) else { return Ok(None) };
        let dir = path.parent().unwrap_or_else(RelPath::root);
        if !self.is_claimed(root, &dir) && !self.has_folder(root, &dir)? {
            self.again(root, &path); // it comes with its folder
            return Ok(None);
        }
        let row = self.snapshot.row(root, &path)?;
        // What a look at everything doesn't leave to the end it hands over by itself.
        if self.cycle.work == Work::Everything && !is_linked(&stat, row.as_ref()) {
            return Ok(None);
        }
        if !self.meet(root, &path, Met::NoDirectory) {
            self.again(root, &path); // it was a directory when it was met in this cycle
            return Ok(None);
        }
        if self.claim(root, &path, &Seen::from(&stat), &mut Builder::default()) != Claim::Mine {
            return Ok(None);
        }
        Ok(Some(Candidate { root, path, stat, at_ms, row }))
    }

    fn capture_carrier(&self, inode: Inode, mut names: Names, builder: &mut Builder) -> Result<Option<Carried>, CaptureError> {
        // The name that carries the content stays the one that it was.
        let carries = |c: &Candidate| c.row.as_ref().is_some_and(|row| is_file(row) && row.ino() == Some(inode.ino));
        // A name that promises what the content is comes first: under another it would not be looked at.
        let promises = |c: &Candidate| self.promise(inode.root, &c.path) != Inspect::Nothing;
        let all = || names.values();
        let first = all().find(|c| carries(c) && promises(c)).or_else(|| all().find(|c| promises(c)));
        let first = first.or_else(|| all().find(|c| carries(c))).or_else(|| all().next()).map(|c| c.path.clone());
        let Some((first, mut candidate)) = first.and_then(|first| names.remove_entry(&first)) else { return Ok(None) };
        if !candidate.row.as_ref().is_some_and(is_file) {
            // A link that becomes the carrier: its row says nothing of the content.
            candidate.row = None;
        }
        let outcome = self.capture_one(candidate, builder)?;
        if outcome == Outcome::Vanished
            && let Some(unit) = self.units.of(inode.root, &first)
        {
            unit.note_vanished(first.clone());
        }
        Ok(Some(Carried { inode, first, outcome, names }))
    }

    fn hand_over_links(&self, group: Carried, builder: &mut Builder) -> Result<(), CaptureError> {
        let Carried { inode: Inode { root, dev, ino }, first, outcome, names } = group;
        let is_kept = lock(&self.kept).contains(&(root, first.clone()));
        let (meta, is_content_new) = match outcome {
            Outcome::Same(meta) | Outcome::Attributes(meta) => (meta, false),
            Outcome::Content(meta) if !is_kept && !lock(&self.untaken).contains(&(root, first.clone())) => (meta, true),
            Outcome::Content(_) | Outcome::Held if is_kept => {
                for path in names.keys() {
                    self.hold(root, path, ProblemKind::Unreadable, format!("it is the same file as {first}, which is held back"));
                }
                return Ok(());
            }
            Outcome::Content(_) | Outcome::Held | Outcome::Vanished => {
                for path in names.keys() {
                    self.keep(root, path);
                    self.again(root, path);
                }
                return Ok(());
            }
        };
        names.keys().for_each(|path| self.tie(root, &first, path));
        let all = std::iter::once(&first).chain(names.keys()).map(|path| (root, path.clone())).collect();
        builder.change(Change::Names { dev, ino, names: all });
        for (path, Candidate { stat, at_ms, row, .. }) in names {
            let entry = Entry { meta: meta.clone(), body: Body::Hardlink { to: first.clone() } };
            let version = row.as_ref().filter(|row| row.version <= self.acked && row.entry() == Some(&entry)).map(|row| row.version);
            self.capture.held.release(root, &path);
            // New content means a new file on the standby: every name has to be tied to it again.
            if version.is_some() && !is_content_new {
                builder.change(self.put(root, &path, self.row(version, entry, &stat, at_ms), Chunks::None));
                continue;
            }
            builder.change(self.put(root, &path, self.row(None, entry.clone(), &stat, at_ms), Chunks::None));
            self.push(builder, Op::Put { root, path, entry, content: ContentRef::None })?;
        }
        Ok(())
    }

    fn examine(&self, root: RootId, path: &RelPath) -> Option<Stat> {
        let dir = self.capture.disk.open_dir(&self.root(root).dir, path.parent_bytes()).ok()?;
        self.capture.disk.stat(&dir, path.name()).ok().filter(|stat| stat.kind == FileKind::File)
    }
}

/// Whether a file is handled with its other names, those that it has or had.
pub(crate) fn is_linked(stat: &Stat, row: Option<&Row>) -> bool {
    stat.kind == FileKind::File && (stat.nlink > 1 || row.and_then(Row::entry).is_some_and(|e| matches!(e.body, Body::Hardlink { .. })))
}

fn is_file(row: &Row) -> bool {
    row.entry().is_some_and(|entry| entry.digest().is_some())
}
