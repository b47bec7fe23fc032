//! Reads what changed.
//!
//! Each file is examined, read and examined again; one that changed meanwhile is read anew, and held back after some
//! tries (G2: no torn file). Small files travel inside batches, large ones as segments.
//!
//! Invariants: nothing is handed over for a path whose content could not be read whole.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};

use coldspare_core::entry::{XATTR_BYTES_MAX, xattr_is_carried};
use coldspare_core::git::{self, CapturePass, Part};
use coldspare_core::{Body, ContentRef, Digest, Entry, Meta, Op, ProblemKind, RelPath, RootId, Seq, Time, Xattr, seeded_bug};
use coldspare_delta::{
    Base, BlockDigest, ChunkList, Chunking, Encoded, FileEncoder, Follows, Hasher, HeldBlocks, PackEncoded, PackEncoder, PackOffsets,
    Packed, Segment, encode_pieces, pack,
};
use coldspare_os::{Disk, FileKind, Stat};

use crate::batch::{Builder, Unsure};
use crate::bulk::{CYCLE_BYTES_MAX, FILE_BYTES_MAX, SHARE_BYTES};
use crate::capture::{CaptureError, Certainty, FilePart};
use crate::index::{Row, State, Witness};
use crate::inspect::{Inspect, Inspection};
use crate::run::{Run, lock};
use crate::visit::{Candidate, is_unchanged, is_vanished};
use crate::writer::{Change, Chunks};

/// Files up to this many bytes travel whole inside a batch.
pub(crate) const SMALL_BYTES_MAX: u64 = 128 << 10;
/// How often a file that changes while it is read is read anew.
const TRIES: usize = 4;
/// Bytes of a large file that are read at once.
const WINDOW_BYTES: usize = 4 << 20;
/// A change this shortly before the reading could be followed by another one with the same time stamp: above the
/// clock tick of any kernel.
pub(crate) const RACY_MS: i64 = 25;

/// What became of a candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// As the standby has it.
    Same(Meta),
    /// Handed over; the content is the one that the standby has.
    Attributes(Meta),
    /// Handed over with other content, or new.
    Content(Meta),
    /// Held back.
    Held,
    /// Gone meanwhile, or another than was seen; left to the next cycle.
    Vanished,
}

impl<D: Disk> Run<'_, D> {
    /// Captures one path and hands it over when the standby lacks it.
    pub(crate) fn capture_one(&self, candidate: Candidate, builder: &mut Builder) -> Result<Outcome, CaptureError> {
        if let Some(row) = candidate.row.as_ref().filter(|row| is_unchanged(row, &candidate.stat))
            && let Some(entry) = row.entry().filter(|entry| !matches!(entry.body, Body::Hardlink { .. }))
        {
            if row.version <= self.acked {
                return Ok(Outcome::Same(entry.meta.clone())); // met because of its other names
            }
            // Captured before, but the standby doesn't have it yet: nothing is read that it may have staged.
            let row = row.clone();
            return self.hand_over_known(candidate.root, candidate.path, row, builder);
        }
        match candidate.stat.kind {
            FileKind::Dir => self.capture_plain(candidate, Body::Dir, builder),
            FileKind::Symlink => {
                let Candidate { root, path, .. } = &candidate;
                let read = self.open_parent(*root, path).and_then(|dir| self.capture.disk.read_link(&dir, path.name()));
                match read {
                    Ok(target) => self.capture_plain(candidate, Body::Symlink { target }, builder),
                    Err(e) => Ok(self.not_read(*root, path, &e)),
                }
            }
            _ => {
                let Candidate { root, path, stat, row, .. } = candidate;
                // All names of a file have to be one file: that of the name that carries the content is the one seen.
                let ino = (stat.nlink > 1).then_some(stat.ino);
                self.capture_file(root, path, ino, row.as_ref(), builder)
            }
        }
    }

    fn capture_plain(&self, candidate: Candidate, body: Body, builder: &mut Builder) -> Result<Outcome, CaptureError> {
        let Candidate { root, path, stat, at_ms, row } = candidate;
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
        let entry = Entry { meta: meta(&stat, xattrs), body };
        let Some(entry) = self.checked(root, &path, entry) else { return Ok(Outcome::Held) };
        self.capture.held.release(root, &path);
        let meta = entry.meta.clone();
        let known = row.as_ref().filter(|row| row.version <= self.acked);
        if let Some(known) = known.filter(|row| row.entry() == Some(&entry)) {
            builder.change(self.put(root, &path, self.row(Some(known.version), entry, &stat, at_ms), Chunks::Keep));
            return Ok(Outcome::Same(meta));
        }
        builder.change(self.put(root, &path, self.row(None, entry.clone(), &stat, at_ms), Chunks::None));
        self.push(builder, Op::Put { root, path, entry, content: ContentRef::None })?;
        Ok(Outcome::Attributes(meta))
    }

    /// Reads a file and hands it over; with `ino`, only if it is that one.
    fn capture_file(
        &self,
        root: RootId,
        path: RelPath,
        ino: Option<u64>,
        row: Option<&Row>,
        builder: &mut Builder,
    ) -> Result<Outcome, CaptureError> {
        for _ in 0..TRIES {
            let file = match self.open(root, &path) {
                Ok(file) => file,
                Err(e) => return Ok(self.not_read(root, &path, &e)),
            };
            let before = file.before;
            if ino.is_some_and(|ino| ino != before.ino) {
                self.keep(root, &path);
                self.again(root, &path);
                return Ok(Outcome::Vanished);
            }
            let taken =
                if before.size <= SMALL_BYTES_MAX { self.read_small(&file, row, builder)? } else { self.read_large(&file, row, builder)? };
            if let Some(outcome) = taken {
                return Ok(outcome);
            }
        }
        self.hold(root, &path, ProblemKind::Unstable, format!("changed {TRIES} times while it was read; it is tried again"));
        self.hint(root, &path);
        Ok(Outcome::Held)
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
        // Within a tick of the clock its times don't tell of another write.
        if is_racy(file.before.ctime, file.at_ms) && !self.reads_the_same(file, &content) {
            return Ok(None);
        }
        self.count_read(read as u64);
        let mut inspection = file.promise.begin();
        inspection.update(&content);
        let digest = Digest(coldspare_delta::digest(&content));
        if let Some(damage) = self.damage(file, inspection, row, digest) {
            self.hold_damaged(file.root, file.path, row, damage);
            return Ok(Some(Outcome::Held));
        }
        let body = Body::File { size, digest, sparse: is_sparse(&file.before) };
        let Some(entry) = self.checked(file.root, file.path, Entry { meta: file.meta.clone(), body }) else {
            return Ok(Some(Outcome::Held));
        };
        self.hand_over_file(file, row, entry, Content::Small(content), builder).map(Some)
    }

    /// `None` when the file changed meanwhile.
    fn read_large(&self, file: &Opened<'_, D>, row: Option<&Row>, builder: &mut Builder) -> Result<Option<Outcome>, CaptureError> {
        let known = row.filter(|row| row.version <= self.acked).and_then(Row::entry);
        let size = file.before.size;
        let looks_same = known.is_some_and(|entry| entry.size() == size && entry.meta.mtime == file.meta.mtime && entry.digest().is_some());
        let body = |digest| Body::File { size, digest, sparse: is_sparse(&file.before) };
        let asks = self.asks(row, size);
        let may_be_copy = !looks_same && !asks && self.may_be_copy(file, row)?;
        if looks_same || asks || may_be_copy {
            // The standby may well have it: the digest first, the content only if not.
            let (digest, inspection) = match self.digest_of(file) {
                Ok(Some(found)) => found,
                Ok(None) => return Ok(None),
                Err(e) => return Ok(Some(self.not_read(file.root, file.path, &e))),
            };
            if let Some(damage) = self.damage(file, inspection, row, digest) {
                self.hold_damaged(file.root, file.path, row, damage);
                return Ok(Some(Outcome::Held));
            }
            let Some(entry) = self.checked(file.root, file.path, Entry { meta: file.meta.clone(), body: body(digest) }) else {
                return Ok(Some(Outcome::Held));
            };
            let same = known.and_then(Entry::digest) == Some(digest);
            if same || asks {
                return self.hand_over_file(file, row, entry, Content::Large, builder).map(Some);
            }
            if may_be_copy && let Some(sent) = self.send_copy(file, digest)? {
                let meta = entry.meta.clone();
                self.push_segments(file.root, file.path, self.row(None, entry, &file.before, file.at_ms), sent, builder)?;
                return Ok(Some(Outcome::Content(meta)));
            }
        }
        if let Some(outcome) = self.hand_over_rebuilt(file, row, builder)? {
            return Ok(Some(outcome));
        }
        let (sent, inspection) = match self.send_segments(file, row, None)? {
            Ok(Segments::Sent(sent, inspection)) => (sent, inspection),
            Ok(Segments::Changed) => return Ok(None),
            Ok(Segments::PutOff) => return Ok(Some(Outcome::Held)),
            Err(e) => return Ok(Some(self.not_read(file.root, file.path, &e))),
        };
        if let Some(damage) = self.damage(file, inspection, row, Digest(sent.digest)) {
            self.hold_damaged(file.root, file.path, row, damage);
            return Ok(Some(Outcome::Held));
        }
        let entry = Entry { meta: file.meta.clone(), body: body(Digest(sent.digest)) };
        let Some(entry) = self.checked(file.root, file.path, entry) else { return Ok(Some(Outcome::Held)) };
        let meta = entry.meta.clone();
        self.push_segments(file.root, file.path, self.row(None, entry, &file.before, file.at_ms), sent, builder)?;
        Ok(Some(Outcome::Content(meta)))
    }

    fn push_segments(&self, root: RootId, path: &RelPath, row: Row, sent: SentSegments, builder: &mut Builder) -> Result<(), CaptureError> {
        let Some(entry) = row.entry().cloned() else { return Ok(()) };
        let chunks = sent.known.map_or(Chunks::None, Chunks::Are);
        builder.change(self.put(root, path, row, chunks));
        self.capture.held.release(root, path);
        self.bulk.inspect(|bulk| bulk.handed_over(root, path, self.cycle.seq));
        let content = ContentRef::Segments { file: sent.file, segments: sent.segments };
        self.push(builder, Op::Put { root, path: path.clone(), entry, content })?;
        // The standby holds a large file open until its operation comes.
        self.send_batch(builder)
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
        let meta = entry.meta.clone();
        self.capture.held.release(root, path);
        let row_of = |version, entry| self.row(version, entry, &file.before, file.at_ms);
        if let Some(known) = row.filter(|row| row.version <= self.acked) {
            if known.entry() == Some(&entry) {
                builder.change(self.put(root, path, row_of(Some(known.version), entry), Chunks::Keep));
                return Ok(Outcome::Same(meta));
            }
            if known.entry().is_some_and(|known| known.digest() == entry.digest() && known.size() == entry.size()) {
                builder.change(self.put(root, path, row_of(None, entry.clone()), Chunks::Keep));
                self.push(builder, Op::Put { root, path: path.clone(), entry, content: ContentRef::Unchanged })?;
                return Ok(Outcome::Attributes(meta));
            }
        }
        let asks = self.asks(row, entry.size());
        let row = row_of(None, entry);
        let content = match content {
            Content::Small(bytes) => Some(bytes),
            Content::Large => None,
        };
        let unsure = Unsure { root, path: path.clone(), row, content };
        if asks {
            self.push_unsure(builder, unsure)?
        } else {
            self.send_missing(builder, unsure, &[])?
        }
        Ok(Outcome::Content(meta))
    }

    /// Hands over what the index knows, without reading it where that can be avoided.
    fn hand_over_known(&self, root: RootId, path: RelPath, row: Row, builder: &mut Builder) -> Result<Outcome, CaptureError> {
        let Some(entry) = row.entry().cloned() else { return Ok(Outcome::Vanished) };
        let meta = entry.meta.clone();
        if entry.digest().is_none() {
            self.capture.held.release(root, &path);
            self.renew(builder, root, &path, row);
            self.push(builder, Op::Put { root, path, entry, content: ContentRef::None })?;
            return Ok(Outcome::Attributes(meta));
        }
        let asks = self.asks(Some(&row), entry.size());
        let unsure = Unsure { root, path, row, content: None };
        if asks {
            self.push_unsure(builder, unsure)?
        } else {
            self.send_missing(builder, unsure, &[])?
        }
        Ok(Outcome::Content(meta))
    }

    /// Notes that a row is handed over with this cycle, where the index doesn't say so by itself.
    pub(crate) fn renew(&self, builder: &mut Builder, root: RootId, path: &RelPath, row: Row) {
        let chunks = match row.version {
            Row::UNSENT => Chunks::Keep,
            version if version == self.cycle.seq => Chunks::None, // those that are kept are of an older content
            _ => return,
        };
        builder.change(self.put(root, path, Row { version: self.cycle.seq, ..row }, chunks));
    }

    /// Hands over content that the standby lacks, reading it where it isn't at hand; of a part of it, the standby may have
    /// blocks with these digests.
    pub(crate) fn send_missing(&self, builder: &mut Builder, unsure: Unsure, there: &[BlockDigest]) -> Result<(), CaptureError> {
        let Unsure { root, path, row, content } = unsure;
        let Some(entry) = row.entry().cloned() else { return Ok(()) };
        if let Some(content) = content {
            return self.push_inline(builder, root, path, row, entry, &content);
        }
        let disk = &self.capture.disk;
        let at_ms = self.capture.disk.now_ms();
        let opened = self.open_parent(root, &path).and_then(|dir| disk.open_file(&dir, path.name()));
        let examined = opened.and_then(|file| Ok((disk.stat_file(&file)?, file)));
        let (before, file) = match examined {
            Ok(all) => all,
            Err(e) => {
                self.not_taken(root, &path, &e);
                return Ok(());
            }
        };
        let file = Opened {
            root,
            path: &path,
            file,
            before,
            at_ms,
            meta: entry.meta.clone(),
            promise: Inspect::Nothing,
            sent_bytes: AtomicU64::new(0),
        };
        let (size, digest) = (entry.size(), entry.digest());
        if before.size == size && size <= SMALL_BYTES_MAX {
            let mut content = vec![0; usize::try_from(size).expect("small") + 1];
            match disk.read_at(&file.file, 0, &mut content) {
                Ok(read) => content.truncate(read),
                Err(e) => {
                    self.not_taken(root, &path, &e);
                    return Ok(());
                }
            }
            self.count_read(content.len() as u64);
            if Some(Digest(coldspare_delta::digest(&content))) == digest {
                return self.push_inline(builder, root, path, row, entry, &content);
            }
        } else if before.size == size {
            let known = self.snapshot.row(root, &path)?;
            if there.is_empty()
                && let Some(digest) = digest
                && self.may_be_copy(&file, known.as_ref())?
                && let Some(sent) = self.send_copy(&file, digest)?
            {
                return self.push_segments(root, &path, Row { version: self.cycle.seq, ..row }, sent, builder);
            }
            if there.is_empty()
                && let Some((found, _, rebuilt)) = self.rebuilt(&file)?
                && Some(found) == digest
            {
                return self.push_rebuilt(builder, root, path.clone(), Row { version: self.cycle.seq, ..row }, entry, rebuilt);
            }
            let held = if there.is_empty() { Ok(None) } else { self.held_blocks(&file, there).map(Some) };
            let sent = match held {
                Ok(held) => self.send_segments(&file, known.as_ref(), held)?,
                Err(e) => Err(e),
            };
            match sent {
                Ok(Segments::Sent(sent, _)) if Some(Digest(sent.digest)) == digest => {
                    return self.push_segments(root, &path, Row { version: self.cycle.seq, ..row }, sent, builder);
                }
                Ok(Segments::PutOff) => {
                    lock(&self.untaken).insert((root, path.clone()));
                    return Ok(());
                }
                Ok(Segments::Sent(..) | Segments::Changed) => {}
                Err(e) => {
                    self.not_taken(root, &path, &e);
                    return Ok(());
                }
            }
        }
        // What is there is no longer what its row says.
        lock(&self.untaken).insert((root, path.clone()));
        self.hold(root, &path, ProblemKind::Unstable, "changed since it was captured; it is tried again".into());
        self.hint(root, &path);
        Ok(())
    }

    /// What was to be handed over as the index knows it could not be read: nobody but this knows that it is missing.
    fn not_taken(&self, root: RootId, path: &RelPath, e: &std::io::Error) {
        lock(&self.untaken).insert((root, path.clone()));
        if self.not_read(root, path, e) == Outcome::Vanished
            && let Some(unit) = self.units.of(root, path)
            && matches!(CapturePass::of(path.below(&unit.at.1).unwrap_or_default()), CapturePass::LooseObjects | CapturePass::Packs)
        {
            unit.note_vanished(path.clone());
        }
    }

    /// Sends the content of a large file.
    pub(crate) fn send_segments(
        &self,
        file: &Opened<'_, D>,
        row: Option<&Row>,
        held: Option<HeldBlocks>,
    ) -> Result<std::io::Result<Segments>, CaptureError> {
        let mut inspection = file.promise.begin();
        let offsets = if git::is_pack(file.path) { self.pack_offsets(file.root, file.path, file.before.size) } else { None };
        let encoded = match offsets {
            Some(offsets) => self.encode_pack(file, offsets, held.as_ref(), &mut inspection),
            None => self.encode_file(file, row, held.as_ref(), &mut inspection),
        };
        let (read, sent) = match encoded {
            Ok(Ok(encoded)) => encoded,
            Ok(Err(e)) => return Ok(Err(e)),
            Err(Stop::Failed(e)) => return Err(e),
            Err(Stop::PutOff) => {
                self.put_off(file.root, file.path);
                return Ok(Ok(Segments::PutOff));
            }
        };
        self.count_read(read);
        Ok(Ok(if self.is_stable(file, read) { Segments::Sent(sent, inspection) } else { Segments::Changed }))
    }

    /// Sends a file, compared with what the standby has at its path.
    fn encode_file(
        &self,
        file: &Opened<'_, D>,
        row: Option<&Row>,
        held: Option<&HeldBlocks>,
        inspection: &mut Inspection,
    ) -> Result<std::io::Result<(u64, SentSegments)>, Stop> {
        let number = self.next_file.fetch_add(1, Ordering::Relaxed);
        let chunking = match git::part(file.path) {
            Part::Pack | Part::PackIndex | Part::LooseObject => Chunking::Whole,
            _ => Chunking::Chunks,
        };
        let base = self.base(file, row)?;
        self.check_cost(file, base.is_none() && held.is_none())?;
        let mut encoder = FileEncoder::new(file.before.size, base, chunking);
        let mut failed = None;
        let read = self.windows(file, inspection, |window, follows| {
            let used = encoder.push(window, follows, &mut |segment| {
                if failed.is_none() {
                    let len = segment.pieces.iter().map(|piece| u64::from(piece.len_bytes())).sum();
                    let Segment { offset, pieces, literal } = segment;
                    let part = || (Vec::new(), encode_pieces(&pieces));
                    failed = self.send_unless_held(file, number, (offset, len), held, part, literal).err();
                }
            });
            failed.is_none().then_some(used)
        });
        if let Some(e) = failed {
            return Err(e);
        }
        Ok(read.map(|read| {
            let Encoded { digest, chunks, segments, .. } = encoder.finish();
            let known = chunks.map(|list| list.encode()).or_else(|| self.name_table(file));
            (read, SentSegments { file: number, digest, segments, known })
        }))
    }

    /// Sends a pack, described by those that the standby has of its repository and of what that borrows from.
    fn encode_pack(
        &self,
        file: &Opened<'_, D>,
        offsets: PackOffsets,
        held: Option<&HeldBlocks>,
        inspection: &mut Inspection,
    ) -> Result<std::io::Result<(u64, SentSegments)>, Stop> {
        let number = self.next_file.fetch_add(1, Ordering::Relaxed);
        let is_literal = self.cycle.literal.contains(&(file.root, file.path.clone()));
        let unit = self.units.of(file.root, file.path).filter(|_| !is_literal);
        let bases = self.pack_bases(unit.as_ref().map(|unit| &unit.at), file.before.size)?;
        self.check_cost(file, bases.packs.entries() == 0 && held.is_none())?;
        let mut encoder = PackEncoder::new(offsets, &bases.packs);
        let mut failed = None;
        let read = self.windows(file, inspection, |window, follows| {
            let used = encoder.push(window, follows, &mut |segment| {
                if failed.is_none() {
                    let len = segment.pieces.iter().map(|piece| u64::from(piece.len_bytes())).sum();
                    let Segment { offset, pieces, literal } = segment;
                    let part = || bases.part_of(&pieces);
                    failed = self.send_unless_held(file, number, (offset, len), held, part, literal).err();
                }
            });
            failed.is_none().then_some(used)
        });
        if let Some(e) = failed {
            return Err(e);
        }
        Ok(read.map(|read| {
            let PackEncoded { digest, table, segments, .. } = encoder.finish();
            (read, SentSegments { file: number, digest, segments, known: table.map(|table| table.encode()) })
        }))
    }

    /// Hands over a part; what it consists of is coded, with the files that copies are taken from.
    pub(crate) fn send_part(
        &self,
        file: &Opened<'_, D>,
        number: u32,
        offset: u64,
        (sources, pieces): (Vec<(RootId, RelPath)>, Vec<u8>),
        literal: Vec<u8>,
    ) -> Result<(), Stop> {
        let raw_len = literal.len();
        let literal = pack(literal, self.capture.zstd_level);
        self.count_cost(file, (packed_len(&literal) + pieces.len()) as u64)?;
        let part = FilePart { file: number, root: file.root, path: file.path.clone(), offset, sources, pieces };
        Ok(self.outlet.segment(part, literal, raw_len).map_err(CaptureError::from)?)
    }

    /// Puts a file off that would take too much of the link, where that is known: what the standby has serves nothing.
    fn check_cost(&self, file: &Opened<'_, D>, is_new: bool) -> Result<(), Stop> {
        if is_new && file.before.size > FILE_BYTES_MAX && self.may_wait(file) { Err(Stop::PutOff) } else { Ok(()) }
    }

    /// Counts bytes that go over the link; puts the file off when they become too many.
    fn count_cost(&self, file: &Opened<'_, D>, bytes: u64) -> Result<(), Stop> {
        let mine = file.sent_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let all = self.segment_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let is_too_much = mine > FILE_BYTES_MAX || mine > SHARE_BYTES && all > CYCLE_BYTES_MAX;
        if is_too_much && self.may_wait(file) { Err(Stop::PutOff) } else { Ok(()) }
    }

    /// Whether a file may be put off. LIMIT: one with several names isn't.
    fn may_wait(&self, file: &Opened<'_, D>) -> bool {
        file.before.nlink == 1 && self.bulk.is_some_and(|bulk| bulk.may_wait(&(file.root, file.path.clone())))
    }

    /// Whether the standby has to be asked for the content of a file of which the index says `row`: it may have come there
    /// as bulk, or be left from an earlier try.
    fn asks(&self, row: Option<&Row>, size: u64) -> bool {
        let is_bulk = || self.bulk.is_some() && size > SMALL_BYTES_MAX && row.is_some_and(|row| row.version == Row::UNSENT);
        self.cycle.certainty == Certainty::Ask || is_bulk()
    }

    /// The chunks of the version that the standby has at this path.
    fn base(&self, file: &Opened<'_, D>, row: Option<&Row>) -> Result<Option<Base>, CaptureError> {
        let usable = row.is_some_and(|row| row.version <= self.acked && row.entry().and_then(Entry::digest).is_some());
        if !usable || self.cycle.literal.contains(&(file.root, file.path.clone())) {
            return Ok(None);
        }
        let Some(bytes) = self.snapshot.chunks(file.root, file.path)? else { return Ok(None) };
        Ok(ChunkList::decode(&bytes).ok().map(Base::new))
    }

    fn digest_of(&self, file: &Opened<'_, D>) -> std::io::Result<Option<(Digest, Inspection)>> {
        let mut hasher = Hasher::new();
        let mut inspection = file.promise.begin();
        let read = self.windows(file, &mut inspection, |window, _| {
            hasher.update(window);
            Some(window.len())
        })?;
        self.count_read(read);
        Ok(self.is_stable(file, read).then(|| (Digest(hasher.finish()), inspection)))
    }

    /// Reads a file front to back, at most one byte beyond its size; `take` says how much of a window it consumed, and nothing
    /// when no more is needed.
    pub(crate) fn windows(
        &self,
        file: &Opened<'_, D>,
        inspection: &mut Inspection,
        mut take: impl FnMut(&[u8], Follows) -> Option<usize>,
    ) -> std::io::Result<u64> {
        let end = file.before.size;
        let mut window = vec![0; WINDOW_BYTES.min(usize::try_from(end).unwrap_or(usize::MAX).saturating_add(1))];
        let (mut filled, mut offset) = (0, 0u64);
        loop {
            let read = self.capture.disk.read_at(&file.file, offset, &mut window[filled..])?;
            inspection.update(&window[filled..filled + read]);
            offset += read as u64;
            filled += read;
            let at_end = filled < window.len() || offset > end;
            let used = take(&window[..filled], if at_end { Follows::Nothing } else { Follows::More });
            let Some(used) = used.filter(|_| !at_end) else { return Ok(offset) };
            window.copy_within(used..filled, 0);
            filled -= used;
        }
    }

    /// Whether another reading finds the same.
    fn reads_the_same(&self, file: &Opened<'_, D>, content: &[u8]) -> bool {
        let mut again = vec![0; content.len() + 1];
        self.capture.disk.read_at(&file.file, 0, &mut again).is_ok_and(|read| again[..read] == *content)
    }

    /// Whether the file is what it was before it was read.
    pub(crate) fn is_stable(&self, file: &Opened<'_, D>, read: u64) -> bool {
        let b = &file.before;
        if seeded_bug!(TornFilesAreTaken) && read == b.size {
            return true;
        }
        read == b.size
            && self.capture.disk.stat_file(&file.file).is_ok_and(|a| (a.size, a.mtime, a.ctime, a.ino) == (b.size, b.mtime, b.ctime, b.ino))
            // Within a tick of the clock its times don't tell that it was renamed, and what was read written since.
            && (!is_racy(b.ctime, file.at_ms) || self.stat_of(file.root, file.path).is_some_and(|now| now.ino == b.ino))
    }

    /// The row for an entry that was examined at `at_ms` or later; its version is this cycle's unless an older one still
    /// holds.
    pub(crate) fn row(&self, version: Option<Seq>, entry: Entry, stat: &Stat, at_ms: u64) -> Row {
        let witness = Witness { ino: stat.ino, ctime: time(stat.ctime), racy: is_racy(stat.ctime, at_ms) };
        Row { version: version.unwrap_or(self.cycle.seq), state: State::Present { entry, witness } }
    }

    pub(crate) fn put(&self, root: RootId, path: &RelPath, row: Row, chunks: Chunks) -> Change {
        Change::Put { root, path: path.clone(), row, chunks }
    }

    /// A file as it is now.
    pub(crate) fn open<'p>(&self, root: RootId, path: &'p RelPath) -> std::io::Result<Opened<'p, D>> {
        let at_ms = self.capture.disk.now_ms();
        let disk = &self.capture.disk;
        let file = disk.open_file(&self.open_parent(root, path)?, path.name())?;
        let (before, xattrs) = (disk.stat_file(&file)?, disk.xattrs_of_file(&file)?);
        let promise = self.promise(root, path);
        Ok(Opened { root, path, file, before, at_ms, meta: meta(&before, xattrs), promise, sent_bytes: AtomicU64::new(0) })
    }

    fn open_parent(&self, root: RootId, path: &RelPath) -> std::io::Result<D::Dir> {
        self.capture.disk.open_dir(&self.root(root).dir, path.parent_bytes())
    }

    /// Refuses what the standby would refuse.
    pub(crate) fn checked(&self, root: RootId, path: &RelPath, entry: Entry) -> Option<Entry> {
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
        if is_vanished(e) || e.kind() == ErrorKind::InvalidInput {
            if e.kind() != ErrorKind::NotFound {
                self.keep(root, path); // something else is there: the path was never gone
            }
            self.again(root, path);
            return Outcome::Vanished;
        }
        self.hold(root, path, ProblemKind::Unreadable, e.to_string());
        Outcome::Held
    }

    pub(crate) fn count_read(&self, bytes: u64) {
        self.counters.files_read.fetch_add(1, Ordering::Relaxed);
        self.counters.bytes_read.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A file that is being read.
pub(crate) struct Opened<'a, D: Disk> {
    pub(crate) root: RootId,
    pub(crate) path: &'a RelPath,
    pub(crate) file: D::File,
    pub(crate) before: Stat,
    /// When it was opened, in milliseconds since 1970.
    at_ms: u64,
    meta: Meta,
    /// What git, or the LFS store, promises of its content.
    pub(crate) promise: Inspect,
    /// What of it went over the link in this cycle.
    sent_bytes: AtomicU64,
}

impl<D: Disk> Opened<'_, D> {
    pub(crate) fn at_ms(&self) -> u64 {
        self.at_ms
    }

    pub(crate) fn meta(&self) -> &Meta {
        &self.meta
    }

    pub(crate) fn is_sparse(&self) -> bool {
        is_sparse(&self.before)
    }
}

/// What became of the content of a large file.
pub(crate) enum Segments {
    /// All of it was handed over.
    Sent(SentSegments, Inspection),
    /// It changed meanwhile.
    Changed,
    /// It takes too much of the link, and is left to a later cycle.
    PutOff,
}

/// Why a file isn't read to its end.
pub(crate) enum Stop {
    Failed(CaptureError),
    PutOff,
}

impl From<CaptureError> for Stop {
    fn from(e: CaptureError) -> Stop {
        Stop::Failed(e)
    }
}

enum Content {
    Small(Vec<u8>),
    Large,
}

/// What is known of a large file once all of it was handed over.
pub(crate) struct SentSegments {
    /// Its number in the changeset.
    pub(crate) file: u32,
    pub(crate) digest: [u8; 32],
    pub(crate) segments: u32,
    /// What later versions are compared with: chunks, or the entries of a pack.
    pub(crate) known: Option<Vec<u8>>,
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

fn packed_len(packed: &Packed) -> usize {
    match packed {
        Packed::Raw(bytes) | Packed::Zstd(bytes) => bytes.len(),
    }
}

fn time((secs, nanos): (i64, u32)) -> Time {
    Time { secs, nanos }
}

/// Whether the file occupies less than its size, as with holes.
fn is_sparse(stat: &Stat) -> bool {
    stat.blocks * 512 < stat.size
}

/// Whether what was examined at `at_ms` or later could have changed after that without another time.
pub(crate) fn is_racy(ctime: (i64, u32), at_ms: u64) -> bool {
    let ctime_ms = ctime.0.saturating_mul(1000) + i64::from(ctime.1) / 1_000_000;
    i64::try_from(at_ms).unwrap_or(i64::MAX) - ctime_ms < RACY_MS && !seeded_bug!(RecentTimesAreTrusted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(ctime: (i64, u32), at_ms: u64, expected: bool) {
        assert_eq!(is_racy(ctime, at_ms), expected, "{ctime:?} at {at_ms}");
    }

    #[test]
    fn a_change_within_a_clock_tick_of_the_look_is_not_trusted() {
        check((1, 0), 1000, true);
        check((1, 0), 1024, true);
        check((1, 0), 1025, false);
        check((1, 975_000_000), 2000, false);
        check((1, 976_000_000), 2000, true);
        check((9, 0), 1000, true); // from the future: the clock was set back
        check((-1, 0), 1000, false);
    }
}
