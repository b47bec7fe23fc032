//! Files with several names: one of them carries the content, the others are links to it.
//!
//! They are handled after the rest of a pass, in one thread, so that all names met in it are known.
//!
//! Invariants: a link is handed over only when the name that it points to was taken, or is as the standby has it.

use std::collections::BTreeMap;

use coldspare_core::{Body, ContentRef, Entry, Op, RelPath, RootId};
use coldspare_os::{Disk, FileKind, Stat};

use crate::capture::CaptureError;
use crate::index::{Row, State};
use crate::read::{Builder, Outcome, meta};
use crate::visit::{Candidate, Run, lock};
use crate::writer::{Change, Chunks};

impl<D: Disk> Run<'_, D> {
    /// Captures the files with several names that were met in this pass.
    pub(crate) fn capture_linked(&self) -> Result<(), CaptureError> {
        let mut groups: BTreeMap<(RootId, u64, u64), BTreeMap<RelPath, Candidate>> = BTreeMap::new();
        for candidate in std::mem::take(&mut *lock(&self.linked)) {
            let key = (candidate.root, candidate.stat.dev, candidate.stat.ino);
            groups.entry(key).or_default().insert(candidate.path.clone(), candidate);
        }
        let mut builder = Builder::default();
        for ((root, dev, ino), names) in groups {
            self.capture_group(root, dev, ino, names, &mut builder)?;
        }
        self.flush(&mut builder)
    }

    fn capture_group(
        &self,
        root: RootId,
        dev: u64,
        ino: u64,
        mut names: BTreeMap<RelPath, Candidate>,
        builder: &mut Builder,
    ) -> Result<(), CaptureError> {
        for (other_root, path) in self.snapshot.names_of(dev, ino)? {
            if other_root != root || names.contains_key(&path) {
                continue;
            }
            if let Some(stat) = self.examine(root, &path).filter(|stat| (stat.dev, stat.ino) == (dev, ino))
                && self.claim(root, &path)
            {
                let row = self.snapshot.row(root, &path)?;
                names.insert(path.clone(), Candidate { root, path, stat, row });
            }
        }
        // The name that carries the content stays the one that it was.
        let carries = |c: &Candidate| c.row.as_ref().and_then(Row::entry).is_some_and(|e| e.digest().is_some()) && has_ino(&c.row, ino);
        let Some(first) = names.values().find(|c| carries(c)).or(names.values().next()).map(|c| c.path.clone()) else { return Ok(()) };
        let all = names.keys().map(|path| (root, path.clone())).collect();
        let Some(mut candidate) = names.remove(&first) else { return Ok(()) };
        if !candidate.row.as_ref().and_then(Row::entry).is_some_and(|e| e.digest().is_some()) {
            // A link that becomes the carrier: its row says nothing of the content.
            candidate.row = None;
        }
        let outcome = self.capture_one(candidate, builder)?;
        if outcome == Outcome::NotTaken {
            return Ok(());
        }
        for (path, candidate) in names {
            let Candidate { stat, row, .. } = candidate;
            let entry = Entry { meta: meta(&stat, self.xattrs(root, &path)), body: Body::Hardlink { to: first.clone() } };
            let known = row.as_ref().filter(|row| row.version <= self.acked).and_then(Row::entry);
            // New content means a new file on the standby: every name has to be tied to it again.
            if known == Some(&entry) && outcome != Outcome::Content {
                let version = row.as_ref().map(|r| r.version);
                builder.change(self.put_row(root, &path, version, entry, &stat, Chunks::None));
                continue;
            }
            if row.as_ref().is_some_and(Row::is_dir) {
                builder.change(Change::Gone { root, path: path.clone(), version: self.cycle.seq });
            }
            builder.change(self.put_row(root, &path, None, entry.clone(), &stat, Chunks::None));
            self.capture.held.release(root, &path);
            self.push(builder, Op::Put { root, path, entry, content: ContentRef::None })?;
        }
        builder.change(Change::Names { dev, ino, names: all });
        Ok(())
    }

    fn examine(&self, root: RootId, path: &RelPath) -> Option<Stat> {
        let dir = self.capture.disk.open_dir(&self.root(root).dir, path.parent_bytes()).ok()?;
        self.capture.disk.stat(&dir, path.name()).ok().filter(|stat| stat.kind == FileKind::File)
    }

    fn xattrs(&self, root: RootId, path: &RelPath) -> Vec<(Vec<u8>, Vec<u8>)> {
        let dir = self.capture.disk.open_dir(&self.root(root).dir, path.parent_bytes());
        dir.and_then(|dir| self.capture.disk.xattrs(&dir, path.name())).unwrap_or_default()
    }
}

fn has_ino(row: &Option<Row>, ino: u64) -> bool {
    matches!(row, Some(Row { state: State::Present { witness, .. }, .. }) if witness.ino == ino)
}
