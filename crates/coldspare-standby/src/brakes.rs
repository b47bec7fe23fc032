//! Holds a changeset back that takes more from the standby than goes without a question, until a person decides (G5).
//!
//! The changeset fails before its commit: the tree stays as it is, what is staged serves the next try. The active tries
//! again from time to time; what no longer takes too much goes through by itself.
//!
//! Invariants: nothing that is too much is committed unless a person accepted it after the question was recorded; an
//! acceptance covers what the question told of, and is used up by the next commit.

use std::collections::BTreeSet;

use coldspare_core::brakes::{Ledger, Limits, SAMPLE_BYTES, Toll, looks_scrambled};
use coldspare_core::git::{self, Part};
use coldspare_core::{Body, RelPath, RootId, Seq, codec};
use coldspare_os::Disk;
use redb::{ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::error::StandbyError;
use crate::row::{Action, ManifestRow, PendingRow};
use crate::standby::{Changeset, Standby};
use crate::store::{BRAKES, PENDING, View};

/// What a person is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Milliseconds since 1970 on the standby's clock: since when it waits.
    pub since_ms: u64,
    /// The last changeset that was held back.
    pub seq: Seq,
    /// What it would take, in words.
    pub reason: String,
    /// What the person said.
    pub answer: Answer,
}

/// What was said to a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Nothing yet.
    None,
    /// What was asked about is applied, with no more beside it than goes without a question.
    Accepted,
    /// The standby stays as it is.
    Rejected,
}

/// What the changeset at hand does to the brakes, to be recorded with its commit.
pub(crate) struct Passed {
    ledgers: Vec<Ledger>,
    is_new: bool,
}

const QUESTION: &str = "question";
const LEDGERS: &str = "ledgers";
/// What the question told of, by root.
const ASKED: &str = "asked";
/// LIMIT: contents that go and are looked for elsewhere in the changeset, 9 bytes each.
const CONTENTS_MAX: usize = 1_000_000;
/// LIMIT: files whose content is judged, in one changeset.
const SAMPLES_MAX: u64 = 10_000;

impl<D: Disk> Standby<D> {
    /// Asks a person before a changeset takes more than this; without it nothing is asked.
    pub fn with_brakes(mut self, limits: Limits) -> Standby<D> {
        self.limits = Some(limits);
        self
    }

    /// What waits for a person.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn question(&self) -> Result<Option<Question>, StandbyError> {
        self.brakes_value(QUESTION)
    }

    /// Answers what waits for a person; `None` when nothing does.
    ///
    /// # Errors
    /// `Store`, `Damaged`, `OutOfSpace`.
    pub fn answer(&self, answer: Answer) -> Result<Option<Question>, StandbyError> {
        if self.question()?.is_none() {
            return Ok(None);
        }
        self.store.write(|txn| {
            let Some(question) = question_in(txn)? else { return Ok(None) };
            let question = Question { answer, ..question };
            set_value(txn, QUESTION, &question)?;
            Ok(Some(question))
        })
    }

    /// Judges the staged changeset, all rows of which are known.
    ///
    /// Cost: one pass over its rows, over what is below removed folders, and a sample of files that are replaced.
    ///
    /// # Errors
    /// `Held`, with the question recorded; `Store`, `Damaged`, `OutOfSpace`.
    pub(crate) fn check_brakes(&self, changeset: &Changeset<D>) -> Result<Passed, StandbyError> {
        let mut ledgers: Vec<Ledger> = self.brakes_value(LEDGERS)?.unwrap_or_default();
        let Some(limits) = self.limits else { return Ok(Passed { ledgers, is_new: false }) };
        ledgers.resize(self.roots.len(), Ledger::default());
        let question = self.question()?;
        let minute = self.disk.now_ms() / 60_000;
        let (mut reasons, mut is_more) = (Vec::new(), false);
        let mut is_new = question.is_some();
        let tolls = self.tolls(changeset)?;
        let asked: Vec<Toll> = self.brakes_value(ASKED)?.unwrap_or_default();
        for (number, toll) in tolls.iter().enumerate().filter(|(_, toll)| **toll != Toll::default()) {
            let root = RootId(u8::try_from(number).expect("roots are few"));
            let entries = self.count_entries(&changeset.manifest, root, limits.entries_of_large_root())?;
            if let Some(excess) = limits.judge(&ledgers[number].within(minute, limits.window_minutes), toll, entries) {
                reasons.push(format!("{}: {excess}", self.root(root).path.display()));
                let more = toll.beyond(&asked.get(number).copied().unwrap_or_default());
                is_more |= limits.judge(&Toll::default(), &more, entries).is_some();
            }
            ledgers[number].add(minute, limits.window_minutes, toll);
            is_new = true;
        }
        if reasons.is_empty() {
            return Ok(Passed { ledgers, is_new });
        }
        let is_accepted = question.as_ref().is_some_and(|q| q.answer == Answer::Accepted);
        if is_accepted && !is_more {
            ledgers.iter_mut().for_each(Ledger::clear);
            return Ok(Passed { ledgers, is_new: true });
        }
        let reason = reasons.join("; ");
        let before = question.as_ref().map(|q| q.answer);
        // What was accepted was less: that is another question.
        let (since_ms, answer) = question.filter(|_| !is_accepted).map_or((self.disk.now_ms(), Answer::None), |q| (q.since_ms, q.answer));
        let asks = Question { since_ms, seq: changeset.seq, reason: reason.clone(), answer };
        let answer = self.store.write(|txn| {
            // Somebody answered meanwhile: that is for what was asked before, and counts at the next try.
            if let Some(stored) = question_in(txn)?.filter(|stored| Some(stored.answer) != before) {
                return Ok(stored.answer);
            }
            set_value(txn, ASKED, &tolls)?;
            set_value(txn, QUESTION, &asks)?;
            Ok(answer)
        })?;
        Err(StandbyError::Held { reason, is_rejected: answer == Answer::Rejected })
    }

    /// What the changeset takes from each root.
    fn tolls(&self, changeset: &Changeset<D>) -> Result<Vec<Toll>, StandbyError> {
        let mut tolls = vec![Toll::default(); self.roots.len()];
        let manifest = &changeset.manifest;
        if manifest.len()? == 0 {
            return Ok(tolls);
        }
        let mut gutted: BTreeSet<(RootId, RelPath)> = BTreeSet::new();
        let mut removed: Vec<u64> = Vec::new();
        let mut samples = 0;
        let pending = self.store.view(PENDING)?;
        pending.for_each_reversed(|root, path, row: PendingRow| {
            let is_removal = row.action == Action::Remove;
            let may_replace = matches!(row.action, Action::Place { .. });
            if !is_removal && !may_replace {
                return Ok(());
            }
            let Some(old) = manifest.manifest(root, &path)? else { return Ok(()) };
            let toll = &mut tolls[usize::from(root.0)];
            let is_dir_after = row.entry.as_ref().is_some_and(|entry| entry.is_dir());
            if is_removal || old.entry.is_dir() && !is_dir_after {
                match repository_around(manifest, root, &path)? {
                    Some(base) => {
                        let inside = path.below(&base).unwrap_or_default();
                        let is_vital = matches!(inside, b"HEAD" | b"objects" | b"refs");
                        // One that goes in pieces counts with the first.
                        if is_vital && parts_of_repository(manifest, root, &base)? == 3 && gutted.insert((root, base)) {
                            toll.removed_repositories += 1;
                        }
                    }
                    // What is left of a repository that went before.
                    None if git::part(&path) != Part::Other || path.name() == b"objects" => {}
                    None => count_removed(manifest, root, &path, &old, toll, &mut removed)?,
                }
                return Ok(());
            }
            let (Body::File { digest: before, .. }, Some(Body::File { digest: after, .. })) =
                (&old.entry.body, row.entry.as_ref().map(|entry| &entry.body))
            else {
                return Ok(());
            };
            if before != after && samples < SAMPLES_MAX && repository_around(manifest, root, &path)?.is_none() {
                samples += 1;
                toll.scrambled_files += u64::from(self.is_scrambled(root, &path, &row));
            }
            Ok(())
        })?;
        if tolls.iter().any(|toll| toll.removed_files > 0 || toll.removed_repositories > 0) {
            spare_what_moved(manifest, &pending, removed, &mut tolls)?;
        }
        for (number, toll) in tolls.iter_mut().enumerate().filter(|(_, toll)| **toll != Toll::default()) {
            toll.empties = self.is_emptied(manifest, &pending, RootId(u8::try_from(number).expect("roots are few")))?;
        }
        Ok(tolls)
    }

    /// Whether a root that had something has nothing after the changeset.
    fn is_emptied(&self, manifest: &View, pending: &View, root: RootId) -> Result<bool, StandbyError> {
        let top = RelPath::root();
        let before = manifest.children::<ManifestRow>(root, &top)?;
        for (name, _) in &before {
            let path = top.join(name).map_err(|e| self.store.damaged(e.to_string()))?;
            if pending.pending(root, &path)?.is_none_or(|row| row.entry.is_some()) {
                return Ok(false);
            }
        }
        let comes = pending.children::<PendingRow>(root, &top)?.iter().any(|(_, row)| row.entry.is_some());
        Ok(!before.is_empty() && !comes)
    }

    /// How many entries a root has, counted up to `enough`.
    fn count_entries(&self, manifest: &View, root: RootId, enough: u64) -> Result<u64, StandbyError> {
        let mut count = 0;
        manifest.for_each_below(root, &RelPath::root(), &mut |_, _, _: ManifestRow| {
            count += 1;
            Ok(count < enough)
        })?;
        Ok(count)
    }

    /// Whether a file's new content looks encrypted; what can't be read tells nothing.
    fn is_scrambled(&self, root: RootId, path: &RelPath, row: &PendingRow) -> bool {
        let Some(at) = row.action.staged() else { return false };
        let sample = |dir: &D::Dir, name: &[u8]| -> Option<Vec<u8>> {
            let mut bytes = vec![0; SAMPLE_BYTES];
            let read = self.disk.open_file(dir, name).and_then(|file| self.disk.read_at(&file, 0, &mut bytes)).ok()?;
            bytes.truncate(read);
            Some(bytes)
        };
        let old = self.disk.open_dir(&self.root(root).dir, path.parent_bytes()).ok().and_then(|dir| sample(&dir, path.name()));
        let new = self.staged_dir(root, at).ok().and_then(|(dir, name)| sample(&dir, &name));
        matches!((old, new), (Some(old), Some(new)) if looks_scrambled(&old, &new))
    }

    fn brakes_value<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StandbyError> {
        let bytes = self.store.read(|txn| Ok(txn.open_table(BRAKES)?.get(name)?.map(|v| v.value().to_vec())))?;
        bytes.map(|bytes| self.store.decode(&bytes)).transpose()
    }
}

impl Passed {
    /// Records, with the commit, what the changeset took; the question it answered is over.
    pub(crate) fn record(&self, txn: &WriteTransaction) -> Result<(), redb::Error> {
        if self.is_new {
            set_value(txn, LEDGERS, &self.ledgers)?;
            let mut table = txn.open_table(BRAKES)?;
            table.remove(QUESTION)?;
            table.remove(ASKED)?;
        }
        Ok(())
    }
}

/// What waits for a person. What can't be read counts as nothing here: [`Standby::question`], which comes first, says so.
fn question_in(txn: &WriteTransaction) -> Result<Option<Question>, redb::Error> {
    Ok(txn.open_table(BRAKES)?.get(QUESTION)?.and_then(|bytes| codec::decode(bytes.value()).ok()))
}

fn set_value<T: Serialize>(txn: &WriteTransaction, name: &str, value: &T) -> Result<(), redb::Error> {
    txn.open_table(BRAKES)?.insert(name, codec::encode(value).as_slice())?;
    Ok(())
}

/// The repository that `path` is inside of, the outermost one, as the manifest has it.
fn repository_around(manifest: &View, root: RootId, path: &RelPath) -> Result<Option<RelPath>, StandbyError> {
    for base in path.ancestors() {
        if parts_of_repository(manifest, root, &base)? >= 2 {
            return Ok(Some(base));
        }
    }
    Ok(None)
}

/// How many of the three things that make a repository a folder has; with two of them it was one until a part went.
fn parts_of_repository(manifest: &View, root: RootId, base: &RelPath) -> Result<u8, StandbyError> {
    let mut parts = 0;
    for (name, is_dir) in [(&b"objects"[..], true), (b"refs", true), (b"HEAD", false)] {
        let Ok(path) = base.join(name) else { return Ok(0) };
        parts += u8::from(manifest.manifest(root, &path)?.is_some_and(|row| row.entry.is_dir() == is_dir));
    }
    Ok(parts)
}

/// Counts what goes with a path that is in no repository: repositories, and files outside of them, the contents of which are
/// added to `removed`.
fn count_removed(
    manifest: &View,
    root: RootId,
    path: &RelPath,
    row: &ManifestRow,
    toll: &mut Toll,
    removed: &mut Vec<u64>,
) -> Result<(), StandbyError> {
    let mut count = |toll: &mut Toll, row: &ManifestRow| {
        toll.removed_files += 1;
        removed.extend(row.entry.digest().map(short).filter(|_| removed.len() < CONTENTS_MAX));
    };
    if !row.entry.is_dir() {
        count(toll, row);
        return Ok(());
    }
    let mut dirs = vec![path.clone()];
    while let Some(dir) = dirs.pop() {
        let parts = parts_of_repository(manifest, root, &dir)?;
        if parts >= 2 {
            toll.removed_repositories += u64::from(parts == 3);
            continue;
        }
        for (name, row) in manifest.children::<ManifestRow>(root, &dir)? {
            match dir.join(&name) {
                Ok(below) if row.entry.is_dir() => dirs.push(below),
                _ => count(toll, &row),
            }
        }
    }
    Ok(())
}

/// What goes in one place and comes in another is no loss: files by their content, repositories by their number.
fn spare_what_moved(manifest: &View, pending: &View, mut removed: Vec<u64>, tolls: &mut [Toll]) -> Result<(), StandbyError> {
    removed.sort_unstable();
    let mut is_spared = vec![false; removed.len()];
    pending.for_each_reversed(|root, path, row: PendingRow| {
        let Some(entry) = row.entry.filter(|_| row.action.staged().is_some()) else { return Ok(()) };
        if manifest.manifest(root, &path)?.is_some() {
            return Ok(());
        }
        let toll = &mut tolls[usize::from(root.0)];
        if path.name() == b"HEAD"
            && let Some(base) = path.parent()
        {
            let comes = |name: &[u8]| base.join(name).is_ok_and(|part| matches!(pending.pending(root, &part), Ok(Some(_))));
            toll.removed_repositories = toll.removed_repositories.saturating_sub(u64::from(comes(b"objects") && comes(b"refs")));
        }
        let Some(content) = entry.digest().map(short) else { return Ok(()) };
        let first = removed.partition_point(|other| *other < content);
        let same = removed[first..].iter().take_while(|other| **other == content).count();
        if let Some(at) = (first..first + same).find(|at| !is_spared[*at]) {
            is_spared[at] = true;
            toll.removed_files = toll.removed_files.saturating_sub(1);
        }
        Ok(())
    })
}

/// Enough of a digest to tell contents of one changeset apart.
fn short(digest: coldspare_core::Digest) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&digest.0[..8]);
    u64::from_le_bytes(bytes)
}
