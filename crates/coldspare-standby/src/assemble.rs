//! Assembles large files from segments that arrive over several streams, in any order; copies are taken from the tree that
//! the changeset starts from.
//!
//! A file that is cut off stays, and the next try goes on inside it.
//!
//! Invariants: a file counts as staged only when all its segments were written and the whole has its digest.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use coldspare_core::changeset::FilePart;
use coldspare_core::{RelPath, RootId, Seq};
use coldspare_delta::{PackWrite, PieceError, RebuildError, Write, decode_pack_pieces, decode_pieces, rebuild, rebuild_pack};
use coldspare_os::Disk;

use crate::error::{StandbyError, io};
use crate::place::Places;
use crate::row::PendingRow;
use crate::standby::{Changeset, Standby, Unrecorded, lock};
use crate::store::View;
use crate::unfinished;

/// The files that are being assembled, by their number in the changeset.
pub(crate) struct Assemblies<D: Disk>(Mutex<BTreeMap<u32, Arc<Assembly<D>>>>);

impl<D: Disk> Default for Assemblies<D> {
    fn default() -> Assemblies<D> {
        Assemblies(Mutex::default())
    }
}

/// LIMIT: files that are assembled at once; the active sends as many as it has threads.
const ASSEMBLIES_MAX: usize = 256;

/// As much goes to the medium at a time, so that the filesystem finds room for it in one piece.
const WRITTEN_AT_ONCE_BYTES: u64 = 32 << 20;

/// What holes are filled with.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// LIMIT: files that copies of one part are taken from, held open at once.
const OPEN_MAX: usize = 64;

pub(crate) struct Assembly<D: Disk> {
    pub(crate) root: RootId,
    pub(crate) path: RelPath,
    pub(crate) name: Vec<u8>,
    pub(crate) file: D::File,
    /// The file that copies are taken from: what the tree has at the same path.
    pub(crate) base: Option<D::File>,
    /// Whether copies were taken from other files.
    pub(crate) has_sources: AtomicBool,
    /// Whether an earlier try left something in it.
    pub(crate) is_resumed: bool,
    /// Bytes that came since what came was last sent on to the medium.
    pub(crate) unwritten_bytes: AtomicU64,
    pub(crate) state: Mutex<State>,
}

#[derive(Default)]
pub(crate) struct State {
    written: u32,
    put: Option<Put>,
}

/// The operation that a large file's segments belong to.
pub(crate) struct Put {
    pub(crate) root: RootId,
    pub(crate) path: RelPath,
    pub(crate) entry: coldspare_core::Entry,
    pub(crate) segments: u32,
}

impl<D: Disk> Standby<D> {
    /// Stages a part of a large file with its literal bytes.
    ///
    /// # Errors
    /// `BaseDiffers` when a copy has no base; else as [`Standby::stage_batch`].
    pub fn stage_segment(&self, seq: Seq, part: &FilePart, literal: &[u8]) -> Result<(), StandbyError> {
        let changeset = self.current_as(seq)?;
        let (root, path) = (part.root, &part.path);
        if let Some((root, _)) = part.sources.iter().chain([&(root, path.clone())]).find(|(root, _)| root.0 >= self.root_count()) {
            return Err(StandbyError::Protocol(format!("a segment of root {}", root.0)));
        }
        let assembly = self.assembly(&changeset, part.file, root, path)?;
        let written = if part.sources.is_empty() {
            self.write_part(&assembly, part, literal)
        } else {
            self.write_pack_part(&changeset.manifest, &assembly, part, literal)
        };
        self.start_writing(&assembly, written?);
        let mut state = lock(&assembly.state);
        state.written += 1;
        self.complete(&changeset, part.file, &assembly, state)
    }

    /// Has what came go to the medium while more comes: the sync at the end waits for the rest only.
    pub(crate) fn start_writing(&self, assembly: &Assembly<D>, bytes: u64) {
        if assembly.unwritten_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes >= WRITTEN_AT_ONCE_BYTES {
            assembly.unwritten_bytes.store(0, Ordering::Relaxed);
            self.disk.start_writing(&assembly.file);
        }
    }

    /// Writes what a part consists of, and tells its bytes; copies are from the file that the tree has at its path.
    pub(crate) fn write_part(&self, assembly: &Assembly<D>, part: &FilePart, literal: &[u8]) -> Result<u64, StandbyError> {
        let (disk, path, bytes) = (&self.disk, &part.path, part.path.as_bytes());
        let pieces = decode_pieces(&part.pieces).map_err(|e| malformed(path, &e))?;
        let result = rebuild(part.offset, &pieces, literal, u64::MAX, &mut |write| match write {
            Write::Bytes { offset, bytes: content } => disk.write_at(&assembly.file, offset, content).map_err(io("writing", bytes)),
            Write::Copy { from, to, len } => {
                let base = assembly.base.as_ref().ok_or_else(|| base_differs(part))?;
                disk.copy_range(base, from, &assembly.file, to, u64::from(len)).map_err(|e| copy_failed(part, e))
            }
            // The file is extended to its size at the end.
            Write::Zeros { .. } if !assembly.is_resumed => Ok(()),
            Write::Zeros { offset, len } => self.zero(&assembly.file, offset, len).map_err(io("writing", bytes)),
            Write::Held { .. } => Ok(()),
        });
        rebuilt(part, result)
    }

    /// Puts zeros where an earlier try may have left something else.
    fn zero(&self, file: &D::File, offset: u64, len: u32) -> std::io::Result<()> {
        let mut found = [0; ZEROS.len()];
        let mut done = 0;
        while done < len {
            let now = (len - done).min(ZEROS.len() as u32);
            let (at, size) = (offset + u64::from(done), now as usize);
            let read = self.disk.read_at(file, at, &mut found[..size])?;
            if !coldspare_delta::is_zero(&found[..read]) {
                self.disk.write_at(file, at, &ZEROS[..size])?;
            }
            done += now;
        }
        Ok(())
    }

    /// As [`Standby::write_part`], with copies from other files of the tree.
    pub(crate) fn write_pack_part(
        &self,
        manifest: &View,
        assembly: &Assembly<D>,
        part: &FilePart,
        literal: &[u8],
    ) -> Result<u64, StandbyError> {
        assembly.has_sources.store(true, Ordering::Relaxed);
        let (disk, path, bytes) = (&self.disk, &part.path, part.path.as_bytes());
        let pieces = decode_pack_pieces(&part.pieces).map_err(|e| malformed(path, &e))?;
        let mut sizes = Vec::with_capacity(part.sources.len());
        for (root, path) in &part.sources {
            let known = manifest.manifest(*root, path)?.filter(|row| row.entry.digest().is_some());
            let known = if self.is_wanted(*root, path)? { None } else { known };
            sizes.push(known.ok_or_else(|| base_differs(part))?.entry.size());
        }
        let mut open: BTreeMap<u16, D::File> = BTreeMap::new();
        let result = rebuild_pack(part.offset, &pieces, literal, u64::MAX, &sizes, &mut |write| match write {
            PackWrite::Bytes { offset, bytes: content } => disk.write_at(&assembly.file, offset, content).map_err(io("writing", bytes)),
            PackWrite::Copy { source, from, to, len } => {
                if open.len() >= OPEN_MAX && !open.contains_key(&source) {
                    open.clear();
                }
                let file = match open.entry(source) {
                    Entry::Occupied(file) => file.into_mut(),
                    Entry::Vacant(slot) => slot.insert(self.source(&part.sources[usize::from(source)], part)?),
                };
                disk.copy_range(file, from, &assembly.file, to, u64::from(len)).map_err(|e| copy_failed(part, e))
            }
        });
        match result {
            // What a copy refers to isn't there.
            Err(RebuildError::Source { .. }) => Err(base_differs(part)),
            result => rebuilt(part, result),
        }
    }

    /// A file that the manifest has, as it is in the tree.
    fn source(&self, (root, path): &(RootId, RelPath), part: &FilePart) -> Result<D::File, StandbyError> {
        let opened = self.disk.open_dir(&self.root(*root).dir, path.parent_bytes());
        opened.and_then(|dir| self.disk.open_file(&dir, path.name())).map_err(|e| match e.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => base_differs(part),
            _ => io("opening", path.as_bytes())(e),
        })
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
    pub(crate) fn drop_given_up(&self, changeset: &Changeset<D>) -> Result<(), StandbyError> {
        for (_, assembly) in std::mem::take(&mut *lock(&changeset.assemblies.0)) {
            if lock(&assembly.state).put.is_some() {
                return Err(StandbyError::Protocol(format!("{}: segments are missing", assembly.path)));
            }
            let files = &self.root(assembly.root).files;
            self.disk.remove_file(files, &assembly.name).map_err(io("removing the unfinished", assembly.path.as_bytes()))?;
        }
        Ok(())
    }

    /// The files that are being assembled, and those that are still to be made.
    pub(crate) fn unfinished_paths(changeset: &Changeset<D>) -> Vec<(RootId, RelPath)> {
        let mut paths = lock(&changeset.rebuilds).paths();
        paths.extend(lock(&changeset.assemblies.0).values().map(|assembly| (assembly.root, assembly.path.clone())));
        paths
    }

    /// Leaves the files that are not whole to the next try.
    pub(crate) fn leave_unfinished(&self, changeset: &Changeset<D>) {
        let assemblies = std::mem::take(&mut *lock(&changeset.assemblies.0));
        if assemblies.is_empty() && self.unfinished.load(Ordering::Relaxed) == 0 {
            return;
        }
        for assembly in assemblies.values().filter(|assembly| !unfinished::is_name(&assembly.name)) {
            if let Err(e) = self.disk.remove_file(&self.root(assembly.root).files, &assembly.name) {
                tracing::warn!(path = %assembly.path, error = %e, "an unfinished file can't be removed");
            }
        }
        self.unfinished.store(self.count_unfinished(), Ordering::Relaxed);
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
        let is_given_up = |a: &Assembly<D>| (a.root, &a.path) == (root, path) && lock(&a.state).put.is_none();
        let given_up: Vec<u32> = all.range(..number).filter(|(_, a)| is_given_up(a)).map(|(&earlier, _)| earlier).collect();
        for earlier in given_up {
            let dropped = all.remove(&earlier);
            let name = dropped.as_ref().map_or(&[][..], |a| &a.name);
            self.disk.remove_file(&self.root(root).files, name).map_err(io("removing the unfinished", path.as_bytes()))?;
        }
        if all.len() >= ASSEMBLIES_MAX {
            return Err(StandbyError::Protocol(format!("more than {ASSEMBLIES_MAX} files at once")));
        }
        let mut name = unfinished::name(root, path);
        if all.values().any(|assembly| assembly.name == name) {
            name = self.fresh_name();
        }
        let (file, is_resumed) = self.open_assembly(root, path, &name)?;
        let base = self.base_of(&changeset.manifest, root, path)?;
        let (has_sources, unwritten_bytes, state) = Default::default();
        let assembly = Assembly { root, path: path.clone(), name, file, base, has_sources, is_resumed, unwritten_bytes, state };
        let assembly = Arc::new(assembly);
        all.insert(number, assembly.clone());
        Ok(assembly)
    }

    /// What the tree has at a path, to take copies from.
    pub(crate) fn base_of(&self, manifest: &View, root: RootId, path: &RelPath) -> Result<Option<D::File>, StandbyError> {
        let row = manifest.manifest(root, path)?;
        let is_file = row.is_some_and(|row| row.entry.digest().is_some()) && !self.is_wanted(root, path)?;
        let dir = if is_file { self.disk.open_dir(&self.root(root).dir, path.parent_bytes()).ok() } else { None };
        Ok(dir.and_then(|dir| self.disk.open_file(&dir, path.name()).ok()))
    }

    /// The file to assemble in, and whether an earlier try left it.
    fn open_assembly(&self, root: RootId, path: &RelPath, name: &[u8]) -> Result<(D::File, bool), StandbyError> {
        let files = &self.root(root).files;
        if self.unfinished.load(Ordering::Relaxed) > 0 && unfinished::is_name(name) {
            match self.disk.open_file_to_write(files, name) {
                Ok(file) => return Ok((file, true)),
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(io("opening the unfinished", path.as_bytes())(e)),
            }
        }
        let file = self.disk.create_file(files, name).map_err(io("staging", path.as_bytes()))?;
        Ok((file, false))
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
            // The next try must not go on inside it.
            disk.remove_file(&self.root(root).files, &assembly.name).map_err(io("removing the damaged", bytes))?;
            // A base that is damaged here shows as a content that differs: the file has to come whole.
            let has_base = assembly.is_resumed || assembly.base.is_some() || assembly.has_sources.load(Ordering::Relaxed);
            return Err(match e {
                StandbyError::ContentDiffers { root, path } if has_base => StandbyError::BaseDiffers { root, path },
                e => e,
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

fn malformed(path: &RelPath, e: &PieceError) -> StandbyError {
    StandbyError::Protocol(format!("{path}: {e}"))
}

fn base_differs(part: &FilePart) -> StandbyError {
    StandbyError::BaseDiffers { root: part.root, path: part.path.clone() }
}

fn copy_failed(part: &FilePart, e: std::io::Error) -> StandbyError {
    match e.kind() {
        ErrorKind::UnexpectedEof => base_differs(part),
        _ => io("copying", part.path.as_bytes())(e),
    }
}

/// The bytes that a part came to.
fn rebuilt(part: &FilePart, result: Result<u64, RebuildError<StandbyError>>) -> Result<u64, StandbyError> {
    match result {
        Ok(end) => Ok(end - part.offset),
        Err(RebuildError::Write(e)) => Err(e),
        Err(other) => Err(StandbyError::Protocol(format!("{}: {other}", part.path))),
    }
}
