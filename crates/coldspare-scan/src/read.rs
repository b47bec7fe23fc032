//! Reads what changed and gathers it into batches.
//!
//! Each file is examined, read and examined again; one that changed meanwhile is read anew, and held back after some
//! tries (G2: no torn file). Small files travel inside batches, large ones as segments.
//!
//! Invariants: a row is written only after its operation was handed over; nothing is handed over for a path whose
//! content could not be read whole.

use std::sync::atomic::Ordering;

use coldspare_core::changeset::{Ask, Have};
use coldspare_core::entry::{XATTR_BYTES_MAX, xattr_is_carried};
use coldspare_core::git::{self, Part};
use coldspare_core::{Body, ContentRef, Digest, Entry, Meta, Op, ProblemKind, RelPath, RootId, Time, Xattr};
use coldspare_delta::{Base, ChunkList, Chunking, Encoded, FileEncoder, Follows, Hasher, Segment, encode_pieces, pack};
use coldspare_os::{Disk, FileKind, Stat};

use crate::capture::{CaptureError, Certainty, FilePart};
use crate::index::{Row, State, Witness};
use crate::visit::{Candidate, Run, is_unchanged, is_vanished};
use crate::watch::now_ms;
use crate::writer::{Change, Chunks};

/// Files up to this many bytes travel whole inside a batch.
pub(crate) const SMALL_BYTES_MAX: u64 = 128 << 10;
/// LIMIT: bytes of content in one batch; one file may pass it.
const BATCH_BYTES: usize = 512 << 10;
/// LIMIT: operations in one batch.
const BATCH_OPS: usize = 512;
/// LIMIT: estimated bytes of the operations of one batch; the wire takes twice that and one operation more.
const BATCH_BODY_BYTES: usize = 256 << 10;
/// How often a file that changes while it is read is read anew.
const TRIES: usize = 4;
/// Bytes of a large file that are read at once.
const WINDOW_BYTES: usize = 4 << 20;
/// A change this shortly before the reading could be followed by another one with the same time stamp: above the
/// clock tick of any kernel.
const RACY_MS: i64 = 25;

/// Gathers operations of one thread.
#[derive(Default)]
pub(crate) struct Builder {
    ops: Vec<Op>,
    body_bytes: usize,
    payload: Vec<u8>,
    changes: Vec<Change>,
    unsure: Vec<Unsure>,
    unsure_bytes: usize,
}

/// A file of which the standby may have the content.
struct Unsure {
    root: RootId,
    path: RelPath,
    entry: Entry,
    content: Option<Vec<u8>>,
    /// The row to write; `None` when the index has it already.
    change: Option<Change>,
}

/// What became of a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// As the standby has it.
    Same,
    /// Handed over; the content is the one that the standby has.
    Attributes,
    /// Handed over with other content, or new.
    Content,
    /// Not handed over: held back, or gone meanwhile.
    NotTaken,
}

impl Builder {
    pub(crate) fn change(&mut self, change: Change) {
        self.changes.push(change);
    }
}

impl<D: Disk> Run<'_, D> {
    /// Captures one path and hands it over when the standby lacks it.
    pub(crate) fn capture_one(&self, candidate: Candidate, builder: &mut Builder) -> Result<Outcome, CaptureError> {
        let Candidate { root, path, stat, row } = candidate;
        if let Some(row) = &row
            && is_unchanged(row, &stat)
            && let State::Present { entry, .. } = &row.state
            && !matches!(entry.body, Body::Hardlink { .. })
        {
            // Captured before, but the standby doesn't have it yet: nothing is read that it may have staged.
            return self.hand_over_known(root, path, entry.clone(), builder);
        }
        if row.as_ref().is_some_and(Row::is_dir) && stat.kind != FileKind::Dir {
            builder.change(Change::Gone { root, path: path.clone(), version: self.cycle.seq });
        }
        match stat.kind {
            FileKind::Dir => self.capture_plain(root, path, &stat, row.as_ref(), Body::Dir, builder),
            FileKind::Symlink => {
                let read = self.open_parent(root, &path).and_then(|dir| self.capture.disk.read_link(&dir, path.name()));
                match read {
                    Ok(target) => self.capture_plain(root, path, &stat, row.as_ref(), Body::Symlink { target }, builder),
                    Err(e) => Ok(self.not_read(root, &path, &e)),
                }
            }
            _ => self.capture_file(root, path, row.as_ref(), builder),
        }
    }

    fn capture_plain(
        &self,
        root: RootId,
        path: RelPath,
        stat: &Stat,
        row: Option<&Row>,
        body: Body,
        builder: &mut Builder,
    ) -> Result<Outcome, CaptureError> {
        let xattrs = if body == Body::Dir {
            let dir = self.capture.disk.open_dir(&self.root(root).dir, path.as_bytes());
            dir.and_then(|dir| self.capture.disk.xattrs(&dir, b""))
        } else {
            Ok(Vec::new())
        };
        let xattrs = match xattrs {
            Ok(xattrs) => xattrs,
            Err(e) => return Ok(self.not_read(root, &path, &e)),
        };
        let entry = Entry { meta: meta(stat, xattrs), body };
        let Some(entry) = self.checked(root, &path, entry) else { return Ok(Outcome::NotTaken) };
        let known = row.filter(|row| row.version <= self.acked).and_then(Row::entry);
        if known == Some(&entry) {
            builder.change(self.put_row(root, &path, row.map(|r| r.version), entry, stat, Chunks::Keep));
            return Ok(Outcome::Same);
        }
        builder.change(self.put_row(root, &path, None, entry.clone(), stat, Chunks::None));
        self.capture.held.release(root, &path);
        self.push(builder, Op::Put { root, path, entry, content: ContentRef::None })?;
        Ok(Outcome::Attributes)
    }

    fn capture_file(&self, root: RootId, path: RelPath, row: Option<&Row>, builder: &mut Builder) -> Result<Outcome, CaptureError> {
        for _ in 0..TRIES {
            let disk = &self.capture.disk;
            let opened = self.open_parent(root, &path).and_then(|dir| disk.open_file(&dir, path.name()));
            let examined = opened.and_then(|file| Ok((disk.stat_file(&file)?, disk.xattrs_of_file(&file)?, file)));
            let (before, xattrs, file) = match examined {
                Ok(all) => all,
                Err(e) => return Ok(self.not_read(root, &path, &e)),
            };
            let file = Opened { root, path: &path, file, before, meta: meta(&before, xattrs) };
            let taken =
                if before.size <= SMALL_BYTES_MAX { self.read_small(&file, row, builder)? } else { self.read_large(&file, row, builder)? };
            if let Some(outcome) = taken {
                return Ok(outcome);
            }
        }
        self.hold(root, &path, ProblemKind::Unstable, format!("changed {TRIES} times while it was read; it is tried again"));
        self.again(root, &path);
        Ok(Outcome::NotTaken)
    }

    /// `None` when the file changed meanwhile.
    fn read_small(&self, file: &Opened<'_, D>, row: Option<&Row>, builder: &mut Builder) -> Result<Option<Outcome>, CaptureError> {
        let (disk, size) = (&self.capture.disk, file.before.size);
        // One byte more than there should be: growth shows.
        let mut content = vec![0; usize::try_from(size).expect("small") + 1];
        let read = match disk.read_at(&file.file, 0, &mut content) {
            Ok(read) => read,
            Err(e) => return Ok(Some(self.not_read(file.root, file.path, &e))),
        };
        content.truncate(read);
        if !self.is_stable(file, read as u64) {
            return Ok(None);
        }
        self.count_read(read as u64);
        let digest = Digest(coldspare_delta::digest(&content));
        let body = Body::File { size, digest, sparse: is_sparse(&file.before) };
        let Some(entry) = self.checked(file.root, file.path, Entry { meta: file.meta.clone(), body }) else {
            return Ok(Some(Outcome::NotTaken));
        };
        self.hand_over_file(file, row, entry, Content::Small(content), builder).map(Some)
    }

    /// `None` when the file changed meanwhile.
    fn read_large(&self, file: &Opened<'_, D>, row: Option<&Row>, builder: &mut Builder) -> Result<Option<Outcome>, CaptureError> {
        let known = row.filter(|row| row.version <= self.acked).and_then(Row::entry);
        let size = file.before.size;
        let looks_same = known.is_some_and(|entry| entry.size() == size && entry.meta.mtime == file.meta.mtime && entry.digest().is_some());
        let body = |digest| Body::File { size, digest, sparse: is_sparse(&file.before) };
        if looks_same || self.cycle.certainty == Certainty::Ask {
            // The standby may well have it: the digest first, the content only if not.
            let digest = match self.digest_of(file) {
                Ok(Some(digest)) => digest,
                Ok(None) => return Ok(None),
                Err(e) => return Ok(Some(self.not_read(file.root, file.path, &e))),
            };
            let Some(entry) = self.checked(file.root, file.path, Entry { meta: file.meta.clone(), body: body(digest) }) else {
                return Ok(Some(Outcome::NotTaken));
            };
            let same = known.and_then(Entry::digest) == Some(digest);
            if same || self.cycle.certainty == Certainty::Ask {
                return self.hand_over_file(file, row, entry, Content::Large, builder).map(Some);
            }
        }
        let sent = match self.send_segments(file, row)? {
            Ok(Some(sent)) => sent,
            Ok(None) => return Ok(None),
            Err(e) => return Ok(Some(self.not_read(file.root, file.path, &e))),
        };
        let entry = Entry { meta: file.meta.clone(), body: body(Digest(sent.encoded.digest)) };
        let Some(entry) = self.checked(file.root, file.path, entry) else { return Ok(Some(Outcome::NotTaken)) };
        self.push_segments(file.root, file.path, entry, sent, &file.before, builder)?;
        Ok(Some(Outcome::Content))
    }

    fn push_segments(
        &self,
        root: RootId,
        path: &RelPath,
        entry: Entry,
        sent: SentSegments,
        stat: &Stat,
        builder: &mut Builder,
    ) -> Result<(), CaptureError> {
        let chunks = sent.encoded.chunks.as_ref().map_or(Chunks::None, |list| Chunks::Are(list.encode()));
        builder.change(self.put_row(root, path, None, entry.clone(), stat, chunks));
        self.capture.held.release(root, path);
        let content = ContentRef::Segments { file: sent.file, segments: sent.encoded.segments };
        self.push(builder, Op::Put { root, path: path.clone(), entry, content })
    }

    /// Hands over a file whose digest is known, with as little content as the standby needs.
    fn hand_over_file(
        &self,
        file: &Opened<'_, D>,
        row: Option<&Row>,
        entry: Entry,
        content: Content,
        builder: &mut Builder,
    ) -> Result<Outcome, CaptureError> {
        let (root, path) = (file.root, file.path);
        let known = row.filter(|row| row.version <= self.acked).and_then(Row::entry);
        if known == Some(&entry) {
            builder.change(self.put_row(root, path, row.map(|r| r.version), entry, &file.before, Chunks::Keep));
            return Ok(Outcome::Same);
        }
        self.capture.held.release(root, path);
        if known.is_some_and(|known| known.digest() == entry.digest() && known.size() == entry.size()) {
            builder.change(self.put_row(root, path, None, entry.clone(), &file.before, Chunks::Keep));
            self.push(builder, Op::Put { root, path: path.clone(), entry, content: ContentRef::Unchanged })?;
            return Ok(Outcome::Attributes);
        }
        let change = self.put_row(root, path, None, entry.clone(), &file.before, Chunks::None);
        match (content, self.cycle.certainty) {
            (Content::Small(bytes), Certainty::Sure) => {
                builder.change(change);
                self.push_inline(builder, root, path.clone(), entry, &bytes)?;
            }
            (content, _) => {
                let content = match content {
                    Content::Small(bytes) => Some(bytes),
                    Content::Large => None,
                };
                self.push_unsure(builder, Unsure { root, path: path.clone(), entry, content, change: Some(change) })?;
            }
        }
        Ok(Outcome::Content)
    }

    /// Hands over what the index knows, without reading it where that can be avoided.
    fn hand_over_known(&self, root: RootId, path: RelPath, entry: Entry, builder: &mut Builder) -> Result<Outcome, CaptureError> {
        self.capture.held.release(root, &path);
        if entry.digest().is_none() {
            self.push(builder, Op::Put { root, path, entry, content: ContentRef::None })?;
            return Ok(Outcome::Attributes);
        }
        let unsure = Unsure { root, path, entry, content: None, change: None };
        if self.cycle.certainty == Certainty::Ask {
            self.push_unsure(builder, unsure)?;
        } else {
            self.send_missing(builder, unsure)?;
        }
        Ok(Outcome::Content)
    }

    fn push_unsure(&self, builder: &mut Builder, unsure: Unsure) -> Result<(), CaptureError> {
        builder.unsure_bytes += unsure.content.as_ref().map_or(0, Vec::len);
        builder.unsure.push(unsure);
        if builder.unsure.len() >= BATCH_OPS || builder.unsure_bytes >= BATCH_BYTES {
            self.resolve_unsure(builder)?;
        }
        Ok(())
    }

    /// Asks for all that is unsure and hands over what is missing.
    fn resolve_unsure(&self, builder: &mut Builder) -> Result<(), CaptureError> {
        let unsure = std::mem::take(&mut builder.unsure);
        builder.unsure_bytes = 0;
        if unsure.is_empty() {
            return Ok(());
        }
        let ask = |u: &Unsure| Ask {
            root: u.root,
            path: u.path.clone(),
            digest: u.entry.digest().expect("only files are asked for"),
            size: u.entry.size(),
        };
        let answers = self.outlet.ask(unsure.iter().map(ask).collect())?;
        for (mut unsure, have) in unsure.into_iter().zip(answers) {
            let content = match have {
                Have::AtPath => ContentRef::Unchanged,
                Have::Staged => ContentRef::Staged,
                Have::Missing => {
                    self.send_missing(builder, unsure)?;
                    continue;
                }
            };
            builder.changes.extend(unsure.change.take());
            self.push(builder, Op::Put { root: unsure.root, path: unsure.path, entry: unsure.entry, content })?;
        }
        Ok(())
    }

    /// Hands over content that the standby lacks, reading it where it isn't at hand.
    fn send_missing(&self, builder: &mut Builder, unsure: Unsure) -> Result<(), CaptureError> {
        let Unsure { root, path, entry, content, change } = unsure;
        if let Some(content) = content {
            builder.changes.extend(change);
            return self.push_inline(builder, root, path, entry, &content);
        }
        let disk = &self.capture.disk;
        let opened = self.open_parent(root, &path).and_then(|dir| disk.open_file(&dir, path.name()));
        let examined = opened.and_then(|file| Ok((disk.stat_file(&file)?, file)));
        let (before, file) = match examined {
            Ok(all) => all,
            Err(e) => {
                self.not_read(root, &path, &e);
                return Ok(());
            }
        };
        let file = Opened { root, path: &path, file, before, meta: entry.meta.clone() };
        let (size, digest) = (entry.size(), entry.digest());
        if before.size != size && before.size <= SMALL_BYTES_MAX {
            return self.capture_file(root, path, None, builder).map(drop);
        }
        if size <= SMALL_BYTES_MAX {
            let mut content = vec![0; usize::try_from(size).expect("small") + 1];
            match disk.read_at(&file.file, 0, &mut content) {
                Ok(read) => content.truncate(read),
                Err(e) => {
                    self.not_read(root, &path, &e);
                    return Ok(());
                }
            }
            self.count_read(content.len() as u64);
            if Some(Digest(coldspare_delta::digest(&content))) != digest {
                return self.capture_file(root, path, None, builder).map(drop); // changed since it was captured
            }
            builder.changes.extend(change);
            return self.push_inline(builder, root, path, entry, &content);
        }
        match self.send_segments(&file, None)? {
            Ok(Some(sent)) if Some(Digest(sent.encoded.digest)) == digest => self.push_segments(root, &path, entry, sent, &before, builder),
            Ok(_) => {
                self.hold(root, &path, ProblemKind::Unstable, "changed since it was captured; it is tried again".into());
                self.again(root, &path);
                Ok(())
            }
            Err(e) => {
                self.not_read(root, &path, &e);
                Ok(())
            }
        }
    }

    /// Sends the content of a large file; `Ok(Ok(None))` when it changed meanwhile.
    fn send_segments(&self, file: &Opened<'_, D>, row: Option<&Row>) -> Result<std::io::Result<Option<SentSegments>>, CaptureError> {
        let number = self.next_file.fetch_add(1, Ordering::Relaxed);
        let chunking = match git::part(file.path) {
            Part::Pack | Part::PackIndex | Part::LooseObject => Chunking::Whole,
            _ => Chunking::Chunks,
        };
        let mut encoder = FileEncoder::new(file.before.size, self.base(file, row)?, chunking);
        let mut failed = None;
        let read = self.windows(file, |window, follows| {
            encoder.push(window, follows, &mut |segment| {
                if failed.is_none() {
                    failed = self.send_segment(file, number, segment).err();
                }
            })
        });
        if let Some(e) = failed {
            return Err(e);
        }
        let read = match read {
            Ok(read) => read,
            Err(e) => return Ok(Err(e)),
        };
        self.count_read(read);
        if !self.is_stable(file, read) {
            return Ok(Ok(None));
        }
        Ok(Ok(Some(SentSegments { file: number, encoded: encoder.finish() })))
    }

    fn send_segment(&self, file: &Opened<'_, D>, number: u32, segment: Segment) -> Result<(), CaptureError> {
        let raw_len = segment.literal.len();
        let literal = pack(segment.literal, self.capture.zstd_level);
        let pieces = encode_pieces(&segment.pieces);
        let part = FilePart { file: number, root: file.root, path: file.path.clone(), offset: segment.offset, pieces };
        Ok(self.outlet.segment(part, literal, raw_len)?)
    }

    /// The chunks of the version that the standby has at this path.
    fn base(&self, file: &Opened<'_, D>, row: Option<&Row>) -> Result<Option<Base>, CaptureError> {
        let usable = row.is_some_and(|row| row.version <= self.acked && row.entry().and_then(Entry::digest).is_some());
        if !usable || self.cycle.literal.contains(&(file.root, file.path.clone())) {
            return Ok(None);
        }
        let Some(bytes) = self.snapshot.chunks(file.root, file.path)? else { return Ok(None) };
        Ok(ChunkList::decode(&bytes).ok().map(|list| Base::new(&list)))
    }

    fn digest_of(&self, file: &Opened<'_, D>) -> std::io::Result<Option<Digest>> {
        let mut hasher = Hasher::new();
        let read = self.windows(file, |window, _| {
            hasher.update(window);
            window.len()
        })?;
        self.count_read(read);
        Ok(self.is_stable(file, read).then(|| Digest(hasher.finish())))
    }

    /// Reads a file front to back, at most one byte beyond its size; `take` says how much of a window it consumed.
    fn windows(&self, file: &Opened<'_, D>, mut take: impl FnMut(&[u8], Follows) -> usize) -> std::io::Result<u64> {
        let end = file.before.size;
        let mut window = vec![0; WINDOW_BYTES.min(usize::try_from(end).unwrap_or(usize::MAX).saturating_add(1))];
        let (mut filled, mut offset) = (0, 0u64);
        loop {
            let read = self.capture.disk.read_at(&file.file, offset, &mut window[filled..])?;
            offset += read as u64;
            filled += read;
            let at_end = filled < window.len() || offset > end;
            let used = take(&window[..filled], if at_end { Follows::Nothing } else { Follows::More });
            if at_end {
                return Ok(offset);
            }
            window.copy_within(used..filled, 0);
            filled -= used;
        }
    }

    /// Whether the file is what it was before it was read.
    fn is_stable(&self, file: &Opened<'_, D>, read: u64) -> bool {
        let b = &file.before;
        read == b.size
            && self.capture.disk.stat_file(&file.file).is_ok_and(|a| (a.size, a.mtime, a.ctime, a.ino) == (b.size, b.mtime, b.ctime, b.ino))
    }

    /// Puts an operation into the batch and hands the batch over when it is full.
    pub(crate) fn push(&self, builder: &mut Builder, op: Op) -> Result<(), CaptureError> {
        builder.body_bytes += op_bytes(&op);
        builder.ops.push(op);
        if builder.ops.len() >= BATCH_OPS || builder.body_bytes >= BATCH_BODY_BYTES || builder.payload.len() >= BATCH_BYTES {
            self.send_batch(builder)?;
        }
        Ok(())
    }

    fn push_inline(&self, builder: &mut Builder, root: RootId, path: RelPath, entry: Entry, content: &[u8]) -> Result<(), CaptureError> {
        builder.payload.extend_from_slice(content);
        self.push(builder, Op::Put { root, path, entry, content: ContentRef::Inline })
    }

    fn send_batch(&self, builder: &mut Builder) -> Result<(), CaptureError> {
        let ops = std::mem::take(&mut builder.ops);
        let payload = std::mem::take(&mut builder.payload);
        builder.body_bytes = 0;
        if !ops.is_empty() {
            self.counters.ops.fetch_add(ops.len() as u64, Ordering::Relaxed);
            let raw_len = payload.len();
            self.outlet.batch(ops, pack(payload, self.capture.zstd_level), raw_len)?;
        }
        self.writer.send(std::mem::take(&mut builder.changes));
        Ok(())
    }

    /// Hands over all that is gathered.
    pub(crate) fn flush(&self, builder: &mut Builder) -> Result<(), CaptureError> {
        self.resolve_unsure(builder)?;
        self.send_batch(builder)
    }

    /// The row for an entry; its version is this cycle's unless an older one still holds.
    pub(crate) fn put_row(
        &self,
        root: RootId,
        path: &RelPath,
        version: Option<coldspare_core::Seq>,
        entry: Entry,
        stat: &Stat,
        chunks: Chunks,
    ) -> Change {
        let witness = Witness { ino: stat.ino, ctime: time(stat.ctime), racy: is_racy(stat) };
        let row = Row { version: version.unwrap_or(self.cycle.seq), state: State::Present { entry, witness } };
        Change::Put { root, path: path.clone(), row, chunks }
    }

    fn open_parent(&self, root: RootId, path: &RelPath) -> std::io::Result<D::Dir> {
        self.capture.disk.open_dir(&self.root(root).dir, path.parent_bytes())
    }

    /// Refuses what the standby would refuse.
    fn checked(&self, root: RootId, path: &RelPath, entry: Entry) -> Option<Entry> {
        let xattr_bytes: usize = entry.meta.xattrs.iter().map(|x| x.name.len() + x.value.len()).sum();
        if let Err(e) = entry.check(path) {
            let detail = if xattr_bytes > XATTR_BYTES_MAX { format!("{xattr_bytes} bytes of extended attributes") } else { e.to_string() };
            self.hold(root, path, ProblemKind::Unsupported, detail);
            return None;
        }
        Some(entry)
    }

    /// A path that could not be read: gone meanwhile, or held back.
    fn not_read(&self, root: RootId, path: &RelPath, e: &std::io::Error) -> Outcome {
        if is_vanished(e) || e.kind() == std::io::ErrorKind::InvalidInput {
            self.again(root, path); // gone, or no regular file any more
        } else {
            self.hold(root, path, ProblemKind::Unreadable, e.to_string());
        }
        Outcome::NotTaken
    }

    fn count_read(&self, bytes: u64) {
        self.counters.files_read.fetch_add(1, Ordering::Relaxed);
        self.counters.bytes_read.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A file that is being read.
struct Opened<'a, D: Disk> {
    root: RootId,
    path: &'a RelPath,
    file: D::File,
    before: Stat,
    meta: Meta,
}

enum Content {
    Small(Vec<u8>),
    Large,
}

struct SentSegments {
    file: u32,
    encoded: Encoded,
}

pub(crate) fn meta(stat: &Stat, xattrs: Vec<(Vec<u8>, Vec<u8>)>) -> Meta {
    let mode = match stat.kind {
        FileKind::Symlink => 0o777,
        FileKind::Dir => stat.mode,
        _ => stat.mode & !0o6000, // what grants the owner's rights stays at home
    };
    let carried = xattrs.into_iter().filter(|(name, _)| xattr_is_carried(name));
    let mut xattrs: Vec<_> = carried.map(|(name, value)| Xattr { name, value }).collect();
    xattrs.sort();
    Meta { mode, uid: stat.uid, gid: stat.gid, mtime: time(stat.mtime), xattrs }
}

fn time((secs, nanos): (i64, u32)) -> Time {
    Time { secs, nanos }
}

/// Whether the file occupies less than its size, as with holes.
fn is_sparse(stat: &Stat) -> bool {
    stat.blocks * 512 < stat.size
}

fn is_racy(stat: &Stat) -> bool {
    let ctime_ms = stat.ctime.0.saturating_mul(1000) + i64::from(stat.ctime.1) / 1_000_000;
    i64::try_from(now_ms()).unwrap_or(i64::MAX) - ctime_ms < RACY_MS
}

/// About how many bytes an operation takes on the wire.
fn op_bytes(op: &Op) -> usize {
    let extra = match op {
        Op::Delete { .. } | Op::Keep { .. } => 0,
        Op::Put { entry, .. } => {
            let body = match &entry.body {
                Body::Symlink { target } => target.len(),
                Body::Hardlink { to } => to.as_bytes().len(),
                Body::File { .. } => 48,
                Body::Dir => 0,
            };
            body + entry.meta.xattrs.iter().map(|x| x.name.len() + x.value.len() + 8).sum::<usize>() + 40
        }
    };
    op.path().as_bytes().len() + extra + 8
}
