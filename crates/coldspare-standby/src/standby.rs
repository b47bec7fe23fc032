//! The standby as a whole: its roots, its store, and the changeset under way.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use coldspare_core::brakes::Limits;
use coldspare_core::changeset::{Ask, Have};
use coldspare_core::control::Applied;
use coldspare_core::exclude::Exclude;
use coldspare_core::git::family::Repository;
use coldspare_core::{Baseline, Digest, Problem, RelPath, RootId, Seq, SessionId, codec, key, path::CONTROL_DIR, seeded_bug};
use coldspare_os::{Disk, Space};

use crate::assemble::Assemblies;
use crate::bulk::Bulk;
use crate::error::{OpenError, StandbyError};
use crate::history::HISTORY_DIR;
use crate::missing;
use crate::points::HistoryLimits;
use crate::rebuilt::Rebuilds;
use crate::row::{ADOPTED, PendingRow, Staged, Standing};
use crate::store::{HELD, INCOMPLETE, KEPT, LEFT, LINKS, MANIFEST, ORDER, PENDING, Store, View};

/// One root as the configuration gives it.
#[derive(Debug, Clone)]
pub struct RootSetup {
    /// Where it is, absolute.
    pub path: PathBuf,
    /// By which path it is opened, where it can't be written by that one.
    pub way: Option<PathBuf>,
    /// What in it is not replicated and none of the standby's business.
    pub exclude: Exclude,
}

/// The standby's copy and all that belongs to it.
pub struct Standby<D: Disk> {
    pub(crate) disk: D,
    pub(crate) store: Store,
    pub(crate) roots: Vec<Root<D>>,
    pub(crate) generation: u64,
    pub(crate) next_name: AtomicU64,
    standing: Mutex<Standing>,
    changeset: Mutex<Option<Arc<Changeset<D>>>>,
    /// The last changeset, since this was opened, that left repositories as they were.
    pub(crate) left_out: AtomicU64,
    /// Large files that are left unfinished.
    pub(crate) unfinished: AtomicU64,
    /// What comes beside the changesets.
    pub(crate) bulk: Bulk<D>,
    /// Set for good when a sync failed.
    sync_failed: AtomicBool,
    /// From how much on a person is asked.
    pub(crate) limits: Option<Limits>,
    /// How much of the history is kept, and how long.
    pub(crate) history_limits: Option<HistoryLimits>,
    /// Held by those who read the history, and while a part of it goes.
    pub(crate) history_lock: Mutex<()>,
    /// Whether what earlier runs left to be removed from the history is gone.
    pub(crate) is_history_swept: AtomicBool,
    /// Held while the tree changes, and shared by those who must see it between two changesets.
    pub(crate) tree_lock: RwLock<()>,
}

/// One root with the folders that the standby works in.
pub(crate) struct Root<D: Disk> {
    pub(crate) path: PathBuf,
    pub(crate) exclude: Exclude,
    pub(crate) dir: D::Dir,
    pub(crate) control: D::Dir,
    /// Staged files, each under a name of its own.
    pub(crate) files: D::Dir,
    /// Staged trees that are wholly new.
    pub(crate) trees: D::Dir,
    /// Content that came beside the changesets, by its digest, and what is unfinished of it.
    pub(crate) bulk: D::Dir,
    /// What left the tree and is being removed.
    pub(crate) trash: D::Dir,
    /// What left the tree and is kept.
    pub(crate) history: D::Dir,
}

/// The changeset that is being staged.
pub(crate) struct Changeset<D: Disk> {
    pub(crate) session: SessionId,
    pub(crate) seq: Seq,
    /// Part of the names of its staged trees, which are never those of another.
    pub(crate) tag: Vec<u8>,
    pub(crate) baseline: Baseline,
    /// The tree that it starts from.
    pub(crate) manifest: View,
    /// Content left by an interrupted changeset.
    pub(crate) left: Option<View>,
    /// Places of left content that this changeset took already.
    pub(crate) taken: Mutex<std::collections::BTreeMap<Vec<u8>, (RootId, Staged)>>,
    /// Rows whose content is staged and not yet known to be durable.
    pub(crate) unrecorded: Mutex<Unrecorded>,
    pub(crate) assemblies: Assemblies<D>,
    /// Files that are made when all else is staged.
    pub(crate) rebuilds: Mutex<Rebuilds>,
    pub(crate) ops: AtomicU64,
    pub(crate) recorder: Mutex<()>,
}

/// Rows that wait for their content to be durable.
#[derive(Default)]
pub(crate) struct Unrecorded {
    pub(crate) rows: Vec<(RootId, RelPath, PendingRow)>,
    pub(crate) bytes: u64,
    /// What to sync one by one; `None` once it is more than a few.
    pub(crate) few: Few,
}

/// Staged things that can be synced one by one.
pub(crate) struct Few(pub(crate) Option<Vec<(RootId, Staged)>>);

impl Default for Few {
    fn default() -> Few {
        Few(Some(Vec::new()))
    }
}

/// LIMIT: how many staged files and folders are synced one by one; beyond, the whole filesystem is.
const FEW_MAX: usize = 48;

impl Few {
    pub(crate) fn add(&mut self, root: RootId, staged: &Staged) {
        if let Some(list) = &mut self.0 {
            list.push((root, staged.clone()));
            if list.len() > FEW_MAX {
                self.0 = None;
            }
        }
    }
}

const WORK_DIRS: [&[u8]; 5] = [CONTROL_DIR, b"stage", b"f", b"t", b"b"];
const TRASH: &[u8] = b"trash";

impl<D: Disk> Standby<D> {
    /// Opens the standby and finishes a changeset that was committed before a crash (G1).
    ///
    /// Cost: as the rest of that changeset; else one durable transaction.
    ///
    /// # Errors
    /// [`OpenError`]: store in use or of another format, root unusable, recovery impossible.
    pub fn open(disk: D, store: Store, setups: Vec<RootSetup>) -> Result<Standby<D>, OpenError> {
        let mut roots = Vec::new();
        for setup in setups {
            roots.push(open_root(&disk, setup)?);
        }
        let mut standing = store.standing()?;
        if standing.generation == 0 {
            // What an earlier store of this standby named is there still, in quarantine say.
            standing.generation = disk.now_ms();
        }
        standing.generation += u64::from(!seeded_bug!(StagedNamesAreUsedTwice));
        store.write(|txn| Store::set_standing(txn, &standing))?;
        let standby = Standby {
            disk,
            store,
            roots,
            generation: standing.generation,
            next_name: AtomicU64::new(0),
            standing: Mutex::new(standing),
            changeset: Mutex::new(None),
            left_out: AtomicU64::new(0),
            unfinished: AtomicU64::new(0),
            bulk: Bulk::default(),
            sync_failed: AtomicBool::new(false),
            limits: None,
            history_limits: None,
            history_lock: Mutex::new(()),
            is_history_swept: AtomicBool::new(false),
            tree_lock: RwLock::new(()),
        };
        standby.unfinished.store(standby.count_unfinished(), Ordering::Relaxed);
        if let Some(committed) = standing.committed.filter(|_| !seeded_bug!(RecoveryIsSkipped)) {
            tracing::info!(seq = committed.seq.0, "finishing a committed changeset");
            standby.apply(committed)?;
        } else if standby.staged_files()? == standby.bulk_files() {
            // From a crash: nothing knows of it.
            standby.sweep();
        }
        standby.forget_other_history()?;
        standby.finish_rewind()?;
        Ok(standby)
    }

    /// The changeset that is the tree; `None` before the first one.
    pub fn applied(&self) -> Option<Applied> {
        self.standing().applied.filter(|applied| *applied != ADOPTED)
    }

    /// Whether the active has to name everything, though there is a tree: its rows are not all known, or it is not the one
    /// that the active knows of.
    ///
    /// # Errors
    /// `Store`.
    pub fn needs_everything(&self) -> Result<bool, StandbyError> {
        Ok(self.rewound().is_some() || self.store.is_distrusted()? || self.store.is_resumed()?)
    }

    /// Whether a changeset is committed and not yet the tree: files of it may be in place, others not.
    pub fn is_applying(&self) -> bool {
        self.standing().committed.is_some()
    }

    /// The number of configured roots.
    pub fn root_count(&self) -> u8 {
        u8::try_from(self.roots.len()).expect("roots are few")
    }

    /// How many files an interrupted changeset left staged.
    ///
    /// # Errors
    /// `Store`.
    pub fn staged_files(&self) -> Result<u64, StandbyError> {
        let left = self.store.view(LEFT)?.len()? + self.store.view(PENDING)?.len()? + self.unfinished.load(Ordering::Relaxed);
        Ok(left + self.bulk_files())
    }

    /// How many entries the tree has.
    ///
    /// # Errors
    /// `Store`.
    pub fn entries(&self) -> Result<u64, StandbyError> {
        self.store.view(MANIFEST)?.len()
    }

    /// Begins to stage changeset `seq`; what an unfinished one left stays usable. `acked` is the last changeset of which the
    /// active knew what became of it when it captured this one.
    ///
    /// Cost: nothing when nothing is left; else a pass over what is left and one durable transaction.
    ///
    /// # Errors
    /// `Sequence` when it doesn't follow the last one (R5); `LeftOut` when the active didn't know that repositories were left
    /// out, of which this one may bring a part; `Rewound`; `Store`, `OutOfSpace`; `Io` when a committed changeset still
    /// can't be finished.
    pub fn begin(&self, session: SessionId, seq: Seq, baseline: Baseline, acked: Seq) -> Result<(), StandbyError> {
        if self.sync_failed.load(Ordering::Relaxed) {
            return Err(StandbyError::SyncFailed);
        }
        if let Some(committed) = self.standing().committed {
            // Its rows must not be taken for what an unfinished changeset left.
            self.apply(committed)?;
        }
        if let Some(to) = self.rewound().filter(|_| !seeded_bug!(RewoundGoesOn)) {
            return Err(StandbyError::Rewound { to });
        }
        let applied = self.applied();
        let follows = match (baseline, applied) {
            (Baseline::Full, None) => true,
            (Baseline::Full, Some(a)) => seq > a.seq,
            (Baseline::Delta(_), None) => false,
            (Baseline::Delta(from), Some(a)) => a.session == session && a.seq == from && seq > from,
        };
        if !follows && !seeded_bug!(SequenceIsNotChecked) {
            return Err(StandbyError::Sequence { applied: applied.map(|a| a.seq).unwrap_or_default() });
        }
        let left_out = Seq(self.left_out.load(Ordering::Relaxed));
        if baseline != Baseline::Full && acked < left_out && !seeded_bug!(LeftOutIsNotAsked) {
            return Err(StandbyError::LeftOut { seq: left_out });
        }
        self.abandon()?;
        if self.make_room().is_err() {
            // What an earlier try left may be what takes the room; sending it again is better than standing still.
            self.drop_left_over()?;
            self.check_space()?;
        }
        self.keep_left_over()?;
        let left = self.store.view(LEFT)?;
        let left = if left.len()? > 0 { Some(left) } else { None };
        let changeset = Changeset {
            session,
            seq,
            tag: self.fresh_name(),
            baseline,
            manifest: self.store.view(MANIFEST)?,
            left,
            taken: Mutex::default(),
            unrecorded: Mutex::default(),
            assemblies: Assemblies::default(),
            rebuilds: Mutex::default(),
            ops: AtomicU64::new(0),
            recorder: Mutex::default(),
        };
        *lock(&self.changeset) = Some(Arc::new(changeset));
        Ok(())
    }

    /// Ends the staging of a changeset that won't be finished; what is staged stays for the next one.
    ///
    /// # Errors
    /// `Store`, `Io`, `OutOfSpace`: what is staged is lost for the next try, nothing else.
    pub fn abandon(&self) -> Result<(), StandbyError> {
        let Some(changeset) = lock(&self.changeset).take() else { return Ok(()) };
        self.note_unfinished(&changeset)?;
        self.leave_unfinished(&changeset);
        if self.sync_failed.load(Ordering::Relaxed) {
            self.drop_unfinished();
            self.drop_bulk();
            return Ok(()); // a second sync would succeed, and prove nothing
        }
        self.record_durably(&changeset)
    }

    /// Passes on the outcome of a sync; when it failed, all that is staged is forgotten, and the standby does no more.
    ///
    /// On ext4, XFS and btrfs a second sync succeeds although the disk still holds the old bytes: what one sync could
    /// not write is never recorded as durable (G3).
    pub(crate) fn synced(&self, outcome: Result<(), StandbyError>) -> Result<(), StandbyError> {
        if seeded_bug!(FailedSyncsAreRepeated) {
            return outcome;
        }
        if outcome.is_err() && !self.sync_failed.swap(true, Ordering::Relaxed) && self.standing().committed.is_none() {
            let forgotten = self.store.write(|txn| {
                clear(txn)?;
                txn.delete_table(LEFT)?;
                txn.open_table(LEFT)?;
                Ok(())
            });
            if let Err(e) = forgotten {
                tracing::error!(error = %e, "what was staged can't be forgotten");
            }
            self.drop_unfinished();
            self.drop_bulk();
        }
        outcome
    }

    /// Repositories that the active has to send again: a reference named an object that was not there.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn incomplete(&self) -> Result<Vec<Repository>, StandbyError> {
        let view = self.store.view(PENDING)?;
        let mut out = Vec::new();
        self.store.for_each_key(INCOMPLETE, |k| {
            out.push(view.path_of(k)?);
            Ok(())
        })?;
        Ok(out)
    }

    /// What is in the quarantines of the roots, by name; at most 100 a root.
    pub fn quarantined(&self) -> Vec<String> {
        let mut out = Vec::new();
        for root in &self.roots {
            let listed = self.disk.open_dir(&root.control, crate::purge::QUARANTINE).and_then(|dir| self.disk.list(&dir));
            let mut names: Vec<String> =
                listed.unwrap_or_default().iter().map(|listed| coldspare_core::path::escape(&listed.name)).collect();
            names.sort();
            let at = root.path.join(".coldspare/quarantine");
            out.extend(names.into_iter().take(100).map(|name| at.join(name).display().to_string()));
        }
        out
    }

    /// What the filesystems of the roots have left; without those that don't say.
    pub fn spaces(&self) -> Vec<(PathBuf, Space)> {
        self.roots.iter().filter_map(|root| Some((root.path.clone(), self.disk.space(&root.dir).ok()?))).collect()
    }

    /// Takes note of what the active holds back; with `is_first` what was noted before is over.
    ///
    /// # Errors
    /// `Store`.
    pub fn note_held_back(&self, is_first: bool, problems: &[Problem]) -> Result<(), StandbyError> {
        self.store.write(|txn| {
            if is_first {
                txn.delete_table(HELD)?;
            }
            let mut held = txn.open_table(HELD)?;
            for problem in problems {
                held.insert(key::encode(problem.root, &problem.path).as_slice(), codec::encode(problem).as_slice())?;
            }
            Ok(())
        })
    }

    /// What the active held back when it last said so.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn held_back(&self) -> Result<Vec<Problem>, StandbyError> {
        let mut out = Vec::new();
        self.store.view(HELD)?.for_each_reversed(|_, _, problem: Problem| {
            out.push(problem);
            Ok(())
        })?;
        out.reverse();
        Ok(out)
    }

    /// Removes all that is staged.
    fn drop_left_over(&self) -> Result<(), StandbyError> {
        tracing::warn!("space is short: what an interrupted changeset left staged is removed");
        self.store.write(clear)?;
        self.sweep();
        self.drop_bulk();
        Ok(())
    }

    /// Tells which contents the standby has. Without a changeset under way it has none: the one that is asked for was refused,
    /// and whoever asks will hear of that.
    ///
    /// # Errors
    /// `Protocol` when a root isn't configured; `Store`.
    pub fn have(&self, asks: &[Ask]) -> Result<Vec<Have>, StandbyError> {
        let Ok(changeset) = self.current() else { return Ok(vec![Have::Missing; asks.len()]) };
        let mut budget = crate::unfinished::DIGESTS_MAX;
        let mut out = Vec::with_capacity(asks.len());
        for ask in asks {
            if ask.root.0 >= self.root_count() {
                return Err(StandbyError::Protocol(format!("a question about root {}", ask.root.0)));
            }
            let row = changeset.manifest.manifest(ask.root, &ask.path)?;
            let is_it = row.is_some_and(|row| row.entry.digest() == Some(ask.digest) && row.entry.size() == ask.size);
            let at_path = is_it && !self.is_wanted(ask.root, &ask.path)?;
            out.push(if at_path {
                Have::AtPath
            } else if self.has_left(&changeset, ask.digest, ask.size)? || self.has_bulk(ask.root, ask.digest, ask.size) {
                Have::Staged
            } else if let Some(digests) = self.unfinished_blocks(ask, &mut budget)? {
                Have::Part(digests)
            } else {
                Have::Missing
            });
        }
        Ok(out)
    }

    /// The changeset under way.
    pub(crate) fn current(&self) -> Result<Arc<Changeset<D>>, StandbyError> {
        lock(&self.changeset).clone().ok_or_else(|| StandbyError::Protocol("content without a changeset".into()))
    }

    pub(crate) fn end_changeset(&self) {
        *lock(&self.changeset) = None;
    }

    pub(crate) fn standing(&self) -> Standing {
        *lock(&self.standing)
    }

    pub(crate) fn set_standing(&self, standing: Standing) {
        *lock(&self.standing) = standing;
    }

    pub(crate) fn root(&self, root: RootId) -> &Root<D> {
        &self.roots[usize::from(root.0)]
    }

    /// A name below `f` or `t` that was never used.
    pub(crate) fn fresh_name(&self) -> Vec<u8> {
        format!("{}-{}", self.generation, self.next_name.fetch_add(1, Ordering::Relaxed)).into_bytes()
    }

    /// Turns the rows of an unfinished changeset into content that can be found by its digest.
    pub(crate) fn keep_left_over(&self) -> Result<(), StandbyError> {
        let pending = self.store.view(PENDING)?;
        // A changeset may have named nothing yet but what it keeps.
        if pending.len()? == 0 && self.store.is_empty(KEPT)? {
            return Ok(());
        }
        // Rows that can't be read cost what they tell, no more.
        let named = self.named_by_rows(&pending).unwrap_or_default();
        self.store.write(|txn| {
            missing::note(txn, &named)?;
            let mut left = txn.open_table(LEFT)?;
            let mut failed = Ok(());
            let each = |root: RootId, _: RelPath, row: PendingRow| {
                if let (Some(staged), Some(entry)) = (row.action.staged(), &row.entry)
                    && let Some(digest) = entry.digest()
                {
                    let value = codec::encode(&(root, staged.clone()));
                    failed = left.insert(left_key(digest, entry.size()).as_slice(), value.as_slice()).map(drop);
                }
                Ok(())
            };
            // A row that can't be read costs its content, no more.
            let _ = pending.for_each_reversed(each);
            failed?;
            drop(left);
            clear(txn)
        })
    }

    /// As [`Standby::check_space`], once the history gave what it has.
    pub(crate) fn make_room(&self) -> Result<(), StandbyError> {
        self.check_space().or_else(|e| if self.drop_history()? { self.check_space() } else { Err(e) })
    }

    /// Refuses to begin or go on when the last bytes or inodes would be used up.
    pub(crate) fn check_space(&self) -> Result<(), StandbyError> {
        for root in &self.roots {
            let Ok(space) = self.disk.space(&root.dir) else { continue };
            if (space.free_bytes < FREE_BYTES_MIN || space.free_inodes < FREE_INODES_MIN) && !seeded_bug!(SpaceIsNotChecked) {
                let detail = format!(
                    "{}: {} bytes and {} inodes are free, {FREE_BYTES_MIN} and {FREE_INODES_MIN} have to stay so",
                    root.path.display(),
                    space.free_bytes,
                    space.free_inodes
                );
                return Err(StandbyError::OutOfSpace { detail });
            }
        }
        Ok(())
    }
}

/// LIMIT: what stays free on the standby's filesystem, so that a committed changeset can always be applied.
pub(crate) const FREE_BYTES_MIN: u64 = 16 << 20;
const FREE_INODES_MIN: u64 = 256;

/// Empties the tables of a changeset.
pub(crate) fn clear(txn: &redb::WriteTransaction) -> Result<(), redb::Error> {
    txn.delete_table(PENDING)?;
    txn.open_table(PENDING)?;
    for table in [ORDER, LINKS, KEPT] {
        txn.delete_table(table)?;
        txn.open_table(table)?;
    }
    Ok(())
}

pub(crate) fn left_key(digest: Digest, size: u64) -> [u8; 40] {
    let mut key = [0; 40];
    key[..32].copy_from_slice(&digest.0);
    key[32..].copy_from_slice(&size.to_be_bytes());
    key
}

fn open_root<D: Disk>(disk: &D, setup: RootSetup) -> Result<Root<D>, OpenError> {
    let RootSetup { path, way, exclude } = setup;
    let fail = |what: &str, e: std::io::Error| OpenError::Root { path: path.clone(), detail: format!("{what}: {e}") };
    let dir = disk.open_root(way.as_ref().unwrap_or(&path)).map_err(|e| fail("can't be opened", e))?;
    let work = |at: &D::Dir, name: &[u8]| -> Result<D::Dir, OpenError> {
        match disk.create_dir(at, name) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(fail("the work folder .coldspare can't be made", e)),
            _ => {}
        }
        disk.open_dir(at, name).map_err(|e| match e.kind() {
            std::io::ErrorKind::CrossesDevices => {
                fail("the work folder .coldspare must be on the same filesystem as the root; remove the mount", e)
            }
            _ => fail("the work folder .coldspare can't be opened", e),
        })
    };
    // Content is staged durably only below durable folders.
    let durable = |d: &D::Dir| disk.sync_dir(d).map_err(|e| fail("can't be synced", e));
    let control = work(&dir, WORK_DIRS[0])?;
    let stage = work(&control, WORK_DIRS[1])?;
    let files = work(&stage, WORK_DIRS[2])?;
    let trees = work(&stage, WORK_DIRS[3])?;
    let bulk = work(&stage, WORK_DIRS[4])?;
    let trash = work(&control, TRASH)?;
    let history = work(&control, HISTORY_DIR)?;
    for dir in [&stage, &control, &dir] {
        durable(dir)?;
    }
    let same = |d: &D::Dir| disk.stat_dir(d).map(|s| s.dev);
    let (outer, inner) = (same(&dir), same(&files));
    match (outer, inner) {
        (Ok(a), Ok(b)) if a == b => {}
        (Ok(_), Ok(_)) => {
            let detail = "the work folder .coldspare is on another filesystem than the root; files can't be renamed into place".into();
            return Err(OpenError::Root { path, detail });
        }
        (Err(e), _) | (_, Err(e)) => return Err(fail("can't be examined", e)),
    }
    Ok(Root { path, exclude, dir, control, files, trees, bulk, trash, history })
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
