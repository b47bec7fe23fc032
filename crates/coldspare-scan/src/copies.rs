//! Copies: content that is new at its path, and that the standby has at another one.
//!
//! A file that was copied, or that got another name, is found by its size: only where the standby has a file of just that
//! size is a new one read twice, its digest first. Then it travels as a copy of that file, which costs a few bytes.
//!
//! The standby checks what it copied as it checks all content: a source that isn't what the index says costs a try, and
//! then the content travels.

use coldspare_core::{Body, Digest, Entry, RelPath, RootId, key};
use coldspare_delta::{PackPiece, Packed, SEGMENT_SPAN_BYTES_MAX, encode_pack_pieces};
use coldspare_os::Disk;
use redb::TableDefinition;

use crate::capture::{CaptureError, FilePart};
use crate::index::{IndexError, Row, Snapshot};
use crate::read::{Opened, SMALL_BYTES_MAX, SentSegments};
use crate::run::Run;

/// Size and key of each file of which copies are looked for; the index keeps it beside its rows.
pub(crate) const SIZES: TableDefinition<'static, &[u8], ()> = TableDefinition::new("sizes");
/// LIMIT: files of one size that a new one is compared with.
const CANDIDATES_MAX: usize = 64;

/// A file that the standby has.
struct Candidate {
    at: (RootId, RelPath),
    digest: Digest,
}

impl<D: Disk> Run<'_, D> {
    /// Whether a file, of which the index says `row`, may be a copy of one that the standby has.
    pub(crate) fn may_be_copy(&self, file: &Opened<'_, D>, row: Option<&Row>) -> Result<bool, CaptureError> {
        let size = file.before.size;
        // One that changed in place is like what it was. One that was seen while it was copied is of another size.
        let is_in_place = row.filter(|row| row.version <= self.acked).and_then(Row::entry).is_some_and(|entry| entry.size() == size);
        let is_literal = || self.cycle.literal.contains(&(file.root, file.path.clone()));
        Ok(!is_in_place && !is_literal() && !self.candidates(size)?.is_empty())
    }

    /// Sends a file that the standby has elsewhere, by naming that; `None` when it hasn't.
    pub(crate) fn send_copy(&self, file: &Opened<'_, D>, digest: Digest) -> Result<Option<SentSegments>, CaptureError> {
        let size = file.before.size;
        let Some(from) = self.candidates(size)?.into_iter().find(|candidate| candidate.digest == digest) else { return Ok(None) };
        let number = self.next_file.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut segments = 0;
        for offset in (0..size).step_by(SEGMENT_SPAN_BYTES_MAX as usize) {
            let len = u32::try_from((size - offset).min(SEGMENT_SPAN_BYTES_MAX)).expect("a segment's span");
            let pieces = encode_pack_pieces(&[PackPiece::Copy { source: 0, offset, len }]);
            let part = FilePart { file: number, root: file.root, path: file.path.clone(), offset, sources: vec![from.at.clone()], pieces };
            self.outlet.segment(part, Packed::Raw(Vec::new()), 0)?;
            segments += 1;
        }
        let known = self.snapshot.chunks(from.at.0, &from.at.1)?;
        Ok(Some(SentSegments { file: number, digest: digest.0, segments, known }))
    }

    /// Files of this size that the standby has.
    fn candidates(&self, size: u64) -> Result<Vec<Candidate>, IndexError> {
        let mut found = Vec::new();
        for at in self.snapshot.of_size(size, CANDIDATES_MAX)? {
            let row = self.snapshot.row(at.0, &at.1)?.filter(|row| row.version <= self.acked);
            let digest = row.and_then(|row| row.entry().filter(|entry| entry.size() == size).and_then(Entry::digest));
            found.extend(digest.map(|digest| Candidate { at, digest }));
        }
        Ok(found)
    }
}

impl Snapshot {
    /// Large files of a size, at most so many of them.
    fn of_size(&self, size: u64, limit: usize) -> Result<Vec<(RootId, RelPath)>, IndexError> {
        let (start, end) = (size.to_be_bytes(), size.saturating_add(1).to_be_bytes());
        let mut found = Vec::new();
        for row in self.sizes.range(start.as_slice()..end.as_slice()).map_err(|e| self.store(e))?.take(limit) {
            let (at, _) = row.map_err(|e| self.store(e))?;
            found.push(key::decode(&at.value()[start.len()..]).map_err(|e| self.damaged(&e.to_string()))?);
        }
        Ok(found)
    }
}

/// Keeps the sizes as the rows are: the row of `key` was `old`, and is `new`.
pub(crate) fn note_size(
    sizes: &mut redb::Table<'_, &'static [u8], ()>,
    key: &[u8],
    old: Option<&Row>,
    new: &Row,
) -> Result<(), redb::Error> {
    let (old, new) = (old.and_then(size_of), size_of(new));
    if old == new {
        return Ok(());
    }
    let at = |size: u64| [&size.to_be_bytes(), key].concat();
    if let Some(old) = old {
        sizes.remove(at(old).as_slice())?;
    }
    if let Some(new) = new {
        sizes.insert(at(new).as_slice(), ())?;
    }
    Ok(())
}

fn size_of(row: &Row) -> Option<u64> {
    match &row.entry()?.body {
        Body::File { size, .. } if *size > SMALL_BYTES_MAX => Some(*size),
        _ => None,
    }
}
