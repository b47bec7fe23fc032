//! Stage: writes the content of a changeset below the stage folder, checked against its digests.
//!
//! Called from several threads at once, in any order of operations. The tree is not touched.
//!
//! Invariants: a row is recorded only after its content is durable; content that doesn't have its digest is refused.

use std::cell::RefCell;
use std::io::ErrorKind;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

use coldspare_core::{Body, ContentRef, Digest, Entry, Op, RelPath, RootId, Seq, codec, git, key, seeded_bug};
use coldspare_os::{Attributes, Disk, Stat};

use crate::error::{StandbyError, io};
use crate::place::Places;
use crate::row::{Action, PendingRow, Staged};
use crate::standby::{Changeset, Standby, Unrecorded, left_key, lock};
use crate::store::{KEPT, LEFT, LINKS, ORDER, PENDING};

/// LIMIT: rows that wait for their content to be durable, in memory.
const UNRECORDED_ROWS: usize = 20_000;
/// LIMIT: bytes of content that are sent again after a crash.
const UNRECORDED_BYTES: u64 = 256 << 20;
/// Runs of zeros of this many bytes become holes in sparse files.
const HOLE_BYTES: usize = 4096;

impl<D: Disk> Standby<D> {
    /// Stages a batch; `payload` is the joined content of its inline files, and recipes.
    ///
    /// Cost: for a small file, one create, write, the calls for its attributes and one close.
    ///
    /// # Errors
    /// [`StandbyError`]: the changeset can't be finished any more; call [`Standby::abandon`].
    pub fn stage_batch(&self, seq: Seq, ops: Vec<Op>, payload: &[u8]) -> Result<(), StandbyError> {
        let changeset = self.current_as(seq)?;
        let mut places = Places::new(self, &changeset);
        let mut rest = payload;
        let mut staged = Unrecorded::default();
        let count = ops.len() as u64;
        let mut kept = Vec::new();
        for op in ops {
            op.check(self.root_count()).map_err(|e| StandbyError::Protocol(format!("{}: {e}", op.path())))?;
            let payload_bytes = usize::try_from(op.payload_bytes()).unwrap_or(usize::MAX);
            match op {
                Op::Delete { root, path } => {
                    if changeset.manifest.manifest(root, &path)?.is_some() {
                        staged.rows.push((root, path, PendingRow::new(None, Action::Remove, 0)));
                    }
                }
                Op::Keep { root, path } => kept.push(key::encode(root, &path)),
                Op::Rename { root, from, to } => staged.rows.push(self.stage_rename(&changeset, root, from, to)?),
                Op::Put { root, path, entry, content } => {
                    let Some((inline, others)) = rest.split_at_checked(payload_bytes) else {
                        return Err(StandbyError::Protocol(format!("{path}: the batch has less content than it says")));
                    };
                    rest = others;
                    self.stage_put(&changeset, &mut places, &mut staged, root, path, entry, content, inline)?;
                }
            }
        }
        if !rest.is_empty() {
            return Err(StandbyError::Protocol(format!("{} bytes of content belong to no file", rest.len())));
        }
        if !kept.is_empty() {
            self.store.write_lazily(|txn| {
                let mut table = txn.open_table(KEPT)?;
                kept.iter().try_for_each(|k| table.insert(k.as_slice(), ()).map(drop))?;
                Ok(())
            })?;
        }
        changeset.ops.fetch_add(count, Ordering::Relaxed);
        self.note(&changeset, staged)
    }

    pub(crate) fn current_as(&self, seq: Seq) -> Result<std::sync::Arc<Changeset<D>>, StandbyError> {
        let changeset = self.current()?;
        if changeset.seq != seq {
            return Err(StandbyError::Protocol(format!("content of changeset {seq} while {} is under way", changeset.seq)));
        }
        Ok(changeset)
    }

    #[allow(clippy::too_many_arguments)] // one operation, taken apart
    fn stage_put(
        &self,
        changeset: &Changeset<D>,
        places: &mut Places<'_, D>,
        staged: &mut Unrecorded,
        root: RootId,
        path: RelPath,
        entry: Entry,
        content: ContentRef,
        inline: &[u8],
    ) -> Result<(), StandbyError> {
        let (action, ino) = match (&entry.body, content) {
            (Body::Dir, _) => (self.stage_dir(places, root, &path)?, 0),
            (Body::Symlink { target }, _) => {
                let (spot, name, action) = places.spot(root, &path)?;
                create(&path, || self.disk.symlink(target, spot.dir(), &name), || self.disk.remove_file(spot.dir(), &name))?;
                let m = &entry.meta;
                let set = self.disk.set_attributes_of_symlink(spot.dir(), &name, m.uid, m.gid, (m.mtime.secs, m.mtime.nanos));
                (action, set.map_err(io("setting the attributes of", path.as_bytes()))?.ino)
            }
            (Body::Hardlink { .. }, _) => (Action::Record, 0), // made when all else is staged
            (Body::File { digest, sparse, .. }, ContentRef::Inline) => {
                if Digest(coldspare_delta::digest(inline)) != *digest && !seeded_bug!(InlineDigestsAreNotChecked) {
                    return Err(StandbyError::ContentDiffers { root, path });
                }
                let (spot, name, action) = places.spot(root, &path)?;
                let disk = &self.disk;
                let file = create(&path, || disk.create_file(spot.dir(), &name), || disk.remove_file(spot.dir(), &name))?;
                write_content(disk, &file, inline, *sparse).map_err(io("writing", path.as_bytes()))?;
                staged.bytes += inline.len() as u64;
                (action, self.set_file_attributes(&file, &path, &entry)?.ino)
            }
            (Body::File { .. }, ContentRef::Segments { file, segments }) => {
                let put = crate::assemble::Put { root, path, entry, segments };
                return self.assemble_put(changeset, file, put);
            }
            (Body::File { digest, size, .. }, ContentRef::Unchanged) => {
                let row = changeset.manifest.manifest(root, &path)?;
                match row {
                    Some(row) if row.entry.digest() == Some(*digest) && row.entry.size() == *size => (Action::Attributes, row.ino),
                    Some(_) => return Err(StandbyError::BaseDiffers { root, path }),
                    None => return Err(StandbyError::UnknownTarget { root, path }),
                }
            }
            (Body::File { digest, size, .. }, ContentRef::Staged) => {
                let (action, ino) = self.take_left(changeset, places, root, &path, &entry, left_key(*digest, *size))?;
                staged.bytes += size;
                (action, ino)
            }
            (Body::File { .. }, ContentRef::Rebuilt { .. }) => return changeset.put_rebuilt(self.root_count(), root, path, entry, inline),
            (Body::File { .. }, ContentRef::None) => return Err(StandbyError::Protocol(format!("{path}: a file without content"))),
        };
        if let Some(at) = action.staged() {
            staged.few.add(root, at);
        }
        staged.rows.push((root, path, PendingRow::new(Some(entry), action, ino)));
        Ok(())
    }

    pub(crate) fn stage_dir(&self, places: &mut Places<'_, D>, root: RootId, path: &RelPath) -> Result<Action, StandbyError> {
        let Some(top) = places.new_top(root, path)? else { return Ok(Action::Attributes) };
        places.tree_dir(root, &top, path)?;
        let staged = places.in_tree(root, &top, path);
        Ok(if top == *path { Action::Place { from: staged } } else { Action::Carried { at: staged } })
    }

    /// Content that an interrupted changeset left, or that came beside the changesets: moved, or linked, to where this one
    /// needs it, or copied when it needs it twice.
    fn take_left(
        &self,
        changeset: &Changeset<D>,
        places: &mut Places<'_, D>,
        root: RootId,
        path: &RelPath,
        entry: &Entry,
        key: [u8; 40],
    ) -> Result<(Action, u64), StandbyError> {
        let Some(value) = changeset.left.as_ref().map(|left| left.value(&key)).transpose()?.flatten() else {
            return self.take_bulk(changeset, places, root, path, entry);
        };
        let (left_root, left_at): (RootId, Staged) = codec::decode(&value).map_err(|e| self.store.damaged(format!("left content: {e}")))?;
        let disk = &self.disk;
        let (spot, name, action) = places.spot(root, path)?;
        let here = action.staged().cloned().unwrap_or(Staged(Vec::new()));
        let mut taken = lock(&changeset.taken);
        let earlier = taken.get(key.as_slice()).cloned();
        if earlier.is_none() && left_root == root {
            let (dir, from) = self.staged_dir(left_root, &left_at)?;
            disk.rename(&dir, &from, spot.dir(), &name).map_err(io("moving staged content to", path.as_bytes()))?;
            taken.insert(key.to_vec(), (root, here));
            drop(taken);
        } else {
            drop(taken);
            let (from_root, from_at) = earlier.unwrap_or((left_root, left_at));
            let (dir, from) = self.staged_dir(from_root, &from_at)?;
            let source = disk.open_file(&dir, &from).map_err(io("opening staged content for", path.as_bytes()))?;
            let file = create(path, || disk.create_file(spot.dir(), &name), || disk.remove_file(spot.dir(), &name))?;
            disk.copy_range(&source, 0, &file, 0, entry.size()).map_err(io("copying", path.as_bytes()))?;
        }
        let file = disk.open_file(spot.dir(), &name).map_err(io("opening", path.as_bytes()))?;
        if let Err(e) = self.check_digest(&file, root, path, entry) {
            // Damaged here: the next try has to send it.
            self.store.write_lazily(|txn| {
                txn.open_table(LEFT)?.remove(key.as_slice())?;
                Ok(())
            })?;
            return Err(e);
        }
        Ok((action, self.set_file_attributes(&file, path, entry)?.ino))
    }

    /// Whether an interrupted changeset left this content, or left it and this one took it already.
    pub(crate) fn has_left(&self, changeset: &Changeset<D>, digest: Digest, size: u64) -> Result<bool, StandbyError> {
        let key = left_key(digest, size);
        let Some(value) = changeset.left.as_ref().map(|left| left.value(&key)).transpose()?.flatten() else { return Ok(false) };
        if lock(&changeset.taken).contains_key(key.as_slice()) {
            return Ok(true);
        }
        // It may have been taken by a changeset that was cut off before that was recorded.
        let (root, at): (RootId, Staged) = codec::decode(&value).map_err(|e| self.store.damaged(format!("left content: {e}")))?;
        let found = self.staged_dir(root, &at).ok().and_then(|(dir, name)| self.disk.stat(&dir, &name).ok());
        Ok(found.is_some_and(|stat| stat.size == size))
    }

    /// Reads a staged file and compares it with its digest.
    pub(crate) fn check_digest(&self, file: &D::File, root: RootId, path: &RelPath, entry: &Entry) -> Result<(), StandbyError> {
        let found = digest_file(&self.disk, file).map_err(io("reading", path.as_bytes()))?;
        if (Some(found.0), found.1) != (entry.digest(), entry.size()) && !seeded_bug!(StagedDigestsAreNotChecked) {
            return Err(StandbyError::ContentDiffers { root, path: path.clone() });
        }
        Ok(())
    }

    pub(crate) fn set_file_attributes(&self, file: &D::File, path: &RelPath, entry: &Entry) -> Result<Stat, StandbyError> {
        let xattrs = xattrs(entry);
        self.disk.set_attributes_of_file(file, &attributes(entry, &xattrs)).map_err(io("setting the attributes of", path.as_bytes()))
    }

    /// Takes note of staged rows; makes them durable when they are many.
    pub(crate) fn note(&self, changeset: &Changeset<D>, mut staged: Unrecorded) -> Result<(), StandbyError> {
        let mut all = lock(&changeset.unrecorded);
        all.rows.append(&mut staged.rows);
        all.bytes += staged.bytes;
        match (&mut all.few.0, staged.few.0) {
            (Some(_), Some(more)) => {
                for (root, at) in more {
                    all.few.add(root, &at);
                }
            }
            _ => all.few.0 = None,
        }
        let is_much = all.rows.len() >= UNRECORDED_ROWS || all.bytes >= UNRECORDED_BYTES;
        drop(all);
        if is_much {
            self.make_room()?;
            self.record_durably(changeset)?;
        }
        Ok(())
    }

    /// Makes staged content durable, then records its rows, so that an interrupted changeset resumes there.
    ///
    /// Cost: one `syncfs` a root and one durable transaction.
    pub(crate) fn record_durably(&self, changeset: &Changeset<D>) -> Result<(), StandbyError> {
        let _one_at_a_time = lock(&changeset.recorder);
        let staged = std::mem::take(&mut *lock(&changeset.unrecorded));
        if staged.rows.is_empty() {
            return Ok(());
        }
        let all = Unrecorded { few: crate::standby::Few(None), ..Unrecorded::default() };
        if !seeded_bug!(LeftContentIsNotSynced) {
            self.sync_staged(&all)?;
        }
        // What came meanwhile is not in `staged` and waits for the next time; the filesystem was synced as a whole, so
        // that the last steps may sync one by one again.
        self.store.write(|txn| insert_rows(txn, staged.rows))
    }

    /// Makes staged content durable: one by one when it's few, else as a whole.
    pub(crate) fn sync_staged(&self, staged: &Unrecorded) -> Result<(), StandbyError> {
        self.synced(self.try_sync_staged(staged))
    }

    fn try_sync_staged(&self, staged: &Unrecorded) -> Result<(), StandbyError> {
        let Some(few) = &staged.few.0 else {
            for root in self.roots.iter().filter(|_| !seeded_bug!(StagedFilesystemIsNotSynced)) {
                self.disk.sync_fs(&root.dir).map_err(io("syncing the filesystem of", root.path.as_os_str().as_encoded_bytes()))?;
            }
            return Ok(());
        };
        let mut dirs = std::collections::BTreeSet::new();
        for (root, at) in few {
            let (dir, name) = self.staged_dir(*root, at)?;
            match self.disk.open_file(&dir, &name) {
                Ok(file) => self.disk.sync_file(&file).map_err(io("syncing", &at.0))?,
                Err(_) => {
                    let synced = match self.disk.open_dir(&dir, &name) {
                        Ok(own) => self.disk.sync_dir(&own),
                        // A symlink has an owner and a time, and no descriptor to sync them by.
                        Err(_) => self.disk.sync_fs(&self.root(*root).dir),
                    };
                    synced.map_err(io("syncing", &at.0))?;
                }
            }
            let mut above = at.split().0.to_vec();
            while !above.is_empty() && dirs.insert((*root, above.clone())) {
                above.truncate(above.iter().rposition(|&b| b == b'/').unwrap_or(0));
            }
        }
        for (root, at) in dirs {
            let r = self.root(root);
            let synced = match at.strip_prefix(b"t/") {
                Some(below) => self.disk.open_dir(&r.trees, below).and_then(|d| self.disk.sync_dir(&d)),
                None if at == b"t" => self.disk.sync_dir(&r.trees),
                None => self.disk.sync_dir(&r.files),
            };
            synced.map_err(io("syncing", &at))?;
        }
        Ok(())
    }
}

/// Inserts rows of a changeset, with what orders them.
pub(crate) fn insert_rows(txn: &redb::WriteTransaction, rows: Vec<(RootId, RelPath, PendingRow)>) -> Result<(), redb::Error> {
    let mut pending = txn.open_table(PENDING)?;
    let mut order = txn.open_table(ORDER)?;
    let mut links = txn.open_table(LINKS)?;
    for (root, path, row) in rows {
        let k = key::encode(root, &path);
        let is_link = matches!(row.entry, Some(Entry { body: Body::Hardlink { .. }, .. }));
        if is_link && row.action == Action::Record && row.ino == 0 {
            links.insert(k.as_slice(), ())?;
        }
        if let Some(at) = order_of(&path, &row, &k) {
            order.insert(at.as_slice(), ())?;
            let left = if let Action::Rename { from } = &row.action { Some(from) } else { None };
            if at[0] != git::ApplyRank::DirAttributes as u8 {
                // Work in a folder changes its times: they are set again at the end.
                for at in [Some(&path), left].into_iter().flatten() {
                    let dir = key::encode(root, &at.parent().unwrap_or_else(RelPath::root));
                    order.insert(order_key(git::ApplyRank::DirAttributes, git::FIRST_WAVE, &dir).as_slice(), ())?;
                }
            }
        }
        pending.insert(k.as_slice(), codec::encode(&row).as_slice())?;
    }
    Ok(())
}

/// When a row's action is performed; `None` when there is nothing to perform.
fn rank(path: &RelPath, row: &PendingRow) -> Option<git::ApplyRank> {
    let is_dir = row.entry.as_ref().is_some_and(Entry::is_dir);
    match &row.action {
        Action::Place { .. } if is_dir => Some(git::ApplyRank::of_new_tree(path)),
        Action::Place { .. } => Some(git::ApplyRank::of_put(path)),
        Action::Attributes if is_dir => Some(git::ApplyRank::DirAttributes),
        Action::Attributes => Some(git::ApplyRank::of_put(path)),
        Action::Remove => Some(git::ApplyRank::of_delete(path)),
        Action::Rename { .. } => Some(git::ApplyRank::Rename),
        Action::Carried { .. } | Action::Record => None,
    }
}

/// Where a row's action stands in the order; `None` when there is nothing to perform.
pub(crate) fn order_of(path: &RelPath, row: &PendingRow, key: &[u8]) -> Option<Vec<u8>> {
    rank(path, row).map(|rank| order_key(rank, row.wave, key))
}

fn order_key(rank: git::ApplyRank, wave: u8, key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(key.len() + 2);
    out.push(rank as u8);
    out.push(wave);
    out.extend_from_slice(key);
    out
}

/// Places whatever `make` creates, over what an earlier try may have left under the name.
pub(crate) fn create<T>(
    path: &RelPath,
    make: impl Fn() -> std::io::Result<T>,
    remove: impl Fn() -> std::io::Result<()>,
) -> Result<T, StandbyError> {
    match make() {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            remove().map_err(io("replacing the staged", path.as_bytes()))?;
            make().map_err(io("staging", path.as_bytes()))
        }
        other => other.map_err(io("staging", path.as_bytes())),
    }
}

pub(crate) fn xattrs(entry: &Entry) -> Vec<(&[u8], &[u8])> {
    entry.meta.xattrs.iter().map(|x| (x.name.as_slice(), x.value.as_slice())).collect()
}

pub(crate) fn attributes<'a>(entry: &Entry, xattrs: &'a [(&'a [u8], &'a [u8])]) -> Attributes<'a> {
    let m = &entry.meta;
    Attributes { mode: m.mode, uid: m.uid, gid: m.gid, mtime: (m.mtime.secs, m.mtime.nanos), xattrs }
}

fn write_content<D: Disk>(disk: &D, file: &D::File, content: &[u8], sparse: bool) -> std::io::Result<()> {
    if !sparse {
        return disk.write_at(file, 0, content);
    }
    disk.set_len(file, content.len() as u64)?;
    for (n, block) in content.chunks(HOLE_BYTES).enumerate() {
        if !coldspare_delta::is_zero(block) {
            disk.write_at(file, (n * HOLE_BYTES) as u64, block)?;
        }
    }
    Ok(())
}

/// Whether a file has the content of an entry. Cost: it is read.
pub(crate) fn is_content<D: Disk>(disk: &D, file: &D::File, entry: &Entry) -> std::io::Result<bool> {
    let (digest, size) = digest_file(disk, file)?;
    Ok((Some(digest), size) == (entry.digest(), entry.size()))
}

/// BLAKE3 of a file and its length, as they are now.
pub(crate) fn digest_file<D: Disk>(disk: &D, file: &D::File) -> std::io::Result<(Digest, u64)> {
    digest_file_at(disk, file, |_| ())
}

thread_local! {
    /// What content is read to: of many small files none waits for memory of its own.
    static WINDOW: RefCell<Vec<u8>> = RefCell::new(vec![0; 256 << 10]);
}

/// From here on a file is read and hashed at a time.
const LARGE_BYTES: u64 = 8 << 20;
/// What of a large file is read at once.
const LARGE_WINDOW_BYTES: usize = 1 << 20;

/// As [`digest_file`]; `read_some` is called with the bytes of each piece that was read.
pub(crate) fn digest_file_at<D: Disk>(disk: &D, file: &D::File, read_some: impl Fn(u64)) -> std::io::Result<(Digest, u64)> {
    let mut hasher = coldspare_delta::Hasher::new();
    let mut offset = 0;
    let is_whole = WINDOW.with_borrow_mut(|window| -> std::io::Result<bool> {
        while offset < LARGE_BYTES {
            let read = disk.read_at(file, offset, window)?;
            hasher.update(&window[..read]);
            offset += read as u64;
            read_some(read as u64);
            if read < window.len() {
                return Ok(true);
            }
        }
        Ok(false)
    })?;
    if !is_whole {
        offset = digest_rest(disk, file, &mut hasher, offset, read_some)?;
    }
    Ok((Digest(hasher.finish()), offset))
}

/// Hashes what is behind `offset` while another thread reads on, and tells where it ends.
///
/// A thread of its own, none of a pool: a verification may keep those for hours, and what is staged must not wait for it.
fn digest_rest<D: Disk>(
    disk: &D,
    file: &D::File,
    hasher: &mut coldspare_delta::Hasher,
    mut offset: u64,
    read_some: impl Fn(u64),
) -> std::io::Result<u64> {
    let (read, parts) = mpsc::sync_channel(1);
    let (give_back, windows) = mpsc::channel();
    std::thread::scope(move |scope| {
        scope.spawn(move || {
            for mut window in [(); 2].map(|()| vec![0; LARGE_WINDOW_BYTES]).into_iter().chain(windows) {
                let part = disk.read_at(file, offset, &mut window);
                let len = *part.as_ref().unwrap_or(&0);
                offset += len as u64;
                let is_last = len < window.len();
                if read.send(part.map(|len| (window, len))).is_err() || is_last {
                    return;
                }
            }
        });
        for part in parts {
            let (window, len): (Vec<u8>, usize) = part?;
            hasher.update(&window[..len]);
            offset += len as u64;
            read_some(len as u64);
            let _ = give_back.send(window); // nobody takes it behind the end
        }
        Ok(offset)
    })
}

#[cfg(test)]
mod tests {
    use coldspare_os::RealDisk;

    use super::*;

    #[test]
    fn content_of_any_length_has_its_digest() {
        let scratch = tempfile::tempdir().unwrap();
        let disk = RealDisk::staying();
        let root = disk.open_root(scratch.path()).unwrap();
        let (large, window) = (LARGE_BYTES as usize, LARGE_WINDOW_BYTES);
        for len in [0, 1, large - 1, large, large + 1, large + window, large + 3 * window + 7] {
            let content: Vec<u8> = (0..len as u32).flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()).step_by(3).take(len).collect();
            std::fs::write(scratch.path().join("file"), &content).unwrap();
            let file = disk.open_file(&root, b"file").unwrap();
            let told = std::cell::Cell::new(0);
            let found = digest_file_at(&disk, &file, |bytes| told.set(told.get() + bytes)).unwrap();
            assert_eq!(found, (Digest(coldspare_delta::digest(&content)), len as u64));
            assert_eq!(told.get(), len as u64);
        }
    }
}
