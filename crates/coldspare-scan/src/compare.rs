//! What the index says was sent, as it is compared with what the standby has of it.
//!
//! Invariants: a row that is newer than the changeset, or of which nobody knows whether the standby has it, is left out,
//! and so is all below it where that may be unknown too.

use std::ops::Bound;

use coldspare_core::compare::{Cut, Cutter, Extent, Gather, LeftOut, Span, Tally, Tree, Without, tally};
use coldspare_core::{Entry, RelPath, RootId, Seq, codec, key};
use coldspare_os::Disk;
use rayon::prelude::*;

use crate::capture::{Capture, CaptureError};
use crate::dirty::Hint;
use crate::index::{Index, IndexError, Row, Snapshot, store_error};
use crate::writer::Change;

/// All that was sent up to one changeset; it stays as it is.
pub struct Sent {
    snapshot: Snapshot,
    seq: Seq,
    without: Without,
    /// All of it in parts, where nothing is left out.
    whole: Option<Cut>,
}

/// The start of a row.
struct Head<'a> {
    version: Seq,
    is_gone: bool,
    rest: &'a [u8],
}

/// As rows encode what is no longer there.
const GONE: u8 = 1;

impl Index {
    /// What was sent up to `seq`, which the standby acknowledged last; no cycle is under way, and none was begun since.
    ///
    /// # Errors
    /// `Store`.
    pub fn sent(&self, seq: Seq) -> Result<Sent, IndexError> {
        Ok(Sent { snapshot: self.snapshot()?, seq, without: Without::default(), whole: None })
    }
}

impl Sent {
    /// Finds what the standby may have otherwise, and leaves it out from now on.
    ///
    /// Cost: one pass over the index.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn leave_out(&mut self) -> Result<Vec<LeftOut>, IndexError> {
        let mut gather = Gather::default();
        let mut cutter = Cutter::new(self.snapshot.path_count()?);
        self.rows(&Span::all(), |k, row| {
            let Head { version, is_gone, rest } = self.head(row)?;
            if version <= self.seq && !is_gone {
                cutter.add(k, self.entry(rest)?);
            } else if version > self.seq {
                let (root, path) = key::decode(k).map_err(|e| self.damaged(e.to_string()))?;
                // Below what was kept the standby may have what was never in this index.
                let extent = if version == Row::UNSENT || is_gone { Extent::All } else { Extent::Itself };
                gather.add(root, path, extent);
            }
            Ok(true)
        })?;
        let left_out = gather.finish();
        self.without = Without::new(&left_out);
        // Else what is below of it took part, too.
        self.whole = left_out.is_empty().then(|| cutter.finish());
        Ok(left_out)
    }

    fn rows(&self, span: &Span, mut each: impl FnMut(&[u8], &[u8]) -> Result<bool, IndexError>) -> Result<(), IndexError> {
        let fail = |e: redb::StorageError| store_error(&self.snapshot.path, e.into());
        let to = if span.to.is_empty() { Bound::Unbounded } else { Bound::Excluded(span.to.as_slice()) };
        for row in self.snapshot.rows.range::<&[u8]>((Bound::Included(span.from.as_slice()), to)).map_err(fail)? {
            let (k, row) = row.map_err(fail)?;
            if !each(k.value(), row.value())? {
                break;
            }
        }
        Ok(())
    }

    fn head<'a>(&self, row: &'a [u8]) -> Result<Head<'a>, IndexError> {
        let decoded = codec::decode_first::<(Seq, u8)>(row).map_err(|e| self.damaged(e.to_string()))?;
        let ((version, state), rest) = decoded;
        Ok(Head { version, is_gone: state == GONE, rest })
    }

    /// The entry that a row has, encoded.
    fn entry<'a>(&self, rest: &'a [u8]) -> Result<&'a [u8], IndexError> {
        let (_, behind) = codec::decode_first::<Entry>(rest).map_err(|e| self.damaged(e.to_string()))?;
        Ok(&rest[..rest.len() - behind.len()])
    }

    fn damaged(&self, detail: String) -> IndexError {
        IndexError::Damaged { path: self.snapshot.path.clone(), detail }
    }
}

impl Tree for Sent {
    type Error = IndexError;

    fn keys(&self, span: &Span, each: &mut dyn FnMut(&[u8]) -> bool) -> Result<(), IndexError> {
        self.rows(span, |k, row| Ok(self.head(row)?.is_gone || !self.without.takes_part(k) || each(k)))
    }

    fn entries(&self, span: &Span, each: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), IndexError> {
        self.rows(span, |k, row| {
            let Head { is_gone, rest, .. } = self.head(row)?;
            if is_gone || !self.without.takes_part(k) {
                return Ok(true);
            }
            Ok(each(k, self.entry(rest)?))
        })
    }

    fn whole(&self) -> Option<&Cut> {
        self.whole.as_ref()
    }

    fn tallies(&self, spans: &[Span]) -> Result<Vec<Tally>, IndexError> {
        spans.par_iter().map(|span| tally(self, span)).collect()
    }
}

impl<D: Disk> Capture<D> {
    /// Has paths read and sent again, whatever the index says of them: it may be what is wrong.
    ///
    /// # Errors
    /// `Index`.
    pub fn send_again(&self, paths: &[(RootId, RelPath)]) -> Result<(), CaptureError> {
        self.index.apply(paths.iter().map(|(root, path)| Change::Distrusted { root: *root, path: path.clone() }).collect())?;
        if let Some(watch) = &self.watch {
            for (root, path) in paths {
                let dir = path.parent().unwrap_or_else(RelPath::root);
                watch.dirty().add(*root, dir, path.name(), Hint::Replaced, self.disk.now_ms());
            }
        }
        Ok(())
    }
}
