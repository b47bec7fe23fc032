//! Writes rows to the index while a cycle runs, in few transactions.
//!
//! One thread owns the store's writes; those who capture hand rows over and go on. What is not yet durable when the
//! process dies is captured again.

use std::time::{Duration, Instant};

use coldspare_core::{RelPath, RootId, Seq, key};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use redb::{Durability, ReadableTable};

use crate::copies::{SIZES, note_size};
use crate::index::{CHUNKS, GONE, Index, IndexError, LINKS, ROWS, Row, State, Witness, link_key};

/// One change of the index.
pub(crate) enum Change {
    /// A path is as the row says.
    Put { root: RootId, path: RelPath, row: Row, chunks: Chunks },
    /// Something of a path, or below it, could not be handed over: what the standby doesn't have up to `acked` has to be
    /// handed over later, whatever is acknowledged until then.
    Unsent { root: RootId, path: RelPath, acked: Seq },
    /// What the index says of a path may be wrong: it is read and handed over again.
    Distrusted { root: RootId, path: RelPath },
    /// A folder is at another path, with all below it.
    Renamed { root: RootId, from: RelPath, to: RelPath, version: Seq },
    /// A path and all below it are gone.
    Gone { root: RootId, path: RelPath, version: Seq },
    /// The names of a file that has several.
    Names { dev: u64, ino: u64, names: Vec<(RootId, RelPath)> },
}

impl Change {
    /// The path that it is of, when it is of one.
    pub(crate) fn path(&self) -> Option<(RootId, &RelPath)> {
        match self {
            Change::Put { root, path, .. }
            | Change::Unsent { root, path, .. }
            | Change::Distrusted { root, path }
            | Change::Gone { root, path, .. } => Some((*root, path)),
            Change::Renamed { root, from, .. } => Some((*root, from)),
            Change::Names { .. } => None,
        }
    }
}

/// What becomes of the chunk list of a path.
pub(crate) enum Chunks {
    /// As it was.
    Keep,
    /// None is kept.
    None,
    /// This one.
    Are(Vec<u8>),
}

/// The writing thread's handle.
pub(crate) struct Writer<'scope> {
    changes: Sender<Vec<Change>>,
    thread: std::thread::ScopedJoinHandle<'scope, Result<(), IndexError>>,
}

/// LIMIT: changes in one transaction, so that neither memory nor the time to commit grows with the cycle.
const CHANGES_PER_COMMIT: usize = 20_000;
/// LIMIT: hand-overs that wait.
const QUEUE: usize = 64;
/// How long changes of a long cycle may stay undurable.
const DURABLE_EVERY: Duration = Duration::from_secs(10);

impl<'scope> Writer<'scope> {
    /// Starts the thread.
    pub(crate) fn start<'env>(scope: &'scope std::thread::Scope<'scope, 'env>, index: &'env Index) -> Writer<'scope> {
        let (changes, inbox) = crossbeam_channel::bounded(QUEUE);
        let thread = std::thread::Builder::new().name("index-writer".into());
        let thread = thread.spawn_scoped(scope, move || write_all(index, &inbox)).expect("a thread can be started");
        Writer { changes, thread }
    }

    /// Hands changes over; waits when the store is behind.
    pub(crate) fn send(&self, changes: Vec<Change>) {
        if !changes.is_empty() {
            // A failed writer has hung up; `finish` says why.
            let _ = self.changes.send(changes);
        }
    }

    /// Waits until all is durable.
    pub(crate) fn finish(self) -> Result<(), IndexError> {
        drop(self.changes);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn write_all(index: &Index, inbox: &Receiver<Vec<Change>>) -> Result<(), IndexError> {
    let mut durable_at = Instant::now();
    let mut wrote = false;
    while let Ok(first) = inbox.recv() {
        let is_due = durable_at.elapsed() > DURABLE_EVERY;
        let durability = if is_due { Durability::Immediate } else { Durability::None };
        index.write(durability, |txn| {
            let mut batch = first;
            let mut count = 0;
            loop {
                count += batch.len();
                apply(txn, batch)?;
                if count >= CHANGES_PER_COMMIT {
                    return Ok(());
                }
                batch = match inbox.recv_timeout(Duration::from_millis(20)) {
                    Ok(next) => next,
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(()),
                };
            }
        })?;
        wrote = true;
        if is_due {
            durable_at = Instant::now();
        }
    }
    if wrote {
        // A durable commit makes those before it durable.
        index.write(Durability::Immediate, |_| Ok(()))?;
    }
    Ok(())
}

pub(crate) fn apply(txn: &redb::WriteTransaction, changes: Vec<Change>) -> Result<(), redb::Error> {
    let mut rows = txn.open_table(ROWS)?;
    let mut chunk_lists = txn.open_table(CHUNKS)?;
    let mut gone = txn.open_table(GONE)?;
    let mut links = txn.open_table(LINKS)?;
    let mut sizes = txn.open_table(SIZES)?;
    for change in changes {
        match change {
            Change::Put { root, path, row, chunks } => {
                let key = key::encode(root, &path);
                let old = rows.insert(key.as_slice(), row.encode().as_slice())?.and_then(|old| Row::decode(old.value()).ok());
                note_size(&mut sizes, &key, old.as_ref(), &row)?;
                match old {
                    Some(Row { state: State::Gone, .. }) => is_back(&rows, &mut gone, root, &path, row.version)?,
                    Some(old) if old.is_dir() && !row.is_dir() => {
                        gone.insert(key.as_slice(), row.version.0)?;
                        let below = keys_below(&rows, root, &path)?;
                        bury(&mut rows, &mut chunk_lists, &mut sizes, below, row.version)?;
                    }
                    _ => {}
                }
                match chunks {
                    Chunks::Keep => {}
                    Chunks::None => drop(chunk_lists.remove(key.as_slice())?),
                    Chunks::Are(list) => drop(chunk_lists.insert(key.as_slice(), list.as_slice())?),
                }
            }
            Change::Renamed { root, from, to, version } => {
                let mut tables = Tables { rows: &mut rows, chunk_lists: &mut chunk_lists, gone: &mut gone, sizes: &mut sizes };
                rename(&mut tables, root, &from, &to, version)?;
            }
            Change::Gone { root, path, version } => {
                let mut keys = vec![key::encode(root, &path)];
                gone.insert(keys[0].as_slice(), version.0)?;
                keys.extend(keys_below(&rows, root, &path)?);
                bury(&mut rows, &mut chunk_lists, &mut sizes, keys, version)?;
            }
            Change::Unsent { root, path, acked } => {
                let mut keys = vec![key::encode(root, &path)];
                keys.extend(keys_below(&rows, root, &path)?);
                for (n, key) in keys.iter().enumerate() {
                    let old = rows.get(key.as_slice())?.and_then(|row| Row::decode(row.value()).ok());
                    // Of a path without a row the standby may have something from before the index was made.
                    let old = old.or((n == 0).then_some(Row { version: Row::UNSENT, state: State::Gone }));
                    if let Some(row) = old.filter(|row| row.version > acked) {
                        rows.insert(key.as_slice(), Row { version: Row::UNSENT, ..row }.encode().as_slice())?;
                    }
                }
            }
            Change::Distrusted { root, path } => {
                let key = key::encode(root, &path);
                let old = rows.get(key.as_slice())?.and_then(|row| Row::decode(row.value()).ok());
                let state = match old.map(|row| row.state) {
                    Some(State::Present { entry, witness }) => State::Present { entry, witness: Witness { racy: true, ..witness } },
                    Some(State::Gone) | None => State::Gone,
                };
                rows.insert(key.as_slice(), Row { version: Row::UNSENT, state }.encode().as_slice())?;
            }
            Change::Names { dev, ino, names } => {
                let key = link_key(dev, ino);
                if names.len() > 1 {
                    links.insert(key.as_slice(), coldspare_core::codec::encode(&names).as_slice())?;
                } else {
                    links.remove(key.as_slice())?;
                }
            }
        }
    }
    Ok(())
}

type Rows<'txn> = redb::Table<'txn, &'static [u8], &'static [u8]>;
type Sizes<'txn> = redb::Table<'txn, &'static [u8], ()>;

fn keys_below(rows: &Rows<'_>, root: RootId, path: &RelPath) -> Result<Vec<Vec<u8>>, redb::Error> {
    let mut keys = Vec::new();
    for range in [key::children(root, path), key::deeper(root, path)] {
        for row in rows.range(range.start.as_slice()..range.end.as_slice())? {
            keys.push(row?.0.value().to_vec());
        }
    }
    Ok(keys)
}

/// Makes rows say that their paths are gone.
fn bury(
    rows: &mut Rows<'_>,
    chunk_lists: &mut Rows<'_>,
    sizes: &mut Sizes<'_>,
    keys: Vec<Vec<u8>>,
    version: Seq,
) -> Result<(), redb::Error> {
    let tombstone = Row { version, state: State::Gone };
    let bytes = tombstone.encode();
    for key in keys {
        let old = rows.insert(key.as_slice(), bytes.as_slice())?.and_then(|old| Row::decode(old.value()).ok());
        note_size(sizes, &key, old.as_ref(), &tombstone)?;
        chunk_lists.remove(key.as_slice())?;
    }
    Ok(())
}

/// The tables that tell what is where.
struct Tables<'a, 'txn> {
    rows: &'a mut Rows<'txn>,
    chunk_lists: &'a mut Rows<'txn>,
    gone: &'a mut redb::Table<'txn, &'static [u8], u64>,
    sizes: &'a mut Sizes<'txn>,
}

/// LIMIT: rows of a renamed folder that are held in memory.
const RENAMED_AT_ONCE: usize = 10_000;

/// Moves what is known of a folder, and of all below it, to another path.
fn rename(tables: &mut Tables<'_, '_>, root: RootId, from: &RelPath, to: &RelPath, version: Seq) -> Result<(), redb::Error> {
    let own = key::encode(root, from);
    tables.gone.insert(own.as_slice(), version.0)?;
    let mut own_end = own.clone();
    own_end.push(0);
    for range in [own..own_end, key::children(root, from), key::deeper(root, from)] {
        let mut start = range.start;
        loop {
            let mut some = Vec::new();
            for row in tables.rows.range(start.as_slice()..range.end.as_slice())?.take(RENAMED_AT_ONCE) {
                let (key, value) = row?;
                some.push((key.value().to_vec(), Row::decode(value.value()).map_err(redb::Error::Corrupted)?));
            }
            let Some((last, _)) = some.last() else { break };
            start.clone_from(last);
            start.push(0); // the next key
            for (old_key, old) in some {
                let Ok((_, path)) = key::decode(&old_key) else { continue };
                let Ok(new_path) = to.join_path(path.below(from).unwrap_or_default()) else { continue };
                if matches!(old.state, State::Present { .. }) {
                    let new_key = key::encode(root, &new_path);
                    let row = Row { version, ..old.clone() };
                    let was =
                        tables.rows.insert(new_key.as_slice(), row.encode().as_slice())?.and_then(|old| Row::decode(old.value()).ok());
                    note_size(tables.sizes, &new_key, was.as_ref(), &row)?;
                    if matches!(was, Some(Row { state: State::Gone, .. })) {
                        is_back(tables.rows, tables.gone, root, &new_path, version)?;
                    }
                    let chunks = tables.chunk_lists.remove(old_key.as_slice())?.map(|list| list.value().to_vec());
                    if let Some(list) = chunks {
                        tables.chunk_lists.insert(new_key.as_slice(), list.as_slice())?;
                    }
                }
                let tombstone = Row { version, state: State::Gone };
                tables.rows.insert(old_key.as_slice(), tombstone.encode().as_slice())?;
                note_size(tables.sizes, &old_key, Some(&old), &tombstone)?;
            }
        }
    }
    Ok(())
}

/// A path that was gone is back: each entry below it that isn't is a removal of its own from now on, since what is gone is
/// found through what is above it.
fn is_back(
    rows: &Rows<'_>,
    gone: &mut redb::Table<'_, &'static [u8], u64>,
    root: RootId,
    path: &RelPath,
    version: Seq,
) -> Result<(), redb::Error> {
    gone.remove(key::encode(root, path).as_slice())?;
    let range = key::children(root, path);
    for row in rows.range(range.start.as_slice()..range.end.as_slice())? {
        let (key, value) = row?;
        if matches!(Row::decode(value.value()), Ok(Row { state: State::Gone, .. })) {
            gone.insert(key.value(), version.0)?;
        }
    }
    Ok(())
}
