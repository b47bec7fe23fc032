//! Bulk: content of large files that comes beside the changesets, before one names it, so that no small changeset waits for
//! it.
//!
//! It is assembled as the large files of a changeset are, in a folder of its own, and has the name of its digest once it is
//! whole and durable. A changeset that names the content links it to where it stages; nothing of it is in the store.
//!
//! Invariants: a file under the name of a digest was read back, has that digest, and is durable; what the tree took loses
//! its second name before the next changeset begins.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use coldspare_core::changeset::{Ask, BulkEnd, FilePart, Have};
use coldspare_core::{Digest, Entry, RelPath, RootId};
use coldspare_os::Disk;

use crate::assemble::Assembly;
use crate::error::{StandbyError, io};
use crate::place::Places;
use crate::row::{Action, Staged};
use crate::stage::{create, digest_file};
use crate::standby::{Changeset, FREE_BYTES_MIN, Standby, left_key, lock};
use crate::store::MANIFEST;
use crate::unfinished;

/// What comes beside the changesets.
pub(crate) struct Bulk<D: Disk> {
    /// The file under way.
    current: Mutex<Current<D>>,
    /// What this process read back and synced: it needn't be read once more when a changeset takes it.
    verified: Mutex<BTreeSet<(RootId, Vec<u8>)>>,
}

impl<D: Disk> Default for Bulk<D> {
    fn default() -> Bulk<D> {
        Bulk { current: Mutex::new(Current { number: 0, file: None }), verified: Mutex::default() }
    }
}

/// LIMIT: one file at a time; what still comes of one before it, which the active gave up, is dropped.
struct Current<D: Disk> {
    /// Its number, the highest of the connection; 0 before the first.
    number: u32,
    file: Option<Arc<BulkFile<D>>>,
}

struct BulkFile<D: Disk> {
    assembly: Assembly<D>,
    state: Mutex<State>,
    /// Bytes that were written since the last sync.
    unsynced: AtomicU64,
}

#[derive(Default)]
struct State {
    written: u32,
    /// A part could not be written: none of it counts.
    has_failed: bool,
    end: Option<(u32, BulkEnd)>,
}

/// LIMIT: bytes of one that are not on the disk: the sync of a changeset may have to wait for them.
const UNSYNCED_BYTES_MAX: u64 = 8 << 20;

/// What is to be answered to a question of the active's.
pub type Answered = (u32, Have);

fn name_of(digest: Digest, size: u64) -> Vec<u8> {
    let hex: String = digest.0.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}-{size}").into_bytes()
}

impl<D: Disk> Standby<D> {
    /// Tells what there is of a file that is about to be sent as bulk.
    ///
    /// Where there is no room, the oldest points go if that makes some.
    ///
    /// Cost: what is there of it is synced and read.
    ///
    /// # Errors
    /// `Protocol` when the root isn't configured; `Io`, `Store`, `Damaged`.
    pub fn have_bulk(&self, ask: &Ask) -> Result<Have, StandbyError> {
        self.check_root(ask.root)?;
        if self.has_bulk(ask.root, ask.digest, ask.size) {
            return Ok(Have::Staged);
        }
        let root = self.root(ask.root);
        let there = self.disk.stat(&root.bulk, &unfinished::name(ask.root, &ask.path)).map_or(0, |stat| stat.blocks * 512);
        let needed = ask.size.saturating_sub(there).saturating_add(2 * FREE_BYTES_MIN);
        if !self.make_room_for(ask.root, needed)? {
            return Ok(Have::NoRoom);
        }
        let mut budget = unfinished::DIGESTS_MAX;
        Ok(self.blocks_in(&root.bulk, ask, &mut budget)?.map_or(Have::Missing, Have::Part))
    }

    /// Writes a part of a file that is sent as bulk; an answer is due when it was the last.
    ///
    /// Trouble with the part shows in that answer: the content is missing then.
    ///
    /// # Errors
    /// `Protocol`; `Io` and `SyncFailed` when nothing that is staged can be relied on any more.
    pub fn stage_bulk(&self, part: &FilePart, literal: &[u8]) -> Result<Option<Answered>, StandbyError> {
        for root in part.sources.iter().map(|(root, _)| *root).chain([part.root]) {
            self.check_root(root)?;
        }
        let Some(file) = self.bulk_file(part.file, part.root, &part.path)? else { return Ok(None) };
        let written = if part.sources.is_empty() {
            self.write_part(&file.assembly, part, literal)
        } else {
            self.write_pack_part(&self.store.view(MANIFEST)?, &file.assembly, part, literal)
        };
        let unsynced = file.unsynced.fetch_add(literal.len() as u64, Ordering::Relaxed) + literal.len() as u64;
        let synced = if unsynced >= UNSYNCED_BYTES_MAX {
            file.unsynced.store(0, Ordering::Relaxed);
            self.synced(self.disk.sync_file(&file.assembly.file).map_err(io("syncing", part.path.as_bytes())))
        } else {
            Ok(())
        };
        let mut state = lock(&file.state);
        state.written += 1;
        if let Err(e) = written {
            tracing::info!(path = %part.path, error = %e, "a part of a file that comes as bulk can't be written");
            state.has_failed = true;
        }
        drop(state);
        synced?;
        self.complete_bulk(part.file, &file)
    }

    /// Takes note that all of a file was sent; an answer is due when all of it was written already.
    ///
    /// # Errors
    /// As [`Standby::stage_bulk`].
    pub fn end_bulk(&self, no: u32, end: BulkEnd) -> Result<Option<Answered>, StandbyError> {
        self.check_root(end.root)?;
        let number = end.file;
        let Some(file) = self.bulk_file(number, end.root, &end.path)? else { return Ok(None) };
        lock(&file.state).end = Some((no, end));
        self.complete_bulk(number, &file)
    }

    /// The connection ended: what is unfinished stays for the next one.
    pub fn leave_bulk(&self) {
        *lock(&self.bulk.current) = Current { number: 0, file: None };
    }

    /// No changeset will ask for any of it: removes what isn't under way.
    pub fn bulk_over(&self) {
        let open = lock(&self.bulk.current).file.as_ref().map(|file| file.assembly.name.clone());
        self.remove_bulk(|name| open.as_deref() != Some(name));
    }

    /// Removes all of it; what is under way fails.
    pub(crate) fn drop_bulk(&self) {
        if let Some(file) = &lock(&self.bulk.current).file {
            lock(&file.state).has_failed = true;
        }
        self.remove_bulk(|_| true);
    }

    fn remove_bulk(&self, goes: impl Fn(&[u8]) -> bool) {
        lock(&self.bulk.verified).clear();
        for root in &self.roots {
            for listed in self.disk.list(&root.bulk).unwrap_or_default().iter().filter(|listed| goes(&listed.name)) {
                self.forget_bulk(root, &listed.name);
            }
        }
    }

    /// After a changeset was applied: what it took has its place in the tree.
    pub(crate) fn sweep_bulk(&self) {
        for root in &self.roots {
            for listed in self.disk.list(&root.bulk).unwrap_or_default() {
                if self.disk.stat(&root.bulk, &listed.name).is_ok_and(|stat| stat.nlink > 1) {
                    self.forget_bulk(root, &listed.name);
                }
            }
        }
    }

    fn forget_bulk(&self, root: &crate::standby::Root<D>, name: &[u8]) {
        if let Err(e) = self.disk.remove_file(&root.bulk, name) {
            tracing::warn!(root = %root.path.display(), error = %e, "content that came as bulk can't be removed");
        }
    }

    /// How many files there are of it, whole or not.
    pub(crate) fn bulk_files(&self) -> u64 {
        self.roots.iter().map(|root| self.disk.list(&root.bulk).map_or(0, |listed| listed.len() as u64)).sum()
    }

    /// Whether this content is there, whole.
    pub(crate) fn has_bulk(&self, root: RootId, digest: Digest, size: u64) -> bool {
        self.disk.stat(&self.root(root).bulk, &name_of(digest, size)).is_ok_and(|stat| stat.size == size)
    }

    /// Links content that came as bulk to where a changeset stages it.
    pub(crate) fn take_bulk(
        &self,
        changeset: &Changeset<D>,
        places: &mut Places<'_, D>,
        root: RootId,
        path: &RelPath,
        entry: &Entry,
    ) -> Result<(Action, u64), StandbyError> {
        let unknown = || StandbyError::UnknownTarget { root, path: path.clone() };
        let digest = entry.digest().ok_or_else(unknown)?;
        let (disk, own, bulk) = (&self.disk, name_of(digest, entry.size()), &self.root(root).bulk);
        let (spot, name, action) = places.spot(root, path)?;
        let here = action.staged().cloned().unwrap_or(Staged(Vec::new()));
        let is_first = lock(&changeset.taken).insert(left_key(digest, entry.size()).to_vec(), (root, here)).is_none();
        let gone = |e: std::io::Error| if e.kind() == ErrorKind::NotFound { unknown() } else { io("taking", path.as_bytes())(e) };
        if is_first {
            create(path, || disk.link(bulk, &own, spot.dir(), &name), || disk.remove_file(spot.dir(), &name)).map_err(|e| {
                let is_gone = disk.stat(bulk, &own).is_err();
                if is_gone { unknown() } else { e }
            })?;
        } else {
            // Two files of one content are two files.
            let source = disk.open_file(bulk, &own).map_err(gone)?;
            let file = create(path, || disk.create_file(spot.dir(), &name), || disk.remove_file(spot.dir(), &name))?;
            disk.copy_range(&source, 0, &file, 0, entry.size()).map_err(io("copying", path.as_bytes()))?;
        }
        let file = disk.open_file(spot.dir(), &name).map_err(io("opening", path.as_bytes()))?;
        if !lock(&self.bulk.verified).contains(&(root, own.clone()))
            && let Err(e) = self.check_digest(&file, root, path, entry)
        {
            self.forget_bulk(self.root(root), &own); // the next try has to send it
            return Err(e);
        }
        Ok((action, self.set_file_attributes(&file, path, entry)?.ino))
    }

    /// The file that a part belongs to; `None` when it was given up.
    fn bulk_file(&self, number: u32, root: RootId, path: &RelPath) -> Result<Option<Arc<BulkFile<D>>>, StandbyError> {
        let mut current = lock(&self.bulk.current);
        if number < current.number {
            return Ok(None);
        }
        if number == current.number {
            let known = current.file.clone();
            return match known.filter(|known| (known.assembly.root, &known.assembly.path) == (root, path)) {
                Some(known) => Ok(Some(known)),
                None => Err(StandbyError::Protocol(format!("bulk {number} is {path} and another, or at its end"))),
            };
        }
        let (disk, bulk, name) = (&self.disk, &self.root(root).bulk, unfinished::name(root, path));
        let (file, is_resumed) = match disk.open_file_to_write(bulk, &name) {
            Ok(file) => (file, true),
            Err(e) if e.kind() == ErrorKind::NotFound => (disk.create_file(bulk, &name).map_err(io("staging", path.as_bytes()))?, false),
            Err(e) => return Err(io("opening the unfinished", path.as_bytes())(e)),
        };
        let base = self.base_of(&self.store.view(MANIFEST)?, root, path)?;
        let (has_sources, unwritten_bytes, state) = Default::default();
        let assembly = Assembly { root, path: path.clone(), name, file, base, has_sources, is_resumed, unwritten_bytes, state };
        self.note_bulk(root, path)?;
        let file = Arc::new(BulkFile { assembly, state: Mutex::default(), unsynced: AtomicU64::new(0) });
        *current = Current { number, file: Some(file.clone()) };
        Ok(Some(file))
    }

    /// Checks a file of which nothing is missing, and gives it the name of its digest.
    fn complete_bulk(&self, number: u32, file: &BulkFile<D>) -> Result<Option<Answered>, StandbyError> {
        let mut state = lock(&file.state);
        let written = state.written;
        let Some((no, end)) = state.end.take_if(|(_, end)| end.segments <= written) else { return Ok(None) };
        let has_failed = state.has_failed;
        drop(state);
        let mut current = lock(&self.bulk.current);
        if current.number == number {
            current.file = None;
        }
        drop(current);
        let (disk, assembly) = (&self.disk, &file.assembly);
        let root = self.root(assembly.root);
        let whole = || -> Result<bool, StandbyError> {
            let bytes = end.path.as_bytes();
            disk.set_len(&assembly.file, end.size).map_err(io("writing", bytes))?;
            if has_failed || digest_file(disk, &assembly.file).map_err(io("reading", bytes))? != (end.digest, end.size) {
                return Ok(false);
            }
            self.synced(disk.sync_file(&assembly.file).map_err(io("syncing", bytes)))?;
            let name = name_of(end.digest, end.size);
            match disk.rename(&root.bulk, &assembly.name, &root.bulk, &name) {
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false), // removed meanwhile, for room
                renamed => renamed.map_err(io("staging", bytes))?,
            }
            self.synced(disk.sync_dir(&root.bulk).map_err(io("syncing", bytes)))?;
            lock(&self.bulk.verified).insert((assembly.root, name));
            Ok(true)
        };
        let is_staged = whole()?;
        if !is_staged {
            tracing::info!(path = %end.path, "what came as bulk isn't what was announced; it has to be sent again");
            let _ = disk.remove_file(&root.bulk, &assembly.name); // a next try must not go on inside it
        }
        Ok(Some((no, if is_staged { Have::Staged } else { Have::Missing })))
    }

    fn check_root(&self, root: RootId) -> Result<(), StandbyError> {
        if root.0 < self.root_count() { Ok(()) } else { Err(StandbyError::Protocol(format!("bulk of root {}", root.0))) }
    }
}
