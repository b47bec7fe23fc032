//! Before a commit: every reference that changed names an object that is staged or present, here or by alternates; where
//! objects go, every reference does.
//!
//! A repository of which that isn't true stays as it is, with its family, and is asked for again (G2). Objects behind
//! the one that is named are not looked at: the active's order of reading stands for them.
//!
//! Invariants: what is looked at is the tree as it will be: the manifest with the changeset's rows over it.

use std::collections::BTreeSet;

use coldspare_core::git::family::{Alternate, Repository, closure};
use coldspare_core::git::pack::{FANOUT_BYTES, Fanout, bucket_holds, hash_bytes};
use coldspare_core::git::reference::{Reference, parse_loose};
use coldspare_core::git::{self, ObjectId, Part};
use coldspare_core::{Body, Entry, RelPath, RootId, seeded_bug};
use coldspare_os::Disk;

use crate::error::StandbyError;
use crate::future::{Future, SMALL_BYTES_MAX, Version};
use crate::row::{Action, ManifestRow, PendingRow};
use crate::standby::{Changeset, Standby, Unrecorded};
use crate::store::{LINKS, PENDING};

/// LIMIT: alternates of alternates, as in git.
const ALTERNATES_DEPTH_MAX: usize = 5;
const ALTERNATES: &[u8] = b"/objects/info/alternates";
const LOOSE_REFERENCES: [&[u8]; 2] = [b"refs", b"stash-refs"];
const PACKED_REFERENCES: [&[u8]; 2] = [b"packed-refs", b"stash-packed-refs"];

impl<D: Disk> Standby<D> {
    /// Finds the repositories whose references need what isn't there, and takes them back with their families.
    ///
    /// What goes because a changeset that names everything doesn't name it has its rows already.
    ///
    /// Cost: one pass over the changeset's rows; for each reference that changed a look at a loose object, or at one
    /// stretch of each pack index of the repository; where objects go, the same for every reference of the repository.
    pub(crate) fn take_back_incomplete(&self, changeset: &Changeset<D>, sync: &mut Unrecorded) -> Result<Vec<Repository>, StandbyError> {
        let future = Future { standby: self, manifest: &changeset.manifest, pending: self.store.view(PENDING)? };
        let losing = future.losing_repositories()?;
        let mut incomplete = BTreeSet::new();
        for at in future.changed_repositories()?.union(&losing) {
            let wanted = if losing.contains(at) { future.named(at)? } else { future.named_by_changes(at)? };
            if let Some(missing) = future.missing(at, wanted)? {
                tracing::error!(repository = %at.1, object = %missing, "a reference names an object that was neither sent nor there, or that goes; the repository stays as it is");
                incomplete.insert(at.clone());
            }
        }
        if incomplete.is_empty() || seeded_bug!(ReferencesAreNotChecked) {
            return Ok(Vec::new());
        }
        let family = closure(&incomplete, &future.ties()?);
        drop(future);
        self.take_back(changeset, family.clone(), sync)?;
        // All of them: what was taken back of the family has to be sent again too.
        Ok(family.into_iter().collect())
    }
}

impl<D: Disk> Future<'_, D> {
    /// The repositories of which the changeset brings references.
    fn changed_repositories(&self) -> Result<BTreeSet<Repository>, StandbyError> {
        let mut found = BTreeSet::new();
        self.pending.for_each_reversed(|root, path, row: PendingRow| {
            if row.action.staged().is_some()
                && row.entry.as_ref().and_then(Entry::digest).is_some()
                && let Some(repository) = repository_of(&path)
                && !found.contains(&(root, repository.clone()))
                && self.is_repository(root, &repository)?
            {
                found.insert((root, repository));
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The repositories from which the changeset takes objects, or a way to borrow them, and what is tied to those.
    fn losing_repositories(&self) -> Result<BTreeSet<Repository>, StandbyError> {
        let mut found = BTreeSet::new();
        self.pending.for_each_reversed(|root, path, row: PendingRow| {
            let takes = match git::part(&path) {
                Part::LooseObject | Part::Pack => row.action == Action::Remove,
                // What is put in the place of another may have less.
                Part::PackIndex => self.manifest.manifest(root, &path)?.is_some(),
                _ => path.as_bytes().ends_with(ALTERNATES) && self.manifest.manifest(root, &path)?.is_some(),
            };
            if !takes || seeded_bug!(LossesAreNotChecked) {
                return Ok(());
            }
            for base in git::possible_repositories(&path).into_iter().rev() {
                let at = (root, base);
                if found.contains(&at) {
                    break;
                }
                if self.is_repository(root, &at.1)? {
                    found.insert(at);
                    break;
                }
            }
            Ok(())
        })?;
        if found.is_empty() { Ok(found) } else { Ok(closure(&found, &self.ties()?)) }
    }

    /// Which repositories of the changeset can't change without another: those that borrow objects, or share files.
    fn ties(&self) -> Result<Vec<(Repository, Repository)>, StandbyError> {
        let mut ties = Vec::new();
        for at in &self.touched_repositories()? {
            for alternate in self.alternates(at)? {
                if let Alternate::Replicated(parent) = alternate {
                    ties.push((at.clone(), parent));
                }
            }
        }
        // A link and what it points to are one file: one can't be taken back without the other.
        self.standby.store.for_each_key(LINKS, |k| {
            let (root, path) = self.pending.path_of(k)?;
            let row = self.pending.pending(root, &path)?;
            if let Some(PendingRow { entry: Some(Entry { body: Body::Hardlink { to }, .. }), .. }) = row
                && let (Some(own), Some(other)) = (self.repository_around(root, &path)?, self.repository_around(root, &to)?)
                && own != other
            {
                ties.push((own, other));
            }
            Ok(())
        })?;
        Ok(ties)
    }

    /// The repositories of which the changeset brings, or takes, anything.
    fn touched_repositories(&self) -> Result<BTreeSet<Repository>, StandbyError> {
        let mut found = BTreeSet::new();
        self.pending.for_each_reversed(|root, path, _: PendingRow| {
            for base in git::possible_repositories(&path) {
                if !found.contains(&(root, base.clone())) && self.is_repository(root, &base)? {
                    found.insert((root, base));
                }
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The innermost repository that a path is in.
    fn repository_around(&self, root: RootId, path: &RelPath) -> Result<Option<Repository>, StandbyError> {
        for base in git::possible_repositories(path).into_iter().rev() {
            if self.is_repository(root, &base)? {
                return Ok(Some((root, base)));
            }
        }
        Ok(None)
    }

    fn is_repository(&self, root: RootId, path: &RelPath) -> Result<bool, StandbyError> {
        for name in [&b"HEAD"[..], b"objects", b"refs"] {
            if !path.join(name).is_ok_and(|path| self.entry(root, &path).is_ok_and(|e| e.is_some())) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// One of the wanted objects that the repository will not have.
    fn missing(&self, at: &Repository, mut wanted: BTreeSet<ObjectId>) -> Result<Option<ObjectId>, StandbyError> {
        self.remove_found(at, &mut wanted, 0)?;
        Ok(wanted.into_iter().next())
    }

    /// The objects that all references name.
    fn named(&self, (root, repository): &Repository) -> Result<BTreeSet<ObjectId>, StandbyError> {
        let mut wanted = BTreeSet::new();
        let mut loose = |path: &RelPath| -> Result<bool, StandbyError> {
            if self.entry(*root, path)?.is_some_and(|entry| !entry.is_dir())
                && let Some(content) = self.content(*root, path, SMALL_BYTES_MAX)?
                && let Ok(Reference::Object(id)) = parse_loose(&content)
            {
                wanted.insert(id);
            }
            Ok(true)
        };
        for name in LOOSE_REFERENCES {
            if let Ok(dir) = repository.join(name) {
                self.manifest.for_each_below(*root, &dir, &mut |_, path, _: ManifestRow| loose(&path))?;
                self.pending.for_each_below(*root, &dir, &mut |_, path, _: PendingRow| loose(&path))?;
            }
        }
        for name in PACKED_REFERENCES {
            let Ok(path) = repository.join(name) else { continue };
            self.each_packed(*root, &path, Version::Staged, &mut |name, id| {
                if !self.is_shadowed(*root, repository, name)? {
                    wanted.insert(id);
                }
                Ok(())
            })?;
        }
        Ok(wanted)
    }

    /// The objects that references name which the changeset brings, without those that were named before.
    fn named_by_changes(&self, (root, repository): &Repository) -> Result<BTreeSet<ObjectId>, StandbyError> {
        let mut wanted = BTreeSet::new();
        let mut loose = |_: RootId, path: RelPath, row: PendingRow| -> Result<bool, StandbyError> {
            if row.action.staged().is_some()
                && row.entry.as_ref().and_then(Entry::digest).is_some()
                && git::part(&path) == Part::LooseRef
                && let Some(content) = self.content(*root, &path, SMALL_BYTES_MAX)?
                && let Ok(Reference::Object(id)) = parse_loose(&content)
            {
                wanted.insert(id);
            }
            Ok(true)
        };
        for name in LOOSE_REFERENCES {
            if let Ok(dir) = repository.join(name) {
                self.pending.for_each_below(*root, &dir, &mut loose)?;
            }
        }
        for name in PACKED_REFERENCES {
            let Ok(path) = repository.join(name) else { continue };
            if self.pending.pending(*root, &path)?.is_some_and(|row| row.action.staged().is_some()) {
                let mut old = BTreeSet::new();
                self.each_packed(*root, &path, Version::InTree, &mut |_, id| {
                    old.insert(id);
                    Ok(())
                })?;
                self.each_packed(*root, &path, Version::Staged, &mut |name, id| {
                    if !old.contains(&id) && !self.is_shadowed(*root, repository, name)? {
                        wanted.insert(id);
                    }
                    Ok(())
                })?;
            }
        }
        Ok(wanted)
    }

    /// Whether a reference is loose too, so that its packed value means nothing: git keeps no objects for that.
    fn is_shadowed(&self, root: RootId, repository: &RelPath, name: &[u8]) -> Result<bool, StandbyError> {
        let Ok(loose) = RelPath::new([repository.as_bytes(), b"/", name].concat()) else { return Ok(false) };
        Ok(self.entry(root, &loose)?.is_some_and(|entry| entry.digest().is_some()))
    }

    /// Removes from `wanted` what the repository has, by itself or by alternates.
    fn remove_found(&self, at: &Repository, wanted: &mut BTreeSet<ObjectId>, depth: usize) -> Result<(), StandbyError> {
        let (root, repository) = at;
        let below = |name: &str| RelPath::new([repository.as_bytes(), b"/", name.as_bytes()].concat()).ok();
        let mut lost = Vec::new();
        for id in wanted.iter() {
            let path = below(&format!("objects/{}", id.loose_path()));
            let is_there = path.map(|path| self.entry(*root, &path)).transpose()?.flatten().is_some();
            if !is_there {
                lost.push(*id);
            }
        }
        *wanted = lost.into_iter().collect();
        let Some(packs) = below("objects/pack").filter(|_| !wanted.is_empty()) else { return Ok(()) };
        let names = self.names_in(*root, &packs)?;
        for name in &names {
            if let Some(stem) = name.strip_suffix(b".idx")
                && !wanted.is_empty()
                && names.contains([stem, b".pack"].concat().as_slice())
                && let Ok(index) = packs.join(name)
            {
                self.remove_indexed(*root, &index, wanted)?;
            }
        }
        if wanted.is_empty() || depth >= ALTERNATES_DEPTH_MAX {
            return Ok(());
        }
        for alternate in self.alternates(at)? {
            match alternate {
                Alternate::Replicated(parent) => self.remove_found(&parent, wanted, depth + 1)?,
                // What lies outside can't be judged here.
                Alternate::Elsewhere => wanted.clear(),
            }
        }
        Ok(())
    }

    fn remove_indexed(&self, root: RootId, index: &RelPath, wanted: &mut BTreeSet<ObjectId>) -> Result<(), StandbyError> {
        let disk = &self.standby.disk;
        let Some(file) = self.open(root, index)? else { return Ok(()) };
        let read = |range: std::ops::Range<u64>| -> Option<Vec<u8>> {
            let mut bytes = vec![0; usize::try_from(range.end - range.start).ok()?];
            let read = disk.read_at(&file, range.start, &mut bytes).ok()?;
            (read == bytes.len()).then_some(bytes)
        };
        let size = disk.stat_file(&file).map_or(0, |stat| stat.size);
        // An index that can't be read has nothing.
        let Some(fanout) = read(0..FANOUT_BYTES as u64).and_then(|head| Fanout::parse(&head).ok()) else { return Ok(()) };
        let Some(hash) = hash_bytes(fanout.objects(), size) else { return Ok(()) };
        let mut bucket: (Option<u8>, Vec<u8>) = (None, Vec::new());
        wanted.retain(|id| {
            let first = id.as_bytes()[0];
            if bucket.0 != Some(first) {
                bucket = (Some(first), read(fanout.bucket(first, hash)).unwrap_or_default());
            }
            id.as_bytes().len() != hash || !bucket_holds(&bucket.1, id)
        });
        Ok(())
    }
}

/// The repository that a reference is of, by the shape of its path.
fn repository_of(path: &RelPath) -> Option<RelPath> {
    match git::part(path) {
        Part::PackedRefs | Part::Head => path.parent(),
        Part::LooseRef => git::possible_repositories(path).into_iter().next().filter(|base| base != path),
        _ => None,
    }
}
