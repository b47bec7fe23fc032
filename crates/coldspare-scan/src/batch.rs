//! Gathers operations into batches, with the small files that they bring.
//!
//! Invariants: a row is written only after its operation was handed over; what a held builder has gathered is handed over
//! as a whole, or not at all.

use std::sync::atomic::Ordering;

use coldspare_core::changeset::{Ask, Have};
use coldspare_core::{Body, ContentRef, Entry, Op, RelPath, RootId, git};
use coldspare_delta::pack;
use coldspare_os::Disk;

use crate::capture::CaptureError;
use crate::index::Row;
use crate::rebuilt::{Described, Rebuilt};
use crate::run::{Run, lock};
use crate::writer::{Change, Chunks};

/// LIMIT: bytes of content in one batch; one file may pass it.
const BATCH_BYTES: usize = 512 << 10;
/// LIMIT: operations in one batch.
const BATCH_OPS: usize = 512;
/// LIMIT: estimated bytes of the operations of one batch; the wire takes twice that and one operation more.
const BATCH_BODY_BYTES: usize = 256 << 10;

/// Gathers operations of one thread.
#[derive(Default)]
pub(crate) struct Builder {
    ops: Vec<Op>,
    body_bytes: usize,
    payload: Vec<u8>,
    changes: Vec<Change>,
    unsure: Vec<Unsure>,
    unsure_bytes: usize,
    /// While set, nothing leaves: what was claimed for it is given back when it is discarded.
    held: Option<Vec<(RootId, RelPath, u64)>>,
}

/// A file of which the standby may have the content.
pub(crate) struct Unsure {
    pub(crate) root: RootId,
    pub(crate) path: RelPath,
    /// What the index is to say of it.
    pub(crate) row: Row,
    pub(crate) content: Option<Vec<u8>>,
}

impl Builder {
    /// One that hands over nothing before [`Run::commit`].
    pub(crate) fn held() -> Builder {
        Builder { held: Some(Vec::new()), ..Builder::default() }
    }

    pub(crate) fn claimed(&mut self, root: RootId, path: &RelPath, claim: u64) {
        if let Some(claims) = &mut self.held {
            claims.push((root, path.clone(), claim));
        }
    }

    pub(crate) fn change(&mut self, change: Change) {
        self.changes.push(change);
    }
}

impl<D: Disk> Run<'_, D> {
    /// Puts an operation into the batch and hands the batch over when it is full.
    pub(crate) fn push(&self, builder: &mut Builder, op: Op) -> Result<(), CaptureError> {
        builder.body_bytes += op_bytes(&op);
        builder.ops.push(op);
        if builder.held.is_some() {
            return Ok(());
        }
        if builder.ops.len() >= BATCH_OPS || builder.body_bytes >= BATCH_BODY_BYTES || builder.payload.len() >= BATCH_BYTES {
            self.send_batch(builder)?;
        }
        Ok(())
    }

    pub(crate) fn push_inline(
        &self,
        builder: &mut Builder,
        root: RootId,
        path: RelPath,
        row: Row,
        entry: Entry,
        content: &[u8],
    ) -> Result<(), CaptureError> {
        let table = if git::is_pack(&path) { self.pack_table(root, &path, content).map(|table| table.encode()) } else { None };
        let Described { names, recipe } = self.describe(root, &path, content)?;
        if let Some(recipe) = recipe {
            return self.push_rebuilt(builder, root, path, Row { version: self.cycle.seq, ..row }, entry, Rebuilt { names, recipe });
        }
        self.capture.held.release(root, &path);
        let known = table.or(names).map_or(Chunks::None, Chunks::Are);
        builder.change(self.put(root, &path, Row { version: self.cycle.seq, ..row }, known));
        builder.payload.extend_from_slice(content);
        self.push(builder, Op::Put { root, path, entry, content: ContentRef::Inline })
    }

    /// Hands over a file that the standby makes by itself.
    pub(crate) fn push_rebuilt(
        &self,
        builder: &mut Builder,
        root: RootId,
        path: RelPath,
        row: Row,
        entry: Entry,
        Rebuilt { names, recipe }: Rebuilt,
    ) -> Result<(), CaptureError> {
        self.capture.held.release(root, &path);
        self.bulk.inspect(|bulk| bulk.handed_over(root, &path, self.cycle.seq));
        builder.change(self.put(root, &path, row, names.map_or(Chunks::None, Chunks::Are)));
        let recipe_bytes = u32::try_from(recipe.len()).expect("a recipe keeps its limit");
        builder.payload.extend_from_slice(&recipe);
        self.push(builder, Op::Put { root, path, entry, content: ContentRef::Rebuilt { recipe_bytes } })
    }

    pub(crate) fn push_unsure(&self, builder: &mut Builder, unsure: Unsure) -> Result<(), CaptureError> {
        builder.unsure_bytes += unsure.content.as_ref().map_or(0, Vec::len);
        builder.unsure.push(unsure);
        if builder.unsure.len() >= BATCH_OPS || builder.unsure_bytes >= BATCH_BYTES {
            self.resolve_unsure(builder)?;
        }
        Ok(())
    }

    /// Asks for all that is unsure and hands over what is missing.
    pub(crate) fn resolve_unsure(&self, builder: &mut Builder) -> Result<(), CaptureError> {
        let unsure = std::mem::take(&mut builder.unsure);
        builder.unsure_bytes = 0;
        if unsure.is_empty() {
            return Ok(());
        }
        let ask = |u: &Unsure| {
            let entry = u.row.entry().expect("only what is there is asked for");
            Ask { root: u.root, path: u.path.clone(), digest: entry.digest().expect("only files are asked for"), size: entry.size() }
        };
        let answers = self.outlet.ask(unsure.iter().map(ask).collect())?;
        for (unsure, have) in unsure.into_iter().zip(answers) {
            let content = match have {
                Have::AtPath => ContentRef::Unchanged,
                Have::Staged => ContentRef::Staged,
                Have::Missing | Have::NoRoom => {
                    self.send_missing(builder, unsure, &[])?;
                    continue;
                }
                Have::Part(digests) => {
                    self.send_missing(builder, unsure, &digests)?;
                    continue;
                }
            };
            let Unsure { root, path, row, .. } = unsure;
            let Some(entry) = row.entry().cloned() else { continue };
            self.capture.held.release(root, &path);
            self.bulk.inspect(|bulk| bulk.handed_over(root, &path, self.cycle.seq));
            self.renew(builder, root, &path, row);
            self.push(builder, Op::Put { root, path, entry, content })?;
        }
        Ok(())
    }

    /// Hands over what a held builder has gathered.
    pub(crate) fn commit(&self, mut builder: Builder) -> Result<(), CaptureError> {
        builder.held = None;
        self.flush(&mut builder)
    }

    /// Forgets what a held builder has gathered.
    pub(crate) fn discard(&self, builder: Builder) {
        let mut claims = lock(&self.claims);
        for (_, _, claim) in builder.held.into_iter().flatten() {
            claims.remove(&claim);
        }
    }

    /// Forgets what a held builder has gathered of paths for which `is_stale` says so, and as what they were met.
    pub(crate) fn forget(&self, builder: &mut Builder, is_stale: impl Fn(RootId, &RelPath) -> bool) {
        let mut payload = Vec::new();
        let mut at = 0;
        builder.ops.retain(|op| {
            let bytes = inline_bytes(op);
            let keep = !is_stale(op.root(), op.path());
            if keep {
                payload.extend_from_slice(&builder.payload[at..at + bytes]);
            }
            at += bytes;
            keep
        });
        builder.payload = payload;
        builder.changes.retain(|change| change.path().is_none_or(|(root, path)| !is_stale(root, path)));
        self.forget_met(&is_stale);
        let mut claims = lock(&self.claims);
        builder.held.iter_mut().for_each(|held| {
            held.retain(|(root, path, claim)| {
                let keep = !is_stale(*root, path);
                if !keep {
                    claims.remove(claim);
                }
                keep
            });
        });
    }

    pub(crate) fn send_batch(&self, builder: &mut Builder) -> Result<(), CaptureError> {
        if builder.held.is_some() {
            return Ok(());
        }
        let mut ops = std::mem::take(&mut builder.ops);
        let mut payload = std::mem::take(&mut builder.payload);
        builder.body_bytes = 0;
        while !ops.is_empty() {
            // One batch, unless they were held back until now.
            let (count, bytes) = first_batch(&ops);
            let (later_ops, later_payload) = (ops.split_off(count), payload.split_off(bytes));
            self.counters.ops.fetch_add(count as u64, Ordering::Relaxed);
            self.outlet.batch(ops, pack(payload, self.capture.zstd_level), bytes)?;
            (ops, payload) = (later_ops, later_payload);
        }
        self.writer.send(std::mem::take(&mut builder.changes));
        Ok(())
    }

    /// Hands over all that is gathered.
    pub(crate) fn flush(&self, builder: &mut Builder) -> Result<(), CaptureError> {
        self.resolve_unsure(builder)?;
        self.send_batch(builder)
    }
}

/// How many of the operations fit into one batch, and how many bytes of content they bring.
fn first_batch(ops: &[Op]) -> (usize, usize) {
    let (mut body_bytes, mut content_bytes) = (0, 0);
    for (n, op) in ops.iter().enumerate() {
        if n >= BATCH_OPS || body_bytes >= BATCH_BODY_BYTES || content_bytes >= BATCH_BYTES {
            return (n, content_bytes);
        }
        body_bytes += op_bytes(op);
        content_bytes += inline_bytes(op);
    }
    (ops.len(), content_bytes)
}

/// Bytes of a payload that belong to an operation.
fn inline_bytes(op: &Op) -> usize {
    usize::try_from(op.payload_bytes()).expect("small")
}

/// About how many bytes an operation takes on the wire.
fn op_bytes(op: &Op) -> usize {
    let extra = match op {
        Op::Delete { .. } | Op::Keep { .. } => 0,
        Op::Rename { to, .. } => to.as_bytes().len(),
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
