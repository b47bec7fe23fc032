//! Assembles large files from segments that arrive over several streams, in any order.
//!
//! Invariants: a file counts as staged only when all its segments were written and the whole has its digest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use coldspare_core::{Entry, RelPath, RootId, Seq};
use coldspare_delta::{Write, decode_pieces, rebuild};
use coldspare_os::Disk;

use crate::error::{StandbyError, io};
use crate::place::Places;
use crate::row::PendingRow;
use crate::standby::{Changeset, Standby, Unrecorded, lock};

/// The files that are being assembled, by their number in the changeset.
pub(crate) struct Assemblies<D: Disk>(Mutex<BTreeMap<u32, Arc<Assembly<D>>>>);

impl<D: Disk> Default for Assemblies<D> {
    fn default() -> Assemblies<D> {
        Assemblies(Mutex::default())
    }
}

/// LIMIT: files that are assembled at once; the active sends as many as it has threads.
const ASSEMBLIES_MAX: usize = 256;

pub(crate) struct Assembly<D: Disk> {
    root: RootId,
    path: RelPath,
    name: Vec<u8>,
    file: D::File,
    /// The file that copies are taken from: what the tree has at the same path.
    base: Option<D::File>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    written: u32,
    put: Option<Put>,
}

/// The operation that a large file's segments belong to.
pub(crate) struct Put {
    pub(crate) root: RootId,
    pub(crate) path: RelPath,
    pub(crate) entry: Entry,
    pub(crate) segments: u32,
}

impl<D: Disk> Standby<D> {
    /// Stages a part of a large file; `pieces` are as `coldspare-delta` codes them.
    ///
    /// # Errors
    /// `BaseDiffers` when a copy has no base; else as [`Standby::stage_batch`].
    pub fn stage_segment(
        &self,
        seq: Seq,
        number: u32,
        (root, path): (RootId, &RelPath),
        offset: u64,
        pieces: &[u8],
        literal: &[u8],
    ) -> Result<(), StandbyError> {
        let changeset = self.current_as(seq)?;
        if root.0 >= self.root_count() {
            return Err(StandbyError::Protocol(format!("a segment of root {}", root.0)));
        }
        let pieces = decode_pieces(pieces).map_err(|e| StandbyError::Protocol(format!("{path}: {e}")))?;
        let assembly = self.assembly(&changeset, number, root, path)?;
        let (disk, bytes) = (&self.disk, path.as_bytes());
        let base_differs = || StandbyError::BaseDiffers { root, path: path.clone() };
        let result = rebuild(offset, &pieces, literal, u64::MAX, &mut |write| match write {
            Write::Bytes { offset, bytes: content } => disk.write_at(&assembly.file, offset, content).map_err(io("writing", bytes)),
            Write::Copy { from, to, len } => {
                let base = assembly.base.as_ref().ok_or_else(base_differs)?;
                disk.copy_range(base, from, &assembly.file, to, u64::from(len)).map_err(|e| match e.kind() {
                    std::io::ErrorKind::UnexpectedEof => base_differs(),
                    _ => io("copying", bytes)(e),
                })
            }
            Write::Zeros { .. } => Ok(()), // the file is extended to its size at the end
        });
        result.map_err(|e| match e {
            coldspare_delta::RebuildError::Write(e) => e,
            other => StandbyError::Protocol(format!("{path}: {other}")),
        })?;
        let mut state = lock(&assembly.state);
        state.written += 1;
        self.complete(&changeset, number, &assembly, state)
    }

    pub(crate) fn assemble_put(&self, changeset: &Changeset<D>, number: u32, put: Put) -> Result<(), StandbyError> {
        let assembly = self.assembly(changeset, number, put.root, &put.path)?;
        let mut state = lock(&assembly.state);
        if state.put.is_some() {
            return Err(StandbyError::Protocol(format!("{}: file number {number} is used twice", put.path)));
        }
        state.put = Some(put);
        self.complete(changeset, number, &assembly, state)
    }

    /// Whether every file whose operation came is complete; what is left otherwise was given up by the active.
    pub(crate) fn drop_unfinished(&self, changeset: &Changeset<D>) -> Result<(), StandbyError> {
        for (_, assembly) in std::mem::take(&mut *lock(&changeset.assemblies.0)) {
            if lock(&assembly.state).put.is_some() {
                return Err(StandbyError::Protocol(format!("{}: segments are missing", assembly.path)));
            }
            let files = &self.root(assembly.root).files;
            self.disk.remove_file(files, &assembly.name).map_err(io("removing the unfinished", assembly.path.as_bytes()))?;
        }
        Ok(())
    }

    /// Removes the files that are not whole; trouble with it costs only room.
    pub(crate) fn remove_unfinished(&self, changeset: &Changeset<D>) {
        for (_, assembly) in std::mem::take(&mut *lock(&changeset.assemblies.0)) {
            if let Err(e) = self.disk.remove_file(&self.root(assembly.root).files, &assembly.name) {
                tracing::warn!(path = %assembly.path, error = %e, "an unfinished file can't be removed");
            }
        }
    }

    fn assembly(&self, changeset: &Changeset<D>, number: u32, root: RootId, path: &RelPath) -> Result<Arc<Assembly<D>>, StandbyError> {
        let mut all = lock(&changeset.assemblies.0);
        if let Some(known) = all.get(&number) {
            if (known.root, &known.path) != (root, path) {
                return Err(StandbyError::Protocol(format!("file number {number} is {} and {path}", known.path)));
            }
            return Ok(known.clone());
        }
        // A file that changed while it was read is sent anew under another number: what came of it is of no use.
        let earlier = all.range(..number).find(|(_, a)| (a.root, &a.path) == (root, path) && lock(&a.state).put.is_none());
        if let Some((&earlier, _)) = earlier {
            let dropped = all.remove(&earlier);
            let name = dropped.as_ref().map_or(&[][..], |a| &a.name);
            self.disk.remove_file(&self.root(root).files, name).map_err(io("removing the unfinished", path.as_bytes()))?;
        }
        if all.len() >= ASSEMBLIES_MAX {
            return Err(StandbyError::Protocol(format!("more than {ASSEMBLIES_MAX} files at once")));
        }
        let name = self.fresh_name();
        let file = self.disk.create_file(&self.root(root).files, &name).map_err(io("staging", path.as_bytes()))?;
        let is_file = changeset.manifest.manifest(root, path)?.is_some_and(|row| row.entry.digest().is_some());
        let dir = if is_file { self.disk.open_dir(&self.root(root).dir, path.parent_bytes()).ok() } else { None };
        let base = dir.and_then(|dir| self.disk.open_file(&dir, path.name()).ok());
        let assembly = Assembly { root, path: path.clone(), name, file, base, state: Mutex::default() };
        let assembly = Arc::new(assembly);
        all.insert(number, assembly.clone());
        Ok(assembly)
    }

    /// Checks and places the file when nothing is missing.
    fn complete(
        &self,
        changeset: &Changeset<D>,
        number: u32,
        assembly: &Assembly<D>,
        mut state: std::sync::MutexGuard<'_, State>,
    ) -> Result<(), StandbyError> {
        if state.put.as_ref().is_none_or(|put| state.written < put.segments) {
            return Ok(());
        }
        let Some(put) = state.put.take() else { return Ok(()) };
        drop(state);
        lock(&changeset.assemblies.0).remove(&number);
        let Put { root, path, entry, .. } = put;
        let (disk, bytes) = (&self.disk, path.as_bytes());
        disk.set_len(&assembly.file, entry.size()).map_err(io("writing", bytes))?;
        if let Err(e) = self.check_digest(&assembly.file, root, &path, &entry) {
            // A base that is damaged here shows as a content that differs: the file has to come whole.
            return Err(match (e, &assembly.base) {
                (StandbyError::ContentDiffers { root, path }, Some(_)) => StandbyError::BaseDiffers { root, path },
                (e, _) => e,
            });
        }
        let ino = self.set_file_attributes(&assembly.file, &path, &entry)?.ino;
        let mut places = Places::new(self, changeset);
        let (spot, name, action) = places.spot(root, &path)?;
        disk.rename(&self.root(root).files, &assembly.name, spot.dir(), &name).map_err(io("staging", bytes))?;
        let mut staged = Unrecorded { bytes: entry.size(), ..Unrecorded::default() };
        if let Some(at) = action.staged() {
            staged.few.add(root, at);
        }
        staged.rows.push((root, path.clone(), PendingRow::new(Some(entry), action, ino)));
        self.note(changeset, staged)
    }
}
